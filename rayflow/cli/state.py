"""``rayflow state list | schema | query | diff``: what is in the state of a checkpoint or savepoint."""

from __future__ import annotations

from typing import Any, Literal

import click
import pyarrow as pa

from rayflow.checkpoint import Checkpoint, read_checkpoint
from rayflow.cli.options import as_json, print_json, storage_options
from rayflow.cli.tables import print_table, size, table
from rayflow.difference import StateDifference, diff
from rayflow.errors import ConfigError
from rayflow.storage.opening import StateInfo

SHOWN_ROWS = 20

Which = int | Literal["latest"]


def _which(ctx: click.Context, param: click.Parameter, value: str) -> Which:
    if value == "latest":
        return "latest"
    if value.isdecimal():
        return int(value)
    raise click.BadParameter(f"expected the number of a checkpoint or 'latest', got {value!r}", ctx, param)


_checkpoint = click.option(
    "--checkpoint", default="latest", show_default=True, metavar="N|latest", callback=_which, help="Which one of a job."
)


@click.group()
def state() -> None:
    """Look into state: URL is the checkpoint directory of a job, the folder of one checkpoint, or a savepoint."""


@state.command("list")
@click.argument("url")
@_checkpoint
@storage_options
@as_json
def list_(url: str, checkpoint: Which, storage_options: dict[str, str], as_json: bool) -> None:
    """All states: rows, bytes, pieces, key columns, mode."""
    opened = read_checkpoint(url, checkpoint, storage_options=storage_options)
    infos = [opened.info(step, name) for step in opened.steps() for name in opened.states(step)]
    if as_json:
        head = {"job": opened.manifest.job, "checkpoint": opened.manifest.checkpoint, "url": opened.url}
        print_json({**head, "states": [_info_json(info) for info in infos]})
        return
    click.echo(f"checkpoint {opened.manifest.checkpoint} of job {opened.manifest.job!r}, {opened.manifest.kind}")
    shown = table("step", "state", "rows", "size", "pieces", "subtasks", "keys", "mode", "format")
    for info in infos:
        keys = ", ".join([*info.keys.key_columns, *(f"[{name}]" for name in info.keys.subkey_columns)])
        counts = (f"{info.rows:,}", size(info.nbytes), str(info.pieces), str(info.subtasks))
        shown.add_row(info.step, info.state, *counts, keys, info.mode, info.format)
    print_table(shown)


@state.command()
@click.argument("url")
@click.argument("step")
@click.argument("name", metavar="STATE")
@_checkpoint
@storage_options
@as_json
def schema(url: str, step: str, name: str, checkpoint: Which, storage_options: dict[str, str], as_json: bool) -> None:
    """The columns of one state."""
    opened = read_checkpoint(url, checkpoint, storage_options=storage_options)
    fields = list(opened.schema(step, name))
    keys = opened.info(step, name).keys.identity
    if as_json:
        print_json(
            [{"name": f.name, "type": str(f.type), "nullable": f.nullable, "key": f.name in keys} for f in fields]
        )
        return
    shown = table("column", "type", "")
    for field in fields:
        shown.add_row(field.name, str(field.type), "key" if field.name in keys else "")
    print_table(shown)


@state.command()
@click.argument("url")
@click.argument("name", metavar="STEP.STATE", required=False)
@click.option("--sql", metavar="QUERY", help='DuckDB SQL; the state is "state", and every state is "step.state".')
@click.option("--limit", default=SHOWN_ROWS, show_default=True, type=click.IntRange(min=0), help="Rows shown at most.")
@_checkpoint
@storage_options
@as_json
def query(
    url: str,
    name: str | None,
    sql: str | None,
    limit: int,
    checkpoint: Which,
    storage_options: dict[str, str],
    as_json: bool,
) -> None:
    """Print the rows of a state, or ask SQL of it: query URL agg-1.values --sql 'select max(n) from state'.

    With --sql every row of the answer is printed; --limit is for printing a state as it is.
    """
    if name is None and sql is None:
        raise click.UsageError("name a state as STEP.STATE, or ask --sql of all of them")
    opened = read_checkpoint(url, checkpoint, storage_options=storage_options)
    asked = None if name is None else _state_named(opened, name)
    if sql is None:
        assert asked is not None
        rows = opened.table(*asked)
        _tell_rows(rows.slice(0, limit), rows.num_rows, as_json)
    else:
        rows = _ask(opened, asked, sql)
        _tell_rows(rows, rows.num_rows, as_json)


