"""``rayflow``: the commands, and how errors are told: one sentence, exit code 1 (2 for a wrong call)."""

from __future__ import annotations

from typing import Any

import click

import rayflow
from rayflow.cli.checkpoints import checkpoints
from rayflow.cli.compact import compact
from rayflow.cli.jobs import jobs, rescale, savepoint, stop
from rayflow.cli.run import explain, run
from rayflow.cli.savepoints import rebucket, restore_plan
from rayflow.cli.state import state
from rayflow.cli.txn import txn
from rayflow.cli.upkeep import explain as explain_checkpoint
from rayflow.cli.upkeep import gc
from rayflow.errors import RayflowError


class OneSentenceErrors(click.Group):
    """Errors of rayflow are told without a traceback, unless ``--traceback`` asks for it."""

    def invoke(self, ctx: click.Context) -> Any:
        try:
            return super().invoke(ctx)
        except RayflowError as error:
            if ctx.params.get("traceback"):
                raise
            raise click.ClickException(str(error)) from error


@click.group(cls=OneSentenceErrors, context_settings={"help_option_names": ["-h", "--help"]})
@click.version_option(rayflow.__version__, prog_name="rayflow")
@click.option("--traceback", is_flag=True, help="Show where in the code an error was raised.")
def main(traceback: bool) -> None:
    """Stateful, parallel dataflow on Ray."""


main.add_command(run)
main.add_command(explain)
main.add_command(checkpoints)
main.add_command(compact)
for command in (jobs, savepoint, stop, rescale, restore_plan, rebucket):
    main.add_command(command)
main.add_command(state)
main.add_command(txn)
for command in (explain_checkpoint, gc):
    checkpoints.add_command(command)
