"""A logged-in connection to one Vault server, by hvac. A request ends within `request_timeout` and comes back as our errors.

Redirects are not followed (a standby's would carry the token to another host), and no setting of the environment is taken: neither
VAULT_* nor a proxy. Loads hvac: only a process that reaches Vault imports it.
"""

from __future__ import annotations

import threading
import time
from collections.abc import Callable
from contextlib import suppress
from typing import Any

import requests
from hvac.adapters import JSONAdapter

from keyreeve_common.errors import Internal, KeyreeveError, VaultAccessDenied
from keyreeve_common.vault.config import VaultConfig
from keyreeve_common.vault.errors import error_of_answer, misread, tls_failed, too_slow, unreachable
from keyreeve_common.vault.login import TokenKeeper

JsonObject = dict[str, Any]
_MIN_TIMEOUT = 0.05
_TRIES = 2
_MAX_ANSWER_BYTES = 4 * 1024 * 1024
_CHUNK_BYTES = 65_536
_LONGEST_SLEEP = 1.0  # a log-in by the other thread may have brought a lease that is due sooner


class VaultSession:
    """Safe to use from one thread; `keep_alive` starts another that renews the token while there is no work."""

    def __init__(self, config: VaultConfig, *, clock: Callable[[], float] = time.monotonic) -> None:
        self._config = config
        self._connection = _connection(config)
        self._renewing = _connection(config)  # a requests.Session is not to be shared between threads
        self._clock = clock
        self._limit = config.request_timeout.total_seconds()
        self._keeper = TokenKeeper(config, self._post_for_keeper, clock=clock)
        self._ended = threading.Event()

    def log_in(self) -> None:
        """Raises: VaultAccessDenied, TokenUnavailable, RateLimited."""
        self._keeper.token()

    def keep_alive(self) -> None:
        """From now on the token is renewed when two thirds of its lease have passed, also between requests."""
        threading.Thread(target=self._renew_forever, name="vault-renewal", daemon=True).start()

    def close(self) -> None:
        self._ended.set()
        for adapter in (self._connection, self._renewing):
            adapter.close()

    def get(self, path: str, *, doing: str) -> JsonObject:
        """The answer's object, empty where Vault gives none. Raises: KeyNotFound and as `log_in`."""
        return self._call("get", path, None, doing)

    def post(self, path: str, body: JsonObject, *, doing: str) -> JsonObject:
        return self._call("post", path, body, doing)

    def delete(self, path: str, *, doing: str) -> JsonObject:
        return self._call("delete", path, None, doing)

    def refusal(self, path: str, body: JsonObject, *, doing: str) -> str:
        """The error texts, in lower case, of a request that Vault finds fault with; "" if it finds none. Raises: as `log_in`."""
        try:
            self.post(path, body, doing=doing)
        except RefusedRequest as error:
            return error.texts.lower()
        return ""

    def _call(self, method: str, path: str, body: JsonObject | None, doing: str) -> JsonObject:
        end = self._clock() + self._limit
        token = self._keeper.token()
        try:
            return self._request(
                self._connection, method, path, token=token, body=body, doing=doing, seconds=end - self._clock()
            )
        except VaultAccessDenied:
            # A token that ended or was revoked gets the same answer as a policy that forbids: ask Vault which of them it is.
            if self._is_alive(token, end):
                raise
        fresh = self._keeper.replace(token)
        return self._request(
            self._connection, method, path, token=fresh, body=body, doing=doing, seconds=end - self._clock()
        )

    def _is_alive(self, token: str, end: float) -> bool:
        try:
            self._request(
                self._connection,
                "get",
                "auth/token/lookup-self",
                token=token,
                body=None,
                doing="checking the token",
                seconds=end - self._clock(),
            )
        except VaultAccessDenied:
            return False
        except KeyreeveError:
            return True
        return True

    def _post_for_keeper(
        self, method: str, path: str, *, token: str, body: JsonObject | None, doing: str
    ) -> JsonObject:
        renewal = threading.current_thread().name == "vault-renewal"
        connection = self._renewing if renewal else self._connection
        return self._request(connection, method, path, token=token, body=body, doing=doing, seconds=self._limit)

    def _request(
        self,
        connection: Any,
        method: str,
        path: str,
        *,
        token: str,
        body: JsonObject | None,
        doing: str,
        seconds: float,
    ) -> JsonObject:
        """Every exception of requests ends here, with its text: that may hold what was sent."""
        end = self._clock() + seconds
        kwargs: JsonObject = {} if body is None else {"json": body}
        answer: Any = None
        failure = unreachable(doing)
        # A server that restarted has closed the connection that we kept; each request of ours may be put twice.
        for _ in range(_TRIES):
            left = end - self._clock()
            if left <= 0:
                raise too_slow(doing, self._limit)
            connection.token = token or None
            try:
                answer = connection.request(
                    method, f"/v1/{path}", raise_exception=False, timeout=max(left, _MIN_TIMEOUT), **kwargs
                )
                break
            except requests.exceptions.SSLError:
                failure = tls_failed(doing)
                break
            except requests.exceptions.Timeout:
                failure = too_slow(doing, self._limit)
                break
            except (requests.exceptions.RequestException, OSError):
                failure = unreachable(doing)
            except (ValueError, RecursionError):
                failure = misread(doing)
                break
            finally:
                connection.token = None
        if answer is None:
            raise failure
        return _object_of(answer, path, doing)

    def _renew_forever(self) -> None:
        while not self._ended.is_set():
            due = self._keeper.seconds_until_due()
            if due is not None and due <= 0:
                with suppress(KeyreeveError):  # whoever needs the token is told why there is none
                    self._keeper.token()
                due = None
            self._ended.wait(_LONGEST_SLEEP if due is None else min(due + 0.01, _LONGEST_SLEEP))


