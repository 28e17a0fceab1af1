"""Logging in to Vault and keeping the token alive. Loads no network: whoever uses it gives the function that posts.

The token and the secret that it was got with are held in memory alone and shown nowhere; the secret's file is opened at each log-in, so a
secret that was rotated is found. A refused log-in is not repeated at once, for Vault locks out whoever knocks too often.
Spec: Vault API: auth/approle, auth/kubernetes, auth/token.
"""

from __future__ import annotations

import threading
import time
from collections.abc import Callable
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any, Protocol

from keyreeve_common.errors import ConfigInvalid, KeyreeveError, RateLimited, TokenUnavailable, VaultAccessDenied
from keyreeve_common.files import read_secret
from keyreeve_common.telemetry import log, log_warning
from keyreeve_common.vault.config import VaultConfig, VaultLogin

RENEW_AT = 2 / 3
_FIRST_PAUSE = 1.0
_LONGEST_PAUSE = 30.0
_Stamp = tuple[int, int, int]


class Post(Protocol):
    """One request without log-in of its own. Raises: KeyreeveError."""

    def __call__(self, method: str, path: str, *, token: str, body: dict[str, Any] | None, doing: str) -> Any: ...


@dataclass(frozen=True, slots=True)
class Lease:
    """A token and how long it lasts. `renew_at` and `ends_at` None: it never ends. `first_seconds` is what the log-in gave."""

    token: str = field(repr=False)
    renew_at: float | None
    ends_at: float | None
    renewable: bool
    first_seconds: float
    stamp: _Stamp | None = None

    def is_due(self, now: float) -> bool:
        return self.renew_at is not None and now >= self.renew_at

    def is_over(self, now: float) -> bool:
        return self.ends_at is not None and now >= self.ends_at

    def is_shortened(self, now: float) -> bool:
        """At its maximum life a token is given ever shorter leases: then only a new log-in helps."""
        return self.ends_at is not None and (self.ends_at - now) * 2 < self.first_seconds


