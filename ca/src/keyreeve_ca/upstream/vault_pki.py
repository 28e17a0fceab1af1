"""A PKI engine of Vault or OpenBao as the root. It is asked once in the life of an issuing authority, so each use logs in for itself.

Spec: Vault API, secret/pki: issuer/:ref, issuer/:ref/sign-intermediate.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager, suppress
from datetime import datetime, timedelta
from typing import Any

from cryptography import x509
from cryptography.hazmat.primitives.serialization import Encoding
from keyreeve_common.errors import FailedPrecondition, KeyNotFound, KeyreeveError, Unavailable
from keyreeve_common.vault.config import VaultLogin
from keyreeve_common.vault.session import VaultSession

from keyreeve_ca.config import VaultPkiConfig


class VaultPki:
    """The port `keyreeve_ca.ports.UpstreamAuthority`."""

    def __init__(self, config: VaultPkiConfig) -> None:
        self._config = config
        self._path = f"{config.mount}/issuer/{config.issuer}"

    @property
    def name(self) -> str:
        return f"{self._config.address} {self._path}"

    def fetch_root(self) -> x509.Certificate:
        with self._session() as session:
            return _certificate(session.get(self._path, doing="reading the issuer of Vault's PKI"))

    def sign_authority(self, csr_der: bytes, *, not_after: datetime, backdate: timedelta) -> x509.Certificate:
        """`use_csr_values` keeps subject and URI as they stand in the request; what comes back is the caller's to check."""
        csr_pem = x509.load_der_x509_csr(csr_der).public_bytes(Encoding.PEM).decode("ascii")
        body = {
            "csr": csr_pem,
            "format": "pem",
            "use_csr_values": True,
            "exclude_cn_from_sans": True,
            "max_path_length": 0,
            "not_after": not_after.strftime("%Y-%m-%dT%H:%M:%SZ"),
            "not_before_duration": f"{int(backdate.total_seconds())}s",
        }
        with self._session() as session:
            doing = "having Vault's PKI sign the issuing authority"
            return _certificate(session.post(f"{self._path}/sign-intermediate", body, doing=doing))

    @contextmanager
    def _session(self) -> Iterator[VaultSession]:
        """A token that we got is revoked afterwards, whatever came of it; one that somebody put into a file stays."""
        session = VaultSession(self._config)
        try:
            session.log_in()
            try:
                yield session
            finally:
                if self._config.login is not VaultLogin.TOKEN:
                    with suppress(KeyreeveError):
                        session.post("auth/token/revoke-self", {}, doing="revoking the token")
        except KeyNotFound as error:
            raise FailedPrecondition(f"{error.detail}; the issuer is {self._path}") from None
        finally:
            session.close()


def _certificate(answer: dict[str, Any]) -> x509.Certificate:
    data = answer.get("data")
    text = data.get("certificate") if isinstance(data, dict) else None
    try:
        return x509.load_pem_x509_certificate(str(text).encode())
    except ValueError:
        raise Unavailable("Vault's answer holds no certificate: check that the mount is a PKI engine") from None
