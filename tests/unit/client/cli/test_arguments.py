from __future__ import annotations

from datetime import UTC, datetime

import pytest
import typer
from keyreeve_client.cli import arguments
from keyreeve_common.schemes import KeyType
from keyreeve_common.v1 import types_pb2

NOW = datetime(2030, 1, 1, tzinfo=UTC)


def test_a_selector_keeps_the_colons_of_its_value() -> None:
    selector = arguments.selector("unix:path:/usr/sbin/nginx")
    assert (selector.type, selector.value) == ("unix", "path:/usr/sbin/nginx")


@pytest.mark.parametrize("text", ["", "unix", "unix:", ":uid"])
def test_what_is_no_selector_is_named(text: str) -> None:
    with pytest.raises(typer.BadParameter, match="is not a selector"):
        arguments.selector(text)


def test_a_delegate_is_a_spiffe_id_or_selectors() -> None:
    assert arguments.delegate("spiffe://a.test/proxy").spiffe_id == "spiffe://a.test/proxy"
    both = arguments.delegate("unix:user:www-data,unix:path:/usr/sbin/nginx")
    assert [selector.value for selector in both.selectors] == ["user:www-data", "path:/usr/sbin/nginx"]
    assert not both.spiffe_id


def test_an_expiry_is_a_time_or_a_while_from_now() -> None:
    at = arguments.expiry_proto("2030-06-01T14:00:00+02:00")
    after = arguments.expiry_proto("36h", now=NOW)
    assert at is not None
    assert after is not None
    assert at.ToJsonString() == "2030-06-01T12:00:00Z"
    assert after.ToJsonString() == "2030-01-02T12:00:00Z"
    assert arguments.expiry_proto(None) is None


@pytest.mark.parametrize("text", ["2030-01-01T00:00:00", "2030-13-01T00:00:00Z", "tomorrow", "5", "-3h"])
def test_a_wrong_expiry_is_a_usage_error(text: str) -> None:
    with pytest.raises(typer.BadParameter):
        arguments.expiry_proto(text)


@pytest.mark.parametrize("key_type", list(KeyType))
def test_every_key_type_has_its_proto(key_type: KeyType) -> None:
    assert arguments.key_type(key_type) != types_pb2.KEY_TYPE_UNSPECIFIED


def test_purposes_are_checked_by_name() -> None:
    assert arguments.purposes(["tls13_server_verify"]) == [types_pb2.PURPOSE_TLS13_SERVER_VERIFY]
    with pytest.raises(typer.BadParameter, match="unknown purpose"):
        arguments.purposes(["unspecified"])


@pytest.mark.parametrize(
    ("text", "burst", "per_second", "wanted"),
    [("500/s", 1000, 500.0, 1000), ("30/m", None, 0.5, 60), ("1/h", None, 1 / 3600, 2)],
)
def test_a_rate_is_a_number_in_a_unit_of_time(text: str, burst: int | None, per_second: float, wanted: int) -> None:
    rate = arguments.rate_proto(text, burst)
    assert rate is not None
    assert (rate.per_second, rate.burst) == (per_second, wanted)


@pytest.mark.parametrize(("text", "burst"), [("500", None), ("0/s", None), ("5/d", None), ("-5/s", None), (None, 7)])
def test_a_wrong_rate_is_a_usage_error(text: str | None, burst: int | None) -> None:
    with pytest.raises(typer.BadParameter, match="rate"):
        arguments.rate_proto(text, burst)


def test_a_jwt_profile_stands_with_its_purpose_alone() -> None:
    profile = arguments.jwt_profile(["jwt_svid"], "a.test", "5m")
    assert profile is not None
    assert (profile.trust_domain, profile.max_ttl.seconds) == ("a.test", 300)
    assert arguments.jwt_profile(["tls13_server_verify"], "", "") is None
    for purposes, domain, ttl in (
        (["jwt_svid"], "", "5m"),
        (["jwt_svid"], "a.test", ""),
        ([], "a.test", ""),
        ([], "", "5m"),
    ):
        with pytest.raises(typer.BadParameter, match="jwt_svid"):
            arguments.jwt_profile(purposes, domain, ttl)
    with pytest.raises(typer.BadParameter):
        arguments.jwt_profile(["jwt_svid"], "Not A Domain", "5m")
