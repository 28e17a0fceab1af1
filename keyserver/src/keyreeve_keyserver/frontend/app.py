"""The front end's life: open the catalog, reach the signer, serve the admin socket, serve mTLS once there is an SVID, drain."""

from __future__ import annotations

import asyncio
import fcntl
import os
import signal
from collections.abc import Awaitable, Callable
from contextlib import suppress
from dataclasses import dataclass
from datetime import UTC, datetime
from pathlib import Path

import grpc
from keyreeve_common.errors import ConfigInvalid, FailedPrecondition, Unavailable
from keyreeve_common.files import make_private_directory, read_secret
from keyreeve_common.grpc_edge import ANYONE, LOCAL, SERVER_PING_OPTIONS, EdgeInterceptor
from keyreeve_common.prometheus_export import MetricsServer
from keyreeve_common.telemetry import log, log_warning
from keyreeve_common.tls_listener import reloading_credentials
from keyreeve_common.tracing import open_tracing
from keyreeve_common.v1 import keyserver_pb2_grpc

from keyreeve_keyserver.catalog.catalog import Catalog
from keyreeve_keyserver.catalog.listen import ChangeListener
from keyreeve_keyserver.collector import collect_rarely
from keyreeve_keyserver.config import KeyServerConfig
from keyreeve_keyserver.domain.pair import ALONE, Pair
from keyreeve_keyserver.frontend.access import Access, CatalogThreads
from keyreeve_keyserver.frontend.admission import Admission
from keyreeve_keyserver.frontend.audit_trail import AuditTrail
from keyreeve_keyserver.frontend.canary import Canaries
from keyreeve_keyserver.frontend.engine import SigningEngine
from keyreeve_keyserver.frontend.freshness import FreshnessWatch
from keyreeve_keyserver.frontend.grants import GrantsServicer
from keyreeve_keyserver.frontend.health import HealthServicer
from keyreeve_keyserver.frontend.key_admin import KeyAdminServicer
from keyreeve_keyserver.frontend.key_life import KeyLifeService
from keyreeve_keyserver.frontend.metrics import FrontEndMetrics, SignerMetrics
from keyreeve_keyserver.frontend.quarantine_watch import QuarantineWatch
from keyreeve_keyserver.frontend.quarantines import QuarantinesServicer
from keyreeve_keyserver.frontend.service_identity import ServiceIdentityServicer
from keyreeve_keyserver.frontend.signer_link import SignerLink
from keyreeve_keyserver.frontend.signing import SigningServicer
from keyreeve_keyserver.frontend.tls_identity import TlsIdentity
from keyreeve_keyserver.frontend.traces import RequestTraces

_MAX_MESSAGE_BYTES = 17 * 1024 * 1024  # a batch of 256 whole messages, and their heads
_OPTIONS = [
    ("grpc.max_receive_message_length", _MAX_MESSAGE_BYTES),
    ("grpc.max_send_message_length", _MAX_MESSAGE_BYTES),
    ("grpc.max_concurrent_streams", 1024),
    ("grpc.keepalive_time_ms", 30_000),
    ("grpc.keepalive_timeout_ms", 10_000),
    *SERVER_PING_OPTIONS,
]
_CATALOG_RETRY_S = 0.5
_FLUSH_S = 2.0
_SERVICES = "/keyreeve.keyserver.v1."


def allow_table(config: KeyServerConfig) -> dict[str, tuple[str, ...]]:
    """Who may call what. Signing is open to every SVID of the trust domain: grants decide there."""
    admins = (*(str(admin) for admin in config.key_admins), LOCAL)
    return {
        f"{_SERVICES}Signing/": (f"{config.trust_domain.id}/*", LOCAL),
        f"{_SERVICES}KeyAdmin/": admins,
        f"{_SERVICES}Grants/": admins,
        f"{_SERVICES}Quarantines/": (LOCAL,),
        f"{_SERVICES}Quarantines/ListQuarantines": admins,
        f"{_SERVICES}ServiceIdentity/": admins,
        f"{_SERVICES}Health/": (ANYONE,),
    }


