"""Keys that live in a PKCS#11 token. This module loads no PKCS#11: the signer never sees the vendor's module or the PIN."""

from __future__ import annotations

from dataclasses import dataclass, field
from pathlib import Path

from keyreeve_common.pkcs11_uri import Pkcs11Uri

from keyreeve_keyserver.backends.launch import WorkerSpec
from keyreeve_keyserver.backends.softhsm import softhsm_store
from keyreeve_keyserver.backends.worker_backend import WorkerBackend
from keyreeve_keyserver.backends.worker_place import PoolPolicy
from keyreeve_keyserver.domain.keys import Custody
from keyreeve_keyserver.frames import JsonObject
from keyreeve_keyserver.hardening.lockdown import Reach

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
    network: bool | None = None
    reads: tuple[Path, ...] | None = None
    writes: tuple[Path, ...] = ()

    @property
    def reach(self) -> Reach:
        """What SoftHSM needs is known. Of another module it is what the configuration says; where that says nothing, it may reach all."""
        if self.softhsm_conf is None and self.reads is None and not self.writes:
            return Reach(network=self.network is not False)
        module = (Path(self.token.module_path),) if self.token.module_path else ()
        conf = () if self.softhsm_conf is None else (self.softhsm_conf,)
        store = None if self.softhsm_conf is None else softhsm_store(self.softhsm_conf)
        return Reach(
            network=bool(self.network),
            reads=(*module, *conf, *(self.reads or ())),
            writes=(*(() if store is None else (store,)), *self.writes),
        )


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
            WorkerSpec(name, PROGRAM, opens, {"pin_file": Path(settings.token.pin_source or "")}, settings.reach),
            custody=settings.custody,
            loads_wrapped=True,
            workers=settings.workers,
            policy=settings.policy,
        )
