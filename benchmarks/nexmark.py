"""Nexmark: every query on Ray beside DuckDB and, where there is a Java, Flink SQL, one after another on this machine.

rayflow: exactly-once checkpoints every second, events made on the way, results written as Parquet and compared with
DuckDB's; measured from the launch of the subtasks to the last commit. DuckDB: a batch query from Parquet to Parquet
with as many threads. Flink SQL (`benchmarks.nexmark_flink`): events from CSV, results thrown away, checkpoints as
often; its own count of the job's run time. Rows are those that the query reads; the table has millions a second. The
bars are what rayflow aims at: 3 times Flink where a query has no join, and 1 time where it has one.

    python -m benchmarks.nexmark [--events 2000000] [--query q3] [--no-flink]
"""

from __future__ import annotations

import argparse
import sys
import tempfile
from collections.abc import Mapping, Sequence
from pathlib import Path

import ray
from rich.console import Console
from rich.table import Table

from benchmarks import nexmark_flink
from benchmarks.figures import emit
from benchmarks.nexmark_flink import FlinkRun
from examples.nexmark.__main__ import connect, cores
from examples.nexmark.check import Oracle, write_tables
from examples.nexmark.generator import Nexmark
from examples.nexmark.queries import ALL
from examples.nexmark.run import How, Outcome, run, workplace

JOINS = ("q3", "q4", "q5", "q6", "q7", "q8", "q9", "q13", "q20")
DELAY_MS = 0
FOOTNOTE = (
    "q15 to q19: Flink tells every change. Here q18 and q19 tell the changes of a batch at once, fewer rows, and q15 "
    "to q17 tell a day when it is over. What they come to is the same, and is what was compared."
)
WIDTH = 100
"""Columns of the terminal that the table fits in, also where there is no terminal."""


def main(arguments: Sequence[str]) -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--events", type=int, default=2_000_000)
    parser.add_argument("--parallelism", type=int, default=2)
    parser.add_argument("--query", action="append", choices=list(ALL))
    parser.add_argument("--no-flink", action="store_true")
    options = parser.parse_args(arguments)
    config = Nexmark(events=options.events)
    how = How(parallelism=options.parallelism)
    names = options.query or list(ALL)
    outcomes = measured(names, config, how)
    flink = {} if options.no_flink else flink_runs(names, config, how)
    for outcome in outcomes:
        told(outcome, flink.get(outcome.query), how)
    console = Console(stderr=True)
    Console(stderr=True, width=max(WIDTH, console.width)).print(table_of(outcomes, flink, config, how))
    return 1 if any(outcome.difference for outcome in outcomes) else 0


def measured(names: Sequence[str], config: Nexmark, how: How) -> list[Outcome]:
    connect(how.parallelism)
    outcomes = []
    with workplace() as tables:
        oracle = Oracle(config, files=write_tables(config, tables), threads=cores(how))
        for name in names:
            with workplace() as folder:
                outcomes.append(run(ALL[name], config, how, oracle, folder))
    ray.shutdown()  # Flink shall have the machine to itself
    return outcomes


def flink_runs(names: Sequence[str], config: Nexmark, how: How) -> Mapping[str, FlinkRun]:
    why_not = nexmark_flink.available()
    if why_not:
        print(f"without Flink: {why_not}", file=sys.stderr)
        return {}
    with tempfile.TemporaryDirectory(prefix="rayflow-flink-events-") as folder:
        runs = nexmark_flink.run(
            names, config, parallelism=how.parallelism, interval_ms=1_000, delay_ms=DELAY_MS, folder=Path(folder)
        )
    for each in runs:
        if each.seconds is None:
            print(f"{each.query} failed in Flink: {each.error}", file=sys.stderr)
    return {each.query: each for each in runs}


def told(outcome: Outcome, flink: FlinkRun | None, how: How) -> None:
    name = f"nexmark {outcome.query}"
    emit(f"{name} equal to DuckDB", float(not outcome.difference), "bool", 1.0, not outcome.difference)
    emit(f"{name}", round(outcome.rows / outcome.seconds), "rows/s")
    emit(f"{name} a core", round(outcome.rows / outcome.seconds / cores(how)), "rows/s")
    emit(f"{name} against DuckDB", round(outcome.duckdb_seconds / outcome.seconds, 3), "ratio")
    if flink is not None and flink.seconds is not None:
        ratio, least = flink.seconds / outcome.seconds, bar(outcome.query)
        emit(f"{name} against Flink SQL", round(ratio, 2), "ratio", least, ratio >= least)


def bar(query: str) -> float:
    """How many times as fast as Flink SQL it shall be."""
    return 1.0 if query in JOINS else 3.0


def table_of(outcomes: Sequence[Outcome], flink: Mapping[str, FlinkRun], config: Nexmark, how: How) -> Table:
    title = f"Nexmark, {config.events:,} events, parallelism {how.parallelism}, a checkpoint a second; M rows/s"
    table = Table(title=title, caption=FOOTNOTE, caption_justify="left")
    for heading in ("query", "M rows", "rayflow", "a core", "DuckDB", "Flink", "x Flink", "bar", "result"):
        table.add_column(heading, justify="left" if heading in ("query", "bar", "result") else "right")
    for outcome in outcomes:
        theirs = flink.get(outcome.query)
        seconds = None if theirs is None else theirs.seconds
        least = bar(outcome.query)
        table.add_row(
            outcome.query,
            f"{outcome.rows / 1e6:.2f}",
            millions(outcome.rows / outcome.seconds),
            millions(outcome.rows / outcome.seconds / cores(how)),
            millions(outcome.rows / outcome.duckdb_seconds),
            "" if seconds is None else millions(outcome.rows / seconds),
            "" if seconds is None else f"{seconds / outcome.seconds:.1f}",
            f"{least:g} x" if seconds is None else f"{least:g} x {met(seconds / outcome.seconds >= least)}",
            str(outcome.difference) if outcome.difference else "equal",
        )
    return table


def millions(rows_per_s: float) -> str:
    return f"{rows_per_s / 1e6:.2f}"


def met(yes: bool) -> str:
    return "met" if yes else "MISSED"


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
