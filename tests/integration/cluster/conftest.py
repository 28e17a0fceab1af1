from __future__ import annotations

from collections.abc import Iterator

import pytest
from keyreeve_testing.cluster import Cluster, running_cluster
from keyreeve_testing.postgres import PostgresServer, postgres_is_installed, running_postgres


@pytest.fixture(scope="session")
def postgres() -> Iterator[PostgresServer]:
    if not postgres_is_installed():
        pytest.skip("PostgreSQL is not installed: replicas share a catalog there")
    with running_postgres() as server:
        yield server


@pytest.fixture(scope="module")
def cluster(tmp_path_factory: pytest.TempPathFactory, postgres: PostgresServer) -> Iterator[Cluster]:
    """One for a module: each test leaves both replicas serving."""
    with running_cluster(tmp_path_factory.mktemp("cluster"), postgres.make_database()) as running:
        yield running
