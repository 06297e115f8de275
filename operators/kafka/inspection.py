"""Transactions of rayflow's jobs as the brokers know them, for people: see ``rayflow txn``."""

from __future__ import annotations

from dataclasses import dataclass

from rayflow.errors import ConfigError, ConnectorError
from rayflow.operators.kafka.committer import brokers
from rayflow.operators.kafka.protocol import Code, TransactionClient
from rayflow.operators.kafka.slots import Destination
from rayflow.operators.kafka.transactions import Owner, owner_of

_OPEN = ("Ongoing", "PrepareCommit", "PrepareAbort")
_TIMEOUT_MS = 60_000
_PATIENCE_S = 10.0


@dataclass(frozen=True, slots=True)
class Found:
    """A transactional id of a rayflow job."""

    transactional_id: str
    owner: Owner
    state: str
    started_ms: int | None
    """Unix milliseconds; None when nothing is open."""
    timeout_ms: int
    producer_id: int
    epoch: int
    partitions: tuple[tuple[str, int], ...]

    @property
    def open(self) -> bool:
        return self.state in _OPEN


def transactions(servers: str, *, job: str | None = None) -> list[Found]:
    """In the order of their ids. Raises `ConnectorError` when no broker answers."""
    found = []
    with TransactionClient(servers, patience_s=_PATIENCE_S) as client:
        for each in client.listed(brokers(Destination(servers, "", {}, _TIMEOUT_MS), "rayflow txn")):
            owner = owner_of(each.transactional_id)
            if owner is None or (job is not None and owner.job != job):
                continue
            now = client.describe(each.transactional_id)
            if now is None:
                continue  # the broker has forgotten it since
            started = now.started_ms if now.state in _OPEN and now.started_ms > 0 else None
            found.append(
                Found(
                    each.transactional_id, owner, now.state, started, now.timeout_ms, now.producer_id, now.epoch,
                    now.partitions,
                )
            )  # fmt: skip
    return found


def abort(servers: str, transactional_id: str) -> bool:
    """End what is open under the id, and fence who has it; whether anything was.

    Raises `ConfigError` for an id that is not rayflow's or that the broker does not know.
    """
    if owner_of(transactional_id) is None:
        raise ConfigError(
            f"rayflow txn abort ends transactions of rayflow only, got {transactional_id!r}; "
            "`rayflow txn list` shows those that are open"
        )
    with TransactionClient(servers, patience_s=_PATIENCE_S) as client:
        now = client.describe(transactional_id)
        if now is None:
            raise ConfigError(f"the broker at {servers} knows no transactional id {transactional_id!r}; see `txn list`")
        answer, _, _ = client.init(transactional_id, max(now.timeout_ms, 1_000))
        if answer != Code.NONE:
            raise ConnectorError(f"the broker at {servers} did not abort {transactional_id!r}: error {int(answer)}")
    return now.state in _OPEN
