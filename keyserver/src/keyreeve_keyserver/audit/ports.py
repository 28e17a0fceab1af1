"""What the signer needs of an audit log, and the log of a signer that has none configured."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Protocol


@dataclass(frozen=True, slots=True)
class AuditStatus:
    """`state` is `off`, `ok` or `unavailable`; `detail` says why. `recorded` counts all records, `checkpointed` those a checkpoint covers."""

    state: str
    detail: str = ""
    recorded: int = 0
    checkpointed: int = 0


class AuditLog(Protocol):
    @property
    def enabled(self) -> bool:
        """Whether anything is recorded at all."""

    async def start(self) -> None:
        """Raises: FailedPrecondition, ConfigInvalid: an operator must act."""

    async def append(self, entries: Sequence[bytes]) -> None:
        """Returns when the records of these encodings are in the log, all of them, as safe as its fsync policy says. None is when this raises.

        Raises: AuditUnavailable.
        """

    def status(self) -> AuditStatus:
        """For `health`; waits for nothing."""

    async def close(self) -> None:
        """Publishes what there is. Nothing is appended after it."""


class NullAuditLog:
    """Records nothing: a signer whose configuration has no `[audit]`."""

    enabled = False

    async def start(self) -> None:
        return

    async def append(self, entries: Sequence[bytes]) -> None:
        return

    def status(self) -> AuditStatus:
        return AuditStatus("off", "the configuration has no [audit]: nothing is recorded")

    async def close(self) -> None:
        return
