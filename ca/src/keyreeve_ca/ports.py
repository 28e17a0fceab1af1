"""What the CA needs from outside: a store, a key cluster, a source of entropy. Ports promise KeyreeveError and nothing else."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from datetime import datetime, timedelta
from typing import Any, Protocol

from cryptography.x509 import Certificate
from keyreeve_client.key_admin import ClusterKey, Grant, KeyServerHealth, KeySpec
from keyreeve_common.bundle import Bundle
from keyreeve_common.errors import KeyreeveError
from keyreeve_common.identity import SpiffeId, TrustDomain
from keyreeve_common.purposes import Purpose
from keyreeve_common.schemes import SignatureScheme

from keyreeve_ca.domain.attestation import JoinToken
from keyreeve_ca.domain.authority import Authority
from keyreeve_ca.domain.entries import Entry, KeyOwner
from keyreeve_ca.domain.grants import GrantState, NodeGrant
from keyreeve_ca.domain.records import Agent, Changes, FormerKey, KeyUse, ManagedKey, SvidRecord
from keyreeve_ca.domain.views import AgentView, OwnersView


class KeyCluster(Protocol):
    """The key cluster as the CA sees it. Calls block; each is tried on every replica before Unavailable."""

    def create_key(self, spec: KeySpec) -> ClusterKey: ...

    def get_key(self, key_id: str) -> ClusterKey: ...

    def disable_key(self, key_id: str) -> None: ...

    def enable_key(self, key_id: str) -> None: ...

    def rotate_key(self, key_id: str, *, request_id: str) -> ClusterKey:
        """The next generation, with the grants; the same request id gives the same key again. Raises: Conflict, FailedPrecondition."""
        ...

    def retire_key(self, key_id: str, *, at: datetime) -> None:
        """Has an enabled key disabled at this time. Raises: FailedPrecondition."""
        ...

    def create_grant(
        self, key_id: str, holder: SpiffeId, *, purposes: frozenset[Purpose], expires_at: datetime | None
    ) -> Grant: ...

    def extend_grant(self, key_id: str, holder: SpiffeId, *, expires_at: datetime) -> Grant:
        """Raises: FailedPrecondition or NotFound when it was revoked."""
        ...

    def revoke_grant(self, key_id: str, holder: SpiffeId) -> Grant: ...

    def list_grants(self, *, key_id: str = "", holder: SpiffeId | None = None) -> list[Grant]: ...

    def private_key(self, key_id: str, spki_der: bytes, *, purpose: Purpose = Purpose.X509_CERTIFICATE) -> Any:
        """A key object for cryptography's builders whose signatures have this purpose."""
        ...

    def sign_many(
        self, key_id: str, scheme: SignatureScheme, purpose: Purpose, *, messages: Sequence[bytes]
    ) -> list[bytes | KeyreeveError]:
        """One result for each message, in their order: a signature, not verified yet, or why there is none."""
        ...

    def replicas(self) -> Sequence[KeyServerIdentity]: ...


class UpstreamAuthority(Protocol):
    """A parent authority that holds the root outside of the key cluster. Calls block. What it gives is checked by the caller."""

    @property
    def name(self) -> str:
        """For logs: where it is, no secret."""
        ...

    def fetch_root(self) -> Certificate:
        """Its root of now. Raises: FailedPrecondition, Unavailable."""
        ...

    def sign_authority(self, csr_der: bytes, *, not_after: datetime, backdate: timedelta) -> Certificate:
        """A CA certificate of path length 0 for the request, its subject and URI kept. Raises: FailedPrecondition, Unavailable."""
        ...


class KeyServerIdentity(Protocol):
    """The own SVID of one key server."""

    @property
    def name(self) -> str: ...

    def check_health(self) -> KeyServerHealth: ...

    def get_csr(self, spiffe_id: SpiffeId) -> bytes: ...

    def install_svid(self, chain_der: Sequence[bytes], bundle: Bundle) -> datetime: ...


