"""Windows under test as a job would have them: several subtasks, batches cut anywhere, checkpoints and rescaling."""

from __future__ import annotations

import itertools
import shutil
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any, Literal

import numpy as np
import pyarrow as pa
from hypothesis import strategies as st

from rayflow.core.ids import MAX_WATERMARK, MIN_WATERMARK, CheckpointId
from rayflow.core.keygroups import owner_of
from rayflow.operators.base import (
    MAIN,
    ColdStore,
    Collected,
    FrozenState,
    Operator,
    OperatorContext,
    OperatorFactory,
    RestoredFolder,
    RestoredState,
    StateBackend,
)
from rayflow.partition import hash_columns, key_groups
from tests.operators.helpers import frozen, opened, rows

SCHEMA = pa.schema([("k", pa.int64()), ("t", pa.timestamp("us", "UTC")), ("v", pa.int64())])
Row = tuple[int | None, int, int]


@dataclass(frozen=True)
class Way:
    """How the same rows go through an operator; no result may depend on it."""

    cuts: list[int] = field(default_factory=list)
    workers: list[int] = field(default_factory=lambda: [1])
    """Parallelism, changed at every restore."""
    restore_every: int = 0
    """Batches; 0: never."""
    pieces: bool = True
    backend: Literal["memory", "fs", "rocksdb"] = "fs"


WAYS = st.builds(
    Way,
    cuts=st.lists(st.integers(0, 60), max_size=8),
    workers=st.lists(st.sampled_from([1, 2, 4]), min_size=1, max_size=3),
    restore_every=st.integers(0, 3),
    pieces=st.booleans(),
    backend=st.sampled_from(["memory", "fs", "rocksdb"]),
)


def within_delay(delay: int, *, keys: int = 3, span: int = 60, size: int = 60) -> st.SearchStrategy[list[Row]]:
    """Rows in an order in which none is more than ``delay`` behind the newest before it."""
    key = st.one_of(st.none(), st.integers(0, keys - 1))
    row = st.tuples(key, st.integers(-span, span), st.integers(0, delay), st.integers(-9, 9))
    return st.lists(row, max_size=size).map(
        lambda found: [(k, t, v) for k, t, _, v in sorted(found, key=lambda row: row[1] + row[2])]
    )


def batch(data: Sequence[Row], schema: pa.Schema = SCHEMA) -> pa.RecordBatch:
    return pa.RecordBatch.from_arrays(
        [pa.array([row[i] for row in data], each.type) for i, each in enumerate(schema)], schema=schema
    )


def us(moment: Any) -> int:
    return int(np.datetime64(moment.replace(tzinfo=None), "us").astype(np.int64))


def run(
    factory: OperatorFactory,
    data: Sequence[Row],
    way: Way,
    *,
    delay: int,
    scratch: Path,
    before: Callable[[Operator], None] = lambda _: None,
    combine: OperatorFactory | None = None,
    end: bool = True,
) -> Collected:
    """All rows, with a watermark behind every batch, then the end. ``before`` is done to every operator opened."""
    numbers = itertools.count()

    def folder(name: str) -> Path:
        path = scratch / f"{name}-{next(numbers)}"
        path.mkdir(parents=True)
        return path

    def cold(path: Path, ctx: OperatorContext) -> ColdStore:
        from rayflow.storage.rocks import open_rocks

        return open_rocks(path, ctx)

    backend = StateBackend(kind=way.backend, memory_bytes=256, scratch=folder, open_cold=cold)
    out = Collected()

    def start(index: int, workers: int) -> Operator:
        operator, _ = opened(factory, index, workers, out, backend)
        before(operator)
        return operator

    edges = sorted({0, len(data), *(cut for cut in way.cuts if cut < len(data))})
    workers = way.workers[0]
    operators = [start(index, workers) for index in range(workers)]
    newest, watermark = None, MIN_WATERMARK
    for number, (a, b) in enumerate(itertools.pairwise(edges)):
        parts = [batch(data[a:b])]
        if combine is not None:
            middle, combined = opened(combine)
            middle.process(parts[0], 0)
            parts = combined.batches.get(MAIN, [])
        for part in parts:
            owners = _owners(part, workers)
            for index, operator in enumerate(operators):
                operator.process(part.filter(pa.array(owners == index)), 0)
        newest = max([row[1] for row in data[a:b]] + ([] if newest is None else [newest]))
        watermark = max(watermark, newest - delay)
        for operator in operators:
            operator.on_watermark(watermark)
        if way.restore_every and number % way.restore_every == 0:
            remotes = [(operator, folder("remote")) for operator in operators]
            states = [state for operator, remote in remotes for state in saved(operator, remote, pieces=way.pieces)]
            for operator in operators:
                operator.close()
            workers = way.workers[number % len(way.workers)]
            operators = [start(index, workers) for index in range(workers)]
            for operator in operators:
                operator.restore(_given_to(operator, states))
    for operator in operators:
        if end:
            operator.on_watermark(MAX_WATERMARK)
            operator.on_end()
        operator.close()
    return out


