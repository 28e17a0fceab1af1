"""Keys that live in a PKCS#11 token. This module loads no PKCS#11: the signer never sees the vendor's module or the PIN."""

from __future__ import annotations

from dataclasses import dataclass, field
from pathlib import Path

from keyreeve_common.pkcs11_uri import Pkcs11Uri

from keyreeve_keyserver.backends.launch import WorkerSpec
from keyreeve_keyserver.backends.worker_backend import WorkerBackend
from keyreeve_keyserver.backends.worker_pool import PoolPolicy
from keyreeve_keyserver.domain.keys import Custody
from keyreeve_keyserver.frames import JsonObject

PROGRAM = "keyreeve_keyserver.backends.pkcs11_worker"


@dataclass(frozen=True, slots=True)
class Pkcs11Settings:
    """`token` names the token, its module and the file of its PIN. `softhsm_conf`, for SoftHSM only, goes into the environment of the worker."""

    token: Pkcs11Uri
    custody: Custody = Custody.TOKEN_RESIDENT
    wrapping_key_label: str = "keyreeve-wrapping"
    loaded_keys: int = 64
    workers: int = 2
    policy: PoolPolicy = field(default_factory=PoolPolicy)
    softhsm_conf: Path | None = None


class Pkcs11Backend(WorkerBackend):
    def __init__(self, name: str, settings: Pkcs11Settings) -> None:
        opens: JsonObject = {
            "module": str(settings.token.module_path or ""),
            "token": str(settings.token.selector),
            "custody": settings.custody.value,
            "wrapping_key_label": settings.wrapping_key_label,
            "loaded_keys": settings.loaded_keys,
            "softhsm_conf": str(settings.softhsm_conf or ""),
        }
        super().__init__(
            WorkerSpec(name, PROGRAM, opens, {"pin_file": Path(settings.token.pin_source or "")}),
            custody=settings.custody,
            loads_wrapped=True,
            workers=settings.workers,
            policy=settings.policy,
        )
