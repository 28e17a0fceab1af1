"""What stands around the services: the token's module, the OpenSSL provider, and the way from a proxy to the agent's socket."""

from __future__ import annotations

import os
import pwd
import re
import shutil
import stat
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

from keyreeve_common.errors import ConfigInvalid
from keyreeve_common.pkcs11_uri import parse_pkcs11_uri

from keyreeve_client.cli.doctor.findings import Finding, failed, ok, run, skipped, warning
from keyreeve_client.cli.doctor.installation import ConfigFile, Installation

PROVIDER = "keyreeve"


def check_tokens(installation: Installation) -> Iterator[Finding]:
    """PKCS#11 module, SoftHSM's configuration, token directory and token of each backend."""
    signer = installation.of("signer")
    if signer is None:
        yield skipped("tokens", "no signer.toml: this host holds no keys")
        return
    for backend in signer.tables("backend"):
        if backend.text("kind") == "pkcs11":
            yield from _token(backend)


def _token(backend: ConfigFile) -> Iterator[Finding]:
    check = f"token of backend {backend.text('name')}"
    try:
        uri = parse_pkcs11_uri(backend.text("uri") or "pkcs11:")
    except ConfigInvalid as error:
        yield failed(check, error.detail, "correct `uri` of this backend: docs/hsm.md has examples")
        return
    conf = backend.file("softhsm_conf")
    module = Path(uri.module_path) if uri.module_path else backend.file("module")
    if module is None or not module.is_file():
        yield failed(
            check,
            f"PKCS#11 module {module} is not there",
            "install it (Debian's softhsm2 for SoftHSM), or correct the path",
        )
        return
    if conf is None:
        yield ok(check, f"module {module}")
        return
    try:
        text = conf.read_text()
    except OSError as error:
        yield failed(check, f"{conf}: {error.strerror}", "write it: deploy/config/softhsm2.conf is a sample")
        return
    directory = re.search(r"^\s*directories\.tokendir\s*=\s*(\S+)", text, re.MULTILINE)
    if directory is None or not Path(directory.group(1)).is_dir():
        shown = directory.group(1) if directory else "none"
        yield failed(
            check,
            f"{conf} names token directory {shown}, which is not there",
            "restore it from its backup, or make a token",
        )
        return
    yield _token_label(check, backend.text("token_label") or uri.token, conf)


def _token_label(check: str, label: str | None, conf: Path) -> Finding:
    if label is None:
        return ok(check, f"{conf} and its token directory are there; the URI names no label to look for")
    if shutil.which("softhsm2-util") is None:
        return ok(
            check, f"{conf} and its token directory are there; softhsm2-util is not, so the label was not looked for"
        )
    answer = run(["softhsm2-util", "--show-slots"], env={**os.environ, "SOFTHSM2_CONF": str(conf)})
    labels = re.findall(r"^\s*Label:\s*(.*?)\s*$", answer.text, re.MULTILINE)
    if label in labels:
        return ok(check, f"token {label!r} is there")
    return failed(
        check,
        f"no token {label!r}; there are: {', '.join(name for name in labels if name) or 'none'}",
        "run as the signer's user; or make it with softhsm2-util --init-token",
    )


def check_provider(installation: Installation) -> Iterator[Finding]:
    """Whether OpenSSL on this host loads the provider."""
    if installation.of("agent") is None:
        yield skipped("OpenSSL provider", "no agent.toml: no proxies here")
        return
    directory = installation.provider or modules_directory()
    if directory is None:
        yield failed("OpenSSL provider", "the openssl program is not there", "apt-get install openssl")
        return
    if not (directory / f"{PROVIDER}.so").is_file():
        yield failed(
            "OpenSSL provider",
            f"{directory}/{PROVIDER}.so is not there",
            "make -C client/openssl-provider install, or name its directory with --provider",
        )
        return
    answer = run(["openssl", "list", "-providers", "-provider-path", str(directory), "-provider", PROVIDER])
    if answer.code == 0 and re.search(rf"^\s*{PROVIDER}\s*$", answer.text, re.MULTILINE):
        yield ok("OpenSSL provider", f"{directory}/{PROVIDER}.so loads")
    else:
        yield failed(
            "OpenSSL provider", f"does not load: {answer.last_line}", "it needs OpenSSL 3; build it on this system"
        )


def modules_directory() -> Path | None:
    """Where this host's OpenSSL looks for providers."""
    match = re.search(r'^MODULESDIR: "(.*)"$', run(["openssl", "version", "-m"]).text, re.MULTILINE)
    return Path(match.group(1)) if match else None


@dataclass(frozen=True, slots=True)
class User:
    uid: int
    gids: frozenset[int]


def check_reach(installation: Installation) -> Iterator[Finding]:
    """Whether the proxy's user can open the agent's socket: every directory on the way must let it pass."""
    agent = installation.of("agent")
    path = agent.file("sign_socket", "path") if agent else None
    check = f"way of {installation.proxy_user} to the sign socket"
    if path is None:
        yield skipped(check, "no agent.toml, or no sign_socket in it")
        return
    try:
        entry = pwd.getpwnam(installation.proxy_user)
    except KeyError:
        yield skipped(check, "no such user here; name the proxy's with --proxy-user")
        return
    user = User(entry.pw_uid, frozenset(os.getgrouplist(entry.pw_name, entry.pw_gid)))
    try:
        for directory in reversed(path.parents):
            if not _permits(directory.stat(), user, stat.S_IXOTH):
                yield failed(
                    check, f"{directory} lets it not pass", f"chmod o+x {directory}, or put the socket elsewhere (/run)"
                )
                return
        if not _permits(path.stat(), user, stat.S_IWOTH):
            yield failed(
                check, f"{path} is not writable for it", "set [sign_socket] mode in agent.toml; the default is 0666"
            )
            return
    except OSError as error:
        yield warning(check, f"{error.filename}: {error.strerror}", "run the doctor as root, while the agent runs")
        return
    yield ok(check, "open")


def _permits(status: os.stat_result, user: User, bit_of_others: int) -> bool:
    """The check that the kernel makes for a user without privileges: owner, else group, else others."""
    if user.uid == 0:
        return True
    if status.st_uid == user.uid:
        return bool(status.st_mode & bit_of_others << 6)
    if status.st_gid in user.gids:
        return bool(status.st_mode & bit_of_others << 3)
    return bool(status.st_mode & bit_of_others)
