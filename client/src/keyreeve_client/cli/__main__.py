"""The `keyreeve` command: puts the groups together, and ends every failure with one line on stderr and a stable exit code."""

from __future__ import annotations

import os
import sys
from collections.abc import Sequence
from importlib.metadata import entry_points, version
from typing import Annotated

import typer
from keyreeve_common.errors import ErrorCode, FailedPrecondition, KeyreeveError, Unavailable

from keyreeve_client.cli import approvals, audit, entries, keys, nodes, quarantines, services, svids
from keyreeve_client.cli.doctor.command import doctor
from keyreeve_client.cli.output import OutputFormat, set_default_output, show_text

EXIT_OK, EXIT_FAILED, EXIT_USAGE, EXIT_UNAVAILABLE = 0, 1, 2, 3
COMMANDS_GROUP = "keyreeve.commands"
# Commands that another distribution brings, and which one: named here only to say what is missing.
_BROUGHT_BY = {"init": "keyreeve-ca", "bench": "keyreeve-bench"}


def build_app(asked: Sequence[str] = ()) -> typer.Typer:
    """All commands, those of other installed distributions too (entry points of group `keyreeve.commands`).

    `asked` is the command line: what it does not name is not imported, since a CA's database libraries would make every command slow.
    """
    app = typer.Typer(
        name="keyreeve",
        no_args_is_help=True,
        add_completion=False,
        pretty_exceptions_enable=False,
        help="Keyless TLS: private keys stay in the key cluster. Administers it through the services' local sockets.",
        epilog="Exit codes: 0 done, 1 refused or failed, 2 usage, 3 unavailable.",
    )
    app.callback()(_options)
    app.command("run")(services.run)
    app.add_typer(entries.app, name="entry")
    app.add_typer(nodes.tokens, name="token")
    app.add_typer(nodes.agents, name="agent")
    app.add_typer(keys.app, name="key")
    app.add_typer(approvals.app, name="approval")
    app.add_typer(keys.grants, name="grant")
    app.add_typer(quarantines.app, name="quarantine")
    app.add_typer(svids.app, name="svid")
    app.add_typer(svids.authorities, name="authority")
    app.add_typer(svids.bundles, name="bundle")
    app.add_typer(audit.app, name="audit")
    app.command("doctor")(doctor)
    _add_brought_commands(app, asked)
    return app


def _show_version(asked: bool) -> None:
    if asked:
        show_text(f"keyreeve {version('keyreeve-client')}")
        raise typer.Exit


def _options(
    output: Annotated[
        OutputFormat, typer.Option("--output", "-o", envvar="KEYREEVE_OUTPUT", help="For all commands.")
    ] = OutputFormat.TEXT,
    show_version: Annotated[
        bool, typer.Option("--version", help="Print the version.", callback=_show_version, is_eager=True)
    ] = False,
) -> None:
    set_default_output(output)


def _add_brought_commands(app: typer.Typer, asked: Sequence[str]) -> None:
    found = {point.name: point for point in entry_points(group=COMMANDS_GROUP)}
    help_is_asked = all(word.startswith("-") for word in asked)
    for name, point in found.items():
        if not help_is_asked and name not in asked:
            continue
        try:
            command = point.load()
        except ImportError as error:
            _add_placeholder(app, name, f"command {name!r} cannot be loaded from {point.value}: {error}")
            continue
        if isinstance(command, typer.Typer):
            app.add_typer(command, name=name)
        else:
            app.command(name)(command)
    for name, distribution in _BROUGHT_BY.items():
        if name not in found:
            _add_placeholder(
                app, name, f"command {name!r} comes with {distribution}, which is not installed on this host"
            )


def _add_placeholder(app: typer.Typer, name: str, reason: str) -> None:
    def missing() -> None:
        raise FailedPrecondition(reason)

    app.command(
        name,
        help=f"Not available here: {reason}.",
        context_settings={"allow_extra_args": True, "ignore_unknown_options": True},
    )(missing)


def main() -> None:
    """The console script."""
    sys.exit(run(sys.argv[1:]))


def run(arguments: list[str]) -> int:
    """Runs one command line and returns its exit code."""
    command = typer.main.get_command(build_app(arguments))
    try:
        result = command.main(args=arguments, prog_name="keyreeve", standalone_mode=False)
    except KeyreeveError as error:
        _complain(error.code.value, error.detail)
        return EXIT_UNAVAILABLE if isinstance(error, Unavailable) else EXIT_FAILED
    except typer.Abort:
        _complain("aborted", "nothing was changed")
        return EXIT_FAILED
    except KeyboardInterrupt:
        return 130
    except BrokenPipeError:
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return EXIT_FAILED
    except typer.TyperException as error:
        if error.format_message():  # without one the help was shown
            _complain("usage", error.format_message())
        return EXIT_USAGE
    except UnicodeEncodeError:
        _complain("usage", "an argument holds bytes that are not UTF-8")
        return EXIT_USAGE
    except OSError as error:
        _complain(ErrorCode.INTERNAL.value, f"{error.filename or 'operating system'}: {error.strerror or error}")
        return EXIT_FAILED
    return result if isinstance(result, int) else EXIT_OK


def _complain(code: str, detail: str) -> None:
    print(f"error: {code}: {' '.join(detail.split())}", file=sys.stderr)  # noqa: T201 - a command's answer


if __name__ == "__main__":
    main()
