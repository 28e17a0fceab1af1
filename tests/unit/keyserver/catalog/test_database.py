"""The table of database errors."""

from __future__ import annotations

import pytest
from keyreeve_common.errors import ConfigInvalid, Internal, KeyreeveError, StorageBusy, StorageFull, Unavailable
from keyreeve_keyserver.catalog.database import storage_error
from keyreeve_keyserver.catalog.records import purposes_from_text, time_from_number, time_to_number
from sqlalchemy.exc import OperationalError


class _PgError(Exception):
    def __init__(self, sqlstate: str | None, message: str = "") -> None:
        super().__init__(message)
        self.sqlstate = sqlstate


@pytest.mark.parametrize(
    ("sqlstate", "kind"),
    [
        ("53100", StorageFull),
        ("53300", Unavailable),
        ("55P03", StorageBusy),
        ("57014", StorageBusy),
        ("40001", StorageBusy),
        ("57P01", Unavailable),
        ("25006", Unavailable),
        ("28P01", ConfigInvalid),
        (None, Unavailable),
        ("42703", Internal),
    ],
)
def test_sqlstate(sqlstate: str | None, kind: type[KeyreeveError]) -> None:
    assert type(storage_error(OperationalError("SELECT 1", None, _PgError(sqlstate)))) is kind


def test_times_and_purposes_round_trip() -> None:
    assert time_to_number(time_from_number(1_767_323_045_678_901)) == 1_767_323_045_678_901
    assert purposes_from_text("tls13_server_verify") is purposes_from_text("tls13_server_verify")
