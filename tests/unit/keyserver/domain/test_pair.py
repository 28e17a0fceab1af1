"""What is a pair's own: the first has all as configured, the shares of all make the whole."""

from __future__ import annotations

from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st
from keyreeve_common.errors import ConfigInvalid
from keyreeve_keyserver.domain.pair import MAX_PAIRS, Pair, parse_pair


def test_the_first_pair_has_everything_as_configured() -> None:
    for pair in (Pair(), Pair(1, 8)):
        assert pair.path(Path("/run/admin.sock")) == Path("/run/admin.sock")
        assert pair.name("host") == "host"
        assert pair.address("127.0.0.1:9464") == "127.0.0.1:9464"


def test_the_others_have_it_with_their_number() -> None:
    pair = parse_pair("3/8")
    assert pair.path(Path("/run/admin.sock")) == Path("/run/admin-3.sock")
    assert pair.path(Path("/var/audit")) == Path("/var/audit-3")
    assert (pair.name("host"), pair.name("")) == ("host-3", "")
    assert pair.address("[::1]:9464") == "[::1]:9466"


@given(st.integers(1, MAX_PAIRS), st.integers(0, 10_000))
def test_shares_make_the_whole_and_nobody_goes_without(count: int, total: int) -> None:
    shares = [Pair(number, count).share(total) for number in range(1, count + 1)]
    assert sum(shares) == max(total, count)
    assert max(shares) - min(shares) <= 1


@pytest.mark.parametrize(
    "text", ["", "1", "0/1", "3/2", "1/65", "1/0", "1/2/3", "01/2", "a/b", "-1/2", " 1/2", "1/2\n"]
)
def test_what_names_no_pair_is_refused(text: str) -> None:
    with pytest.raises(ConfigInvalid):
        parse_pair(text)
