"""Several real key servers over one PostgreSQL catalog, and clients that sign at each without a pause."""

from __future__ import annotations

import threading
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from time import monotonic

import grpc
from keyreeve_common.grpc_edge import error_from_rpc

from keyreeve_testing.keyserver import KeyServerRig
from keyreeve_testing.pki import Svid, TestPki


@contextmanager
def running_replicas(
    directory: Path, names: Sequence[str], url: str, *, catalog: str = "", extra: str = ""
) -> Iterator[list[KeyServerRig]]:
    """One rig for each name; they share the test PKI, the passphrase and the database. Each listens for changes already."""
    pki = TestPki()
    with ExitStack() as stack:
        rigs = [
            KeyServerRig(directory / name, pki=pki, catalog=f'url = "{url}"\n{catalog}', extra=extra) for name in names
        ]
        for rig in rigs:
            stack.enter_context(rig.running())
            rig.process.wait_event("catalog_listening")
        yield rigs


@dataclass
class SteadySigner:
    """Signs with one key at one replica, one request after another, and remembers when each answer came."""

    rig: KeyServerRig
    svid: Svid
    key_id: str
    signed: int = 0
    last_signed_at: float = 0.0
    last_error: str = ""
    _changed: threading.Condition = field(default_factory=threading.Condition)
    _stopping: bool = False

    @contextmanager
    def running(self) -> Iterator[SteadySigner]:
        thread = threading.Thread(target=self._run, name=f"signer-{self.rig.directory.name}")
        thread.start()
        try:
            yield self
        finally:
            self._stopping = True
            thread.join()

    def wait(self, condition: Callable[[SteadySigner], bool], within: float = 30) -> None:
        with self._changed:
            done = self._changed.wait_for(lambda: condition(self), within)
        assert done, f"signed {self.signed}, last error {self.last_error}\n{self.rig.process.log_tail()}"

    def _run(self) -> None:
        with self.rig.caller(self.svid) as stubs:
            while not self._stopping:
                try:
                    stubs.sign(self.key_id)
                    error = ""
                except grpc.RpcError as failure:
                    error = error_from_rpc(failure).code.value
                with self._changed:
                    if not error:
                        self.signed += 1
                        self.last_signed_at = monotonic()
                    self.last_error = error
                    self._changed.notify_all()
