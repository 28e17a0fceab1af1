"""PKCS#11 URIs: parse and format round-trip, the examples of RFC 7512 3, and what is refused."""

from __future__ import annotations

from dataclasses import fields, replace
from pathlib import PurePosixPath

import pytest
from hypothesis import given
from hypothesis import strategies as st
from keyreeve_common.errors import ConfigInvalid
from keyreeve_common.pkcs11_uri import Pkcs11Uri, TokenIdentity, parse_pkcs11_uri

_text = st.text(st.characters(exclude_characters="\x00", exclude_categories=["Cs"]), max_size=40)
_paths = st.lists(st.text(st.characters(exclude_characters="\x00/", exclude_categories=["Cs"]), min_size=1), max_size=4)
_files = _paths.map(lambda names: PurePosixPath("/" + "/".join(names)))
_version = st.tuples(st.integers(0, 255), st.integers(0, 255))
_strings = ("token", "manufacturer", "model", "serial", "library_manufacturer", "library_description")
_uris = st.builds(
    Pkcs11Uri,
    **{name: st.none() | _text for name in (*_strings, "slot_description", "slot_manufacturer")},
    library_version=st.none() | _version,
    slot_id=st.none() | st.integers(0, 2**64 - 1),
    module_path=st.none() | _files,
    pin_source=st.none() | _files,
)
_identities = st.builds(
    TokenIdentity,
    **dict.fromkeys((*_strings, "slot_description", "slot_manufacturer"), _text),
    library_version=_version,
    slot_id=st.integers(0, 2**64 - 1),
)


@given(_uris)
def test_round_trip(uri: Pkcs11Uri) -> None:
    text = str(uri)
    assert text.isascii()
    if len(text) <= 4096:
        assert parse_pkcs11_uri(text) == uri
        assert str(parse_pkcs11_uri(text)) == text


@given(_uris)
def test_selector_is_the_uri_without_its_query(uri: Pkcs11Uri) -> None:
    assert uri.selector == replace(uri, module_path=None, pin_source=None)
    assert "?" not in str(uri.selector)


@given(_identities, st.data())
def test_a_token_matches_what_names_it_and_nothing_else(identity: TokenIdentity, data: st.DataObject) -> None:
    names = [field.name for field in fields(TokenIdentity)]
    chosen = data.draw(st.sets(st.sampled_from(names)))
    uri = Pkcs11Uri(**{name: getattr(identity, name) for name in chosen})
    assert uri.matches(identity)
    for name in chosen:
        value = getattr(identity, name)
        other = (
            (value[0] ^ 1, value[1])
            if isinstance(value, tuple)
            else value ^ 1
            if isinstance(value, int)
            else value + "x"
        )
        assert not uri.matches(replace(identity, **{name: other}))


@given(st.text(max_size=80))
def test_any_text_parses_or_is_refused(text: str) -> None:
    for candidate in (text, "pkcs11:" + text):
        try:
            uri = parse_pkcs11_uri(candidate)
        except ConfigInvalid:
            continue
        assert parse_pkcs11_uri(str(uri)) == uri


def test_examples() -> None:
    assert parse_pkcs11_uri("pkcs11:") == Pkcs11Uri()
    uri = parse_pkcs11_uri(
        "pkcs11:token=The%20Software%20PKCS%2311%20Softtoken;manufacturer=Snake%20Oil,%20Inc.;model=1.0;serial=;"
        "slot-id=327;library-version=3.1?module-path=/usr/lib/hsm.so&pin-source=file:///etc/keyreeve/pin&x-vendor=1&x-vendor=2"
    )
    assert uri == Pkcs11Uri(
        token="The Software PKCS#11 Softtoken",
        manufacturer="Snake Oil, Inc.",
        model="1.0",
        serial="",
        slot_id=327,
        library_version=(3, 1),
        module_path=PurePosixPath("/usr/lib/hsm.so"),
        pin_source=PurePosixPath("/etc/keyreeve/pin"),
    )
    assert parse_pkcs11_uri("PKCS11:token=%6by&z").token == "ky&z"


@pytest.mark.parametrize(
    ("text", "rule"),
    [
        ("http://example", "does not begin with pkcs11:"),
        ("pkcs11:token=a?", "followed by nothing"),
        ("pkcs11:token", "name=value"),
        ("pkcs11:token=a;", "name=value"),
        ("pkcs11:token=a;token=b", "token stands twice"),
        ("pkcs11:Token=a", "path attribute Token is not known"),
        ("pkcs11:x-vendor=a", "path attribute x-vendor is not known"),
        ("pkcs11:pin-source=a", "path attribute pin-source is not known"),
        ("pkcs11:object=key", "names an object"),
        ("pkcs11:type=private", "names an object"),
        ("pkcs11:id=%00", "names an object"),
        ("pkcs11:token=a b", "percent-encoded"),
        ("pkcs11:token=a/b", "percent-encoded"),
        ("pkcs11:token=%4", "percent-encoded"),
        ("pkcs11:token=é", "percent-encoded"),
        ("pkcs11:token=%ff", "not UTF-8"),
        ("pkcs11:token=%00", "zero byte"),
        ("pkcs11:slot-id=-1", "slot number"),
        ("pkcs11:slot-id=", "slot number"),
        ("pkcs11:slot-id=%31", "slot number"),
        ("pkcs11:library-version=3.", "form 3.1"),
        ("pkcs11:library-version=256", "form 3.1"),
        ("pkcs11:?module-name=softhsm2", "module-path"),
        ("pkcs11:?module-path=hsm.so", "absolute path"),
        ("pkcs11:?pin-source=|/bin/pin", "absolute path"),
        ("pkcs11:?pin-source=https://example/pin", "absolute path"),
        ("pkcs11:?pin-source=/a&pin-source=/b", "pin-source stands twice"),
        ("pkcs11:" + "a" * 5000, "longer than"),
    ],
)
def test_refused(text: str, rule: str) -> None:
    with pytest.raises(ConfigInvalid, match=rule.replace("|", r"\|")):
        parse_pkcs11_uri(text)


def test_pin_value_is_refused_and_not_shown() -> None:
    with pytest.raises(ConfigInvalid, match="pin-value is refused") as refused:
        parse_pkcs11_uri("pkcs11:token=a?pin-value=271828")
    assert "271828" not in refused.value.detail
