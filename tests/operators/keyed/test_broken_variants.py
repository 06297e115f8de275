"""What the comparison of ways must catch: each of these breaks one promise, and the results differ."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np
import pyarrow as pa
import pytest

import rayflow.operators.aggregates as rf
from rayflow.core.ids import MIN_WATERMARK
from rayflow.operators.base import MAIN, Collected
from rayflow.operators.keyed.deduplicate import Deduplicate, DeduplicateWithinOperator
from rayflow.operators.keyed.reduce import Reduce
from rayflow.operators.keyed.running import RunningAggregate
from rayflow.operators.keyed.segments import Segments
from rayflow.operators.keyed.top import Top
from rayflow.operators.state.table import StateTable
from tests.operators.helpers import opened, rows
from tests.operators.keyed.rig import Way, by_key, run, table_of

SCHEMA = pa.schema([("k", pa.int64()), ("t", pa.timestamp("us")), ("v", pa.int64()), ("f", pa.float64())])
RNG = np.random.default_rng(3)
TABLE = table_of(
    SCHEMA,
    [(int(k), at, int(v), float(v) / 7) for at, (k, v) in enumerate(RNG.integers(0, 9, (200, 2)))],
)
WAY = Way(cuts=[10, 25, 60, 61, 120], workers=[2, 1, 4], restores=True)


def newest_first(state: pa.RecordBatch, rows: pa.RecordBatch) -> dict[str, Any]:
    return {"t": rows.column("t"), "v": rows.column("v"), "f": state.column("f")}


STEPS: dict[str, Any] = {
    "agg": RunningAggregate(keys=("k",), aggregates={"total": rf.sum("f"), "n": rf.count(), "hi": rf.max("v")}),
    "reduce": Reduce(keys=("k",), fn=newest_first),
    "deduplicate": Deduplicate(keys=("k",)),
    "within": Deduplicate(keys=("k",), within_us=30, event_time="t"),
    "top": Top(keys=("k",), n=3, by="v"),
}
WHOLE = {name: by_key(run(factory, TABLE, Way()), ("k",)) for name, factory in STEPS.items()}


def untouched(monkeypatch: pytest.MonkeyPatch) -> None:
    """Changed rows are kept from the next checkpoint."""
    monkeypatch.setattr(StateTable, "touch", lambda self, slots: None)


def backwards(monkeypatch: pytest.MonkeyPatch) -> None:
    """Rows of a key are taken in another order than they came."""
    real = Segments.of

    def of(slots: Any) -> Segments:
        found = real(slots)
        places = np.repeat(found.starts + found.ends, found.lengths) - np.arange(found.rows)
        return Segments(found.order[places], found.heads, found.starts, found.lengths)

    monkeypatch.setattr(Segments, "of", staticmethod(of))


def forgetful(monkeypatch: pytest.MonkeyPatch) -> None:
    """Every batch starts from nothing."""
    real = StateTable.slots

    def slots(self: StateTable, keys: Any, *, insert: bool) -> Any:
        if insert:
            self.clear()
        return real(self, keys, insert=insert)

    monkeypatch.setattr(StateTable, "slots", slots)


@pytest.mark.parametrize("step", STEPS)
def test_the_way_as_it_is_changes_nothing(step: str) -> None:
    assert by_key(run(STEPS[step], TABLE, WAY), ("k",)) == WHOLE[step]


@pytest.mark.parametrize("step", STEPS)
@pytest.mark.parametrize("breaks", [untouched, backwards, forgetful])
def test_broken_variants_are_caught(
    step: str, breaks: Callable[[pytest.MonkeyPatch], None], monkeypatch: pytest.MonkeyPatch
) -> None:
    breaks(monkeypatch)
    assert by_key(run(STEPS[step], TABLE, WAY), ("k",)) != WHOLE[step]


def test_keys_forgotten_too_early_are_caught(monkeypatch: pytest.MonkeyPatch) -> None:
    """A sweep that does not wait for ``within``."""

    def passed(within_us: int | None) -> list[Any]:
        operator, out = opened(STEPS["within"], out=Collected())
        assert isinstance(operator, DeduplicateWithinOperator)
        for at, batch in enumerate(Way(cuts=[50, 100, 150]).batches(TABLE)):
            operator.process(batch, 0)
            if within_us is not None:
                real, operator._within = operator._within, within_us
                operator._swept_at = MIN_WATERMARK
                operator.on_watermark(50 * at + 50)
                operator._within = real
        return rows(out.batches[MAIN])

    assert passed(30) == passed(None)
    assert passed(0) != passed(None)
