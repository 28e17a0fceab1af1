"""Which variables of the environment a child gets: an allow-list for each kind. What a loader would obey is in none; of
what an interpreter obeys there is PYTHONPATH, which our own parent was started with."""

from __future__ import annotations

from collections.abc import Mapping

_ALL = frozenset({"PATH", "LANG", "LC_ALL", "LC_CTYPE", "TZ", "HOME", "TMPDIR", "PYTHONPATH"})
_ENGINE = frozenset({"KEYREEVE_MULTIBUFFER"})  # switches it off, nothing else
_TOKENS = frozenset({"SOFTHSM2_CONF"})


def worker_environment(environment: Mapping[str, str]) -> dict[str, str]:
    """For a backend's worker."""
    return _only(environment, _ALL | _TOKENS)


def signer_environment(environment: Mapping[str, str]) -> dict[str, str]:
    return _only(environment, _ALL | _TOKENS | _ENGINE | {"CREDENTIALS_DIRECTORY"})


def front_end_environment(environment: Mapping[str, str]) -> dict[str, str]:
    """gRPC and OpenTelemetry are tuned by variables of their own."""
    tuning = {name for name in environment if name.startswith(("GRPC_", "OTEL_"))}
    return _only(environment, _ALL | {"CREDENTIALS_DIRECTORY", "SSL_CERT_FILE", "SSL_CERT_DIR"} | tuning)


def _only(environment: Mapping[str, str], names: frozenset[str]) -> dict[str, str]:
    return {name: value for name, value in environment.items() if name in names}
