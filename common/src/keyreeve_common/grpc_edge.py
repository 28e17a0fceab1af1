"""The gRPC edge: who the peer is, what it may call, and how our errors become statuses and statuses our errors.

Nothing inside a service touches a status code: servicers raise KeyreeveError, clients receive it.
"""

from __future__ import annotations

import re
from collections.abc import AsyncIterator, Awaitable, Callable, Mapping
from contextvars import ContextVar
from dataclasses import dataclass, field
from datetime import UTC, datetime, timedelta
from functools import lru_cache
from time import monotonic
from typing import Any, NoReturn, cast

import grpc
from cryptography import x509

from keyreeve_common.errors import (
    ErrorCode,
    ForeignTrustDomain,
    Internal,
    KeyreeveError,
    PermissionDenied,
    Unauthenticated,
    error_from_code,
)
from keyreeve_common.identity import SpiffeId, TrustDomain
from keyreeve_common.telemetry import log_exception, log_warning
from keyreeve_common.v1 import types_pb2
from keyreeve_common.x509_svid import X509Svid, parse_x509_svid

ERROR_CODE_TRAILER = "keyreeve-error-code"
RETRY_AFTER_TRAILER = "keyreeve-retry-after-ms"
_RETRY_MS = re.compile(r"\d{1,9}", re.ASCII)
LOCAL = "local"  # in `allow` tables: whoever may open the service's own Unix socket
ANYONE = "anyone"  # in `allow` tables: whoever may connect

# What the two ends of a connection must agree on. A client pings a quiet connection every KEEPALIVE_MS for as long as a call is open on it, and
# gives it up KEEPALIVE_TIMEOUT_MS later, so that a peer that vanished is missed after 35 seconds at most. A server hangs up on a client that
# pings more often than it allows, by default every 5 minutes: one that is to allow these starts with SERVER_PING_OPTIONS.
MAX_MESSAGE_BYTES = 64 * 1024 * 1024  # gRPC's own limit of 4 MiB is about 2,000 assignments
KEEPALIVE_MS = 30_000
KEEPALIVE_TIMEOUT_MS = 5_000
MIN_PING_INTERVAL_MS = 10_000
SERVER_PING_OPTIONS = (
    ("grpc.keepalive_permit_without_calls", 1),
    (
        "grpc.http2.min_ping_interval_without_data_ms",
        MIN_PING_INTERVAL_MS,
    ),  # "min_recv_ping_interval..." names only C's macro
)

# RPC frameworks are untyped at this point: handlers, requests and contexts are `Any` here and nowhere else.
Handler = Any
Context = Any


@dataclass(frozen=True, slots=True)
class Peer:
    """Who calls: an SVID's holder (`svid` set), the local operator (`local`), or somebody unknown."""

    svid: X509Svid | None = None
    local: bool = False

    @property
    def spiffe_id(self) -> SpiffeId | None:
        return self.svid.spiffe_id if self.svid else None

    @property
    def name(self) -> str:
        """For logs and records."""
        if self.svid is not None:
            return str(self.svid.spiffe_id)
        return LOCAL if self.local else ANYONE

    def require_svid(self, now: datetime) -> X509Svid:
        """The caller's SVID, checked against the clock; a long stream asks again for each batch.

        Raises: Unauthenticated, SvidExpired.
        """
        if self.svid is None:
            raise Unauthenticated("this call needs an X.509-SVID")
        self.svid.check_time(now)
        return self.svid


_current_peer: ContextVar[Peer] = ContextVar("keyreeve_peer")


def current_peer() -> Peer:
    """The peer of the RPC that this task serves."""
    return _current_peer.get()


@lru_cache(maxsize=4096)
def _svid_of_pem(pem: bytes) -> X509Svid:
    return parse_x509_svid(x509.load_pem_x509_certificate(pem))


def peer_of(context: Context) -> Peer:
    """The peer as the transport proved it. Raises: SvidInvalid when its certificate is no leaf SVID (X5-07, X5-17)."""
    if str(context.peer()).startswith("unix:"):
        return Peer(local=True)
    pems = context.auth_context().get("x509_pem_cert", ())
    return Peer(svid=_svid_of_pem(bytes(pems[0]))) if pems else Peer()


