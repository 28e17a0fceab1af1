"""What signer, launcher and worker say about starting workers comes back as it was, and nothing foreign is taken for it."""

from __future__ import annotations

from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st
from keyreeve_common.errors import ConfigInvalid, MalformedFrame, TokenUnavailable
from keyreeve_keyserver.backends import launch
from keyreeve_keyserver.domain.secret import Secret

PROGRAM = "keyreeve_keyserver.backends.pkcs11_worker"
NAMES = st.text("abc-", min_size=1, max_size=20)
NUMBERS = st.integers(0, 2**31)
SETTINGS = st.dictionaries(NAMES, st.one_of(NAMES, NUMBERS, st.booleans()), max_size=4)
SPECS = st.builds(
    launch.WorkerSpec,
    NAMES,
    st.just(PROGRAM),
    SETTINGS,
    st.dictionaries(NAMES, NAMES.map(lambda name: Path("/") / name), max_size=3),
)
ORDERS = st.one_of(
    st.builds(launch.Prepare, st.lists(SPECS, max_size=3).map(tuple)),
    st.builds(launch.Spawn, NUMBERS, NAMES),
    st.builds(launch.Kill, NUMBERS),
)


@given(ORDERS)
def test_orders_come_back(order: launch.Order) -> None:
    assert launch.parse_order(launch.order_bytes(order)) == order


@given(st.one_of(st.just(launch.Ready()), st.builds(launch.Spawned, NUMBERS, NUMBERS)))
def test_reports_come_back(report: launch.Report) -> None:
    assert launch.parse_report(launch.report_bytes(report)) == report


@pytest.mark.parametrize("error", [TokenUnavailable("pin_file is missing"), ConfigInvalid("run: chmod 600 pin")])
def test_refusals_come_back(error: TokenUnavailable | ConfigInvalid) -> None:
    report = launch.parse_report(launch.report_bytes(launch.Refused(7, error)))
    assert isinstance(report, launch.Refused)
    assert (report.number, type(report.error), report.error.detail) == (7, type(error), error.detail)


@given(SETTINGS, st.dictionaries(NAMES, st.binary(max_size=100), max_size=3))
def test_the_start_of_a_worker_comes_back(settings: dict[str, object], secrets: dict[str, bytes]) -> None:
    start = launch.WorkerStart(settings, {name: Secret(value) for name, value in secrets.items()})
    again = launch.parse_worker_start(start.to_bytes())
    assert again.settings == settings
    assert {name: secret.reveal() for name, secret in again.secrets.items()} == secrets


def test_a_secret_does_not_show_in_the_start_of_a_worker() -> None:
    start = launch.WorkerStart({}, {"pin_file": Secret(b"12345678")})
    assert "12345678" not in repr(start)
    with pytest.raises(MalformedFrame, match="no token_file"):
        start.secret("token_file")


@pytest.mark.parametrize(
    "data",
    [
        b"",
        b"[]",
        b'{"op":"exec","path":"/bin/sh"}',
        b'{"op":"spawn","number":1}',
        b'{"op":"spawn","number":true,"backend":"hsm"}',
        b'{"op":"kill","pid":"1"}',
        b'{"op":"kill","pid":1,"signal":9}',
        b'{"op":"prepare","workers":["hsm"]}',
        b'{"op":"prepare","workers":[{"backend":"b","program":"os","secret_files":{},"settings":{}}]}',
        b'{"op":"prepare","workers":[{"backend":"b","program":"keyreeve_keyserver.signer","secret_files":{},"settings":{}}]}',
    ],
)
def test_foreign_orders_are_refused(data: bytes) -> None:
    with pytest.raises(MalformedFrame):
        launch.parse_order(data)


@given(st.binary(max_size=200))
def test_junk_is_no_message(data: bytes) -> None:
    for parse in (launch.parse_order, launch.parse_report, launch.parse_worker_start):
        with pytest.raises(MalformedFrame):
            parse(data)
