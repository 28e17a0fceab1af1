"""The demo: a CA, a key server with SoftHSM, an agent and nginx on loopback; a keyless mutual-TLS page; then four proofs.

Run it by script/demo, which installs what it needs. Exit code 0: everything worked and all promises were kept; 1: not.
"""

from __future__ import annotations

import argparse
import os
import signal
import sys
import time
from collections.abc import Callable
from pathlib import Path

import proofs
from keyreeve_testing.stack import REPOSITORY, CurlResult, Served, Stack, StackConfig, StackFailed
from rich.console import Console
from rich.table import Table

FRONTEND = Served("frontend", "/ns/web/sa/frontend", mutual=True)
SOFTWARE = Served("software", "/ns/web/sa/software", backend="software")
CLIENT_PATH = "/ns/web/sa/client"
HANDSHAKES = 20


def main() -> int:
    arguments = _arguments()
    demo = Demo(arguments.dir.resolve(), keep=arguments.keep)
    for number in (signal.SIGTERM, signal.SIGINT):  # a shell's background job starts with SIGINT ignored
        signal.signal(number, _interrupt)
    try:
        return demo.run()
    except KeyboardInterrupt:
        demo.console.print("\ninterrupted")
        return 130
    except (StackFailed, AssertionError, OSError, LookupError) as error:
        demo.console.print(f"\n[bold red]the demo failed[/]: {type(error).__name__}:", style=None)
        demo.console.print(str(error), markup=False, highlight=False)
        demo.console.print(f"logs: {demo.stack.directory / 'log'}")
        return 1
    finally:
        demo.stack.close()


def _arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(prog="script/demo", description="Keyreeve, whole, on loopback; then four proofs.")
    parser.add_argument("--dir", type=Path, default=REPOSITORY / ".demo", help="where all its files go (%(default)s)")
    parser.add_argument(
        "--keep", action="store_true", help="leave it running until Ctrl-C, and say how to play with it"
    )
    return parser.parse_args()


def _interrupt(*_: object) -> None:
    raise KeyboardInterrupt


