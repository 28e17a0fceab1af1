"""Configuration of the signer: signer.toml. Secrets are paths to files, never values."""

from __future__ import annotations

import os
import re
from dataclasses import dataclass, field, replace
from datetime import timedelta
from enum import StrEnum
from pathlib import Path, PurePosixPath

from keyreeve_common.errors import ConfigInvalid, InvalidRequest
from keyreeve_common.key_id import parse_key_id
from keyreeve_common.pkcs11_uri import Pkcs11Uri, parse_pkcs11_uri
from keyreeve_common.purposes import MAX_MESSAGE_BYTES
from keyreeve_common.vault.config import VaultConfig, check_mount

from keyreeve_keyserver.audit.config import AuditConfig
from keyreeve_keyserver.backends.engines import EngineChoice
from keyreeve_keyserver.backends.qat_engine import DEFAULT_PROVIDER
from keyreeve_keyserver.domain.pair import Pair
from keyreeve_keyserver.hardening.lockdown import Protection

MAX_WORKERS = 64
_PROVIDER = re.compile(r"(/[^/\0]+)*/[A-Za-z0-9_-]{1,64}\.so|[A-Za-z0-9_-]{1,64}", re.ASCII)
_KEY_PREFIX = re.compile(r"[a-z0-9][a-z0-9-]{0,23}", re.ASCII)


class BackendKind(StrEnum):
    SOFTWARE = "software"
    PKCS11 = "pkcs11"
    VAULT = "vault"


@dataclass(frozen=True, slots=True)
class SealingConfig:
    """`passphrase_file`, with the parameters of scrypt in `kdf_file`; or an AES key of a PKCS#11 backend's token; or one of a Vault backend.

    `kdf_file` is made on the first start. Replicas that share a catalog share both files.
    """

    passphrase_file: Path | None = None
    kdf_file: Path | None = None
    token_backend: str | None = None
    token_key_label: str | None = None
    vault_backend: str | None = None
    vault_key_name: str | None = None

    def __post_init__(self) -> None:
        by_token = self.token_backend is not None or self.token_key_label is not None
        by_vault = self.vault_backend is not None or self.vault_key_name is not None
        _require(
            (self.passphrase_file is not None) + by_token + by_vault == 1,
            "give passphrase_file, or token_backend with token_key_label, or vault_backend with vault_key_name",
        )
        _require(
            not by_vault or (self.vault_backend is not None and self.vault_key_name is not None),
            "vault_backend and vault_key_name go together",
        )
        if self.vault_key_name is not None:
            _check_name(self.vault_key_name, "vault_key_name")
        _require(
            not by_token or (self.token_backend is not None and self.token_key_label is not None),
            "token_backend and token_key_label go together",
        )
        _require(self.kdf_file is None or self.passphrase_file is not None, "kdf_file goes with passphrase_file")
        if self.token_key_label is not None:
            _check_name(self.token_key_label, "token_key_label")

    @property
    def kdf_path(self) -> Path:
        """Where the parameters of scrypt stand: next to the passphrase unless configured."""
        assert self.passphrase_file is not None  # noqa: S101 - callers ask for it only in passphrase mode
        return self.kdf_file or self.passphrase_file.with_name(self.passphrase_file.name + ".kdf")


class KeyCustody(StrEnum):
    """Where a token's new keys rest: in the token, or outside it, wrapped by it."""

    RESIDENT = "resident"
    WRAPPED = "wrapped"


@dataclass(frozen=True, slots=True, kw_only=True)
class TransitConfig(VaultConfig):
    """`key_prefix` begins the names of the Transit keys that Keyreeve makes. Keys that exist keep their names when it is changed."""

    mount: str = "transit"
    key_prefix: str = "keyreeve-"

    def __post_init__(self) -> None:
        VaultConfig.__post_init__(self)
        check_mount(self.mount, "mount")
        _require(
            _KEY_PREFIX.fullmatch(self.key_prefix) is not None,
            "key_prefix is not up to 24 of a-z, 0-9 and '-' with a letter or digit first",
        )


