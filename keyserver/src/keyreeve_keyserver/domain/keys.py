"""Keys: the header of a sealed key record, and the profiles that an authority's certificates and tokens must keep.

A `KeyRecord` that exists is consistent: its purposes fit its role and its type, its SPKI is of its type, and an authority has a profile.
The canonical JSON of a record is the associated data of its seal, so it has exactly one encoding.
"""

from __future__ import annotations

import base64
import binascii
import json
from collections.abc import Mapping
from dataclasses import dataclass
from datetime import UTC, datetime, timedelta
from enum import StrEnum
from typing import Any

from cryptography.exceptions import UnsupportedAlgorithm
from cryptography.hazmat.primitives.serialization import load_der_public_key
from keyreeve_common.errors import InvalidRequest, KeyreeveError, KeyTypeNotSupported
from keyreeve_common.identity import MAX_ID_BYTES, TrustDomain
from keyreeve_common.key_id import KeyId, parse_key_id
from keyreeve_common.purposes import PURPOSES_OF_ROLE, KeyRole, Purpose, parse_purpose
from keyreeve_common.schemes import KeyFamily, KeyType, key_type_of
from keyreeve_common.strict_json import canonical_json

from keyreeve_keyserver.domain.der import DerError, check_name

RECORD_VERSION = 1
MAX_LABEL_BYTES = MAX_ID_BYTES  # a label is most often the SPIFFE ID that the key was made for (ID-16)
MAX_NAME_BYTES = 64
MAX_SUBJECT_BYTES = 4_096
MAX_PATH_LENGTH = 16
MAX_PROFILE_SECONDS = 100 * 366 * 86_400
MAX_JWT_TTL = timedelta(days=1)  # a JWT-SVID cannot be revoked
PROFILED_PURPOSES = frozenset({Purpose.X509_CERTIFICATE, Purpose.X509_CRL, Purpose.OCSP_RESPONSE})
# Ed25519 hashes the message itself, and JWT-SVIDs have no EdDSA (JW-03).
NOT_WITH_ED25519 = frozenset({Purpose.DIGEST, Purpose.JWT_SVID})


class KeyState(StrEnum):
    """The life of a key. The catalog keeps it; the signer knows only keys that are loaded."""

    ENABLED = "enabled"
    DISABLED = "disabled"
    PENDING_DESTRUCTION = "pending_destruction"  # disabled, and to be destroyed at a time that is set
    DESTROYED = "destroyed"


class Custody(StrEnum):
    """Where the private half rests."""

    TOKEN_RESIDENT = "token-resident"  # noqa: S105 - a place, not a secret
    TOKEN_WRAPPED = "token-wrapped"  # noqa: S105 - a place, not a secret
    SEALED_SOFTWARE = "sealed-software"
    VAULT_TRANSIT = "vault-transit"


class AuthorityKind(StrEnum):
    """A root signs CA certificates only; an issuing authority signs leaves only."""

    ROOT = "root"
    ISSUING = "issuing"


@dataclass(frozen=True, slots=True)
class AuthorityProfile:
    """What an authority's key may certify. `subject_der` is the Name that its certificates bear as issuer.

    `max_path_length` bounds the pathLen of CA certificates that a root signs; None leaves it free.
    Raises: InvalidRequest.
    """

    trust_domain: TrustDomain
    kind: AuthorityKind
    subject_der: bytes
    max_validity: timedelta
    max_backdate: timedelta
    max_path_length: int | None = None

    def __post_init__(self) -> None:
        try:
            check_name(self.subject_der)
        except DerError as error:
            raise InvalidRequest(f"authority profile: subject_der is not a DER Name: {error}") from None
        _require(len(self.subject_der) <= MAX_SUBJECT_BYTES, "authority profile: subject_der is too long")
        _require(self.max_validity >= timedelta(seconds=1), "authority profile: max_validity_s is below 1")

    def to_json(self) -> dict[str, Any]:
        return {
            "trust_domain": self.trust_domain.name,
            "kind": self.kind.value,
            "subject_der": base64.b64encode(self.subject_der).decode("ascii"),
            "max_validity_s": int(self.max_validity / timedelta(seconds=1)),
            "max_backdate_s": int(self.max_backdate / timedelta(seconds=1)),
            "max_path_length": self.max_path_length,
        }


@dataclass(frozen=True, slots=True)
class JwtProfile:
    """What a JWT authority may sign: tokens of subjects in this trust domain that end at most `max_ttl` from now. Raises: InvalidRequest."""

    trust_domain: TrustDomain
    max_ttl: timedelta

    def __post_init__(self) -> None:
        in_bounds = timedelta(seconds=1) <= self.max_ttl <= MAX_JWT_TTL
        _require(in_bounds, f"jwt_profile: max_ttl_s is not from 1 to {int(MAX_JWT_TTL / timedelta(seconds=1))}")

    def to_json(self) -> dict[str, Any]:
        return {"trust_domain": self.trust_domain.name, "max_ttl_s": int(self.max_ttl / timedelta(seconds=1))}


