"""Sealed records: they open under their own key and in their own form, and in no other."""

from __future__ import annotations

import json
import os
from datetime import timedelta
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st
from keyreeve_common.errors import ConfigInvalid, InvalidRequest, SealedRecordInvalid
from keyreeve_common.purposes import KeyRole, Purpose
from keyreeve_common.strict_json import canonical_json
from keyreeve_common.wire import bytes32
from keyreeve_keyserver.backends.worker_frames import Box, parse_question
from keyreeve_keyserver.domain.keys import AuthorityKind, KeyRecord, parse_record_header
from keyreeve_keyserver.domain.secret import Secret
from keyreeve_keyserver.signer.sealing import KdfParameters, PassphraseKey, Sealer, load_kdf_parameters
from keyreeve_testing.tbs import AUTHORITY_NAME, authority_record, handshake_record

KEY, OTHER = PassphraseKey(Secret(b"k" * 32)), PassphraseKey(Secret(b"o" * 32))
RECORDS = [handshake_record(), authority_record(), authority_record(AuthorityKind.ROOT, max_path_length=None)]
SECRET = b"the private half"


async def sealed(record: KeyRecord = RECORDS[0], secret: bytes | None = SECRET) -> bytes:
    return await Sealer(KEY).seal(record, Secret(secret) if secret else None)


@pytest.mark.parametrize("record", RECORDS)
@pytest.mark.parametrize("secret", [SECRET, None])
async def test_record_comes_back(record: KeyRecord, secret: bytes | None) -> None:
    opened, got = await Sealer(KEY).open(await sealed(record, secret))
    assert opened == record
    assert (got.reveal() if got else None) == secret


async def test_secret_is_not_in_the_clear_and_nonces_differ() -> None:
    one, two = await sealed(), await sealed()
    assert SECRET not in one
    assert one != two


async def test_other_key_does_not_open_it() -> None:
    for secret in (SECRET, None):
        with pytest.raises(SealedRecordInvalid, match="another key-encryption key"):
            await Sealer(OTHER).open(await sealed(secret=secret))


async def test_every_bit_counts() -> None:
    blob = await sealed(secret=None)
    for at in range(len(blob)):
        changed = bytearray(blob)
        changed[at] ^= 1 << (at % 8)
        with pytest.raises(SealedRecordInvalid):
            await Sealer(KEY).open(bytes(changed))


class WorkersKey(PassphraseKey):
    """What it is asked goes through the frames of a token's worker, which ends at one that breaks a rule."""

    async def decrypt(self, nonce: bytes, associated: bytes, box: bytes) -> bytes:
        parse_question(Box(decrypt=True, label="k", nonce=nonce, associated=associated, data=box).to_bytes()[4:])
        return await super().decrypt(nonce, associated, box)


@pytest.mark.parametrize("length", [0, 2, 4096, 65_530, 65_536, 65_537, 100_000])
@pytest.mark.parametrize("box", [0, 16, 65_536, 65_537])
async def test_no_length_of_a_foreign_record_or_note_ends_a_worker(length: int, box: int) -> None:
    sealer = Sealer(WorkersKey(Secret(b"k" * 32)))
    rest = bytes32(b"{" * length) + bytes(12) + bytes(box)
    for opening in (sealer.open(b"KRV1" + rest), sealer.open_note(b"KRN1" + rest)):
        with pytest.raises(SealedRecordInvalid):
            await opening


async def test_every_cut_is_refused() -> None:
    blob = await sealed()
    for length in range(len(blob)):
        with pytest.raises(SealedRecordInvalid):
            await Sealer(KEY).open(blob[:length])
    with pytest.raises(SealedRecordInvalid):
        await Sealer(KEY).open(blob + b"\x00")


async def test_header_of_one_record_does_not_fit_the_box_of_another() -> None:
    one, two = await sealed(RECORDS[0]), await sealed(RECORDS[1])
    header_one, header_two = RECORDS[0].to_header(), RECORDS[1].to_header()
    swapped = one[:4] + bytes32(header_two) + one[8 + len(header_one) :]
    assert two[8 : 8 + len(header_two)] == header_two
    with pytest.raises(SealedRecordInvalid):
        await Sealer(KEY).open(swapped)


@given(st.binary(max_size=300))
async def test_noise_is_refused(noise: bytes) -> None:
    for blob in (noise, b"KRV1" + noise, b"KRV1" + bytes32(noise) + bytes(28)):
        with pytest.raises(SealedRecordInvalid):
            await Sealer(KEY).open(blob)


