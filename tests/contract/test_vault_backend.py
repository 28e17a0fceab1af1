"""What is particular to keys in Vault, against a real OpenBao server: they cannot leave, a rotation changes nothing, log-ins go on."""

from __future__ import annotations

import asyncio
import itertools
import time
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from datetime import UTC, datetime, timedelta
from pathlib import Path
from typing import Any

import hvac
import pytest
from cryptography.hazmat.primitives.serialization import load_der_public_key
from keyreeve_common.errors import (
    FailedPrecondition,
    KeyNotFound,
    KeyreeveError,
    KeyTypeNotSupported,
    RateLimited,
    SealedRecordInvalid,
    TokenUnavailable,
    VaultAccessDenied,
)
from keyreeve_common.key_id import KeyId
from keyreeve_common.purposes import KeyRole, Purpose
from keyreeve_common.schemes import KeyType, schemes_of
from keyreeve_common.vault.config import VaultLogin
from keyreeve_common.verification import verify_signature
from keyreeve_keyserver.backends.ports import BackendState, SignatureMismatch, SignOutcome, SignRequest
from keyreeve_keyserver.backends.vault_backend import VaultBackend
from keyreeve_keyserver.backends.worker_place import PoolPolicy
from keyreeve_keyserver.domain.keys import Custody, KeyRecord
from keyreeve_keyserver.domain.secret import Secret
from keyreeve_keyserver.signer.sealing import Sealer, TokenKey
from keyreeve_testing.openbao import (
    PREFIX,
    SEALING_POLICY,
    TRANSIT_POLICY,
    AppRole,
    OpenBao,
    transit_config,
    vault_backend,
    write_secret,
)
from keyreeve_testing.token_review import ACCOUNT, NAMESPACE, TokenReviews, service_account_token, serving

pytestmark = pytest.mark.openbao
_NUMBERS = itertools.count(1)
MESSAGE = b"a message that the signer has judged"


@asynccontextmanager
async def running(made: VaultBackend) -> AsyncIterator[VaultBackend]:
    await made.start()
    try:
        yield made
    finally:
        await made.close()


@pytest.fixture
def mount(bao: OpenBao) -> str:
    return bao.enable("transit")


@pytest.fixture
def policy(bao: OpenBao, mount: str) -> str:
    return bao.policy(TRANSIT_POLICY, mount=mount, prefix=PREFIX)


@pytest.fixture
async def backend(bao: OpenBao, mount: str, policy: str, tmp_path: Path) -> AsyncIterator[VaultBackend]:
    token_file = bao.token(policy, directory=tmp_path)
    async with running(vault_backend(transit_config(bao, mount, login=VaultLogin.TOKEN, token_file=token_file))) as it:
        yield it


def by_approle(bao: OpenBao, mount: str, role: AppRole, **options: Any) -> VaultBackend:
    config = transit_config(
        bao,
        mount,
        login=VaultLogin.APPROLE,
        login_mount=role.mount,
        role_id=role.role_id,
        secret_id_file=role.secret_id_file,
    )
    return vault_backend(config, **options)


async def made_key(backend: VaultBackend, key_type: KeyType = KeyType.EC_P256) -> KeyRecord:
    key_id = KeyId(f"key-{next(_NUMBERS)}")
    created = await backend.create(key_id, key_type)
    assert created.secret is None
    return KeyRecord(
        key_id=key_id,
        key_type=key_type,
        role=KeyRole.HANDSHAKE,
        purposes=frozenset({Purpose.TLS13_SERVER_VERIFY}),
        backend=backend.name,
        backend_ref=created.backend_ref,
        spki_der=created.spki_der,
        label="test",
        created=datetime(2026, 1, 1, tzinfo=UTC),
    )


async def loaded_key(backend: VaultBackend, key_type: KeyType = KeyType.EC_P256) -> KeyRecord:
    record = await made_key(backend, key_type)
    await backend.load(record, None)
    return record


def name_of(record: KeyRecord) -> str:
    return record.backend_ref.removesuffix("-v1")