class _Given(Operator):
    """An operator that was frozen already."""

    def __init__(self, state: FrozenState) -> None:
        self._state = state

    def process(self, batch: pa.RecordBatch, input_index: int) -> None:
        raise AssertionError("it is only frozen")

    def snapshot(self, checkpoint: CheckpointId) -> FrozenState:
        return self._state


def saved(operator: Operator, remote: Path, *, pieces: bool) -> list[RestoredState]:
    """What a checkpoint gives back, files of a store on disk included (with the key groups of the old operator)."""
    state = operator.snapshot(CheckpointId(1))
    assert state is not None
    # Rows of upserts count in the order of their pieces: they are not joined here, they only lose their names.
    upserts = any(table.mode == "upsert" for table in state.tables)
    found = frozen(_Given(state), pieces=pieces or upserts)
    if not pieces:
        found = [replace(one, piece="") for one in found]
    for number, folder in enumerate(state.folders):
        files, _ = folder.finish()
        target = remote / str(number)
        target.mkdir()
        for name, file in files.items():
            shutil.copy(file.path, target / name)
        folder.release()

        def download(path: Path, source: Path = target) -> None:
            shutil.copytree(source, path, dirs_exist_ok=True)

        back = RestoredFolder(folder.format, operator.ctx.key_groups, False, download)
        found.append(RestoredState(folder.name, pa.table({}), folder=back))
    return found


def _given_to(operator: Operator, states: Sequence[RestoredState]) -> list[RestoredState]:
    """The part of all old subtasks' states that one new subtask gets."""
    mine, found = operator.ctx.key_groups, []
    for state in states:
        if state.folder is not None:
            both = sorted(set(state.folder.key_groups) & set(mine))
            if both:
                folder = replace(state.folder, key_groups=range(both[0], both[-1] + 1))
                found.append(replace(state, folder=folder))
        elif not state.table.num_rows:
            found.append(state)
        else:
            ctx = operator.ctx
            rows = state.table.filter(pa.array(_owners(state.table, ctx.parallelism) == ctx.subtask))
            found.append(replace(state, table=rows, piece=state.piece if ctx.parallelism == 1 else ""))
    return found


def _owners(part: pa.RecordBatch | pa.Table, workers: int) -> Any:
    if part.num_rows == 0:
        return np.zeros(0, np.int64)
    column = part.column("k")
    column = column.combine_chunks() if isinstance(column, pa.ChunkedArray) else column
    groups = key_groups(hash_columns([column]), 128)
    return np.array([owner_of(int(group), workers, 128) for group in groups])


def results(out: Collected) -> list[tuple[Any, ...]]:
    """(key, start us, end us, aggregates ...) of all result rows, sorted; one twice is there twice."""
    found = []
    for row in rows(out.batches.get(MAIN, [])):
        key, start, end, *rest = row.values()
        found.append((key, us(start), us(end), *rest))
    return ordered(found)


def ordered(found: Sequence[tuple[Any, ...]]) -> list[tuple[Any, ...]]:
    return sorted(found, key=lambda row: tuple((value is not None, value or 0) for value in row))