async def _read_all(access: Access) -> None:
    """All keys and grants, which the garbage collector then need not look through again and again."""
    await access.refresh()
    collect_rarely()


def utc_now() -> datetime:
    return datetime.now(UTC)


@dataclass(frozen=True, slots=True)
class Servicers:
    signing: SigningServicer
    key_admin: KeyAdminServicer
    grants: GrantsServicer
    quarantines: QuarantinesServicer
    identity: ServiceIdentityServicer
    health: HealthServicer

    def add_to(self, server: grpc.aio.Server) -> None:
        keyserver_pb2_grpc.add_SigningServicer_to_server(self.signing, server)
        keyserver_pb2_grpc.add_KeyAdminServicer_to_server(self.key_admin, server)
        keyserver_pb2_grpc.add_GrantsServicer_to_server(self.grants, server)
        keyserver_pb2_grpc.add_QuarantinesServicer_to_server(self.quarantines, server)
        keyserver_pb2_grpc.add_ServiceIdentityServicer_to_server(self.identity, server)
        keyserver_pb2_grpc.add_HealthServicer_to_server(self.health, server)


class FrontEnd:
    """`run` serves until SIGTERM, SIGINT or the supervisor's end. `serve_signer` keeps the link; `ready` tells whoever started us."""

    def __init__(self, config: KeyServerConfig, *, pair: Pair = ALONE, clock: Callable[[], datetime] = utc_now) -> None:
        self._config = config
        self._pair = pair
        self._clock = clock
        self._stopping = asyncio.Event()
        self._tls: grpc.aio.Server | None = None
        self._link = SignerLink(bytes_in_flight=config.limits.bytes_in_flight)
        self._metrics = FrontEndMetrics()
        self._tracing = open_tracing(config.telemetry, "keyreeve-keyserver")
        self._traces = RequestTraces(self._tracing)
        self._metrics_server = MetricsServer([self._metrics.snapshot, SignerMetrics(self._link)])
        self._trail = AuditTrail(self._link, clock)
        self._edge = EdgeInterceptor(
            lambda: config.trust_domain, allow_table(config), clock, on_not_admitted=self._trail.call_refused
        )

    def stop(self) -> None:
        self._stopping.set()

    async def run(
        self,
        serve_signer: Callable[[SignerLink], Awaitable[None]],
        ready: Callable[[], Awaitable[None]],
        *,
        wait_for_signer: bool,
    ) -> None:
        loop = asyncio.get_running_loop()
        for number in (signal.SIGTERM, signal.SIGINT):
            loop.add_signal_handler(number, self.stop)
        lock = _prepare_directories(self._config, self._pair)
        try:
            catalog = await self._catalog_once_reached()
        except BaseException:
            os.close(lock)
            raise
        threads = CatalogThreads(catalog)
        tasks: list[asyncio.Task[None]] = []
        try:
            servicers, access = self._build(threads)
            await _read_all(access)
            tasks.append(asyncio.create_task(access.follow(self._config.catalog.poll_interval)))
            if catalog.url.get_backend_name() == "postgresql":
                tasks.append(asyncio.create_task(ChangeListener(catalog.url, access.wake).run()))
            tasks.append(asyncio.create_task(FreshnessWatch(access).run()))
            tasks.append(asyncio.create_task(_as_coroutine(serve_signer(self._link))))
            tasks.append(asyncio.create_task(self._trail.run()))
            tasks.append(asyncio.create_task(self._life.reap(self._config.keys.reap_interval)))
            self._servicers = servicers
            if self._config.canary.interval:
                canary = self._config.canary
                tasks.append(asyncio.create_task(self._canaries.run_forever(canary.interval, canary.timeout)))
            self._open_metrics()
            admin = await self._open_admin()
            self._identity.load()
            if not self._pair.is_alone:
                tasks.append(asyncio.create_task(self._identity.follow(self._open_tls)))
            if self._identity.installed is not None:
                await self._open_tls()
            else:
                log("waiting_for_svid", detail="run: keyreeve init", admin_socket=str(self._config.admin_socket))
            if wait_for_signer:
                await self._first_of(self._link.ready.wait())
            if not self._stopping.is_set():
                await ready()
            await self._stopping.wait()
            await self._drain(admin)
            await self._trail.flush(within_s=_FLUSH_S)
        finally:
            for task in tasks:
                task.cancel()
            await asyncio.gather(*tasks, return_exceptions=True)
            self._link.close()
            await asyncio.to_thread(self._metrics_server.close)
            await asyncio.to_thread(self._tracing.close)
            await asyncio.to_thread(threads.close)
            os.close(lock)
        log("front_end_stopped")

    async def _catalog_once_reached(self) -> Catalog:
        """Waits for a database that is away; what an operator must mend ends the start. Raises: KeyreeveError."""
        said = False
        while True:
            try:
                return await asyncio.to_thread(_open_catalog, self._config)
            except Unavailable as error:
                if self._stopping.is_set():
                    raise
                if not said:
                    log_warning("waiting_for_catalog", code=error.code.value, detail=error.detail)
                said = True
            await self._first_of(asyncio.sleep(_CATALOG_RETRY_S))

    def _build(self, threads: CatalogThreads) -> tuple[Servicers, Access]:
        config, clock = self._config, self._clock
        access = Access(threads, max_staleness=config.catalog.max_staleness)
        metrics = self._metrics
        self._link.on_spans = self._traces.add
        admission = Admission(
            access.work_class,
            max_items=config.limits.queue_items,
            max_wait_s=config.limits.queue_time.total_seconds(),
        )
        engine = SigningEngine(
            self._link,
            threads,
            control_timeout=config.limits.control_timeout,
            metrics=metrics,
            traces=self._traces,
            admission=admission,
        )
        access.on_disabled = engine.forget
        trail = engine.trail = self._trail
        engine.on_faulty = access.apply_key
        self._life = KeyLifeService(
            threads=threads, access=access, link=self._link, engine=engine, config=config, clock=clock
        )
        self._identity = TlsIdentity(
            config.state_dir, trust_domain=config.trust_domain, spiffe_id=config.spiffe_id, clock=clock
        )
        metrics.watch(self._link, access, self._identity, admission=admission, clock=clock)
        exempt = frozenset(str(admin) for admin in config.key_admins)
        watch = QuarantineWatch(config.quarantine, access, threads, exempt=exempt, clock=clock)
        watch.trail = trail
        servicers = Servicers(
            signing=SigningServicer(access, engine, config.limits, clock, watch),
            key_admin=KeyAdminServicer(
                threads=threads,
                access=access,
                link=self._link,
                engine=engine,
                life=self._life,
                trust_domain=config.trust_domain,
                control_timeout=config.limits.control_timeout,
                clock=clock,
            ),
            grants=GrantsServicer(
                threads=threads, access=access, trust_domain=config.trust_domain, clock=clock, trail=trail
            ),
            quarantines=QuarantinesServicer(
                threads=threads, access=access, trust_domain=config.trust_domain, clock=clock, trail=trail
            ),
            identity=ServiceIdentityServicer(self._identity, self._open_tls),
            health=HealthServicer(link=self._link, access=access, identity=self._identity, clock=clock, admins=exempt),
        )
        self._canaries = Canaries(
            self._link, engine, lambda new: servicers.key_admin.make_key(new, "canary"), metrics=metrics, clock=clock
        )
        servicers.health.canaries = self._canaries.states
        return servicers, access

    def _open_metrics(self) -> None:
        if address := self._config.telemetry.metrics_listen:
            self._metrics_server.start(address)

    async def _open_admin(self) -> grpc.aio.Server:
        path = self._config.admin_socket
        server = grpc.aio.server(interceptors=[self._edge], options=_OPTIONS)
        self._servicers.add_to(server)
        try:
            server.add_insecure_port(f"unix:{path}")
            path.chmod(0o600)
        except (RuntimeError, OSError) as error:
            raise ConfigInvalid(
                f"{path}: the admin socket cannot be made; check owner and mode of its directory"
            ) from error
        await server.start()
        log("admin_socket_open", path=str(path))
        return server

    async def _open_tls(self) -> None:
        """Opens the mTLS listener. Once it is open, gRPC asks for the current SVID at each new connection."""
        if self._tls is not None:
            return
        # Without other pairs a second server on this port is an error, not a silent partner.
        shares = [("grpc.so_reuseport", int(not self._pair.is_alone))]
        server = grpc.aio.server(interceptors=[self._edge], options=[*_OPTIONS, *shares])
        self._servicers.add_to(server)
        credentials = reloading_credentials(self._identity.configuration, require_client_authentication=True)
        try:
            port = server.add_secure_port(self._config.listen, credentials)
        except RuntimeError as error:
            raise FailedPrecondition(
                f"listen: {self._config.listen} cannot be bound; is another server on that port?"
            ) from error
        self._tls = server  # before the wait: a call of InstallSvid may come here meanwhile
        await server.start()
        log("listening", address=self._config.listen, port=port)

    async def _first_of(self, work: Awaitable[object]) -> None:
        """Waits for `work` or for the stop."""
        tasks = [asyncio.ensure_future(work), asyncio.ensure_future(self._stopping.wait())]
        await asyncio.wait(tasks, return_when=asyncio.FIRST_COMPLETED)
        for task in tasks:
            task.cancel()

    async def _drain(self, admin: grpc.aio.Server) -> None:
        grace = self._config.limits.drain_timeout.total_seconds()
        log("draining", grace_s=grace)
        self._servicers.signing.drain()
        await asyncio.gather(*(server.stop(grace) for server in (self._tls, admin) if server is not None))
        with suppress(OSError):
            self._config.admin_socket.unlink(missing_ok=True)


