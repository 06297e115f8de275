"""Where `benchmarks.delivery_kills` delivers to, and how a client that is not rayflow reads it back."""

from __future__ import annotations

import contextlib
import json
import os
import shutil
import tempfile
import uuid
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any, Protocol

import pyarrow as pa
import pyarrow.parquet as pq

from rayflow.stream import Stream

if TYPE_CHECKING:
    from tests.kafka_server import KafkaServer
    from tests.postgres_server import PostgresServer

ROW = pa.schema([("who", pa.string()), ("start", pa.timestamp("us")), ("n", pa.int64()), ("total", pa.int64())])
"""What is delivered: the windows of each key."""
PARTITIONS = 3
"""Of a topic that is written."""
KINDS = ("kafka", "postgres", "postgres-wal", "delta", "iceberg", "parquet")


class Target(Protocol):
    @property
    def kind(self) -> str: ...

    def sink(self, rows: Stream) -> Any:
        """The end of ``rows``, for a flow."""

    def rows(self) -> pa.Table:
        """All that readers see now; of schema `ROW`."""

    def leftovers(self) -> list[str]:
        """What is still prepared or open."""


@dataclass(slots=True)
class Servers:
    """Started when they are first asked for, ended by `close`."""

    folder: Path
    _running: contextlib.ExitStack = field(default_factory=contextlib.ExitStack)
    _kafka: KafkaServer | None = None
    _postgres: PostgresServer | None = None

    def kafka(self) -> KafkaServer:
        from tests.kafka_server import noida

        if self._kafka is None:
            (self.folder / "kafka").mkdir()
            self._kafka = self._running.enter_context(noida(self.folder / "kafka"))
        return self._kafka

    def postgres(self) -> PostgresServer:
        from tests.postgres_server import PostgresServer

        if self._postgres is None:
            # The server runs as another user where this is root, and the path of its socket must be short.
            folder = Path(tempfile.mkdtemp(prefix="rf-pg-"))
            self._running.callback(shutil.rmtree, folder, ignore_errors=True)
            os.chmod(folder, 0o755)
            self._postgres = PostgresServer(folder)
            self._running.callback(self._postgres.close)
        return self._postgres

    def close(self) -> None:
        self._running.close()


def target(kind: str, servers: Servers, folder: Path) -> Target:
    if kind == "kafka":
        return KafkaTarget(servers.kafka(), servers.kafka().topic(PARTITIONS, name="delivered"))
    if kind in ("postgres", "postgres-wal"):
        return PostgresTarget(servers.postgres(), "wal" if kind == "postgres-wal" else "two_phase")
    if kind == "iceberg":
        return IcebergTarget(folder)
    return DeltaTarget(folder / "delta") if kind == "delta" else ParquetTarget(folder / "parquet")


@dataclass(frozen=True, slots=True)
class KafkaTarget:
    server: KafkaServer
    topic: str

    kind = "kafka"

    def sink(self, rows: Stream) -> Any:
        return rows.write_kafka(self.topic, bootstrap_servers=self.server.bootstrap_servers, key="who", name="kafka")

    def rows(self) -> pa.Table:
        """By a consumer with ``read_committed``."""
        read = [json.loads(message.value or b"") for message in self.server.read(self.topic)]
        columns = {name: pa.array([row[name] for row in read]) for name in ("who", "n", "total")}
        times = pa.array([row["start"] for row in read], pa.string()).cast(ROW.field("start").type)
        return pa.table(columns | {"start": times}).select(ROW.names).cast(ROW)

    def leftovers(self) -> list[str]:
        """Partitions whose last stable offset, up to which committed readers come, is not their end."""
        from confluent_kafka import IsolationLevel, TopicPartition
        from confluent_kafka.admin import AdminClient, OffsetSpec

        admin = AdminClient({"bootstrap.servers": self.server.bootstrap_servers})

        def ends(level: Any) -> dict[int, int]:
            wanted = {TopicPartition(self.topic, p): OffsetSpec.latest() for p in range(PARTITIONS)}
            found = admin.list_offsets(wanted, isolation_level=level)
            return {each.partition: future.result().offset for each, future in found.items()}

        stable, all_ = ends(IsolationLevel.READ_COMMITTED), ends(IsolationLevel.READ_UNCOMMITTED)
        return [f"{self.topic}[{p}] is open from {stable[p]} to {all_[p]}" for p in stable if stable[p] != all_[p]]


