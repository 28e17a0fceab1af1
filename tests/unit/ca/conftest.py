"""A CA whose key cluster is in this process, on a SQLite file, with a clock that the test moves."""

from __future__ import annotations

import secrets
from collections.abc import Iterator
from dataclasses import dataclass, field
from datetime import UTC, datetime, timedelta
from pathlib import Path
from typing import Any

import pytest
from cryptography import x509
from cryptography.hazmat.primitives import hashes
from cryptography.hazmat.primitives.asymmetric import ec
from cryptography.hazmat.primitives.serialization import Encoding
from keyreeve_ca.authority_service import make_root, prepare_authority
from keyreeve_ca.domain.entries import Entry, Selector
from keyreeve_ca.domain.profiles import SvidKind, SvidProfile
from keyreeve_ca.service import Ca, Policy
from keyreeve_ca.signers.local import InMemoryKeyCluster, ThrowAwayKeys
from keyreeve_ca.store.sql_store import SqlStore
from keyreeve_common.errors import KeyreeveError
from keyreeve_common.identity import SpiffeId, TrustDomain

TD = TrustDomain("example.org")
START = datetime(2026, 6, 1, 12, 0, 0, tzinfo=UTC)
HOUR = timedelta(hours=1)
LINT_KEYS = ThrowAwayKeys()


def policy(**changes: Any) -> Policy:
    fields: dict[str, Any] = {
        "trust_domain": TD,
        "workload": SvidProfile(SvidKind.WORKLOAD, HOUR, timedelta(hours=24)),
        "agent": SvidProfile(SvidKind.AGENT, HOUR, HOUR),
        "service": SvidProfile(SvidKind.SERVICE, 24 * HOUR, 24 * HOUR),
        **changes,
    }
    return Policy(**fields)


@dataclass
class Clock:
    now: datetime = START

    def __call__(self) -> datetime:
        return self.now

    def advance(self, by: timedelta) -> None:
        self.now += by


class BreakableKeyCluster(InMemoryKeyCluster):
    """With `failure` set, every call that reaches the cluster raises it."""

    failure: KeyreeveError | None = None

    def __getattribute__(self, name: str) -> Any:
        failure = object.__getattribute__(self, "failure")
        calls = ("create_key", "get_key", "disable_key", "enable_key", "create_grant")
        calls += ("extend_grant", "revoke_grant", "list_grants", "sign")
        if failure is not None and name in calls:
            raise failure
        return super().__getattribute__(name)


@dataclass
class Rig:
    ca: Ca
    clock: Clock
    cluster: BreakableKeyCluster
    store: SqlStore
    used: list[Any] = field(default_factory=list)

    def entry(self, path: str = "/web", agent: str = "n1", **changes: Any) -> Entry:
        fields: dict[str, Any] = {
            "entry_id": secrets.token_hex(8),
            "spiffe_id": SpiffeId(TD, path),
            "parent_id": SpiffeId(TD, f"/keyreeve/agent/{agent}"),
            "selectors": (Selector("unix", "uid:1000"),),
            "created_at": self.clock.now,
            **changes,
        }
        return Entry(**fields)


def _entropy(count: int) -> bytes:
    return secrets.token_bytes(count)


def make_rig(directory: Path, **changes: Any) -> Rig:
    clock = Clock()
    cluster = BreakableKeyCluster(clock)
    store = SqlStore.open(f"sqlite:///{directory / 'ca.sqlite3'}")
    store.migrate()
    ca = Ca(policy(**changes), store, cluster, clock, _entropy, LINT_KEYS)
    return Rig(ca, clock, cluster, store)


@pytest.fixture
def bare_rig(tmp_path: Path) -> Iterator[Rig]:
    """Without any authority yet."""
    made = make_rig(tmp_path)
    yield made
    made.store.close()


@pytest.fixture
def rig(tmp_path: Path) -> Iterator[Rig]:
    """Brought to life: a root and an active issuing authority."""
    made = make_rig(tmp_path)
    make_root(made.ca)
    prepare_authority(made.ca)
    yield made
    made.store.close()


def make_csr(key: Any = None) -> bytes:
    key = key or ec.generate_private_key(ec.SECP256R1())
    builder = x509.CertificateSigningRequestBuilder().subject_name(x509.Name([]))
    return builder.sign(key, hashes.SHA256()).public_bytes(Encoding.DER)


@pytest.fixture
def csr() -> bytes:
    return make_csr()
