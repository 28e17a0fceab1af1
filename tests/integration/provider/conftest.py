"""Fixtures of the provider's tests. Every one of them needs the compiled provider and says so where it is missing."""

from __future__ import annotations

import shutil
import sys
import tempfile
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

sys.path.insert(0, str(Path(__file__).parent))

from fake_agent import FakeAgent
from nginx_server import Nginx
from provider_support import (
    PROVIDER,
    Authority,
    Identity,
    environment,
    make_authority,
    make_identity,
    write_openssl_conf,
)


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    for item in items:
        if Path(__file__).parent in item.path.parents:
            item.add_marker(pytest.mark.native)


@pytest.fixture(scope="session", autouse=True)
def _provider_is_built() -> None:
    if not PROVIDER.is_file():
        pytest.fail(f"{PROVIDER} is missing: run make -C client/openssl-provider", pytrace=False)


@pytest.fixture(scope="session")
def authority() -> Authority:
    return make_authority()


@pytest.fixture
def work(tmp_path: Path) -> Iterator[Path]:
    """A directory that unprivileged workers can reach and whose socket paths stay below 108 bytes."""
    directory = Path(tempfile.mkdtemp(prefix="keyreeve-"))
    directory.chmod(0o755)
    yield directory
    shutil.rmtree(directory)


@pytest.fixture
def agent(work: Path) -> Iterator[FakeAgent]:
    with FakeAgent(work / "sign.sock", {}) as running_agent:
        yield running_agent


@pytest.fixture
def identity_of(work: Path, agent: FakeAgent, authority: Authority) -> Callable[[str], Identity]:
    """Makes an identity of a kind of key and gives the key to the agent, and to nobody else."""

    def make(kind: str) -> Identity:
        identity = make_identity(work, agent.path, authority, kind)
        agent.keys[identity.key_id] = identity.key
        return identity

    return make


@pytest.fixture
def conf(work: Path) -> Path:
    return write_openssl_conf(work / "openssl.cnf", deadline_ms=5000)


@pytest.fixture
def env(conf: Path) -> dict[str, str]:
    return environment(conf)


@pytest.fixture
def nginx(work: Path, env: dict[str, str]) -> Callable[..., Nginx]:
    """Describes an nginx that serves with this identity; enter it to run it."""

    def describe(identity: Identity, **settings: str) -> Nginx:
        return Nginx(work, identity, {**env, **settings})

    return describe
