"""What a worker does with the Transit engine: create, find, sign, destroy, seal. Imported by the worker only.

Signing names key version, hash, padding, salt and marshaling each time: no default of Vault decides what a signature is. Messages go out whole
and are hashed by Vault, but those of purpose digest. Spec: Vault API, secret/transit; RFC 8446 4.2.3.
"""

from __future__ import annotations

import base64
import binascii
import re
import time
from collections.abc import Sequence
from typing import Any

from cryptography.exceptions import UnsupportedAlgorithm
from cryptography.hazmat.primitives.asymmetric import ed25519
from cryptography.hazmat.primitives.serialization import Encoding, PublicFormat, load_pem_public_key
from keyreeve_common.errors import (
    Conflict,
    DeadlineExceeded,
    FailedPrecondition,
    Internal,
    KeyNotFound,
    KeyreeveError,
    KeyTypeNotSupported,
    SealedRecordInvalid,
    TokenUnavailable,
)
from keyreeve_common.schemes import KeyFamily, KeyType, Padding, SignatureScheme, key_type_of
from keyreeve_common.vault.errors import error_of_answer
from keyreeve_common.vault.session import JsonObject, VaultSession

from keyreeve_keyserver.backends.worker_frames import Box, TokenSignItem

TRANSIT_TYPES: dict[KeyType, str] = {
    KeyType.EC_P256: "ecdsa-p256",
    KeyType.EC_P384: "ecdsa-p384",
    KeyType.ED25519: "ed25519",
    KeyType.RSA_2048: "rsa-2048",
    KeyType.RSA_3072: "rsa-3072",
    KeyType.RSA_4096: "rsa-4096",
}
SEALING_TYPE = "aes256-gcm96"
_HASHES = {"sha256": "sha2-256", "sha384": "sha2-384", "sha512": "sha2-512"}
_PADDINGS = {Padding.PKCS1_V15: "pkcs1v15", Padding.PSS: "pss"}
_REF = re.compile(r"([a-z0-9-]+)-v([1-9][0-9]{0,8})", re.ASCII)
_SIGNATURE = re.compile(r"vault:v([1-9][0-9]{0,8}):([A-Za-z0-9+/]+={0,2})", re.ASCII)


