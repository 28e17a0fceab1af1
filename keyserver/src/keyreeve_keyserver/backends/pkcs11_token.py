"""One token, one session, one thread: what a worker does with it. Imported by the worker only, since it loads python-pkcs11.

The PIN came from the launcher, and each log-in uses that one: nothing here opens its file. A wrong PIN is never tried twice.
"""

from __future__ import annotations

import errno
import os
import time
from collections.abc import Callable, Iterator
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TypeVar

import pkcs11
from keyreeve_common.errors import (
    Conflict,
    DeadlineExceeded,
    FailedPrecondition,
    KeyreeveError,
    SchemeNotSupported,
    SealedRecordInvalid,
    StorageFull,
    TokenPinIncorrect,
    TokenUnavailable,
)
from keyreeve_common.pkcs11_uri import parse_pkcs11_uri
from keyreeve_common.schemes import KeyType, SignatureScheme
from pkcs11 import Attribute, ObjectClass
from pkcs11 import exceptions as p11

from keyreeve_keyserver.backends import pkcs11_mechanisms as mechanisms
from keyreeve_keyserver.backends.pkcs11_calls import Mechanism, SignCalls, mechanism_of
from keyreeve_keyserver.backends.pkcs11_errors import SESSION_LOST, error_of
from keyreeve_keyserver.backends.pkcs11_slots import find_token
from keyreeve_keyserver.backends.pkcs11_wrapped import WrappedKeys
from keyreeve_keyserver.backends.softhsm import softhsm_store
from keyreeve_keyserver.backends.worker_frames import Box, TokenSignItem
from keyreeve_keyserver.domain.keys import Custody
from keyreeve_keyserver.domain.secret import Secret
from keyreeve_keyserver.frames import JsonObject

_T = TypeVar("_T")
_PROBE_BYTES = 65_536
_SOFTHSM_TRIES = 8


@dataclass(frozen=True, slots=True)
class TokenSettings:
    """What the signer's configuration says of the token; paths as text, `softhsm_conf` empty where it is no SoftHSM.

    `token` is a PKCS#11 URI that says which token of the module is meant. `custody` is where new keys rest. Wrapped ones are wrapped
    under the AES key of label `wrapping_key_label`, and at most `loaded_keys` of them are in the token for this worker.
    """

    module: str
    token: str
    softhsm_conf: str
    custody: str = Custody.TOKEN_RESIDENT.value
    wrapping_key_label: str = "keyreeve-wrapping"
    loaded_keys: int = 64