@dataclass(frozen=True, slots=True)
class KeyRecord:
    """The header of a sealed key record: everything the signer needs to judge, and nothing secret.

    Raises: InvalidRequest, KeyTypeNotSupported.
    """

    key_id: KeyId
    key_type: KeyType
    role: KeyRole
    purposes: frozenset[Purpose]
    backend: str
    backend_ref: str
    spki_der: bytes
    label: str
    created: datetime
    authority_profile: AuthorityProfile | None = None
    jwt_profile: JwtProfile | None = None

    def __post_init__(self) -> None:
        check_purposes(self.role, self.purposes, self.authority_profile, self.jwt_profile, key_type=self.key_type)
        check_label(self.label)
        _require(1 <= len(self.backend) <= MAX_NAME_BYTES, "backend name is empty or too long")
        _require(self.created.tzinfo is UTC and self.created.microsecond == 0, "created is not whole seconds of UTC")
        _require(parse_spki(self.spki_der) is self.key_type, f"public key is not of type {self.key_type.value}")

    def to_header(self) -> bytes:
        """The canonical JSON: sorted names, no spaces, ASCII. Only a JWT authority has `jwt_profile`: older records stay as they are."""
        profile = self.authority_profile
        jwt = {} if self.jwt_profile is None else {"jwt_profile": self.jwt_profile.to_json()}
        return canonical_json(
            jwt
            | {
                "version": RECORD_VERSION,
                "key_id": self.key_id,
                "key_type": self.key_type.value,
                "role": self.role.value,
                "purposes": sorted(purpose.label for purpose in self.purposes),
                "backend": self.backend,
                "backend_ref": self.backend_ref,
                "spki_der": base64.b64encode(self.spki_der).decode("ascii"),
                "authority_profile": profile.to_json() if profile else None,
                "label": self.label,
                "created": self.created.strftime("%Y-%m-%dT%H:%M:%SZ"),
            }
        )


def check_purposes(
    role: KeyRole,
    purposes: frozenset[Purpose],
    profile: AuthorityProfile | None,
    jwt_profile: JwtProfile | None = None,
    *,
    key_type: KeyType,
) -> None:
    """Raises: InvalidRequest when a key of this type cannot have this role, these purposes and these profiles together."""
    _require(bool(purposes), "a key needs at least one purpose")
    foreign = sorted(purpose.label for purpose in purposes - PURPOSES_OF_ROLE[role])
    _require(not foreign, f"a key of role {role.value} cannot have purpose {', '.join(foreign)}")
    needed = sorted(purpose.label for purpose in purposes & PROFILED_PURPOSES)
    _require(not needed or profile is not None, f"purpose {', '.join(needed)} needs an authority_profile")
    names = ", ".join(sorted(purpose.label for purpose in PROFILED_PURPOSES))
    _require(bool(needed) or profile is None, f"authority_profile is only for keys with purpose {names}")
    is_jwt = Purpose.JWT_SVID in purposes
    _require(not is_jwt or jwt_profile is not None, "purpose jwt_svid needs a jwt_profile")
    _require(is_jwt or jwt_profile is None, "jwt_profile is only for keys with purpose jwt_svid")
    if key_type.family is KeyFamily.ED25519:
        barred = sorted(purpose.label for purpose in purposes & NOT_WITH_ED25519)
        _require(not barred, f"a key of type {key_type.value} cannot have purpose {', '.join(barred)}")


def check_label(label: str) -> None:
    """Raises: InvalidRequest."""
    _require(_shown_length(label) <= MAX_LABEL_BYTES, f"label is longer than {MAX_LABEL_BYTES} bytes")


def parse_record_header(data: bytes) -> KeyRecord:
    """The record whose canonical JSON `data` is; any other spelling of it is refused. Raises: InvalidRequest."""
    fields = _json_object(data)
    _require(fields.pop("version", None) == RECORD_VERSION, f"record is not of version {RECORD_VERSION}")
    try:
        profile = fields.pop("authority_profile")
        jwt_profile = fields.pop("jwt_profile", None)
        record = KeyRecord(
            key_id=parse_key_id(_text(fields, "key_id")),
            key_type=KeyType(_text(fields, "key_type")),
            role=KeyRole(_text(fields, "role")),
            purposes=parse_purposes(fields.pop("purposes")),
            backend=_text(fields, "backend"),
            backend_ref=_text(fields, "backend_ref"),
            spki_der=_base64(_text(fields, "spki_der"), "spki_der"),
            label=_text(fields, "label"),
            created=datetime.strptime(_text(fields, "created"), "%Y-%m-%dT%H:%M:%SZ").replace(tzinfo=UTC),
            authority_profile=None if profile is None else parse_authority_profile(profile),
            jwt_profile=None if jwt_profile is None else parse_jwt_profile(jwt_profile),
        )
    except KeyreeveError:
        raise
    except (KeyError, ValueError, OverflowError):
        raise InvalidRequest("record header lacks a field, or a field has no known value") from None
    _require(not fields and record.to_header() == data, "record header is not in canonical form")
    return record


