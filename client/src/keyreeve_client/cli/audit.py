"""`keyreeve audit`: reads the signer's audit log from its directory, or from a copy. It needs no service, and changes nothing in the log."""

from __future__ import annotations

import base64
import json
import sys
from collections.abc import Iterator
from datetime import UTC, datetime
from pathlib import Path
from time import time
from typing import Annotated, TypeVar

import typer
from keyreeve_common.errors import FailedPrecondition, InvalidRequest
from keyreeve_common.transparency.checkpoint import verify_checkpoint
from keyreeve_common.transparency.merkle import inclusion_proof, leaf_hash, root_from_inclusion
from keyreeve_common.transparency.note import VerifierKey, parse_vkey
from keyreeve_common.transparency.records import REQUEST_ID_BYTES, Mark, Source

from keyreeve_client.audit.cosigning import cosign_log, read_witness_key
from keyreeve_client.audit.log_directory import LogDirectory, read_vkey
from keyreeve_client.audit.search import FoundRecord, Query, Unreadable, search_log
from keyreeve_client.audit.verification import Report, verify_log
from keyreeve_client.cli.arguments import instant
from keyreeve_client.cli.output import Json, Output, show_json, show_row, show_text, wants_json

app = typer.Typer(no_args_is_help=True, help="The signer's tamper-evident audit log.")
Directory = Annotated[Path, typer.Argument(help="The log's directory, or a copy.", exists=True, file_okay=False)]
VkeyFile = Annotated[
    Path | None,
    typer.Option(
        "--vkey", help="The log's verifier key, kept elsewhere; else the one in the directory.", show_default=False
    ),
]
T = TypeVar("T")
_MARKS = {"digest": Mark.DIGEST, "authority": Mark.AUTHORITY}


@app.command("verify")
def verify(
    directory: Directory,
    *,
    vkey: VkeyFile = None,
    checkpoint: Annotated[
        list[Path] | None,
        typer.Option("--checkpoint", help="A checkpoint that was kept elsewhere; may be given again."),
    ] = None,
    witness: Annotated[
        list[str] | None, typer.Option("--witness", help="Verifier key of a witness whose cosignature is required.")
    ] = None,
    pruned_before: Annotated[
        int, typer.Option("--pruned-before", help="Entry bundles of records below this index may be missing.", min=0)
    ] = 0,
    output: Output = None,
) -> None:
    """Recomputes the log from its records up and finds whatever was changed, dropped, reordered or cut off. Exit code 1 if anything was."""
    log = LogDirectory(directory)
    report = verify_log(
        log,
        _vkey_of(log, vkey),
        kept=[(str(path), path.read_bytes()) for path in checkpoint or ()],
        witnesses=[_vkey(text) for text in witness or ()],
        pruned_before=pruned_before,
    )
    if vkey is None:
        report.notes.append("the verifier key is the directory's own: give --vkey with one that was kept elsewhere")
    _show_report(report, output)
    if report.findings:
        raise typer.Exit(1)


@app.command("search")
def search(
    directory: Directory,
    *,
    key_id: Annotated[str | None, typer.Option("--key-id")] = None,
    caller: Annotated[str | None, typer.Option("--caller", help="SPIFFE ID, 'local', or a beginning and '*'.")] = None,
    purpose: Annotated[str | None, typer.Option("--purpose")] = None,
    event: Annotated[str | None, typer.Option("--event", help="signature, refusal, grant_revoked …")] = None,
    result: Annotated[str | None, typer.Option("--result", help="ok, or the code of an error.")] = None,
    request_id: Annotated[str | None, typer.Option("--request-id", help="32 hexadecimal digits.")] = None,
    source: Annotated[str | None, typer.Option("--source", help="signer or front_end.")] = None,
    mark: Annotated[str | None, typer.Option("--mark", help="digest or authority.")] = None,
    since: Annotated[
        str | None, typer.Option("--since", help="From this time on, such as 2030-01-31T12:00:00Z.")
    ] = None,
    until: Annotated[str | None, typer.Option("--until", help="Before this time.")] = None,
    output: Output = None,
) -> None:
    """Shows the records that meet every criterion given, oldest first. It believes the files: `verify` proves them."""
    query = Query(
        key_id=key_id,
        caller=caller,
        purpose=purpose,
        event=event,
        result=result,
        request_id=_request_id(request_id) if request_id is not None else None,
        source=_choice({known.label: known for known in Source}, source, "--source"),
        mark=_choice(_MARKS, mark, "--mark"),
        since=instant(since) if since is not None else None,
        until=instant(until) if until is not None else None,
    )
    unreadable: list[Unreadable] = []
    found = _readable(search_log(LogDirectory(directory), query), unreadable)
    if wants_json(output):
        _show_json_array(found)
    else:
        for record in found:
            show_text(_line(record))
    for gap in unreadable:
        print(f"warning: {gap.detail}", file=sys.stderr)  # noqa: T201 - a command's answer
    if unreadable:
        raise typer.Exit(1)


@app.command("prove")
def prove(
    directory: Directory,
    index: Annotated[int, typer.Argument(help="Index of the record.", min=0)],
    vkey: VkeyFile = None,
) -> None:
    """Prints a proof that one record is in the log: record, path and checkpoint in one text (C2SP tlog-proof)."""
    log = LogDirectory(directory)
    head, note = verify_checkpoint(log.read("checkpoint"), _vkey_of(log, vkey))
    entry = log.entry(index, head.size) if index < head.size else b""
    proof = inclusion_proof(log.subtree(head.size), index, head.size)
    if root_from_inclusion(leaf_hash(entry), index, head.size, proof) != head.root:
        raise FailedPrecondition(f"record {index} is not proved: keyreeve audit verify says what was changed")
    lines = ["c2sp.org/tlog-proof@v1", f"extra {_base64(entry)}", f"index {index}", *map(_base64, proof)]
    sys.stdout.write("\n".join(lines) + "\n\n" + note.to_bytes().decode())


