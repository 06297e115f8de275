"""What the sinks that write files have in common: options, place, partitions, guarantee."""

from __future__ import annotations

from abc import abstractmethod
from collections.abc import Mapping, Sequence
from dataclasses import KW_ONLY, dataclass, field
from pathlib import Path
from typing import Any, ClassVar, Literal

import pyarrow as pa

from rayflow.errors import ConfigError, PlanError
from rayflow.operators.base import Committer, Guarantee
from rayflow.operators.sinks.files import FileFormat, FileSinkOperator, Rolling
from rayflow.operators.sinks.hive import HiveFolders
from rayflow.operators.sinks.local import LocalCommitter, LocalTarget
from rayflow.operators.sinks.s3 import Bucket, S3Committer, S3Target
from rayflow.operators.sources.paths import is_local, normalise
from rayflow.operators.sources.schemas import plain


@dataclass(frozen=True)
class FileSink:
    """Writes all rows as files ``part-<subtask>-<checkpoint>-<n>.<suffix>`` in the folder ``path``, local or on S3.

    Rows are visible when the checkpoint behind them is complete, and then exactly once; a job without rows leaves an
    empty folder. ``mode="error"`` refuses a folder that holds such files of another run; ``"append"`` adds to them
    and puts the id of the run into the names. ``max_file_rows`` and ``max_file_bytes`` (about, as written) bound a
    file; a checkpoint closes every file. ``partition_by`` puts rows into folders by the values of these columns (see
    `rayflow.operators.sinks.hive`). ``manifest`` keeps a record of what each checkpoint committed (see
    `rayflow.operators.sinks.committed`). One sink of one job at a time may write to a folder.
    """

    path: str | Path
    _: KW_ONLY
    storage_options: Mapping[str, Any] = field(default_factory=dict, repr=False)
    compression: str = "none"
    max_file_rows: int | None = None
    max_file_bytes: int = 512 * 1024 * 1024
    mode: Literal["error", "append"] = "error"
    partition_by: Sequence[str] = ()
    manifest: bool = False

    guarantee: ClassVar[Guarantee] = "exactly_once"
    function: ClassVar[str]
    suffixes: ClassVar[tuple[str, ...]]
    """Of all files that such a sink may write."""
    compressions: ClassVar[tuple[str, ...]]

    def __post_init__(self) -> None:
        object.__setattr__(self, "path", normalise(self.path)[0].rstrip("/") or "/")
        names = (self.partition_by,) if isinstance(self.partition_by, str) else tuple(self.partition_by)
        object.__setattr__(self, "partition_by", names)
        if self.mode not in ("error", "append"):
            raise ConfigError(f'{self.function}(mode) must be "error" or "append", got {self.mode!r}')
        for name in ("max_file_rows", "max_file_bytes"):
            value = getattr(self, name)
            if value is not None and value < 1:
                raise ConfigError(f"{self.function}({name}) must be at least 1, got {value}")
        if self.compression not in self.compressions:
            raise ConfigError(
                f"{self.function}(compression) must be one of {', '.join(self.compressions)}, got {self.compression!r}"
            )
        if not is_local(self._url) and not self._url.startswith(("s3://", "s3a://")):
            raise PlanError(f"{self.function} writes to a local folder or to s3://bucket/prefix, got {self._url!r}")
        self._folders()

    @abstractmethod
    def format(self) -> FileFormat:
        """How files are written."""

    def check(self, schema: pa.Schema) -> None:
        """Raises `PlanError` for columns (without those of the folders) that files of this format cannot hold."""

    def output_schema(self, schema: pa.Schema | None) -> pa.Schema | None:
        """The schema of the input, checked. Raises `PlanError`."""
        if schema is not None:
            folders = self._folders()
            if folders is not None:
                folders.check(schema, function=self.function)
            self.check(plain(pa.schema([f for f in schema if f.name not in self.partition_by])))
        return schema

    @property
    def stateful(self) -> bool:
        return False

    def build(self) -> FileSinkOperator:
        rolling = Rolling(self.max_file_rows, self.max_file_bytes)
        target = LocalTarget(self._url) if is_local(self._url) else S3Target(Bucket(self._url, self.storage_options))
        return FileSinkOperator(
            self.format(), target, rolling, unique_names=self.mode == "append", folders=self._folders()
        )

    def committer(self) -> Committer:
        refuse, folders = self.mode == "error", self._folders()
        below = "" if folders is None else folders.first
        if is_local(self._url):
            return LocalCommitter(self._url, self.suffixes, refuse, below=below, manifest=self.manifest)
        bucket = Bucket(self._url, self.storage_options)
        return S3Committer(bucket, self.suffixes, refuse, below=below, manifest=self.manifest)

    @property
    def _url(self) -> str:
        return str(self.path)

    def _folders(self) -> HiveFolders | None:
        return HiveFolders(tuple(self.partition_by)) if self.partition_by else None
