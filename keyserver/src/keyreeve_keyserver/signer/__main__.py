"""Starts the signer: `python -m keyreeve_keyserver.signer --config FILE (--frames-fd N | --listen PATH | --check-config)`.

Exit codes and the rest of the contract: docs/protocol/signer-frames.md "Start-up".
"""

from __future__ import annotations

import argparse
import asyncio
import os
import signal
import sys
import warnings
from collections.abc import Callable, Coroutine, Mapping
from datetime import UTC, datetime
from importlib.util import find_spec
from pathlib import Path

from keyreeve_common.config import load_config
from keyreeve_common.errors import ConfigInvalid, Internal, KeyreeveError, TokenPinIncorrect
from keyreeve_common.files import check_secret_file, make_private_directory, read_secret
from keyreeve_common.telemetry import configure_logging, log, log_error, log_warning, ready_notice

from keyreeve_keyserver.audit.file_log import FileAuditLog
from keyreeve_keyserver.audit.ports import AuditLog, NullAuditLog
from keyreeve_keyserver.audit.publication import DIRECTORY_MODE
from keyreeve_keyserver.backends.engine_choice import choose_engines
from keyreeve_keyserver.backends.engines import EngineChoice
from keyreeve_keyserver.backends.launch import WorkerSpec
from keyreeve_keyserver.backends.launcher_link import LauncherLink
from keyreeve_keyserver.backends.pkcs11_backend import Pkcs11Backend, Pkcs11Settings
from keyreeve_keyserver.backends.ports import Backend
from keyreeve_keyserver.backends.software import SoftwareBackend
from keyreeve_keyserver.backends.vault_backend import VaultBackend
from keyreeve_keyserver.backends.worker_backend import WorkerBackend
from keyreeve_keyserver.backends.worker_place import PoolPolicy
from keyreeve_keyserver.collector import collect_rarely
from keyreeve_keyserver.domain.breaker import BreakerPolicy
from keyreeve_keyserver.domain.keys import Custody
from keyreeve_keyserver.domain.pair import Pair, parse_pair
from keyreeve_keyserver.hardening.lockdown import (
    Card,
    Protections,
    confine_signer_calls,
    confine_signer_files,
    protect_self,
)
from keyreeve_keyserver.signer.approvals import load_approvals
from keyreeve_keyserver.signer.config import BackendConfig, BackendKind, KeyCustody, SignerConfig
from keyreeve_keyserver.signer.controls import ControlService
from keyreeve_keyserver.signer.judging import KeyTable
from keyreeve_keyserver.signer.metrics import SignerMetrics
from keyreeve_keyserver.signer.sealing import (
    KeyEncryptionKey,
    PassphraseKey,
    Sealer,
    TokenKey,
    check_passphrase,
    load_kdf_parameters,
)
from keyreeve_keyserver.signer.server import Server
from keyreeve_keyserver.signer.service import SigningService

_CUSTODIES = {KeyCustody.RESIDENT: Custody.TOKEN_RESIDENT, KeyCustody.WRAPPED: Custody.TOKEN_WRAPPED}
EXIT_CONFIG = 78
EXIT_PIN = 77
EXIT_FAULT = 70


def main() -> int:
    arguments = _arguments()
    os.umask(0o077)
    protections = Protections()
    if not arguments.check_config:
        protect_self(protections)
    configure_logging("signer")
    warnings.simplefilter("error", UserWarning)  # a certificate that cryptography warns about is refused
    try:
        pair = parse_pair(arguments.pair)
        config = load_config(SignerConfig, arguments.config).of_pair(pair)
        _check(config, listens=arguments.listen is not None)
        if not arguments.check_config:
            asyncio.run(_run(config, arguments, protections, pair))
    except TokenPinIncorrect as error:
        log_error("start_refused", error=error.code.value, detail=error.detail)
        return EXIT_PIN
    except Internal as error:
        log_error("signer_failed", error=error.code.value, detail=error.detail)
        return EXIT_FAULT
    except KeyreeveError as error:
        log_error("start_refused", error=error.code.value, detail=error.detail)
        return EXIT_CONFIG
    return 0