async def signed(backend: VaultBackend, record: KeyRecord, *, seconds: float = 20) -> SignOutcome:
    scheme = schemes_of(record.key_type)[-1]
    (outcome,) = await backend.sign([SignRequest(record, scheme, MESSAGE, time.monotonic() + seconds)])
    if isinstance(outcome, bytes):
        verify_signature(load_der_public_key(record.spki_der), scheme, MESSAGE, signature=outcome)
    return outcome


async def until_signed(backend: VaultBackend, record: KeyRecord, *, seconds: float = 60) -> None:
    deadline = time.monotonic() + seconds
    while not isinstance(outcome := await signed(backend, record), bytes):
        assert time.monotonic() < deadline, outcome
        await asyncio.sleep(0.05)


async def until_error(backend: VaultBackend, record: KeyRecord, kind: type[KeyreeveError]) -> KeyreeveError:
    deadline = time.monotonic() + 60
    while True:
        outcome = await signed(backend, record)
        if type(outcome) is kind:
            return outcome
        assert time.monotonic() < deadline, outcome
        await asyncio.sleep(0.05)


@pytest.mark.parametrize("key_type", [KeyType.EC_P256, KeyType.ED25519, KeyType.RSA_2048])
async def test_key_cannot_leave_vault(backend: VaultBackend, bao: OpenBao, mount: str, key_type: KeyType) -> None:
    created = await backend.create(KeyId("fixed"), key_type)
    name = created.backend_ref.removesuffix("-v1")
    assert backend.capabilities().custody is Custody.VAULT_TRANSIT
    assert created.attributes == {
        "transit_mount": mount,
        "transit_key": name,
        "transit_version": "1",
        "exportable": False,
        "allow_plaintext_backup": False,
        "imported": False,
    }
    root = bao.client().secrets.transit
    with pytest.raises(hvac.exceptions.VaultError, match="not exportable"):
        root.export_key(name, "signing-key", mount_point=mount)
    with pytest.raises(hvac.exceptions.VaultError, match=r"disallowed|not allowed|not exportable"):
        root.backup_key(name, mount_point=mount)


async def test_key_that_was_made_exportable_is_not_loaded(backend: VaultBackend, bao: OpenBao, mount: str) -> None:
    record = await made_key(backend)
    bao.client().secrets.transit.update_key_configuration(name_of(record), mount_point=mount, exportable=True)
    with pytest.raises(FailedPrecondition, match="can leave Vault"):
        await backend.load(record, None)


async def test_rotation_in_vault_changes_nothing(backend: VaultBackend, bao: OpenBao, mount: str) -> None:
    record = await loaded_key(backend)
    transit = bao.client().secrets.transit
    transit.rotate_key(name_of(record), mount_point=mount)
    assert isinstance(await signed(backend, record), bytes)
    backend.forget(record.key_id)
    await backend.load(record, None)
    assert isinstance(await signed(backend, record), bytes)
    transit.update_key_configuration(name_of(record), mount_point=mount, min_encryption_version=2)
    outcome = await signed(backend, record)
    assert isinstance(outcome, KeyNotFound)
    assert "min_encryption_version" in outcome.detail


async def test_another_key_of_the_same_name_signs_nothing(backend: VaultBackend, bao: OpenBao, mount: str) -> None:
    """Whoever rules Vault can replace a key; the public key of the record tells."""
    record = await loaded_key(backend)
    transit = bao.client().secrets.transit
    transit.update_key_configuration(name_of(record), mount_point=mount, deletion_allowed=True)
    transit.delete_key(name_of(record), mount_point=mount)
    outcome = await signed(backend, record)
    assert isinstance(outcome, KeyNotFound)
    transit.create_key(name_of(record), key_type="ecdsa-p256", mount_point=mount)
    assert isinstance(await signed(backend, record), SignatureMismatch)
    with pytest.raises(SealedRecordInvalid, match="not the record's"):
        await backend.load(record, None)


