"""Rules K1, K2, K3 and F2 where they are kept: hashes, key groups and the splitting of batches."""

from __future__ import annotations

import math
import struct
from collections.abc import Sequence
from datetime import UTC, date, datetime, time, timedelta
from decimal import Decimal
from typing import Any

import numpy as np
import pyarrow as pa
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from rayflow.core.keygroups import key_group_range, owner_of
from rayflow.errors import KeyHashError, PlanError
from rayflow.partition import (
    NULL_HASH,
    BroadcastPartitioner,
    ForwardPartitioner,
    HashPartitioner,
    RebalancePartitioner,
    check_key_type,
    hash_columns,
    key_groups,
    split_batch,
    subtask_of_group,
)

MASK = 2**64 - 1
GOLDEN = 0x9E3779B97F4A7C15


# ---- the slow reference, written from the docstring of rayflow.partition.hashing ---------------------------


def mix(z: int) -> int:
    z &= MASK
    z = (z ^ z >> 30) * 0xBF58476D1CE4E5B9 & MASK
    z = (z ^ z >> 27) * 0x94D049BB133111EB & MASK
    return z ^ z >> 31


def reference(value: Any) -> int:
    """Hash of one value; timestamps and durations are given as integer nanoseconds by `Instant`."""
    if value is None:
        return NULL_HASH
    if isinstance(value, bool):
        return mix(int(value) + 2 * GOLDEN)
    if isinstance(value, int):
        return mix(value + GOLDEN)
    if isinstance(value, float):
        bits = 0x7FF8 << 48 if math.isnan(value) else struct.unpack("<Q", struct.pack("<d", value + 0.0))[0]
        return mix(bits + 3 * GOLDEN)
    if isinstance(value, Decimal):
        sign, digits, exponent = value.as_tuple()
        assert isinstance(exponent, int)
        unscaled = int("".join(map(str, digits))) * (-1 if sign else 1)
        prime = 2**61 - 1
        return mix(unscaled * pow(10, exponent, prime) % prime + 8 * GOLDEN)
    raw = value.encode() if isinstance(value, str) else bytes(value)
    total = len(raw)
    for index in range(0, len(raw), 8):
        word = int.from_bytes(raw[index : index + 8], "little")
        total += mix(word + (index // 8 + 1) * GOLDEN)
    return mix(total + 9 * GOLDEN)


def reference_instant(nanos: int, key_class: int) -> int:
    return mix(nanos // 1000 + nanos % 1000 * GOLDEN + key_class * GOLDEN)


def hashes(values: Sequence[Any], kind: pa.DataType) -> list[int]:
    return [int(h) for h in hash_columns([pa.array(values, kind)])]


def fold(*parts: int) -> int:
    result = parts[0]
    for part in parts[1:]:
        result = mix(result * GOLDEN + part)
    return result


# ---- K2: values -----------------------------------------------------------------------------------------

INT64 = st.integers(-(2**63), 2**63 - 1)


@given(st.lists(st.none() | INT64))
def test_integers_equal_the_reference(values: list[int | None]) -> None:
    assert hashes(values, pa.int64()) == [reference(v) for v in values]


@given(st.lists(st.none() | st.floats()))
def test_floats_equal_the_reference(values: list[float | None]) -> None:
    assert hashes(values, pa.float64()) == [reference(v) for v in values]


@given(st.lists(st.none() | st.booleans()))
def test_booleans_equal_the_reference(values: list[bool | None]) -> None:
    assert hashes(values, pa.bool_()) == [reference(v) for v in values]


BYTES = st.binary(max_size=24) | st.binary(min_size=120, max_size=200) | st.just(b"\0" * 9)


@settings(deadline=None)
@given(st.lists(st.none() | BYTES), st.integers(0, 5), st.integers(0, 5))
def test_bytes_equal_the_reference_in_every_layout_and_slice(
    values: list[bytes | None], drop_front: int, drop_back: int
) -> None:
    kept = values[drop_front : len(values) - drop_back]
    expected = [reference(v) for v in kept]
    for kind in (pa.binary(), pa.large_binary(), pa.binary_view()):
        column = pa.array(values, kind).slice(drop_front, len(kept))
        assert hash_columns([column]).tolist() == expected, kind
    encoded = pa.array(values, pa.binary()).dictionary_encode().slice(drop_front, len(kept))
    assert hash_columns([encoded]).tolist() == expected


@settings(deadline=None)
@given(st.lists(st.none() | st.text(max_size=40)))
def test_strings_equal_the_reference_in_every_layout(values: list[str | None]) -> None:
    expected = [reference(v) for v in values]
    for kind in (pa.string(), pa.large_string(), pa.string_view()):
        assert hashes(values, kind) == expected, kind


DECIMALS = st.decimals(-(10**20), 10**20, allow_nan=False, allow_infinity=False, places=6)


@settings(deadline=None)
@given(st.lists(st.none() | DECIMALS))
def test_decimals_equal_the_reference_at_every_width_and_scale(values: list[Decimal | None]) -> None:
    expected = [reference(v) for v in values]
    for kind in (pa.decimal128(38, 6), pa.decimal128(38, 12), pa.decimal256(76, 6), pa.decimal256(76, 40)):
        assert hashes(values, kind) == expected, kind


@given(st.lists(st.none() | st.integers(-(2**63), 2**63 - 1)))
def test_nanosecond_instants_equal_the_reference(ticks: list[int | None]) -> None:
    expected = [NULL_HASH if t is None else reference_instant(t, 5) for t in ticks]
    assert hashes(ticks, pa.timestamp("ns")) == expected
    expected = [NULL_HASH if t is None else reference_instant(t, 7) for t in ticks]
    assert hashes(ticks, pa.duration("ns")) == expected


@given(st.lists(INT64), st.sampled_from([("s", 10**9), ("ms", 10**6), ("us", 10**3)]))
def test_coarser_instants_hash_as_nanoseconds_even_far_outside_their_range(
    ticks: list[int], unit: tuple[str, int]
) -> None:
    name, nanos = unit
    assert hashes(ticks, pa.timestamp(name)) == [reference_instant(t * nanos, 5) for t in ticks]


@pytest.mark.parametrize("kind", [pa.int8(), pa.int16(), pa.int32(), pa.uint8(), pa.uint16(), pa.uint32(), pa.uint64()])
def test_the_same_number_hashes_the_same_in_every_width(kind: pa.DataType) -> None:
    values = [0, 1, 100, 127] if pa.types.is_unsigned_integer(kind) else [-128, -1, 0, 1, 127]
    assert hashes(values, kind) == hashes(values, pa.int64())


def test_floats_of_every_width_and_the_two_zeros_and_all_nans_agree() -> None:
    values = [0.0, -0.0, 1.5, math.inf, math.nan, -math.nan]
    assert hashes(values, pa.float32()) == hashes(values, pa.float64()) == hashes(values, pa.float16())
    zero, minus_zero, *_, nan, minus_nan = hashes(values, pa.float64())
    assert zero == minus_zero
    assert nan == minus_nan
    odd_nan = pa.Array.from_buffers(pa.float64(), 1, [None, pa.py_buffer(struct.pack("<Q", 0xFFF0000000000123))])
    assert hash_columns([odd_nan]).tolist() == [nan]


def test_equal_instants_agree_over_units_and_zones_and_dates_over_widths() -> None:
    moment = datetime(1969, 7, 20, 20, 17, 40, tzinfo=UTC)
    naive = moment.replace(tzinfo=None)
    expected = hashes([naive], pa.timestamp("s"))
    for unit in ("s", "ms", "us", "ns"):
        assert hashes([moment], pa.timestamp(unit, "UTC")) == expected
        assert hashes([moment], pa.timestamp(unit, "America/New_York")) == expected
        assert hashes([timedelta(seconds=-3)], pa.duration(unit)) == hashes([timedelta(seconds=-3)], pa.duration("s"))
    day = date(1969, 12, 30)
    assert hashes([day], pa.date64()) == hashes([day], pa.date32())
    noon = time(12, 30)
    expected = hashes([noon], pa.time32("s"))
    for kind in (pa.time32("ms"), pa.time64("us"), pa.time64("ns")):
        assert hashes([noon], kind) == expected


def test_encodings_and_extension_types_hash_as_their_values() -> None:
    values = pa.array([5, 5, None, 7], pa.int64())
    expected = hash_columns([values]).tolist()
    assert hash_columns([pa.compute.run_end_encode(values)]).tolist() == expected
    dictionary_with_null = pa.DictionaryArray.from_arrays(pa.array([0, 0, 1, 2]), pa.array([5, None, 7]))
    assert hash_columns([dictionary_with_null]).tolist() == expected
    assert hash_columns([pa.nulls(3)]).tolist() == [NULL_HASH] * 3
    assert hash_columns([pa.chunked_array([[5, 5], [None, 7]])]).tolist() == expected
    raw = [b"0123456789abcdef", None]
    fixed = pa.array(raw, pa.binary(16))
    assert hash_columns([fixed]).tolist() == hashes(raw, pa.binary())
    assert hash_columns([fixed.slice(1)]).tolist() == [NULL_HASH]
    assert hash_columns([pa.ExtensionArray.from_storage(pa.uuid(), fixed)]).tolist() == hashes(raw, pa.binary())


@pytest.mark.parametrize(
    "column",
    [
        pa.array([1, None, 3, 4], pa.int16()),
        pa.array([True, None, False, True]),
        pa.array(["a", None, "a long string of more than 64 bytes" * 3, ""]),
        pa.array([Decimal("1.5"), None, Decimal("-2.5"), Decimal("0.0")]),
        pa.array([1.5, None, -2.5, 0.0]),
        pa.array([date(2013, 1, 1), None, date(1900, 1, 1), date(1970, 1, 1)]),
    ],
    ids=str,
)
def test_a_slice_hashes_as_its_rows_do_in_the_whole(column: pa.Array) -> None:
    whole = hash_columns([column]).tolist()
    assert len(set(whole)) == len(set(column.to_pylist()))
    for start in range(len(column) + 1):
        for stop in range(start, len(column) + 1):
            assert hash_columns([column.slice(start, stop - start)]).tolist() == whole[start:stop]


def test_what_stands_in_the_slot_of_a_null_does_not_matter() -> None:
    garbage = pa.array([123, 456], pa.int64(), mask=np.array([True, False]))
    assert hash_columns([garbage]).tolist() == [NULL_HASH, reference(456)]


def test_several_columns_fold_in_their_order() -> None:
    a, b, c = pa.array([1, 2, None]), pa.array(["x", None, "z"]), pa.array([True, False, True])
    rows = zip([1, 2, None], ["x", None, "z"], [True, False, True], strict=True)
    assert hash_columns([a, b, c]).tolist() == [fold(reference(x), reference(y), reference(z)) for x, y, z in rows]
    assert hash_columns([a, b]).tolist() != hash_columns([b, a]).tolist()
    assert hash_columns([a]).tolist() == [reference(1), reference(2), NULL_HASH]


GOLDEN_VALUES: list[tuple[pa.Array, int]] = [
    (pa.array([42]), 0xBDD732262FEB6E95),
    (pa.array([-1], pa.int8()), 0xE4D971771B652C20),
    (pa.array([True]), 0xBEEB8DA1658EEC67),
    (pa.array([1.5]), 0x825E277C9E0A6B26),
    (pa.array([math.nan]), 0xD12E402A206D706A),
    (pa.array([date(2013, 1, 1)]), 0x5E50606EF9CAF654),
    (pa.array(["2013-01-01T05:00:00.123456"]).cast(pa.timestamp("us")), 0xC1492D78916FB371),
    (pa.array([1_356_998_400_000_000_001], pa.timestamp("ns")), 0xF3DFC43502AE63A3),
    (pa.array([time(12, 30)]), 0xAF31F130BD40C7E5),
    (pa.array([timedelta(hours=1)]), 0x380BC510F85C3833),
    (pa.array([Decimal("-12345.67")]), 0xC015AA56FF881377),
    (pa.array([""]), 0x3EE5789041C98AC3),
    (pa.array(["JFK"]), 0x8D8B1308FAE587F6),
    (pa.array(["naïve key of more than one word"]), 0x3333C59BC3530D76),
    (pa.array(["0123456789" * 20]), 0xA745054BF4153534),
    (pa.array([b"\x00\xff"]), 0x70A37C93BF574F70),
    (pa.array([None], pa.int64()), 0x6E756C6C9E3779B9),
]


@pytest.mark.parametrize(("column", "expected"), GOLDEN_VALUES, ids=lambda v: str(v.type) if hasattr(v, "type") else "")
def test_golden_values_never_change(column: pa.Array, expected: int) -> None:
    """A failure here means that old checkpoints would restore to wrong key groups: raise HASH_VERSION."""
    assert int(hash_columns([column])[0]) == expected


def test_golden_value_of_a_key_of_two_columns() -> None:
    assert int(hash_columns([pa.array([42]), pa.array(["JFK"])])[0]) == 0x850B2077073DF466


@pytest.mark.parametrize(
    "kind",
    [
        pa.list_(pa.int64()),
        pa.struct([("x", pa.int64())]),
        pa.map_(pa.string(), pa.int64()),
        pa.month_day_nano_interval(),
    ],
    ids=str,
)
def test_a_key_of_a_nested_type_is_refused_by_name(kind: pa.DataType) -> None:
    with pytest.raises(KeyHashError, match=r"'basket'.*integers, bool.*strings"):
        hash_columns([pa.nulls(2, kind)], ["basket"])
    with pytest.raises(KeyHashError, match="'basket'"):
        check_key_type("basket", kind)
    check_key_type("basket", pa.string())


def test_no_columns_and_columns_of_different_lengths_are_refused() -> None:
    with pytest.raises(KeyHashError, match="at least one column"):
        hash_columns([])
    with pytest.raises(KeyHashError, match="equal length"):
        hash_columns([pa.array([1]), pa.array([1, 2])])


def test_many_rows_hash_as_they_do_one_by_one() -> None:
    texts = [None if i % 7 == 0 else "x" * (i % 5) + str(i) for i in range(20_001)]
    numbers = [None if i % 11 == 0 else i - 10_000 for i in range(20_001)]
    assert hashes(texts, pa.string()) == [reference(t) for t in texts]
    assert hashes(numbers, pa.int32()) == [reference(n) for n in numbers]


def test_hashing_leaves_the_column_as_it_was() -> None:
    column = pa.array(np.arange(10, dtype=np.uint64))
    hash_columns([column, column])
    assert column.to_pylist() == list(range(10))


# ---- K1, K3: key groups ----------------------------------------------------------------------------------


@pytest.mark.parametrize("max_parallelism", [1, 2, 7, 128, 1000])
def test_groups_go_to_the_subtask_whose_range_holds_them(max_parallelism: int) -> None:
    groups = np.arange(max_parallelism, dtype=np.int32)
    for parallelism in {1, 2, 3, max_parallelism // 2, max_parallelism - 1, max_parallelism}:
        if not 1 <= parallelism <= max_parallelism:
            continue
        owners = subtask_of_group(groups, parallelism, max_parallelism).tolist()
        assert owners == [owner_of(g, parallelism, max_parallelism) for g in range(max_parallelism)]
        for index in range(parallelism):
            expected = list(key_group_range(index, parallelism, max_parallelism))
            assert [g for g, owner in enumerate(owners) if owner == index] == expected


def test_key_groups_are_the_high_bits_scaled_and_spread_evenly() -> None:
    extremes = np.array([0, 2**32 - 1, 2**63, MASK], np.uint64)
    assert key_groups(extremes, 128).tolist() == [0, 0, 64, 127]
    assert key_groups(extremes, 128).dtype == np.int32
    counts = np.bincount(key_groups(hash_columns([pa.array(np.arange(128_000))]), 128), minlength=128)
    assert len(counts) == 128
    assert 800 < counts.min() <= counts.max() < 1200  # 1,000 expected, standard deviation 32


@pytest.mark.parametrize("prefix", ["", "user-", "a prefix of more than eight bytes "])
def test_strings_in_sequence_do_not_collide_and_spread(prefix: str) -> None:
    keys = pa.array([f"{prefix}{i}" for i in range(50_000)])
    found = hash_columns([keys])
    assert len(np.unique(found)) == 50_000
    assert np.bincount(key_groups(found, 64), minlength=64).min() > 650  # 781 expected, standard deviation 28


# ---- F2: splitting --------------------------------------------------------------------------------------


def numbered(rows: int) -> pa.RecordBatch:
    return pa.record_batch(
        {
            "row": pa.array(range(rows), pa.int64()),
            "text": pa.array([None if i % 3 == 0 else f"t{i}" for i in range(rows)], pa.string()),
            "nested": pa.array([[i] * (i % 3) for i in range(rows)], pa.list_(pa.int64())),
        }
    )


@settings(deadline=None)
@given(st.integers(1, 300).flatmap(lambda n: st.tuples(st.just(n), st.lists(st.integers(0, n - 1), max_size=60))))
def test_split_keeps_every_row_once_and_in_order(case: tuple[int, list[int]]) -> None:
    n, targets = case
    batch = numbered(len(targets))
    parts = split_batch(batch, np.array(targets, np.int32), n)
    assert len(parts) == n
    for target, part in enumerate(parts):
        expected = [row for row, wanted in enumerate(targets) if wanted == target]
        if part is None:
            assert expected == []
        else:
            assert part.column("row").to_pylist() == expected
            assert part.to_pylist() == [batch.slice(row, 1).to_pylist()[0] for row in expected]
            assert part.schema == batch.schema


def test_a_batch_with_one_target_is_not_copied() -> None:
    batch = numbered(5)
    assert split_batch(batch, np.zeros(5, np.int32), 1)[0] is batch
    parts = split_batch(batch, np.full(5, 2, np.int32), 4)
    assert parts[2] is batch
    assert parts[:2] == [None, None]


@pytest.mark.parametrize("targets", [[0, 5, 1], [-1, 0, 1], [0, 1], [0, 256, 1]])
def test_targets_that_would_lose_rows_are_refused(targets: list[int]) -> None:
    with pytest.raises(ValueError, match="targets"):
        split_batch(numbered(3), np.array(targets, np.int64), 3)


def test_hash_partitioner_sends_equal_keys_to_the_owner_of_their_group() -> None:
    rng = np.random.default_rng(7)
    batch = pa.record_batch({"v": pa.array(range(5000)), "k": pa.array(rng.integers(0, 300, 5000))})
    partitioner = HashPartitioner(["k"], 3, 16)
    parts = partitioner.split(batch)
    seen: list[int] = []
    for index, part in enumerate(parts):
        assert part is not None
        values = part.column("v").to_pylist()
        assert values == sorted(values)
        seen += values
        assert set(partitioner.groups(part).tolist()) <= set(key_group_range(index, 3, 16))
    assert sorted(seen) == list(range(5000))


def test_a_null_is_a_key_of_its_own_unless_refused() -> None:
    batch = pa.record_batch({"k": pa.array([None, 1, None, 2, None])})
    parts = HashPartitioner(["k"], 4).split(batch)
    null_counts = [part.column(0).null_count for part in parts if part is not None]
    assert max(null_counts) == 3
    assert sum(null_counts) == 3
    for parallelism in (1, 4):
        with pytest.raises(KeyHashError, match=r"'k' is null in 3 of 5 rows \(first in row 0"):
            HashPartitioner(["k"], parallelism, on_null="error").split(batch)


@pytest.mark.parametrize("parallelism", [1, 2])
def test_a_wrong_key_is_refused_at_every_parallelism(parallelism: int) -> None:
    batch = pa.record_batch({"a": [1, 2], "tags": [["x"], []]})
    with pytest.raises(PlanError, match="'orgin' is not in the batch; available: a, tags"):
        HashPartitioner(["orgin"], parallelism).split(batch)
    with pytest.raises(KeyHashError, match="'tags'"):
        HashPartitioner(["a", "tags"], parallelism).split(batch)
    twice = pa.RecordBatch.from_arrays([pa.array([1]), pa.array([2])], names=["a", "a"])
    with pytest.raises(PlanError, match="more than once"):
        HashPartitioner(["a"], parallelism).split(twice)


def test_partitioner_options_are_checked() -> None:
    with pytest.raises(PlanError, match="list of column names"):
        HashPartitioner("origin", 2)
    with pytest.raises(PlanError, match="list of column names"):
        HashPartitioner([], 2)
    with pytest.raises(PlanError, match="parallelism"):
        HashPartitioner(["a"], 129)
    with pytest.raises(PlanError, match="on_null"):
        HashPartitioner(["a"], 2, on_null="drop")  # type: ignore[arg-type]
    with pytest.raises(PlanError, match="at least one downstream channel"):
        RebalancePartitioner(0)


def test_rebalance_takes_turns_from_a_start_of_its_own() -> None:
    batch = numbered(3)
    partitioner = RebalancePartitioner(3, subtask_index=4)
    receivers = []
    for _ in range(4):
        parts = partitioner.split(batch)
        receivers.append([index for index, part in enumerate(parts) if part is batch])
        assert sum(part is None for part in parts) == 2
    assert receivers == [[1], [2], [0], [1]]


def test_broadcast_and_forward_share_the_batch_and_drop_the_empty() -> None:
    batch, empty = numbered(3), numbered(0)
    assert all(part is batch for part in BroadcastPartitioner(3).split(batch))
    assert ForwardPartitioner().split(batch) == [batch]
    assert BroadcastPartitioner(2).split(empty) == [None, None]
    assert ForwardPartitioner().split(empty) == [None]
    assert HashPartitioner(["row"], 3).split(empty) == [None] * 3
    assert RebalancePartitioner(2).split(empty) == [None, None]