@dataclass(frozen=True, slots=True)
class BackendConfig:
    """`workers` are threads of a software backend (0: one per processor) processes of a PKCS#11 (0: two) or Vault (0: four) backend.

    A token is named by `uri`, or by `token_label`; the module and the PIN's file stand in the URI or in keys of their own.
    """

    name: str
    kind: BackendKind
    uri: str | None = None
    module: Path | None = None
    token_label: str | None = None
    pin_file: Path | None = None
    softhsm_conf: Path | None = None
    custody: KeyCustody = KeyCustody.RESIDENT
    wrapping_key_label: str = "keyreeve-wrapping"
    loaded_keys: int = 64
    workers: int = 0
    engine: EngineChoice = EngineChoice.AUTO
    qat_provider: str = DEFAULT_PROVIDER
    call_timeout: timedelta = timedelta(seconds=30)
    sign_timeout: timedelta = timedelta(seconds=10)
    keepalive: timedelta = timedelta(seconds=30)
    breaker_faults: int = 5
    breaker_pause: timedelta = timedelta(seconds=1)
    vault: TransitConfig | None = None
    network: bool | None = None
    reads: tuple[Path, ...] | None = None
    writes: tuple[Path, ...] = ()

    def __post_init__(self) -> None:
        _check_name(self.name, "name")
        _require(
            (self.vault is not None) == (self.kind is BackendKind.VAULT),
            f"backend {self.name}: kind vault needs a table [backend.vault], and no other kind has one",
        )
        _require(0 <= self.workers <= MAX_WORKERS, f"workers is not 0 to {MAX_WORKERS}")
        _require(self.call_timeout >= timedelta(milliseconds=100), "call_timeout is below 100ms")
        _require(self.sign_timeout >= timedelta(milliseconds=100), "sign_timeout is below 100ms")
        _require(not timedelta(0) < self.keepalive < timedelta(seconds=1), "keepalive is below 1s, and not 0s (off)")
        _check_name(self.wrapping_key_label, "wrapping_key_label")
        _require(1 <= self.loaded_keys <= 100_000, "loaded_keys is not 1 to 100000")
        _require(
            self.kind is BackendKind.PKCS11 or self.custody is KeyCustody.RESIDENT,
            f"backend {self.name}: custody is for kind pkcs11 only",
        )
        _require(
            self.kind is BackendKind.SOFTWARE or self.engine is EngineChoice.AUTO,
            f"backend {self.name}: engine is for kind software only",
        )
        _require(
            self.engine is EngineChoice.QAT or self.qat_provider == DEFAULT_PROVIDER,
            f"backend {self.name}: qat_provider is for engine qat only",
        )
        _require(
            _PROVIDER.fullmatch(self.qat_provider) is not None,
            f"backend {self.name}: qat_provider is neither a name nor the absolute path of a provider's file",
        )
        _require(1 <= self.breaker_faults <= 1000, "breaker_faults is not 1 to 1000")
        _require(self.breaker_pause >= timedelta(milliseconds=100), "breaker_pause is below 100ms")
        if self.kind is BackendKind.PKCS11:
            self.token()
            return
        for key in ("uri", "module", "token_label", "pin_file", "softhsm_conf", "network", "reads"):
            _require(getattr(self, key) is None, f"backend {self.name}: {key} is for kind pkcs11 only")
        _require(not self.writes, f"backend {self.name}: writes is for kind pkcs11 only")

    @property
    def workers_wanted(self) -> int:
        """How many workers this host is to have, where none are configured too."""
        defaults = {BackendKind.SOFTWARE: len(os.sched_getaffinity(0)), BackendKind.PKCS11: 2, BackendKind.VAULT: 4}
        return self.workers or defaults[self.kind]

    def token(self) -> Pkcs11Uri:
        """The token of a PKCS#11 backend, with its module and the file of its PIN. Raises: ConfigInvalid."""
        uri = Pkcs11Uri(token=self.token_label) if self.uri is None else self._parsed(self.uri)
        _require(uri.selector != Pkcs11Uri(), f"backend {self.name}: uri or token_label is missing, or names no token")
        _require(
            self.uri is None or self.token_label is None, f"backend {self.name}: give uri or token_label, not both"
        )
        module = self._once("module", "module-path", self.module, uri.module_path)
        pin_file = self._once("pin_file", "pin-source", self.pin_file, uri.pin_source)
        return replace(uri, module_path=module, pin_source=pin_file)

    def _parsed(self, uri: str) -> Pkcs11Uri:
        try:
            return parse_pkcs11_uri(uri)
        except ConfigInvalid as error:
            raise ConfigInvalid(f"backend {self.name}: uri: {error.detail}") from None

    def _once(self, key: str, attribute: str, path: Path | None, of_uri: PurePosixPath | None) -> PurePosixPath:
        _require(path is None or of_uri is None, f"backend {self.name}: give {key} or the URI's {attribute}, not both")
        found = PurePosixPath(path) if path is not None else of_uri
        if found is None:
            raise ConfigInvalid(f"backend {self.name}: {key} is missing (or {attribute} in its uri)")
        return found