async def test_record_of_a_destroyed_key_does_not_open_a_later_key_of_its_id(backend: VaultBackend) -> None:
    first = await loaded_key(backend)
    await backend.destroy(first)
    await backend.create(first.key_id, KeyType.EC_P256)
    with pytest.raises(KeyNotFound):
        await backend.load(first, None)


async def test_policy_that_forbids_is_named(bao: OpenBao, mount: str, tmp_path: Path) -> None:
    text = 'path "{mount}/keys/{prefix}*" { capabilities = ["create", "read", "update"] }'
    lame = bao.token(bao.policy(text, mount=mount, prefix=PREFIX), directory=tmp_path)
    async with running(vault_backend(transit_config(bao, mount, login=VaultLogin.TOKEN, token_file=lame))) as backend:
        record = await loaded_key(backend)
        outcome = await signed(backend, record)
        assert isinstance(outcome, VaultAccessDenied)
        assert "signing: Vault's policy does not permit this" in outcome.detail
        with pytest.raises(VaultAccessDenied, match="destroying the key"):
            await backend.destroy(record)


def _sealer(backend: VaultBackend, key: str = "records") -> Sealer:
    return Sealer(TokenKey(backend, key))


@pytest.fixture
async def sealing(bao: OpenBao, mount: str, tmp_path: Path) -> AsyncIterator[VaultBackend]:
    policies = [bao.policy(SEALING_POLICY, mount=mount, key=key) for key in ("records", "signing")]
    keys = bao.policy(TRANSIT_POLICY, mount=mount, prefix=PREFIX)
    token_file = bao.token(*policies, keys, directory=tmp_path)
    async with running(vault_backend(transit_config(bao, mount, login=VaultLogin.TOKEN, token_file=token_file))) as it:
        yield it


async def test_record_sealed_by_vault_opens_and_is_bound_to_its_header(
    sealing: VaultBackend, bao: OpenBao, mount: str
) -> None:
    sealer, record = _sealer(sealing), await made_key(sealing)
    for secret in (None, Secret(b"the PKCS#8 of a software key")):
        sealed = await sealer.seal(record, secret)
        assert sealed.startswith(b"KRV1")
        opened, found = await sealer.open(sealed)
        assert opened == record
        assert (found.reveal() if found else None) == (secret.reveal() if secret else None)
        at_nonce = sealed.index(b"vault:v1:") - 12
        for at in (20, at_nonce, at_nonce + 11, len(sealed) - 8):
            changed = bytearray(sealed)
            changed[at] ^= 1
            with pytest.raises(SealedRecordInvalid):
                await sealer.open(bytes(changed))
    data = bao.client().secrets.transit.read_key("records", mount_point=mount)["data"]
    assert (data["type"], data["exportable"], data["allow_plaintext_backup"]) == ("aes256-gcm96", False, False)


async def test_sealed_records_outlive_a_rotation_of_the_key(sealing: VaultBackend, bao: OpenBao, mount: str) -> None:
    sealer, record = _sealer(sealing), await made_key(sealing)
    before = await sealer.seal(record, Secret(b"one"))
    transit = bao.client().secrets.transit
    transit.rotate_key("records", mount_point=mount)
    assert b"vault:v2:" in await sealer.seal(record, Secret(b"two"))
    assert (await sealer.open(before))[0] == record
    transit.update_key_configuration("records", mount_point=mount, min_decryption_version=2)
    with pytest.raises(SealedRecordInvalid, match="min_decryption_version"):
        await sealer.open(before)


async def test_key_of_another_type_is_not_used_to_seal(sealing: VaultBackend, bao: OpenBao, mount: str) -> None:
    record = await made_key(sealing)
    bao.client().secrets.transit.create_key("signing", key_type="rsa-2048", mount_point=mount)
    with pytest.raises(FailedPrecondition, match="not of type aes256-gcm96"):
        await _sealer(sealing, "signing").seal(record, None)