@app.command("cosign")
def cosign(
    directory: Directory,
    *,
    key: Annotated[Path, typer.Option("--key", help="The witness's Ed25519 key in PEM, readable by its owner only.")],
    name: Annotated[str, typer.Option("--name", help="The witness's name, such as example.org/witness-1.")],
    state: Annotated[Path, typer.Option("--state", help="Where the witness remembers what it cosigned last.")],
    vkey: VkeyFile = None,
) -> None:
    """As a witness: cosigns the log's checkpoint if the log only grew since the last time. Prints the cosigned checkpoint."""
    log = LogDirectory(directory)
    witness = read_witness_key(key, name)
    note = cosign_log(log, _vkey_of(log, vkey), witness, state, timestamp=int(time()))
    sys.stdout.write(note.to_bytes().decode())


@app.command("witness-key")
def witness_key(
    key: Annotated[Path, typer.Option("--key", help="The witness's Ed25519 key in PEM.")],
    name: Annotated[str, typer.Option("--name", help="The witness's name.")],
) -> None:
    """Prints the verifier key of a witness, for `verify --witness`."""
    show_text(str(read_witness_key(key, name).vkey))


def _vkey_of(log: LogDirectory, path: Path | None) -> VerifierKey:
    return read_vkey(path) if path is not None else log.vkey()


def _show_report(report: Report, output: Output) -> None:
    cosigned: list[Json] = [
        {"witness": name, "size": size, "time": datetime.fromtimestamp(when, UTC).isoformat()}
        for name, (size, when) in report.cosigned.items()
    ]
    row: dict[str, Json] = {
        "origin": report.origin,
        "result": "failed" if report.findings else "ok",
        "records": report.size,
        "root": _base64(report.root),
        "checked": report.checked,
        "pruned": report.pruned,
        "unsigned": report.unsigned,
    }
    if wants_json(output):
        findings: list[Json] = [{"fault": found.fault.value, "detail": found.detail} for found in report.findings]
        show_json({**row, "cosigned": cosigned, "notes": report.notes, "findings": findings})
        return
    show_row(row, output)
    for name, (size, when) in report.cosigned.items():
        show_text(f"cosigned  {name}: {size} records, {datetime.fromtimestamp(when, UTC).isoformat()}")
    for note in report.notes:
        show_text(f"note      {note}")
    for found in report.findings:
        show_text(f"FAILED    {found.fault.value}: {found.detail}")


def _readable(found: Iterator[FoundRecord | Unreadable], unreadable: list[Unreadable]) -> Iterator[FoundRecord]:
    for record in found:
        if isinstance(record, Unreadable):
            unreadable.append(record)
        else:
            yield record


def _show_json_array(found: Iterator[FoundRecord]) -> None:
    """Record by record, since a log may be long."""
    separator = "[\n"
    for record in found:
        sys.stdout.write(separator + json.dumps(_row(record), ensure_ascii=True))
        separator = ",\n"
    sys.stdout.write("[]\n" if separator == "[\n" else "\n]\n")


def _row(found: FoundRecord) -> dict[str, Json]:
    record = found.record
    return {
        "index": found.index,
        "time": record.time.isoformat().replace("+00:00", "Z"),
        "source": record.source.label,
        "event": record.event,
        "result": record.result,
        "request_id": record.request_id.hex() if any(record.request_id) else "",
        "caller": record.caller,
        "key_id": record.key_id,
        "purpose": record.purpose_label,
        "scheme": record.scheme_label,
        "marks": [name for name, mark in _MARKS.items() if record.marks & mark],
        "message_sha256": record.message_hash.hex(),
        "signature_sha256": record.signature_hash.hex(),
        "details": dict(record.details),
        "published": found.published,
    }


def _line(found: FoundRecord) -> str:
    record = found.record
    shown = [
        str(found.index),
        record.time.isoformat(timespec="milliseconds").replace("+00:00", "Z"),
        record.event,
        record.result,
        record.source.label,
        record.caller or "-",
        record.key_id or "-",
        record.purpose_label or "-",
        record.scheme_label or "-",
        record.request_id.hex() if any(record.request_id) else "-",
        *(f"MARK={name}" for name, mark in _MARKS.items() if record.marks & mark),
        *(f"{name}={value}" for name, value in record.details),
    ]
    return "  ".join(shown)


def _vkey(text: str) -> VerifierKey:
    """The key itself, or a file that holds it."""
    if "+" in text:
        return parse_vkey(text)
    return read_vkey(Path(text))


def _request_id(text: str) -> bytes:
    try:
        data = bytes.fromhex(text)
    except ValueError:
        data = b""
    if len(data) != REQUEST_ID_BYTES:
        raise InvalidRequest("--request-id: 32 hexadecimal digits are expected")
    return data


def _choice(known: dict[str, T], given: str | None, option: str) -> T | None:
    if given is None:
        return None
    if given not in known:
        raise InvalidRequest(f"{option}: one of {', '.join(known)} is expected")
    return known[given]


def _base64(data: bytes) -> str:
    return base64.b64encode(data).decode("ascii")
