"""The output side: what is put together, what is cut, and that nothing overtakes (rules A4, F1, F2)."""

from __future__ import annotations

from collections.abc import Sequence
from random import Random

import pyarrow as pa
import pytest

from rayflow.core.ids import ChannelId, CheckpointId, SubtaskId
from rayflow.core.messages import Barrier, Data, Element, Watermark
from rayflow.errors import DataError
from rayflow.graph import Exchange, ExchangeKind
from rayflow.plan import Edge
from rayflow.runtime.emitter import Emitter, partitioner_of
from tests.runtime.fakes import batch, values


def emit_all(emitter: Emitter, rows: pa.RecordBatch) -> None:
    emitter.emit(rows, "main")
    emitter.flush()


class Rig:
    """An emitter with one edge, a clock and what was offered."""

    emitter_type: type[Emitter] = Emitter

    def __init__(
        self,
        kind: ExchangeKind = "forward",
        channels: int = 1,
        *,
        batch_rows: int = 100,
        credit: int = 1 << 20,
        tag: str = "main",
    ) -> None:
        self.offered: list[tuple[ChannelId, Element]] = []
        self.time = 0.0
        edge = Edge(0, "up", tag, "down", 0, Exchange(kind, ("v",) if kind == "hash" else ()))
        self.channels = [ChannelId(0, SubtaskId("up", 0), SubtaskId("down", i)) for i in range(channels)]
        partitioner = partitioner_of(edge, channels, max_parallelism=8, subtask_index=0)
        self.emitter = self.emitter_type(
            [(edge, self.channels, partitioner)],
            lambda channel, element: self.offered.append((channel, element)),
            batch_rows=batch_rows,
            linger_s=0.5,
            credit_bytes=credit,
            now=lambda: self.time,
        )

    def emit(self, *rows: int) -> None:
        self.emitter.emit(batch(*rows), "main")

    def sent(self, channel: int = 0) -> list[object]:
        """Rows of each data element, and control elements as they are."""
        mine = [e for c, e in self.offered if c == self.channels[channel]]
        return [values(e.payload) if isinstance(e, Data) else e for e in mine]


def test_small_batches_wait_for_a_quarter_of_the_largest() -> None:
    rig = Rig(batch_rows=40)
    for i in range(9):
        rig.emit(i)
    assert rig.sent() == []
    rig.emit(9)
    assert rig.sent() == [list(range(10))]
    assert rig.emitter.rows_out == 10


def test_a_large_batch_goes_out_at_once_without_a_copy() -> None:
    rig = Rig(batch_rows=100)
    large = batch(*range(50))
    rig.emitter.emit(large, "main")
    ((_, element),) = rig.offered
    assert isinstance(element, Data)
    assert element.payload["v"].buffers()[1].address == large["v"].buffers()[1].address
    assert element.nbytes == 400


def test_no_element_has_more_rows_than_allowed() -> None:
    rig = Rig(batch_rows=10)
    rig.emit(*range(25))
    assert rig.sent() == [list(range(10)), list(range(10, 20)), list(range(20, 25))]


def test_what_waits_goes_out_after_the_linger_time_oldest_first() -> None:
    rig = Rig("hash", 2)
    assert rig.emitter.next_deadline() is None
    older = next(v for v in range(100) if _channel_of(v) == 1)
    newer = next(v for v in range(100) if _channel_of(v) == 0)
    rig.emit(older)
    rig.time = 0.3
    rig.emit(newer)
    assert rig.emitter.next_deadline() == 0.5
    rig.emitter.flush_due(0.49)
    assert rig.offered == []
    rig.emitter.flush_due(0.5)
    assert (rig.sent(0), rig.sent(1)) == ([], [[older]])
    assert rig.emitter.next_deadline() == 0.8
    rig.emitter.flush_due(0.8)
    assert rig.sent(0) == [[newer]]
    assert rig.emitter.next_deadline() is None


def _channel_of(v: int) -> int:
    rig = Rig("hash", 2)
    rig.emit(v)
    rig.emitter.flush()
    ((channel, _),) = rig.offered
    return channel.target.index


def test_the_linger_time_begins_anew_with_the_next_row() -> None:
    rig = Rig()
    rig.emit(1)
    rig.emitter.flush()
    rig.time = 0.4
    rig.emit(2)
    assert rig.emitter.next_deadline() == 0.9