class Store(Protocol):
    """Durable records. Every method is one transaction; changes that nodes must see move the change sequence in the same one.

    Raises: StorageBusy, StorageFull, Unavailable from any method.
    """

    def claim_trust_domain(self, trust_domain: TrustDomain) -> None:
        """Raises: Conflict when the store belongs to another trust domain."""
        ...

    def change_sequence(self) -> int: ...

    def changes_since(self, number: int) -> Changes:
        """Whom the steps after this one concern."""
        ...

    def prune_change_log(self) -> int: ...

    def create_entry(self, entry: Entry) -> None:
        """Raises: Conflict for a duplicate."""
        ...

    def get_entry(self, entry_id: str) -> Entry:
        """Raises: NotFound."""
        ...

    def list_entries(
        self,
        *,
        spiffe_id: SpiffeId | None = None,
        parent_id: SpiffeId | None = None,
        limit: int = 1000,
        after: str = "",
    ) -> list[Entry]: ...

    def read_agent_view(self, agent: SpiffeId, now: datetime) -> AgentView:
        """What the sync of one agent needs to know, in as many statements for a thousand entries as for one."""
        ...

    def read_owners_view(self, owners: Sequence[KeyOwner], now: datetime) -> OwnersView: ...

    def agents_due(self, now: datetime) -> list[SpiffeId]:
        """Agents that may act and for which a sync would find something to issue or to grant."""
        ...

    def expired_entries(self, now: datetime) -> list[Entry]: ...

    def update_entry(self, entry: Entry, *, read_revision: int) -> Entry:
        """Stores it with the next revision. Raises: NotFound; Conflict for a stale revision or a duplicate."""
        ...

    def delete_entry(self, entry_id: str) -> Entry:
        """Also marks the grants that no other entry needs as withdrawing. Raises: NotFound."""
        ...

    def add_join_token(self, token: JoinToken) -> None: ...

    def take_join_token(self, token_hash: bytes, now: datetime) -> JoinToken:
        """Proves that exactly one row went away. Raises: JoinTokenInvalid."""
        ...

    def prune_join_tokens(self, now: datetime) -> int: ...

    def save_agent(self, agent: Agent) -> bool:
        """Stores what attested; whether it did: never over a ban."""
        ...

    def renew_agent(
        self, spiffe_id: SpiffeId, *, renewed_from: str, serial: str, not_after: datetime, seen_at: datetime
    ) -> bool:
        """Makes `serial` the newest SVID, only while the agent may act and by `renewed_from`, looked at in the same transaction.

        Whether it did. So a renewal that began before an eviction, a ban or a new attestation cannot undo it.
        """
        ...

    def get_agent(self, spiffe_id: SpiffeId) -> Agent:
        """Raises: NotFound."""
        ...

    def list_agents(self, *, limit: int = 1000, after: str = "") -> list[Agent]: ...

    def touch_agent(self, spiffe_id: SpiffeId, *, seen_at: datetime, version: str) -> None: ...

    def set_agent_standing(self, spiffe_id: SpiffeId, *, banned: bool | None, evicted: bool) -> Agent:
        """Also marks its grants as withdrawing when it may no longer act. Raises: NotFound."""
        ...

    def list_authorities(self) -> list[Authority]: ...

    def save_authorities(self, authorities: Sequence[Authority], *, expected: Sequence[Authority]) -> None:
        """Replaces states and adds new ones. Raises: Conflict when the stored ones are not `expected` any more."""
        ...

    def bundle_sequence(self) -> int: ...

    def get_managed_key(self, owner: KeyOwner) -> ManagedKey | None: ...

    def save_managed_key(self, key: ManagedKey, *, expected: KeyUse | None = None) -> bool:
        """Whether it was saved; with `expected` only where the stored one is of that use."""
        ...

    def replace_managed_key(self, fresh: ManagedKey, *, former: ManagedKey) -> bool:
        """Puts `fresh` in place of `former`, which is kept as a former key; whether `former` was still in place."""
        ...

    def former_keys(self, owner: KeyOwner | None = None) -> list[FormerKey]: ...

    def save_retirement(self, key_id: str, retire_at: datetime) -> None: ...

    def forget_former_key(self, key_id: str) -> None: ...

    def last_not_after(self, key_id: str) -> datetime | None:
        """When the last certificate for this key ends, those that were begun and perhaps signed included."""
        ...

    def list_managed_keys(self, *, unused: bool = False) -> list[ManagedKey]:
        """All, or those that no entry needs any more and that are yet to be disabled."""
        ...

    def get_node_grant(self, owner: KeyOwner, agent: SpiffeId) -> NodeGrant | None: ...

    def save_node_grant(self, grant: NodeGrant, *, expected: GrantState | None = None) -> bool:
        """Whether it was saved; with `expected` only where the stored one is in that state."""
        ...

    def claim_node_grant(self, grant: NodeGrant) -> bool:
        """Saves it only while an entry needs it and the agent may act, looked at in the same transaction; whether it did.

        So a sync that read an entry before it was deleted cannot undo the withdrawal.
        """
        ...

    def withdrawing_grants(self) -> list[NodeGrant]: ...

    def record_intent(self, record: SvidRecord) -> None:
        """Raises: Conflict when the serial was used before."""
        ...

    def record_intents(self, records: Sequence[SvidRecord]) -> None:
        """All in one transaction. Raises: Conflict when a serial was used before; then none is recorded."""
        ...

    def record_results(self, issued: Sequence[SvidRecord], failures: Mapping[str, str]) -> None:
        """All in one transaction: `issued` with their chains, each the current one of its subject; why others failed, by serial.

        Of two for one subject the later is current. Agents that share a key with a new SVID hear of it. Raises: NotFound, then nothing
        is changed.
        """
        ...

    def record_issued(self, serial: str, chain_der: Sequence[bytes]) -> SvidRecord:
        """Makes it the current one of its subject."""
        ...

    def record_failed(self, serial: str, failure: str) -> None: ...

    def current_svid(self, subject: str) -> SvidRecord | None: ...

    def list_svids(
        self,
        *,
        spiffe_id: SpiffeId | None = None,
        serial: str = "",
        current_only: bool = False,
        limit: int = 1000,
        after: str = "",
    ) -> list[SvidRecord]: ...


class Entropy(Protocol):
    def __call__(self, count: int, /) -> bytes: ...
