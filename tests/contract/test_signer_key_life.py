"""The real signer and the end of keys: permits to destroy hold for one key, from their time on, and nobody else writes one."""

from __future__ import annotations

import base64
import subprocess
from collections.abc import Iterator
from datetime import UTC, datetime, timedelta
from hashlib import sha256
from pathlib import Path
from typing import Any, ClassVar

import pytest
from cryptography.hazmat.primitives.asymmetric import ec, ed25519
from cryptography.hazmat.primitives.serialization import Encoding, PublicFormat, load_der_public_key
from keyreeve_common.approvals import ApprovalRequest, Operation, PrivateKey, sign_request
from keyreeve_common.errors import (
    ApprovalInvalid,
    ApprovalRequired,
    FailedPrecondition,
    InvalidRequest,
    SealedRecordInvalid,
)
from keyreeve_common.key_attestation import verify_attestation
from keyreeve_keyserver import frames
from keyreeve_testing.signer import SignerClient, running_signer, signer_command, write_signer_config
from keyreeve_testing.softhsm import make_softhsm_token, softhsm_is_installed
from keyreeve_testing.tbs import AUTHORITY_NAME


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


class TestApprovals:
    """An owned front end: it has the signer's frames and every record, and no approver's key."""

    NOW = datetime.now(UTC).replace(microsecond=0)
    PROFILE: ClassVar[dict[str, Any]] = {
        "trust_domain": "td.test",
        "kind": "root",
        "subject_der": base64.b64encode(AUTHORITY_NAME.public_bytes()).decode(),
        "max_validity_s": 3600,
        "max_backdate_s": 60,
        "max_path_length": 0,
    }
    AUTHORITY: ClassVar[dict[str, Any]] = {
        "key_type": "ec-p256",
        "role": "authority",
        "purposes": ["x509_certificate"],
        "backend": "software",
        "label": "root",
        "authority_profile": PROFILE,
    }

    @pytest.fixture
    def people(self) -> dict[str, PrivateKey]:
        names = ("alice", "bob", "carol")
        kinds = (
            ed25519.Ed25519PrivateKey.generate(),
            ec.generate_private_key(ec.SECP256R1()),
            ec.generate_private_key(ec.SECP384R1()),
        )
        return dict(zip(names, kinds, strict=True))

    @pytest.fixture
    def config(self, tmp_path: Path, people: dict[str, PrivateKey]) -> Path:
        config = write_signer_config(tmp_path / "etc")
        lines = ["[approvals]", "required = 2"]
        for name, key in people.items():
            pem = key.public_key().public_bytes(Encoding.PEM, PublicFormat.SubjectPublicKeyInfo)
            (tmp_path / "etc" / f"{name}.pem").write_bytes(pem)
            lines += ["[[approvals.approver]]", f'name = "{name}"', f'public_key_file = "{name}.pem"']
        config.write_text(config.read_text() + "\n".join(lines) + "\n")
        return config

    @pytest.fixture
    def signer(self, tmp_path: Path, config: Path) -> Iterator[SignerClient]:
        with running_signer(config, log=tmp_path / "signer.log") as client:
            yield client

    def request(self, key: dict[str, Any], *, request_id: str = "r1", hours: int = 1) -> ApprovalRequest:
        operation = Operation.DESTROY_KEY if "key_id" in key else Operation.CREATE_KEY
        if operation is Operation.CREATE_KEY:
            key = {"jwt_profile": None, **key}
        return ApprovalRequest(operation, request_id, self.NOW + timedelta(hours=hours), key)

    def signed(self, request: ApprovalRequest, people: dict[str, PrivateKey], *names: str) -> list[str]:
        return [sign_request(request, name, people[name]).to_text() for name in names]

    def doomed(self, made: dict[str, Any], key_id: str, wait_s: int = 0) -> dict[str, Any]:
        digest = sha256(base64.b64decode(made["spki_der"])).hexdigest()
        return {"key_id": key_id, "spki_sha256": digest, "role": "handshake", "label": "", "wait_s": wait_s}

    def test_no_authority_is_made_without_them(self, signer: SignerClient, people: dict[str, PrivateKey]) -> None:
        request, mallory = self.request(self.AUTHORITY), ed25519.Ed25519PrivateKey.generate()
        one = self.signed(request, people, "alice")
        attempts: list[tuple[list[str] | None, type[Exception], str]] = [
            (None, ApprovalRequired, "0 came; not yet: alice, bob, carol"),
            (one, ApprovalRequired, "1 came; not yet: bob, carol"),
            (one * 2, ApprovalRequired, "1 came"),
            ([*one, sign_request(request, "mallory", mallory).to_text()], ApprovalInvalid, "no approver"),
            ([*one, sign_request(request, "bob", mallory).to_text()], ApprovalInvalid, "does not verify"),
            ([*one, sign_request(request, "bob", people["alice"]).to_text()], ApprovalInvalid, "does not verify"),
            ([*one, "{}"], ApprovalInvalid, "members"),
            (
                [*one, *self.signed(self.request(self.AUTHORITY, request_id="r2"), people, "bob")],
                ApprovalInvalid,
                "another request",
            ),
        ]
        for given, kind, text in attempts:
            with pytest.raises(kind, match=text):
                signer.control("create_key", key_id="k", **self.AUTHORITY, request_id="r1", approvals=given)
        assert signer.control(
            "create_key",
            key_id="k",
            **self.AUTHORITY,
            request_id="r1",
            approvals=self.signed(request, people, "alice", "carol"),
        )["record"]

    @pytest.mark.parametrize(
        "change",
        [
            {"label": "other"},
            {"key_type": "ec-p384"},
            {"purposes": ["x509_certificate", "certificate_request"]},
            {"authority_profile": {**PROFILE, "max_validity_s": 7200}},
            {"authority_profile": {**PROFILE, "trust_domain": "other.test"}},
        ],
        ids=str,
    )
    def test_they_hold_for_the_very_key(
        self, signer: SignerClient, people: dict[str, PrivateKey], change: dict[str, Any]
    ) -> None:
        approvals = self.signed(self.request(self.AUTHORITY), people, "alice", "bob")
        with pytest.raises(ApprovalInvalid, match="differ"):
            signer.control(
                "create_key", key_id="k", **{**self.AUTHORITY, **change}, request_id="r1", approvals=approvals
            )
        with pytest.raises(ApprovalInvalid, match="request_id"):
            signer.control("create_key", key_id="k", **self.AUTHORITY, request_id="r2", approvals=approvals)

    @pytest.mark.parametrize(("hours", "text"), [(-1, "expired"), (31 * 24, "30 days ahead")])
    def test_they_expire(self, signer: SignerClient, people: dict[str, PrivateKey], hours: int, text: str) -> None:
        approvals = self.signed(self.request(self.AUTHORITY, hours=hours), people, "alice", "bob")
        with pytest.raises(ApprovalInvalid, match=text):
            signer.control("create_key", key_id="k", **self.AUTHORITY, request_id="r1", approvals=approvals)

    def test_used_again_they_give_the_same_key(self, signer: SignerClient, people: dict[str, PrivateKey]) -> None:
        """One at a time and all at once, under whatever key id."""
        approvals = self.signed(self.request(self.AUTHORITY), people, "alice", "bob")
        for number in range(4):
            arguments = {"key_id": f"k{number}", **self.AUTHORITY, "request_id": "r1", "approvals": approvals}
            signer.connection.sendall(frames.Control(100 + number, "create_key", arguments).to_bytes())
        answers = [signer.read_answer() for _ in range(4)]
        made = {answer.answer["spki_der"] for answer in answers if isinstance(answer, frames.ControlOk)}
        assert len(answers) == 4
        assert len(made) == 1

    def test_no_key_that_was_used_is_destroyed_without_them(
        self, signer: SignerClient, people: dict[str, PrivateKey]
    ) -> None:
        made = signer.control(
            "create_key", key_id="k", key_type="ec-p256", role="handshake", purposes=["tls13_server_verify"]
        )
        record, key = made["record"], self.doomed(made, "k")
        signer.control("load_key", record=record)
        signer.control("forget_key", key_id="k")
        with pytest.raises(ApprovalRequired):
            signer.control("destroy_key", record=record)
        with pytest.raises(ApprovalRequired):
            signer.control("permit_destruction", record=record, wait_s=0)
        agreed = self.signed(self.request(key), people, "bob", "carol")
        for wrong in (
            {"wait_s": 1},
            {"wait_s": 0, "approvals": self.signed(self.request({**key, "key_id": "k2"}), people, "bob", "carol")},
        ):
            with pytest.raises(ApprovalInvalid, match="differ"):
                signer.control("permit_destruction", record=record, **{"approvals": agreed, **wrong})
        creation = self.signed(self.request(self.AUTHORITY), people, "bob", "carol")
        with pytest.raises(ApprovalInvalid, match="for create_key"):
            signer.control("permit_destruction", record=record, wait_s=0, approvals=creation)
        permit = signer.control("permit_destruction", record=record, wait_s=0, approvals=agreed)["permit"]
        assert signer.control("permit_destruction", record=record, wait_s=0, approvals=agreed)["permit"] == permit
        assert signer.control("load_key", record=record)
        assert signer.control("destroy_key", record=record, permit=permit) == {}

    def test_key_that_never_signed_may_go_and_only_in_the_process_that_made_it(
        self, tmp_path: Path, config: Path, signer: SignerClient
    ) -> None:
        """What a creation that failed half way leaves behind."""
        arguments = {"key_type": "ec-p256", "role": "handshake", "purposes": ["tls13_server_verify"]}
        first, second = (signer.control("create_key", key_id=f"k{n}", **arguments)["record"] for n in range(2))
        assert signer.control("destroy_key", record=first) == {}
        with running_signer(config, log=tmp_path / "other.log") as other, pytest.raises(ApprovalRequired):
            other.control("destroy_key", record=second)

    def test_keys_of_tokens_need_them_too(self, signer: SignerClient, people: dict[str, PrivateKey]) -> None:
        wanted = {
            "key_type": "ec-p256",
            "role": "jwt-authority",
            "purposes": ["jwt_svid"],
            "backend": "software",
            "label": "",
            "authority_profile": None,
            "jwt_profile": {"trust_domain": "td.test", "max_ttl_s": 300},
        }
        with pytest.raises(ApprovalRequired):
            signer.control("create_key", key_id="k", **wanted, request_id="r1")
        agreed = self.signed(self.request(wanted), people, "alice", "bob")
        assert signer.control("create_key", key_id="k", **wanted, request_id="r1", approvals=agreed)["record"]

    def test_handshake_keys_are_made_as_ever(self, signer: SignerClient) -> None:
        assert create(signer, "k")

    def test_configuration_faults_are_named(self, tmp_path: Path, config: Path) -> None:
        text, pem = config.read_text(), (tmp_path / "etc" / "alice.pem").read_text()
        faults = {
            text.replace("required = 2", "required = 4"): "more than there are",
            text.replace("required = 2", "required = 0"): "set required",
            text.replace('name = "bob"', 'name = "alice"'): "the same name",
            text.replace('"bob.pem"', '"alice.pem"'): "the same public key",
            text.replace('"bob.pem"', '"none.pem"'): "cannot be read",
            text.replace('"bob.pem"', '"passphrase"'): "no public key",
        }
        assert pem
        for content, expected in faults.items():
            config.write_text(content)
            ended = subprocess.run(
                signer_command(config, "--check-config"), capture_output=True, text=True, timeout=30, check=False
            )
            assert ended.returncode == 78, content
            assert expected in ended.stderr


