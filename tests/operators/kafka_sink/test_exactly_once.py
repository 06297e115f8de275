"""The exactly-once Kafka sink, operator and committer, on a real broker: nothing early, nothing lost, nothing twice."""

from __future__ import annotations

import json
import subprocess
import sys
import time
from collections.abc import Sequence

import pytest

from rayflow.core.ids import CheckpointId
from rayflow.core.manifest import Json
from rayflow.errors import CommitLostError, ConfigError, ConnectorError, SchemaChangedError
from rayflow.operators.base import SinkOperator
from rayflow.operators.kafka import committer as committing
from rayflow.operators.kafka import producers, slots
from rayflow.operators.kafka.committer import KafkaCommitter
from rayflow.operators.kafka.protocol import TransactionClient
from rayflow.operators.kafka.transactions import Marker, Markers, TransactionalId
from tests.kafka_server import KafkaServer, Message, free_port
from tests.operators.kafka_sink.place import Place, prepared, rows

CLOCK = "rayflow.operators.kafka.slots.monotonic"


@pytest.fixture
def place(kafka: KafkaServer) -> Place:
    return Place(kafka, kafka.topic(2))


def test_nothing_is_visible_before_the_commit(place: Place) -> None:
    operator = place.start()
    operator.process(rows(1, 2), 0)
    operator.process(rows(3), 0)
    found = prepared(operator, 7)
    assert sorted(place.in_order(committed=False)) == [1, 2, 3]
    assert place.seen() == []
    place.committer().commit(found)
    assert place.seen() == [1, 2, 3]
    operator.close()


def test_commit_twice_changes_nothing(place: Place) -> None:
    operator = place.start()
    operator.process(rows(1, 2), 0)
    found = prepared(operator, 1)
    for _ in range(2):
        place.committer().commit(found)
        place.committer().recover(found, fresh=False)
    place.committer().commit(found)
    assert place.seen() == [1, 2]


def test_many_intervals_and_subtasks_use_two_transactional_ids_each(place: Place) -> None:
    operators = [place.start(subtask, parallelism=2) for subtask in range(2)]
    ids: set[str] = set()
    for n in range(1, 6):
        for i, operator in enumerate(operators):
            operator.process(rows(10 * n + i), 0)
            (found,) = prepared(operator, n)
            assert isinstance(found, dict)
            ids.add(str(found["transactional_id"]))
            place.committer(2).commit([found])
    assert place.seen() == sorted(10 * n + i for n in range(1, 6) for i in range(2))
    assert ids == {f"rayflow-{place.job}:write_kafka-1:{subtask}:{slot}" for subtask in (0, 1) for slot in (0, 1)}
    for operator in operators:
        operator.close()


def test_an_interval_without_rows_prepares_nothing(place: Place) -> None:
    operator = place.start()
    operator.process(rows(), 0)
    assert prepared(operator, 1) == []
    operator.process(rows(1), 0)
    assert len(prepared(operator, 2)) == 1
    assert prepared(operator, 3) == []
    operator.close()


def test_rows_behind_a_barrier_wait_for_those_before_it_and_keep_their_order(kafka: KafkaServer) -> None:
    place = Place(kafka, kafka.topic(1))
    operator = place.start()
    operator.process(rows(1), 0)
    one = operator.snapshot(CheckpointId(1))
    operator.process(rows(2), 0)
    two = operator.snapshot(CheckpointId(2))
    operator.process(rows(3), 0)
    assert one is not None and one.prepare is not None  # noqa: PT018
    assert two is not None and two.prepare is not None  # noqa: PT018
    place.committer().commit(one.prepare())
    assert place.seen() == [1]
    place.committer().commit(two.prepare())
    assert place.seen() == [1, 2]
    place.committer().commit(prepared(operator, 3))
    assert place.in_order() == [1, 2, 3]
    operator.close()