def _utc_now() -> datetime:
    return datetime.now(UTC)


OnEnd = Callable[[str, str, float], None]


def _no_one(_method: str, _code: str, _seconds: float) -> None:
    return


@dataclass(frozen=True)
class EdgeInterceptor(grpc.aio.ServerInterceptor):
    """Holds every RPC to its callers and renders every error.

    `allow` maps a service or a method path ("/keyreeve.ca.v1.Entries/" or "/keyreeve.ca.v1.Entries/ListEntries", the longest match
    counts) to callers: SPIFFE IDs, SPIFFE ID prefixes that end in "/*", LOCAL, ANYONE. A path that is not in the table is refused.
    Adapters raise our errors; any other exception is Internal to the caller, and its text stands in the log only. `on_end` hears of each call
    that ended: its service and method, "ok" or an error code, and the seconds that it took.
    """

    trust_domain: Callable[[], TrustDomain | None]
    allow: Mapping[str, tuple[str, ...]]
    clock: Callable[[], datetime] = field(default=_utc_now)
    on_end: OnEnd = field(default=_no_one)
    on_not_admitted: Callable[[str, str, KeyreeveError], None] | None = None
    """Told of each call that is refused before its service sees it: method, caller as far as known, why."""

    async def intercept_service(
        self, continuation: Callable[[Any], Awaitable[Handler]], handler_call_details: Any
    ) -> Handler:
        handler = await continuation(handler_call_details)
        if handler is None:
            return None
        method = str(handler_call_details.method)
        if handler.response_streaming:
            wrapped = self._wrap_stream(method, handler.stream_stream or handler.unary_stream)
            make = (
                grpc.stream_stream_rpc_method_handler
                if handler.request_streaming
                else grpc.unary_stream_rpc_method_handler
            )
        else:
            wrapped = self._wrap_unary(method, handler.stream_unary or handler.unary_unary)
            make = (
                grpc.stream_unary_rpc_method_handler
                if handler.request_streaming
                else grpc.unary_unary_rpc_method_handler
            )
        return make(wrapped, handler.request_deserializer, handler.response_serializer)

    def _wrap_unary(self, method: str, inner: Handler) -> Handler:
        async def call(request: object, context: Context) -> object:
            began = monotonic()
            try:
                self._admit_or_report(method, context)
                answer = await inner(request, context)
            except Exception as error:
                self.on_end(_short(method), _code_of(error), monotonic() - began)
                await self._abort(method, context, error)
            self.on_end(_short(method), "ok", monotonic() - began)
            return answer

        return call

    def _wrap_stream(self, method: str, inner: Handler) -> Handler:
        async def call(request: object, context: Context) -> AsyncIterator[object]:
            began = monotonic()
            try:
                self._admit_or_report(method, context)
                async for answer in inner(request, context):
                    yield answer
            except Exception as error:
                self.on_end(_short(method), _code_of(error), monotonic() - began)
                await self._abort(method, context, error)
            self.on_end(_short(method), "ok", monotonic() - began)

        return call

    def _admit_or_report(self, method: str, context: Context) -> None:
        try:
            self._admit(method, context)
        except KeyreeveError as error:
            if self.on_not_admitted is not None:
                self.on_not_admitted(method, _peer_name(context), error)
            raise

    def _admit(self, method: str, context: Context) -> None:
        peer = peer_of(context)
        callers = self._callers_of(method)
        if not (ANYONE in callers or (peer.local and LOCAL in callers)):
            svid = peer.require_svid(self.clock())
            own = self.trust_domain()
            if own is None or not svid.spiffe_id.member_of(own):
                raise ForeignTrustDomain(f"SVID is of trust domain {svid.spiffe_id.trust_domain}, expected is {own}")
            if not any(_matches(str(svid.spiffe_id), caller) for caller in callers):
                raise PermissionDenied(f"{svid.spiffe_id} may not call {method.rsplit('/', 1)[-1]}")
        _current_peer.set(peer)

    def _callers_of(self, method: str) -> tuple[str, ...]:
        service = method[: method.rfind("/") + 1]
        return self.allow.get(method, self.allow.get(service, ()))

    async def _abort(self, method: str, context: Context, error: Exception) -> NoReturn:
        if isinstance(error, grpc.aio.AbortError):
            raise error
        if isinstance(error, KeyreeveError):
            shown = error
            log_warning(
                "rpc_refused", method=method, peer=_peer_name(context), code=shown.code.value, detail=shown.detail
            )
        else:
            log_exception("rpc_failed", method=method, peer=_peer_name(context))
            shown = Internal("internal error; the server's log has the cause")
        trailers = [(ERROR_CODE_TRAILER, shown.code.value)]
        if shown.retry_after is not None:
            trailers.append((RETRY_AFTER_TRAILER, str(_milliseconds(shown.retry_after))))
        await context.abort(grpc.StatusCode[shown.rendering.grpc], shown.detail, tuple(trailers))
        raise AssertionError("abort returned")


