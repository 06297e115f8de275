"""``python -m examples.nexmark``: every query on Ray, its speed beside DuckDB's, and whether the results are equal.

One JSON line a query goes to stdout with ``--json``, else a table. ``--kill`` kills a process of each job on the way.
Exit code 0 when every result is equal. DuckDB reads the events from Parquet files, rayflow makes them on the way; both
write their results as Parquet. ``rows`` are those that the query reads, of the three kinds of events.
"""

from __future__ import annotations

import argparse
import json
import logging
import os
import sys
from collections.abc import Sequence
from typing import Any

from rich.console import Console
from rich.table import Table

from examples.nexmark.check import Oracle, write_tables
from examples.nexmark.generator import Nexmark
from examples.nexmark.queries import ALL, MISSING
from examples.nexmark.run import How, Outcome, run, workplace


def main(arguments: Sequence[str]) -> int:
    options = parsed(arguments)
    if options.list:
        for query in ALL.values():
            print(f"{query.name:4} {query.title}")
        print(f"missing: {', '.join(MISSING) or 'none'}")
        return 0
    config = Nexmark(events=options.events, rate=options.rate, out_of_order=options.out_of_order, seed=options.seed)
    how = How(
        parallelism=options.parallelism, interval=options.interval, kill=options.kill, local=options.local,
        seed=options.seed,
    )  # fmt: skip
    outcomes = []
    if not how.local:
        connect(options.parallelism)
    with workplace() as events_folder:
        oracle = Oracle(config, files=write_tables(config, events_folder), threads=cores(how))
        for name in options.query or ALL:
            with workplace() as folder:
                outcome = run(ALL[name], config, how, oracle, folder)
            outcomes.append(outcome)
            if options.json:
                print(json.dumps(described(outcome, config, how)), flush=True)
    if not options.json:
        Console().print(table_of(outcomes, config, how))
    return 1 if any(outcome.difference for outcome in outcomes) else 0


def parsed(arguments: Sequence[str]) -> argparse.Namespace:
    parser = argparse.ArgumentParser(prog="python -m examples.nexmark", description=(__doc__ or "").split("\n\n")[0])
    parser.add_argument("--query", action="append", choices=list(ALL), help="only this one; may be given again")
    parser.add_argument("--list", action="store_true", help="the queries there are")
    parser.add_argument("--events", type=int, default=1_000_000, help="of all kinds together (%(default)s)")
    parser.add_argument("--rate", type=float, default=10_000.0, help="events a second of event time (%(default)s)")
    parser.add_argument("--out-of-order", default="0s", help="how far rows may be late, such as 4s (%(default)s)")
    parser.add_argument("--parallelism", type=int, default=2)
    parser.add_argument("--interval", default="1s", help="of checkpoints (%(default)s)")
    parser.add_argument("--kill", action="store_true", help="SIGKILL a process of each job")
    parser.add_argument("--local", action="store_true", help="in this process, without Ray")
    parser.add_argument("--seed", type=int, default=0, help="of the events, and of who is killed")
    parser.add_argument("--json", action="store_true", help="one JSON line a query")
    options = parser.parse_args(arguments)
    if options.kill and options.local:
        parser.error("--kill needs processes, leave --local out")
    return options


def connect(parallelism: int) -> None:
    """A Ray of this process; with as many CPUs as the jobs ask for, whatever the machine has."""
    import ray

    if not ray.is_initialized():
        ray.init(
            address="local", num_cpus=max(8, 4 * parallelism), include_dashboard=False, logging_level=logging.ERROR,
            log_to_driver=False,
        )  # fmt: skip


def cores(how: How) -> int:
    """That a job can use."""
    return 1 if how.local else min(how.parallelism, len(os.sched_getaffinity(0)))


def described(outcome: Outcome, config: Nexmark, how: How) -> dict[str, Any]:
    return {
        "query": outcome.query,
        "events": config.events,
        "rows": outcome.rows,
        "parallelism": how.parallelism,
        "cores": cores(how),
        "seconds": round(outcome.seconds, 3),
        "rows_per_s": round(outcome.rows / outcome.seconds),
        "rows_per_s_core": round(outcome.rows / outcome.seconds / cores(how)),
        "duckdb_seconds": round(outcome.duckdb_seconds, 3),
        "duckdb_rows_per_s": round(outcome.rows / outcome.duckdb_seconds),
        "checkpoints": outcome.checkpoints,
        "killed": outcome.killed or None,
        "restarts": outcome.restarts,
        "result_rows": outcome.difference.expected,
        "equal": not outcome.difference,
    }


def table_of(outcomes: Sequence[Outcome], config: Nexmark, how: How) -> Table:
    where = "in this process" if how.local else f"on Ray, parallelism {how.parallelism}"
    table = Table(title=f"Nexmark, {config.events:,} events, {where}, a checkpoint every {how.interval}")
    for heading in ("query", "rows", "rows/s", "rows/s a core", "DuckDB rows/s", "restarts", "result"):
        table.add_column(heading, justify="left" if heading in ("query", "result") else "right")
    for outcome in outcomes:
        line = described(outcome, config, how)
        table.add_row(
            line["query"], f"{line['rows']:,}", f"{line['rows_per_s']:,}", f"{line['rows_per_s_core']:,}",
            f"{line['duckdb_rows_per_s']:,}", str(line["restarts"]), str(outcome.difference),
        )  # fmt: skip
    return table


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