def _arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(prog="keyreeve-signer", description="The key-holding process of a key host.")
    parser.add_argument("--config", type=Path, required=True, help="signer.toml")
    how = parser.add_mutually_exclusive_group(required=True)
    how.add_argument("--frames-fd", type=int, help="inherited end of a Unix stream socketpair")
    how.add_argument("--listen", type=Path, help="socket file to make and serve")
    how.add_argument("--check-config", action="store_true", help="read the configuration and exit")
    parser.add_argument("--launcher-fd", type=int, help="inherited socket of a launcher that the supervisor started")
    parser.add_argument("--pair", default="1/1", help="NUMBER/COUNT: which of a host's signers this is")
    return parser.parse_args()


def _check(config: SignerConfig, *, listens: bool) -> None:
    if listens and not config.listen.allowed_uids:
        raise ConfigInvalid("listen.allowed_uids is empty: no one could connect")
    if config.sealing.passphrase_file is not None:
        check_passphrase(read_secret(config.sealing.passphrase_file))
    if config.approvals.required:
        load_approvals(config.approvals)
    for backend in config.backend:
        pin_file = backend.token().pin_source if backend.kind is BackendKind.PKCS11 else None
        if pin_file is not None and _may_see(Path(pin_file)):
            check_secret_file(Path(pin_file))  # the launcher reads it, perhaps as a user of its own, and checks again
        if backend.kind is BackendKind.VAULT and find_spec("hvac") is None:  # looked for, not loaded: only workers do
            raise ConfigInvalid(
                f"backend {backend.name}: kind vault needs the extra: install keyreeve-keyserver[vault]"
            )


def _may_see(path: Path) -> bool:
    try:
        return path.exists()
    except PermissionError:
        return False


async def _run(config: SignerConfig, arguments: argparse.Namespace, protections: Protections, pair: Pair) -> None:
    # 1. While everything may still be opened: what reads a secret or another file, and the launcher, which has to exec.
    with_workers = {each.name: _backend(each) for each in config.backend if each.kind is not BackendKind.SOFTWARE}
    kek = _key_encryption_key(config, with_workers)
    approvals = load_approvals(config.approvals)
    workers = [each.worker for each in with_workers.values() if isinstance(each, WorkerBackend)]
    launcher = await _launcher(workers, arguments.launcher_fd)
    announce: Callable[[], None] = ready_notice("serving") if arguments.listen is not None else lambda: None
    # 2. Files and capabilities. Threads begin only after this: these rules bind the thread that asks for them, and those that it begins.
    sockets = [arguments.listen.absolute().parent] if arguments.listen is not None else []
    confine_signer_files(protections, writes=_written(config), sockets=sockets, card=_card(config))
    # 3. All that serves; system calls last, in `_lock`.
    backends = {each.name: with_workers.get(each.name) or _backend(each) for each in config.backend}
    keys, now = KeyTable(), _now
    sealer, audit = Sealer(kek), _audit_log(config, kek, pair)
    metrics = SignerMetrics()
    metrics.watch(backends, keys, audit, protections)
    server = Server(
        SigningService(backends, keys, now=now, max_message=config.max_message_bytes, metrics=metrics, audit=audit),
        ControlService(
            backends,
            keys,
            sealer,
            default_backend=config.default_name,
            now=now,
            metrics=metrics,
            audit=audit,
            approvals=approvals,
            protections=protections,
        ),
        allowed_uids=frozenset(config.listen.allowed_uids),
    )
    try:
        for backend in backends.values():
            await (backend.start(launcher) if isinstance(backend, WorkerBackend) else backend.start())
        await audit.start()
        collect_rarely()

        def ready() -> None:
            _lock(config, protections, backends)
            announce()

        if arguments.listen is not None:
            serving = server.listen(arguments.listen, ready)
        else:
            ready()
            serving = server.serve_fd(arguments.frames_fd)
        await _until_signal(serving, launcher)
    finally:
        await audit.close()
        for backend in backends.values():
            await backend.close()
        if launcher is not None:
            launcher.close()
    log("signer_stopped")


async def _launcher(workers: list[WorkerSpec], descriptor: int | None) -> LauncherLink | None:
    if descriptor is not None:
        return await LauncherLink.adopt(descriptor, workers)
    return await LauncherLink.start(workers) if workers else None


def _lock(config: SignerConfig, protections: Protections, backends: Mapping[str, Backend]) -> None:
    """The last step before the first foreign byte is read. Raises: ConfigInvalid where a protection is required and not to be had."""
    confine_signer_calls(protections, card=_card(config) is not None)
    said = log_warning if protections.missing else log
    said("signer_hardened", **{name.replace("-", "_"): state for name, state in protections.describe().items()})
    protections.require(config.hardening.required)
    log("signer_ready", backends=",".join(backends))


