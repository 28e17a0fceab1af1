"""Exit codes and the one line on stderr, for every way a command line can end."""

from __future__ import annotations

import socket
import sys
from collections.abc import Callable
from importlib.metadata import EntryPoint, EntryPoints
from pathlib import Path

import pytest
from keyreeve_client.cli import __main__ as main_module
from keyreeve_client.cli import services
from keyreeve_client.cli.__main__ import EXIT_FAILED, EXIT_OK, EXIT_UNAVAILABLE, EXIT_USAGE, run

Errors = Callable[[], list[str]]


@pytest.fixture
def errors(capsys: pytest.CaptureFixture[str]) -> Errors:
    def read() -> list[str]:
        return capsys.readouterr().err.splitlines()

    return read


@pytest.mark.parametrize("command", [["--help"], ["key", "--help"], ["entry", "create", "--help"], ["--version"]])
def test_asking_for_help_or_version_is_no_failure(command: list[str]) -> None:
    assert run(command) == EXIT_OK


@pytest.mark.parametrize(
    "command",
    [
        ["no-such-command"],
        ["key", "list", "--output", "yaml"],
        ["key", "show"],
        ["key", "show", "NOT A KEY ID"],
        ["entry", "create", "--spiffe-id", "http://x", "--parent", "spiffe://a.test/p"],
        ["token", "create", "--ttl", "soon"],
        ["grant", "create", "--key-id", "k", "--holder", "spiffe://a.test/x", "--expires", "99999999h"],
        ["grant", "create", "--key-id", "k", "--holder", "spiffe://a.test/x", "--expires", "9999-12-31T23:00:00-02:00"],
        ["grant", "create", "--key-id", "k", "--holder", "spiffe://a.test/x", "--rate", "1/s", "--burst", "9999999999"],
        ["audit", "search", ".", "--since", "0001-01-01T00:00:00+10:00"],
        ["key", "create", "--label", "\udcff", "--key-server-socket", "SOCKET"],
        ["run", "everything"],
    ],
)
def test_a_wrong_command_line_is_a_usage_error_in_one_line(command: list[str], errors: Errors, tmp_path: Path) -> None:
    with socket.socket(socket.AF_UNIX) as listener:
        listener.bind(str(tmp_path / "s"))
        assert run([str(tmp_path / "s") if word == "SOCKET" else word for word in command]) == EXIT_USAGE
    (line,) = errors()
    assert line.startswith("error: usage: ")


def test_a_socket_that_is_not_there_is_unavailable(tmp_path: Path, errors: Errors) -> None:
    assert run(["key", "list", "--key-server-socket", str(tmp_path / "admin.sock")]) == EXIT_UNAVAILABLE
    (line,) = errors()
    assert line.startswith("error: unavailable: ")
    assert "is keyreeve-keyserver running?" in line


def test_a_file_that_is_no_socket_is_unavailable(tmp_path: Path) -> None:
    (tmp_path / "admin.sock").touch()
    assert run(["entry", "list", "--ca-socket", str(tmp_path / "admin.sock")]) == EXIT_UNAVAILABLE


def test_a_command_whose_distribution_is_missing_says_which(monkeypatch: pytest.MonkeyPatch, errors: Errors) -> None:
    monkeypatch.setattr(main_module, "entry_points", lambda **_: EntryPoints())
    assert run(["init", "--trust-domain", "a.test"]) == EXIT_FAILED
    (line,) = errors()
    assert (
        line == "error: failed_precondition: command 'init' comes with keyreeve-ca, which is not installed on this host"
    )


def test_a_command_that_cannot_be_loaded_breaks_no_other(monkeypatch: pytest.MonkeyPatch, errors: Errors) -> None:
    broken = EntryPoint("init", "no_such_module:init", "keyreeve.commands")
    monkeypatch.setattr(main_module, "entry_points", lambda **_: EntryPoints([broken]))
    assert run(["--version"]) == EXIT_OK
    assert run(["init"]) == EXIT_FAILED
    assert "no_such_module" in errors()[0]


def test_run_takes_the_place_of_this_process(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    program = tmp_path / "keyreeve-agent"
    program.touch(mode=0o755)
    commands: list[list[str]] = []
    monkeypatch.setattr(sys, "executable", str(tmp_path / "python"))
    monkeypatch.setattr(services, "_exec", commands.append)
    assert run(["run", "agent", "--config", "/etc/a.toml"]) == EXIT_OK
    assert run(["run", "agent", "--check-config"]) == EXIT_OK
    assert commands == [
        [str(program), "--config", "/etc/a.toml"],
        [str(program), "--config", "/etc/keyreeve/agent.toml", "--check-config"],
    ]


def test_run_says_what_to_install(monkeypatch: pytest.MonkeyPatch, tmp_path: Path, errors: Errors) -> None:
    monkeypatch.setattr(sys, "executable", str(tmp_path / "python"))
    monkeypatch.setenv("PATH", str(tmp_path))
    assert run(["run", "keyserver"]) == EXIT_FAILED
    assert "install the distribution keyreeve-keyserver" in errors()[0]


def test_no_option_takes_a_secret() -> None:
    """Everybody on the host sees command lines: tokens and PINs come from files and go to files."""
    commands = [
        command
        for group in main_module.build_app().registered_groups
        if group.typer_instance is not None
        for command in group.typer_instance.registered_commands
    ]
    names = [name for command in commands if command.callback for name in command.callback.__annotations__]
    assert len(commands) > 20
    assert not [name for name in names if any(word in name for word in ("pin", "passphrase", "password", "secret"))]
