"""``rayflow jobs | savepoint | stop | rescale``: jobs that run on a cluster, by the name of their flow."""

from __future__ import annotations

from contextlib import contextmanager
from typing import TYPE_CHECKING, Any

import click
from rich.console import Console
from rich.progress import BarColumn, DownloadColumn, Progress, TextColumn

from rayflow.cli.options import as_json, print_json, storage_options
from rayflow.cli.tables import print_table
from rayflow.cli.tables import table as new_table

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator

    from rayflow.cluster.job import Job

_timeout = click.option("--timeout", type=click.FloatRange(min=0), help="Seconds to wait; default: for ever.")
_to = click.option("--to", metavar="URL", help="A new folder for the savepoint; default: in the job's directory.")


@click.command()
@as_json
def jobs(as_json: bool) -> None:
    """Jobs that run on the cluster."""
    from rayflow.cluster.deploy import connect
    from rayflow.cluster.job import attach, running_jobs

    connect(start=False)
    rows = []
    for name in running_jobs():
        status = attach(name, start=False).status()
        rows.append(
            {
                "job": name,
                "state": status.state,
                "rows_in": status.rows_in,
                "checkpoint": status.last_checkpoint,
                "restarts": status.restarts,
                "detail": status.detail,
            }
        )
    if as_json:
        print_json(rows)
        return
    table = new_table("job", "state", "rows in", "checkpoint", "restarts", "")
    for row in rows:
        table.add_row(
            str(row["job"]),
            str(row["state"]),
            f"{row['rows_in']:,}",
            str(row["checkpoint"] or "none"),
            str(row["restarts"]),
            str(row["detail"]),
        )
    if not rows:
        table.add_row("none", "", "", "", "", "")
    print_table(table)


@click.command()
@click.argument("job")
@_to
@click.option("--timeout", type=click.FloatRange(min=0), default=600.0, show_default=True, help="Seconds to wait.")
@storage_options
@as_json
def savepoint(job: str, to: str | None, timeout: float, storage_options: dict[str, str], as_json: bool) -> None:
    """Take a savepoint of JOB, which goes on, and print its URL."""
    with _copying() as on_progress:
        url = _attached(job).savepoint(
            to, timeout=timeout, storage_options=storage_options or None, on_progress=on_progress
        )
    if as_json:
        print_json({"job": job, "savepoint": url})
    else:
        click.echo(url)


@click.command()
@click.argument("job")
@click.option("--savepoint", "with_savepoint", is_flag=True, help="Write a savepoint, and print its URL.")
@click.option(
    "--to", metavar="URL", help="A new folder for the savepoint; default: savepoints/ in the job's directory."
)
@_timeout
@storage_options
@as_json
def stop(
    job: str,
    with_savepoint: bool,
    to: str | None,
    timeout: float | None,
    storage_options: dict[str, str],
    as_json: bool,
) -> None:
    """Stop JOB: a last checkpoint, everything committed, then it ends and can go on later."""
    with _copying() as on_progress:
        result = _attached(job).stop(
            timeout,
            savepoint=to or with_savepoint,
            storage_options=storage_options or None,
            on_progress=on_progress,
        )
    if as_json:
        print_json(
            {
                "job": job,
                "status": result.status,
                "checkpoint": result.checkpoint,
                "savepoint": result.savepoint,
            }
        )
    else:
        click.echo(result.savepoint or f"{job} {result.status} with checkpoint {result.checkpoint}")


@click.command()
@click.argument("job")
@click.argument("parallelism", type=click.IntRange(min=1))
@click.option(
    "--to", metavar="URL", help="A new folder for the savepoint; default: savepoints/ in the job's directory."
)
@_timeout
@as_json
def rescale(job: str, parallelism: int, to: str | None, timeout: float | None, as_json: bool) -> None:
    """Stop JOB with a savepoint and start it from there at another parallelism."""
    new = _attached(job).rescale(parallelism, savepoint=to, timeout=timeout)
    if as_json:
        print_json({"job": new.name, "parallelism": parallelism})
    else:
        click.echo(f"{new.name} runs with parallelism {parallelism}")


def _attached(name: str) -> Job:
    from rayflow.cluster.job import attach

    return attach(name, start=False)


@contextmanager
def _copying() -> Iterator[Callable[[int, int], Any]]:
    """A bar on a terminal while a savepoint is copied."""
    console = Console(stderr=True)
    columns = (TextColumn("copying the savepoint"), BarColumn(), DownloadColumn())
    with Progress(*columns, console=console, transient=True, disable=not console.is_terminal) as bar:
        task = bar.add_task("", total=None, visible=False)
        yield lambda done, total: bar.update(task, completed=done, total=total, visible=True)
