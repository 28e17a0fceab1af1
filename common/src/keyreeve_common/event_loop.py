"""The event loop that services run on: uvloop where it is installed, else asyncio's own; nothing else depends on which (docs/adr/0032).

Not for the signer: libuv's io_uring has no place behind its seccomp filter, and the process that holds keys takes in no more native code
than it must.
"""

from __future__ import annotations

import asyncio
from collections.abc import Coroutine
from typing import Any


def run(main: Coroutine[Any, Any, None]) -> None:
    """asyncio.run on the faster loop."""
    try:
        import uvloop  # noqa: PLC0415 - not on every platform
    except ImportError:
        asyncio.run(main)
    else:
        uvloop.run(main)


def loop_name() -> str:
    """For the log: the package of the loop that runs, "uvloop" or "asyncio"."""
    return type(asyncio.get_running_loop()).__module__.partition(".")[0]
