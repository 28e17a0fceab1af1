"""A trust domain whose root is in Vault: the real ceremony, the real CA and key server, a real OpenBao."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
from cryptography import x509
from cryptography.hazmat.primitives.serialization import Encoding
from keyreeve_common.errors import FailedPrecondition, KeyreeveError, VaultAccessDenied
from keyreeve_common.v1 import ca_pb2
from keyreeve_testing.keyserver import KeyServerRig
from keyreeve_testing.openbao import PKI_POLICY, AppRole, OpenBao

pytestmark = pytest.mark.openbao


@pytest.fixture
def mount(bao: OpenBao) -> str:
    made = bao.enable("pki", config={"max_lease_ttl": "87600h"})
    generate_root(bao, made, "Organisation root")
    return made


def generate_root(bao: OpenBao, mount: str, name: str) -> x509.Certificate:
    data = {"common_name": name, "ttl": "80000h", "key_type": "ec", "key_bits": 256}
    answer = bao.client().write_data(f"{mount}/root/rotate/internal", data=data)["data"]
    bao.client().write_data(f"{mount}/config/issuers", data={"default": answer["issuer_id"]})
    return x509.load_pem_x509_certificate(answer["certificate"].encode())


def upstream_toml(bao: OpenBao, mount: str, role: AppRole) -> str:
    return (
        f'[upstream]\nkind = "vault_pki"\n[upstream.vault]\naddress = "{bao.address}"\nca_file = "{bao.ca_file}"\n'
        f'mount = "{mount}"\nlogin = "approle"\nlogin_mount = "{role.mount}"\nrole_id = "{role.role_id}"\n'
        f'secret_id_file = "{role.secret_id_file}"\n'
    )


def test_trust_domain_with_its_root_in_vault(
    bao: OpenBao, mount: str, tmp_path: Path, key_server: KeyServerRig, new_ca: Any
) -> None:
    role = bao.approle(bao.policy(PKI_POLICY, mount=mount), directory=tmp_path)
    rig = new_ca(tmp_path / "ca", key_server, extra=upstream_toml(bao, mount, role))
    _, first, _ = rig.init()
    assert {step["state"] for step in first} == {"made", "kept"}
    assert {step["state"] for step in rig.init()[1]} == {"kept"}
    (root,) = x509.load_pem_x509_certificates(rig.bundle_pem)
    assert root.subject.rfc4514_string() == "CN=Organisation root"
    with rig.running():
        node = rig.node()
        leaf, issuing = node.chain
        issuing.verify_directly_issued_by(root)
        leaf.verify_directly_issued_by(issuing)
        second_root = generate_root(bao, mount, "Second root")
        with rig.local() as local:
            prepared = local.authorities.PrepareAuthority(ca_pb2.PrepareAuthorityRequest())
            bundle = local.authorities.GetBundle(ca_pb2.GetBundleRequest())
            assert second_root.public_bytes(Encoding.DER) in list(bundle.x509_authorities_der)
            local.authorities.ActivateAuthority(ca_pb2.ActivateAuthorityRequest(authority_id=prepared.authority_id))
            fresh = x509.load_der_x509_certificate(prepared.certificate_der)
            fresh.verify_directly_issued_by(second_root)
            role.revoke_secret_id()
            with pytest.raises(KeyreeveError) as refused:
                local.authorities.PrepareAuthority(ca_pb2.PrepareAuthorityRequest())
            assert isinstance(refused.value, VaultAccessDenied)
            assert "write a fresh secret_id there" in refused.value.detail


def test_issuer_that_is_no_root_is_named(
    bao: OpenBao, mount: str, tmp_path: Path, key_server: KeyServerRig, new_ca: Any
) -> None:
    below = bao.enable("pki")
    client = bao.client()
    csr = client.write_data(f"{below}/intermediate/generate/internal", data={"common_name": "Below"})["data"]["csr"]
    signed = client.write_data(f"{mount}/root/sign-intermediate", data={"csr": csr})["data"]["certificate"]
    client.write_data(f"{below}/intermediate/set-signed", data={"certificate": signed})
    role = bao.approle(bao.policy(PKI_POLICY, mount=below), directory=tmp_path)
    rig = new_ca(tmp_path / "ca", key_server, extra=upstream_toml(bao, below, role))
    code, _, stderr = rig.init(check=False)
    assert code != 0
    assert "the upstream's issuer is not self-signed" in stderr
    assert FailedPrecondition.default_code.value in stderr
