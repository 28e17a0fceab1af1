"""C_SignInit and C_Sign without what python-pkcs11 does around them at each signature: a tenth of the time of a software token.

Only the two calls that every signature makes, on handles that python-pkcs11 opened. Where the token refuses to begin, the answer is
None: the caller then asks through python-pkcs11, which says what is wrong. The function list is a version, padded to a pointer, and pointers
in a set order. Spec: PKCS#11 2.40 base 3.2 (CK_MECHANISM), 5.11 (C_SignInit, C_Sign), mechanisms 2.1.10 (CK_RSA_PKCS_PSS_PARAMS).
"""

from __future__ import annotations

import ctypes
from typing import Any

from pkcs11 import exceptions as p11

_ULONG, _POINTER = ctypes.c_ulong, ctypes.c_void_p
_SIGN_INIT, _SIGN, _FUNCTIONS = 42, 43, 68
_SIGNATURE_BYTES = 8192
_PSS_FIELDS = 3
_ERRORS: dict[int, type[p11.PKCS11Error]] = {
    0x02: p11.HostMemory,
    0x05: p11.GeneralError,
    0x06: p11.FunctionFailed,
    0x20: p11.DataInvalid,
    0x21: p11.DataLenRange,
    0x30: p11.DeviceError,
    0x31: p11.DeviceMemory,
    0x32: p11.DeviceRemoved,
    0x60: p11.KeyHandleInvalid,
    0x70: p11.MechanismInvalid,
    0x71: p11.MechanismParamInvalid,
    0x82: p11.ObjectHandleInvalid,
    0xB0: p11.SessionClosed,
    0xB3: p11.SessionHandleInvalid,
    0xE0: p11.TokenNotPresent,
    0x101: p11.UserNotLoggedIn,
}


class _FunctionList(ctypes.Structure):
    _fields_ = (("version", ctypes.c_ubyte * 2), ("functions", _POINTER * _FUNCTIONS))


class Mechanism(ctypes.Structure):
    """CK_MECHANISM with its parameter."""

    _fields_ = (("mechanism", _ULONG), ("parameter", _POINTER), ("parameter_bytes", _ULONG))


def mechanism_of(number: int, parameter: Any) -> Mechanism | None:
    """None for a parameter of a kind that is not known here. `parameter` is that of python-pkcs11: None, or hash, MGF and salt length of PSS."""
    if parameter is None:
        return Mechanism(number, None, 0)
    if len(parameter) != _PSS_FIELDS or not all(isinstance(field, int) for field in parameter):
        return None
    pss = (_ULONG * _PSS_FIELDS)(*(int(field) for field in parameter))
    made = Mechanism(number, ctypes.cast(pss, _POINTER), ctypes.sizeof(pss))
    made.keeps = pss  # the structure holds its address alone
    return made


class SignCalls:
    """The module that python-pkcs11 has loaded and initialised already. Raises: OSError, AttributeError."""

    def __init__(self, module: str) -> None:
        self._library = ctypes.CDLL(module)
        found = ctypes.POINTER(_FunctionList)()
        if self._library.C_GetFunctionList(ctypes.byref(found)) != 0:
            raise OSError("the module gives no function list")
        functions = found.contents.functions
        init = ctypes.CFUNCTYPE(_ULONG, _ULONG, ctypes.POINTER(Mechanism), _ULONG)
        sign = ctypes.CFUNCTYPE(_ULONG, _ULONG, ctypes.c_char_p, _ULONG, _POINTER, ctypes.POINTER(_ULONG))
        self._init, self._sign = init(functions[_SIGN_INIT]), sign(functions[_SIGN])
        self._buffer = ctypes.create_string_buffer(_SIGNATURE_BYTES)
        self._length = _ULONG()

    def sign(self, session: int, mechanism: Mechanism, key: int, data: bytes) -> bytes | None:
        """A signature, or None where C_SignInit did not say CKR_OK. Raises: PKCS11Error, of the kind that C_Sign answered."""
        length = self._length
        length.value = _SIGNATURE_BYTES
        if self._init(session, mechanism, key):
            return None
        answer = self._sign(session, data, len(data), self._buffer, length)
        if answer:  # not asked again: a module that does not end what failed would only say that it is at work
            raise _ERRORS.get(answer, p11.FunctionFailed)
        return self._buffer.raw[: length.value]