class Demo:
    """The programme, step by step."""

    def __init__(self, directory: Path, *, keep: bool) -> None:
        # A pipe has no width; then lines stay whole.
        self.console = Console(highlight=False, soft_wrap=True, width=None if sys.stdout.isatty() else 160)
        self.stack = Stack(
            StackConfig(directory=directory, served=(FRONTEND, SOFTWARE), client=CLIENT_PATH), say=self._say
        )
        self._keep = keep
        self._began = time.monotonic()

    def run(self) -> int:
        self._title("Starting everything on loopback")
        self.stack.start()
        self._title("A page over mutual TLS, with no private key on the node")
        page = self._page()
        self._table(page)
        verdicts = self._proofs()
        self._title("Verdicts")
        for verdict in verdicts:
            word = "[bold green]KEPT[/]  " if verdict.kept else "[bold red]BROKEN[/]"
            self.console.print(f"  ({verdict.letter}) {word} {verdict.promise}")
            for line in verdict.broken:
                self.console.print(f"        {line}", markup=False)
        kept = sum(verdict.kept for verdict in verdicts)
        self.console.print(f"\n{kept} of {len(verdicts)} promises kept, {time.monotonic() - self._began:.0f} s in all")
        if self._keep:
            self._play()
        return 0 if kept == len(verdicts) else 1

    def _title(self, text: str) -> None:
        self.console.print(f"\n[bold]==> {text}[/]")

    def _say(self, text: str) -> None:
        self.console.print(f"    {text}", markup=False)

    def _page(self) -> CurlResult:
        name = FRONTEND.name
        page = self.stack.curl(name)
        if not page.ok:
            raise StackFailed(f"curl ended with {page.code}: {page.error}")
        self._say(f"curl https://{self.stack.dns_name(name)}:{self.stack.ports[name]}/ -> {page.body.decode().strip()}")
        self._say(
            "curl verified nginx's chain to the trust bundle; nginx verified curl's; both keys signed in the key cluster"
        )
        for who in (name, "client"):
            first_line = (self.stack.svid_dir(who) / "key.pem").read_text().splitlines()[0]
            self._say(f"what {who} has for a key: {self.stack.svid_dir(who) / 'key.pem'}: {first_line}")
        return page

    def _table(self, page: CurlResult) -> None:
        times = sorted(self._handshake_ms() for _ in range(HANDSHAKES))
        table = Table(title_justify="left", header_style="bold")
        for column in ("identity", "serial", "where the key is", "extractable", "signatures", "handshake"):
            table.add_column(column, overflow="fold")
        for path, handshake in (
            (FRONTEND.path, f"{times[len(times) // 2]:.1f} ms median of {HANDSHAKES}"),
            (CLIENT_PATH, f"{page.handshake_ms:.1f} ms, both sides"),
            (SOFTWARE.path, "-"),
        ):
            key, svid = self.stack.key_of(path), self.stack.svid_of(path)
            attributes = key["attributes"] or {}
            where = (
                f"token {attributes['token']}, object {attributes['object']}"
                if attributes.get("token")
                else f"sealed software key (backend {key['backend']})"
            )
            extractable = "yes" if attributes.get("extractable") else "no"
            table.add_row(self.stack.spiffe_id(path), svid["serial"], where, extractable if attributes.get("token") else "signer only",
                          str(key["signatures"]), handshake)  # fmt: skip
        self.console.print(table)

    def _handshake_ms(self) -> float:
        started = time.perf_counter()
        self.stack.handshake(FRONTEND.name)
        return (time.perf_counter() - started) * 1000

    def _proofs(self) -> list[proofs.Verdict]:
        stack, name, path = self.stack, FRONTEND.name, FRONTEND.path
        return [
            self._prove(
                "a", "memory of every process but the signer holds no trace of a key that is in use",
                lambda verdict: proofs.memory_holds_no_key(
                    stack, verdict, served=SOFTWARE.name, label=stack.spiffe_id(SOFTWARE.path)),
            ),
            self._prove(
                "b", "a revoked grant stops the next handshake, within one second",
                lambda verdict: proofs.revocation_stops_handshakes(stack, verdict, served=name, path=path),
            ),
            self._prove(
                "c", "a TLS key signs nothing but TLS handshakes, and the refusal names the rule",
                lambda verdict: proofs.key_signs_nothing_else(stack, verdict, served=name),
            ),
            self._prove(
                "d", "renewal and reload break no download",
                lambda verdict: proofs.rotation_breaks_nothing(stack, verdict, served=name),
            ),
        ]  # fmt: skip

    def _prove(self, letter: str, promise: str, prove: Callable[[proofs.Verdict], None]) -> proofs.Verdict:
        self._title(f"Proof ({letter}): {promise}")
        verdict = proofs.Verdict(letter, promise, said=self._say)
        try:
            prove(verdict)
        except (StackFailed, OSError, LookupError) as error:
            # A proof that could not be carried out proves nothing; the others still have something to say.
            verdict.broken.append(f"could not be carried out: {type(error).__name__}: {error}")
            self._say(verdict.broken[-1])
        return verdict

    def _play(self) -> None:
        stack, name = self.stack, FRONTEND.name
        self._title("It goes on running until Ctrl-C. In another shell:")
        curl = " ".join(stack.curl_command(name))
        keyreeve = REPOSITORY / ".venv/bin/keyreeve"
        for line in (
            f"export KEYREEVE_CA_SOCKET={stack.ca_socket} KEYREEVE_KEY_SERVER_SOCKET={stack.key_server_socket}",
            f"OPENSSL_CONF={stack.openssl_conf} {curl}",
            f"{keyreeve} key list",
            f"{keyreeve} grant list",
            f"{keyreeve} svid node --state-dir {stack.run_dir / 'agent-state'}",
            f"{keyreeve} doctor --config-dir {stack.etc} --provider {REPOSITORY / 'client/openssl-provider/build'}",
            f"tail -f {stack.directory / 'log'}/*.log",
        ):
            self.console.print(f"    {line}", markup=False)
        while True:
            signal.pause()


if __name__ == "__main__":
    os.umask(0o022)
    sys.exit(main())
