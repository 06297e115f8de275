"""``rayflow txn list | abort``: Kafka transactions of rayflow's jobs, as the brokers know them."""

from __future__ import annotations

import time
from typing import TYPE_CHECKING

import click

from rayflow.cli.options import as_json, print_json
from rayflow.cli.tables import print_table
from rayflow.cli.tables import table as new_table

if TYPE_CHECKING:
    from rayflow.operators.kafka.inspection import Found

_servers = click.option("--bootstrap-servers", required=True, metavar="HOST:PORT", help="Brokers, with commas between.")


@click.group()
def txn() -> None:
    """Kafka transactions of exactly-once sinks."""


@txn.command("list")
@_servers
@click.option("--job", metavar="NAME", help="Of this flow only.")
@click.option("--all", "every", is_flag=True, help="Also ids under which nothing is open.")
@as_json
def list_(bootstrap_servers: str, job: str | None, every: bool, as_json: bool) -> None:
    """Transactions that are open: readers with read_committed wait for them to end."""
    from rayflow.operators.kafka.inspection import transactions

    found = [each for each in transactions(bootstrap_servers, job=job) if every or each.open]
    if as_json:
        print_json([_as_json(each) for each in found])
        return
    table = new_table("transactional id", "job", "step", "subtask", "state", "open for", "expires after", "partitions")
    for each in found:
        open_for = "" if each.started_ms is None else f"{max(0.0, time.time() - each.started_ms / 1000):.0f} s"
        partitions = ", ".join(f"{topic}[{number}]" for topic, number in each.partitions)
        table.add_row(
            each.transactional_id,
            each.owner.job,
            each.owner.operator,
            str(each.owner.subtask),
            each.state,
            open_for,
            f"{each.timeout_ms / 1000:g} s",
            partitions,
        )
    if not found:
        table.add_row("none", "", "", "", "", "", "", "")
    print_table(table)


@txn.command()
@click.argument("transactional_id")
@_servers
@as_json
def abort(transactional_id: str, bootstrap_servers: str, as_json: bool) -> None:
    """End the transaction that is open under TRANSACTIONAL_ID; its rows will never be seen.

    For what a job has left behind that will not run again. A job that runs is fenced by this and restarts; one whose
    newest checkpoint counts on the transaction fails, because its rows are lost.
    """
    from rayflow.operators.kafka.inspection import abort as end

    was_open = end(bootstrap_servers, transactional_id)
    if as_json:
        print_json({"transactional_id": transactional_id, "aborted": was_open})
    else:
        click.echo(f"{transactional_id}: " + ("aborted" if was_open else "nothing was open"))


def _as_json(found: Found) -> dict[str, object]:
    return {
        "transactional_id": found.transactional_id,
        "job": found.owner.job,
        "operator": found.owner.operator,
        "subtask": found.owner.subtask,
        "slot": found.owner.slot,
        "state": found.state,
        "open": found.open,
        "started_ms": found.started_ms,
        "timeout_ms": found.timeout_ms,
        "producer_id": found.producer_id,
        "epoch": found.epoch,
        "partitions": [{"topic": topic, "partition": number} for topic, number in found.partitions],
    }
