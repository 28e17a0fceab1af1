"""Configuration files, and who may read and write what they name."""

from __future__ import annotations

import importlib.util
import stat
import sys
from collections.abc import Iterator
from pathlib import Path

from keyreeve_common.errors import KeyreeveError

from keyreeve_client.cli.doctor.findings import Finding, failed, ok, run, skipped, warning
from keyreeve_client.cli.doctor.installation import SERVICES, ConfigFile, Installation
from keyreeve_client.cli.services import Service, program_of


def check_configs(installation: Installation) -> Iterator[Finding]:
    """Each service reads its own file (`--check-config`)."""
    if not installation.files:
        yield failed(
            "configuration",
            f"{installation.config_dir} holds no configuration of any service",
            "name the directory with --config-dir, or copy the samples of deploy/config there",
        )
    for service in SERVICES:
        config = installation.of(service)
        name = f"configuration of {service}"
        if config is None:
            yield skipped(name, "no file: this host does not run it")
            continue
        command = _command(service)
        if command is None:
            yield failed(
                name,
                f"{config.path} is there, but keyreeve-{service} is not installed",
                "install it, or remove the file",
            )
            continue
        answer = run([*command, "--config", str(config.path), "--check-config"])
        if answer.code == 0:
            yield ok(name, str(config.path))
        else:
            yield failed(name, answer.last_line, f"correct {config.path}")


def _command(service: str) -> list[str] | None:
    if service == "signer":
        # The signer has no program of its own: the key server's supervisor starts it as a module.
        there = importlib.util.find_spec("keyreeve_keyserver")
        return [sys.executable, "-m", "keyreeve_keyserver.signer"] if there else None
    try:
        return [str(program_of(Service(service)))]
    except KeyreeveError:
        return None


def check_permissions(installation: Installation) -> Iterator[Finding]:
    """Secrets are for their owner, configuration and state are for nobody to write but their owner."""
    for config in installation.files.values():
        yield _not_writable(f"permissions of {config.path.name}", config.path)
        for key, path in config.secrets():
            yield from _secret(config, key, path)
        state_dir = config.file("state_dir")
        if state_dir is not None and state_dir.exists():
            yield _not_writable(f"permissions of {config.service}'s state_dir", state_dir)


def _not_writable(check: str, path: Path) -> Finding:
    mode = path.stat().st_mode
    if mode & stat.S_IWOTH:
        return failed(check, f"{path} is writable by every user", f"chmod o-w {path}")
    return ok(check, f"{path} {stat.filemode(mode)}")


def _secret(config: ConfigFile, key: str, path: Path) -> Iterator[Finding]:
    check = f"{config.service}: {key}"
    try:
        mode = path.stat().st_mode
    except FileNotFoundError:
        if key.endswith("join_token_file"):
            yield ok(check, f"{path} is not there: fine for a node that is attested")
        else:
            yield failed(check, f"{path} is not there", "create it with mode 0600, or correct the configuration")
        return
    except PermissionError:
        yield warning(check, f"{path} cannot be looked at by this user", "run the doctor as root")
        return
    if not stat.S_ISREG(mode):
        yield failed(check, f"{path} is not a regular file", "name a file that holds nothing but the secret")
    elif mode & (stat.S_IRWXO | stat.S_IWGRP):
        yield failed(check, f"{path} is open to other users ({stat.filemode(mode)})", f"chmod 600 {path}")
    else:
        yield ok(check, f"{path} {stat.filemode(mode)}")
