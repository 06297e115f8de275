"""A source of one's own, an exception in the middle, and every row counted exactly once.

``from_generator`` reads splits from a position on: that is all it needs to be set back to a checkpoint. The step
``fragile`` raises once, half-way. The job then goes back to its newest checkpoint, reads again what came behind it, and
the sums are those of a run in which nothing happened.

    python examples/generator.py
"""

from __future__ import annotations

from collections.abc import Iterator

import pyarrow as pa

import rayflow as rf

ROWS = 10_000
BATCH = 100
SCHEMA = pa.schema([("split", pa.string()), ("n", pa.int64())])

generated = 0
raised = False


def numbers(split: str, position: int) -> Iterator[pa.RecordBatch]:
    """0 to 9,999 from ``position`` on: the same rows every time it is asked."""
    global generated
    for start in range(position, ROWS, BATCH):
        values = range(start, min(start + BATCH, ROWS))
        generated += len(values)
        yield pa.record_batch([[split] * len(values), list(values)], schema=SCHEMA)


def fragile(batch: pa.RecordBatch) -> pa.RecordBatch:
    global raised
    if not raised and ROWS // 2 in batch.column("n").to_pylist():
        raised = True
        raise RuntimeError("the service did not answer")
    return batch


def main() -> None:
    stream = rf.from_generator(numbers, splits=["left", "right"], schema=SCHEMA).map_batches(fragile)
    flow = rf.Flow("generator", stream.collect())
    result = flow.run(
        local=True, parallelism=2, config=rf.JobConfig(state="memory"), checkpoints=rf.CheckpointConfig("-", "10ms")
    )
    rows = result.table()
    found = {
        split: sorted(
            n for s, n in zip(*(rows.column(c).to_pylist() for c in ("split", "n")), strict=True) if s == split
        )
        for split in ("left", "right")
    }
    print(f"raised once: {raised}; restarts: {result.restarts}")
    print(f"{generated:,} rows were generated to give {rows.num_rows:,}: some twice, as after any failure")
    assert raised
    assert result.restarts == 1
    assert 2 * ROWS < generated < 3 * ROWS, "it should have gone back to a checkpoint, not to the start"
    assert found == {"left": list(range(ROWS)), "right": list(range(ROWS))}
    print("every row of both splits came out exactly once")


if __name__ == "__main__":
    main()
