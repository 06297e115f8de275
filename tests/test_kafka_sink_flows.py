"""PROOFS P4 on Kafka: whole flows that fail at every point, read by an independent client, in the local runtime."""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path

import pyarrow as pa
import pytest

import rayflow as rf
from rayflow.core.ids import CheckpointId
from rayflow.core.manifest import Json
from rayflow.errors import ConfigError, ConnectorError, DataError, JobFailedError, PlanError
from rayflow.operators.base import Committer, FrozenState
from rayflow.operators.kafka.committer import KafkaCommitter
from rayflow.operators.kafka.sink import ExactlyOnceOperator, KafkaSink
from rayflow.operators.kafka.slots import Destination
from rayflow.operators.kafka.transactions import Committable, take
from tests.failing import FailsOnce
from tests.kafka_server import KafkaServer
from tests.operators.kafka_sink.place import QUICK, Place

N = 400
DATA = pa.table({"x": pa.array(range(N), pa.int64())})


@dataclass(frozen=True)
class Faults:
    """What goes wrong once, where; tells by files, because every attempt has objects of its own."""

    folder: Path
    at: str

    def trip(self, where: str) -> bool:
        """True the first time, and then only if this is where it shall fail, behind a complete checkpoint."""
        mark = self.folder / "tripped"
        if where != self.at or mark.exists() or not (self.folder / "complete").exists():
            return False
        mark.touch()
        return True

    @property
    def tripped(self) -> bool:
        return (self.folder / "tripped").exists()


class FaultyOperator(ExactlyOnceOperator):
    def __init__(self, sink: KafkaSink, faults: Faults) -> None:
        super().__init__(sink)
        self._faults = faults

    def process(self, batch: pa.RecordBatch, input_index: int) -> None:
        super().process(batch, input_index)
        if self._faults.trip("row"):
            raise ConnectorError("injected: a row")

    def snapshot(self, checkpoint: CheckpointId) -> FrozenState | None:
        frozen = super().snapshot(checkpoint)
        if frozen is None or frozen.prepare is None:
            return frozen
        return FrozenState(prepare=partial(self._faulty, frozen.prepare))

    def _faulty(self, prepare: object) -> Sequence[Json]:
        assert callable(prepare)
        found: Sequence[Json] = prepare()
        if self._faults.trip("prepare"):
            raise DataError("injected: the upload")  # fails the attempt; what was prepared is left behind
        if self._faults.trip("declined"):
            raise ConnectorError("injected: the upload")  # declines the checkpoint; the attempt goes on
        return found

    def close(self) -> None:
        """As a process that is killed: all that it has open stays open."""


class CommitsEarly(FaultyOperator):
    """Broken: commits in the pre-commit."""

    def _faulty(self, prepare: object) -> Sequence[Json]:
        assert callable(prepare)

        def early() -> Sequence[Json]:
            found: Sequence[Json] = prepare()
            for each in found:
                commit = take(self._sink.bootstrap_servers, Committable.of(each))
                assert commit is not None
                commit()
            return found

        return super()._faulty(early)


class FaultyCommitter(KafkaCommitter):
    def __init__(self, destination: Destination, faults: Faults) -> None:
        super().__init__(destination)
        self._faults = faults

    def commit(self, committables: Sequence[Json]) -> None:
        if self._faults.trip("before commit"):
            raise ConnectorError("injected: before the commit")
        if self._faults.trip("expired"):
            for each in committables:
                Place(KafkaServer(self._cluster.servers, None), "").expire(each)  # type: ignore[arg-type]
        super().commit(committables)
        (self._faults.folder / "complete").touch()
        if self._faults.trip("after commit"):
            raise ConnectorError("injected: after the commit")


@dataclass(frozen=True, kw_only=True)
class FaultySink(KafkaSink):
    faults: Faults
    operator: type[FaultyOperator] = FaultyOperator

    def build(self) -> FaultyOperator:
        return self.operator(self, self.faults)

    def committer(self) -> Committer:
        return FaultyCommitter(self.cluster, self.faults)


