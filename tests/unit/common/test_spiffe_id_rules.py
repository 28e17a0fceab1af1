"""ID-01 to ID-23 of the conformance list. Every refusal runs a positive control first."""

from __future__ import annotations

import string

import pytest
from hypothesis import given
from hypothesis import strategies as st
from keyreeve_common.errors import InvalidSpiffeId
from keyreeve_common.identity import MAX_ID_BYTES, SpiffeId, TrustDomain

TD_ALPHABET = string.ascii_lowercase + string.digits + ".-_"
SEGMENT_ALPHABET = string.ascii_letters + string.digits + ".-_"
trust_domains = st.text(TD_ALPHABET, min_size=1, max_size=255)
segments = st.text(SEGMENT_ALPHABET, min_size=1, max_size=40).filter(lambda text: text not in (".", ".."))
paths = st.lists(segments, max_size=6).map(lambda parts: "".join("/" + part for part in parts))
ids = st.builds(lambda td, path: f"spiffe://{td}{path}", trust_domains, paths)


def refused(text: str) -> None:
    SpiffeId.parse("spiffe://example.org/a")
    with pytest.raises(InvalidSpiffeId):
        SpiffeId.parse(text)


@given(ids)
def test_id_22_parse_and_format_round_trip(text: str) -> None:
    assert str(SpiffeId.parse(text)) == text


@given(st.text(string.ascii_letters, min_size=1, max_size=8).filter(lambda text: text != "spiffe"), paths)
def test_id_01_scheme_is_spiffe(scheme: str, path: str) -> None:
    refused(f"{scheme}://example.org{path}")


@pytest.mark.parametrize(
    "text", ["", "example.org/a", "spiffe:/example.org", "SPIFFE://example.org/a", "//example.org/a"]
)
def test_id_01_no_scheme_or_odd_scheme(text: str) -> None:
    refused(text)


@given(paths)
def test_id_02_trust_domain_is_not_empty(path: str) -> None:
    refused(f"spiffe://{path}")


@given(ids, st.text(SEGMENT_ALPHABET, max_size=10))
def test_id_03_no_query(text: str, query: str) -> None:
    refused(f"{text}?{query}")


@given(ids, st.text(SEGMENT_ALPHABET, max_size=10))
def test_id_04_no_fragment(text: str, fragment: str) -> None:
    refused(f"{text}#{fragment}")


@given(st.text(SEGMENT_ALPHABET + ":", max_size=10), trust_domains, paths)
def test_id_05_no_userinfo(user: str, td: str, path: str) -> None:
    refused(f"spiffe://{user}@{td}{path}")


@given(trust_domains, st.text(string.digits, max_size=5), paths)
def test_id_06_no_port_not_even_an_empty_one(td: str, port: str, path: str) -> None:
    refused(f"spiffe://{td}:{port}{path}")


@given(trust_domains.filter(lambda text: text.upper() != text), paths)
def test_id_07_upper_case_trust_domain_is_refused(td: str, path: str) -> None:
    refused(f"spiffe://{td.upper()}{path}")


@given(trust_domains, st.characters(exclude_characters=TD_ALPHABET + "/"), trust_domains)
def test_id_08_trust_domain_alphabet(before: str, odd: str, after: str) -> None:
    refused(f"spiffe://{before[:20]}{odd}{after[:20]}/a")


@given(trust_domains, st.integers(0, 255))
def test_id_09_no_percent_encoding_in_the_trust_domain(td: str, byte: int) -> None:
    refused(f"spiffe://{td[:200]}%{byte:02x}/a")


@pytest.mark.parametrize(
    "td", ["127.0.0.1", "1.2.3.4", "a..b", "-a-", "999.999.999.999", "localhost", "_", ".", "xn--a"]
)
def test_id_10_addresses_and_dns_names_get_no_special_treatment(td: str) -> None:
    assert SpiffeId.parse(f"spiffe://{td}/a").trust_domain.name == td


def test_id_10_ipv6_literals_cannot_occur() -> None:
    refused("spiffe://[::1]/a")


@given(st.integers(0, 255))
def test_id_11_no_percent_encoding_in_the_path(byte: int) -> None:
    refused(f"spiffe://example.org/a%{byte:02x}b")


@given(paths, paths)
def test_id_12_no_empty_segment(before: str, after: str) -> None:
    refused(f"spiffe://example.org{before}//{after.lstrip('/') or 'a'}")


@given(paths, st.sampled_from([".", ".."]), paths)
def test_id_13_no_dot_segments(before: str, dots: str, after: str) -> None:
    refused(f"spiffe://example.org{before}/{dots}{after}")


@given(paths)
def test_id_14_no_trailing_slash(path: str) -> None:
    refused(f"spiffe://example.org{path}/")


@given(st.characters(exclude_characters=SEGMENT_ALPHABET + "/"))
def test_id_15_segment_alphabet(odd: str) -> None:
    refused(f"spiffe://example.org/a{odd}b")


@given(trust_domains)
def test_id_16_and_17_bound_of_2048_bytes(td: str) -> None:
    head = f"spiffe://{td}/"
    longest = head + "a" * (MAX_ID_BYTES - len(head))
    assert len(str(SpiffeId.parse(longest))) == 2048
    refused(longest + "a")


def test_id_18_trust_domain_of_at_most_255_bytes() -> None:
    assert TrustDomain("a" * 255)
    refused(f"spiffe://{'a' * 256}/a")


@given(paths.filter(lambda path: path.swapcase() != path))
def test_id_19_path_comparison_is_case_sensitive(path: str) -> None:
    assert SpiffeId(TrustDomain("td"), path) != SpiffeId(TrustDomain("td"), path.swapcase())


@given(trust_domains)
def test_id_21_id_of_a_trust_domain_has_no_path(td: str) -> None:
    own = TrustDomain(td).id
    assert own.is_trust_domain_id
    assert own.member_of(TrustDomain(td))
    assert str(own) == f"spiffe://{td}"


@given(st.text(max_size=60))
def test_any_text_is_an_id_or_a_typed_refusal(text: str) -> None:
    try:
        parsed = SpiffeId.parse(text)
    except InvalidSpiffeId:
        return
    assert str(parsed) == text
