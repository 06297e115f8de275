"""P1: an order-preserving permutation through two shuffles, with scripted faults in one subtask.

Source i of P emits i, i + P, i + 2P …; the rows are shuffled by (v + 1) mod P and then by (v div P) mod P. Each path is
a FIFO, so at the end a source's rows come P * P apart. What is lost, repeated or out of order is counted in
checkpointed state, where a restore cannot hide it.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field

import pyarrow as pa
import pytest

import rayflow as rf
from rayflow.core.ids import CheckpointId
from rayflow.graph import Node
from rayflow.keyed import KeyedStream
from rayflow.operators.base import FrozenState, FrozenTable, Operator, RestoredState
from rayflow.partition import hash_columns, key_groups
from rayflow.stream import Stream
from tests.simulation.run import play
from tests.simulation.scripted import Stage, finish, scripted

ROWS = pa.schema([("v", pa.int64()), ("a", pa.int64()), ("b", pa.int64())])
CHECKPOINTS = 8


@dataclass
class Script:
    """Faults of the failing map by phase; each phase waits for its share of the confirmed checkpoints."""

    stage: Stage
    done: list[str] = field(default_factory=list)

    def at(self, name: str, after: int) -> None:
        if name not in self.done and len(self.done) == PHASES.index(name) and self.stage.confirmed >= after:
            self.done.append(name)
            raise RuntimeError(name)


PHASES = ["operator early", "snapshot", "operator late", "restore", "close"]


@dataclass(frozen=True, eq=False)
class FailingMap:
    """Factory of a map that does nothing but fail by script, and counts rows in state so that there is a restore."""

    script: Script

    @property
    def stateful(self) -> bool:
        return True

    def build(self) -> FailingMapOperator:
        return FailingMapOperator(self.script)

    def output_schema(self, schema: pa.Schema | None) -> pa.Schema | None:
        return schema


COUNT = pa.schema([("n", pa.int64())])


class FailingMapOperator(Operator):
    def __init__(self, script: Script) -> None:
        self._script = script
        self._n = 0

    def _fails(self) -> bool:
        """Whether this is the subtask that gets the rows with a = 0."""
        (group,) = key_groups(hash_columns([pa.array([0])], ["a"]), self.ctx.max_parallelism)
        return int(group) in self.ctx.key_groups

    def restore(self, states: Sequence[RestoredState]) -> None:
        if self._fails():
            self._script.at("restore", 0)
        self._n += sum(sum(s.table.column("n").to_pylist()) for s in states)

    def process(self, batch: pa.RecordBatch, input_index: int) -> None:
        if self._fails():
            self._script.at("operator early", CHECKPOINTS // 4)
            self._script.at("operator late", CHECKPOINTS * 3 // 4)
        self._n += batch.num_rows
        self.out.emit(batch)

    def snapshot(self, checkpoint: CheckpointId) -> FrozenState | None:
        if self._fails():
            self._script.at("snapshot", CHECKPOINTS // 2)
        return FrozenState((FrozenTable("n", (pa.table({"n": [self._n]}, schema=COUNT),), COUNT),))

    def close(self) -> None:
        if self._fails():
            self._script.at("close", 0)


PATHS = pa.schema([(name, pa.int64()) for name in ("b", "source", "last", "rows", "lost", "again", "disorder")])


@dataclass(frozen=True)
class CheckOrder:
    """Factory of the check; emits one row a path at the end of the input."""

    parallelism: int
    keys: tuple[str, ...] = ("b",)

    @property
    def stateful(self) -> bool:
        return True

    def build(self) -> CheckOrderOperator:
        return CheckOrderOperator(self.parallelism)

    def output_schema(self, schema: pa.Schema | None) -> pa.Schema | None:
        return PATHS


class CheckOrderOperator(Operator):
    def __init__(self, parallelism: int) -> None:
        self._p = parallelism
        self._paths: dict[tuple[int, int], list[int]] = {}

    def _table(self) -> pa.Table:
        rows = [[*key, *numbers] for key, numbers in sorted(self._paths.items())]
        columns = [[row[i] for row in rows] for i in range(len(PATHS))]
        return pa.table(columns, schema=PATHS)

    def restore(self, states: Sequence[RestoredState]) -> None:
        for state in states:
            for row in state.table.to_pylist():
                self._paths[row["b"], row["source"]] = [row[n] for n in PATHS.names[2:]]

    def process(self, batch: pa.RecordBatch, input_index: int) -> None:
        step = self._p * self._p
        for v, b in zip(batch.column("v").to_pylist(), batch.column("b").to_pylist(), strict=True):
            source = v % self._p
            path = self._paths.setdefault((b, source), [source + b * self._p - step, 0, 0, 0, 0])
            path[1] += 1
            expected = path[0] + step
            if v > expected:
                path[2] += 1
            elif v == path[0]:
                path[3] += 1
            elif v < expected:
                path[4] += 1
            path[0] = max(path[0], v)

    def on_end(self) -> None:
        for batch in self._table().to_batches():
            self.out.emit(batch)

    def snapshot(self, checkpoint: CheckpointId) -> FrozenState | None:
        return FrozenState((FrozenTable("paths", (self._table(),), PATHS, key_columns=("b",)),))


def step(label: str, stream: Stream, operator: object) -> Stream:
    return Stream(Node(label, (stream._input(),), operator))


def run(parallelism: int, *, seed: int, union: bool, rows_a_source: int) -> None:
    stage = Stage.new(seed)
    script = Script(stage)

    def source(first: int, stride: int) -> Stream:
        """Every ``stride``-th source number from ``first`` on; slow until all checkpoints are done, then it drains."""

        def generate(split: int, position: int) -> Iterator[pa.RecordBatch | None]:
            for j in range(position, rows_a_source):
                while stage.confirmed < min(CHECKPOINTS, CHECKPOINTS * j // rows_a_source):
                    yield None
                v = split + j * parallelism
                a, b = (v + 1) % parallelism, (v // parallelism) % parallelism
                yield pa.record_batch([[v], [a], [b]], schema=ROWS)

        return rf.from_generator(generate, splits=list(range(first, parallelism, stride)), schema=ROWS)

    numbers = source(0, 2).union(source(1, 2)) if union else source(0, 1)
    failing = step("failing", KeyedStream(numbers, ("a",)), FailingMap(script))
    checked = step("check", KeyedStream(failing, ("b",)), CheckOrder(parallelism))
    expected: Counter[tuple[int, ...]] = Counter()
    for source_number in range(parallelism):
        for b in range(parallelism):
            values = [source_number + j * parallelism for j in range(rows_a_source) if j % parallelism == b]
            if values:
                expected[b, source_number, values[-1], len(values), 0, 0, 0] += 1
    target = stage.target()
    job = scripted([(checked, target, expected)], parallelism=parallelism, interval_s=0.001, max_parallelism=128)
    world = stage.world(job)
    play(world, steps_max=1_000_000)
    finish(world, job)
    assert stage.confirmed >= CHECKPOINTS
    assert script.done == PHASES
    # The close that raises belongs to an attempt that is over: four failures restart the job, the fifth does not.
    assert world.coordinator.machine.restarts == 4


@pytest.mark.parametrize("seed", range(4))
@pytest.mark.parametrize("parallelism", [1, 2, 5])
def test_nothing_is_lost_repeated_or_out_of_order(parallelism: int, seed: int) -> None:
    run(parallelism, seed=seed, union=False, rows_a_source=40)


@pytest.mark.parametrize("seed", range(2))
def test_the_same_with_a_union_in_front(seed: int) -> None:
    run(5, seed=seed, union=True, rows_a_source=40)


@pytest.mark.slow
def test_the_same_with_twenty_subtasks_a_step() -> None:
    run(20, seed=0, union=False, rows_a_source=40)
