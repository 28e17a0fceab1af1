"""What all tests share: no property has a time limit (machines are busy), and CI draws the same examples each time."""

from __future__ import annotations

import os
from collections.abc import Iterator
from typing import TYPE_CHECKING

import pytest
from hypothesis import settings

if TYPE_CHECKING:
    from keyreeve_testing.openbao import OpenBao

settings.register_profile("keyreeve", deadline=None, derandomize=bool(os.environ.get("CI")), print_blob=True)
settings.load_profile("keyreeve")


@pytest.fixture(scope="session")
def bao(tmp_path_factory: pytest.TempPathFactory) -> Iterator[OpenBao]:
    """One OpenBao server for all tests that leave it as it is: each mounts engines of its own."""
    from keyreeve_testing.openbao import OpenBao  # not at the top: a member's own environment lacks the server

    server = OpenBao(tmp_path_factory.mktemp("openbao"))
    try:
        yield server.start()
    finally:
        server.close()
