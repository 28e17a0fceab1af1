"""Two people agree: the ceremony with approvals, and the destruction of a key, by the real command against real processes."""

from __future__ import annotations

import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from cryptography.hazmat.primitives.asymmetric import ed25519
from cryptography.hazmat.primitives.serialization import (
    BestAvailableEncryption,
    Encoding,
    NoEncryption,
    PrivateFormat,
    PublicFormat,
)
from keyreeve_client.cli.__main__ import build_app, run
from keyreeve_common.v1 import ca_pb2
from keyreeve_testing.keyserver import KeyServerRig
from typer.testing import CliRunner

PASSPHRASE = "correct horse"


@pytest.fixture
def people(tmp_path: Path) -> dict[str, Path]:
    """Private keys by name; alice's is encrypted."""
    found = {}
    for name in ("alice", "bob"):
        key, path = ed25519.Ed25519PrivateKey.generate(), tmp_path / f"{name}.key"
        how = BestAvailableEncryption(PASSPHRASE.encode()) if name == "alice" else NoEncryption()
        path.touch(mode=0o600)
        path.write_bytes(key.private_bytes(Encoding.PEM, PrivateFormat.PKCS8, how))
        pem = key.public_key().public_bytes(Encoding.PEM, PublicFormat.SubjectPublicKeyInfo)
        (tmp_path / f"{name}.pem").write_bytes(pem)
        found[name] = path
    return found


@pytest.fixture
def server(tmp_path: Path, people: dict[str, Path]) -> Iterator[KeyServerRig]:
    rig = KeyServerRig(tmp_path / "ks", extra='[keys]\ndestruction_wait = "0s"')
    lines = ["[approvals]", "required = 2"]
    for name in people:
        lines += ["[[approvals.approver]]", f'name = "{name}"', f'public_key_file = "{tmp_path / name}.pem"']
    rig.signer_toml.write_text(rig.signer_toml.read_text() + "\n".join(lines) + "\n")
    with rig.running(initialised=False):
        yield rig


def approve(people: dict[str, Path], request: Path) -> list[str]:
    files = []
    for name, key in people.items():
        out = request.with_suffix(f".{name}")
        arguments = ["approval", "sign", str(request), "--key", str(key), "--name", name, "--out", str(out)]
        told = CliRunner().invoke(build_app(arguments), arguments, input=f"y\n{PASSPHRASE}\n")
        assert told.exit_code == 0, told.output
        assert PASSPHRASE not in told.output
        files.append(str(out))
    return files


def test_ceremony_stops_at_each_authority_until_it_is_approved(
    tmp_path: Path, server: KeyServerRig, people: dict[str, Path], new_ca: Any, capsys: pytest.CaptureFixture[str]
) -> None:
    rig = new_ca(tmp_path / "ca", server)
    socket = ["--key-server-socket", str(server.admin_socket)]
    for kind in ("root", "issuing"):
        code, _, stderr = rig.init(check=False)
        assert code == 1
        found = re.search(r"approval_required: .* keyreeve approval request create (authority-\S+)", stderr)
        assert found is not None, stderr
        assert kind in found[1]
        request = tmp_path / kind
        capsys.readouterr()
        assert run(["approval", "request", "create", found[1], *socket]) == 0
        request.write_text(capsys.readouterr().out)
        files = approve(people, request)
        assert run(["approval", "submit", files[0], *socket]) == 0
        assert rig.init(check=False)[0] == 1  # one is not enough
        assert run(["approval", "submit", files[1], *socket]) == 0
    assert rig.init()[0] == 0
    with rig.running(), rig.local() as local:
        assert local.authorities.ListAuthorities(ca_pb2.ListAuthoritiesRequest()).authorities


def test_approval_that_does_not_hold_stops_no_creation_for_good(
    tmp_path: Path, server: KeyServerRig, people: dict[str, Path], new_ca: Any, capsys: pytest.CaptureFixture[str]
) -> None:
    """A typing error in a name, or a key administrator's junk: the front end cannot tell, it knows no approvers."""
    rig = new_ca(tmp_path / "ca", server)
    socket = ["--key-server-socket", str(server.admin_socket)]
    found = re.search(r"keyreeve approval request create (authority-\S+)", rig.init(check=False)[2])
    assert found is not None
    capsys.readouterr()
    assert run(["approval", "request", "create", found[1], *socket]) == 0
    request = tmp_path / "request"
    request.write_text(capsys.readouterr().out)
    files, junk = approve(people, request), tmp_path / "junk"
    junk.write_text(Path(files[1]).read_text().replace('"bob"', '"bobb"'))
    assert run(["approval", "submit", files[0], files[1], str(junk), *socket]) == 0
    told = rig.init(check=False)[2]
    assert "approval_invalid" in told
    assert "dropped: submit those that hold again" in told
    assert run(["approval", "submit", *files, *socket]) == 0
    assert "root" not in (again := rig.init(check=False)[2]).split("approval request create")[-1], again


def test_key_is_destroyed_with_the_files_of_two(
    tmp_path: Path, server: KeyServerRig, people: dict[str, Path], capsys: pytest.CaptureFixture[str]
) -> None:
    socket = ["--key-server-socket", str(server.admin_socket)]
    key_id = server.create_key().key_id
    assert run(["key", "disable", key_id, *socket]) == 0
    destroy = ["key", "destroy", key_id, "--yes", *socket]
    assert run(destroy) == 1
    assert "error: approval_required: destroy_key needs approvals of 2 of 2" in capsys.readouterr().err
    assert run(["approval", "request", "destroy", key_id, *socket]) == 0
    request = tmp_path / "request"
    request.write_text(capsys.readouterr().out)
    files = approve(people, request)
    assert run([*destroy, "--approval", files[0]]) == 1
    assert "not yet: bob" in capsys.readouterr().err
    assert run([*destroy, "--approval", files[0], "--approval", files[1], "-o", "json"]) == 0
    assert '"state": "destroyed"' in capsys.readouterr().out


def test_wrong_passphrase_and_a_changed_request_are_told(
    tmp_path: Path, people: dict[str, Path], capsys: pytest.CaptureFixture[str]
) -> None:
    request = tmp_path / "request"
    request.write_text("{}")
    assert run(["approval", "sign", str(request), "--key", str(people["bob"]), "--name", "bob", "--yes"]) == 1
    assert "error: approval_invalid" in capsys.readouterr().err
    request.write_text(
        '{"version":1,"operation":"destroy_key","request_id":"r","expires":"2030-01-01T00:00:00Z","key":{"label":"\\u202eevil"}}'
    )
    arguments = ["approval", "sign", str(request), "--key", str(people["alice"]), "--name", "alice"]
    told = CliRunner().invoke(build_app(arguments), arguments, input="y\nwrong\n")
    assert told.exit_code != 0
    assert "\\u202eevil" in told.output  # shown, not obeyed