@dataclass(frozen=True, slots=True)
class ListenConfig:
    """Who may connect to the socket of `--listen`, by SO_PEERCRED."""

    allowed_uids: tuple[int, ...] = ()


@dataclass(frozen=True, slots=True)
class ApproverConfig:
    """A person who may approve: a name, and a public key (Ed25519, P-256 or P-384) in PEM."""

    name: str
    public_key_file: Path

    def __post_init__(self) -> None:
        _check_name(self.name, "approver.name")


@dataclass(frozen=True, slots=True)
class ApprovalsConfig:
    """How many of the approvers must agree before a key is destroyed or an authority's key is made; 0: nobody is asked."""

    required: int = 0
    approver: tuple[ApproverConfig, ...] = ()

    def __post_init__(self) -> None:
        names = [approver.name for approver in self.approver]
        _require(len(set(names)) == len(names), "two approvers have the same name")
        _require(0 <= self.required <= len(names), "required is more than there are approvers")
        _require(self.required > 0 or not names, "approvers are named and none is required: set required")


@dataclass(frozen=True, slots=True)
class HardeningConfig:
    """`required`: protections without which the signer does not start. Without it, what the host lacks is logged and shown by `health`."""

    required: tuple[Protection, ...] = ()


@dataclass(frozen=True, slots=True)
class SignerConfig:
    """`default_backend` may be left out where there is one backend only."""

    sealing: SealingConfig
    backend: tuple[BackendConfig, ...]
    default_backend: str = ""
    max_message_bytes: int = MAX_MESSAGE_BYTES
    listen: ListenConfig = field(default_factory=ListenConfig)
    approvals: ApprovalsConfig = field(default_factory=ApprovalsConfig)
    hardening: HardeningConfig = field(default_factory=HardeningConfig)
    audit: AuditConfig | None = None

    def __post_init__(self) -> None:
        names = [backend.name for backend in self.backend]
        _require(bool(names), "at least one [[backend]] is needed")
        _require(len(set(names)) == len(names), "two backends have the same name")
        _require(
            self.default_backend in names or (not self.default_backend and len(names) == 1),
            "default_backend names none",
        )
        _require(1 <= self.max_message_bytes <= MAX_MESSAGE_BYTES, f"max_message_bytes is not 1 to {MAX_MESSAGE_BYTES}")
        token_backends = [backend.name for backend in self.backend if backend.kind is BackendKind.PKCS11]
        by = self.sealing.token_backend
        _require(by is None or by in token_backends, "sealing.token_backend names no backend of kind pkcs11")
        vaults = [backend.name for backend in self.backend if backend.kind is BackendKind.VAULT]
        with_card = [backend for backend in self.backend if backend.engine is EngineChoice.QAT]
        _require(len(with_card) <= 1, "two backends have engine qat: the card's library is one for the whole process")
        by = self.sealing.vault_backend
        _require(by is None or by in vaults, "sealing.vault_backend names no backend of kind vault")

    def of_pair(self, pair: Pair) -> SignerConfig:
        """What the signer of this pair goes by: an audit log of its own, and its share of the workers, of which a token may bear few."""
        if pair.is_alone:
            return self
        audit = self.audit
        if audit is not None:
            audit = replace(audit, directory=pair.path(audit.directory), origin=pair.name(audit.origin))
        backends = tuple(replace(each, workers=pair.share(each.workers_wanted)) for each in self.backend)
        return replace(self, audit=audit, backend=backends)

    @property
    def default_name(self) -> str:
        return self.default_backend or self.backend[0].name


def _check_name(name: str, key: str) -> None:
    try:
        parse_key_id(name)
    except InvalidRequest:
        raise ConfigInvalid(f"{key} is not 1 to 64 of a-z, 0-9 and '-'") from None


def _require(condition: bool, rule: str) -> None:
    if not condition:
        raise ConfigInvalid(rule)
