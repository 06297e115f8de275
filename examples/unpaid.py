"""State and timers of your own: orders that are not paid in ten minutes are told, each once, through a failure.

Every order has a key of its own. When it is placed, its amount is kept and a timer is set ten minutes ahead in event
time; a payment in time forgets both; a timer that fires tells the order. Half-way the job fails and goes on from its
newest checkpoint, with all amounts and timers.

    python examples/unpaid.py
"""

from __future__ import annotations

import tempfile
from datetime import UTC, datetime, timedelta
from typing import Any

import pyarrow as pa

import rayflow as rf

ORDERS = 2_000
START = datetime(2024, 5, 1, tzinfo=UTC)
PATIENCE = timedelta(minutes=10)
SCHEMA = pa.schema([("order", pa.int64()), ("amount", pa.int64()), ("time", pa.timestamp("us", tz="UTC"))])


class Unpaid(rf.KeyedProcess):
    """Rows with an amount are orders, rows without are payments."""

    output = pa.schema([("order", pa.int64()), ("amount", pa.int64()), ("due", pa.timestamp("us", tz="UTC"))])
    amount = rf.ValueState(pa.int64())
    due = rf.ValueState(pa.timestamp("us", tz="UTC"))

    def process(self, key: int, rows: pa.RecordBatch, ctx: Any) -> None:
        for row in rows.to_pylist():
            if row["amount"] is not None:
                self.amount.update(row["amount"])
                self.due.update(row["time"] + PATIENCE)
                ctx.timer(self.due.value)
            elif self.due.value is not None and row["time"] < self.due.value:
                ctx.delete_timer(self.due.value)
                self.amount.clear()
                self.due.clear()

    def on_timer(self, key: int, time: int, ctx: Any) -> None:
        ctx.emit({"order": key, "amount": self.amount.value, "due": self.due.value})
        self.amount.clear()
        self.due.clear()


def paid_after(order: int) -> timedelta:
    """Every order is paid some time within a quarter of an hour, most of them early enough."""
    return timedelta(seconds=order * 37 % 900)


def rows() -> pa.Table:
    """An order a second, and the payments, in the order of their time."""
    placed = [(START + timedelta(seconds=i), i, 100 + i % 7) for i in range(ORDERS)]
    paid = [(time + paid_after(order), order, None) for time, order, _ in placed]
    found = sorted([*placed, *paid], key=lambda row: (row[0], row[2] is None))
    return pa.table([[r[1] for r in found], [r[2] for r in found], [r[0] for r in found]], schema=SCHEMA)


def main() -> None:
    failures: list[int] = []

    def fail_once(batch: pa.RecordBatch) -> pa.RecordBatch:
        if not failures and ORDERS // 2 in batch["order"].to_pylist():
            failures.append(1)
            raise RuntimeError("the power went off")
        return batch

    stream = rf.from_arrow(rows(), batch_rows=50, event_time="time", max_delay="0s")
    unpaid = stream.map_batches(fail_once, schema=SCHEMA).key_by("order").process(Unpaid)
    flow = rf.Flow("unpaid", unpaid.collect())
    with tempfile.TemporaryDirectory() as folder:
        result = flow.run(
            local=True,
            parallelism=2,
            checkpoints=rf.CheckpointConfig(folder, interval="5ms"),
            config=rf.JobConfig(watermark_interval="0s"),
        )
    told = sorted(result.table().column("order").to_pylist())
    print(f"{ORDERS} orders, {result.restarts} failure, {len(told)} told as unpaid: {told[:5]} ...")
    assert result.restarts == 1
    assert told == [order for order in range(ORDERS) if paid_after(order) >= PATIENCE]
    print("every order that was not paid in time was told exactly once")


if __name__ == "__main__":
    main()
