"""Traces of a running key server, at a real OTLP receiver: the caller's trace goes on through front end and signer."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import grpc
import pytest
from keyreeve_common.trace import make_trace, pack_trace, request_id_of
from keyreeve_testing.keyserver import KeyServerRig
from keyreeve_testing.otlp import OtlpReceiver
from keyreeve_testing.pki import Svid
from keyreeve_testing.softhsm import make_softhsm_token, softhsm_is_installed

TRACE_ID, SPAN_ID = 0x0AF7651916CD43DD8448EB211C80319C, 0x00F067AA0BA902B7
SIGNER_STEPS = {"signer.judge", "signer.backend", "signer.record"}


@pytest.fixture(scope="module")
def receiver() -> Iterator[OtlpReceiver]:
    with OtlpReceiver() as receiver:
        yield receiver


@pytest.fixture(scope="module")
def rig(tmp_path_factory: pytest.TempPathFactory, receiver: OtlpReceiver) -> Iterator[KeyServerRig]:
    extra = f'[telemetry]\notlp_endpoint = "{receiver.endpoint}"\n'
    with KeyServerRig(tmp_path_factory.mktemp("ks"), extra=extra).running() as running:
        yield running


@pytest.fixture(scope="module")
def agent(rig: KeyServerRig) -> Svid:
    return rig.pki.svid("keyreeve/agent/a")


@pytest.fixture(scope="module")
def key_id(rig: KeyServerRig, agent: Svid) -> str:
    key = rig.create_key("traced")
    rig.grant(key.key_id, agent.spiffe_id)
    with rig.caller(agent) as caller:
        caller.sign(key.key_id)  # so that the key is loaded, and what follows is one pass
    return key.key_id


def test_a_traced_request_shows_each_step(rig: KeyServerRig, agent: Svid, key_id: str, receiver: OtlpReceiver) -> None:
    with rig.caller(agent) as caller:
        caller.sign(key_id, trace=pack_trace(TRACE_ID, SPAN_ID))
    spans = receiver.spans_of(f"{TRACE_ID:032x}", {"keyserver.sign", *SIGNER_STEPS})
    whole = spans["keyserver.sign"]
    assert whole.service == "keyreeve-keyserver"
    assert whole.parent_id == f"{SPAN_ID:016x}"
    assert whole.attributes["keyreeve.purpose"] == "tls13_server_verify"
    assert not whole.error
    for name in SIGNER_STEPS:
        assert spans[name].parent_id == whole.span_id
        assert spans[name].start_ns <= spans[name].end_ns
    assert spans["signer.backend"].attributes["keyreeve.detail"] == "software"
    assert spans["signer.judge"].start_ns <= spans["signer.backend"].start_ns <= spans["signer.record"].start_ns


def test_a_refusal_is_an_error_of_its_span(rig: KeyServerRig, agent: Svid, key_id: str, receiver: OtlpReceiver) -> None:
    with rig.caller(agent) as caller, pytest.raises(grpc.RpcError):
        caller.sign(key_id, message=b"no handshake", trace=pack_trace(TRACE_ID + 1, SPAN_ID))
    assert receiver.spans_of(f"{TRACE_ID + 1:032x}", {"keyserver.sign"})["keyserver.sign"].error == "purpose_mismatch"


def test_what_the_caller_does_not_trace_is_not_traced(
    rig: KeyServerRig, agent: Svid, key_id: str, receiver: OtlpReceiver
) -> None:
    untraced = make_trace()
    with rig.caller(agent) as caller:
        caller.sign(key_id, trace=untraced)
        caller.sign(key_id, trace=pack_trace(TRACE_ID + 2, SPAN_ID))
    receiver.spans_of(f"{TRACE_ID + 2:032x}", {"keyserver.sign"})
    assert request_id_of(untraced) not in receiver.trace_ids


@pytest.mark.softhsm
@pytest.mark.skipif(not softhsm_is_installed(), reason="softhsm2 is not installed")
def test_a_trace_reaches_the_token(tmp_path: Path, receiver: OtlpReceiver) -> None:
    extra = f'[telemetry]\notlp_endpoint = "{receiver.endpoint}"\n'
    token = make_softhsm_token(tmp_path / "softhsm")
    with KeyServerRig(tmp_path / "ks", extra=extra, token=token, default_backend="hsm").running() as rig:
        agent = rig.pki.svid("keyreeve/agent/a")
        key = rig.create_key("in-token")
        rig.grant(key.key_id, agent.spiffe_id)
        with rig.caller(agent) as caller:
            caller.sign(key.key_id)
            caller.sign(key.key_id, trace=pack_trace(TRACE_ID + 3, SPAN_ID))
        spans = receiver.spans_of(f"{TRACE_ID + 3:032x}", {"keyserver.sign", "backend.token", *SIGNER_STEPS})
    backend, token_call = spans["signer.backend"], spans["backend.token"]
    assert backend.attributes["keyreeve.detail"] == "hsm"
    assert backend.start_ns <= token_call.start_ns <= token_call.end_ns <= backend.end_ns + 1_000_000
    assert token_call.parent_id == spans["keyserver.sign"].span_id


def test_a_receiver_that_is_away_costs_no_signature(tmp_path: Path) -> None:
    extra = '[telemetry]\notlp_endpoint = "http://127.0.0.1:1"\n'
    with KeyServerRig(tmp_path, extra=extra).running() as rig:
        agent = rig.pki.svid("keyreeve/agent/a")
        key = rig.create_key("alone")
        rig.grant(key.key_id, agent.spiffe_id)
        with rig.caller(agent) as caller:
            for number in range(20):
                assert caller.sign(key.key_id, trace=pack_trace(TRACE_ID + number, SPAN_ID))
