"""The suites of `rayflow.testing`, run against connectors of all kinds."""

from __future__ import annotations

import json
import re
import sqlite3
from collections.abc import Callable, Iterable, Sequence
from contextlib import closing
from pathlib import Path
from typing import cast

import pyarrow as pa
import pyarrow.csv as pa_csv
import pyarrow.dataset as pa_dataset
import pyarrow.parquet as pq
import pytest

import rayflow as rf
from examples.custom_sink import PENDING, JsonFolder
from examples.custom_source import SCHEMA, Orders, make_table
from rayflow.core.manifest import Json
from rayflow.operators.base import SinkFactory
from rayflow.operators.kafka.formats import JsonFormat
from rayflow.operators.kafka.sink import KafkaSink
from rayflow.operators.kafka.source import KafkaSource
from rayflow.operators.sources import lines
from rayflow.operators.sources.memory import ArrowSource
from rayflow.operators.sources.parquet import ParquetSource
from rayflow.operators.sources.text import JsonSource
from rayflow.operators.sql.postgres import PostgresTable
from rayflow.operators.sql.sinks import PostgresSink
from rayflow.stream import StreamEnd
from rayflow.testing import SinkConformance, SourceConformance
from tests.kafka_server import KafkaServer, records
from tests.operators.kafka_sink.place import QUICK
from tests.postgres_server import PostgresServer

ROWS = pa.table({"id": pa.array(range(60), pa.int64()), "text": [f"row {i}" for i in range(60)]})

# ------------------------------------------------------------------------------------------------------------- sources


class TestArrow(SourceConformance):
    @pytest.fixture
    def source(self) -> rf.Source:
        return ArrowSource(ROWS, splits=3, batch_rows=7)

    @pytest.fixture
    def expected(self) -> pa.Table:
        return ROWS


class TestParquet(SourceConformance):
    @pytest.fixture
    def source(self, tmp_path: Path) -> rf.Source:
        (tmp_path / "in").mkdir()
        for n in range(2):
            pq.write_table(ROWS.slice(30 * n, 30), tmp_path / "in" / f"{n}.parquet", row_group_size=4)
        return ParquetSource(str(tmp_path / "in"), batch_rows=7)

    @pytest.fixture
    def expected(self) -> pa.Table:
        return ROWS


