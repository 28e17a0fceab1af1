"""The real signer and the end of keys: permits to destroy hold for one key, from their time on, and nobody else writes one."""

from __future__ import annotations

import base64
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from keyreeve_common.errors import FailedPrecondition, InvalidRequest, SealedRecordInvalid
from keyreeve_testing.signer import SignerClient, running_signer, write_signer_config


@pytest.fixture
def signer(tmp_path: Path) -> Iterator[SignerClient]:
    with running_signer(write_signer_config(tmp_path / "etc"), log=tmp_path / "signer.log") as client:
        yield client


def create(signer: SignerClient, key_id: str, **changes: Any) -> str:
    members = {"key_type": "ec-p256", "role": "handshake", "purposes": ["tls13_server_verify"], **changes}
    return str(signer.control("create_key", key_id=key_id, **members)["record"])


def permit(signer: SignerClient, record: str, wait_s: int = 0) -> str:
    return str(signer.control("permit_destruction", record=record, wait_s=wait_s)["permit"])


def test_permit_is_for_one_key_and_from_its_time_on(signer: SignerClient) -> None:
    one, other = create(signer, "one"), create(signer, "other")
    with pytest.raises(FailedPrecondition, match="waiting time"):
        signer.control("destroy_key", record=one, permit=permit(signer, one, 3600))
    with pytest.raises(SealedRecordInvalid, match="another key"):
        signer.control("destroy_key", record=one, permit=permit(signer, other))
    assert signer.control("destroy_key", record=one, permit=permit(signer, one)) == {}


def test_permit_of_a_second_key_under_the_same_id_does_not_fit(signer: SignerClient) -> None:
    first, second = create(signer, "k"), create(signer, "k")
    with pytest.raises(SealedRecordInvalid, match="another key"):
        signer.control("destroy_key", record=first, permit=permit(signer, second))


def test_changed_permit_and_foreign_bytes_are_refused(signer: SignerClient) -> None:
    record = create(signer, "k")
    good = base64.b64decode(permit(signer, record, 3600))
    at = good.index(b'"not_before":"20') + len(b'"not_before":"')
    sooner = good[:at] + b"1" + good[at + 1 :]
    for changed in (sooner, good[:-1], good[:-1] + bytes((good[-1] ^ 1,)), b"", base64.b64decode(record)):
        with pytest.raises(SealedRecordInvalid):
            signer.control("destroy_key", record=record, permit=base64.b64encode(changed).decode())
    with pytest.raises(SealedRecordInvalid):  # and a permit is no record
        signer.control("load_key", record=base64.b64encode(good).decode())
    assert signer.control("load_key", record=record)


@pytest.mark.parametrize("wait", [-1, "1", True, 10**12, None])
def test_wait_is_a_whole_number_of_seconds(signer: SignerClient, wait: object) -> None:
    with pytest.raises(InvalidRequest, match="wait_s"):
        signer.control("permit_destruction", record=create(signer, "k"), wait_s=wait)


def test_permit_holds_in_the_next_process(tmp_path: Path) -> None:
    config = write_signer_config(tmp_path / "etc")
    with running_signer(config, log=tmp_path / "log") as signer:
        record = create(signer, "k")
        given = permit(signer, record)
    with running_signer(config, log=tmp_path / "log") as signer:
        assert signer.control("destroy_key", record=record, permit=given) == {}
