"""signer.toml: the example of the docs loads, every key of the code stands in the docs, and faults name their key."""

from __future__ import annotations

import dataclasses
import re
from datetime import timedelta
from pathlib import Path

import pytest
from keyreeve_common.config import load_config
from keyreeve_common.errors import ConfigInvalid
from keyreeve_keyserver.signer.config import BackendConfig, BackendKind, ListenConfig, SealingConfig, SignerConfig

PAGE = Path(__file__).parents[4] / "docs" / "protocol" / "signer-frames.md"


def load(tmp_path: Path, text: str) -> SignerConfig:
    path = tmp_path / "signer.toml"
    path.write_text(text)
    return load_config(SignerConfig, path)


def example() -> str:
    match = re.search(r"```toml\n(.*?)```", PAGE.read_text(), re.DOTALL)
    assert match is not None
    return match[1]


def test_example_of_the_docs_loads(tmp_path: Path) -> None:
    config = load(tmp_path, example())
    assert config.default_name == "hsm"
    assert [backend.kind for backend in config.backend] == [BackendKind.SOFTWARE, BackendKind.PKCS11]
    assert config.backend[1].call_timeout == timedelta(seconds=10)


def test_every_key_is_documented() -> None:
    page = PAGE.read_text()
    for kind, prefix in ((ListenConfig, "listen."), (SealingConfig, "sealing."), (BackendConfig, "backend[].")):
        for field in dataclasses.fields(kind):
            assert f"`{prefix}{field.name}`" in page
    for name in ("default_backend", "max_message_bytes"):
        assert f"`{name}`" in page


SEALING = '[sealing]\npassphrase_file = "p"\n'
SOFTWARE = '[[backend]]\nname = "software"\nkind = "software"\n'
HSM = '[[backend]]\nname = "hsm"\nkind = "pkcs11"\n'


def test_uri_says_what_the_separate_keys_say(tmp_path: Path) -> None:
    whole = load(tmp_path, SEALING + HSM + 'uri = "pkcs11:token=t;serial=1?module-path=/m.so&pin-source=/p"\n')
    parts = load(tmp_path, SEALING + HSM + 'uri = "pkcs11:token=t;serial=1"\nmodule = "/m.so"\npin_file = "/p"\n')
    assert whole.backend[0].token() == parts.backend[0].token()
    assert str(whole.backend[0].token()) == "pkcs11:token=t;serial=1?module-path=/m.so&pin-source=/p"
    label = load(tmp_path, SEALING + HSM + 'token_label = "t"\nmodule = "m.so"\npin_file = "/p"\n').backend[0].token()
    assert (label.token, label.module_path) == ("t", tmp_path / "m.so")


@pytest.mark.parametrize(
    ("text", "rule"),
    [
        (SOFTWARE, "sealing: missing"),
        (SEALING, "backend: missing"),
        ("backend = []\n" + SEALING, r"at least one \[\[backend\]\]"),
        (SEALING + SOFTWARE + SOFTWARE, "two backends"),
        (SEALING + SOFTWARE + SOFTWARE.replace('"software"\nkind', '"two"\nkind'), "default_backend names none"),
        ("max_message_bytes = 65537\n" + SEALING + SOFTWARE, "max_message_bytes"),
        ("[sealing]\n" + SOFTWARE, "give passphrase_file"),
        (SEALING + 'token_backend = "hsm"\n' + SOFTWARE, "give passphrase_file"),
        ('[sealing]\ntoken_backend = "hsm"\n' + SOFTWARE, "go together"),
        ('[sealing]\ntoken_backend = "software"\ntoken_key_label = "k"\n' + SOFTWARE, "no backend of kind pkcs11"),
        (SEALING + HSM, "uri or token_label is missing"),
        (SEALING + HSM + 'token_label = "t"\n', "module is missing"),
        (SEALING + HSM + 'token_label = "t"\nmodule = "/m"\n', "pin_file is missing"),
        (SEALING + HSM + 'uri = "pkcs11:?module-path=/m&pin-source=/p"\n', "names no token"),
        (SEALING + HSM + 'uri = "pkcs11:token=t"\ntoken_label = "t"\n', "uri or token_label, not both"),
        (
            SEALING + HSM + 'uri = "pkcs11:token=t?pin-source=/p"\nmodule = "/m"\npin_file = "/p"\n',
            "pin-source, not both",
        ),
        (SEALING + HSM + 'uri = "pkcs11:token=t?pin-value=1234"\n', "backend hsm: uri: .*pin-value is refused"),
        (SEALING + SOFTWARE + 'uri = "pkcs11:token=t"\n', "uri is for kind pkcs11 only"),
        (SEALING + SOFTWARE + 'pin_file = "p"\n', "pin_file is for kind pkcs11 only"),
        (SEALING + SOFTWARE + "workers = 65\n", "workers is not 0 to 64"),
        (SEALING + SOFTWARE + "pin = 1\n", "pin: unknown key"),
        (SEALING + SOFTWARE.replace('"software"\nkind', '"Soft Ware"\nkind'), "name is not 1 to 64"),
    ],
)
def test_faults_name_their_key(tmp_path: Path, text: str, rule: str) -> None:
    assert load(tmp_path, SEALING + SOFTWARE).default_name == "software"
    with pytest.raises(ConfigInvalid, match=rule):
        load(tmp_path, text)