@state.command("diff")
@click.argument("url")
@click.argument("before", metavar="A", callback=_which)
@click.argument("after", metavar="B", callback=_which)
@click.option("--step", help="Only this step.")
@click.option("--limit", default=SHOWN_ROWS, show_default=True, type=click.IntRange(min=0), help="Rows shown a state.")
@storage_options
@as_json
def diff_(
    url: str, before: Which, after: Which, step: str | None, limit: int, storage_options: dict[str, str], as_json: bool
) -> None:
    """What changed between checkpoints A and B of a job: rows added, removed and changed, by key."""
    old, new = (read_checkpoint(url, which, storage_options=storage_options) for which in (before, after))
    found = diff(old, new, step=step)
    if as_json:
        print_json([_difference_json(each, limit) for each in found])
        return
    for each in found:
        click.echo(str(each))
        if each.rows.num_rows:
            _tell_rows(each.rows.slice(0, limit), each.rows.num_rows, False)


# -------------------------------------------------------------------------------------------------------------- asking


def _state_named(opened: Checkpoint, name: str) -> tuple[str, str]:
    """Steps and states may have dots in their names: the longest step that is there is meant."""
    parts = name.split(".")
    steps = opened.steps()
    for count in range(len(parts) - 1, 0, -1):
        step, rest = ".".join(parts[:count]), ".".join(parts[count:])
        if step in steps:
            opened.info(step, rest)  # says which states there are
            return step, rest
    there = ", ".join(f"{step}.{state}" for step in steps for state in opened.states(step))
    raise ConfigError(f"expected STEP.STATE, got {name!r}; there are {there or 'none'}")


def _ask(opened: Checkpoint, asked: tuple[str, str] | None, sql: str) -> pa.Table:
    try:
        import duckdb
    except ImportError as error:
        raise ConfigError('--sql needs DuckDB, which is not installed: pip install "rayflow[sql]"') from error
    names = {f"{step}.{state}": (step, state) for step in opened.steps() for state in opened.states(step)}
    # A state is read only if its name occurs in the query: the others may be large.
    tables = {name: place for name, place in names.items() if name in sql}
    if asked is not None:
        tables["state"] = asked
    with duckdb.connect(":memory:") as connection:
        # A name in the query means a state, not a variable of this function.
        connection.execute("set python_enable_replacements = false")
        for name, place in tables.items():
            connection.register(name, opened.table(*place))
        try:
            found = connection.sql(sql)
            if found is None:
                raise ConfigError(f"the statement {sql!r} gives no rows; ask a query")
            answer = found.to_arrow_table()
        except duckdb.Error as error:
            views = ", ".join(f'"{name}"' for name in ({"state"} if asked else set()) | set(names))
            raise ConfigError(f"DuckDB refused the query: {error}; the tables are {views}") from error
    return answer


# --------------------------------------------------------------------------------------------------------------- words


def _tell_rows(rows: pa.Table, total: int, as_json: bool) -> None:
    if as_json:
        print_json(rows.to_pylist())
        return
    shown = table(*rows.column_names)
    for row in rows.to_pylist():
        shown.add_row(*("" if value is None else str(value) for value in row.values()))
    print_table(shown)
    if rows.num_rows < total:
        click.echo(f"{rows.num_rows:,} of {total:,} rows")


def _info_json(info: StateInfo) -> dict[str, Any]:
    return {
        "step": info.step,
        "state": info.state,
        "rows": info.rows,
        "nbytes": info.nbytes,
        "pieces": info.pieces,
        "subtasks": info.subtasks,
        "key_columns": info.keys.key_columns,
        "subkey_columns": info.keys.subkey_columns,
        "mode": info.mode,
        "format": info.format,
    }


def _difference_json(found: StateDifference, limit: int) -> dict[str, Any]:
    return {
        "step": found.step,
        "state": found.state,
        "added": found.added,
        "removed": found.removed,
        "changed": found.changed,
        "same": found.same,
        "by_key": found.by_key,
        "rows": found.rows.slice(0, limit).to_pylist(),
    }
