"""A front end whose supervisor is gone ends itself, however the supervisor went."""

from __future__ import annotations

import asyncio
import socket
from typing import cast

import pytest
from keyreeve_keyserver.frontend.__main__ import _stop_at_end_of
from keyreeve_keyserver.frontend.app import FrontEnd


class StopCounter:
    stops = 0

    def stop(self) -> None:
        self.stops += 1


@pytest.mark.parametrize("unread", [b"", b"READY\n"])
async def test_supervisor_that_is_gone_stops_the_front_end(unread: bytes) -> None:
    ours, theirs = socket.socketpair()
    ours.setblocking(False)
    ours.send(unread)
    theirs.close()
    front_end = StopCounter()
    with ours:
        async with asyncio.timeout(5):
            await _stop_at_end_of(ours, cast("FrontEnd", front_end))
    assert front_end.stops == 1