def test_signer_warns_that_nobody_is_asked(signer: SignerClient, tmp_path: Path) -> None:
    signer.control("health")
    assert '"approvals_not_configured"' in (tmp_path / "signer.log").read_text()


def attest(signer: SignerClient, record: str, sealed: str, nonce: bytes = bytes(16)) -> dict[str, Any]:
    encoded = base64.b64encode(nonce).decode()
    return signer.control("attest_key", record=record, nonce=encoded, attestation_key=sealed)


def statement_of(answer: dict[str, Any]) -> dict[str, Any]:
    public_key = load_der_public_key(base64.b64decode(answer["public_key"]))
    assert isinstance(public_key, ed25519.Ed25519PublicKey)
    return dict(verify_attestation(answer["attestation"], public_key, nonce=bytes(16)).statement)


@pytest.mark.parametrize(
    "backend",
    [
        "software",
        pytest.param(
            "hsm",
            marks=[
                pytest.mark.softhsm,
                pytest.mark.skipif(not softhsm_is_installed(), reason="softhsm2 is not installed"),
            ],
        ),
    ],
)
def test_attestation_says_what_the_token_says_and_holds_across_processes(tmp_path: Path, backend: str) -> None:
    token = make_softhsm_token(tmp_path / "softhsm") if backend == "hsm" else None
    config = write_signer_config(tmp_path / "etc", token=token)
    with running_signer(config, log=tmp_path / "log") as signer:
        made = signer.control(
            "create_key",
            key_id="k",
            key_type="ec-p256",
            role="handshake",
            purposes=["tls13_server_verify"],
            backend=backend,
        )
        sealed = signer.control("make_attestation_key")["attestation_key"]
        first = attest(signer, made["record"], sealed)
        assert signer.control("health")["keys_loaded"] == 0
        signer.control("load_key", record=made["record"])
        attest(signer, made["record"], sealed)
        assert signer.control("health")["keys_loaded"] == 1
    with running_signer(config, log=tmp_path / "log") as signer:
        second = attest(signer, made["record"], sealed)
    assert first["public_key"] == second["public_key"]
    for told in map(statement_of, (first, second)):
        assert (told["key_id"], told["spki_der"], told["purposes"]) == ("k", made["spki_der"], ["tls13_server_verify"])
        in_token = backend == "hsm"
        assert told["custody"] == ("token-resident" if in_token else "sealed-software")
        assert told["token"]["extractable"] is not in_token
        assert told["token"]["sensitive"] is in_token
        assert told["token"]["generated_in_token"] is in_token
        if in_token:
            assert told["token"]["never_extractable"] is told["token"]["always_sensitive"] is True
            assert told["token"]["token_serial"]


def test_what_is_no_attestation_key_or_nonce_is_refused(signer: SignerClient) -> None:
    record = create(signer, "k")
    sealed = base64.b64decode(signer.control("make_attestation_key")["attestation_key"])
    flipped = sealed[:-1] + bytes((sealed[-1] ^ 1,))
    for other in (flipped, base64.b64decode(permit(signer, record)), base64.b64decode(record), b""):
        with pytest.raises(SealedRecordInvalid):
            attest(signer, record, base64.b64encode(other).decode())
    with pytest.raises(InvalidRequest, match="nonce"):
        attest(signer, record, base64.b64encode(sealed).decode(), nonce=bytes(15))
    with pytest.raises(SealedRecordInvalid):  # nor is it a permit
        signer.control("destroy_key", record=record, permit=base64.b64encode(sealed).decode())
