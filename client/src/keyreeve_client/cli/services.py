"""`keyreeve run`: starts a service in the place of this process. The services are programs of their own; a host has those that it needs."""

from __future__ import annotations

import os
import shutil
import sys
from enum import StrEnum
from pathlib import Path
from typing import Annotated, NoReturn

import typer
from keyreeve_common.errors import FailedPrecondition

CONFIG_DIRECTORY = Path("/etc/keyreeve")


class Service(StrEnum):
    CA = "ca"
    KEYSERVER = "keyserver"
    AGENT = "agent"

    @property
    def program(self) -> str:
        return f"keyreeve-{self.value}"

    @property
    def distribution(self) -> str:
        """What to install to have it."""
        return "keyreeve-client" if self is Service.AGENT else f"keyreeve-{self.value}"

    @property
    def default_config(self) -> Path:
        return CONFIG_DIRECTORY / f"{self.value}.toml"


def run(
    service: Annotated[Service, typer.Argument(help="Which service.")],
    config: Annotated[Path | None, typer.Option("--config", help="Its file; else /etc/keyreeve/SERVICE.toml.")] = None,
    check_config: Annotated[
        bool, typer.Option("--check-config", help="Only read the file and say what is wrong.")
    ] = False,
) -> None:
    """Starts a service in the foreground."""
    command = [str(program_of(service)), "--config", str(config or service.default_config)]
    _exec([*command, "--check-config"] if check_config else command)


def program_of(service: Service) -> Path:
    """The service's program: beside this interpreter, else on the PATH. Raises: FailedPrecondition."""
    beside = Path(sys.executable).parent / service.program
    found = str(beside) if os.access(beside, os.X_OK) else shutil.which(service.program)
    if found is None:
        raise FailedPrecondition(
            f"{service.program} is not installed here: install the distribution {service.distribution}"
        )
    return Path(found)


def _exec(command: list[str]) -> NoReturn:
    sys.stdout.flush()
    os.execv(command[0], command)  # noqa: S606 - no shell on purpose
