"""Requests and files with a fault get a typed error that names it, and shows nothing secret."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any

import pytest
from cryptography import x509
from google.protobuf.duration_pb2 import Duration
from keyreeve_common.errors import ConfigInvalid, InvalidRequest
from keyreeve_common.identity import TrustDomain
from keyreeve_common.v1 import keyserver_pb2, types_pb2
from keyreeve_keyserver.config import CatalogConfig, KeyServerConfig
from keyreeve_keyserver.frontend.app import _open_catalog, _require_closed
from keyreeve_keyserver.frontend.protos import new_key_from_proto

OWN = TrustDomain("example.org")


def request(backend: str = "", **profile: Any) -> keyserver_pb2.CreateKeyRequest:
    fields = {"max_validity": Duration(seconds=60), "max_backdate": Duration(seconds=60), **profile}
    return keyserver_pb2.CreateKeyRequest(
        request_id="r",
        key_type=types_pb2.KEY_TYPE_EC_P256,
        role=keyserver_pb2.KEY_ROLE_AUTHORITY,
        purposes=[types_pb2.PURPOSE_X509_CERTIFICATE],
        backend=backend,
        authority_profile=keyserver_pb2.AuthorityProfile(
            trust_domain="example.org",
            kind=keyserver_pb2.AuthorityProfile.KIND_ISSUING,
            subject_der=x509.Name([]).public_bytes(),
            **fields,
        ),
    )


@pytest.mark.parametrize("seconds", [-1, 2**62, 100 * 366 * 86_400 + 1])
@pytest.mark.parametrize("field", ["max_validity", "max_backdate"])
def test_duration_out_of_range_names_its_field(field: str, seconds: int) -> None:
    assert new_key_from_proto(request(), OWN)
    with pytest.raises(InvalidRequest, match=field):
        new_key_from_proto(request(**{field: Duration(seconds=seconds)}), OWN)


@pytest.mark.parametrize("backend", ["a\x00b", "UPPER", "x" * 65, "é"])
def test_backend_name_is_one(backend: str) -> None:
    assert new_key_from_proto(request(backend="hsm-1"), OWN).backend == "hsm-1"
    with pytest.raises(InvalidRequest, match="backend: "):
        new_key_from_proto(request(backend=backend), OWN)


def test_password_that_is_not_text_is_not_shown(tmp_path: Path) -> None:
    password = tmp_path / "password"
    password.write_bytes(b"\xf9secret")
    password.chmod(0o600)
    catalog = CatalogConfig(url="postgresql://keyreeve@127.0.0.1/keyreeve", password_file=password)
    config = KeyServerConfig(OWN, tmp_path, tmp_path / "admin", catalog=catalog)
    with pytest.raises(ConfigInvalid, match="password is not UTF-8") as refused:
        _open_catalog(config)
    assert "f9" not in str(refused.value)
    assert refused.value.__cause__ is None


@pytest.mark.skipif(os.geteuid() != 0, reason="needs root to give a directory away")
def test_admin_directory_of_another_user_is_refused(tmp_path: Path) -> None:
    directory = tmp_path / "run"
    directory.mkdir(mode=0o700)
    _require_closed(directory)
    os.chown(directory, 65_534, 65_534)
    with pytest.raises(ConfigInvalid, match="belongs to another user"):
        _require_closed(directory)