async def test_tokens_that_expire_under_load_fail_no_signature(
    bao: OpenBao, mount: str, policy: str, tmp_path: Path
) -> None:
    """A token lives 2 s and, renewed, 4 s: in seven seconds each worker renews and logs in anew more than once."""
    role = bao.approle(policy, directory=tmp_path, token_ttl="2s", token_max_ttl="4s")
    async with running(by_approle(bao, mount, role)) as backend:
        record = await loaded_key(backend)
        end = time.monotonic() + 7
        while time.monotonic() < end:
            outcomes = await asyncio.gather(*(signed(backend, record) for _ in range(4)))
            assert all(isinstance(outcome, bytes) for outcome in outcomes), outcomes


async def test_revoked_secret_id_is_named_and_a_fresh_one_found_without_restart(
    bao: OpenBao, mount: str, policy: str, tmp_path: Path
) -> None:
    role = bao.approle(policy, directory=tmp_path)
    secret_id = role.secret_id_file.read_text().strip()
    async with running(by_approle(bao, mount, role, workers=1)) as backend:
        record = await loaded_key(backend)
        pids = backend.worker_pids
        role.revoke_secret_id()
        bao.client().sys.revoke_prefix(f"auth/{role.mount}")  # the tokens go too
        error = await until_error(backend, record, VaultAccessDenied)
        assert f"the secret_id in {role.secret_id_file}: write a fresh secret_id there" in error.detail
        assert secret_id not in error.detail
        role.issue_secret_id()
        await until_signed(backend, record)
        assert backend.worker_pids == pids
        for pid in pids:
            for file in ("cmdline", "environ"):
                seen = Path(f"/proc/{pid}/{file}").read_bytes()
                assert secret_id.encode() not in seen
                assert role.secret_id_file.read_bytes().strip() not in seen


async def test_kubernetes_login_reads_the_service_account_token_again(
    bao: OpenBao, mount: str, policy: str, tmp_path: Path
) -> None:
    old, new = service_account_token("old"), service_account_token("new")
    jwt_file = write_secret(tmp_path / "token", old)
    jwt_file.chmod(0o644)  # as the kubelet leaves it
    with serving(TokenReviews(old)) as reviews:
        auth = f"kubernetes-{next(_NUMBERS)}"
        client = bao.client()
        client.sys.enable_auth_method("kubernetes", path=auth)
        client.write_data(
            f"auth/{auth}/config",
            data={
                "kubernetes_host": reviews.address,
                "kubernetes_ca_cert": bao.ca_file.read_text(),
                "token_reviewer_jwt": old,
                "disable_local_ca_jwt": True,
                "disable_iss_validation": True,
            },
        )
        client.write_data(
            f"auth/{auth}/role/keyreeve",
            data={
                "bound_service_account_names": [ACCOUNT],
                "bound_service_account_namespaces": [NAMESPACE],
                "token_policies": [policy],
                "token_ttl": "1h",
            },
        )
        config = transit_config(
            bao, mount, login=VaultLogin.KUBERNETES, login_mount=auth, role="keyreeve", jwt_file=jwt_file
        )
        async with running(vault_backend(config, workers=1)) as backend:
            record = await loaded_key(backend)
            assert isinstance(await signed(backend, record), bytes)
            reviews.valid = new
            bao.client().sys.revoke_prefix(f"auth/{auth}")
            error = await until_error(backend, record, VaultAccessDenied)
            assert "service account token for role keyreeve" in error.detail
            assert old not in error.detail
            jwt_file.write_text(new)
            await until_signed(backend, record)


async def test_token_file_is_read_again_when_it_changes(bao: OpenBao, mount: str, policy: str, tmp_path: Path) -> None:
    token_file = bao.token(policy, directory=tmp_path, ttl="1h")
    first = token_file.read_text().strip()
    config = transit_config(bao, mount, login=VaultLogin.TOKEN, token_file=token_file)
    async with running(vault_backend(config, workers=1)) as backend:
        record = await loaded_key(backend)
        bao.client().auth.token.revoke(first)
        error = await until_error(backend, record, VaultAccessDenied)
        assert f"the token in {token_file}: put a fresh one there" in error.detail
        token_file.write_text(bao.token(policy, directory=tmp_path).read_text())
        await until_signed(backend, record)


