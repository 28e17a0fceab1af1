"""Profiles: what each kind of certificate is like. The CA's settings make them; issuance and lint both read them.

Spec: X509-SVID 2 to 4 (rules X5-01 to X5-15). All leaves are alike but for their names and life: empty subject, critical SAN, digitalSignature
only, both extended usages, cA=false.
"""

from __future__ import annotations

from dataclasses import dataclass
from datetime import timedelta
from enum import StrEnum

from keyreeve_common.errors import InvalidRequest
from keyreeve_common.identity import SpiffeId
from keyreeve_common.schemes import KeyType

from keyreeve_ca.domain.entries import RESERVED_PATH, check_workload_id, is_agent_id

DEFAULT_BACKDATE = timedelta(seconds=10)
# The path verifier of `cryptography`, which agents and key servers use, refuses Ed25519 issuers ("forbidden public key algorithm"). Leaves may
# have such keys.
AUTHORITY_KEY_TYPES = frozenset(KeyType) - {KeyType.ED25519}
CA_PATH = "/keyreeve/ca"
KEY_SERVER_PATH = "/keyreeve/keyserver"


class SvidKind(StrEnum):
    WORKLOAD = "workload"
    AGENT = "agent"
    SERVICE = "service"


@dataclass(frozen=True, slots=True)
class SvidProfile:
    """Life of the leaves of one kind. Raises: InvalidRequest."""

    kind: SvidKind
    ttl: timedelta
    max_ttl: timedelta
    backdate: timedelta = DEFAULT_BACKDATE

    def __post_init__(self) -> None:
        if not timedelta(seconds=1) <= self.ttl <= self.max_ttl:
            raise InvalidRequest(f"ttl of {self.kind} SVIDs is not between 1 second and its maximum")
        if not timedelta(0) <= self.backdate <= timedelta(hours=1):
            raise InvalidRequest("backdate is not between 0 and 1 hour")

    @property
    def is_infrastructure(self) -> bool:
        """Agents and services live under the reserved path and carry the DNS name that stands for their SPIFFE ID."""
        return self.kind is not SvidKind.WORKLOAD

    def check_id(self, spiffe_id: SpiffeId) -> None:
        """Raises: InvalidRequest when a leaf of this kind cannot have this SPIFFE ID."""
        match self.kind:
            case SvidKind.WORKLOAD:
                check_workload_id(spiffe_id)
            case SvidKind.AGENT:
                if not is_agent_id(spiffe_id):
                    raise InvalidRequest("SPIFFE ID is not one of an agent")
            case SvidKind.SERVICE:
                if not spiffe_id.path.startswith(RESERVED_PATH + "/") or is_agent_id(spiffe_id):
                    raise InvalidRequest("SPIFFE ID is not one of a service")

    def life(self, wanted: timedelta | None) -> timedelta:
        """The wanted life within the bounds of the profile."""
        return min(wanted or self.ttl, self.max_ttl)


@dataclass(frozen=True, slots=True)
class AuthorityLives:
    """How long authorities live, and what the key cluster lets them sign at most."""

    root_ttl: timedelta = timedelta(days=3650)
    issuing_ttl: timedelta = timedelta(days=30)
    backdate: timedelta = DEFAULT_BACKDATE
    max_backdate: timedelta = timedelta(hours=1)

    def __post_init__(self) -> None:
        if not timedelta(seconds=1) <= self.issuing_ttl <= self.root_ttl <= timedelta(days=36500):
            raise InvalidRequest("authority lives: issuing_ttl is not between 1 second and root_ttl, at most 100 years")
