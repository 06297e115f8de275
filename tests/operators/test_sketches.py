"""The documented errors of `approx_count_distinct` and `quantile`, over random distributions; NumPy is the oracle."""

from __future__ import annotations

import math
from typing import Any

import numpy as np
import numpy.typing as npt
import pyarrow as pa
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

import rayflow.operators.aggregates as rf
from rayflow.operators import sketches
from rayflow.operators.sketches import REGISTERS, RELATIVE_ERROR, DistinctEstimate, Quantiles, buckets_of
from tests.operators.aggregating import batch_of, finalised, plan_of, times_of

Floats = npt.NDArray[np.float64]
LEVELS = (0.0, 0.01, 0.25, 0.5, 0.9, 0.99, 0.999, 1.0)


def estimates(distinct: int, groups: int, *, seed: int) -> Floats:
    """Estimates for groups of so many different random integers each, one time in five twice."""
    rng = np.random.default_rng(seed)
    values = rng.choice(2**62, distinct * groups, replace=False) if distinct * groups < 1000 else None
    if values is None:  # random 62-bit integers hardly ever repeat
        values = rng.integers(0, 2**62, distinct * groups)
    keys = np.tile(np.arange(groups), distinct)
    again = rng.integers(0, len(values), len(values) // 5)
    batch = batch_of(np.append(values, values[again]), pa.int64(), keys=np.append(keys, keys[again]))
    plan = plan_of(batch, out=rf.approx_count_distinct("x"))
    half = batch.num_rows // 2
    parts = [plan.combine_rows(part, times_of(part), 0) for part in (batch.slice(0, half), batch.slice(half))]
    found: Floats = finalised(plan, plan.merge(pa.concat_tables(parts), 0)).column("out").to_numpy().astype(float)
    return found


def spread_of(found: Floats, distinct: int) -> tuple[float, float, float]:
    """(bias, standard error, worst error), relative."""
    errors = found / distinct - 1.0
    return abs(float(errors.mean())), float(np.sqrt(np.mean(errors**2))), float(np.abs(errors).max())


@pytest.mark.parametrize(("distinct", "groups"), [(1, 100), (30, 400), (1_000, 300), (10_000, 100), (60_000, 40)])
def test_distinct_values_are_estimated_within_the_standard_error(distinct: int, groups: int) -> None:
    standard = 1.04 / math.sqrt(REGISTERS)
    assert round(standard, 3) == 0.016, "as documented"
    bias, error, worst = spread_of(estimates(distinct, groups, seed=distinct), distinct)
    assert bias < 4 * standard / math.sqrt(groups) + 0.25 / distinct, "the last for rounding"
    assert error < standard * (1 + 3 / math.sqrt(2 * groups))
    assert worst < 4.5 * standard


def test_the_test_of_estimates_is_not_blind(monkeypatch: pytest.MonkeyPatch) -> None:
    """Broken variants: ranks that are one too low, and estimates of parts that are added up."""
    found = estimates(10_000, 50, seed=1)
    assert spread_of(found * 2, 10_000)[2] > 0.9
    right = sketches.elements_of

    def too_low(values: Any) -> Any:
        elements, valid = right(values)
        return np.where(elements & 63 > 1, elements - 1, elements), valid

    monkeypatch.setattr(sketches, "elements_of", too_low)
    assert spread_of(estimates(10_000, 50, seed=1), 10_000)[1] > 0.016 * 3


def test_a_sketch_stays_small() -> None:
    batch = batch_of(np.arange(300_000), pa.int64())
    plan = plan_of(batch, n=rf.approx_count_distinct("x"), m=rf.median("x"))
    partial = plan.combine_rows(batch, times_of(batch), 0)
    (registers,) = (bound.parts[0].name for bound in plan.bounds if isinstance(bound, DistinctEstimate))
    (buckets,) = (bound.parts[0].name for bound in plan.bounds if isinstance(bound, Quantiles))
    assert partial.column(registers).nbytes <= 16 * 1024 + 64
    assert partial.column(buckets).nbytes < 4_000, "35 buckets a power of two"


def assert_close(found: list[float], values: Floats) -> None:
    """Off by 1 % at most of the larger of the two values between which the quantile lies; the ends are exact."""
    ordered = np.sort(values)
    for level, estimate in zip(LEVELS, found, strict=True):
        at = level * (len(ordered) - 1)
        low, high = float(ordered[math.floor(at)]), float(ordered[math.ceil(at)])
        share = at - math.floor(at)
        exact = low if low == high else low * (1 - share) + high * share
        allowed = RELATIVE_ERROR * max(abs(low), abs(high)) + 2.3e-308
        assert abs(estimate - exact) <= allowed, (level, estimate, exact)
    assert found[0] == ordered[0]
    assert found[-1] == ordered[-1]


def quantiles(values: Floats, *, cuts: int = 3) -> list[float]:
    batch = batch_of(values, pa.float64())
    plan = plan_of(batch, out=rf.quantile("x", LEVELS))
    step = len(values) // cuts + 1
    parts = [batch.slice(at, step) for at in range(0, len(values), step)]
    merged = plan.merge(pa.concat_tables(plan.combine_rows(part, times_of(part), 0) for part in parts), 0)
    found: list[float] = finalised(plan, merged).column("out")[0].as_py()
    return found


@pytest.mark.parametrize("seed", range(3))
def test_quantiles_of_random_distributions_are_within_the_error(seed: int) -> None:
    rng = np.random.default_rng(seed)
    for values in (
        rng.normal(0, 1, 10_000),
        rng.normal(-1e6, 10, 10_000),
        rng.lognormal(0, 4, 10_000),
        rng.exponential(1e-9, 9_999),
        rng.pareto(0.5, 10_001),
        rng.integers(-5, 6, 1_000).astype(np.float64),
        np.append(rng.normal(100, 1, 500), rng.normal(-100, 1, 500)),
        np.full(100, 1 / 3),
    ):
        assert_close(quantiles(values), values)


@settings(max_examples=300, deadline=None)
@given(st.lists(st.floats(allow_nan=False, allow_infinity=False), min_size=1, max_size=9), st.integers(1, 3))
def test_quantiles_of_any_floats(values: list[float], cuts: int) -> None:
    with np.errstate(over="ignore"):
        assert_close(quantiles(np.array(values), cuts=cuts), np.array(values))


@settings(max_examples=300, deadline=None)
@given(st.lists(st.floats(), min_size=2, max_size=20))
def test_buckets_are_in_the_order_of_their_numbers(values: list[float]) -> None:
    ordered = np.sort(np.array(values))  # NaN last
    buckets = buckets_of(ordered)
    assert np.all(buckets[1:] >= buckets[:-1])
    assert np.array_equal(buckets_of(-ordered[~np.isnan(ordered)]), -buckets[~np.isnan(ordered)])


def test_edges_of_buckets() -> None:
    """Around every bound between two slices, where the first ten bits of the mantissa are not enough."""
    bounds = np.array([2.0 ** (i / sketches.SLICES) for i in range(sketches.SLICES + 1)])
    near = np.concatenate([np.nextafter(bounds, 0), bounds, np.nextafter(bounds, 9)])
    for scale in (1.0, 2.0**-1000, 2.0**1000, 3e-5):
        values = near * scale
        middles = sketches._values(buckets_of(values), np.full(len(values), -np.inf), np.full(len(values), np.inf))
        assert np.all(np.abs(middles / values - 1) < RELATIVE_ERROR)


def test_the_test_of_quantiles_is_not_blind(monkeypatch: pytest.MonkeyPatch) -> None:
    """Broken variants: results that are a little further off, and numbers in the slice below their own."""
    values = np.random.default_rng(0).normal(100, 1, 1_000)
    assert_close(quantiles(values), values)
    with pytest.raises(AssertionError):
        assert_close([found * 1.011 for found in quantiles(values)], values)
    monkeypatch.setattr(sketches, "_GUESS", np.maximum(sketches._GUESS - 1, 0))
    monkeypatch.setattr(sketches, "_MANTISSAS", np.full(sketches.SLICES + 1, 1 << 52))
    with pytest.raises(AssertionError):
        assert_close(quantiles(values), values)
    with pytest.raises(AssertionError):
        test_edges_of_buckets()
