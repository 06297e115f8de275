"""The rows of `benchmarks.delivery_kills`, and what DuckDB makes of them."""

from __future__ import annotations

from typing import TYPE_CHECKING

import duckdb
import numpy as np
import pyarrow as pa

if TYPE_CHECKING:
    from tests.kafka_server import Message

PARTITIONS = 4
"""Of the topic that is read."""
ROWS = 1_200
"""Of a round, a multiple of twice the partitions: both halves of it give each partition as many."""
KEYS = 11
ROUND_S = 10
"""Event time that passes in a round: so many windows of each key."""
DELAY_US = 500_000
BEGIN_US = 1_767_225_600_000_000
"""2026-01-01."""
SCHEMA = pa.schema([("at", pa.timestamp("us")), ("who", pa.string()), ("amount", pa.int64())])


class Orders:
    """The rows of each round, the same for a seed, and what is to be delivered of them."""

    def __init__(self, seed: int, rounds: int) -> None:
        self.rounds = rounds
        rng = np.random.default_rng(seed)
        count = rounds * ROWS
        # In order but for the delay, and whole seconds apart often enough that rows fall on the edges of windows.
        even = np.arange(count, dtype=np.int64) * (ROUND_S * 1_000_000 // ROWS)
        late = rng.integers(0, DELAY_US, count) * rng.integers(0, 2, count)
        at = BEGIN_US + np.maximum(even - late, 0)
        who = np.char.add("w", rng.integers(0, KEYS, count).astype(str))
        self.table = pa.table(
            [
                pa.array(at).view(pa.timestamp("us")),
                pa.array(who, pa.string()),
                pa.array(rng.integers(1, 1_000, count)),
            ],
            schema=SCHEMA,
        )

    def messages(self, half: int) -> list[Message]:
        """Of the so manieth half round, dealt out to the partitions."""
        from tests.kafka_server import records

        rows = self.table.slice(half * ROWS // 2, ROWS // 2).to_pylist()
        return records([row | {"at": row["at"].isoformat()} for row in rows], partitions=PARTITIONS)

    def expected(self) -> pa.Table:
        rows = self.table  # noqa: F841 (duckdb finds it)
        return duckdb.sql(
            """select who, time_bucket(interval 1 second, "at") as start, count(*) as n, sum(amount)::bigint as total
               from rows group by all"""
        ).to_arrow_table()

    def difference(self, delivered: pa.Table) -> str:
        """Empty when exactly what is expected was delivered."""
        expected = self.expected()  # noqa: F841
        more, fewer = duckdb.sql(
            """select (select count(*) from (from delivered except all from expected)),
                      (select count(*) from (from expected except all from delivered))"""
        ).fetchall()[0]
        return f"{more} rows too many, {fewer} missing" if more or fewer else ""
