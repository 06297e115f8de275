"""``rayflow restore-plan | rebucket``: savepoints before they are started from. Needs no cluster."""

from __future__ import annotations

import contextlib
import sys

import click

from rayflow.cli.loading import Target, TargetType, load_flow
from rayflow.cli.options import allowances, as_json, print_json, storage_options
from rayflow.config import JobConfig
from rayflow.core.keygroups import DEFAULT_MAX_PARALLELISM
from rayflow.restore_plan import restore_plan as plan_of
from rayflow.storage.rebucket import rebucket as write_rebucketed

_KEY_GROUPS = click.IntRange(min=1, max=32_768)


@click.command("restore-plan")
@click.argument("target", type=TargetType(), metavar="FILE.py[:flow]")
@click.option("--from", "url", required=True, metavar="URL", help="A savepoint, or the folder of a checkpoint.")
@click.option("-p", "--parallelism", type=click.IntRange(min=1), default=1, show_default=True)
@click.option("--max-parallelism", type=_KEY_GROUPS, default=DEFAULT_MAX_PARALLELISM, show_default=True)
@allowances
@storage_options
@as_json
@click.pass_context
def restore_plan(
    ctx: click.Context,
    target: Target,
    url: str,
    parallelism: int,
    max_parallelism: int,
    allow_dropped: tuple[str, ...],
    allow_other_flow: bool,
    storage_options: dict[str, str],
    as_json: bool,
) -> None:
    """What `rayflow run FILE.py --from URL` would restore, without starting anything; exit code 1 if it is refused."""
    with contextlib.redirect_stdout(sys.stderr):
        flow = load_flow(target)
        found = plan_of(
            flow,
            url,
            parallelism=parallelism,
            config=JobConfig(max_parallelism=max_parallelism),
            storage_options=storage_options,
            allow_dropped=allow_dropped,
            allow_other_flow=allow_other_flow,
        )
    if as_json:
        print_json(found.to_json())
    else:
        click.echo(str(found))
    if found.refused:
        ctx.exit(1)


@click.command()
@click.argument("source")
@click.argument("target")
@click.option("--max-parallelism", type=_KEY_GROUPS, required=True, help="Key groups of the new savepoint.")
@storage_options
def rebucket(source: str, target: str, max_parallelism: int, storage_options: dict[str, str]) -> None:
    """Write the savepoint SOURCE anew into the folder TARGET, with another number of key groups."""
    click.echo(write_rebucketed(source, target, max_parallelism, storage_options=storage_options))
