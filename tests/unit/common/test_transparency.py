"""The tree, its proofs, its tiles, notes, checkpoints and the journal: known vectors of the standards, and properties."""

from __future__ import annotations

import dataclasses
from hashlib import sha256

import pytest
from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PrivateKey
from hypothesis import given
from hypothesis import strategies as st
from keyreeve_common.errors import InvalidRequest
from keyreeve_common.transparency import merkle, tiles
from keyreeve_common.transparency.checkpoint import (
    Checkpoint,
    cosign,
    parse_checkpoint_text,
    verify_checkpoint,
    verify_cosignature,
)
from keyreeve_common.transparency.journal import build_group, read_groups
from keyreeve_common.transparency.note import COSIGNATURE_V1, VerifierKey, check_name, parse_note, parse_vkey

# The leaves and roots that implementations of RFC 6962 test each other with.
LEAVES = [
    bytes.fromhex(text)
    for text in ("", "00", "10", "2021", "3031", "40414243", "5051525354555657", "606162636465666768696a6b6c6d6e6f")
]
ROOTS = [
    "6e340b9cffb37a989ca544e6bb780a2c78901d3fb33738768511a30617afa01d",
    "fac54203e7cc696cf0dfcb42c92a1d9dbaf70ad9e621f4bd8d98662f00e3c125",
    "aeb6bcfe274b70a14fb067a5e5578264db0fa9b51af5e0ba159158f329e06e77",
    "d37ee418976dd95753c1c73862b9398fa2a2cf9b4ff0fdfe8b30cd95209614b7",
    "4e3bbb1f7b478dcfe71fb631631519a3bca12c9aefca1612bfce4c13a86264d4",
    "76e67dadbcdf1e10e1b74ddc608abd2f98dfb16fbce75277b5232a127f2087ef",
    "ddb89be403809e325750d3d263cd78929c2942b7942a34b77e122c9594a74c8c",
    "5dc9da79a70659a9ad559cb701ded9a2ab9d823aad2f4960cfe370eff4604328",
]
# The example of Go's package documentation of golang.org/x/mod/sumdb/note.
GO_VKEY = "PeterNeumann+c74f20a3+ARpc2QcUPDhMQegwxbzhKqiBfsVkmqq/LDE4izWy10TW"
GO_NOTE = (
    "If you think cryptography is the answer to your problem,\nthen you don't know what your problem is.\n\n"
    "— PeterNeumann x08go/ZJkuBS9UG/SffcvIAQxVBtiFupLLr8pAcElZInNIuGUgYN1FFYC2pZSNXgKvqfqdngotpRZb6KE6RyyBwJnAM=\n"
).encode()
KEY = Ed25519PrivateKey.from_private_bytes(bytes(range(32)))
LOG = VerifierKey("example.org/log", KEY.public_key().public_bytes_raw())
WITNESS = VerifierKey("example.org/witness", KEY.public_key().public_bytes_raw(), COSIGNATURE_V1)
HEAD = Checkpoint(LOG.name, 5, bytes(range(32)))


def hashes(count: int) -> list[bytes]:
    return [merkle.leaf_hash(str(n).encode()) for n in range(count)]


@pytest.mark.parametrize("size", range(1, 9))
def test_roots_are_those_of_rfc_6962(size: int) -> None:
    assert merkle.tree_root([merkle.leaf_hash(leaf) for leaf in LEAVES[:size]]).hex() == ROOTS[size - 1]


def test_empty_tree() -> None:
    assert merkle.tree_root([]).hex() == "e3b0c44298fc1c149afbf4c8996fb92427ae41e4649b934ca495991b7852b855"


@given(st.integers(1, 600), st.data())
def test_inclusion_is_proved_and_nothing_else_is(size: int, data: st.DataObject) -> None:
    leaves = hashes(size)
    index = data.draw(st.integers(0, size - 1))
    root = merkle.tree_root(leaves)
    proof = merkle.inclusion_proof(merkle.subtree_of(leaves), index, size)
    assert merkle.root_from_inclusion(leaves[index], index, size, proof) == root
    other = data.draw(st.integers(0, size - 1))
    if other != index:
        with_other = merkle.inclusion_proof(merkle.subtree_of(leaves), other, size)
        assert _root_or_none(leaves[index], other, size, with_other) != root
    if proof:
        assert _root_or_none(leaves[index], index, size, proof[:-1]) != root
        assert _root_or_none(leaves[index], index, size, [bytes(32), *proof[1:]]) != root
    assert _root_or_none(leaves[index], index, size, [*proof, bytes(32)]) != root


def _root_or_none(leaf: bytes, index: int, size: int, proof: list[bytes]) -> bytes | None:
    try:
        return merkle.root_from_inclusion(leaf, index, size, proof)
    except InvalidRequest:
        return None


