"""SPIFFE IDs and trust domains: a value that exists is valid.

Spec: SPIFFE-ID sections 2 and 2.1 to 2.4. Strict input is refused rather than normalised: an upper-case trust domain is an error, as in
go-spiffe (docs/spec-conformance.md, ID-07).
"""

from __future__ import annotations

import re
from dataclasses import dataclass

from keyreeve_common.errors import InvalidSpiffeId

MAX_ID_BYTES = 2048
MAX_TRUST_DOMAIN_BYTES = 255
_SCHEME = "spiffe://"
_TRUST_DOMAIN = re.compile(r"[a-z0-9._-]+", re.ASCII)
_SEGMENT = re.compile(r"[a-zA-Z0-9._-]+", re.ASCII)


def _require(condition: bool, rule: str, text: str) -> None:
    if not condition:
        raise InvalidSpiffeId(f"{rule}: {_shown(text)}")


def _shown(text: str) -> str:
    """Untrusted text, made safe for one log line."""
    return ascii(text if len(text) <= 120 else text[:117] + "...")


@dataclass(frozen=True, slots=True, order=True)
class TrustDomain:
    """The name of a trust domain, lower case, at most 255 bytes.

    Raises: InvalidSpiffeId. Spec: SPIFFE-ID 2.1.
    """

    name: str

    def __post_init__(self) -> None:
        _require(bool(self.name), "ID-02 trust domain is empty", self.name)
        _require(len(self.name) <= MAX_TRUST_DOMAIN_BYTES, "ID-18 trust domain is longer than 255 bytes", self.name)
        _require(
            _TRUST_DOMAIN.fullmatch(self.name) is not None,
            "ID-08 trust domain may hold only a-z 0-9 . - _",
            self.name,
        )

    @property
    def id(self) -> SpiffeId:
        """The SPIFFE ID of the trust domain itself: no path (ID-21)."""
        return SpiffeId(self, "")

    def __str__(self) -> str:
        return self.name


@dataclass(frozen=True, slots=True, order=True)
class SpiffeId:
    """A SPIFFE ID: trust domain and path; the path is "" or begins with "/".

    Raises: InvalidSpiffeId, which names the rule of the conformance list. Spec: SPIFFE-ID 2.
    """

    trust_domain: TrustDomain
    path: str = ""

    def __post_init__(self) -> None:
        text = str(self)
        _require(len(text) <= MAX_ID_BYTES, "ID-17 SPIFFE ID is longer than 2048 bytes", text)
        if not self.path:
            return
        _require(self.path.startswith("/"), "path does not begin with '/'", text)
        _require(not self.path.endswith("/"), "ID-14 path ends in '/'", text)
        for segment in self.path[1:].split("/"):
            _require(segment != "", "ID-12 path has an empty segment", text)
            _require(segment not in (".", ".."), "ID-13 path has a '.' or '..' segment", text)
            _require(
                _SEGMENT.fullmatch(segment) is not None,
                "ID-15 path segment may hold only a-z A-Z 0-9 . - _",
                text,
            )

    @classmethod
    def parse(cls, text: str) -> SpiffeId:
        """The SPIFFE ID that `text` is. Raises: InvalidSpiffeId."""
        _require(len(text) <= MAX_ID_BYTES, "ID-17 SPIFFE ID is longer than 2048 bytes", text)
        _require(text.startswith(_SCHEME), "ID-01 scheme is not 'spiffe'", text)
        rest = text[len(_SCHEME) :]
        _require("?" not in rest, "ID-03 SPIFFE ID has a query", text)
        _require("#" not in rest, "ID-04 SPIFFE ID has a fragment", text)
        authority, slash, path = rest.partition("/")
        _require("@" not in authority, "ID-05 SPIFFE ID has userinfo", text)
        _require(":" not in authority, "ID-06 SPIFFE ID has a port", text)
        _require("%" not in authority, "ID-09 trust domain has percent-encoding", text)
        _require("%" not in path, "ID-11 path has percent-encoding", text)
        return cls(TrustDomain(authority), slash + path)

    @property
    def is_trust_domain_id(self) -> bool:
        return not self.path

    def member_of(self, trust_domain: TrustDomain) -> bool:
        return self.trust_domain == trust_domain

    def __str__(self) -> str:
        return f"{_SCHEME}{self.trust_domain.name}{self.path}"
