"""The event loop that services run on: uvloop where the extra `speed` is installed, else asyncio's own. Both behave alike.

Not for the signer: libuv's io_uring has no place behind its seccomp filter, and the process that holds keys takes in no more native code
than it must.
"""

from __future__ import annotations

import asyncio
from collections.abc import Callable, Coroutine
from typing import Any, TypeVar

T = TypeVar("T")
new_event_loop: Callable[[], asyncio.AbstractEventLoop]
try:
    from uvloop import new_event_loop
except ImportError:
    new_event_loop = asyncio.new_event_loop


def run(main: Coroutine[Any, Any, T]) -> T:
    """As asyncio.run."""
    with asyncio.Runner(loop_factory=new_event_loop) as runner:
        return runner.run(main)
