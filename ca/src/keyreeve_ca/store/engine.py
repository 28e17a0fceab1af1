"""The connection: SQLite (WAL, busy timeout) or PostgreSQL by URL, write transactions that begin as such, and faults turned into ours."""

from __future__ import annotations

import sqlite3
from collections.abc import Iterator
from contextlib import contextmanager
from datetime import timedelta
from pathlib import Path
from typing import Any

from alembic import command
from alembic.config import Config
from keyreeve_common.errors import (
    ConfigInvalid,
    Conflict,
    FailedPrecondition,
    KeyreeveError,
    StorageBusy,
    StorageFull,
    Unavailable,
)
from sqlalchemy import Connection, Engine, create_engine, event, inspect, text
from sqlalchemy.engine import make_url
from sqlalchemy.exc import ArgumentError, DBAPIError, IntegrityError, NoSuchModuleError, SQLAlchemyError
from sqlalchemy.exc import TimeoutError as PoolTimeout

BUSY_TIMEOUT = timedelta(seconds=5)
_WRITE = "keyreeve_write"
_WRITER_LOCK = 0x4B657972  # "Keyr"
_RETRY = timedelta(milliseconds=500)
_POOL: dict[str, Any] = {"pool_size": 8, "max_overflow": 32, "pool_timeout": 10}
_MIGRATIONS = Path(__file__).parent / "migrations"


def open_engine(url: str, *, busy_timeout: timedelta = BUSY_TIMEOUT) -> Engine:
    """Raises: ConfigInvalid for a URL that names no database of ours."""
    try:
        parsed = make_url(url)
    except ArgumentError as error:
        raise ConfigInvalid("database url cannot be read, for example sqlite:////var/lib/keyreeve/ca.db") from error
    match parsed.get_backend_name():
        case "sqlite":
            return _open_sqlite(url, busy_timeout)
        case "postgresql":
            return _open_postgresql(url, busy_timeout)
        case other:
            raise ConfigInvalid(f"database url: {other} is neither sqlite nor postgresql+psycopg")


def _open_sqlite(url: str, busy_timeout: timedelta) -> Engine:
    engine = create_engine(url, connect_args={"timeout": busy_timeout.total_seconds()}, **_POOL)

    @event.listens_for(engine, "connect")
    def prepare(connection: Any, _record: Any) -> None:
        connection.isolation_level = None  # the driver must not begin transactions by itself
        cursor = connection.cursor()
        cursor.execute("PRAGMA journal_mode=WAL")
        cursor.execute("PRAGMA synchronous=FULL")
        cursor.execute("PRAGMA foreign_keys=ON")
        cursor.close()

    @event.listens_for(engine, "begin")
    def begin(connection: Connection) -> None:
        writes = connection.get_execution_options().get(_WRITE, False)
        connection.exec_driver_sql("BEGIN IMMEDIATE" if writes else "BEGIN")

    return engine


def _open_postgresql(url: str, busy_timeout: timedelta) -> Engine:
    milliseconds = int(busy_timeout / timedelta(milliseconds=1))
    options = f"-c lock_timeout={milliseconds} -c idle_in_transaction_session_timeout=60000"
    try:
        return create_engine(url, pool_pre_ping=True, connect_args={"options": options, "connect_timeout": 5}, **_POOL)
    except (NoSuchModuleError, ModuleNotFoundError, ImportError) as error:
        raise ConfigInvalid("database url: PostgreSQL needs postgresql+psycopg:// and keyreeve-ca[postgres]") from error


@contextmanager
def write_transaction(engine: Engine) -> Iterator[Connection]:
    """One transaction that may change things. Raises: our storage errors, and Conflict for a broken unique key."""
    with translated(), engine.connect() as connection, connection.execution_options(**{_WRITE: True}).begin():
        if engine.dialect.name == "postgresql":
            # One writer at a time, as in SQLite: what a transaction read is still so when it commits.
            connection.execute(text("SELECT pg_advisory_xact_lock(:key)"), {"key": _WRITER_LOCK})
        yield connection


@contextmanager
def read_transaction(engine: Engine) -> Iterator[Connection]:
    with translated(), engine.connect() as connection, connection.begin():
        yield connection


@contextmanager
def translated() -> Iterator[None]:
    """Library exceptions become ours, by table."""
    try:
        yield
    except IntegrityError as error:
        raise Conflict("it exists already") from error
    except PoolTimeout as error:
        raise StorageBusy("no database connection is free", retry_after=_RETRY) from error
    except DBAPIError as error:
        raise _storage_error(error) from error
    except SQLAlchemyError as error:
        raise Unavailable(f"database: {type(error).__name__}") from error


_BUSY_STATES = ("40001", "40P01", "55P03")  # serialisation failure, deadlock, lock not available
_FULL_STATES = ("53100",)  # disk full


def _storage_error(error: DBAPIError) -> KeyreeveError:
    cause = error.orig
    if isinstance(cause, sqlite3.Error):
        name = getattr(cause, "sqlite_errorname", "")
        if name.startswith(("SQLITE_BUSY", "SQLITE_LOCKED")):
            return StorageBusy("database is locked by another writer", retry_after=_RETRY)
        if name.startswith("SQLITE_FULL"):
            return StorageFull("database: no space left; free some, nothing was changed")
        if "no such table" in str(cause):
            return FailedPrecondition("database has no schema yet; run keyreeve init")
        return Unavailable(f"database: {name or type(cause).__name__}")
    state = getattr(cause, "sqlstate", None) or ""
    if state in _BUSY_STATES:
        return StorageBusy("database is busy with another writer", retry_after=_RETRY)
    if state in _FULL_STATES:
        return StorageFull("database: no space left; free some, nothing was changed")
    if state == "42P01":
        return FailedPrecondition("database has no schema yet; run keyreeve init")
    return Unavailable(f"database does not answer ({type(cause).__name__})", retry_after=_RETRY)


def migrate(engine: Engine) -> None:
    """Brings the schema to this version. Raises: our storage errors."""
    config = Config()
    config.set_main_option("script_location", str(_MIGRATIONS))
    config.attributes["engine"] = engine
    with translated():
        command.upgrade(config, "head")


def has_schema(engine: Engine) -> bool:
    with translated():
        return inspect(engine).has_table("counters")
