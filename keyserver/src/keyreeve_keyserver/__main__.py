"""`keyreeve-keyserver --config keyserver.toml`: the supervisor of signer and front end; `--frontend-only` for separate units."""

from __future__ import annotations

import argparse
import asyncio
import sys
from dataclasses import replace
from pathlib import Path

from keyreeve_common.errors import ConfigInvalid, KeyreeveError
from keyreeve_common.telemetry import configure_logging, log_error

from keyreeve_keyserver.config import load_keyserver_config
from keyreeve_keyserver.domain.pair import parse_pair
from keyreeve_keyserver.pair_keeper import EX_CONFIG
from keyreeve_keyserver.supervisor import Supervisor


def main() -> int:
    parser = argparse.ArgumentParser(prog="keyreeve-keyserver", description="The Keyreeve key server.")
    parser.add_argument("--config", type=Path, required=True, help="keyserver.toml")
    how = parser.add_mutually_exclusive_group()
    how.add_argument("--check-config", action="store_true", help="read the configuration and exit")
    how.add_argument("--frontend-only", action="store_true", help="serve without a supervisor, through signer_socket")
    parser.add_argument("--pair", default="1/1", help="with --frontend-only: NUMBER/COUNT of the units on this host")
    parser.add_argument("--signer-socket", type=Path, help="with --frontend-only: in the place of signer_socket")
    arguments = parser.parse_args()
    configure_logging("keyreeve-keyserver")
    try:
        return _run(arguments)
    except KeyreeveError as error:
        log_error("key_server_failed", code=error.code.value, detail=error.detail)
        return EX_CONFIG if isinstance(error, ConfigInvalid) else 1


def _run(arguments: argparse.Namespace) -> int:
    path: Path = arguments.config
    config = load_keyserver_config(path)
    if arguments.check_config:
        if config.signer_config is None and config.signer_socket is None:
            raise ConfigInvalid(f"{path}: signer_config or signer_socket: one of them is needed")
        return 0
    if arguments.frontend_only:
        from keyreeve_keyserver.frontend.__main__ import run_front_end  # noqa: PLC0415 - the supervisor needs no gRPC

        if arguments.signer_socket is not None:
            config = replace(config, signer_socket=arguments.signer_socket)
        return run_front_end(config, parse_pair(arguments.pair))
    return asyncio.run(_supervise(config_path=path))


async def _supervise(config_path: Path) -> int:
    return await Supervisor(load_keyserver_config(config_path), config_path).run()


if __name__ == "__main__":
    sys.exit(main())
