"""From key hashes to key groups to subtasks, and the splitting of a batch: the hot path of the exchange.

K1  the ranges of all subtasks partition [0, G): `subtask_of_group` is `core.keygroups.owner_of`, vectorised.
K2  the key group is a function of the key's hash, hence of its bytes.
K3  a row goes to the subtask whose range holds its key group.
F2  the rows of each target keep the order they had in the batch.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Final, Literal, Protocol

import numpy as np
import numpy.typing as npt
import pyarrow as pa

from rayflow.core.keygroups import DEFAULT_MAX_PARALLELISM, check_parallelism
from rayflow.errors import KeyHashError, PlanError
from rayflow.partition.hashing import hash_columns

Int32Array = npt.NDArray[np.int32]

# Up to here one scan per target makes the order of rows faster than a radix sort; measured at 65,536 rows
# x 4 int64: n=2 0.25 against 0.46 ms, n=4 0.31 against 0.40 ms, n=16 1.25 against 0.41 ms.
_SCANS_MAX: Final = 4


def key_groups(hashes: npt.NDArray[np.uint64], max_parallelism: int) -> Int32Array:
    """The key group, in [0, max_parallelism), of each hash: multiply-shift on its high 32 bits (Lemire 2019).

    ``(hash >> 32) * max_parallelism >> 32``: no division, and as even as the high bits of the hash.
    """
    high = hashes >> np.uint64(32)
    high *= np.uint64(max_parallelism)
    high >>= np.uint64(32)
    return high.astype(np.int32)


def subtask_of_group(groups: Int32Array, parallelism: int, max_parallelism: int) -> Int32Array:
    """The subtask that owns each group (K3), by the formula of `rayflow.core.keygroups.owner_of`."""
    return (groups.astype(np.int64) * parallelism // max_parallelism).astype(np.int32)


def split_batch(batch: pa.RecordBatch, targets: npt.NDArray[np.integer], n: int) -> list[pa.RecordBatch | None]:
    """The rows of each target 0..n-1 in input order (F2); None for a target without rows.

    One permutation, one take, then slices without a copy: the parts share one set of buffers, which Arrow IPC
    and Flight trim when they write (pickle does not). A batch that goes to one target is not copied.
    Raises ValueError if there is not one target in [0, n) for every row, because rows would be lost.
    """
    if len(targets) != batch.num_rows:
        raise ValueError(f"split_batch got {len(targets)} targets for {batch.num_rows} rows; pass one for each row")
    if batch.num_rows == 0:
        return [None] * n
    lowest, highest = int(targets.min()), int(targets.max())
    if lowest < 0 or highest >= n:
        raise ValueError(f"split_batch got targets from {lowest} to {highest}; they must lie in [0, {n})")
    parts: list[pa.RecordBatch | None] = [None] * n
    if lowest == highest:
        parts[lowest] = batch
        return parts
    # Narrow targets are compared eight to a word, and numpy sorts 8 and 16 bit integers stably by radix.
    narrow = targets.astype(np.uint8 if n <= 256 else np.uint16 if n <= 65536 else np.uint32, copy=False)
    if n <= _SCANS_MAX:
        rows_of_target = [np.flatnonzero(narrow == target) for target in range(n)]
        counts = [len(rows) for rows in rows_of_target]
        order = np.concatenate(rows_of_target)
    else:
        counts = np.bincount(narrow, minlength=n).tolist()
        order = np.argsort(narrow, kind="stable")
    arranged = batch.take(pa.array(order))
    start = 0
    for target, count in enumerate(counts):
        if count:
            parts[target] = arranged.slice(start, count)
            start += count
    return parts


class Partitioner(Protocol):
    """Decides which of the downstream channels gets which rows of a batch."""

    def split(self, batch: pa.RecordBatch) -> list[pa.RecordBatch | None]:
        """One entry a channel: its rows in input order (F2), or None where it gets none.

        A batch without rows is None everywhere. Entries may share buffers with each other and with ``batch``.
        """
        ...


class HashPartitioner:
    """Rows go to the owner of their key's group (K1-K3), so that equal keys meet in one subtask.

    A null is a key of its own with a fixed hash (``on_null="allow"``); with ``on_null="error"`` a batch with
    a null in a key column raises `KeyHashError`. A key column that is not in the batch raises `PlanError`,
    one of a type without a stable hash `KeyHashError`. The caller adds the step and subtask.
    """

    def __init__(
        self,
        key_columns: Sequence[str],
        parallelism: int,
        max_parallelism: int = DEFAULT_MAX_PARALLELISM,
        *,
        on_null: Literal["error", "allow"] = "allow",
    ) -> None:
        check_parallelism(parallelism, max_parallelism)
        if isinstance(key_columns, str) or not key_columns:
            raise PlanError(f"key_columns must be a non-empty list of column names, got {key_columns!r}")
        if on_null not in ("error", "allow"):
            raise PlanError(f"on_null must be 'error' or 'allow', got {on_null!r}")
        self._key_columns = tuple(key_columns)
        self._parallelism = parallelism
        self._max_parallelism = max_parallelism
        self._on_null = on_null
        groups = np.arange(max_parallelism, dtype=np.int32)
        owners = subtask_of_group(groups, parallelism, max_parallelism)
        self._owner_of_group: npt.NDArray[np.integer] = owners
        if parallelism <= 256:
            self._owner_of_group = owners.astype(np.uint8)

    def groups(self, batch: pa.RecordBatch) -> Int32Array:
        """The key group of every row."""
        columns = [self._column(batch, name) for name in self._key_columns]
        return key_groups(hash_columns(columns, self._key_columns), self._max_parallelism)

    def split(self, batch: pa.RecordBatch) -> list[pa.RecordBatch | None]:
        if self._parallelism == 1:
            # Nothing to hash, but a wrong key is refused at every parallelism alike.
            no_rows = [self._column(batch, name).slice(0, 0) for name in self._key_columns]
            hash_columns(no_rows, self._key_columns)
            return _whole(batch, 0, 1)
        return split_batch(batch, self._owner_of_group[self.groups(batch)], self._parallelism)

    def _column(self, batch: pa.RecordBatch, name: str) -> pa.Array:
        found = batch.schema.get_all_field_indices(name)
        if len(found) != 1:
            state = "is not in" if not found else "stands more than once in"
            raise PlanError(
                f"key column {name!r} {state} the batch; available: {', '.join(batch.schema.names) or 'none'}"
            )
        column = batch.column(found[0])
        if self._on_null == "error" and column.null_count:
            row = int(np.argmax(column.is_null().to_numpy(zero_copy_only=False)))
            raise KeyHashError(
                f"key column {name!r} is null in {column.null_count} of {len(column)} rows (first in row "
                f"{row} of the batch) where nulls are refused; filter or fill them, or allow a null as a key"
            )
        return column


class RebalancePartitioner:
    """Whole batches go round robin.

    The first channel is ``subtask_index % channels``: the subtasks of a step do not all begin with the same
    receiver, and a run is the same every time.
    """

    def __init__(self, channels: int, *, subtask_index: int = 0) -> None:
        self._channels = _checked_channels(channels)
        self._next = subtask_index % channels

    def split(self, batch: pa.RecordBatch) -> list[pa.RecordBatch | None]:
        parts = _whole(batch, self._next, self._channels)
        if batch.num_rows:
            self._next = (self._next + 1) % self._channels
        return parts


class BroadcastPartitioner:
    """Every channel gets every row; the batch is shared, not copied."""

    def __init__(self, channels: int) -> None:
        self._channels = _checked_channels(channels)

    def split(self, batch: pa.RecordBatch) -> list[pa.RecordBatch | None]:
        return [batch if batch.num_rows else None] * self._channels


class ForwardPartitioner:
    """One channel gets everything."""

    def split(self, batch: pa.RecordBatch) -> list[pa.RecordBatch | None]:
        return _whole(batch, 0, 1)


def _whole(batch: pa.RecordBatch, channel: int, channels: int) -> list[pa.RecordBatch | None]:
    parts: list[pa.RecordBatch | None] = [None] * channels
    if batch.num_rows:
        parts[channel] = batch
    return parts


def _checked_channels(channels: int) -> int:
    if channels < 1:
        raise PlanError(f"an edge needs at least one downstream channel, got {channels}")
    return channels
