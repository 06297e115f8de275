"""A keyed step on several subtasks, cut into batches, frozen and given back at any moment and parallelism."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from itertools import pairwise
from typing import Any

import numpy as np
import pyarrow as pa
from hypothesis import strategies as st

from rayflow.operators.base import MAIN, Collected, Operator, RestoredState
from rayflow.operators.grouping import flat
from rayflow.partition import hash_columns, key_groups
from rayflow.partition.splitting import subtask_of_group
from tests.operators.helpers import frozen, opened, rows


@dataclass(frozen=True)
class Way:
    """How the same rows take their way through a step."""

    cuts: list[int] = field(default_factory=list)
    workers: list[int] = field(default_factory=lambda: [1])
    """Subtasks between one restore and the next."""
    restores: bool = False
    """After every batch."""
    pieces: bool = True

    def batches(self, table: pa.Table) -> list[pa.RecordBatch]:
        edges = sorted({0, table.num_rows, *(cut for cut in self.cuts if cut < table.num_rows)})
        return [_batch(table.slice(a, b - a)) for a, b in pairwise(edges)]


WAYS = st.builds(
    Way,
    cuts=st.lists(st.integers(0, 40), max_size=6),
    workers=st.lists(st.sampled_from([1, 2, 4]), min_size=1, max_size=3),
    restores=st.booleans(),
    pieces=st.booleans(),
)


def run(factory: Any, table: pa.Table, way: Way, *, tag: str = MAIN) -> list[dict[str, Any]]:
    """Rows that come out; those of one key in their order."""
    out, workers = Collected(), way.workers[0]
    operators = [opened(factory, i, workers, out)[0] for i in range(workers)]
    for at, batch in enumerate(way.batches(table)):
        deal(batch, operators, factory.keys)
        if way.restores:
            states = [frozen(operator, pieces=way.pieces) for operator in operators]
            for operator in operators:
                operator.close()
            operators = restored(factory, states, way.workers[at % len(way.workers)], out)
    return rows(out.batches.get(tag, []))


def deal(batch: pa.RecordBatch, operators: Sequence[Operator], keys: Sequence[str]) -> None:
    """What the hash exchange does (K1-K3)."""
    owners = _owners(batch, len(operators), keys)
    for index, operator in enumerate(operators):
        operator.process(batch.filter(pa.array(owners == index)), 0)


def restored(factory: Any, states: Sequence[Sequence[RestoredState]], workers: int, out: Collected) -> list[Operator]:
    """What the snapshot store does: every new subtask gets its rows of every old one."""
    operators = []
    for index in range(workers):
        operator, _ = opened(factory, index, workers, out)
        given_back = []
        for state in (state for old in states for state in old):
            table = state.table
            if table.num_rows:
                table = table.filter(pa.array(_owners(table, workers, factory.keys) == index))
            given_back.append(RestoredState(state.name, table, state.meta, state.piece))
        operator.restore(given_back)
        operators.append(operator)
    return operators


def by_key(found: Sequence[dict[str, Any]], keys: Sequence[str]) -> dict[tuple[Any, ...], list[dict[str, Any]]]:
    """Rows of each key in their order. NaN is a key like any other."""
    groups: dict[tuple[Any, ...], list[dict[str, Any]]] = {}
    for row in found:
        groups.setdefault(tuple(repr(row[key]) for key in keys), []).append(row)
    return groups


def table_of(schema: pa.Schema, data: Sequence[tuple[Any, ...]]) -> pa.Table:
    return pa.Table.from_arrays([pa.array([r[i] for r in data], f.type) for i, f in enumerate(schema)], schema=schema)


def _owners(table: pa.RecordBatch | pa.Table, workers: int, keys: Sequence[str]) -> Any:
    if table.num_rows == 0:
        return np.zeros(0, np.int32)
    return subtask_of_group(key_groups(hash_columns([flat(table.column(key)) for key in keys]), 128), workers, 128)


def _batch(table: pa.Table) -> pa.RecordBatch:
    return pa.RecordBatch.from_arrays([flat(column) for column in table.columns], schema=table.schema)