class _BoundedSession(requests.Session):
    """Reads no longer answer than _MAX_ANSWER_BYTES, also when they are compressed, and none for longer than the time-out."""

    def send(self, request: requests.PreparedRequest, **kwargs: Any) -> requests.Response:
        """Raises: ValueError for what is too long; Timeout."""
        end = time.monotonic() + float(kwargs.get("timeout") or 0.0)
        answer = super().send(request, **{**kwargs, "stream": True})
        content = bytearray()
        try:
            for chunk in answer.iter_content(_CHUNK_BYTES):
                content += chunk
                if len(content) > _MAX_ANSWER_BYTES:
                    raise ValueError("the answer is too long")
                if time.monotonic() > end:
                    raise requests.exceptions.ReadTimeout
        except BaseException:
            answer.close()
            raise
        answer._content = bytes(content)  # what `content` and `json()` read
        return answer


def _connection(config: VaultConfig) -> Any:
    session = _BoundedSession()
    session.trust_env = False
    session.verify = str(config.ca_file) if config.ca_file else True
    return JSONAdapter(
        base_uri=config.address.rstrip("/"),
        session=session,
        verify=session.verify,
        namespace=config.namespace or None,
        allow_redirects=False,
    )


def _object_of(answer: Any, path: str, doing: str) -> JsonObject:
    """hvac gives the object of a 200, and the response itself of all else. Raises: what the answer means to us."""
    if isinstance(answer, dict):
        return answer
    if not hasattr(answer, "status_code"):  # hvac gives the JSON of a 200, whatever it is
        raise misread(doing)
    status = answer.status_code
    if status == requests.codes.no_content:
        return {}
    if status == requests.codes.ok:
        raise misread(doing)
    texts, batch = _errors_of(answer)
    if batch is not None:
        return batch
    if status == requests.codes.bad_request and path.endswith(
        "/login"
    ):  # AppRole's word for a secret_id that is not valid
        status = requests.codes.forbidden
    failure = error_of_answer(status, texts, doing)
    if status == requests.codes.bad_request and type(failure) is Internal:
        raise RefusedRequest(failure.detail, texts)
    raise failure


class RefusedRequest(Internal):
    """Vault found fault with a request. `texts` is for whoever knows what it sent; it is not shown, since it may quote that."""

    def __init__(self, detail: str, texts: str) -> None:
        super().__init__(detail)
        self.texts = texts


def _errors_of(answer: Any) -> tuple[str, JsonObject | None]:
    """The error texts; and the results of a batch whose items failed in part, where a server answers that with 400."""
    try:
        content = answer.json()
    except (ValueError, RecursionError):
        return "", None
    if not isinstance(content, dict):
        return "", None
    data, texts = content.get("data"), content.get("errors")
    batch = content if isinstance(data, dict) and "batch_results" in data else None
    return " ".join(map(str, texts)) if isinstance(texts, list) else "", batch
