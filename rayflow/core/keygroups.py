"""Key groups: the unit in which keyed state is owned, moved and restored.

K1  the ranges of all subtasks partition [0, G) for every parallelism from 1 to G.
K2  the key group of a key depends on the key's bytes alone (`rayflow.partition` hashes).
K3  group g belongs to the one subtask whose range holds g.
K4  G, the max parallelism, is fixed for the life of a job.

The formula is that of Flink's ``KeyGroupRangeAssignment``: the owner of g is ``g * parallelism // G``.
"""

from __future__ import annotations

from rayflow.errors import ConfigError

DEFAULT_MAX_PARALLELISM = 128


def check_parallelism(parallelism: int, max_parallelism: int) -> None:
    """Raise `ConfigError` unless 1 <= parallelism <= max_parallelism."""
    if not 1 <= parallelism <= max_parallelism:
        raise ConfigError(
            f"parallelism must lie between 1 and max_parallelism={max_parallelism}, got {parallelism}; "
            "choose a smaller parallelism or start a new job with a larger max_parallelism"
        )


def owner_of(group: int, parallelism: int, max_parallelism: int) -> int:
    """Index of the subtask that owns ``group`` (rule K3)."""
    return group * parallelism // max_parallelism


def key_group_range(index: int, parallelism: int, max_parallelism: int) -> range:
    """Groups owned by subtask ``index`` of ``parallelism`` (rule K1)."""
    start = -(-index * max_parallelism // parallelism)
    stop = -(-(index + 1) * max_parallelism // parallelism)
    return range(start, stop)