@dataclass(frozen=True, slots=True)
class PostgresTarget:
    server: PostgresServer
    guarantee: str
    schema: str = field(default_factory=lambda: f"delivered_{uuid.uuid4().hex[:12]}")

    def __post_init__(self) -> None:
        self.server.execute(f'CREATE SCHEMA "{self.schema}"')

    @property
    def kind(self) -> str:
        return "postgres" if self.guarantee == "two_phase" else "postgres-wal"

    def sink(self, rows: Stream) -> Any:
        guarantee: Any = self.guarantee
        return rows.write_postgres(
            "windows", url=self.server.url, schema=self.schema, guarantee=guarantee, name=self.kind
        )

    def rows(self) -> pa.Table:
        """By psycopg."""
        found = self.server.execute(f'SELECT who, start, n, total FROM "{self.schema}".windows')
        return pa.table([pa.array([row[i] for row in found], column.type) for i, column in enumerate(ROW)], schema=ROW)

    def leftovers(self) -> list[str]:
        return [f"prepared: {gid}" for gid in self.server.prepared() if f":{self.kind}:" in gid]

    @contextlib.contextmanager
    def away(self) -> Iterator[None]:
        """The server is stopped meanwhile."""
        self.server.stop()
        try:
            yield
        finally:
            self.server.start()


@dataclass(frozen=True, slots=True)
class DeltaTarget:
    folder: Path

    kind = "delta"

    def sink(self, rows: Stream) -> Any:
        return rows.write_delta(str(self.folder), name="delta")

    def rows(self) -> pa.Table:
        """By deltalake."""
        from deltalake import DeltaTable

        return pa.table(DeltaTable(str(self.folder)).to_pyarrow_table()).select(ROW.names).cast(ROW)

    def leftovers(self) -> list[str]:
        """None: files of attempts that failed are for VACUUM, as docs/delta.md says."""
        return []


@dataclass(frozen=True, slots=True)
class IcebergTarget:
    folder: Path

    kind = "iceberg"

    @property
    def catalog(self) -> dict[str, str]:
        uri = f"sqlite:///{self.folder}/catalog.db"
        return {"type": "sql", "uri": uri, "warehouse": f"file://{self.folder}/lake"}

    def sink(self, rows: Stream) -> Any:
        return rows.write_iceberg("delivered.windows", catalog=self.catalog, name="iceberg")

    def rows(self) -> pa.Table:
        """By pyiceberg."""
        from pyiceberg.catalog import load_catalog

        read = load_catalog("default", **self.catalog).load_table("delivered.windows").scan().to_arrow()
        return read.select(ROW.names).cast(ROW)

    def leftovers(self) -> list[str]:
        """None: files of attempts that failed are orphans, as docs/iceberg.md says."""
        return []


@dataclass(frozen=True, slots=True)
class ParquetTarget:
    folder: Path

    kind = "parquet"

    def sink(self, rows: Stream) -> Any:
        return rows.write_parquet(str(self.folder), name="parquet")

    def rows(self) -> pa.Table:
        files = sorted(self.folder.glob("*.parquet"))
        return pa.concat_tables([ROW.empty_table(), *(pq.read_table(file).cast(ROW) for file in files)])

    def leftovers(self) -> list[str]:
        return [str(path) for path in sorted(self.folder.iterdir()) if not path.name.endswith(".parquet")]
