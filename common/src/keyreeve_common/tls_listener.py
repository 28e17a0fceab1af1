"""A TLS listener whose certificate is replaced while it serves."""

from __future__ import annotations

import threading
from collections.abc import Callable

import grpc


class ChangedConfiguration:
    """For `grpc.dynamic_ssl_server_credentials`, which asks at each new connection: the configuration of now where it is another one, else None.

    gRPC builds a TLS context anew for whatever it is given, the same object too, and lets go of the one before: a second connection that begins
    with that one in this moment ends the process, as a fleet that comes back at once did. So it is given a configuration once.
    """

    def __init__(self, current: Callable[[], grpc.ServerCertificateConfiguration]) -> None:
        self._current = current
        self._lock = threading.Lock()
        self._given = current()

    @property
    def initial(self) -> grpc.ServerCertificateConfiguration:
        """What the credentials begin with."""
        return self._given

    def __call__(self) -> grpc.ServerCertificateConfiguration | None:
        with self._lock:
            current = self._current()
            if current is self._given:
                return None
            self._given = current
            return current


def reloading_credentials(
    current: Callable[[], grpc.ServerCertificateConfiguration], *, require_client_authentication: bool
) -> grpc.ServerCredentials:
    """One listener's credentials; `current` gives the same object for as long as nothing changed. It may be called from any thread."""
    fetch = ChangedConfiguration(current)
    return grpc.dynamic_ssl_server_credentials(
        fetch.initial,
        fetch,  # type: ignore[arg-type]  # grpcio's documentation allows None for "no change", its stubs do not
        require_client_authentication=require_client_authentication,
    )