class TestJson(SourceConformance):
    @pytest.fixture
    def source(self, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> rf.Source:
        (tmp_path / "in.jsonl").write_text("".join(json.dumps(row) + "\n" for row in ROWS.to_pylist()))
        monkeypatch.setattr(lines, "BLOCK_BYTES", 200)
        return JsonSource(str(tmp_path / "in.jsonl"))

    @pytest.fixture
    def expected(self) -> pa.Table:
        return ROWS


class SmallBatches(JsonFormat):
    messages_max = 10


class TestKafka(SourceConformance):
    @pytest.fixture
    def source(self, kafka: KafkaServer) -> rf.Source:
        topic = kafka.topic(2)
        kafka.produce(topic, records(ROWS.to_pylist(), partitions=2))
        return KafkaSource(
            [topic], bootstrap_servers=kafka.bootstrap_servers, format=SmallBatches(ROWS.schema), stop="latest"
        )

    @pytest.fixture
    def expected(self) -> pa.Table:
        return ROWS


class TestOrders(SourceConformance):
    @pytest.fixture
    def source(self, tmp_path: Path) -> Orders:
        make_table(tmp_path / "shop.sqlite", rows=200)
        return Orders(str(tmp_path / "shop.sqlite"), ids_per_split=80, batch_rows=15)

    @pytest.fixture
    def expected(self, source: Orders) -> pa.Table:
        with closing(sqlite3.connect(source.path)) as db:
            rows = db.execute("SELECT id, city, amount FROM orders").fetchall()
        return pa.Table.from_pylist([dict(zip(SCHEMA.names, row, strict=True)) for row in rows], SCHEMA)


# --------------------------------------------------------------------------------------------------------------- sinks


def sink_of(end: StreamEnd) -> SinkFactory:
    return cast(SinkFactory, end.node.operator)


def pending(folder: Path) -> Sequence[object]:
    return [path for path in folder.rglob("*") if path.is_file() and "_rayflow" in path.parts]


class TestParquetFiles(SinkConformance):
    @pytest.fixture
    def sink(self, tmp_path: Path) -> SinkFactory:
        return sink_of(rf.from_arrow(ROWS).write_parquet(str(tmp_path / "out")))

    @pytest.fixture
    def visible(self, tmp_path: Path) -> Callable[[], Iterable[int]]:
        def ids() -> list[int]:
            files = [str(path) for path in (tmp_path / "out").glob("*.parquet")]
            return list(pa_dataset.dataset(files).to_table().column("id").to_pylist()) if files else []

        return ids

    @pytest.fixture
    def leftovers(self, tmp_path: Path) -> Callable[[], Sequence[object]]:
        return lambda: pending(tmp_path / "out")

    @pytest.fixture
    def lose(self, tmp_path: Path) -> Callable[[Json], None]:
        return lambda committable: (tmp_path / "out" / "_rayflow" / committable["pending"]).unlink()


class TestCsvFiles(SinkConformance):
    """Fails as Parquet does: the protocol is the same, only the format is another."""

    test_a_flow_that_fails = None  # type: ignore[assignment]

    @pytest.fixture
    def sink(self, tmp_path: Path) -> SinkFactory:
        return sink_of(rf.from_arrow(ROWS).write_csv(str(tmp_path / "out"), max_file_rows=5))

    @pytest.fixture
    def visible(self, tmp_path: Path) -> Callable[[], Iterable[int]]:
        return lambda: [
            i for path in (tmp_path / "out").glob("*.csv") for i in pa_csv.read_csv(path).column("id").to_pylist()
        ]

    @pytest.fixture
    def leftovers(self, tmp_path: Path) -> Callable[[], Sequence[object]]:
        return lambda: pending(tmp_path / "out")


class TestSqlite(SinkConformance):
    """By the write-ahead log: the rows are in files beside the checkpoints until they are committed."""

    @pytest.fixture
    def sink(self, tmp_path: Path) -> SinkFactory:
        return sink_of(rf.from_arrow(ROWS).write_sqlite("t", path=tmp_path / "db"))

    @pytest.fixture
    def visible(self, tmp_path: Path) -> Callable[[], Iterable[int]]:
        def ids() -> list[int]:
            with closing(sqlite3.connect(tmp_path / "db")) as db:
                if not db.execute("SELECT 1 FROM sqlite_master WHERE name = 't'").fetchall():
                    return []
                return [i for (i,) in db.execute("SELECT id FROM t")]

        return ids

    @pytest.fixture
    def leftovers(self, tmp_path: Path) -> Callable[[], Sequence[object]]:
        return lambda: [path for path in tmp_path.rglob("staging/**/*") if path.is_file()]

    @pytest.fixture
    def lose(self, tmp_path: Path) -> Callable[[Json], None]:
        def lose(_: Json) -> None:
            for path in tmp_path.rglob("staging/**/*.arrow"):
                path.unlink()

        return lose


class Postgres(SinkConformance):
    """Whole flows that fail at every point are in tests/test_sql_flows.py; here is one that changes its parallelism."""

    test_a_flow_that_fails = None  # type: ignore[assignment]

    @pytest.fixture
    def place(self, postgres: PostgresServer) -> tuple[PostgresServer, str]:
        return postgres, postgres.schema()

    @pytest.fixture
    def visible(self, place: tuple[PostgresServer, str]) -> Callable[[], Iterable[int]]:
        server, schema = place
        return lambda: [i for (i,) in server.rows(schema, "t", "id")]


class TestPostgresTwoPhase(Postgres):
    @pytest.fixture
    def sink(self, place: tuple[PostgresServer, str]) -> SinkFactory:
        return PostgresSink(PostgresTable("t", place[0].url, schema=place[1]), how="two_phase")

    @pytest.fixture
    def leftovers(self, place: tuple[PostgresServer, str]) -> Callable[[], Sequence[object]]:
        return lambda: place[0].prepared()


class TestPostgresUpsert(Postgres):
    guarantee = "idempotent"

    @pytest.fixture
    def sink(self, place: tuple[PostgresServer, str]) -> SinkFactory:
        return PostgresSink(PostgresTable("t", place[0].url, schema=place[1], key=("id",)), how="upsert")


class TestPostgresAtLeastOnce(Postgres):
    guarantee = "at_least_once"

    @pytest.fixture
    def sink(self, place: tuple[PostgresServer, str]) -> SinkFactory:
        return PostgresSink(PostgresTable("t", place[0].url, schema=place[1]), how="at_least_once")


class TestKafkaExactlyOnce(SinkConformance):
    """Whole flows that fail at every point are in tests/test_kafka_sink_flows.py."""

    test_a_flow_that_fails = None  # type: ignore[assignment]

    @pytest.fixture
    def sink(self, kafka: KafkaServer) -> SinkFactory:
        self.topic = kafka.topic(2)
        return KafkaSink(self.topic, bootstrap_servers=kafka.bootstrap_servers, options=QUICK)

    @pytest.fixture
    def visible(self, kafka: KafkaServer) -> Callable[[], Iterable[int]]:
        return lambda: [json.loads(message.value or b"")["id"] for message in kafka.read(self.topic)]


class TestJsonFolder(SinkConformance):
    @pytest.fixture
    def sink(self, tmp_path: Path) -> rf.Sink:
        return JsonFolder(str(tmp_path / "out"))

    @pytest.fixture
    def visible(self, tmp_path: Path) -> Callable[[], list[int]]:
        """What a reader of the folder sees."""
        return lambda: [
            json.loads(line)["id"]
            for path in (tmp_path / "out").glob("*.jsonl")
            for line in path.read_text().splitlines()
        ]

    @pytest.fixture
    def leftovers(self, tmp_path: Path) -> Callable[[], list[Path]]:
        """What is in the folder and is not for readers."""
        return lambda: list((tmp_path / "out" / PENDING).glob("*"))

    @pytest.fixture
    def lose(self, tmp_path: Path) -> Callable[[str], None]:
        """Somebody deletes what was prepared."""
        return lambda committable: (tmp_path / "out" / PENDING / committable).unlink()


def test_only_what_says_something_about_a_sink_is_run() -> None:
    def of(suite: type) -> set[str]:
        return {name for name in dir(suite) if name.startswith("test_") and callable(getattr(suite, name))}

    assert "test_recovery_and_the_end_leave_nothing_behind" in of(TestJsonFolder)
    assert "test_recovery_and_the_end_leave_nothing_behind" not in of(TestKafkaExactlyOnce)
    assert "test_committing_twice_changes_nothing" in of(TestPostgresUpsert)
    assert "test_nothing_is_visible_before_the_commit" not in of(TestPostgresUpsert)
    assert "test_committing_twice_changes_nothing" not in of(TestPostgresAtLeastOnce)
    assert "test_a_flow_that_fails_before_the_first_checkpoint" in of(TestPostgresAtLeastOnce)


# ----------------------------------------------------------------------------------------------------------- tutorials

ROOT = Path(__file__).resolve().parent.parent


@pytest.mark.parametrize("kind", ["source", "sink"])
def test_the_tutorial_shows_what_runs(kind: str) -> None:
    """Its first block is the connector of the example, its second one a class of this file."""
    page = (ROOT / "docs" / f"custom-{kind}s.md").read_text()
    connector, suite = re.findall(r"```python\n(.*?)```", page, re.DOTALL)
    _, shown, _ = (ROOT / "examples" / f"custom_{kind}.py").read_text().split("# --8<-- connector\n")
    assert connector.strip() == shown.strip()
    assert suite[suite.index("class ") :].strip() in Path(__file__).read_text()
