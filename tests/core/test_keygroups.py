"""Key groups: K1 and K3 for every parallelism, by exhaustion."""

from __future__ import annotations

import pytest

from rayflow.core.keygroups import check_parallelism, key_group_range, owner_of
from rayflow.errors import ConfigError


@pytest.mark.parametrize("max_parallelism", [1, 2, 13, 64, 100, 128, 4096])
def test_ranges_partition_the_groups_and_agree_with_the_owner(max_parallelism: int) -> None:
    for parallelism in range(1, min(64, max_parallelism) + 1):
        ranges = [key_group_range(i, parallelism, max_parallelism) for i in range(parallelism)]
        assert [g for r in ranges for g in r] == list(range(max_parallelism)), "K1"
        for index, groups in enumerate(ranges):
            assert {owner_of(g, parallelism, max_parallelism) for g in groups} == {index}, "K3"
        assert max(map(len, ranges)) - min(map(len, ranges)) <= 1


@pytest.mark.parametrize(("parallelism", "ok"), [(0, False), (1, True), (128, True), (129, False)])
def test_parallelism_lies_between_one_and_the_maximum(parallelism: int, ok: bool) -> None:
    if ok:
        check_parallelism(parallelism, 128)
    else:
        with pytest.raises(ConfigError, match=f"got {parallelism}"):
            check_parallelism(parallelism, 128)
