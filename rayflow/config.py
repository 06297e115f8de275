"""Configuration: a few frozen dataclasses; every default is safe. No environment variables, no globals."""

from __future__ import annotations

import re
from dataclasses import dataclass, field
from datetime import timedelta
from typing import Any, Literal

from rayflow.core.keygroups import DEFAULT_MAX_PARALLELISM
from rayflow.core.restart import RestartSpec
from rayflow.errors import ConfigError

Duration = str | timedelta | int | float
"""``"250ms"``, ``"10s"``, ``"1m"``, ``"2h"``, ``"1d"``, a `timedelta`, or a number of seconds."""

_UNITS_US = {"us": 1, "ms": 1_000, "s": 1_000_000, "m": 60_000_000, "h": 3_600_000_000, "d": 86_400_000_000}
_DURATION = re.compile(r"\s*(\d+(?:\.\d+)?)\s*(us|ms|s|m|h|d)\s*")


def duration_us(value: Duration, *, what: str = "duration", minimum_us: int = 0) -> int:
    """The duration in whole microseconds.

    Raises `ConfigError` naming ``what`` when the text is not a duration or it is below ``minimum_us``.
    """
    if isinstance(value, bool):
        raise ConfigError(f'{what} must be a duration such as "10s", got {value!r}')
    if isinstance(value, timedelta):
        result = value // timedelta(microseconds=1)
    elif isinstance(value, int | float):
        result = round(value * 1_000_000)
    else:
        pieces = list(_DURATION.finditer(value)) if isinstance(value, str) else []
        if not pieces or "".join(p.group(0) for p in pieces) != value:
            raise ConfigError(f'{what} must be a duration such as "250ms", "10s" or "1h30m", got {value!r}')
        result = sum(round(float(p.group(1)) * _UNITS_US[p.group(2)]) for p in pieces)
    if result < minimum_us:
        raise ConfigError(f"{what} must be at least {minimum_us / 1_000_000:g} s, got {value!r}")
    return result


@dataclass(frozen=True, slots=True)
class CheckpointConfig:
    """Where and how often checkpoints are taken.

    ``url`` is a local folder or any fsspec URL (``s3://bucket/prefix``); the job writes below ``<url>/<flow name>/``.
    A job started again on the same directory goes on from the newest checkpoint.
    """

    url: str
    interval: Duration = "10s"
    mode: Literal["exactly_once", "at_least_once"] = "exactly_once"
    timeout: Duration = "10m"
    min_pause: Duration = "0s"
    tolerable_failures: int = 3
    """Failed checkpoints in a row before the job fails over."""
    retain: int = 2
    """Complete checkpoints kept."""
    strict: bool = False
    """Refuse a flow with a source or sink that cannot give what ``mode`` asks for, instead of warning of it."""
    storage_options: dict[str, Any] = field(default_factory=dict, repr=False)
    """Passed to fsspec (``key``, ``secret``, ``endpoint_url`` …)."""

    def __post_init__(self) -> None:
        if not self.url:
            raise ConfigError("CheckpointConfig(url) must name a folder or URL, got an empty string")
        duration_us(self.interval, what="CheckpointConfig(interval)", minimum_us=1_000)
        duration_us(self.timeout, what="CheckpointConfig(timeout)", minimum_us=1_000)
        duration_us(self.min_pause, what="CheckpointConfig(min_pause)")
        if self.mode not in ("exactly_once", "at_least_once"):
            raise ConfigError(f'CheckpointConfig(mode) must be "exactly_once" or "at_least_once", got {self.mode!r}')
        if self.retain < 1:
            raise ConfigError(f"CheckpointConfig(retain) must be at least 1, got {self.retain}")
        if self.tolerable_failures < 0:
            raise ConfigError(
                f"CheckpointConfig(tolerable_failures) must not be negative, got {self.tolerable_failures}"
            )


@dataclass(frozen=True, slots=True)
class Restart(RestartSpec):
    """How a failed job is restarted. Use the constructors `exponential`, `fixed` and `none`."""

    @staticmethod
    def exponential(
        *, initial: Duration = "1s", factor: float = 1.5, max: Duration = "1m", reset_after: Duration = "5m"
    ) -> Restart:
        """Wait ``initial``, then ``factor`` times as long each time, up to ``max``; begin anew after ``reset_after``
        without a failure."""
        return Restart(
            "exponential",
            duration_us(initial) / 1e6,
            factor,
            duration_us(max) / 1e6,
            duration_us(reset_after) / 1e6,
        )

    @staticmethod
    def fixed(*, delay: Duration = "1s", max_attempts: int | None = 10) -> Restart:
        """Wait ``delay`` before each restart; give up after ``max_attempts``."""
        return Restart("fixed", duration_us(delay) / 1e6, max_attempts=max_attempts)

    @staticmethod
    def none() -> Restart:
        """The first failure ends the job."""
        return Restart("none")


@dataclass(frozen=True, slots=True)
class JobConfig:
    """How a job runs. Fewer than fifteen knobs in all."""

    max_parallelism: int = DEFAULT_MAX_PARALLELISM
    """Number of key groups (rule K4); fixed for the life of a job."""
    state: Literal["memory", "fs", "rocksdb"] | None = None
    """``memory``: in the processes, checkpoints with the coordinator (small, gone with the cluster); ``fs``: in the
    processes, checkpoints in files; ``rocksdb``: on local disk, larger than memory, checkpoints in files. None: ``fs``
    with a checkpoint URL, else ``memory``."""
    state_memory_bytes: int = 256 * 1024 * 1024
    """What one operator instance may keep in memory under ``rocksdb`` before it uses the local disk."""
    local_dir: str | None = None
    """Folder on every node for state on local disk (``rocksdb``); None: the system's temporary folder."""
    restart: Restart = field(default_factory=Restart)
    batch_rows: int = 65_536
    """Largest batch on a channel, in rows."""
    linger: Duration = "20ms"
    """How long a small batch may wait for more rows."""
    inflight_bytes: int = 16 * 1024 * 1024
    """Credit of one channel: bytes sent and not yet taken by the receiver's loop (rule F1)."""
    watermark_interval: Duration = "100ms"
    hang_timeout: Duration = "60s"
    """A subtask whose loop gives no sign for so long is killed and replaced."""

    def __post_init__(self) -> None:
        if self.max_parallelism < 1 or self.max_parallelism > 32_768:
            raise ConfigError(f"JobConfig(max_parallelism) must lie between 1 and 32768, got {self.max_parallelism}")
        if self.state not in (None, "memory", "fs", "rocksdb"):
            raise ConfigError(f'JobConfig(state) must be "memory", "fs" or "rocksdb", got {self.state!r}')
        if self.state_memory_bytes < 1024 * 1024:
            raise ConfigError(f"JobConfig(state_memory_bytes) must be at least 1048576, got {self.state_memory_bytes}")
        if self.batch_rows < 1:
            raise ConfigError(f"JobConfig(batch_rows) must be at least 1, got {self.batch_rows}")
        if self.inflight_bytes < 1024:
            raise ConfigError(f"JobConfig(inflight_bytes) must be at least 1024, got {self.inflight_bytes}")
        duration_us(self.linger, what="JobConfig(linger)")
        duration_us(self.watermark_interval, what="JobConfig(watermark_interval)")
        duration_us(self.hang_timeout, what="JobConfig(hang_timeout)", minimum_us=100_000)