@given(st.integers(0, 600), st.data())
def test_consistency_is_proved_and_a_changed_past_is_not(new: int, data: st.DataObject) -> None:
    old = data.draw(st.integers(0, new))
    leaves = hashes(new)
    subtree = merkle.subtree_of(leaves)
    proof = merkle.consistency_proof(subtree, old, new)
    old_root, new_root = merkle.tree_root(leaves[:old]), merkle.tree_root(leaves)
    merkle.verify_consistency(old, new, old_root, new_root, proof)
    if old:
        changed = [*leaves[: old - 1], bytes(32)]
        with pytest.raises(InvalidRequest):
            merkle.verify_consistency(old, new, merkle.tree_root(changed), new_root, proof)
        with pytest.raises(InvalidRequest):
            merkle.verify_consistency(old, new, old_root, bytes(32), proof)
        with pytest.raises(InvalidRequest):
            merkle.verify_consistency(old, new, old_root, new_root, [*proof, bytes(32)])


@given(st.integers(1, 70_000), st.data())
def test_tiles_give_the_same_hashes_as_leaves(size: int, data: st.DataObject) -> None:
    leaves = [n.to_bytes(32, "big") for n in range(size)]
    levels = [leaves]
    while len(levels[-1]) >= tiles.TILE_WIDTH:
        below = levels[-1]
        whole = range(0, len(below) - tiles.TILE_WIDTH + 1, tiles.TILE_WIDTH)
        levels.append([merkle.perfect_root(below[at : at + tiles.TILE_WIDTH]) for at in whole])
    assert len(levels) - (not levels[-1]) == len(tiles.levels_of(size))

    def hashes_of(level: int, index: int) -> list[bytes]:
        return levels[level][index * tiles.TILE_WIDTH : (index + 1) * tiles.TILE_WIDTH]

    subtree = tiles.tiled_subtree(hashes_of)
    assert subtree(0, size) == merkle.tree_root(leaves)
    index = data.draw(st.integers(0, size - 1))
    proof = merkle.inclusion_proof(subtree, index, size)
    assert merkle.root_from_inclusion(leaves[index], index, size, proof) == merkle.tree_root(leaves)


def test_tiles_of_the_example_in_tlog_tiles() -> None:
    """A tree of 70,000: 273 full tiles and one of 112, one full and one of 17, one of width 1."""
    found = {level: list(tiles.tiles_of_level(level, 70_000)) for level in tiles.levels_of(70_000)}
    assert {level: (len(some) - 1, some[-1].width) for level, some in found.items()} == {
        0: (273, 112),
        1: (1, 17),
        2: (0, 1),
    }
    assert found[0][-1].path == "tile/0/273.p/112"
    assert tiles.Tile(tiles.ENTRIES, 1_234_067).path == "tile/entries/x001/x234/067"
    assert [tile.width for tile in tiles.tiles_of_level(0, 256)] == [256]
    assert [tile.width for tile in tiles.tiles_of_level(1, 256)] == [1]


@given(st.lists(st.binary(max_size=300), max_size=20))
def test_entry_bundle_comes_back_and_a_cut_one_is_refused(entries: list[bytes]) -> None:
    data = tiles.join_entries(entries)
    assert tiles.split_entries(data) == entries
    if entries:
        with pytest.raises(InvalidRequest):
            tiles.split_entries(data[:-1])


def test_vkey_and_note_of_go() -> None:
    key = parse_vkey(GO_VKEY)
    assert str(key) == GO_VKEY
    note = parse_note(GO_NOTE)
    note.verify(key)
    assert note.to_bytes() == GO_NOTE


def test_a_changed_note_does_not_verify() -> None:
    key = parse_vkey(GO_VKEY)
    with pytest.raises(InvalidRequest, match="does not verify"):
        parse_note(GO_NOTE.replace(b"answer", b"reason")).verify(key)
    with pytest.raises(InvalidRequest, match="no signature"):
        parse_note(GO_NOTE).verify(LOG)


@pytest.mark.parametrize(
    "data",
    [
        b"",
        b"text\n",
        b"text\n\n",
        b"text\n\nno dash\n",
        GO_NOTE[:-1],
        GO_NOTE.replace(b"\n", b"\r\n"),
        b"\xff" + GO_NOTE,
        GO_NOTE.replace(b"JnAM=", b"JnAM"),
        GO_NOTE.replace(b"x08go", b"x08 o"),
        GO_NOTE + b"x" * 70_000,
    ],
)
def test_what_is_no_note_is_refused(data: bytes) -> None:
    with pytest.raises(InvalidRequest, match="note"):
        parse_note(data)


