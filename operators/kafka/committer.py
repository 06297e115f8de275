"""The committer of the exactly-once Kafka sink: commits by the producer itself, or for a process that is gone."""

from __future__ import annotations

from collections.abc import Sequence

from rayflow.core.manifest import Json
from rayflow.errors import ConfigError, ConnectorError
from rayflow.operators.base import Committer
from rayflow.operators.kafka.client import CALL_TIMEOUT_S, confluent, error_of
from rayflow.operators.kafka.protocol import Address, Code, TransactionClient
from rayflow.operators.kafka.slots import Destination, lost
from rayflow.operators.kafka.transactions import Committable, TransactionalId, owner_of, take


class KafkaCommitter(Committer):
    """See `rayflow.operators.kafka.transactions` for what is known of a transaction, and when.

    Limit: a subtask that runs on although the coordinator holds it for dead (cut off from it, not from the broker) may
    commit what this commits too, and begin its next transaction, in the moment between the look at the marker and
    EndTxn; of that transaction a part would then be committed. It is fenced right afterwards.
    """

    def __init__(self, cluster: Destination) -> None:
        self._cluster = cluster

    def commit(self, committables: Sequence[Json]) -> None:
        """(S1) In their order. Raises `CommitLostError` for one that is gone, `ConnectorError` when the broker is."""
        foreign = []
        for each in map(Committable.of, committables):
            commit = take(self._cluster.servers, each)
            if commit is None:
                foreign.append(each)
                continue
            try:
                commit()
            except ConnectorError:
                # The producer cannot; what became of the transaction its coordinator knows.
                foreign.append(each)
        self._settle(foreign)

    def recover(self, committables: Sequence[Json], *, fresh: bool) -> None:
        """Commit first: initialising an id ends its transaction for good (see `TransactionClient.init`)."""
        self._settle([Committable.of(each) for each in committables])
        self._abort_leftovers()

    def _settle(self, committables: Sequence[Committable]) -> None:
        """Commit by the protocol what is not committed."""
        if not committables:
            return
        markers = self._cluster.markers(str(self.ctx))
        with TransactionClient(self._cluster.servers) as client:
            for each in committables:
                if markers.read(each.transactional_id, settled=False).has(each):
                    continue
                answer = client.end(each.transactional_id, each.producer_id, each.epoch, commit=True)
                if answer == Code.TRANSACTIONAL_ID_AUTHORIZATION_FAILED:
                    raise ConfigError(
                        f"{self.ctx} may not end transaction {each.transactional_id!r}: give it Write on it"
                    )
                if not markers.read(each.transactional_id, settled=True).has(each):
                    raise lost(each, f"the broker answers {_told(answer)}", str(self.ctx))

    def _abort_leftovers(self) -> None:
        """End what earlier attempts have open, of all their subtasks, and fence them: every id of this sink that the
        broker knows is initialised, also those of subtasks that there no longer are."""
        with TransactionClient(self._cluster.servers) as client:
            for each in client.listed(self._brokers()):
                owner = owner_of(each.transactional_id)
                if owner is not None and (owner.job, owner.operator) == (self.ctx.job, self.ctx.operator):
                    self._fence(client, TransactionalId(each.transactional_id))

    def _fence(self, client: TransactionClient, name: TransactionalId) -> None:
        answer, _, _ = client.init(name, self._cluster.timeout_ms)
        if answer == Code.INVALID_TRANSACTION_TIMEOUT:
            raise timeout_refused(self._cluster.timeout_ms, str(self.ctx))
        if answer != Code.NONE:
            raise ConnectorError(
                f"{self.ctx} could not abort {name!r}: the broker answers {_told(answer)}; tried again"
            )

    def _brokers(self) -> list[Address]:
        return brokers(self._cluster, str(self.ctx))


def brokers(cluster: Destination, where: str) -> list[Address]:
    """All brokers of the cluster. Raises `ConnectorError` when none answers."""
    from confluent_kafka.admin import AdminClient

    kafka = confluent()
    try:
        admin = AdminClient({**_for_admin(cluster), "bootstrap.servers": cluster.servers, "log_level": 2})
        found = admin.list_topics(timeout=CALL_TIMEOUT_S).brokers
    except kafka.KafkaException as error:
        raise error_of(error.args[0], where=where, wanted="list brokers", servers=cluster.servers) from error
    return [Address(found[number].host, found[number].port) for number in sorted(found)]


def timeout_refused(timeout_ms: int, where: str) -> ConfigError:
    return ConfigError(
        f"{where}: the broker refuses a transaction_timeout of {timeout_ms / 1000:g} s; raise its "
        "transaction.max.timeout.ms, or lower transaction_timeout and the interval and timeout of checkpoints"
    )


def _for_admin(cluster: Destination) -> dict[str, object]:
    """Options of connections; those of producing mean nothing here."""
    return {k: v for k, v in cluster.options.items() if k.startswith(("client.", "socket.", "broker.", "security."))}


def _told(code: int) -> str:
    return Code(code).name if code in Code._value2member_map_ else f"error {code}"
