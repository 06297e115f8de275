"""Options that several commands share."""

from __future__ import annotations

import json
from collections.abc import Callable
from typing import Any, TextIO, TypeVar

import click

F = TypeVar("F", bound=Callable[..., Any])


def storage_options(command: F) -> F:
    """``--storage-option KEY=VALUE``, any number of times; a dict for fsspec."""
    option = click.option(
        "--storage-option",
        "storage_options",
        multiple=True,
        metavar="KEY=VALUE",
        callback=_pairs,
        help="Passed to fsspec, for example endpoint_url=http://localhost:9000. Repeatable.",
    )
    return option(command)


def allowances(command: F) -> F:
    """``--allow-dropped NAME`` (repeatable) and ``--allow-other-flow``, as `rayflow.Flow.run` takes them."""
    dropped = click.option(
        "--allow-dropped",
        multiple=True,
        metavar="NAME",
        help="A step that is gone: what the checkpoint holds of it is left behind. Repeatable.",
    )
    other = click.option(
        "--allow-other-flow", is_flag=True, help="The savepoint may be of a flow of another name than this one."
    )
    return dropped(other(command))


def as_json(command: F) -> F:
    option = click.option("--json", "as_json", is_flag=True, help="Machine-readable output, alone on standard output.")
    return option(command)


def print_json(value: object, out: TextIO | None = None) -> None:
    """One JSON document; what JSON has no type for is written as text."""
    click.echo(json.dumps(value, indent=1, default=str, ensure_ascii=False), file=out)


def _pairs(ctx: click.Context, param: click.Parameter, values: tuple[str, ...]) -> dict[str, str]:
    pairs = {}
    for value in values:
        key, separator, text = value.partition("=")
        if not separator or not key:
            raise click.BadParameter(f"expected KEY=VALUE, got {value!r}", ctx, param)
        pairs[key] = text
    return pairs