@pytest.mark.parametrize(
    "line", ["", "a+b", "a+00000000+AAAA", GO_VKEY.replace("c7", "c8"), GO_VKEY[:-4], "a b" + GO_VKEY]
)
def test_what_is_no_vkey_is_refused(line: str) -> None:
    with pytest.raises(InvalidRequest):
        parse_vkey(line)


def test_names_have_no_space_and_no_plus() -> None:
    assert check_name("example.org/audit/host-1") == "example.org/audit/host-1"
    for name in ("", "a b", "a+b", "ä", "a\n", "a" * 256):
        with pytest.raises(InvalidRequest):
            check_name(name)


def test_checkpoint_comes_back() -> None:
    signed = HEAD.sign(LOG, KEY.sign)
    assert verify_checkpoint(signed, LOG)[0] == HEAD
    assert signed.decode().startswith(
        "example.org/log\n5\nAAECAwQFBgcICQoLDA0ODxAREhMUFRYXGBkaGxwdHh8=\n\n— example.org/log "
    )


@given(st.data())
def test_no_changed_checkpoint_verifies(data: st.DataObject) -> None:
    signed = bytearray(HEAD.sign(LOG, KEY.sign))
    at = data.draw(st.integers(0, len(signed) - 1))
    signed[at] ^= data.draw(st.integers(1, 255))
    with pytest.raises(InvalidRequest):
        verify_checkpoint(bytes(signed), LOG)


@pytest.mark.parametrize(
    "text",
    [
        "",
        "o\n5\n",
        HEAD.to_text() + "extension\n",
        HEAD.to_text().replace("\n5\n", "\n05\n"),
        "\n" + HEAD.to_text(),
        "o\n-1\nAA==\n",
    ],
)
def test_what_is_no_checkpoint_is_refused(text: str) -> None:
    with pytest.raises(InvalidRequest, match="checkpoint"):
        parse_checkpoint_text(text)


def test_checkpoint_of_another_log_under_the_same_key_is_refused() -> None:
    with pytest.raises(InvalidRequest, match="checkpoint is of"):
        verify_checkpoint(dataclasses.replace(HEAD, origin="example.org/other").sign(LOG, KEY.sign), LOG)


def test_cosignature() -> None:
    note = cosign(parse_note(HEAD.sign(LOG, KEY.sign)), WITNESS, timestamp=1_700_000_000, sign=KEY.sign)
    again = parse_note(note.to_bytes())
    assert verify_cosignature(again, WITNESS) == 1_700_000_000
    again.verify(LOG)  # a witness's line is not the log's concern
    with pytest.raises(InvalidRequest, match="no cosignature"):
        verify_cosignature(parse_note(HEAD.sign(LOG, KEY.sign)), WITNESS)
    line = again.signatures[-1]
    later = dataclasses.replace(line, signature=(1_700_000_001).to_bytes(8, "big") + line.signature[8:])
    with pytest.raises(InvalidRequest, match="does not verify"):
        verify_cosignature(dataclasses.replace(again, signatures=(later,)), WITNESS)
    with pytest.raises(InvalidRequest, match="wrong length"):
        verify_cosignature(dataclasses.replace(again, signatures=(dataclasses.replace(line, signature=b"x"),)), WITNESS)


def seal(covered: bytes) -> bytes:
    return sha256(b"key" + covered).digest()


@given(st.lists(st.lists(st.binary(max_size=40), min_size=1, max_size=5), max_size=6), st.integers(0, 2**40), st.data())
def test_journal_keeps_whole_groups_and_drops_a_torn_one(
    groups: list[list[bytes]], first: int, data: st.DataObject
) -> None:
    built, ends, index = b"", [0], first
    for group in groups:
        built += build_group(index, group, seal)
        index += len(group)
        ends.append(len(built))
    whole = read_groups(built, first)
    assert whole.entries == [entry for group in groups for entry in group]
    assert whole.good == len(built)
    assert read_groups(built, first, seal).unsealed is None
    assert read_groups(built, first, lambda covered: sha256(b"another key" + covered).digest()).unsealed == (
        first if built else None
    )
    cut = data.draw(st.integers(0, len(built)))
    torn = read_groups(built[:cut], first)
    kept = max(n for n, end in enumerate(ends) if end <= cut)
    assert torn.entries == [entry for group in groups[:kept] for entry in group]
    assert torn.good == ends[kept]
    if built:
        at = data.draw(st.integers(0, len(built) - 1))
        changed = bytearray(built)
        changed[at] ^= data.draw(st.integers(1, 255))
        assert read_groups(bytes(changed), first).good <= at


def test_journal_group_of_another_place_is_not_taken() -> None:
    assert read_groups(build_group(7, [b"a"], seal), 0).entries == []
