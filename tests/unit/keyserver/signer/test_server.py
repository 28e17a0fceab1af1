"""The signer's socket file: it ends when it is told to, whoever is still connected."""

from __future__ import annotations

import asyncio
import os
from pathlib import Path
from typing import cast

from keyreeve_keyserver.signer.controls import ControlService
from keyreeve_keyserver.signer.server import Server
from keyreeve_keyserver.signer.service import SigningService


async def test_listening_ends_while_a_peer_is_connected(tmp_path: Path) -> None:
    """From Python 3.12 on `asyncio.Server.serve_forever` waits for the peers before it ends."""
    path, ready = tmp_path / "signer.sock", asyncio.Event()
    uids = frozenset({os.getuid()})
    server = Server(cast("SigningService", None), cast("ControlService", None), allowed_uids=uids)
    listening = asyncio.create_task(server.listen(path, ready.set))
    await ready.wait()
    _, writer = await asyncio.open_unix_connection(path)
    await asyncio.sleep(0.05)
    listening.cancel()
    done, _ = await asyncio.wait([listening], timeout=3)
    writer.close()
    assert done
    assert not path.exists()