def parse_authority_profile(value: object) -> AuthorityProfile:
    """The profile that a JSON object gives, every field present and none besides. Raises: InvalidRequest."""
    _require(isinstance(value, Mapping), "authority_profile is not an object")
    fields = dict(value) if isinstance(value, Mapping) else {}
    known = {"trust_domain", "kind", "subject_der", "max_validity_s", "max_backdate_s", "max_path_length"}
    odd = sorted(str(name) for name in fields.keys() ^ known)
    _require(not odd, f"authority_profile: field missing or unknown: {', '.join(odd)[:200]}")
    path_length = fields["max_path_length"]
    return AuthorityProfile(
        trust_domain=TrustDomain(_text(fields, "trust_domain")),
        kind=_kind(_text(fields, "kind")),
        subject_der=_base64(_text(fields, "subject_der"), "subject_der"),
        max_validity=timedelta(seconds=_whole(fields, "max_validity_s", high=MAX_PROFILE_SECONDS)),
        max_backdate=timedelta(seconds=_whole(fields, "max_backdate_s", high=MAX_PROFILE_SECONDS)),
        max_path_length=None if path_length is None else _whole(fields, "max_path_length", high=MAX_PATH_LENGTH),
    )


def parse_jwt_profile(value: object) -> JwtProfile:
    """The profile that a JSON object gives, every field present and none besides. Raises: InvalidRequest."""
    _require(isinstance(value, Mapping), "jwt_profile is not an object")
    fields = dict(value) if isinstance(value, Mapping) else {}
    odd = sorted(str(name) for name in fields.keys() ^ {"trust_domain", "max_ttl_s"})
    _require(not odd, f"jwt_profile: field missing or unknown: {', '.join(odd)[:200]}")
    return JwtProfile(
        trust_domain=TrustDomain(_text(fields, "trust_domain")),
        max_ttl=timedelta(seconds=_whole(fields, "max_ttl_s", high=MAX_PROFILE_SECONDS)),
    )


def parse_purposes(value: object) -> frozenset[Purpose]:
    """The purposes that a JSON list of labels names. Raises: InvalidRequest."""
    if not isinstance(value, list) or not all(isinstance(name, str) for name in value) or len(set(value)) != len(value):
        raise InvalidRequest("purposes is not a list of distinct names")
    return frozenset(parse_purpose(name) for name in value)


def parse_spki(spki_der: bytes) -> KeyType:
    """The type of the key in a SubjectPublicKeyInfo. Raises: KeyTypeNotSupported."""
    try:
        return key_type_of(load_der_public_key(spki_der))
    except (ValueError, UnsupportedAlgorithm):
        raise KeyTypeNotSupported("public key is not a SubjectPublicKeyInfo that can be read") from None


def _json_object(data: bytes) -> dict[str, Any]:
    try:
        value = json.loads(data.decode("ascii"))
    except (ValueError, RecursionError):
        raise InvalidRequest("record header is not JSON") from None
    if not isinstance(value, dict):
        raise InvalidRequest("record header is not an object")
    return value


def _kind(name: str) -> AuthorityKind:
    try:
        return AuthorityKind(name)
    except ValueError:
        raise InvalidRequest("authority_profile: kind is neither root nor issuing") from None


def _text(fields: dict[str, Any], name: str) -> str:
    value = fields.pop(name)
    if not isinstance(value, str):
        raise InvalidRequest(f"{name} is not a string")
    return value


def _whole(fields: dict[str, Any], name: str, *, high: int) -> int:
    value = fields.pop(name)
    if not isinstance(value, int) or isinstance(value, bool) or not 0 <= value <= high:
        raise InvalidRequest(f"{name} is not a whole number from 0 to {high}")
    return value


def _base64(text: str, name: str) -> bytes:
    try:
        return base64.b64decode(text.encode("ascii"), validate=True)
    except (binascii.Error, UnicodeEncodeError):
        raise InvalidRequest(f"{name} is not base64") from None


def _shown_length(text: str) -> int:
    try:
        return len(text.encode())
    except UnicodeEncodeError:
        raise InvalidRequest("text holds a lone surrogate") from None


def _require(condition: bool, rule: str) -> None:
    if not condition:
        raise InvalidRequest(rule)