@pytest.fixture
def topic(kafka: KafkaServer) -> str:
    return kafka.topic(3)


def run(flow: rf.Flow, folder: Path, parallelism: int = 2, restart: rf.Restart | None = None) -> rf.JobResult:
    return flow.run(
        parallelism=parallelism,
        local=True,
        progress=False,
        checkpoints=rf.CheckpointConfig(str(folder / "checkpoints"), interval="3ms"),
        config=rf.JobConfig(restart=restart or rf.Restart.fixed(delay="0s")),
    )


def rows(batch_rows: int = 20) -> rf.Stream:
    return rf.from_arrow(DATA, splits=5, batch_rows=batch_rows)


def seen(kafka: KafkaServer, topic: str) -> list[int]:
    return sorted(json.loads(message.value or b"")["x"] for message in kafka.read(topic))


def faulty_flow(
    kafka: KafkaServer, topic: str, folder: Path, at: str, operator: type[FaultyOperator] = FaultyOperator
) -> tuple[rf.Flow, Faults]:
    faults = Faults(folder, at)
    sink = FaultySink(
        topic, bootstrap_servers=kafka.bootstrap_servers, options=QUICK, faults=faults, operator=operator
    )  # fmt: skip
    return rf.Flow(f"flow-{topic}", rows(batch_rows=4).write(sink, name="out")), faults


@pytest.mark.parametrize("at", ["row", "prepare", "declined", "before commit", "after commit"])
def test_exactly_once_through_a_failure_at(kafka: KafkaServer, topic: str, tmp_path: Path, at: str) -> None:
    flow, faults = faulty_flow(kafka, topic, tmp_path, at)
    run(flow, tmp_path)
    assert faults.tripped
    assert seen(kafka, topic) == list(range(N))
    assert Place(kafka, topic, flow.name).open_ids() == []


def test_a_sink_that_commits_early_is_caught(kafka: KafkaServer, topic: str, tmp_path: Path) -> None:
    flow, faults = faulty_flow(kafka, topic, tmp_path, "prepare", CommitsEarly)
    run(flow, tmp_path)
    assert faults.tripped
    assert len(seen(kafka, topic)) > N


def test_a_lost_transaction_fails_the_job_for_good(kafka: KafkaServer, topic: str, tmp_path: Path) -> None:
    flow, faults = faulty_flow(kafka, topic, tmp_path, "expired")
    for _ in range(2):
        with pytest.raises(JobFailedError, match=r"step 'out': the transaction of checkpoint \d+ .* is lost: "):
            run(flow, tmp_path)
    assert faults.tripped
    place = Place(kafka, topic, flow.name)
    for name in place.open_ids():  # the job is over: readers wait until somebody ends them (`rayflow txn abort`)
        place.expire({"transactional_id": name})
    found = seen(kafka, topic)
    assert len(set(found)) == len(found) < N


@pytest.mark.filterwarnings("ignore::rayflow.errors.GuaranteeWarning")
def test_at_least_once_is_a_superset_with_duplicates(kafka: KafkaServer, topic: str, tmp_path: Path) -> None:
    flow = _failing(kafka, topic, tmp_path, "at_least_once")
    run(flow, tmp_path)
    found = seen(kafka, topic)
    assert set(found) == set(range(N))
    assert len(found) > N


def test_exactly_once_where_at_least_once_has_duplicates(kafka: KafkaServer, topic: str, tmp_path: Path) -> None:
    run(_failing(kafka, topic, tmp_path, "exactly_once"), tmp_path)
    assert seen(kafka, topic) == list(range(N))


def test_without_checkpoints_a_failure_loses_rows(kafka: KafkaServer, topic: str, tmp_path: Path) -> None:
    flow = _failing(kafka, topic, tmp_path, "exactly_once")
    with pytest.raises(JobFailedError, match="once"):
        flow.run(local=True, progress=False, config=rf.JobConfig(restart=rf.Restart.none()))
    assert seen(kafka, topic) == []
    flow.run(local=True, progress=False)
    assert seen(kafka, topic) == list(range(N))


