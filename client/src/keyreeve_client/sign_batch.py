"""Many signatures by one blocking call: a SignStream that lives as long as the call.

For issuance, which has all its messages at hand; who has one message at a time takes `sign_client`. One item's refusal is that item's result.
Nothing is sent twice here: what has no answer when the stream ends or the time is over fails as Unavailable, and may be asked for elsewhere.

Spec: common/proto/keyreeve_common/v1/keyserver.proto, SignStream.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from datetime import timedelta
from typing import Any, TypeAlias, cast

import grpc
from keyreeve_common.errors import Internal, KeyreeveError, MessageTooLarge, Unavailable
from keyreeve_common.grpc_edge import error_from_proto, error_from_rpc
from keyreeve_common.purposes import MAX_MESSAGE_BYTES, Purpose
from keyreeve_common.schemes import SignatureScheme
from keyreeve_common.sign_socket import MAX_SIGNATURE_BYTES
from keyreeve_common.v1 import keyserver_pb2, keyserver_pb2_grpc

from keyreeve_client.sign_client import MAX_BATCH_BYTES, MAX_BATCH_ITEMS

Signed: TypeAlias = bytes | KeyreeveError
"""A signature, or why there is none."""


def sign_batch(
    channel: grpc.Channel,
    key_id: str,
    scheme: SignatureScheme,
    purpose: Purpose,
    *,
    messages: Sequence[bytes],
    deadline: timedelta,
) -> list[Signed]:
    """One result for each whole message, in their order; signatures are not verified here.

    An error that ends the stream is the result of all that had no answer before. Raises: nothing of the key server's.
    """
    results: list[Signed | None] = [None] * len(messages)
    items: list[keyserver_pb2.SignItem] = []
    deadline_ms = int(deadline / timedelta(milliseconds=1))
    for number, message in enumerate(messages):
        if len(message) > MAX_MESSAGE_BYTES:
            results[number] = MessageTooLarge(f"message has {len(message)} bytes, at most {MAX_MESSAGE_BYTES}")
            continue
        items.append(
            keyserver_pb2.SignItem(
                id=number,
                key_id=key_id,
                scheme=scheme,
                purpose=cast("Any", int(purpose)),
                message=message,
                deadline_ms=deadline_ms,
            )
        )
    failure = _collect(channel, items, results, deadline) if items else None
    missing = failure or Unavailable("key server ended the stream without an answer for this item")
    return [missing if result is None else result for result in results]


def _collect(
    channel: grpc.Channel, items: Sequence[keyserver_pb2.SignItem], results: list[Signed | None], deadline: timedelta
) -> KeyreeveError | None:
    """Fills in what the key server answers; why it stopped to answer, where it did."""
    call = keyserver_pb2_grpc.SigningStub(channel).SignStream(_batches(items), timeout=deadline.total_seconds())
    try:
        for answer in call:
            for result in answer.results:
                if result.id < len(results) and results[result.id] is None:
                    results[result.id] = _result(result)
    except grpc.RpcError as error:
        return error_from_rpc(error)
    finally:
        call.cancel()
    return None


def _batches(items: Sequence[keyserver_pb2.SignItem]) -> Iterator[keyserver_pb2.SignBatch]:
    taken: list[keyserver_pb2.SignItem] = []
    size = 0
    for item in items:
        taken.append(item)
        size += len(item.message)
        if len(taken) == MAX_BATCH_ITEMS or size >= MAX_BATCH_BYTES:
            yield keyserver_pb2.SignBatch(items=taken)
            taken, size = [], 0
    if taken:
        yield keyserver_pb2.SignBatch(items=taken)


def _result(result: keyserver_pb2.SignResult) -> Signed:
    if result.WhichOneof("result") != "signature":
        return error_from_proto(result.error)
    if not 0 < len(result.signature) <= MAX_SIGNATURE_BYTES:
        return Internal(f"key server gave {len(result.signature)} bytes for a signature: that server is faulty")
    return bytes(result.signature)