def _prepare_directories(config: KeyServerConfig, pair: Pair) -> int:
    """Makes the directories, and takes the lock that a second front end of this pair on the same state would wait for."""
    os.umask(0o077)
    make_private_directory(config.state_dir)
    make_private_directory(config.admin_socket.parent)
    _require_closed(config.admin_socket.parent)
    try:
        lock = os.open(pair.path(config.state_dir / "lock"), os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o600)
    except OSError as error:
        raise ConfigInvalid(f"{config.state_dir}: cannot be written: {error.strerror}; check owner and mode") from error
    try:
        fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        os.close(lock)
        raise FailedPrecondition(
            f"{config.state_dir}: another front end runs on this state_dir; stop it first"
        ) from None
    return lock


def _require_closed(directory: Path) -> None:
    """Whoever reaches the admin socket is an operator, so its directory is the owner's alone."""
    status = directory.stat()
    if status.st_uid not in (os.geteuid(), 0):
        raise ConfigInvalid(
            f"{directory}: directory of admin_socket belongs to another user, who could replace the socket"
        )
    if status.st_mode & 0o077:
        raise ConfigInvalid(
            f"{directory}: directory of admin_socket is open to other users; run: chmod 700 {directory}"
        )


def _open_catalog(config: KeyServerConfig) -> Catalog:
    url = config.catalog_url
    if config.catalog.password_file is not None:
        try:
            url = url.set(password=read_secret(config.catalog.password_file).decode())
        except UnicodeDecodeError:  # its text would show a byte of the password
            raise ConfigInvalid(f"{config.catalog.password_file}: password is not UTF-8") from None
    return Catalog.open(url, busy_timeout=config.catalog.busy_timeout)


async def _as_coroutine(work: Awaitable[None]) -> None:
    try:
        await work
    except OSError as error:
        log_warning("signer_link_failed", detail=error.strerror or type(error).__name__)
