"""What runs: a flow of a family, its input, its configuration and what must come out, all drawn from the seed.

The expected output is computed here in plain Python from the input rows; no part of the engine has a hand in it.
"""

from __future__ import annotations

from collections import Counter, defaultdict
from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from random import Random
from typing import Any, Literal

import pyarrow as pa

import rayflow as rf
from rayflow.config import JobConfig
from rayflow.core.coordinator import CoordinatorSettings
from rayflow.core.restart import RestartSpec
from rayflow.expressions import col
from rayflow.graph import Node
from rayflow.operators.aggregates import count
from rayflow.operators.aggregates import max as max_of
from rayflow.operators.aggregates import sum as sum_of
from rayflow.operators.windows import tumbling
from rayflow.plan import Plan, build_plan
from rayflow.stream import Stream
from tests.simulation import events, stateful
from tests.simulation.faults import Faults
from tests.simulation.target import FakeSink, Row, Target

SCHEMA = pa.schema([("k", pa.int64()), ("t", pa.timestamp("us")), ("v", pa.int64())])
SECOND = 1_000_000

InputRow = tuple[int, int, int]
Mode = Literal["exactly_once", "at_least_once"]
Space = str
"""Which flows are drawn: `PROTOCOL`, `EVENTS` or one kind of `tests.simulation.events.KINDS`."""
PROTOCOL: Space = "protocol"
EVENTS: Space = "events"


@dataclass(frozen=True)
class Scenario:
    """One drawn job. ``expected`` is the committed output by sink of a run without faults."""

    what: str
    plan: Plan
    config: JobConfig
    settings: CoordinatorSettings
    mode: Mode
    wait_s: float
    """Mean of the virtual time that passes when time is what passes next: some 100 steps lie between two waits."""
    retain: int
    inline_max_bytes: int | None
    targets: tuple[Target, ...]
    expected: tuple[Counter[Row], ...]
    plan_again: Plan | None = None
    """The same flow at another parallelism: what a stopped, cancelled or failed job goes on with."""
    heartbeat_s: float | None = None
    shape: str = ""
    """Family of the flow."""
    incremental: bool = False
    """With the bounds of `tests.simulation.tiny`, so that later checkpoints name files of earlier ones."""


def draw_rows(rng: Random, count: int, *, keys: int, delay_us: int) -> list[InputRow]:
    """Rows in reading order; none lies more than ``delay_us`` behind an earlier one."""
    rows, now = [], 0
    for i in range(count):
        now += rng.choice((0, 0, 1, 1, 3)) * SECOND // 2
        rows.append((rng.randrange(keys), max(0, now - rng.randint(0, delay_us)), i))
    return rows


def table_of(rows: list[InputRow]) -> pa.Table:
    columns = list(zip(*rows, strict=True)) if rows else [(), (), ()]
    return pa.table([pa.array(c, pa.int64()).cast(f.type) for c, f in zip(columns, SCHEMA, strict=True)], schema=SCHEMA)


