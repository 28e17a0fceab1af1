"""Configuration of the audit log: section `[audit]` of signer.toml."""

from __future__ import annotations

from dataclasses import dataclass
from datetime import timedelta
from enum import StrEnum
from pathlib import Path

from keyreeve_common.errors import ConfigInvalid, InvalidRequest
from keyreeve_common.transparency.note import check_name


class FsyncPolicy(StrEnum):
    """When a record is on disk: before its signature leaves; within `sync_interval`; with the next checkpoint.

    Only a power loss or a kernel's crash tells them apart: what a killed process wrote is kept by all three.
    """

    ALWAYS = "always"
    INTERVAL = "interval"
    OFF = "off"


@dataclass(frozen=True, slots=True)
class AuditConfig:
    """The audit log. Without this section nothing is recorded. `origin` names the log in its checkpoints, and stays for its life."""

    directory: Path
    origin: str = ""
    fsync: FsyncPolicy = FsyncPolicy.ALWAYS
    sync_interval: timedelta = timedelta(milliseconds=200)
    checkpoint_interval: timedelta = timedelta(seconds=5)
    checkpoint_records: int = 8192

    def __post_init__(self) -> None:
        if self.origin:
            try:
                check_name(self.origin)
            except InvalidRequest as error:
                raise ConfigInvalid(f"origin: {error.detail}") from None
        _require(self.sync_interval >= timedelta(milliseconds=1), "sync_interval is 0")
        _require(
            timedelta(milliseconds=10) <= self.checkpoint_interval <= timedelta(days=1),
            "checkpoint_interval is not 10ms to 1d",
        )
        _require(1 <= self.checkpoint_records <= 1_000_000, "checkpoint_records is not 1 to 1000000")


def _require(condition: bool, rule: str) -> None:
    if not condition:
        raise ConfigInvalid(rule)
