"""What the signer, the launcher and a worker say to each other about starting workers. Pure; strict both ways.

Signer and launcher: datagrams of one JSON object each over a Unix SEQPACKET socketpair. The launcher takes one `prepare`, at its start, and from
then on starts nothing but the workers named there: a signer that is owned later cannot have it run anything else. Launcher and worker: one JSON
object through a pipe, with the settings and the secrets, read to its end once.
"""

from __future__ import annotations

import base64
import re
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, cast

from keyreeve_common.errors import KeyreeveError, MalformedFrame, error_from_code
from keyreeve_common.strict_json import canonical_json

from keyreeve_keyserver.domain.secret import Secret
from keyreeve_keyserver.frames import JsonObject, parse_json_object
from keyreeve_keyserver.hardening.lockdown import Reach

MAX_MESSAGE_BYTES = 131_072
MAX_START_BYTES = 60_000  # less than a pipe holds, so that writing it never waits
_PROGRAM = re.compile(r"keyreeve_keyserver\.backends\.[a-z0-9_]+_worker", re.ASCII)


@dataclass(frozen=True, slots=True)
class WorkerSpec:
    """How to start the workers of one backend: `program` is a module of this package that ends in `_worker`.

    `settings` hold no secret. `secret_files`: name to path; the name is the key of the configuration, and what the worker asks for. `reach` is
    what the kernel leaves it.
    """

    backend: str
    program: str
    settings: JsonObject
    secret_files: Mapping[str, Path] = field(default_factory=dict)
    reach: Reach = field(default_factory=Reach)

    def __post_init__(self) -> None:
        if not _PROGRAM.fullmatch(self.program):
            raise MalformedFrame("program is not a worker of this package")

    def to_json(self) -> JsonObject:
        files = {name: str(path) for name, path in self.secret_files.items()}
        return {
            "backend": self.backend,
            "program": self.program,
            "settings": self.settings,
            "secret_files": files,
            "reach": _reach_json(self.reach),
        }


@dataclass(frozen=True, slots=True)
class Prepare:
    """Answered by Ready, or by Refused where a secret file is open to other users."""

    workers: tuple[WorkerSpec, ...]


@dataclass(frozen=True, slots=True)
class Spawn:
    """Answered by Spawned with one descriptor, or by Refused."""

    number: int
    backend: str


@dataclass(frozen=True, slots=True)
class Kill:
    """No answer. Counts for workers that this launcher started only."""

    pid: int


@dataclass(frozen=True, slots=True)
class Ready:
    pass


@dataclass(frozen=True, slots=True)
class Spawned:
    number: int
    pid: int


@dataclass(frozen=True, slots=True)
class Refused:
    """`number` is that of the Spawn, or 0 for Prepare."""

    number: int
    error: KeyreeveError


Order = Prepare | Spawn | Kill
Report = Ready | Spawned | Refused


@dataclass(frozen=True, slots=True)
class WorkerStart:
    """What a worker is told at its start."""

    settings: JsonObject
    secrets: Mapping[str, Secret] = field(default_factory=dict)
    reach: Reach = field(default_factory=Reach)

    def secret(self, name: str) -> Secret:
        """Raises: MalformedFrame."""
        if name not in self.secrets:
            raise MalformedFrame(f"the launcher gave no {name}")
        return self.secrets[name]

    def to_bytes(self) -> bytes:
        secrets = {name: base64.b64encode(secret.reveal()).decode() for name, secret in self.secrets.items()}
        return canonical_json({"settings": self.settings, "secrets": secrets, "reach": _reach_json(self.reach)})


def parse_worker_start(data: bytes) -> WorkerStart:
    """Raises: MalformedFrame."""
    fields = _members(parse_json_object(data), settings=dict, secrets=dict, reach=dict)
    secrets = {name: Secret(base64.b64decode(text)) for name, text in fields["secrets"].items()}
    return WorkerStart(fields["settings"], secrets, _reach(fields["reach"]))


def order_bytes(order: Order) -> bytes:
    if isinstance(order, Prepare):
        return canonical_json({"op": "prepare", "workers": [worker.to_json() for worker in order.workers]})
    if isinstance(order, Spawn):
        return canonical_json({"op": "spawn", "number": order.number, "backend": order.backend})
    return canonical_json({"op": "kill", "pid": order.pid})


def parse_order(data: bytes) -> Order:
    """Raises: MalformedFrame."""
    value = parse_json_object(data)
    op = value.pop("op", None)
    if op == "prepare":
        return Prepare(tuple(_spec(worker) for worker in _members(value, workers=list)["workers"]))
    if op == "spawn":
        return Spawn(**_members(value, number=int, backend=str))
    if op == "kill":
        return Kill(**_members(value, pid=int))
    raise MalformedFrame("op is not known to the launcher")


def report_bytes(report: Report) -> bytes:
    if isinstance(report, Ready):
        return canonical_json({"report": "ready"})
    if isinstance(report, Spawned):
        return canonical_json({"report": "spawned", "number": report.number, "pid": report.pid})
    error = report.error
    return canonical_json(
        {"report": "refused", "number": report.number, "code": error.code.value, "detail": error.detail}
    )


def parse_report(data: bytes) -> Report:
    """Raises: MalformedFrame."""
    value = parse_json_object(data)
    kind = value.pop("report", None)
    if kind == "ready":
        _members(value)
        return Ready()
    if kind == "spawned":
        return Spawned(**_members(value, number=int, pid=int))
    if kind == "refused":
        fields = _members(value, number=int, code=str, detail=str)
        return Refused(fields["number"], error_from_code(fields["code"], fields["detail"]))
    raise MalformedFrame("report of the launcher is not known")


def _spec(value: object) -> WorkerSpec:
    if not isinstance(value, dict):
        raise MalformedFrame("worker is not an object")
    fields = _members(cast("JsonObject", value), backend=str, program=str, settings=dict, secret_files=dict, reach=dict)
    fields["reach"] = _reach(fields["reach"])
    fields["secret_files"] = {name: Path(str(path)) for name, path in fields["secret_files"].items()}
    return WorkerSpec(**fields)


def _reach_json(reach: Reach) -> JsonObject:
    reads = None if reach.reads is None else [str(path) for path in reach.reads]
    return {"network": reach.network, "reads": reads, "writes": [str(path) for path in reach.writes]}


def _reach(value: JsonObject) -> Reach:
    reads, writes = value.get("reads"), value.get("writes")
    if value.keys() != {"network", "reads", "writes"} or type(value["network"]) is not bool:
        raise MalformedFrame("reach is not that of a worker")
    return Reach(value["network"], None if reads is None else _paths(reads), _paths(writes))


def _paths(value: object) -> tuple[Path, ...]:
    if not isinstance(value, list) or not all(isinstance(each, str) for each in value):
        raise MalformedFrame("paths are not a list of texts")
    return tuple(Path(each) for each in value)


def _members(value: JsonObject, **kinds: type) -> dict[str, Any]:
    if value.keys() != kinds.keys() or not all(type(value[name]) is kind for name, kind in kinds.items()):
        raise MalformedFrame(f"message does not have the members {', '.join(sorted(kinds))}")
    return dict(value)