def _short(method: str) -> str:
    """ "Entries/CreateEntry" of "/keyreeve.ca.v1.Entries/CreateEntry"."""
    return method.rpartition(".")[2]


def _code_of(error: Exception) -> str:
    return error.code.value if isinstance(error, KeyreeveError) else ErrorCode.INTERNAL.value


def _peer_name(context: Context) -> str:
    try:
        return peer_of(context).name
    except (KeyreeveError, ValueError):
        return "invalid"


def _matches(spiffe_id: str, caller: str) -> bool:
    return spiffe_id.startswith(caller[:-1]) if caller.endswith("/*") else spiffe_id == caller


def _milliseconds(duration: timedelta) -> int:
    return max(1, round(duration / timedelta(milliseconds=1)))


_CODE_OF_STATUS = {
    grpc.StatusCode.DEADLINE_EXCEEDED: ErrorCode.DEADLINE_EXCEEDED,
    grpc.StatusCode.UNAUTHENTICATED: ErrorCode.UNAUTHENTICATED,
    grpc.StatusCode.PERMISSION_DENIED: ErrorCode.PERMISSION_DENIED,
    grpc.StatusCode.RESOURCE_EXHAUSTED: ErrorCode.RATE_LIMITED,
    grpc.StatusCode.UNIMPLEMENTED: ErrorCode.INVALID_REQUEST,
    grpc.StatusCode.INTERNAL: ErrorCode.INTERNAL,
    grpc.StatusCode.UNKNOWN: ErrorCode.INTERNAL,
}


def error_from_rpc(error: grpc.RpcError) -> KeyreeveError:
    """Our error for a failed call: by the trailer that our servers send, else by status (the transport's own failures are Unavailable)."""
    call = cast("Any", error)
    detail = str(call.details() or call.code().name)
    named = error_from_trailers(call.trailing_metadata(), detail)
    return named or error_from_code(_CODE_OF_STATUS.get(call.code(), ErrorCode.UNAVAILABLE).value, detail)


def error_from_trailers(metadata: Any, detail: str) -> KeyreeveError | None:
    """The error that one of our servers named in its trailers; None when it named none."""
    trailers = dict(metadata or ())
    if ERROR_CODE_TRAILER not in trailers:
        return None
    retry_ms = str(trailers.get(RETRY_AFTER_TRAILER, ""))
    retry_after = timedelta(milliseconds=int(retry_ms)) if _RETRY_MS.fullmatch(retry_ms) else None
    return error_from_code(str(trailers[ERROR_CODE_TRAILER]), detail, retry_after)


def error_to_proto(error: KeyreeveError) -> types_pb2.Error:
    message = types_pb2.Error(code=error.code.value, detail=error.detail)
    if error.retry_after is not None:
        message.retry_after.FromTimedelta(error.retry_after)
    return message


def error_from_proto(message: types_pb2.Error) -> KeyreeveError:
    return error_from_code(message.code, message.detail, _retry_after(message))


def _retry_after(message: types_pb2.Error) -> timedelta | None:
    """None where there is none, or the peer said what is no time to wait."""
    try:
        retry_after = message.retry_after.ToTimedelta() if message.HasField("retry_after") else None
    except (ValueError, OverflowError):
        return None
    return retry_after if retry_after is None or retry_after > timedelta(0) else None
