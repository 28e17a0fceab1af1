"""Keys that live in Vault's or OpenBao's Transit engine. This module loads no network: the signer's workers reach Vault, the signer does not.

A key of ours is one version of one Transit key: its reference names both, so that a rotation in Vault changes no key of ours (ADR 0016).
"""

from __future__ import annotations

from datetime import timedelta

from keyreeve_common.vault.config import VaultConfig

from keyreeve_keyserver.backends.launch import WorkerSpec
from keyreeve_keyserver.backends.ports import SignRequest
from keyreeve_keyserver.backends.worker_backend import WorkerBackend
from keyreeve_keyserver.backends.worker_place import PoolPolicy
from keyreeve_keyserver.backends.worker_queue import Lane
from keyreeve_keyserver.domain.keys import Custody
from keyreeve_keyserver.frames import JsonObject
from keyreeve_keyserver.hardening.lockdown import Reach

PROGRAM = "keyreeve_keyserver.backends.vault_worker"
DEFAULT_WORKERS = 4


class VaultBackend(WorkerBackend):
    """`key_prefix` begins the name of every Transit key that is made here, so that a policy of Vault can name them all."""

    def __init__(
        self,
        name: str,
        vault: VaultConfig,
        *,
        mount: str,
        key_prefix: str,
        workers: int,
        policy: PoolPolicy | None = None,
    ) -> None:
        super().__init__(
            WorkerSpec(name, PROGRAM, worker_settings(vault, mount, key_prefix), {}, reach_of(vault)),
            custody=Custody.VAULT_TRANSIT,
            workers=workers or DEFAULT_WORKERS,
            policy=policy or PoolPolicy(),
            ref_form=key_prefix + "{}-v1",
            verifies_all=True,
        )

    def _lane_of(self, request: SignRequest) -> Lane:
        """Transit signs in one call what one key signs in one scheme. A call costs more than a few signatures, so a few stay together."""
        return Lane((request.record.backend_ref, request.scheme), most=32, least=8, paced=False)


def reach_of(vault: VaultConfig) -> Reach:
    """Outgoing connections, and the directories of the files that it names: who rotates a secret puts a new file in the place of the old one."""
    named = [vault.secret_file, *([vault.ca_file] if vault.ca_file is not None else [])]
    return Reach(network=True, reads=tuple(path.parent for path in named))


def worker_settings(vault: VaultConfig, mount: str, key_prefix: str) -> JsonObject:
    """What a worker is told: where and how, and where the secrets stand. It opens that one file itself, at each log-in, since they rotate."""
    return {
        "address": vault.address,
        "login": vault.login.value,
        "namespace": vault.namespace,
        "ca_file": str(vault.ca_file or ""),
        "insecure_http": vault.insecure_http,
        "login_mount": vault.login_mount,
        "role_id": vault.role_id,
        "secret_id_file": str(vault.secret_id_file or ""),
        "role": vault.role,
        "jwt_file": str(vault.jwt_file or ""),
        "token_file": str(vault.token_file or ""),
        "request_timeout_ms": int(vault.request_timeout / timedelta(milliseconds=1)),
        "mount": mount,
        "key_prefix": key_prefix,
    }
