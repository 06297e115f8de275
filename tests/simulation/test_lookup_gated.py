"""A lookup finds what its table has just then. Here the rows come when a checkpoint has the whole table, so that what
they find is known: in every subtask, whatever crashes, and at another parallelism."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager, nullcontext
from random import Random
from typing import Any

import pyarrow as pa
import pytest

import rayflow as rf
from rayflow.operators.base import RestoredState
from rayflow.operators.joins.lookup import LookupOperator
from tests.simulation.broken import replaced
from tests.simulation.faults import FaultBudget, Faults, Violation
from tests.simulation.run import play
from tests.simulation.scenario import SECOND
from tests.simulation.scripted import Stage, finish, scripted
from tests.simulation.storage import Observer

KEYS, VERSIONS, ROWS = 5, 4, 30
TABLE = pa.schema([("id", pa.int64()), ("since", pa.timestamp("us")), ("said", pa.int64())])
ASKED = pa.schema([("k", pa.int64()), ("v", pa.int64())])


def run(seed: int, parallelism: int) -> None:
    faults = Faults(Random(seed), FaultBudget(crashes=4, crash_horizon=20_000))
    stage = Stage(Random(seed), faults, Observer())
    asked: set[int] = set()

    def versions(split: int, position: int) -> Iterator[pa.RecordBatch | None]:
        """The latest version of each key first: the order in which they come must not count."""
        for n in range(position, KEYS * VERSIONS):
            age, key = divmod(n, KEYS)
            row = [[key], [(VERSIONS - age) * SECOND], [10 * key + VERSIONS - age]]
            yield pa.record_batch([pa.array(c).cast(f.type) for c, f in zip(row, TABLE, strict=True)], schema=TABLE)
        while ROWS - 1 not in asked:  # its position stays in the checkpoints
            yield None

    def rows(split: int, position: int) -> Iterator[pa.RecordBatch | None]:
        for n in range(position, ROWS):
            while not any(s.position == KEYS * VERSIONS for s in splits(stage)):
                yield None
            asked.add(n)
            yield pa.record_batch([pa.array([n % (KEYS + 1)]), pa.array([n])], schema=ASKED)

    table = rf.from_generator(versions, schema=TABLE, event_time="since", parallelism=1).key_by("id")
    result = rf.from_generator(rows, schema=ASKED, parallelism=1).rebalance().lookup(table, on="k", how="left")
    expected: Counter[tuple[Any, ...]] = Counter()
    for n in range(ROWS):
        k = n % (KEYS + 1)
        known = k < KEYS
        expected[k, n, VERSIONS * SECOND if known else None, 10 * k + VERSIONS if known else None] += 1
    job = scripted([(result, stage.target(), expected)], parallelism=parallelism)
    world = stage.world(job)
    play(world)
    finish(world, job)


def splits(stage: Stage) -> list[Any]:
    return [s for m in stage.observer.ever.values() for subtask in m.subtasks for s in subtask.splits]


@contextmanager
def restore_in_the_first_subtask_only() -> Iterator[None]:
    def make(original: Any) -> Any:
        def restore(self: LookupOperator, states: Sequence[RestoredState]) -> None:
            original(self, states if self.ctx.subtask == 0 else ())

        return restore

    with replaced(LookupOperator, "restore", make):
        yield


@contextmanager
def forget_the_table() -> Iterator[None]:
    with replaced(LookupOperator, "snapshot", lambda _: lambda self, checkpoint: None):
        yield


@pytest.mark.parametrize("parallelism", [1, 3])
@pytest.mark.parametrize("seed", range(6))
def test_every_row_finds_the_latest_version_in_the_whole_table(seed: int, parallelism: int) -> None:
    run(seed, parallelism)


@pytest.mark.parametrize("broken", [restore_in_the_first_subtask_only, forget_the_table])
def test_a_table_that_is_lost_shows(broken: Any) -> None:
    def clean(seed: int, engine: AbstractContextManager[None]) -> bool:
        try:
            with engine:
                run(seed, 3)
        except Violation:
            return False
        return True

    caught = next((seed for seed in range(20) if not clean(seed, broken())), None)
    assert caught is not None, "20 seeds were clean"
    assert clean(caught, nullcontext())