async def _until_signal(serving: Coroutine[None, None, None], launcher: LauncherLink | None) -> None:
    """Runs until the work ends, or SIGTERM or SIGINT ends it; what was begun is answered first.

    Raises: Internal where the launcher is gone: its workers went with it, and we could start no others.
    """
    task = asyncio.create_task(serving)
    loop = asyncio.get_running_loop()
    for number in (signal.SIGTERM, signal.SIGINT):
        loop.add_signal_handler(number, task.cancel)
    missing = asyncio.create_task(launcher.gone.wait()) if launcher is not None else None
    if missing is not None:
        missing.add_done_callback(lambda ended: ended.cancelled() or task.cancel())
    try:
        await task
    except asyncio.CancelledError:
        if launcher is not None and launcher.gone.is_set():
            raise Internal("the launcher of workers is gone") from None
        log("signal_received")
    finally:
        if missing is not None:
            missing.cancel()


def _card(config: SignerConfig) -> Card | None:
    """Asked for, whether it is there or not: what the sandbox admits is the configuration's word, not the machine's."""
    asked = [backend.qat_provider for backend in config.backend if backend.engine is EngineChoice.QAT]
    return Card(tuple(Path(path) for path in asked if path.startswith("/"))) if asked else None


def _written(config: SignerConfig) -> list[Path]:
    """The one place that the signer writes to, made while it still may. Raises: ConfigInvalid."""
    if config.audit is None:
        return []
    make_private_directory(config.audit.directory, mode=DIRECTORY_MODE)
    return [config.audit.directory]


def _audit_log(config: SignerConfig, kek: KeyEncryptionKey, pair: Pair) -> AuditLog:
    if config.audit is None:
        log_warning("audit_log_off", detail="signer.toml has no [audit]: no signature is recorded")
        return NullAuditLog()
    return FileAuditLog(config.audit, kek, now=_now, pair=pair)


def _backend(config: BackendConfig) -> Backend:
    if config.kind is BackendKind.SOFTWARE:
        engines = choose_engines(config.engine, qat_provider=config.qat_provider)
        return SoftwareBackend(config.name, threads=config.workers, engines=engines)
    if config.vault is not None:
        return VaultBackend(
            config.name,
            config.vault,
            mount=config.vault.mount,
            key_prefix=config.vault.key_prefix,
            workers=config.workers,
            policy=_pool_policy(config),
        )
    return Pkcs11Backend(
        config.name,
        Pkcs11Settings(
            token=config.token(),
            custody=_CUSTODIES[config.custody],
            wrapping_key_label=config.wrapping_key_label,
            loaded_keys=config.loaded_keys,
            workers=config.workers or 2,
            policy=_pool_policy(config),
            softhsm_conf=config.softhsm_conf,
            network=config.network,
            reads=config.reads,
            writes=config.writes,
        ),
    )


def _pool_policy(config: BackendConfig) -> PoolPolicy:
    return PoolPolicy(
        call_timeout=config.call_timeout,
        sign_timeout=config.sign_timeout,
        keepalive=config.keepalive,
        breaker=BreakerPolicy(
            faults=config.breaker_faults,
            pause=config.breaker_pause,
            longest_pause=max(config.breaker_pause, BreakerPolicy().longest_pause),
        ),
    )


def _key_encryption_key(config: SignerConfig, backends: dict[str, Backend]) -> KeyEncryptionKey:
    """Raises: ConfigInvalid."""
    sealing = config.sealing
    if sealing.passphrase_file is not None:
        passphrase = check_passphrase(read_secret(sealing.passphrase_file))
        return PassphraseKey(load_kdf_parameters(sealing.kdf_path).derive(passphrase))
    if sealing.vault_backend is not None and sealing.vault_key_name is not None:
        vault = backends[sealing.vault_backend]
        assert isinstance(vault, VaultBackend)  # noqa: S101 - SignerConfig holds it
        return TokenKey(vault, sealing.vault_key_name)
    backend = backends[sealing.token_backend or ""]
    assert isinstance(backend, Pkcs11Backend) and sealing.token_key_label  # noqa: S101, PT018 - SignerConfig holds it
    return TokenKey(backend, sealing.token_key_label)


def _now() -> datetime:
    return datetime.now(UTC)


if __name__ == "__main__":
    sys.exit(main())