class Draw:
    """Builds one scenario step by step. Streams come with the rows that should be in them."""

    def __init__(self, rng: Random, faults: Faults, new_target: Callable[[], Target]) -> None:
        self.rng = rng
        self.faults = faults
        self.keys = rng.choice((1, 3, 8))
        self.delay_us = rng.choice((0, SECOND, 5 * SECOND))
        self.parallelism = rng.choice((1, 1, 2, 2, 3, 4))
        self.sizes: tuple[int, ...] = (0, 7, 40, 80, 120, 200)
        """Of sources, in rows."""
        self.batches: tuple[int, ...] = (1, 3, 8)
        """Rows of a batch of a source."""
        self.words: list[str] = []
        self.shape = ""
        self._new_target = new_target
        self.sinks: list[Node] = []
        self.targets: list[Target] = []
        self.expected: list[Counter[Row]] = []

    def source(self) -> tuple[Stream, list[InputRow]]:
        rng = self.rng
        rows = draw_rows(rng, rng.choice(self.sizes), keys=self.keys, delay_us=self.delay_us)
        splits, batch_rows = rng.randint(1, 5), rng.choice(self.batches)
        timing = self._timing()
        parallelism = timing["parallelism"]
        if rng.random() < 0.5:
            self.words.append(f"arrow({len(rows)} rows, {splits} splits, batches of {batch_rows}, p={parallelism})")
            return rf.from_arrow(table_of(rows), splits=splits, batch_rows=batch_rows, **timing), rows
        edges = [len(rows) * i // splits for i in range(splits + 1)]
        idle = rng.random() < 0.3 and len(rows) <= 40 * batch_rows

        def generate(split: int, position: int) -> Iterator[pa.RecordBatch | None]:
            part = rows[edges[split] : edges[split + 1]]
            for first in range(position, len(part), batch_rows):
                if idle and first % 2:
                    yield None
                yield table_of(part[first : first + batch_rows]).to_batches()[0]

        self.words.append(f"generator({len(rows)} rows, {splits} splits, batches of {batch_rows}, p={parallelism})")
        return rf.from_generator(generate, splits=splits, schema=SCHEMA, **timing), rows

    def _timing(self) -> dict[str, Any]:
        rng = self.rng
        timing: dict[str, Any] = {"event_time": "t", "parallelism": rng.choice((None, None, 1, 2))}
        if rng.random() < 0.8:
            timing["max_delay"] = self.delay_us / SECOND
        return timing

    def ordered(self) -> tuple[Stream, list[InputRow]]:
        """A source with all rows of a key in one split, so that they keep their order, and some steps."""
        rng = self.rng
        rows = draw_rows(rng, rng.choice(self.sizes), keys=self.keys, delay_us=self.delay_us)
        splits, batch_rows = rng.randint(1, 5), rng.choice(self.batches)

        def generate(split: int, position: int) -> Iterator[pa.RecordBatch]:
            part = [row for row in rows if row[0] % splits == split]
            for first in range(position, len(part), batch_rows):
                yield table_of(part[first : first + batch_rows]).to_batches()[0]

        self.words.append(f"ordered({len(rows)} rows, {splits} splits, batches of {batch_rows})")
        # Steps at another parallelism than the source would get its rows round robin. Splits that end are read one
        # after another, and each begins with the earliest times again: those with a max_delay are read in turns.
        timing = {**self._timing(), "parallelism": None}
        timing["bounded"] = "max_delay" not in timing
        return self.steps(rf.from_generator(generate, splits=splits, schema=SCHEMA, **timing), rows, in_order=True)

    def steps(self, stream: Stream, rows: list[InputRow], *, in_order: bool = False) -> tuple[Stream, list[InputRow]]:
        """Some stateless steps."""
        rng, faults = self.rng, self.faults
        if rng.random() < 0.4:
            factor = rng.randint(2, 5)
            self.words.append(f"v*{factor}")
            stream = stream.with_columns(v=col("v") * factor)
            rows = [(k, t, v * factor) for k, t, v in rows]
        if rng.random() < 0.3:
            bound = rng.randint(0, 40)
            self.words.append(f"filter v>={bound}")
            stream = stream.filter(col("v") >= bound)
            rows = [r for r in rows if r[2] >= bound]
        if rng.random() < 0.4:
            self.words.append("map_batches")

            def fail_sometimes(batch: pa.RecordBatch) -> pa.RecordBatch:
                if faults.user_error():
                    raise ValueError(f"user code failed, {faults.budget.user_errors} to go")
                return batch

            stream = stream.map_batches(fail_sometimes, schema=stream.schema)
        if not in_order and rng.random() < 0.25:
            parallelism = rng.choice((None, 1, 2))
            self.words.append(f"rebalance(p={parallelism})")
            stream = stream.rebalance(parallelism=parallelism)
        return stream, rows

    def union(self, most: int = 3) -> tuple[Stream, list[InputRow]]:
        """One to three sources."""
        streams, rows = [], []
        for _ in range(min(most, self.rng.choice((1, 1, 1, 2, 3)))):
            stream, some = self.steps(*self.source())
            streams.append(stream)
            rows += some
        if len(streams) > 1:
            self.words.append("union")
            return streams[0].union(*streams[1:]), rows
        return streams[0], rows

    def shuffle(self, stream: Stream, rows: list[InputRow], by: str) -> tuple[Stream, list[InputRow]]:
        self.words.append(f"key_by {by}")
        return self.steps(stream.key_by(by), rows)

    def windows(self, stream: Stream, rows: list[InputRow]) -> tuple[Stream, list[Row]]:
        size = self.rng.choice((2, 7, 30, 300)) * SECOND
        combine = self.rng.random() < 0.6
        self.words.append(f"tumbling({size // SECOND}s{', combiner' if combine else ''})")
        result = stream.key_by("k").window(tumbling(size / SECOND)).agg(n=count(), s=sum_of("v"), top=max_of("v"))
        if not combine:
            result = Stream(replace(result._node, combiner=None), event_time="window_start")  # type: ignore[assignment]
        groups: dict[tuple[int, int], list[int]] = defaultdict(list)
        for k, t, v in rows:
            groups[k, t // size * size].append(v)
        return result, [(k, s, s + size, len(vs), sum(vs), max(vs)) for (k, s), vs in groups.items()]

    def sink(self, stream: Stream, rows: list[Row]) -> None:
        target = self._new_target()
        self.targets.append(target)
        self.expected.append(Counter(rows))
        sink = FakeSink(target, state=self.rng.random() < 0.5)
        self.sinks.append(Node("sink", (stream._input(),), sink))

    def flow(self, mode: Mode, space: Space) -> None:
        if space != PROTOCOL:
            self.sizes, self.batches = (0, 25, 60, 60, 100), (1, 1, 3)
            self.shape = self.rng.choice(tuple(events.KINDS)) if space == EVENTS else space
            self.sink(*events.KINDS[self.shape](self))
            return
        shapes = (
            ("plain", "shuffles")
            if mode == "at_least_once"
            else ("plain", "shuffles", "windows", "windows", "two", "keyed", "keyed")
        )
        shape = self.shape = self.rng.choice(shapes)
        stream, rows = self.union()
        if shape == "shuffles":
            stream, rows = self.shuffle(*self.shuffle(stream, rows, "k"), "v")
        if shape in ("plain", "shuffles", "two"):
            self.sink(stream, list(rows))
        if shape in ("windows", "two"):
            self.sink(*self.windows(stream, rows))
        if shape == "keyed":
            kind = self.rng.choice(stateful.KINDS)
            self.words.append(kind.__name__)
            self.sink(*kind(stream, rows))

    def state(self) -> dict[str, Any]:
        """The back end. RocksDB is real, and opening one takes as long as many steps: seldom. Joins have files only."""
        of_events = 0.3 if "join" in self.shape else 0.1 if self.shape in events.KINDS else 0.0
        chance = {"windows": 0.15, "two": 0.15, "keyed": 0.02}.get(self.shape, of_events)
        if self.rng.random() >= chance:
            return {"state": "fs"}
        return {"state": "rocksdb", "state_memory_bytes": self.rng.choice((64, 2_000))}


def draw(
    seed_rng: Random, faults: Faults, new_target: Callable[[], Target], mode: Mode, space: Space = PROTOCOL
) -> Scenario:
    """One scenario; ``seed_rng`` draws everything."""
    rng = seed_rng
    d = Draw(rng, faults, new_target)
    d.flow(mode, space)
    # Windows and joins show what was lost only where checkpoints fall between two watermarks: both come often, and
    # little is in flight, so that no source is far ahead of the barriers.
    often = space != PROTOCOL
    max_parallelism = rng.choice((4, 13, 128))
    plan = build_plan("sim", d.sinks, parallelism=d.parallelism, max_parallelism=max_parallelism)
    config = JobConfig(
        max_parallelism=max_parallelism,
        batch_rows=rng.choice((1, 2, 8) if often else (1, 2, 8, 1000)),
        linger=rng.choice(("0s", "1ms", "20ms")),
        watermark_interval="1ms" if often else "100ms" if faults.budget.hangs else rng.choice(("1ms", "10ms", "100ms")),
    )
    # Below what a user may ask for, so that small jobs meet backpressure.
    state = d.state()
    for name, value in {"inflight_bytes": rng.choice((160, 256) if often else (256, 256, 600, 4096)), **state}.items():
        object.__setattr__(config, name, value)
    incremental = rng.random() < 0.6
    wait_s = rng.choice((0.002, 0.01) if often else (0.0005, 0.002, 0.01))
    interval = rng.choice((1, 1, 1, 3, 10) if often else (1, 1, 3, 3, 10, 30, None))
    settings = CoordinatorSettings(
        # A source that finds nothing sleeps 5 ms: many more checkpoints meanwhile would be all that happens.
        interval_s=None if interval is None else max(0.002, interval * wait_s),
        timeout_s=rng.choice((1000 * wait_s, 600.0, 600.0)),
        min_pause_s=rng.choice((0.0, 0.0, 0.005)),
        tolerable_failures=rng.choice((0, 1, 3)),
        hang_timeout_s=500 * wait_s if faults.budget.hangs else 1e9,
        restart=RestartSpec(
            strategy=rng.choice(("exponential", "exponential", "exponential", "fixed", "none")),
            initial_s=0.01,
            factor=1.5,
            max_s=0.2,
            reset_after_s=1.0,
        ),
    )
    retain = rng.choice((1, 1, 2, 5))
    what = " | ".join(d.words) + (
        f" | p={d.parallelism}, groups={max_parallelism}, {mode}, batch_rows={config.batch_rows}, "
        f"credit={config.inflight_bytes}, interval={settings.interval_s}, timeout={settings.timeout_s}, "
        f"retain={retain}, restart={settings.restart.strategy}, {state}{', incremental' if incremental else ''}"
    )
    return Scenario(
        what=what,
        plan=plan,
        config=config,
        settings=settings,
        mode=mode,
        wait_s=wait_s,
        retain=retain,
        # With rocksdb there are files in any case; None is what the back end "memory" does.
        inline_max_bytes=0 if incremental else rng.choice((0, 4096, None if state["state"] == "fs" else 0)),
        targets=tuple(d.targets),
        expected=tuple(d.expected),
        heartbeat_s=50 * wait_s if faults.budget.hangs else None,
        shape=d.shape,
        incremental=incremental,
        plan_again=build_plan("sim", d.sinks, parallelism=rng.randint(1, 4), max_parallelism=max_parallelism),
    )