class Transit:
    def __init__(self, session: VaultSession, *, mount: str, key_prefix: str) -> None:
        self._session = session
        self._mount = mount
        self._prefix = key_prefix
        self._sealing_keys: set[str] = set()

    def describe(self) -> JsonObject:
        """Logs in, and asks which of our key types this server's Transit makes. Makes no key."""
        self._session.log_in()
        offered = [key_type for key_type in KeyType if self._makes(key_type)]
        families = {key_type.family for key_type in offered}
        return {
            "key_types": [key_type.value for key_type in offered],
            "schemes": [int(scheme) for scheme in sorted(SignatureScheme) if scheme.facts.family in families],
        }

    def _makes(self, key_type: KeyType) -> bool:
        """A key size is allowed for HMAC keys alone: a server refuses a key of this type for it, once it knows the type."""
        path, body = f"{self._mount}/keys/{self._prefix}probe", {"type": TRANSIT_TYPES[key_type], "key_size": 1}
        texts = self._session.refusal(path, body, doing="asking Transit for its key types")
        return bool(texts) and "unknown key type" not in texts

    def create(self, ref: str, key_type: KeyType) -> JsonObject:
        """A key born in Vault, and what Vault says of it. Raises: Conflict, FailedPrecondition, KeyTypeNotSupported, TokenUnavailable."""
        name, version = _parse_ref(ref)
        if self._read(name) is not None:
            raise Conflict("Vault holds a key of this name already")
        body = {"type": TRANSIT_TYPES[key_type], "exportable": False, "allow_plaintext_backup": False, "derived": False}
        self._session.post(self._key_path(name), body, doing="creating a key")
        try:
            data = self._read(name)
            if data is None:
                raise KeyNotFound("Vault does not hold the key that it just made")
            self._check_fit(data)
            if data.get("type") != TRANSIT_TYPES[key_type] or data.get("imported_key"):
                raise FailedPrecondition("Vault made another key than was asked for")
            spki_der = _spki_of(data, version)
        except KeyreeveError:
            self._forget_attempt(ref)
            raise
        return {"spki_der": spki_der.hex(), "attributes": self._attributes(name, version, data)}

    def inspect(self, ref: str) -> JsonObject:
        """What Vault itself says now of this key. Raises: KeyNotFound, TokenUnavailable."""
        name, version = _parse_ref(ref)
        data = self._read(name)
        if data is None:
            raise KeyNotFound("Vault does not hold this key")
        return {"attributes": self._attributes(name, version, data)}

    def find(self, ref: str) -> JsonObject:
        """The public key of the version that the reference names. Raises: KeyNotFound, FailedPrecondition, TokenUnavailable."""
        name, version = _parse_ref(ref)
        data = self._read(name)
        if data is None:
            raise KeyNotFound("Vault does not hold this key")
        self._check_fit(data)
        return {"spki_der": _spki_of(data, version).hex()}

    def destroy(self, ref: str) -> None:
        """Ends the whole Transit key, with every version of it. Raises: TokenUnavailable."""
        name, _ = _parse_ref(ref)
        try:
            self._session.post(f"{self._key_path(name)}/config", {"deletion_allowed": True}, doing="destroying the key")
            self._session.delete(self._key_path(name), doing="destroying the key")
        except KeyNotFound:
            return

    def ping(self) -> None:
        """Asks Vault for our own token: it must answer, be unsealed, and know us. Raises: VaultAccessDenied, TokenUnavailable."""
        self._session.get("auth/token/lookup-self", doing="asking Vault for a sign of life")

    def sign(self, items: Sequence[TokenSignItem]) -> list[bytes | KeyreeveError]:
        """One call for all items of one key and scheme. Raises nothing."""
        outcomes: list[bytes | KeyreeveError] = [Internal("Vault gave no result")] * len(items)
        groups: dict[tuple[str, SignatureScheme, bool], list[int]] = {}
        for index, item in enumerate(items):
            if time.monotonic() * 1_000_000 >= item.deadline_us:
                outcomes[index] = DeadlineExceeded("deadline passed before Vault was reached")
            else:
                groups.setdefault((item.ref, item.scheme, item.prehashed), []).append(index)
        for indexes in groups.values():
            try:
                results = self._sign_group([items[index] for index in indexes])
            except KeyreeveError as error:
                results = [error] * len(indexes)
            for index, result in zip(indexes, results, strict=True):
                outcomes[index] = result
        return outcomes

    def _sign_group(self, items: list[TokenSignItem]) -> list[bytes | KeyreeveError]:
        """Items of one key, scheme and form."""
        first = items[0]
        name, version = _parse_ref(first.ref)
        body = {
            **_algorithm(first.scheme),
            "key_version": version,
            "prehashed": first.prehashed,
            "batch_input": [{"input": _b64(item.message)} for item in items],
        }
        answer = self._session.post(f"{self._mount}/sign/{name}", body, doing="signing")
        results = _data(answer).get("batch_results")
        if not isinstance(results, list) or len(results) != len(items):
            raise Internal("Vault's results do not match the batch")
        return [_signature(result, version) for result in results]

    def box(self, box: Box) -> bytes:
        """Transit draws a nonce of its own; ours is bound beside the record's header, so that nothing in the sealed layout can be changed.

        Raises: SealedRecordInvalid, FailedPrecondition, TokenUnavailable.
        """
        associated = _b64(box.nonce + box.associated)
        if not box.decrypt:
            self._ensure_sealing_key(box.label)
            body = {"plaintext": _b64(box.data), "associated_data": associated}
            answer = self._session.post(f"{self._mount}/encrypt/{box.label}", body, doing="sealing")
            ciphertext = _data(answer).get("ciphertext")
            if not isinstance(ciphertext, str) or not ciphertext.startswith("vault:v") or not ciphertext.isascii():
                raise Internal("Vault's ciphertext cannot be read")
            return ciphertext.encode("ascii")
        try:
            body = {"ciphertext": box.data.decode("ascii"), "associated_data": associated}
        except UnicodeDecodeError:
            raise SealedRecordInvalid("record was sealed under another key-encryption key") from None
        try:
            answer = self._session.post(f"{self._mount}/decrypt/{box.label}", body, doing="unsealing")
            return base64.b64decode(str(_data(answer)["plaintext"]), validate=True)
        except KeyNotFound:
            raise SealedRecordInvalid(f"Vault holds no key-encryption key of the name {box.label}") from None
        except (KeyError, binascii.Error):
            raise Internal("Vault's plaintext cannot be read") from None

    def _ensure_sealing_key(self, name: str) -> None:
        """Transit would make a key of a default kind at first use: ours is made, and looked at, before it is used."""
        if name in self._sealing_keys:
            return
        data = self._read(name)
        if data is None:
            body = {"type": SEALING_TYPE, "exportable": False, "allow_plaintext_backup": False, "derived": False}
            self._session.post(self._key_path(name), body, doing="creating the key-encryption key")
            data = self._read(name) or {}
        self._check_fit(data)
        if data.get("type") != SEALING_TYPE or data.get("derived"):
            raise FailedPrecondition(
                f"Vault's key {name} is not of type {SEALING_TYPE}: name another as vault_key_name"
            )
        self._sealing_keys.add(name)

    def _read(self, name: str) -> JsonObject | None:
        try:
            return _data(self._session.get(self._key_path(name), doing="reading the key"))
        except KeyNotFound:
            return None

    def _forget_attempt(self, ref: str) -> None:
        try:
            self.destroy(ref)
        except KeyreeveError:
            return  # the error that led here says more

    def _key_path(self, name: str) -> str:
        return f"{self._mount}/keys/{name}"

    @staticmethod
    def _check_fit(data: JsonObject) -> None:
        """Vault can never take these back, so a key that has one of them may have left Vault. Raises: FailedPrecondition."""
        for name in ("exportable", "allow_plaintext_backup"):
            if data.get(name) is not False:
                raise FailedPrecondition(
                    f"Vault says {name} of this key: it can leave Vault, so it is not fit for Keyreeve"
                )

    def _attributes(self, name: str, version: int, data: JsonObject) -> dict[str, str | bool]:
        """What Vault itself says, read back."""
        return {
            "transit_mount": self._mount,
            "transit_key": name,
            "transit_version": str(version),
            "exportable": bool(data.get("exportable", True)),
            "allow_plaintext_backup": bool(data.get("allow_plaintext_backup", True)),
            "imported": bool(data.get("imported_key", False)),
        }


