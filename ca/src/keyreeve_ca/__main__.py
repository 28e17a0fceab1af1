"""`keyreeve-ca --config ca.toml`: builds the objects and serves until SIGTERM or SIGINT. The only module that knows them all."""

from __future__ import annotations

import argparse
import asyncio
import os
import secrets
import signal
import sys
from concurrent.futures import ThreadPoolExecutor
from datetime import UTC, datetime
from pathlib import Path

from keyreeve_common.errors import ConfigInvalid, FailedPrecondition, KeyreeveError, SvidExpired, SvidInvalid
from keyreeve_common.prometheus_export import MetricsServer
from keyreeve_common.telemetry import configure_logging, log, log_error, notify_ready

from keyreeve_ca.config import CaConfig, load_ca_config
from keyreeve_ca.domain.authority import active_authority
from keyreeve_ca.grpc_api.feed import ChangeFeed
from keyreeve_ca.own_svids import OwnSvid
from keyreeve_ca.renewal import Renewal
from keyreeve_ca.server import Listeners
from keyreeve_ca.service import Ca
from keyreeve_ca.signers.key_cluster import GrpcKeyCluster, remote_replica
from keyreeve_ca.signers.local import ThrowAwayKeys
from keyreeve_ca.store.sql_store import SqlStore
from keyreeve_ca.upstream import open_upstream

EX_CONFIG = 78
WORKERS = 32  # a few may wait for a key cluster that is away
SERVICE = "keyreeve-ca"


def main() -> int:
    parser = argparse.ArgumentParser(prog=SERVICE, description="The Keyreeve CA.")
    parser.add_argument("--config", type=Path, required=True, help="ca.toml")
    parser.add_argument("--check-config", action="store_true", help="only read the configuration and say what is wrong")
    arguments = parser.parse_args()
    configure_logging(SERVICE)
    os.umask(0o077)
    try:
        config = load_ca_config(arguments.config)
        if arguments.check_config:
            config.database_url()
            log("config_is_good", path=str(arguments.config))
            return 0
        asyncio.run(serve(config))
    except KeyreeveError as error:
        log_error("ca_failed", code=error.code.value, detail=error.detail)
        needs_operator = isinstance(error, (ConfigInvalid, FailedPrecondition, SvidInvalid, SvidExpired))
        return EX_CONFIG if needs_operator else 1
    return 0


def _entropy(count: int) -> bytes:
    return secrets.token_bytes(count)


def utc_now() -> datetime:
    return datetime.now(UTC)


async def serve(config: CaConfig) -> None:
    """Raises: ConfigInvalid, FailedPrecondition when `keyreeve init` has not run, storage errors."""
    stopping = asyncio.Event()
    loop = asyncio.get_running_loop()
    loop.set_default_executor(ThreadPoolExecutor(WORKERS, thread_name_prefix="ca"))
    for number in (signal.SIGTERM, signal.SIGINT):
        loop.add_signal_handler(number, stopping.set)
    store = SqlStore.open(config.database_url(), busy_timeout=config.database.busy_timeout)
    addresses = config.key_cluster.addresses
    cluster = GrpcKeyCluster([remote_replica(each, config.svid_files, config.key_server_id) for each in addresses])
    ca = Ca(config.policy(), store, cluster, utc_now, _entropy, ThrowAwayKeys(), open_upstream(config.upstream))
    own = OwnSvid(ca, config.svid_files)
    try:
        await asyncio.to_thread(_check_initialised, store, ca, own)
        feed = ChangeFeed(store)
        listeners = Listeners(ca, config, feed)
        metrics = MetricsServer([listeners.metrics.snapshot])
        await feed.start()
        await listeners.start()
        listeners.metrics.watch(
            listeners.agents.connected, lambda: active_authority(store.list_authorities()).not_after
        )
        if address := config.telemetry.metrics_listen:
            metrics.start(address)

        def changed() -> None:
            loop.call_soon_threadsafe(feed.nudge)

        def recovered() -> None:
            loop.call_soon_threadsafe(feed.wake_everyone)

        renewal = Renewal(ca, own, config.key_server_id, changed, recovered)
        tasks = [
            asyncio.create_task(feed.follow(config.background.poll_interval), name="change-feed"),
            asyncio.create_task(renewal.run(config.background.interval), name="renewal"),
        ]
        notify_ready("serving")
        log("ready", trust_domain=config.trust_domain.name)
        await stopping.wait()
        log("stopping")
        await listeners.stop()
        await asyncio.to_thread(metrics.close)
        for task in tasks:
            task.cancel()
        await asyncio.gather(*tasks, return_exceptions=True)
    finally:
        cluster.close()
        store.close()
    log("stopped")


def _check_initialised(store: SqlStore, ca: Ca, own: OwnSvid) -> None:
    if not store.has_schema():
        raise FailedPrecondition("database has no schema yet; run: keyreeve init")
    store.migrate()
    store.claim_trust_domain(ca.policy.trust_domain)
    active_authority(store.list_authorities())
    try:
        own.read()
    except KeyreeveError as error:
        raise FailedPrecondition(f"the CA's own SVID cannot be used ({error.detail}); run: keyreeve init") from error


if __name__ == "__main__":
    sys.exit(main())
