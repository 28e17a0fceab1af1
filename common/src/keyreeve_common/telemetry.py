"""Logs: one JSON object a line, fields instead of sentences, names from one place. No key material, PIN, token or message may be a field.

Spec: ../shared/style.md "Telemetry and audit".
"""

from __future__ import annotations

import json
import logging
import os
import socket
import sys
from collections.abc import Callable
from datetime import UTC, datetime
from typing import TextIO

_LOGGER = logging.getLogger("keyreeve")
Field = str | int | float | bool | None


class _JsonLines(logging.Formatter):
    def __init__(self, service: str) -> None:
        super().__init__()
        self._service = service

    def format(self, record: logging.LogRecord) -> str:
        fields: dict[str, object] = {
            "time": datetime.fromtimestamp(record.created, tz=UTC).isoformat(timespec="milliseconds"),
            "level": record.levelname.lower(),
            "service": self._service,
            "event": record.getMessage(),
            **getattr(record, "keyreeve_fields", {}),
        }
        if record.exc_info:
            fields["traceback"] = self.formatException(record.exc_info)
        return json.dumps(fields, ensure_ascii=True, default=str)


def configure_logging(service: str, *, level: int = logging.INFO, stream: TextIO | None = None) -> None:
    """Sends this process's logs to `stream` (standard error) as JSON lines."""
    handler = logging.StreamHandler(stream or sys.stderr)
    handler.setFormatter(_JsonLines(service))
    root = logging.getLogger()
    root.handlers[:] = [handler]
    root.setLevel(logging.WARNING)
    _LOGGER.setLevel(level)
    os.environ.setdefault(
        "GRPC_VERBOSITY", "NONE"
    )  # gRPC's core writes lines of its own form, which no log parser takes
    sys.unraisablehook = _log_unraisable


def _log_unraisable(unraisable: sys.UnraisableHookArgs) -> None:
    """What Python could not raise (in a destructor, say) becomes a line like any other, without its text, which may hold anything."""
    where = getattr(unraisable.object, "__qualname__", type(unraisable.object).__name__)
    log_warning("exception_ignored", kind=unraisable.exc_type.__name__, where=str(where)[:128])


def log(event: str, **fields: Field) -> None:
    """An ordinary event, for example `log("grant_created", key_id=..., holder=...)`."""
    _LOGGER.info(event, extra={"keyreeve_fields": fields})


def log_warning(event: str, **fields: Field) -> None:
    """Something refused or degraded that the service survives."""
    _LOGGER.warning(event, extra={"keyreeve_fields": fields})


def log_error(event: str, **fields: Field) -> None:
    """Something an operator must look at."""
    _LOGGER.error(event, extra={"keyreeve_fields": fields})


def log_exception(event: str, **fields: Field) -> None:
    """A bug of ours, with its traceback; call it in an `except` block."""
    _LOGGER.exception(event, extra={"keyreeve_fields": fields})


def notify_ready(status: str = "") -> None:
    """Tells systemd, or whoever started us with NOTIFY_SOCKET, that the service serves now. Spec: sd_notify(3)."""
    ready_notice(status)()


def ready_notice(status: str = "") -> Callable[[], None]:
    """`notify_ready` in two steps, for a process that can make no socket later: it is connected now, and told and closed by the call."""
    address = os.environ.get("NOTIFY_SOCKET")
    if not address:
        return lambda: None
    if address.startswith("@"):
        address = "\0" + address[1:]
    notifier = socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM | socket.SOCK_CLOEXEC)
    notifier.connect(address)

    def tell() -> None:
        with notifier:
            notifier.sendall(f"READY=1\nSTATUS={status}\nMAINPID={os.getpid()}".encode())

    return tell