def _algorithm(scheme: SignatureScheme) -> JsonObject:
    facts = scheme.facts
    if facts.family is KeyFamily.ED25519:
        return {}
    chosen: JsonObject = {"hash_algorithm": _HASHES[facts.hash_name]}
    if facts.family is KeyFamily.RSA:
        return {**chosen, "signature_algorithm": _PADDINGS[facts.padding], "salt_length": "hash"}
    return {**chosen, "marshaling_algorithm": "asn1"}


def _signature(result: Any, version: int) -> bytes | KeyreeveError:
    """The signature of one item. One of another key version is refused before anybody tries to verify it."""
    if not isinstance(result, dict):
        return Internal("Vault's result cannot be read")
    if result.get("error"):
        return error_of_answer(400, str(result["error"]), "signing")
    match = _SIGNATURE.fullmatch(str(result.get("signature", "")))
    if match is None:
        return Internal("Vault's signature cannot be read")
    if int(match.group(1)) != version or result.get("key_version", version) != version:
        return Internal("Vault signed with another version of the key than was asked for")
    return base64.b64decode(match.group(2))


def _spki_of(data: JsonObject, version: int) -> bytes:
    """The SubjectPublicKeyInfo of one version. Raises: KeyNotFound, KeyTypeNotSupported."""
    versions = data.get("keys")
    entry = versions.get(str(version)) if isinstance(versions, dict) else None
    if not isinstance(entry, dict):
        raise KeyNotFound("Vault does not hold this version of the key: it was trimmed")
    text = str(entry.get("public_key", ""))
    try:
        if data.get("type") == TRANSIT_TYPES[KeyType.ED25519]:
            key: Any = ed25519.Ed25519PublicKey.from_public_bytes(base64.b64decode(text, validate=True))
        else:
            key = load_pem_public_key(text.encode())
    except (ValueError, UnsupportedAlgorithm):
        raise KeyTypeNotSupported("Vault gave a public key that cannot be read") from None
    key_type_of(key)
    encoded: bytes = key.public_bytes(Encoding.DER, PublicFormat.SubjectPublicKeyInfo)
    return encoded


def _parse_ref(ref: str) -> tuple[str, int]:
    """Raises: SealedRecordInvalid."""
    match = _REF.fullmatch(ref)
    if match is None:
        raise SealedRecordInvalid("the record's reference names no Transit key and version")
    return match.group(1), int(match.group(2))


def _data(answer: JsonObject) -> JsonObject:
    data = answer.get("data")
    if not isinstance(data, dict):
        raise TokenUnavailable("Vault's answer cannot be read: check that the mount is a Transit engine")
    return data


def _b64(data: bytes) -> str:
    return base64.b64encode(data).decode("ascii")