async def test_idle_token_file_is_kept_alive(bao: OpenBao, mount: str, policy: str, tmp_path: Path) -> None:
    """A periodic token that nobody renews would be gone after its period, and nobody could log in anew."""
    token_file = bao.token(policy, directory=tmp_path, period="4s")
    token = token_file.read_text().strip()
    config = transit_config(bao, mount, login=VaultLogin.TOKEN, token_file=token_file)
    async with running(vault_backend(config, workers=1, policy=PoolPolicy(keepalive=timedelta(0)))) as backend:
        record = await loaded_key(backend)
        accessor = bao.client(token).auth.token.lookup_self()["data"]["accessor"]
        end = time.monotonic() + 6
        while time.monotonic() < end:
            await asyncio.sleep(0.2)
            bao.client().auth.token.lookup_accessor(accessor)
        assert isinstance(await signed(backend, record), bytes)


async def test_rate_limit_of_vault_is_ours(bao: OpenBao, mount: str, policy: str, tmp_path: Path) -> None:
    token_file = bao.token(policy, directory=tmp_path)
    config = transit_config(bao, mount, login=VaultLogin.TOKEN, token_file=token_file)
    async with running(vault_backend(config)) as backend:
        record = await loaded_key(backend)
        quota = f"quota-{next(_NUMBERS)}"
        bao.client().write_data(f"sys/quotas/rate-limit/{quota}", data={"rate": 1, "path": mount})
        try:
            error = await until_error(backend, record, RateLimited)
            assert "raise the quota" in error.detail
        finally:
            bao.client().delete(f"sys/quotas/rate-limit/{quota}")
        assert isinstance(await signed(backend, record), bytes)


async def test_faults_are_named_and_say_what_to_do(bao: OpenBao, mount: str, policy: str, tmp_path: Path) -> None:
    good: dict[str, Any] = {"login": VaultLogin.TOKEN, "token_file": bao.token(policy, directory=tmp_path)}
    other_ca = tmp_path / "other-ca.pem"
    other_ca.write_bytes(_foreign_authority())
    cases: dict[str, dict[str, Any]] = {
        "Vault cannot be reached": {**good, "address": "https://127.0.0.1:1"},
        "TLS with Vault failed": {**good, "ca_file": other_ca},
        "missing: secret file cannot be read": {**good, "token_file": tmp_path / "missing"},
        "policy does not permit": {**good, "mount": "nothing-here"},
        "does not accept role_id": {
            "login": VaultLogin.APPROLE,
            "login_mount": "no-approle",
            "role_id": "x",
            "secret_id_file": write_secret(tmp_path / "s", "y"),
        },
    }
    for text, changes in cases.items():
        backend = vault_backend(transit_config(bao, **{"mount": mount, **changes}), workers=1)
        async with running(backend):
            assert backend.health().state is BackendState.DOWN, text
            with pytest.raises(TokenUnavailable, match=text) as refused:
                await backend.create(KeyId("x"), KeyType.EC_P256)
            assert "\n" not in refused.value.detail


def _foreign_authority() -> bytes:
    from keyreeve_testing.pki import TestPki

    return TestPki().bundle_pem


async def test_worker_reads_its_secret_and_little_else(backend: VaultBackend) -> None:
    protections = dict(backend._pool.description["protections"])
    if "needs Landlock" in protections["files"]:
        pytest.skip("this kernel has no Landlock")
    assert protections["files"] == "on"
    assert isinstance(await signed(backend, await loaded_key(backend)), bytes)


async def test_key_type_that_vault_lacks_is_not_offered(backend: VaultBackend, monkeypatch: pytest.MonkeyPatch) -> None:
    """What the worker's probe says is what `create` goes by."""
    offered = backend.capabilities().key_types
    assert set(offered) == set(KeyType)
    monkeypatch.setitem(backend._pool.description, "key_types", [KeyType.EC_P256.value])
    with pytest.raises(KeyTypeNotSupported):
        await backend.create(KeyId("x"), KeyType.RSA_4096)