def test_too_many_rows_behind_a_barrier_wait_for_the_broker_not_in_memory(
    kafka: KafkaServer, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("rayflow.operators.kafka.sink.PENDING_BYTES", 1)
    place = Place(kafka, kafka.topic(1))
    operator = place.start()
    operator.process(rows(1), 0)
    one = operator.snapshot(CheckpointId(1))
    operator.process(rows(2), 0)
    operator.process(rows(3), 0)
    assert one is not None and one.prepare is not None  # noqa: PT018
    place.committer().commit([*one.prepare(), *prepared(operator, 2)])
    assert place.in_order() == [1, 2, 3]
    operator.close()


# ------------------------------------------------------------------------------------------------------------ recovery


def test_crash_between_prepare_and_commit(place: Place) -> None:
    crashed = place.start()
    crashed.process(rows(1, 2), 0)
    found = prepared(crashed, 1)
    crashed.process(rows(3), 0)
    place.committer().recover(found, fresh=False)
    assert place.seen() == [1, 2]
    assert place.open_ids() == []
    again = place.start(attempt=2)
    again.process(rows(3), 0)
    place.committer().commit(prepared(again, 2))
    assert place.seen() == [1, 2, 3]
    again.close()


def test_recovery_aborts_what_no_checkpoint_names(place: Place) -> None:
    crashed = place.start()
    crashed.process(rows(1), 0)
    first = prepared(crashed, 1)
    crashed.process(rows(2), 0)
    prepared(crashed, 2)
    crashed.process(rows(3), 0)
    assert len(place.open_ids()) == 3
    place.committer().recover(first, fresh=False)
    assert place.seen() == [1]
    assert place.open_ids() == []


def test_a_fresh_start_aborts_leftovers_and_minds_no_data_of_others(place: Place) -> None:
    place.kafka.produce(place.topic, [b'{"x": 0}'])
    crashed = place.start()
    crashed.process(rows(1), 0)
    prepared(crashed, 1)
    place.committer().recover([], fresh=True)
    assert place.seen() == [0]
    assert place.open_ids() == []


def test_two_recoveries_in_a_row(place: Place) -> None:
    """The first has initialised the ids: what the broker says of the transaction then is the same as if it had
    expired. The marker tells."""
    crashed = place.start()
    crashed.process(rows(1), 0)
    found = prepared(crashed, 1)
    for attempt in (2, 3, 4):
        place.committer().recover(found, fresh=False)
        place.start(attempt=attempt)
    assert place.seen() == [1]


@pytest.mark.parametrize("live", [True, False])
def test_what_was_prepared_for_an_aborted_checkpoint_is_committed_with_the_next(place: Place, live: bool) -> None:
    operator = place.start()
    operator.process(rows(1), 0)
    kept = prepared(operator, 1)
    operator.process(rows(2), 0)
    found = [*kept, *prepared(operator, 2)]
    operator.process(rows(3), 0)
    if live:
        place.committer().commit(found)
    else:
        place.committer().recover(found, fresh=False)
    assert place.seen() == [1, 2]
    operator.close()


def test_a_slot_that_is_used_again_is_not_committed_in_the_name_of_its_last_transaction(place: Place) -> None:
    """Checkpoint 1 is committed, its slot has rows of checkpoint 3 open, and the newest manifest is still that of 1."""
    operator, first = _used_again(place)
    place.committer().recover(first, fresh=False)
    assert place.seen() == [1, 2]
    operator.close()


def test_without_the_marker_a_slot_that_is_used_again_is_committed(
    place: Place, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The broken variant of the one above: a committer that believes the broker alone writes rows twice."""
    operator, first = _used_again(place)
    asked = Markers.read
    monkeypatch.setattr(
        Markers, "read", lambda self, name, settled: asked(self, name, settled=settled) if settled else Marker()
    )
    place.committer().recover(first, fresh=False)
    assert place.seen() == [1, 2, 3]
    operator.close()


def _used_again(place: Place) -> tuple[SinkOperator, list[Json]]:
    operator = place.start()
    operator.process(rows(1), 0)
    first = prepared(operator, 1)
    place.committer().commit(first)
    operator.process(rows(2), 0)
    place.committer().commit(prepared(operator, 2))
    operator.process(rows(3), 0)
    (third,) = prepared(operator, 3)
    assert isinstance(third, dict)
    assert isinstance(first[0], dict)
    assert {**third, "checkpoint": 1} == first[0]  # nothing else in a committable tells them apart
    return operator, first


def test_an_old_savepoint_is_known_to_be_committed_after_another_run(place: Place) -> None:
    """Run B wrote under the same ids since; what run A had committed is still told from what it had lost."""
    for run in ("A", "B"):
        operator = place.start(run_id=run)
        operator.process(rows(1), 0)
        found = prepared(operator, 5)
        place.committer().commit(found)
        if run == "A":
            saved = found
            operator.process(rows(2), 0)
            never = prepared(operator, 6)
        place.committer().recover([], fresh=True)
    place.committer().recover(saved, fresh=False)
    assert place.seen() == [1, 1]
    with pytest.raises(CommitLostError):
        place.committer().recover(never, fresh=False)


@pytest.mark.parametrize(("p", "q"), [(3, 1)])  # the whole ladder: tests/test_kafka_sink_flows.py
def test_leftovers_of_every_parallelism_are_aborted(place: Place, p: int, q: int) -> None:
    expected: list[int] = []
    for n, parallelism in enumerate((p, q, p), 1):
        crashed = [place.start(subtask, parallelism=parallelism, attempt=n) for subtask in range(parallelism)]
        named: list[Json] = []
        for subtask, operator in enumerate(crashed):
            operator.process(rows(100 * n + subtask), 0)
            named += prepared(operator, 10 * n)
            operator.process(rows(-1), 0)
            prepared(operator, 10 * n + 1)  # of a checkpoint that never completes
            operator.process(rows(-2), 0)
            expected.append(100 * n + subtask)
        place.committer(parallelism).recover(named, fresh=False)
        assert place.seen() == sorted(expected)
        assert place.open_ids() == []


def test_a_zombie_is_fenced(place: Place) -> None:
    zombie = place.start()
    zombie.process(rows(1), 0)
    frozen = zombie.snapshot(CheckpointId(1))
    place.committer().recover([], fresh=True)
    assert frozen is not None and frozen.prepare is not None  # noqa: PT018
    with pytest.raises(ConnectorError, match="subtask 0/1 .* transactional id has taken over"):
        frozen.prepare()
    with pytest.raises(ConnectorError, match="transactional id has taken over"):
        zombie.process(rows(2), 0)
    assert place.seen() == []
    zombie.close()


def test_a_process_killed_between_prepare_and_commit_is_committed_for_by_another(place: Place) -> None:
    script = f"""
import json, os, signal, sys
from tests.kafka_server import KafkaServer
from tests.operators.kafka_sink.place import Place, prepared, rows
place = Place(KafkaServer({place.kafka.bootstrap_servers!r}, None), {place.topic!r}, {place.job!r})
operator = place.start()
operator.process(rows(1, 2), 0)
print(json.dumps(prepared(operator, 1)), flush=True)
operator.process(rows(3), 0)
operator._open.slot._producer.flush()
os.kill(os.getpid(), signal.SIGKILL)
"""
    child = subprocess.run([sys.executable, "-c", script], stdout=subprocess.PIPE, check=False)
    assert child.returncode == -9
    found = json.loads(child.stdout)
    assert sorted(place.in_order(committed=False)) == [1, 2, 3]
    assert place.seen() == []
    place.committer().commit(found)
    place.committer().recover(found, fresh=False)
    assert place.seen() == [1, 2]


# ---------------------------------------------------------------------------------------------------- lost transactions


def test_a_transaction_that_expired_is_an_error(place: Place) -> None:
    operator = place.start()
    operator.process(rows(1), 0)
    found = prepared(operator, 4)
    place.expire(found[0])
    for _ in range(2):
        with pytest.raises(
            CommitLostError, match=r"step 'step': .*checkpoint 4 .*:0:0.* is lost: .*transaction_timeout"
        ):
            place.committer().commit(found)
    with pytest.raises(CommitLostError, match="INVALID_PRODUCER_EPOCH"):
        place.committer().recover(found, fresh=False)
    assert place.seen() == []
    operator.close()


def test_a_broker_that_claims_success_is_not_believed(place: Place) -> None:
    """This one says OK to the commit of an id under which nothing is open."""
    operator = place.start()
    operator.process(rows(1), 0)
    (found,) = prepared(operator, 4)
    place.expire(found)
    assert isinstance(found, dict)
    with TransactionClient(place.kafka.bootstrap_servers) as client:
        now = client.describe(str(found["transactional_id"]))
    assert now is not None
    with pytest.raises(CommitLostError, match="the broker answers NONE"):
        place.committer().recover([{**found, "epoch": now.epoch}], fresh=False)


# ------------------------------------------------------------------------------------------------------ broken variants


class InitsFirst(KafkaCommitter):
    """Broken: aborts leftovers before it commits."""

    def recover(self, committables: Sequence[Json], *, fresh: bool) -> None:
        self._abort_leftovers()
        super().recover(committables, fresh=fresh)


def test_a_committer_that_initialises_before_it_commits_is_caught(place: Place) -> None:
    operator = place.start()
    operator.process(rows(1), 0)
    found = prepared(operator, 1)
    with pytest.raises(CommitLostError):
        place.committer(kind=InitsFirst).recover(found, fresh=False)


class Forgets(KafkaCommitter):
    """Broken: leaves open what no checkpoint names."""

    def _abort_leftovers(self) -> None:
        return None


def test_a_committer_that_forgets_leftovers_is_caught(place: Place) -> None:
    crashed = place.start(1, parallelism=2)
    crashed.process(rows(1), 0)
    prepared(crashed, 1)
    place.committer(kind=Forgets).recover([], fresh=True)
    assert place.open_ids() != []
    for partition in (0, 1):
        place.kafka.produce(place.topic, [Message(b'{"x": 5}', partition=partition)])
    assert place.seen() != [5, 5]  # readers wait behind what is open
    place.committer().recover([], fresh=True)
    assert place.seen() == [5, 5]


class FencesOwnOnly(KafkaCommitter):
    """Broken: knows the ids of its own parallelism only."""

    def _fence(self, client: TransactionClient, name: TransactionalId) -> None:
        if int(name.split(":")[2]) < self.ctx.parallelism:
            super()._fence(client, name)


def test_a_committer_that_forgets_larger_parallelisms_is_caught(place: Place) -> None:
    crashed = place.start(4, parallelism=5)
    crashed.process(rows(1), 0)
    prepared(crashed, 1)
    place.committer(1, kind=FencesOwnOnly).recover([], fresh=True)
    assert place.open_ids() != []


# --------------------------------------------------------------------------------------------------------- the unusual


def test_a_broker_that_is_away_declines_the_checkpoint_and_loses_nothing(
    place: Place, monkeypatch: pytest.MonkeyPatch
) -> None:
    operator = place.start()
    operator.process(rows(1), 0)
    operator.process(rows(2), 0)
    place.committer().commit(prepared(operator, 1))
    monkeypatch.setattr(producers, "DELIVERY_TIMEOUT_S", 0.0)
    with place.kafka.away():
        operator.process(rows(3), 0)
        frozen = operator.snapshot(CheckpointId(2))
        assert frozen is not None and frozen.prepare is not None  # noqa: PT018
        with pytest.raises(ConnectorError, match="subtask 0/1 expected its messages to be delivered"):
            frozen.prepare()
        operator.process(rows(4), 0)
    monkeypatch.undo()
    found = [*frozen.prepare(), *prepared(operator, 3)]
    place.committer().commit(found)
    assert place.seen() == [1, 2, 3, 4]
    operator.close()


def test_more_open_transactions_than_the_pool_has_is_an_error(place: Place, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(slots, "SLOTS_MAX", 3)
    operator = place.start()
    for n in (1, 2, 3):
        operator.process(rows(n), 0)
        prepared(operator, n)
    with pytest.raises(ConnectorError, match="3 transactions open"):
        operator.process(rows(4), 0)
    operator.close()


def test_no_checkpoint_names_a_transaction_that_has_expired_meanwhile(
    place: Place, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Checkpoint 1 was aborted, and so was every one since: to complete the next would lose its rows."""
    operator = place.start()
    operator.process(rows(1), 0)
    prepared(operator, 1)
    now, timeout_s = time.monotonic(), place.sink().transaction_timeout_ms / 1000
    monkeypatch.setattr(CLOCK, lambda: now + timeout_s - 1)
    assert operator.snapshot(CheckpointId(2)) is None
    monkeypatch.setattr(CLOCK, lambda: now + timeout_s)
    with pytest.raises(ConnectorError, match=r"has had a transaction open for \d+ s.*goes back to its last"):
        operator.snapshot(CheckpointId(3))
    operator.close()


def test_close_aborts_only_what_is_behind_the_last_barrier(place: Place) -> None:
    operator = place.start()
    operator.process(rows(1), 0)
    found = prepared(operator, 1)
    operator.process(rows(2), 0)
    operator.close()
    operator.close()
    assert len(place.open_ids()) == 1
    place.committer().commit(found)
    assert place.seen() == [1]


def test_close_at_any_point(place: Place) -> None:
    place.start().close()
    operator = place.start()
    operator.process(rows(1), 0)
    operator.snapshot(CheckpointId(1))
    operator.process(rows(2), 0)
    operator.close()
    assert place.seen() == []


def test_two_schemas_are_refused(place: Place) -> None:
    operator = place.start()
    operator.process(rows(1), 0)
    with pytest.raises(SchemaChangedError, match=r"subtask 0/1 .*column 's' is missing; expected"):
        operator.process(rows(2).select(["x"]), 0)
    operator.close()


def test_an_unknown_topic_is_an_error_of_the_flow(place: Place) -> None:
    place.topic = "no such topic".replace(" ", "-")
    with pytest.raises(ConfigError, match="no-such-topic"):
        place.start()


def test_a_broker_that_is_not_there_is_waited_for(kafka: KafkaServer, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("rayflow.operators.kafka.client.CALL_TIMEOUT_S", 0.2)
    monkeypatch.setattr(committing, "CALL_TIMEOUT_S", 0.2)
    nowhere = KafkaServer(f"127.0.0.1:{free_port()}", kafka.process)
    place = Place(nowhere, "topic")
    with pytest.raises(ConnectorError, match="127.0.0.1"):
        place.start()
    with pytest.raises(ConnectorError, match="127.0.0.1"):
        place.committer().recover([], fresh=True)
