"""`keyreeve-agent --config agent.toml [--check-config]`. SIGTERM drains; SIGHUP is logged and changes nothing: restart to read a new file."""

from __future__ import annotations

import argparse
import contextlib
import os
import resource
import sys
from pathlib import Path

from keyreeve_common import event_loop
from keyreeve_common.config import load_config
from keyreeve_common.errors import KeyreeveError
from keyreeve_common.telemetry import configure_logging, log_error

from keyreeve_client.agent.config import AgentConfig
from keyreeve_client.agent.service import Agent, check


def main() -> None:
    """Exit status: 0 stopped in order, 1 could not start or go on, 2 the configuration is wrong."""
    arguments = _arguments()
    with contextlib.suppress(OSError):  # a sandbox may forbid it; then its own LimitCORE counts
        resource.setrlimit(resource.RLIMIT_CORE, (0, 0))
    os.umask(0o077)
    try:
        config = load_config(AgentConfig, arguments.config)
        check(config)
    except KeyreeveError as error:
        sys.stderr.write(f"keyreeve-agent: {error}\n")
        sys.exit(2)
    if arguments.check_config:
        return
    configure_logging("agent")
    failed = False
    try:
        event_loop.run(Agent(config).run())
    except* KeyreeveError as group:
        failed = True  # leaving from within `except*` would wrap the exit into a group
        for cause in _leaves(group):
            log_error("agent_failed", code=cause.code.value, detail=cause.detail)
    if failed:
        sys.exit(1)


def _arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(prog="keyreeve-agent", description="Keyreeve's node agent")
    parser.add_argument("--config", type=Path, required=True, help="the agent's TOML file")
    parser.add_argument("--check-config", action="store_true", help="exit 0, or say which key is wrong and exit 2")
    return parser.parse_args()


def _leaves(group: BaseExceptionGroup[KeyreeveError]) -> list[KeyreeveError]:
    found: list[KeyreeveError] = []
    for item in group.exceptions:
        found += _leaves(item) if isinstance(item, BaseExceptionGroup) else [item]
    return found


if __name__ == "__main__":
    main()
