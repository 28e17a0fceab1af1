"""Opening the catalog's database, and the one table that turns its errors into ours.

SQLite: write-ahead log, synchronous, one writer at a time that waits `busy_timeout`. PostgreSQL: psycopg 3, bounded waits.
"""

from __future__ import annotations

import sqlite3
from collections.abc import Iterator
from contextlib import contextmanager
from datetime import timedelta
from pathlib import Path
from typing import Any, cast

from keyreeve_common.errors import (
    ConfigInvalid,
    FailedPrecondition,
    Internal,
    KeyreeveError,
    StorageBusy,
    StorageFull,
    Unavailable,
)
from sqlalchemy import URL, Connection, Engine, create_engine, event
from sqlalchemy.exc import DBAPIError, SQLAlchemyError
from sqlalchemy.exc import TimeoutError as PoolTimeout

RETRY_AFTER = timedelta(milliseconds=250)
WRITE = {"keyreeve_write": True}
_MILLISECOND = timedelta(milliseconds=1)
# A PostgreSQL host that is gone without a word is found out in about ten seconds, not in the kernel's hours. Spec: libpq-connect
TCP_BOUNDS = {"keepalives_idle": 5, "keepalives_interval": 2, "keepalives_count": 3, "tcp_user_timeout": 10_000}

_BUSY = (StorageBusy, "the catalog's database is locked by another process; nothing was changed")
_FULL = (StorageFull, "no space left for the catalog's database; free some, nothing was changed")
_DOWN = (Unavailable, "the catalog's database cannot be reached; check that it runs and that catalog.url is right")
_DENIED = (FailedPrecondition, "the catalog's database cannot be opened or written; check its owner and mode")
_BROKEN = (FailedPrecondition, "the catalog's database is damaged or not ours; restore it from a backup")
_LOGIN = (ConfigInvalid, "PostgreSQL refused the login; check catalog.url and catalog.password_file")

_Outcome = tuple[type[KeyreeveError], str]
# By SQLite's symbolic error name, the longest prefix counts. Spec: sqlite.org/rescode.html
_BY_SQLITE_NAME: dict[str, _Outcome] = {
    "SQLITE_BUSY": _BUSY,
    "SQLITE_LOCKED": _BUSY,
    "SQLITE_PROTOCOL": _BUSY,
    "SQLITE_FULL": _FULL,
    "SQLITE_IOERR_SHMSIZE": _FULL,
    "SQLITE_IOERR_WRITE": _FULL,
    "SQLITE_CANTOPEN": _DENIED,
    "SQLITE_READONLY": _DENIED,
    "SQLITE_PERM": _DENIED,
    "SQLITE_AUTH": _DENIED,
    "SQLITE_IOERR": (Unavailable, "the disk of the catalog's database fails to read or write; see the system's log"),
    "SQLITE_CORRUPT": _BROKEN,
    "SQLITE_NOTADB": _BROKEN,
}
# By SQLSTATE, the longest prefix counts. Spec: PostgreSQL, appendix A
_BY_SQLSTATE: dict[str, _Outcome] = {
    "53100": _FULL,
    "53": _DOWN,
    "55P03": _BUSY,
    "57014": _BUSY,
    "40": _BUSY,
    "25006": (Unavailable, "PostgreSQL is read-only here: it is not the primary, or a failover is under way"),
    "28": _LOGIN,
    "3D000": _LOGIN,
    "42501": _DENIED,
    "57": _DOWN,
    "58": _DOWN,
    "08": _DOWN,
}


def open_engine(url: URL, *, busy_timeout: timedelta) -> Engine:
    """Nothing is connected yet. `url` carries the password, if there is one."""
    if url.get_backend_name() == "sqlite":
        return _sqlite_engine(url, busy_timeout)
    milliseconds = int(busy_timeout / _MILLISECOND)
    options = f"-c lock_timeout={milliseconds} -c statement_timeout={2 * milliseconds} -c timezone=UTC"
    return create_engine(
        url,
        pool_size=5,
        max_overflow=0,
        pool_timeout=busy_timeout.total_seconds(),
        pool_pre_ping=True,
        hide_parameters=True,
        connect_args={
            "options": options,
            "connect_timeout": max(2, round(busy_timeout.total_seconds())),
            **TCP_BOUNDS,
        },
    )


def _sqlite_engine(url: URL, busy_timeout: timedelta) -> Engine:
    path = Path(str(url.database))
    if not path.parent.is_dir():
        raise ConfigInvalid(f"{path.parent}: no such directory for the catalog; make it, or change catalog.path")
    engine = create_engine(
        url, pool_timeout=busy_timeout.total_seconds(), hide_parameters=True, connect_args={"timeout": 0}
    )
    milliseconds = int(busy_timeout / _MILLISECOND)

    @event.listens_for(engine, "connect")
    def _configure(connection: sqlite3.Connection, _record: object) -> None:
        connection.isolation_level = None  # SQLAlchemy's own BEGIN stands below
        connection.execute(f"PRAGMA busy_timeout = {milliseconds}")
        connection.execute("PRAGMA journal_mode = WAL").close()
        connection.execute("PRAGMA synchronous = FULL")

    @event.listens_for(engine, "begin")
    def _begin(connection: Connection) -> None:
        writes = connection.get_execution_options().get("keyreeve_write", False)
        connection.exec_driver_sql("BEGIN IMMEDIATE" if writes else "BEGIN")

    return engine


@contextmanager
def storage_errors() -> Iterator[None]:
    """Turns the database's errors inside the block into ours."""
    try:
        yield
    except PoolTimeout as error:
        raise _made(_BUSY) from error
    except DBAPIError as error:
        raise storage_error(error) from error
    except sqlite3.Error as error:  # from the connect listener, which SQLAlchemy does not wrap
        raise _made(_sqlite_outcome(error)) from error
    except SQLAlchemyError as error:
        raise Internal(f"catalog: {type(error).__name__}") from error


def storage_error(error: DBAPIError) -> KeyreeveError:
    original = error.orig
    if isinstance(original, sqlite3.Error):
        return _made(_sqlite_outcome(original))
    state = getattr(original, "sqlstate", None)
    if state is None:
        return _made(_LOGIN if "password" in str(original) else _DOWN)
    return _made(_longest(_BY_SQLSTATE, cast("str", state)) or (Internal, f"catalog: SQLSTATE {state}"))


def _sqlite_outcome(error: sqlite3.Error) -> _Outcome:
    name = getattr(error, "sqlite_errorname", "")
    return _longest(_BY_SQLITE_NAME, name) or (Internal, f"catalog: {name or type(error).__name__}")


def _longest(table: dict[str, _Outcome], name: str) -> _Outcome | None:
    found = [prefix for prefix in table if name.startswith(prefix)]
    return table[max(found, key=len)] if found else None


def _made(outcome: _Outcome) -> KeyreeveError:
    kind, detail = outcome
    retry: dict[str, Any] = {"retry_after": RETRY_AFTER} if issubclass(kind, Unavailable) else {}
    return kind(detail, **retry)
