"""`keyreeve init`: the ceremony as a command. It comes into the `keyreeve` program by entry point group `keyreeve.commands`."""

from __future__ import annotations

import os
import secrets
from datetime import UTC, datetime
from pathlib import Path
from typing import Annotated

import typer
from keyreeve_client.cli.output import Output, show_json, show_text, wants_json
from keyreeve_common.telemetry import configure_logging

from keyreeve_ca.ceremony import Ceremony, Step
from keyreeve_ca.config import load_ca_config
from keyreeve_ca.service import Ca
from keyreeve_ca.signers.key_cluster import GrpcKeyCluster, local_replica
from keyreeve_ca.signers.local import ThrowAwayKeys
from keyreeve_ca.store.sql_store import SqlStore
from keyreeve_ca.upstream import open_upstream

DEFAULT_CONFIG = Path("/etc/keyreeve/ca.toml")


def init(
    config: Annotated[Path, typer.Option("--config", help="ca.toml")] = DEFAULT_CONFIG,
    key_server_admin_socket: Annotated[
        Path | None,
        typer.Option(
            "--key-server-admin-socket", help="The key server's local admin socket; else key_cluster.admin_socket."
        ),
    ] = None,
    output: Output = None,
) -> None:
    """Brings a trust domain to life: authorities, grants, the services' own SVIDs. Repairs expired service SVIDs when run again."""
    os.umask(0o077)
    configure_logging("keyreeve-init")
    settings = load_ca_config(config)
    settings.state_dir.mkdir(mode=0o700, parents=True, exist_ok=True)
    replica = local_replica(key_server_admin_socket or settings.key_cluster.admin_socket)
    cluster = GrpcKeyCluster([replica])
    store = SqlStore.open(settings.database_url(), busy_timeout=settings.database.busy_timeout)
    upstream = open_upstream(settings.upstream)
    ca = Ca(settings.policy(), store, cluster, _utc_now, _entropy, ThrowAwayKeys(), upstream)
    done: list[Step] = []
    as_json = wants_json(output)
    try:
        for step in Ceremony(ca, store, settings, replica).run():
            done.append(step)
            if not as_json:
                show_text(f"{step.state:8} {step.name}: {step.detail}")
    finally:
        cluster.close()
        store.close()
        if as_json:
            show_json([{"step": step.name, "state": step.state.value, "detail": step.detail} for step in done])


def _utc_now() -> datetime:
    return datetime.now(UTC)


def _entropy(count: int) -> bytes:
    return secrets.token_bytes(count)
