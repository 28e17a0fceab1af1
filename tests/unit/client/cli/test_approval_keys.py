"""The private key of an approver: how its file has to be."""

from __future__ import annotations

import os
import threading
from pathlib import Path

import pytest
from cryptography.hazmat.primitives.asymmetric import ed25519
from cryptography.hazmat.primitives.serialization import Encoding, NoEncryption, PrivateFormat
from keyreeve_client.cli.approvals import _private_key
from keyreeve_common.errors import ConfigInvalid, InvalidRequest

KEY = ed25519.Ed25519PrivateKey.generate().private_bytes(Encoding.PEM, PrivateFormat.PKCS8, NoEncryption())


@pytest.mark.parametrize("mode", [0o644, 0o604, 0o620])
def test_key_in_the_clear_that_others_can_open_is_refused(tmp_path: Path, mode: int) -> None:
    path = tmp_path / "bob.key"
    path.write_bytes(KEY)
    path.chmod(mode)
    with pytest.raises(ConfigInvalid, match="chmod 600"):
        _private_key(path)
    path.chmod(0o600)
    _private_key(path)


def test_key_may_come_through_a_pipe(tmp_path: Path) -> None:
    path = tmp_path / "pipe"
    os.mkfifo(path)
    writer = threading.Thread(target=path.write_bytes, args=(KEY,))
    writer.start()
    _private_key(path)
    writer.join()


def test_what_is_no_key_is_named_and_not_shown(tmp_path: Path) -> None:
    path = tmp_path / "bob.key"
    path.write_bytes(b"-----BEGIN PRIVATE KEY-----\nc2VjcmV0\n-----END PRIVATE KEY-----\n")
    with pytest.raises(InvalidRequest) as refused:
        _private_key(path)
    assert "c2VjcmV0" not in str(refused.value)
    assert str(path) in refused.value.detail
