"""The ceremony that brings a trust domain to life: `keyreeve init`. Idempotent, and resumable at any step.

It runs where the key server's local admin socket is, so no network identity is needed yet. A second run repairs the services' own SVIDs where
they are missing or expired, and replaces an issuing authority that expired while no CA ran to rotate it; it changes nothing else: authorities
are kept, grants that somebody revoked stay revoked.
"""

from __future__ import annotations

import contextlib
import os
import stat
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from enum import StrEnum
from pathlib import Path
from typing import Any, Protocol

from keyreeve_common.errors import FailedPrecondition, KeyreeveError
from keyreeve_common.files import make_private_directory, write_atomic

from keyreeve_ca.authority_service import ensure_own_grant, make_root, prepare_authority, rotate_authorities
from keyreeve_ca.config import CaConfig
from keyreeve_ca.domain.authority import Authority, AuthorityAction, active_authority
from keyreeve_ca.own_svids import OwnSvid, certify_key_server
from keyreeve_ca.ports import KeyServerIdentity, Store
from keyreeve_ca.service import Ca, current_bundle


class StepState(StrEnum):
    MADE = "made"
    KEPT = "kept"
    REPAIRED = "repaired"
    LEFT = "left"  # not as it should be, and not ours to change


@dataclass(frozen=True, slots=True)
class Step:
    """One line of the ceremony's report."""

    name: str
    state: StepState
    detail: str = ""


class MigratedStore(Store, Protocol):
    def has_schema(self) -> bool: ...

    def migrate(self) -> None: ...


@dataclass(frozen=True)
class Ceremony:
    """`run` gives each step when it is done. `server` is the key server behind the admin socket."""

    ca: Ca
    store: MigratedStore
    config: CaConfig
    server: KeyServerIdentity

    def run(self) -> Iterator[Step]:
        """Raises: KeyreeveError at the step that fails; a later run goes on there."""
        try:
            yield self._check_key_server()
            yield self._schema()
            yield self._root()
            yield self._issuing()
            yield from self._grants()
            yield self._own_svid()
            yield self._key_server_svid()
            yield self._bundle_file()
        finally:
            if (
                self.config.state_dir.is_dir()
            ):  # also where a step failed: a CA that runs must be able to read its files
                give_to_owner(self.config.state_dir)

    @property
    def _own(self) -> OwnSvid:
        return OwnSvid(self.ca, self.config.svid_files)

    def _check_key_server(self) -> Step:
        health = self.server.check_health()
        if health.backends and not any(backend.serving for backend in health.backends):
            raise FailedPrecondition(f"key server has no backend that serves: {health.detail}")
        return Step("key server", StepState.KEPT, f"version {health.version} answers")

    def _schema(self) -> Step:
        make_private_directory(self.config.state_dir)
        there = self.store.has_schema()
        self.store.migrate()
        self.store.claim_trust_domain(self.ca.policy.trust_domain)
        state = StepState.KEPT if there else StepState.MADE
        return Step("database", state, f"trust domain {self.ca.policy.trust_domain}")

    def _root(self) -> Step:
        before = any(each.root for each in self.store.list_authorities())
        root = make_root(self.ca)
        return Step("root authority", StepState.KEPT if before else StepState.MADE, _about(root))

    def _issuing(self) -> Step:
        try:
            active = active_authority(self.store.list_authorities())
        except FailedPrecondition:
            return Step("issuing authority", StepState.MADE, _about(prepare_authority(self.ca)))
        if not active.is_expired(self.ca.clock()):
            return Step("issuing authority", StepState.KEPT, _about(active))
        # The CA cannot do it: it does not start without an SVID of its own, which an expired authority cannot issue.
        if rotate_authorities(self.ca) is AuthorityAction.PREPARE:
            rotate_authorities(self.ca)
        fresh = active_authority(self.store.list_authorities())
        return Step("issuing authority", StepState.REPAIRED, f"{_about(fresh)}; before: expired")

    def _grants(self) -> Iterator[Step]:
        for authority in self.store.list_authorities():
            if authority.is_expired(self.ca.clock()) or authority.is_upstream:
                continue
            name = f"grant of {'root' if authority.root else 'issuing'} key to {self.ca.policy.ca_id}"
            made = ensure_own_grant(self.ca, authority.key_id)
            found = self.ca.cluster.list_grants(key_id=authority.key_id, holder=self.ca.policy.ca_id)
            if any(grant.is_revoked for grant in found):
                yield Step(name, StepState.LEFT, "an operator revoked it; `keyreeve grant create` brings it back")
            else:
                yield Step(name, StepState.MADE if made else StepState.KEPT, authority.key_id)

    def _own_svid(self) -> Step:
        try:
            svid = self._own.read()
            return Step("CA's own SVID", StepState.KEPT, f"until {svid.not_after.isoformat()}")
        except KeyreeveError as error:
            there = self.config.svid_files.key.exists()
            svid = self._own.renew()
            state = StepState.REPAIRED if there else StepState.MADE
            why = f"; before: {error.detail}" if there else ""
            return Step("CA's own SVID", state, f"until {svid.not_after.isoformat()}{why}")

    def _key_server_svid(self) -> Step:
        not_after = self.server.check_health().svid_not_after
        if not_after is not None and self.ca.clock() < not_after:
            return Step("key server's SVID", StepState.KEPT, f"until {not_after.isoformat()}")
        state = StepState.MADE if not_after is None else StepState.REPAIRED
        fresh = certify_key_server(self.ca, self.server, self.config.key_server_id)
        return Step("key server's SVID", state, f"until {fresh.isoformat()}")

    def _bundle_file(self) -> Step:
        """The CA's own copy, and the one for agents where the configuration names a place."""
        pem = current_bundle(self.ca).to_pem()
        own, shared = self.config.svid_files.bundle, self.config.bundle_file
        made = [path for path in (own, shared) if path is not None and _write_if_changed(path, pem)]
        shown = ", ".join(str(path) for path in (shared or own,))
        return Step("bundle file", StepState.MADE if made else StepState.KEPT, shown)


def _write_if_changed(path: Path, data: bytes) -> bool:
    if path.exists() and path.read_bytes() == data:
        return False
    for missing in [each for each in reversed(path.parents) if not each.exists()]:
        missing.mkdir()
        missing.chmod(0o755)  # a bundle is for everybody, whatever the umask
    write_atomic(path, data)
    return True


def _about(authority: Authority) -> str:
    if authority.is_upstream:
        return f"{authority.authority_id}, of the upstream, until {authority.not_after.isoformat()}"
    return f"{authority.authority_id}, key {authority.key_id}, until {authority.not_after.isoformat()}"


def give_to_owner(directory: Path, *, chown: Callable[..., Any] = os.chown) -> None:
    """What root made in a service's own directory belongs to that service's user: its files, not what a link there leads to."""
    if os.geteuid() != 0:
        return
    owner = directory.stat()
    for path in directory.iterdir():
        with contextlib.suppress(FileNotFoundError):  # SQLite's side files come and go
            status = path.lstat()
            own = stat.S_ISREG(status.st_mode) and status.st_nlink == 1
            if own and status.st_uid != owner.st_uid:
                chown(path, owner.st_uid, owner.st_gid, follow_symlinks=False)