def _failing(kafka: KafkaServer, topic: str, folder: Path, guarantee: str) -> rf.Flow:
    stream = rows().map_batches(FailsOnce(str(folder / "failed"), 150))
    sink = stream.write_kafka(
        topic,
        bootstrap_servers=kafka.bootstrap_servers,
        guarantee=guarantee,  # type: ignore[arg-type]
        options=QUICK,
    )
    return rf.Flow(f"flow-{topic}", sink)


@pytest.mark.parametrize(("p", "q"), [(1, 2), (2, 3), (3, 5), (5, 2), (3, 1)])
def test_another_parallelism_and_back(kafka: KafkaServer, topic: str, tmp_path: Path, p: int, q: int) -> None:
    """Each start is killed behind a complete checkpoint, with transactions open, but the last."""
    for n, parallelism in enumerate((p, q)):
        folder = tmp_path / str(n)
        folder.mkdir()
        flow, faults = faulty_flow(kafka, topic, folder, "row")
        with pytest.raises(JobFailedError, match="injected"):
            run(flow, tmp_path, parallelism, rf.Restart.none())
        assert faults.tripped
        assert Place(kafka, topic, flow.name).open_ids() != []
    run(flow, tmp_path, p)
    assert seen(kafka, topic) == list(range(N))
    assert Place(kafka, topic, flow.name).open_ids() == []


def test_keys_meet_in_one_partition_in_their_order(kafka: KafkaServer, topic: str, tmp_path: Path) -> None:
    data = pa.table({"k": [f"key-{i % 7}" for i in range(N)], "x": pa.array(range(N), pa.int64())})
    sink = rf.from_arrow(data, batch_rows=20).write_kafka(topic, bootstrap_servers=kafka.bootstrap_servers, key="k")
    run(rf.Flow(f"flow-{topic}", sink), tmp_path, 1)
    found = kafka.read(topic)
    assert len(found) == N
    assert len({(m.key, m.partition) for m in found}) == 7
    for key in {m.key for m in found}:
        values = [json.loads(m.value or b"")["x"] for m in found if m.key == key]
        assert values == sorted(values)


# ----------------------------------------------------------------------------------------------- refused before a start


def test_a_transaction_timeout_that_checkpoints_may_outlast_is_refused(topic: str, tmp_path: Path) -> None:
    sink = rows().write_kafka(topic, bootstrap_servers="127.0.0.1:1", transaction_timeout="10m")
    with pytest.raises(ConfigError, match=r"transaction_timeout=600 s\) must be longer than .*\(10 s \+ 600 s"):
        rf.Flow("f", sink).run(local=True, checkpoints=rf.CheckpointConfig(str(tmp_path)))
    with pytest.raises(ConfigError, match="at least 10 s, got 1 s"):
        rows().write_kafka(topic, bootstrap_servers="127.0.0.1:1", transaction_timeout="1s")


def test_wrong_options_are_refused_while_building() -> None:
    def write(**options: object) -> None:
        rows().write_kafka("t", **{"bootstrap_servers": "127.0.0.1:1", **options})  # type: ignore[arg-type]

    with pytest.raises(PlanError, match=r"key='nope'.*no such column; available: x"):
        write(key="nope")
    with pytest.raises(PlanError, match=r"timestamp='x'.*must be a timestamp column, got int64"):
        write(timestamp="x")
    with pytest.raises(ConfigError, match="format"):
        write(format="xml")
    with pytest.raises(ConfigError, match="guarantee"):
        write(guarantee="twice")
    with pytest.raises(ConfigError, match=r"must not set 'transactional.id'"):
        write(options={"transactional.id": "mine"})
    with pytest.raises(ConfigError, match="without encryption only.*at_least_once"):
        write(options={"security.protocol": "SASL_SSL"})
    with pytest.raises(PlanError, match='"raw".*int64'):
        write(format="raw")
    with pytest.raises(ConfigError, match="one message of many rows"):
        write(format="arrow", key="x")
    with pytest.raises(ConfigError, match='need format="avro"'):
        write(schema_id=1)
