"""Keys that rest outside the token, wrapped under an AES key that never leaves it; loaded as session objects, the latest `capacity` of them.

A key is born in the token (extractable and sensitive: it leaves wrapped or not at all), wrapped, and destroyed there. Loaded again it is not
extractable and does nothing but sign. Imported by the worker only, since it loads python-pkcs11.
Spec: RFC 5649 (AES key wrap with padding); PKCS#11 3.1 mechanisms 6.15 (CKM_AES_KEY_WRAP_KWP, ..._PAD, ..._PKCS7).
"""

from __future__ import annotations

import secrets
from collections import OrderedDict
from collections.abc import Callable
from contextlib import suppress
from typing import Any

from keyreeve_common.errors import FailedPrecondition, KeyTypeNotSupported, SealedRecordInvalid
from keyreeve_common.schemes import KeyType
from pkcs11 import Attribute, Mechanism, MechanismFlag, ObjectClass
from pkcs11 import KeyType as P11KeyType
from pkcs11 import exceptions as p11
from pkcs11.constants import DEFAULT

from keyreeve_keyserver.backends import pkcs11_mechanisms as mechanisms
from keyreeve_keyserver.domain.wrapped_key import WrappedKey, parse_wrapped_key

# Each protects the integrity of what it wraps. Before PKCS#11 3.0 tokens differed in what PAD means; the one that wrapped it unwraps it.
WRAP_MECHANISMS = (Mechanism.AES_KEY_WRAP_KWP, Mechanism.AES_KEY_WRAP_PAD, Mechanism.AES_KEY_WRAP_PKCS7)
_NOT_WRAPPABLE = (p11.KeyNotWrappable, p11.KeySizeRange, p11.KeyUnextractable)
_REFUSED = (
    p11.WrappedKeyInvalid,
    p11.WrappedKeyLenRange,
    p11.EncryptedDataInvalid,
    p11.EncryptedDataLenRange,
    p11.GeneralError,
    p11.FunctionFailed,
    p11.AttributeValueInvalid,
)
_ID_BYTES = 8