class TokenKeeper:
    """The one token of this process. Safe to share between the thread that works and the one that renews."""

    def __init__(self, config: VaultConfig, post: Post, *, clock: Callable[[], float] = time.monotonic) -> None:
        self._config = config
        self._post = post
        self._clock = clock
        self._lock = threading.RLock()
        self._lease: Lease | None = None
        self._failure: KeyreeveError | None = None
        self._failed_at = 0.0
        self._failed_stamp: _Stamp | None = None
        self._pause = 0.0

    def token(self) -> str:
        """A token that should be good now: the one we have, renewed where that is due, or a new one.

        Raises: VaultAccessDenied, TokenUnavailable, RateLimited.
        """
        with self._lock:
            lease = self._lease
            if lease is None or lease.is_over(self._clock()):
                return self._log_in().token
            if self._file_changed(lease):
                lease = self._taken_up(lease)
            if lease.is_due(self._clock()):
                lease = self._renewed(lease)
            return lease.token

    def replace(self, refused: str) -> str:
        """Another token than `refused`, which Vault did not accept. Raises: as `token`."""
        with self._lock:
            if self._lease is not None and self._lease.token != refused:
                return self._lease.token
            self._lease = None
            return self._log_in().token

    def seconds_until_due(self) -> float | None:
        """Until the next renewal; None while there is nothing to renew."""
        with self._lock:
            if self._lease is None or self._lease.renew_at is None:
                return None
            return max(self._lease.renew_at - self._clock(), 0.0)

    def _taken_up(self, lease: Lease) -> Lease:
        """With what the file holds now; while that cannot be read or is not accepted (half written, empty), the lease that still lasts."""
        try:
            return self._log_in()
        except KeyreeveError as error:
            if error is self._failure:  # else it is the pause after it that speaks
                log_warning("vault_token_not_renewed", code=error.code.value, detail=error.detail)
            return lease

    def _renewed(self, lease: Lease) -> Lease:
        """The same token with a longer lease, or a new token; the old one as it is where neither can be had and it still lasts."""
        if lease.renewable:
            try:
                answer = self._post(
                    "post", "auth/token/renew-self", token=lease.token, body={}, doing="renewing the token"
                )
                fresh = self._lease_of(answer, stamp=lease.stamp, first=lease.first_seconds)
            except KeyreeveError as error:
                log_warning("vault_token_not_renewed", code=error.code.value, detail=error.detail)
            else:
                if not fresh.is_shortened(self._clock()) or self._config.login is VaultLogin.TOKEN:
                    self._lease = fresh
                    return fresh
        try:
            fresh = self._log_in()
        except KeyreeveError:
            if lease.is_over(self._clock()):
                raise
            fresh = lease
        now = self._clock()
        if fresh.token == lease.token and fresh.ends_at is not None:
            # Not again with the very next request: a third of what is left may pass.
            fresh = replace(fresh, renew_at=now + (fresh.ends_at - now) / 3)
        self._lease = fresh
        return fresh

    def _log_in(self) -> Lease:
        stamp = _stamp(self._config.secret_file)
        waits = self._failure is not None and self._clock() < self._failed_at + self._pause
        if waits and self._failure is not None and stamp == self._failed_stamp:
            raise type(self._failure)(self._failure.detail)
        try:
            lease = self._log_in_now(stamp)
        except KeyreeveError as error:
            self._failure, self._failed_at, self._failed_stamp = error, self._clock(), stamp
            refused = isinstance(error, VaultAccessDenied | RateLimited)
            self._pause = min(max(self._pause * 2, _FIRST_PAUSE), _LONGEST_PAUSE) if refused else 0.0
            raise
        self._lease, self._failure, self._pause = lease, None, 0.0
        log("vault_login", method=self._config.login.value, lease_s=int(lease.first_seconds))
        return lease

    def _log_in_now(self, stamp: _Stamp | None) -> Lease:
        config, secret = self._config, self._read_secret()
        doing = f"logging in to Vault by {config.login.value}"
        if config.login is VaultLogin.TOKEN:
            try:
                looked_up = self._post("get", "auth/token/lookup-self", token=secret, body=None, doing=doing)
            except VaultAccessDenied:
                raise VaultAccessDenied(
                    f"{doing}: Vault does not accept the token in {config.token_file}: put a fresh one there"
                ) from None
            return self._lease_of_file(_object(looked_up, "data"), secret, stamp)
        body = (
            {"role_id": config.role_id, "secret_id": secret}
            if config.login is VaultLogin.APPROLE
            else {"role": config.role, "jwt": secret}
        )
        try:
            answer = self._post("post", f"auth/{config.auth_mount}/login", token="", body=body, doing=doing)
        except TokenUnavailable as error:
            if isinstance(error, VaultAccessDenied):
                raise self._refusal(doing) from None
            raise
        return self._lease_of(answer, stamp=stamp)

    def _refusal(self, doing: str) -> VaultAccessDenied:
        what = (
            f"role_id, or the secret_id in {self._config.secret_id_file}: write a fresh secret_id there"
            if self._config.login is VaultLogin.APPROLE
            else f"the service account token for role {self._config.role}: compare the role's bound names and audience"
        )
        return VaultAccessDenied(f"{doing}: Vault does not accept {what}")

    def _read_secret(self) -> str:
        try:
            # A Kubernetes token is a link into a directory of root's that others may read, so its mode is not ours to refuse.
            if self._config.login is VaultLogin.KUBERNETES:
                secret = self._config.secret_file.read_bytes().strip()
            else:
                secret = read_secret(self._config.secret_file).strip()
            text = secret.decode("ascii")
        except (ConfigInvalid, OSError, UnicodeDecodeError) as error:
            reason = error.detail if isinstance(error, KeyreeveError) else "cannot be read, or is not ASCII"
            raise VaultAccessDenied(f"{self._config.secret_file}: {reason}") from None
        if not text or not text.isprintable() or " " in text:
            raise VaultAccessDenied(f"{self._config.secret_file}: does not hold one word")
        return text

    def _lease_of_file(self, data: dict[str, Any], token: str, stamp: _Stamp | None) -> Lease:
        """How long a token lasts that somebody else made: what is left of it may be short, so it is renewed at once where it can be."""
        lease = self._lease_of({"auth": {**data, "client_token": token}}, stamp=stamp)
        if data.get("expire_time") is None:
            return lease
        now = self._clock()
        ends_at = lease.ends_at or now + 1  # its last second counts as zero
        return replace(lease, ends_at=ends_at, renew_at=now if lease.renewable else lease.renew_at or ends_at)

    def _lease_of(self, answer: Any, *, stamp: _Stamp | None, first: float | None = None) -> Lease:
        auth = _object(answer, "auth")
        token, seconds = auth.get("client_token"), auth.get("lease_duration", auth.get("ttl"))
        if not isinstance(token, str) or not token or not isinstance(seconds, int) or seconds < 0:
            raise TokenUnavailable("Vault's answer to the log-in cannot be read")
        now, renewable = self._clock(), auth.get("renewable") is True
        renew_at, ends_at = (now + seconds * RENEW_AT, now + seconds) if seconds else (None, None)
        return Lease(token, renew_at, ends_at, renewable, first or float(seconds), stamp)

    def _file_changed(self, lease: Lease) -> bool:
        if self._config.login is not VaultLogin.TOKEN:
            return False
        stamp = _stamp(self._config.secret_file)
        return stamp is not None and stamp != lease.stamp


def _object(answer: Any, name: str) -> dict[str, Any]:
    value = answer.get(name) if isinstance(answer, dict) else None
    if not isinstance(value, dict):
        raise TokenUnavailable("Vault's answer to the log-in cannot be read")
    return value


def _stamp(path: Path) -> _Stamp | None:
    try:
        status = path.stat()
    except OSError:
        return None
    return status.st_ino, status.st_mtime_ns, status.st_size
