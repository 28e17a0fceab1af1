"""A Vault worker process: it reaches Vault, knows a token of its own, and no key. How it is started: `worker_main`.

Of secrets it is given the name of one file, which it opens at each log-in. It answers questions in their order, and ends when the signer closes.
"""

from __future__ import annotations

import sys
from datetime import timedelta
from pathlib import Path
from typing import Any

from keyreeve_common.errors import ConfigInvalid, MalformedFrame, TokenUnavailable
from keyreeve_common.vault.config import VaultConfig, VaultLogin
from keyreeve_common.vault.session import VaultSession

from keyreeve_keyserver.backends import worker_frames as frames
from keyreeve_keyserver.backends.launch import WorkerStart
from keyreeve_keyserver.backends.vault_transit import Transit
from keyreeve_keyserver.backends.worker_main import run_worker


class Worker:
    def __init__(self, start: WorkerStart) -> None:
        self._start = start
        self._transit: Transit | None = None

    def answer(self, question: frames.Question) -> frames.Answer:
        """Raises: KeyreeveError."""
        if isinstance(question, frames.Open):
            if self._transit is not None:
                raise MalformedFrame("the worker is open already")
            return frames.Done(self._open(self._start.settings))
        transit = self._transit
        if transit is None:
            raise TokenUnavailable("the worker is not logged in to Vault")
        if isinstance(question, frames.TokenSign):
            return frames.TokenSigned(tuple(transit.sign(question.items)))
        if isinstance(question, frames.Box):
            return frames.Boxed(transit.box(question))
        if isinstance(question, frames.Create):
            return frames.Done(transit.create(question.ref, question.key_type))
        if isinstance(question, frames.Find):
            return frames.Done(transit.find(question.ref))
        if isinstance(question, frames.Inspect):
            return frames.Done(transit.inspect(question.ref))
        if isinstance(question, frames.Ping):
            transit.ping()
        else:
            transit.destroy(question.ref)
        return frames.Done({})

    def _open(self, settings: dict[str, Any]) -> dict[str, Any]:
        fields = dict(settings)
        try:
            mount, key_prefix = str(fields.pop("mount")), str(fields.pop("key_prefix"))
            session = VaultSession(vault_config(fields))
        except (KeyError, TypeError, ValueError, ConfigInvalid):
            raise MalformedFrame("the settings are not those of a Vault worker") from None
        try:
            transit = Transit(session, mount=mount, key_prefix=key_prefix)
            description = transit.describe()
        except BaseException:
            session.close()
            raise
        session.keep_alive()
        self._transit = transit
        return description


def vault_config(fields: dict[str, Any]) -> VaultConfig:
    """The inverse of `vault_backend.worker_settings`. Raises: KeyError, TypeError, ValueError, ConfigInvalid."""
    values = dict(fields)
    for name in ("ca_file", "secret_id_file", "jwt_file", "token_file"):
        values[name] = Path(values[name]) if values[name] else None
    values["login"] = VaultLogin(values["login"])
    values["request_timeout"] = timedelta(milliseconds=values.pop("request_timeout_ms"))
    return VaultConfig(**values)


def main() -> int:
    return run_worker(lambda start: Worker(start).answer)


if __name__ == "__main__":
    sys.exit(main())
