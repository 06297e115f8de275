"""Sources that pause, turn idle, wait for each other and come back, with crashes at any moment.

What is late then depends on the schedule. What does not: every row is in exactly one window or comes out as late (R3),
no window fires twice for a key (W3), no watermark falls (W1), and none passes an input that is live (W2).
"""

from __future__ import annotations

from collections import Counter, defaultdict
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager
from random import Random
from typing import Any
from weakref import WeakKeyDictionary

import pyarrow as pa
import pytest

import rayflow as rf
from rayflow.core.events import JobState
from rayflow.core.ids import MAX_WATERMARK, MIN_WATERMARK
from rayflow.core.messages import Element, Watermark
from rayflow.core.watermarks import InputWatermarks
from rayflow.operators.aggregates import count
from rayflow.operators.windows import tumbling
from rayflow.runtime.emitter import Emitter
from rayflow.stream import Stream
from tests.simulation.broken import replaced
from tests.simulation.faults import FaultBudget, Faults, Violation
from tests.simulation.run import play
from tests.simulation.scenario import SCHEMA, SECOND, InputRow, draw_rows, table_of
from tests.simulation.scripted import Stage, scripted
from tests.simulation.storage import Observer

SEEDS = range(40)
SIZE = 4


# ---------------------------------------------------------------------------------------------------- what is drawn


def pausing(rng: Random, max_drift: str | None) -> tuple[Stream, list[InputRow]]:
    """A source with pauses, some of them longer than its idle timeout."""
    splits, batch_rows, parallelism = rng.randint(1, 3), rng.choice((1, 3)), rng.choice((None, 1, 2))
    parts = [draw_rows(rng, rng.choice((0, 5, 20)), keys=3, delay_us=SECOND) for _ in range(splits)]
    pauses = [[rng.choice((0, 0, 0, 1, 12)) for _ in part] for part in parts]

    def generate(split: int, position: int) -> Iterator[pa.RecordBatch | None]:
        for first in range(position, len(parts[split]), batch_rows):
            yield from [None] * pauses[split][first]
            yield table_of(parts[split][first : first + batch_rows]).to_batches()[0]

    stream = rf.from_generator(
        generate, splits=splits, schema=SCHEMA, bounded=rng.random() < 0.4, parallelism=parallelism
    )
    direct = max_drift is not None or parallelism is not None or rng.random() < 0.5
    timed = (stream if direct else stream.filter(rf.col("k") >= 0)).with_event_time(
        "t", max_delay="1s", idle_timeout=rng.choice((None, "10ms", "40ms")), max_drift=max_drift
    )
    return timed, [row for part in parts for row in part]