@pytest.mark.parametrize("record", RECORDS)
def test_header_is_canonical(record: KeyRecord) -> None:
    header = record.to_header()
    assert parse_record_header(header) == record
    assert header == canonical_json(json.loads(header))
    for spelling in (header + b" ", header.replace(b":", b": ", 1), json.dumps(json.loads(header)).encode()):
        with pytest.raises(InvalidRequest):
            parse_record_header(spelling)


HEADER_FAULTS: list[dict[str, Any]] = [
    {"version": 2},
    {"key_id": "UPPER"},
    {"key_type": "ec-p384"},
    {"key_type": "dsa"},
    {"role": "authority"},
    {"role": None},
    {"purposes": []},
    {"purposes": ["x509_certificate"]},
    {"purposes": ["tls13_server_verify", "tls13_server_verify"]},
    {"purposes": "tls13_server_verify"},
    {"backend": ""},
    {"spki_der": "AAAA"},
    {"spki_der": "%"},
    {"label": 7},
    {"created": "2026-01-01"},
    {"authority_profile": {}},
    {"surprise": 1},
]


@pytest.mark.parametrize("change", HEADER_FAULTS, ids=str)
def test_header_with_a_fault_is_refused(change: dict[str, Any]) -> None:
    fields = json.loads(RECORDS[0].to_header())
    with pytest.raises(InvalidRequest):
        parse_record_header(canonical_json({**fields, **change}))


@given(st.binary(max_size=120))
def test_header_noise_is_refused(noise: bytes) -> None:
    with pytest.raises(InvalidRequest):
        parse_record_header(noise)


PROFILE_FAULTS: list[dict[str, Any]] = [
    {"trust_domain": "UPPER"},
    {"kind": "intermediate"},
    {"subject_der": "AAAA"},
    {"max_validity_s": 0},
    {"max_validity_s": -1},
    {"max_validity_s": True},
    {"max_validity_s": "3600"},
    {"max_backdate_s": 10**12},
    {"max_path_length": 17},
    {"surprise": 1},
]


@pytest.mark.parametrize("change", PROFILE_FAULTS, ids=str)
def test_profile_with_a_fault_is_refused(change: dict[str, Any]) -> None:
    fields = json.loads(RECORDS[1].to_header())
    assert parse_record_header(canonical_json(fields))
    fields["authority_profile"].update(change)
    with pytest.raises(InvalidRequest):
        parse_record_header(canonical_json(fields))


def test_authority_keeps_its_profile() -> None:
    profile = RECORDS[1].authority_profile
    assert profile is not None
    assert profile.subject_der == AUTHORITY_NAME.public_bytes()
    assert profile.max_validity == timedelta(hours=1)
    assert RECORDS[1].role is KeyRole.AUTHORITY
    assert Purpose.TLS13_SERVER_VERIFY not in RECORDS[1].purposes


def test_secret_shows_nothing() -> None:
    secret = Secret(b"hunter2")
    assert "hunter2" not in f"{secret!r} {secret} {[secret]}"
    assert secret.matches(b"hunter2")
    assert not secret.matches(b"hunter3")
    with pytest.raises(TypeError, match="matches"):
        _ = secret == Secret(b"hunter2")


def test_derivation_is_scrypt_with_the_stored_parameters(tmp_path: Path) -> None:
    """Against the standard library's scrypt, an implementation of its own."""
    import hashlib

    parameters = KdfParameters(salt="ab" * 32, n=16_384)
    expected = hashlib.scrypt(b"p" * 20, salt=b"\xab" * 32, n=16_384, r=8, p=1, dklen=32)
    assert parameters.derive(Secret(b"p" * 20)).matches(expected)
    first = load_kdf_parameters(tmp_path / "kdf")
    assert load_kdf_parameters(tmp_path / "kdf") == first
    assert load_kdf_parameters(tmp_path / "kdf2").salt != first.salt
    assert first.n == 131_072


@pytest.mark.parametrize(
    "content", ["", "[]", "{}", '{"salt":"ab"}', '{"salt":"zz"}', f'{{"salt":"{"ab" * 32}","n":1024}}', "\x00"]
)
def test_kdf_file_with_a_fault_is_refused(tmp_path: Path, content: str) -> None:
    path = tmp_path / "kdf"
    path.write_text(content)
    with pytest.raises(ConfigInvalid, match="restore it from a backup"):
        load_kdf_parameters(path)


def test_new_kdf_file_is_on_disk_with_its_name(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    synced: list[str] = []
    real = os.fsync

    def record(descriptor: int) -> None:
        synced.append(Path(f"/proc/self/fd/{descriptor}").readlink().name)
        real(descriptor)

    monkeypatch.setattr(os, "fsync", record)
    load_kdf_parameters(tmp_path / "kdf")
    assert synced[-1] == tmp_path.name
