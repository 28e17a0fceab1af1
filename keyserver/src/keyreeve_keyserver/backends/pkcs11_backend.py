"""Keys that live in a PKCS#11 token. This module loads no PKCS#11: the signer never sees the vendor's module or the PIN."""

from __future__ import annotations

from dataclasses import dataclass
from datetime import timedelta
from pathlib import Path

from keyreeve_keyserver.backends.worker_backend import WorkerBackend
from keyreeve_keyserver.domain.keys import Custody

PROGRAM = "keyreeve_keyserver.backends.pkcs11_worker"


@dataclass(frozen=True, slots=True)
class Pkcs11Settings:
    """`softhsm_conf` is for SoftHSM only: the worker puts it into its own environment."""

    module: Path
    token_label: str
    pin_file: Path
    workers: int = 2
    call_timeout: timedelta = timedelta(seconds=30)
    softhsm_conf: Path | None = None


class Pkcs11Backend(WorkerBackend):
    def __init__(self, name: str, settings: Pkcs11Settings) -> None:
        super().__init__(
            name,
            PROGRAM,
            settings={
                "module": str(settings.module),
                "token_label": settings.token_label,
                "pin_file": str(settings.pin_file),
                "softhsm_conf": str(settings.softhsm_conf or ""),
            },
            custody=Custody.TOKEN_RESIDENT,
            workers=settings.workers,
            call_timeout=settings.call_timeout,
        )
