"""The command: runs every check that this host calls for, one after the other."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import asdict
from datetime import UTC, datetime
from functools import partial
from pathlib import Path
from typing import Annotated

import typer

from keyreeve_client.cli.connections import (
    DEFAULT_CA_SOCKET,
    DEFAULT_KEY_SERVER_SOCKET,
    CaSocket,
    KeyServerSocket,
)
from keyreeve_client.cli.doctor import files, health, node
from keyreeve_client.cli.doctor.findings import Finding, State, failed
from keyreeve_client.cli.doctor.installation import Installation, read_config_files
from keyreeve_client.cli.output import Output, show_json, show_text, wants_json
from keyreeve_client.cli.services import CONFIG_DIRECTORY

_MARKS = {State.OK: "ok     ", State.WARNING: "warning", State.FAILED: "FAILED ", State.SKIPPED: "-      "}


def doctor(
    *,
    config_dir: Annotated[
        Path, typer.Option("--config-dir", help="Where ca.toml, keyserver.toml … are.")
    ] = CONFIG_DIRECTORY,
    provider: Annotated[
        Path | None,
        typer.Option("--provider", help="Directory of keyreeve.so; else OpenSSL's own.", show_default=False),
    ] = None,
    proxy_user: Annotated[str, typer.Option("--proxy-user", help="Whom the proxy's workers run as.")] = "www-data",
    ca_socket: CaSocket = DEFAULT_CA_SOCKET,
    key_server_socket: KeyServerSocket = DEFAULT_KEY_SERVER_SOCKET,
    output: Output = None,
) -> None:
    """Checks this host's installation: says what is wrong and what to do. Changes nothing; exit code 1 if anything failed."""
    installation = Installation(
        config_dir=config_dir,
        files=read_config_files(config_dir),
        ca_socket=ca_socket,
        key_server_socket=key_server_socket,
        provider=provider,
        proxy_user=proxy_user,
    )
    findings: list[Finding] = []
    for finding in _all(installation, datetime.now(UTC)):
        findings.append(finding)
        if not wants_json(output):
            _show(finding)
    counts = {state: sum(finding.state is state for finding in findings) for state in State}
    if wants_json(output):
        show_json(
            {"findings": [asdict(finding) for finding in findings], **{str(state): counts[state] for state in State}}
        )
    else:
        show_text(", ".join(f"{count} {state}" for state, count in counts.items() if count))
    if counts[State.FAILED]:
        raise typer.Exit(1)


def _all(installation: Installation, now: datetime) -> Iterator[Finding]:
    checks: list[Callable[[], Iterator[Finding]]] = [
        partial(files.check_configs, installation),
        partial(files.check_permissions, installation),
        partial(node.check_tokens, installation),
        partial(health.check_key_server, installation, now),
        partial(health.check_ca, installation, now),
        partial(health.check_agent, installation, now),
        health.check_clock,
        partial(node.check_provider, installation),
        partial(node.check_reach, installation),
    ]
    for check in checks:
        try:
            yield from check()
        except (OSError, AttributeError, KeyError, TypeError, ValueError) as error:
            # A doctor that stops at the first surprise is of no use: the others still have something to say.
            name = getattr(check, "func", check).__name__
            yield failed(
                name,
                f"could not be carried out: {type(error).__name__}: {error}",
                "run the doctor as root; else report it",
            )


def _show(finding: Finding) -> None:
    show_text(f"{_MARKS[finding.state]} {finding.check}: {finding.detail}")
    if finding.remedy:
        show_text(f"        -> {finding.remedy}")
