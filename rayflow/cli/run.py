"""``rayflow run`` and ``rayflow explain``."""

from __future__ import annotations

import contextlib
import sys
import time
from typing import Literal

import click
from rich.console import Console
from rich.table import Table

from rayflow.cli.loading import Target, TargetType, load_flow
from rayflow.cli.options import allowances, as_json, print_json, storage_options
from rayflow.config import CheckpointConfig, JobConfig
from rayflow.core.keygroups import DEFAULT_MAX_PARALLELISM
from rayflow.guarantees import check_guarantees
from rayflow.progress import summary
from rayflow.runtime.results import JobResult
from rayflow.runtime.stores import Start

SHOWN_ROWS = 20

_parallelism = click.option(
    "-p",
    "--parallelism",
    type=click.IntRange(min=1),
    help="Subtasks of each step; default: one a core on Ray, 1 elsewhere.",
)
_strict = click.option(
    "--strict", is_flag=True, help="Refuse a flow with a source or sink that gives less than exactly once."
)


@click.command()
@click.argument("target", type=TargetType(), metavar="FILE.py[:flow]")
@_parallelism
@click.option("--checkpoints", "url", metavar="URL", help="Folder or s3:// URL to keep checkpoints in.")
@click.option("--interval", metavar="DURATION", help="Time between checkpoints, as 500ms or 10s; default 10s.")
@_strict
@click.option(
    "--state",
    type=click.Choice(["fs", "rocksdb", "memory"]),
    help="Where state and its snapshots are kept; default: fs with a URL, else memory.",
)
@click.option(
    "--max-parallelism",
    type=click.IntRange(min=1, max=32_768),
    default=DEFAULT_MAX_PARALLELISM,
    show_default=True,
    help="Key groups of the job; fixed for its life.",
)
@click.option(
    "--from",
    "origin",
    metavar="latest|URL",
    help="Begin with the savepoint at URL (or the checkpoint whose folder it is), or go on from the newest checkpoint.",
)
@allowances
@click.option(
    "--start",
    default="latest",
    show_default=True,
    metavar="latest|fresh|N",
    callback=lambda ctx, param, value: _start(value, param, ctx),
    help="Go on from the newest checkpoint, refuse a folder that has any, or go back to checkpoint N.",
)
@click.option("--local", is_flag=True, help="In this process, without Ray.")
@storage_options
@as_json
def run(
    target: Target,
    parallelism: int | None,
    url: str | None,
    interval: str | None,
    strict: bool,
    state: Literal["fs", "rocksdb", "memory"] | None,
    max_parallelism: int,
    origin: str | None,
    allow_dropped: tuple[str, ...],
    allow_other_flow: bool,
    start: Start,
    local: bool,
    storage_options: dict[str, str],
    as_json: bool,
) -> None:
    """Run the flow of FILE.py to its end."""
    if url is None and (interval is not None or storage_options or strict):
        raise click.UsageError("--interval, --strict and --storage-option speak of checkpoints; add --checkpoints URL")
    if origin is not None and start != "latest":
        raise click.UsageError("--from and --start both say where to begin; give one of them")
    if origin == "fresh" or (origin or "").isdecimal():
        raise click.UsageError(f"--from takes latest or the URL of a savepoint, got {origin!r}; did you mean --start?")
    out = sys.stdout
    if as_json:
        # What user code prints must not get between the braces; on Ray it comes late, up to the end of this process.
        sys.stdout = sys.stderr
    checkpoints = (
        None
        if url is None
        else CheckpointConfig(url, interval=interval or "10s", strict=strict, storage_options=dict(storage_options))
    )
    flow = load_flow(target)
    began = time.monotonic()
    result = flow.run(
        parallelism=parallelism,
        checkpoints=checkpoints,
        config=JobConfig(state=state, max_parallelism=max_parallelism),
        local=local,
        start=origin or start,
        allow_dropped=allow_dropped,
        allow_other_flow=allow_other_flow,
    )
    seconds = time.monotonic() - began
    if as_json:
        print_json(_result_json(result, seconds), out)
        return
    for name, table in result.tables.items():
        _print_rows(name, table.slice(0, SHOWN_ROWS).to_pylist(), table.schema.names, table.num_rows)
    if local or not sys.stderr.isatty():  # else the progress line has said it
        click.echo(summary(result, seconds))


@click.command()
@click.argument("target", type=TargetType(), metavar="FILE.py[:flow]")
@click.option("--mermaid", is_flag=True, help="A Mermaid flowchart instead of text.")
@_strict
@_parallelism
def explain(target: Target, mermaid: bool, strict: bool, parallelism: int | None) -> None:
    """Print the plan of the flow of FILE.py and what it guarantees on each path, without running it."""
    with contextlib.redirect_stdout(sys.stderr):
        flow = load_flow(target)
    tell = flow.to_mermaid if mermaid else flow.explain
    click.echo(tell(parallelism=parallelism or 1))
    if strict:
        check_guarantees(flow.plan(parallelism=parallelism or 1), CheckpointConfig("explained", strict=True))


def _start(value: str, param: click.Parameter, ctx: click.Context) -> Start:
    words: dict[str, Start] = {"latest": "latest", "fresh": "fresh"}
    if value in words:
        return words[value]
    if value.isdecimal():
        return int(value)
    raise click.BadParameter(f"expected latest, fresh or the number of a checkpoint, got {value!r}", ctx, param)


def _result_json(result: JobResult, seconds: float) -> dict[str, object]:
    return {
        "flow": result.name,
        "status": result.status,
        "seconds": round(seconds, 3),
        "checkpoint": result.checkpoint,
        "restarts": result.restarts,
        "savepoint": result.savepoint,
        "metrics": dict(result.metrics),
        "tables": {name: table.to_pylist() for name, table in result.tables.items()},
    }


def _print_rows(title: str, rows: list[dict[str, object]], names: list[str], total: int) -> None:
    more = f", the first {len(rows)}" if len(rows) < total else ""
    click.echo(f"{title}: {total:,} rows{more}")
    table = Table(show_edge=False)
    for name in names:
        table.add_column(name)
    for row in rows:
        table.add_row(*("" if value is None else str(value) for value in row.values()))
    Console().print(table)