def test_elements_have_at_most_half_the_credit_so_that_two_can_be_on_the_way() -> None:
    rig = Rig(batch_rows=1000, credit=160)
    rig.emit(*range(1000))
    sizes = [e.nbytes for _, e in rig.offered if isinstance(e, Data)]
    assert max(sizes) <= 80
    assert [v for rows in rig.sent() for v in rows] == list(range(1000))  # type: ignore[attr-defined]


def test_one_row_that_does_not_fit_is_an_error_that_says_what_to_raise() -> None:
    rig = Rig(credit=100)
    huge = pa.record_batch({"text": ["x" * 10, "x" * 60]})
    with pytest.raises(DataError, match=r"one row of \d+ bytes on up\[0\]->down\[0\]#0 .*\(50 bytes\).*inflight_bytes"):
        emit_all(rig.emitter, huge)


def test_another_schema_flushes_what_waits() -> None:
    rig = Rig()
    rig.emit(1)
    other = pa.record_batch({"v": ["text"]})
    rig.emitter.emit(other, "main")
    assert rig.sent() == [[1]]
    rig.emitter.flush()
    assert rig.sent() == [[1], ["text"]]


def test_a_tag_that_nobody_takes_is_dropped_and_not_counted() -> None:
    rig = Rig()
    rig.emitter.emit(batch(1), "late")
    rig.emitter.flush()
    assert rig.offered == []
    assert rig.emitter.rows_out == 0
    late = Rig(tag="late")
    late.emitter.emit(batch(1), "late")
    late.emitter.flush()
    assert late.sent() == [[1]]


def test_broadcast_edges_give_every_channel_everything() -> None:
    rig = Rig("broadcast", 3, batch_rows=4)
    rig.emit(1)
    assert [rig.sent(i) for i in range(3)] == [[[1]]] * 3


def test_rebalance_deals_every_row_to_exactly_one_channel() -> None:
    rig = Rig("rebalance", 3, batch_rows=4)
    for i in range(30):
        rig.emit(i)
    rig.emitter.flush()
    dealt = [[v for rows in rig.sent(i) for v in rows] for i in range(3)]  # type: ignore[attr-defined]
    assert sorted(v for each in dealt for v in each) == list(range(30))
    assert all(each for each in dealt)


def _in_order(rig: Rig, seed: int) -> bool:
    """Emit random pieces with control elements in between; whether every channel has them in the order of emission."""
    dice, row, mark = Random(seed), 0, 0
    wanted: list[list[object]] = [[] for _ in rig.channels]
    for _ in range(60):
        if dice.random() < 0.3:
            mark += 1
            element: Element = Watermark(mark) if dice.random() < 0.5 else Barrier(CheckpointId(mark))
            rig.emitter.broadcast(element)
            for each in wanted:
                each.append(element)
        else:
            rows = range(row, row + dice.randrange(1, 30))
            row = rows.stop
            rig.emit(*rows)
            for each in wanted:
                each += rows
        if dice.random() < 0.2:
            rig.time += 0.3
            rig.emitter.flush_due(rig.time)
    rig.emitter.flush()
    return all(_flat(rig.sent(i)) == wanted[i] for i in range(len(rig.channels)))


def _flat(sent: Sequence[object]) -> list[object]:
    return [x for each in sent for x in (each if isinstance(each, list) else [each])]


@pytest.mark.parametrize("seed", range(20))
def test_nothing_overtakes_on_a_channel(seed: int) -> None:
    assert _in_order(Rig("broadcast", 2, batch_rows=50, credit=400), seed)


def test_an_emitter_that_sends_control_before_flushing_is_caught() -> None:
    class Hasty(Emitter):
        """Broken on purpose (rules A4, F2)."""

        def broadcast(self, element: Element) -> None:
            for buffer in self._buffers:
                self._offer(buffer.channel, element)

    class HastyRig(Rig):
        emitter_type = Hasty

    assert not all(_in_order(HastyRig("broadcast", 2, batch_rows=50, credit=400), seed) for seed in range(20))


def test_an_emitter_that_does_not_cut_is_caught() -> None:
    class Whole(Emitter):
        """Broken on purpose (rule F1)."""

        def _send(self, channel: ChannelId, batch: pa.RecordBatch) -> None:
            self._offer(channel, Data(batch, batch.nbytes))

    class WholeRig(Rig):
        emitter_type = Whole

    rig = WholeRig(batch_rows=1000, credit=160)
    rig.emit(*range(1000))
    assert max(e.nbytes for _, e in rig.offered if isinstance(e, Data)) > 80