def run_seed(seed: int, *, crashes: bool = True) -> dict[str, int]:
    """Raises `Violation` or `AssertionError` when a rule is broken; what has happened."""
    rng = Random(seed)
    budget = FaultBudget(crashes=rng.choice((0, 1, 3)) if crashes else 0, crash_horizon=rng.choice((60, 400)))
    stage = Stage(rng, Faults(rng, budget), Observer())
    max_drift = rng.choice((None, None, "2s"))
    drawn = [pausing(rng, max_drift) for _ in range(rng.choice((1, 2, 3)))]
    stream, rows = drawn[0][0], [row for _, some in drawn for row in some]
    if len(drawn) > 1:
        stream = stream.union(*(s for s, _ in drawn[1:]))
    if rng.random() < 0.3:
        stream = stream.rebalance(parallelism=rng.choice((1, 3)))
    windows = stream.key_by("k").window(tumbling(SIZE)).agg(n=count())
    fired, late = stage.target(), stage.target()
    parallelism = rng.choice((1, 2, 3))
    job = scripted(
        [(windows, fired, Counter()), (windows.late, late, Counter())], parallelism=parallelism, interval_s=0.02
    )
    world = stage.world(job)
    play(world, steps_max=200_000)
    if world.coordinator.outcome.state is not JobState.FINISHED:
        raise Violation(f"seed {seed}: the job is {world.coordinator.outcome}")
    panes = Counter((k, start) for (k, start, *_), times in fired.rows().items() for _ in range(times))
    if twice := [pane for pane, times in panes.items() if times > 1]:
        raise Violation(f"W3: seed {seed}: {twice[:3]} fired twice")
    got: dict[tuple[int, int], int] = defaultdict(int)
    for (k, start, _, n), times in fired.rows().items():
        got[k, start] += n * times
    for (k, t, _), times in late.rows().items():
        got[k, t // (SIZE * SECOND) * SIZE * SECOND] += times
    expected = Counter((k, t // (SIZE * SECOND) * SIZE * SECOND) for k, t, _ in rows)
    if dict(got) != dict(expected):
        raise Violation(f"R3: seed {seed}: windows and late rows hold {dict(got)}, the input {dict(expected)}")
    return {**stage.faults.happened, "late": sum(late.rows().values())}


# ---------------------------------------------------------------------------------------------------- W1 and W2, seen


class _Model:
    """What one `InputWatermarks` was told, and what must follow from it."""

    def __init__(self, inputs: Any) -> None:
        self.live: dict[Any, int] = dict.fromkeys(inputs, MIN_WATERMARK)
        self.idle: set[Any] = set()
        self.said = MIN_WATERMARK

    def check(self, current: int, *, over: bool) -> None:
        if current < self.said:
            raise Violation(f"W1: the watermark fell from {self.said} to {current}")
        live = [time for key, time in self.live.items() if key not in self.idle]
        allowed = max(self.said, MAX_WATERMARK if over else min(live, default=self.said))
        if current != allowed:
            raise Violation(f"W2: the watermark is {current}, live inputs allow {allowed}")
        self.said = current


@contextmanager
def watched() -> Iterator[Counter[str]]:
    """Checks W1 and W2 wherever watermarks are combined, and W1 on every wire; counts what it has seen."""
    models: WeakKeyDictionary[InputWatermarks[Any], _Model] = WeakKeyDictionary()
    sent: WeakKeyDictionary[Emitter, int] = WeakKeyDictionary()
    seen: Counter[str] = Counter()

    def made(original: Any) -> Any:
        def init(self: InputWatermarks[Any], inputs: Any) -> None:
            inputs = tuple(inputs)
            original(self, inputs)
            models[self] = _Model(inputs)

        return init

    def told(what: str) -> Callable[[Any], Any]:
        def make(original: Any) -> Any:
            def method(self: InputWatermarks[Any], key: Any, *args: Any) -> Any:
                model, seen[what] = models[self], seen[what] + 1
                if what == "advance":
                    model.idle.discard(key)
                if what in ("advance", "add"):
                    model.live[key] = args[0] if args else MIN_WATERMARK
                elif what == "set_idle" and key in model.live:
                    model.idle.add(key)
                elif what in ("end", "forget"):
                    model.live.pop(key, None)
                    model.idle.discard(key)
                result = original(self, key, *args)
                if what != "add":
                    model.check(self.current, over=what == "end" and not model.live)
                return result

            return method

        return make

    def sending(original: Any) -> Any:
        def broadcast(self: Emitter, element: Element) -> None:
            if isinstance(element, Watermark):
                if element.time < sent.get(self, MIN_WATERMARK):
                    raise Violation(f"W1: watermark {element.time} is sent after {sent[self]}")
                sent[self] = element.time
            seen[type(element).__name__] += 1
            original(self, element)

        return broadcast

    methods = ("add", "advance", "set_idle", "forget", "end")
    wraps: list[AbstractContextManager[None]] = [replaced(InputWatermarks, "__init__", made)]
    wraps += [replaced(InputWatermarks, name, told(name)) for name in methods]
    wraps.append(replaced(Emitter, "broadcast", sending))
    for wrap in wraps:
        wrap.__enter__()
    try:
        yield seen
    finally:
        for wrap in reversed(wraps):
            wrap.__exit__(None, None, None)


def test_no_row_is_lost_and_no_rule_is_broken_when_sources_pause_and_processes_die() -> None:
    happened: Counter[str] = Counter()
    with watched() as seen:
        for seed in SEEDS:
            happened.update(run_seed(seed))
    assert happened["crash"] > 20, "faults must have happened"
    assert happened["late"] > 0, "some sources must have come back too late"
    assert seen["set_idle"] > 100
    assert seen["Idle"] > 50


# ---------------------------------------------------------------------------------------------------- broken engines


@contextmanager
def come_back_below() -> Iterator[None]:
    """W1: the combined watermark follows an idle channel that comes back down."""

    def make(_: Any) -> Any:
        def combine(self: InputWatermarks[Any]) -> int | None:
            live = [time for key, time in self._of.items() if key not in self._idle]
            before, self.current = self.current, min(live, default=self.current)
            return None if self.current == before else self.current

        return combine

    with replaced(InputWatermarks, "_combine", make):
        yield


@contextmanager
def end_speaks_for_idle() -> Iterator[None]:
    """W2: when the last channel that is not idle ends, all is taken for ended."""

    def make(original: Any) -> Any:
        def end(self: InputWatermarks[Any], key: Any) -> int | None:
            risen: int | None = original(self, key)
            if self.all_idle:
                risen = self.current = MAX_WATERMARK
            return risen

        return end

    with replaced(InputWatermarks, "end", make):
        yield


@pytest.mark.parametrize("broken", [come_back_below, end_speaks_for_idle])
def test_a_broken_engine_is_caught(broken: Callable[[], AbstractContextManager[None]]) -> None:
    def clean(seed: int) -> bool:
        try:
            run_seed(seed, crashes=False)
        except (Violation, AssertionError):
            return False
        return True

    with broken(), watched():
        assert not all(clean(seed) for seed in SEEDS), f"{broken.__name__}: {len(SEEDS)} seeds were clean"
    assert clean(0), "and it is the engine that is broken"
