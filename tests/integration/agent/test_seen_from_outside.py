"""A running agent seen from outside: its metrics, and the traces that begin with it."""

from __future__ import annotations

import urllib.request
from collections.abc import Callable
from typing import Any

import pytest
from keyreeve_common.errors import KeyreeveError
from keyreeve_common.purposes import Purpose
from keyreeve_common.schemes import SignatureScheme
from keyreeve_common.trace import is_sampled, unpack_trace
from keyreeve_testing.otlp import OtlpReceiver
from keyreeve_testing.processes import free_port
from prometheus_client.parser import text_string_to_metric_families


def refused(world: Any) -> None:
    with world.client() as client, pytest.raises(KeyreeveError):
        client.sign("key-web", SignatureScheme.ECDSA_SECP256R1_SHA256, Purpose.UNSPECIFIED, message=b"no handshake")


def test_metrics_tell_what_was_served(world: Any, until: Callable[..., None]) -> None:
    port = free_port()
    world.extra = f'[telemetry]\nmetrics_listen = "127.0.0.1:{port}"\n'
    world.ca.push(world.assignment())
    world.start()
    world.sign()
    world.sign()
    refused(world)

    def scrape() -> dict[tuple[str, frozenset[str]], float]:
        with urllib.request.urlopen(f"http://127.0.0.1:{port}/metrics", timeout=10) as answer:
            text = answer.read().decode()
        return {
            (sample.name, frozenset(sample.labels.values())): sample.value
            for family in text_string_to_metric_families(text)
            for sample in family.samples
        }

    found = scrape()
    assert found[("keyreeve_agent_requests_total", frozenset({"ok"}))] == 2
    assert found[("keyreeve_agent_requests_total", frozenset({"purpose_mismatch"}))] == 1
    assert found[("keyreeve_agent_request_seconds_count", frozenset())] == 2
    assert found[("keyreeve_agent_svids", frozenset())] == 1
    assert found[("keyreeve_agent_key_servers_available", frozenset())] == 1
    assert found[("keyreeve_agent_ca_connected", frozenset())] == 1
    world.ca.stop()
    until(lambda: scrape()[("keyreeve_agent_ca_connected", frozenset())] == 0)
    world.ca.start()


@pytest.mark.parametrize("share", [1_000_000, 0])
def test_trace_begins_here_and_goes_on_to_the_key_server(world: Any, share: int) -> None:
    with OtlpReceiver() as receiver:
        world.extra = f'[telemetry]\notlp_endpoint = "{receiver.endpoint}"\ntraces_per_million = {share}\n'
        world.ca.push(world.assignment())
        agent = world.start()
        world.sign()
        refused(world)
        agent.terminate()  # sends what is left
        assert [is_sampled(trace) for trace in world.key_server.traces] == [share > 0] * 2
        assert len({trace[:16] for trace in world.key_server.traces}) == 2, "each request has an id of its own"
        if not share:
            assert receiver.trace_ids == set()
            return
        for trace, error in zip(world.key_server.traces, ("", "purpose_mismatch"), strict=True):
            trace_id, span_id = unpack_trace(trace)
            span = receiver.spans_of(f"{trace_id:032x}", {"agent.sign"})["agent.sign"]
            assert (span.service, span.span_id, span.parent_id) == ("keyreeve-agent", f"{span_id:016x}", "")
            assert span.error == error