class WrappedKeys:
    """`session` gives the open session; `generate` makes a key pair of session objects with a private template."""

    def __init__(
        self,
        session: Callable[[], Any],
        generate: Callable[[KeyType, dict[Attribute, Any]], tuple[Any, Any]],
        *,
        offered: set[Mechanism],
        label: str,
        capacity: int,
    ) -> None:
        self._session = session
        self._generate = generate
        self._mechanisms = [mechanism for mechanism in WRAP_MECHANISMS if mechanism in offered]
        self._label = label
        self._capacity = capacity
        self._loaded: OrderedDict[str, Any] = OrderedDict()
        self._wrapping: dict[bytes, Any] = {}

    def __len__(self) -> int:
        return len(self._loaded)

    def clear(self) -> None:
        """The session is gone, and its objects with it."""
        self._loaded.clear()
        self._wrapping.clear()

    def can_wrap(self, key_type: KeyType) -> bool:
        """By trial: tokens that list the mechanisms still do not wrap every type of key."""
        try:
            self.create(key_type)
        except (FailedPrecondition, KeyTypeNotSupported, p11.PKCS11Error):
            return False
        return True

    def create(self, key_type: KeyType) -> tuple[bytes, bytes, dict[str, str | bool]]:
        """SPKI, blob, and what the token said of the key at its birth. Raises: FailedPrecondition, KeyTypeNotSupported."""
        if not self._mechanisms:
            raise FailedPrecondition(
                "the token wraps no keys (it has no AES key wrap with padding): use resident custody"
            )
        wrapping_id, wrapping = self._current()
        trusted = bool(wrapping[Attribute.TRUSTED])
        public_key, private_key = self._generate(key_type, _birth_template(wrap_with_trusted=trusted))
        try:
            spki_der = mechanisms.spki_of(public_key, key_type)
            attributes: dict[str, str | bool] = {
                "extractable": bool(private_key[Attribute.EXTRACTABLE]),
                "sensitive": bool(private_key[Attribute.SENSITIVE]),
                "generated_in_token": bool(private_key[Attribute.LOCAL]),
                "never_extractable": bool(private_key[Attribute.NEVER_EXTRACTABLE]),
                "always_sensitive": bool(private_key[Attribute.ALWAYS_SENSITIVE]),
                "wrap_with_trusted": trusted,
            }
            if not attributes["sensitive"]:
                raise FailedPrecondition("the token made a key that can be read: it is not fit for Keyreeve")
            mechanism, wrapped = self._wrap(wrapping, private_key)
        finally:
            for born in (private_key, public_key):
                with suppress(p11.PKCS11Error):
                    born.destroy()
        return spki_der, WrappedKey(int(mechanism), key_type, wrapping_id, wrapped).to_bytes(), attributes

    def key(self, ref: str, blob: bytes) -> Any:
        """The key ready to sign. Raises: SealedRecordInvalid."""
        key = self._loaded.get(ref)
        if key is None:
            while len(self._loaded) >= self._capacity:
                self._evict()
            key = self._loaded[ref] = self._unwrapped(parse_wrapped_key(blob))
        self._loaded.move_to_end(ref)
        return key

    def drop(self, ref: str) -> None:
        key = self._loaded.pop(ref, None)
        if key is not None:
            key.destroy()

    def _wrap(self, wrapping: Any, private_key: Any) -> tuple[Mechanism, bytes]:
        """With the first mechanism that the token really has; those that it only lists are tried no more."""
        while self._mechanisms:
            mechanism = self._mechanisms[0]
            try:
                return mechanism, bytes(wrapping.wrap_key(private_key, mechanism=mechanism))
            except (p11.MechanismInvalid, p11.MechanismParamInvalid):
                self._mechanisms.pop(0)
            except _NOT_WRAPPABLE:
                raise KeyTypeNotSupported("the token does not wrap keys of this type: use resident custody") from None
        raise FailedPrecondition("the token wraps no keys with the mechanisms that it lists: use resident custody")

    def _unwrapped(self, blob: WrappedKey) -> Any:
        if blob.mechanism not in WRAP_MECHANISMS:
            raise SealedRecordInvalid("the record's key is wrapped by a mechanism that is not accepted")
        wrapping = self._wrapping_key(blob.wrapping_id)
        while True:
            try:
                key = self._unwrap(wrapping, blob)
                break
            except p11.DeviceMemory:
                if not self._loaded:
                    raise
                self._capacity = len(self._loaded)  # the token bears no more
                self._evict()
            except _REFUSED as error:
                self._check_own_blob_opens(blob.key_type)  # tokens say "general error" for a wrong blob too
                raise SealedRecordInvalid(
                    f"the token does not unwrap the record's key ({type(error).__name__})"
                ) from None
        if key[Attribute.EXTRACTABLE] or not key[Attribute.SENSITIVE] or key[Attribute.TOKEN]:
            key.destroy()
            raise FailedPrecondition("the token unwraps keys that can be extracted: it is not fit for wrapped custody")
        return key

    def _unwrap(self, wrapping: Any, blob: WrappedKey) -> Any:
        return wrapping.unwrap_key(
            ObjectClass.PRIVATE_KEY,
            mechanisms.GENERATIONS[blob.key_type].key_type,
            blob.wrapped,
            mechanism=Mechanism(blob.mechanism),
            store=False,
            capabilities=MechanismFlag.SIGN,
            template={
                **mechanisms.private_template(),
                Attribute.TOKEN: False,
                # python-pkcs11 would send these, which no private key has.
                Attribute.ENCRYPT: DEFAULT,
                Attribute.VERIFY: DEFAULT,
                Attribute.WRAP: DEFAULT,
            },
        )

    def _check_own_blob_opens(self, key_type: KeyType) -> None:
        """Raises: what the token says of a blob that is surely right, if it is the token that is at fault."""
        probe_type = KeyType.EC_P256 if key_type.family.value.startswith("rsa") else key_type
        _, blob, _ = self.create(probe_type)
        probe = parse_wrapped_key(blob)
        self._unwrap(self._wrapping_key(probe.wrapping_id), probe).destroy()

    def _evict(self) -> None:
        _, key = self._loaded.popitem(last=False)
        key.destroy()

    def _wrapping_key(self, wrapping_id: bytes) -> Any:
        if wrapping_id not in self._wrapping:
            found = self._wrapping_keys({Attribute.ID: wrapping_id})
            if not found:
                raise SealedRecordInvalid("the token holds no such wrapping key: the record is another token's")
            self._wrapping[wrapping_id] = found[0]
        return self._wrapping[wrapping_id]

    def _current(self) -> tuple[bytes, Any]:
        """The wrapping key of our label; made where there is none. Of several (two replicas made one each) all take the same."""
        named = self._wrapping_keys({Attribute.LABEL: self._label})
        if not named:
            self._make_wrapping_key()
            named = self._wrapping_keys({Attribute.LABEL: self._label})
        wrapping_id, key = min(((bytes(key[Attribute.ID]), key) for key in named), key=lambda pair: pair[0])
        if key[Attribute.EXTRACTABLE] or not key[Attribute.SENSITIVE] or key[Attribute.DECRYPT] or not wrapping_id:
            raise FailedPrecondition(
                f"wrapping key {self._label!r} is extractable, may decrypt, or has no id: wrapped keys could be read with it"
            )
        self._wrapping[wrapping_id] = key
        return wrapping_id, key

    def _wrapping_keys(self, wanted: dict[Attribute, Any]) -> list[Any]:
        kind = {Attribute.CLASS: ObjectClass.SECRET_KEY, Attribute.KEY_TYPE: P11KeyType.AES}
        return list(self._session().get_objects({**kind, **wanted}))

    def _make_wrapping_key(self) -> None:
        self._session().generate_key(
            P11KeyType.AES,
            256,
            id=secrets.token_bytes(_ID_BYTES),
            label=self._label,
            store=True,
            capabilities=MechanismFlag.WRAP | MechanismFlag.UNWRAP,
            template={
                Attribute.PRIVATE: True,
                Attribute.SENSITIVE: True,
                Attribute.EXTRACTABLE: False,
                Attribute.ENCRYPT: False,
                Attribute.DECRYPT: False,
            },
        )


def _birth_template(*, wrap_with_trusted: bool) -> dict[Attribute, Any]:
    template = {**mechanisms.private_template(), Attribute.TOKEN: False, Attribute.EXTRACTABLE: True}
    return {**template, Attribute.WRAP_WITH_TRUSTED: True} if wrap_with_trusted else template