class Token:
    """An open session with a logged-in user. Raises: TokenUnavailable, TokenPinIncorrect."""

    def __init__(self, settings: TokenSettings, pin: Secret) -> None:
        self._settings = settings
        self._pin = pin
        self._keys: dict[str, Any] = {}
        self._ways: dict[tuple[int, bool], tuple[mechanisms.Way, Mechanism | None]] = {}
        self._refused: set[mechanisms.Way] = set()
        self._pin_refusal: TokenPinIncorrect | None = None
        self._token = self._find_token()
        self._calls = _sign_calls(settings.module)
        self._label = str(self._token.label)
        self._session = self._log_in()
        self._mechanisms = set(self._guarded("reading the token's mechanisms", self._token.slot.get_mechanisms))
        self._wrapped = WrappedKeys(
            lambda: self._session,
            lambda key_type, template: self._generate(key_type, template, {Attribute.TOKEN: False}, store=False),
            offered=self._mechanisms,
            label=settings.wrapping_key_label,
            capacity=settings.loaded_keys,
        )
        self._wraps = settings.custody == Custody.TOKEN_WRAPPED

    def describe(self) -> JsonObject:
        return {
            "key_types": [key_type.value for key_type in self._key_types()],
            "schemes": [int(scheme) for scheme in mechanisms.schemes_offered(self._mechanisms)],
        }

    def _key_types(self) -> Iterator[KeyType]:
        for key_type in mechanisms.key_types_offered(self._mechanisms):
            # Many tokens wrap no Edwards keys, whatever mechanisms they list: only a trial tells. It is quick, other than with RSA.
            if self._wraps and key_type is KeyType.ED25519 and not self._wrapped.can_wrap(key_type):
                continue
            yield key_type

    def create(self, ref: str, label: str, key_type: KeyType) -> JsonObject:
        """A key pair born in the token, and what the token says of it. A label stands for one key.

        Raises: Conflict, FailedPrecondition, KeyTypeNotSupported, StorageFull.
        """
        if self._wraps:
            return self._create_wrapped(key_type)
        if self._objects({Attribute.LABEL: label}) or self._objects({Attribute.ID: ref.encode("ascii")}):
            raise Conflict("the token holds a key with this id already")
        public_key, private_key = self._guarded(
            "creating a key",
            lambda: self._generate(key_type, mechanisms.private_template(), mechanisms.public_template(), ref, label),
            stores=True,
        )
        try:
            attributes = self._attributes(private_key)
            if attributes["extractable"] or not attributes["sensitive"]:
                raise FailedPrecondition("the token made a key that can be extracted: it is not fit for Keyreeve")
            spki_der = mechanisms.spki_of(public_key, key_type)
        except (KeyreeveError, p11.PKCS11Error) as error:
            with suppress(p11.PKCS11Error, KeyreeveError):
                self.destroy(ref)
            raise error if isinstance(error, KeyreeveError) else error_of(error, "reading the new key") from None
        return {"spki_der": spki_der.hex(), "attributes": attributes}

    def _create_wrapped(self, key_type: KeyType) -> JsonObject:
        spki_der, blob, said = self._retried("creating a wrapped key", lambda: self._wrapped.create(key_type))
        attributes = {"token": self._label, "object_label": "", **said}
        return {"spki_der": spki_der.hex(), "attributes": attributes, "wrapped": blob.hex()}

    def ping(self) -> None:
        """A cheap call through the session, which finds a lost one. Raises: TokenUnavailable, TokenPinIncorrect."""
        self._retried("asking for a sign of life", self._random_or_info)

    def _random_or_info(self) -> None:
        """C_GenerateRandom, since python-pkcs11 has no C_GetSessionInfo; a token without a generator is asked for its info."""
        try:
            self._session.generate_random(64)
        except (p11.RandomNoRNG, p11.FunctionNotSupported):
            self._token.slot.get_token()

    def find(self, ref: str, wrapped: bytes = b"") -> None:
        """Raises: KeyNotFound, SealedRecordInvalid."""
        self._keys.pop(ref, None)
        self._wrapped.drop(ref)
        self._retried("finding the key", lambda: self._private_key(ref, wrapped))

    def inspect(self, ref: str, wrapped: bytes) -> JsonObject:
        """What the token itself says now of this key, and which token it is. Raises: KeyNotFound, SealedRecordInvalid."""
        self._keys.pop(ref, None)
        told = self._retried("reading the key", lambda: self._attributes(self._private_key(ref, wrapped)))
        serial = bytes(self._token.serial or b"").decode("ascii", errors="replace").strip()
        return {"attributes": {**told, "token_serial": serial}}

    def destroy(self, ref: str) -> None:
        self._keys.pop(ref, None)
        self._retried("destroying the key", lambda: self._wrapped.drop(ref))
        for found in self._objects({Attribute.ID: ref.encode("ascii")}):
            self._guarded("destroying the key", found.destroy)

    def sign(self, item: TokenSignItem) -> bytes:
        """Raises: DeadlineExceeded, KeyNotFound, PurposeMismatch, SchemeNotSupported, TokenUnavailable."""
        if time.monotonic() * 1_000_000 >= item.deadline_us:
            raise DeadlineExceeded("deadline passed before the token was reached")
        form = int(item.scheme), item.prehashed
        while True:
            how, mechanism = self._ways.get(form) or self._way(item.scheme, prehashed=item.prehashed)
            data = how.input_of(item.message)
            try:
                signed = self._retried("signing", lambda: self._signed(item, how, mechanism, data))  # noqa: B023 - run at once
            except SchemeNotSupported:  # listed, and refused when tried: the next way, from now on
                self._refused.add(how)
                self._ways.pop(form, None)
            else:
                return how.signature_of(signed)

    def _way(self, scheme: SignatureScheme, *, prehashed: bool) -> tuple[mechanisms.Way, Mechanism | None]:
        """The best way that the token has, as far as it is known. Raises: SchemeNotSupported."""
        for way in mechanisms.ways(scheme, prehashed=prehashed):
            if way.mechanism in self._mechanisms and way not in self._refused:
                found = way, mechanism_of(int(way.mechanism), way.parameter)
                self._ways[int(scheme), prehashed] = found
                return found
        raise SchemeNotSupported(f"the token has no mechanism for {scheme.iana_name}")

    def _signed(self, item: TokenSignItem, how: mechanisms.Way, mechanism: Mechanism | None, data: bytes) -> bytes:
        """By the short road, or, where that comes to nothing, by the one that says why."""
        key = self._private_key(item.ref, item.wrapped)
        if mechanism is not None and self._calls is not None:
            signed = self._calls.sign(self._session.handle, mechanism, key.handle, data)
            if signed is not None:
                return signed
        return bytes(key.sign(data, mechanism=how.mechanism, mechanism_param=how.parameter))

    def box(self, box: Box) -> bytes:
        """AES-256-GCM with a key that never leaves the token. Raises: SealedRecordInvalid, TokenUnavailable."""
        if not box.decrypt:
            return self._retried("sealing", lambda: self._gcm(box, box.data, decrypt=False))
        try:
            return self._retried("unsealing", lambda: self._gcm(box, box.data, decrypt=True))
        except TokenUnavailable:
            # Tokens say "general error" for a wrong tag: if a box of our own opens, the one given is at fault.
            probe = self._retried("unsealing", lambda: self._gcm(box, b"probe", decrypt=False))
            self._retried("unsealing", lambda: self._gcm(box, probe, decrypt=True))
            raise SealedRecordInvalid("record was changed, or sealed under another key-encryption key") from None

    def _gcm(self, box: Box, data: bytes, *, decrypt: bool) -> bytes:
        parameter = pkcs11.GCMParams(nonce=box.nonce, aad=box.associated, tag_bits=128)
        key = self._sealing_key(box.label, may_create=not box.decrypt)
        run = key.decrypt if decrypt else key.encrypt
        return bytes(run(data, mechanism=pkcs11.Mechanism.AES_GCM, mechanism_param=parameter))

    def _sealing_key(self, label: str, *, may_create: bool) -> Any:
        try:
            return self._session.get_key(object_class=ObjectClass.SECRET_KEY, key_type=pkcs11.KeyType.AES, label=label)
        except p11.NoSuchKey:
            if not may_create:
                raise SealedRecordInvalid(f"the token holds no key-encryption key of label {label}") from None
        template = {Attribute.SENSITIVE: True, Attribute.EXTRACTABLE: False, Attribute.PRIVATE: True}
        return self._guarded(
            "creating the key-encryption key",
            lambda: self._session.generate_key(
                pkcs11.KeyType.AES, 256, id=label.encode(), label=label, store=True, template=template
            ),
            stores=True,
        )

    def _generate(
        self,
        key_type: KeyType,
        private_template: dict[Attribute, Any],
        public_template: dict[Attribute, Any],
        ref: str = "",
        label: str = "",
        *,
        store: bool = True,
    ) -> tuple[Any, Any]:
        how = mechanisms.GENERATIONS[key_type]
        common = {
            "id": ref.encode("ascii") or None,
            "label": label or None,
            "store": store,
            "public_template": {**mechanisms.public_template(), **public_template},
            "private_template": private_template,
        }
        if how.bits:
            pair: tuple[Any, Any] = self._session.generate_keypair(
                how.key_type, how.bits, mechanism=how.mechanism, **common
            )
            return pair
        last: Exception | None = None
        for spelling in how.parameters:
            parameters = self._session.create_domain_parameters(
                how.key_type, {Attribute.EC_PARAMS: spelling}, local=True
            )
            try:
                pair = parameters.generate_keypair(mechanism=how.mechanism, **common)
            except (p11.DomainParamsInvalid, p11.AttributeValueInvalid, p11.GeneralError) as error:
                last = error
            else:
                return pair
        raise last or p11.DomainParamsInvalid

    def _attributes(self, private_key: Any) -> dict[str, str | bool]:
        """What the token itself says, read back from the object."""
        return {
            "token": self._label,
            "object_label": str(private_key[Attribute.LABEL]),
            "extractable": bool(private_key[Attribute.EXTRACTABLE]),
            "sensitive": bool(private_key[Attribute.SENSITIVE]),
            "generated_in_token": bool(private_key[Attribute.LOCAL]),
            "never_extractable": bool(private_key[Attribute.NEVER_EXTRACTABLE]),
            "always_sensitive": bool(private_key[Attribute.ALWAYS_SENSITIVE]),
        }

    def _objects(self, wanted: dict[Attribute, Any]) -> list[Any]:
        return self._retried("finding the key", lambda: list(self._session.get_objects(wanted)))

    def _private_key(self, ref: str, wrapped: bytes) -> Any:
        if wrapped:
            return self._wrapped.key(ref, wrapped)
        key = self._keys.get(ref)
        if key is None:
            key = self._session.get_key(object_class=ObjectClass.PRIVATE_KEY, id=ref.encode("ascii"))
            self._keys[ref] = key
        return key

    def _retried(self, doing: str, work: Callable[[], _T]) -> _T:
        """Runs `work`; where the session is lost, logs in again, drops the handles and runs it once more."""
        try:
            return work()
        except KeyreeveError:
            raise
        except SESSION_LOST:
            self._keys.clear()
            self._wrapped.clear()
            with suppress(p11.PKCS11Error):
                self._session.close()
            self._require_same_token()
            self._session = self._log_in()
            return self._guarded(doing, work)
        except p11.PKCS11Error as error:
            raise error_of(error, doing) from error

    def _guarded(self, doing: str, work: Callable[[], _T], *, stores: bool = False) -> _T:
        try:
            return work()
        except p11.PKCS11Error as error:
            if stores:
                self._check_disk()
            raise error_of(error, doing) from error

    def _find_token(self) -> Any:
        settings = self._settings
        if settings.softhsm_conf:
            os.environ["SOFTHSM2_CONF"] = settings.softhsm_conf
            self._check_softhsm()
        if not Path(settings.module).is_file():
            raise TokenUnavailable(f"module {settings.module} does not exist: install it, or correct `module`")
        try:
            library = pkcs11.lib(settings.module)
            return find_token(library, parse_pkcs11_uri(settings.token))
        except p11.PKCS11Error as error:
            kind = type(error).__name__
            raise TokenUnavailable(
                f"module {settings.module} does not load or start ({kind}): check the file and the module's own configuration"
            ) from None

    def _check_softhsm(self) -> None:
        """SoftHSM says "general error" for all of these; its configuration tells them apart."""
        conf = self._settings.softhsm_conf
        store = softhsm_store(Path(conf))
        if store is None:
            raise TokenUnavailable(f"softhsm_conf {conf} cannot be read or names no directories.tokendir: correct it")
        if not store.is_dir() or not os.access(store, os.R_OK | os.X_OK):
            raise TokenUnavailable(f"SoftHSM's token directory {store} is missing or cannot be read: restore it")

    def _check_disk(self) -> None:
        """Raises: StorageFull when the disk under a SoftHSM token takes no more."""
        store = softhsm_store(Path(self._settings.softhsm_conf)) if self._settings.softhsm_conf else None
        if store is None:
            return
        probe = store / f".keyreeve-probe-{os.getpid()}"
        try:
            probe.write_bytes(bytes(_PROBE_BYTES))
        except OSError as error:
            if error.errno in (errno.ENOSPC, errno.EDQUOT):
                raise StorageFull(f"the disk under SoftHSM's token directory {store} is full: make room") from None
        finally:
            probe.unlink(missing_ok=True)

    def _require_same_token(self) -> None:
        """A slot may hold another token by now, which would count our PIN as a wrong one of its own. Raises: TokenUnavailable.

        One that cannot be read just now (SoftHSM, while another worker logs in) is none: the log-in says what is wrong.
        """
        try:
            there = self._token.slot.get_token()
        except (p11.PKCS11Error, UnicodeDecodeError):
            return
        if there.serial.strip() and (there.label, there.serial) != (self._token.label, self._token.serial):
            raise TokenUnavailable(
                f"another token is in the slot of {self._label!r}: put that back, or start the signer again"
            )

    def _log_in(self) -> Any:
        if self._pin_refusal is not None:
            raise TokenPinIncorrect(self._pin_refusal.detail)
        try:
            pin = self._pin.reveal().decode()
        except UnicodeDecodeError:
            raise TokenUnavailable("pin_file is not text in UTF-8: write the token's user PIN into it") from None
        try:
            return self._open_session(pin)
        except p11.PKCS11Error as error:
            refusal = error_of(error, f"logging in to token {self._label!r}")
            if isinstance(refusal, TokenPinIncorrect):
                self._pin_refusal = refusal
            raise refusal from None

    def _open_session(self, pin: str) -> Any:
        """SoftHSM rewrites the token's file at each log-in; one that comes meanwhile hears "general error", which is no fault of the PIN."""
        tries = _SOFTHSM_TRIES if self._settings.softhsm_conf else 1
        for pause_ms in range(10, tries * 10, 10):
            with suppress(p11.GeneralError):
                return self._token.open(rw=True, user_pin=pin)
            time.sleep(pause_ms / 1000)
        return self._token.open(rw=True, user_pin=pin)


def _sign_calls(module: str) -> SignCalls | None:
    """None where the module cannot be called so: then python-pkcs11 makes every signature."""
    try:
        return SignCalls(module)
    except (OSError, AttributeError):
        return None
