"""``write_delta``: one commit of a Delta table a checkpoint, made by the coordinator for all subtasks.

The commit carries the application transaction (``rayflow-<run>-<operator>``, checkpoint), so whoever makes it again (a
coordinator that was restarted, one that does not know yet that it was replaced) finds it in the log, or is refused by
``deltalake`` because somebody else has just made it. Readers of the table see a checkpoint whole or not at all.
"""

from __future__ import annotations

import contextlib
import os
import time
from collections.abc import Mapping, Sequence
from dataclasses import KW_ONLY, dataclass, field
from pathlib import Path
from typing import Any, ClassVar, Literal

import pyarrow as pa

from rayflow.core.manifest import Json
from rayflow.errors import CommitLostError, ConfigError, DataError, PlanError
from rayflow.operators.base import Committer, Guarantee
from rayflow.operators.delta.files import (
    PENDING,
    DeltaOperator,
    columns_in,
    missing,
    partition_values,
    pending_prefix,
)
from rayflow.operators.delta.table import DeltaTable, check_columns, columns_of, deltalake
from rayflow.operators.sinks.files import Rolling
from rayflow.operators.sinks.hive import HiveFolders
from rayflow.operators.sinks.parquet import COMPRESSIONS
from rayflow.operators.sources.paths import is_local, normalise

Mode = Literal["append", "error"]


@dataclass(frozen=True)
class DeltaSink:
    """Appends all rows to a Delta table, which is made when it is not there."""

    path: str | Path
    _: KW_ONLY
    partition_by: Sequence[str] = ()
    mode: Mode = "append"
    compression: str = "snappy"
    max_file_bytes: int = 512 * 1024 * 1024
    storage_options: Mapping[str, Any] = field(default_factory=dict, repr=False)

    guarantee: ClassVar[Guarantee] = "exactly_once"
    stateful: ClassVar[bool] = False

    def __post_init__(self) -> None:
        deltalake()
        object.__setattr__(self, "path", normalise(self.path)[0].rstrip("/"))
        names = (self.partition_by,) if isinstance(self.partition_by, str) else tuple(self.partition_by)
        object.__setattr__(self, "partition_by", names)
        if self.mode not in ("append", "error"):
            raise ConfigError(f'write_delta(mode) must be "append" or "error", got {self.mode!r}')
        if self.compression not in COMPRESSIONS:
            raise ConfigError(
                f"write_delta(compression) must be one of {', '.join(COMPRESSIONS)}, got {self.compression!r}"
            )
        if self.max_file_bytes < 1:
            raise ConfigError(f"write_delta(max_file_bytes) must be at least 1, got {self.max_file_bytes}")
        if not is_local(self._url) and not self._url.startswith(("s3://", "s3a://")):
            raise PlanError(f"write_delta writes to a local folder or to s3://bucket/prefix, got {self._url!r}")
        self._folders()

    def output_schema(self, schema: pa.Schema | None) -> pa.Schema | None:
        """The schema of the input, checked. Raises `PlanError` for what a Delta table cannot hold."""
        if schema is not None:
            columns_of(schema)
            folders = self._folders()
            if folders is not None:
                folders.check(schema, function="write_delta")
        return schema

    def build(self) -> DeltaOperator:
        return DeltaOperator(
            self._table(), self.compression, Rolling(max_bytes=self.max_file_bytes), tuple(self.partition_by)
        )

    def committer(self) -> DeltaCommitter:
        return DeltaCommitter(self._table(), tuple(self.partition_by), refuse_existing=self.mode == "error")

    @property
    def _url(self) -> str:
        return str(self.path)

    def _table(self) -> DeltaTable:
        return DeltaTable(self._url, self.storage_options)

    def _folders(self) -> HiveFolders | None:
        return HiveFolders(tuple(self.partition_by)) if self.partition_by else None


class DeltaCommitter(Committer):
    """S1: checkpoints that the log knows are not committed again."""

    whole = True

    def __init__(self, table: DeltaTable, partition_by: tuple[str, ...], *, refuse_existing: bool) -> None:
        self._table = table
        self._partition_by = partition_by
        self._refuse_existing = refuse_existing

    def _application(self, committable: Json) -> str:
        """Of the run that prepared it: one that begins with a savepoint finds what the first has committed since."""
        return f"rayflow-{committable['run']}-{self.ctx.operator}"

    def commit(self, committables: Sequence[Json]) -> None:
        if not committables:
            return
        table = self._table.open() or self._table.create(columns_in(committables[0]), self._partition_by)
        if not self._commit(table, committables):
            # Somebody else has changed the table, or has made this very commit: the log tells which.
            table = self._table.open()
            if not self._commit(table, committables):
                raise self._table.failed("commit to", RuntimeError("another writer was faster, twice"))

    def _commit(self, table: Any, committables: Sequence[Json]) -> bool:
        """False when the table is not any more what it was when it was opened."""
        # A manifest holds all that was prepared up to its checkpoint and not committed before, so the log's version of
        # the run that prepared a file says whether it is in the table.
        known = {name: table.transaction_version(name) for name in set(map(self._application, committables))}
        due = [c for c in committables if c["checkpoint"] > (known[self._application(c)] or 0)]
        if not due:
            return True
        self._check(table, due)
        library = deltalake()
        now = int(time.time() * 1000)
        actions = [
            library.transaction.AddAction(
                path=c["path"],
                size=c["nbytes"],
                partition_values=partition_values(c["path"]),
                modification_time=now,
                data_change=True,
                stats=c["stats"],
            )
            for c in due
        ]
        newest = {self._application(c): int(c["checkpoint"]) for c in sorted(due, key=lambda c: int(c["checkpoint"]))}
        properties = library.CommitProperties(
            app_transactions=[library.Transaction(name, checkpoint) for name, checkpoint in newest.items()],
            custom_metadata={"rayflow.job": self.ctx.job, "rayflow.checkpoint": str(max(newest.values()))},
        )
        try:
            table.create_write_transaction(
                actions, "append", table.schema(), list(self._partition_by) or None, commit_properties=properties
            )
        except library.exceptions.CommitFailedError:
            return False
        except Exception as error:
            raise self._table.failed("commit to", error) from error
        return True

    def _check(self, table: Any, due: Sequence[Json]) -> None:
        check_columns(table, columns_in(due[0]), self._partition_by, where=str(self.ctx), url=self._table.url)
        for committable in due:
            if missing(self._table.url, self._table.options, committable):
                raise CommitLostError(
                    f"{self.ctx}: {committable['path']} ({committable['rows']} rows) was prepared for a complete "
                    f"checkpoint of the Delta table {self._table.url!r}, but is gone or has changed; look for a VACUUM "
                    "with a retention shorter than the job was down, restore the file or go back to an earlier "
                    "checkpoint with a new table"
                )

    def recover(self, committables: Sequence[Json], *, fresh: bool) -> None:
        if fresh and self._refuse_existing and self._table.open() is not None:
            raise DataError(
                f'{self.ctx}: {self._table.url!r} is a Delta table already and mode="error" was asked for; '
                'write elsewhere, or use mode="append"'
            )
        self.commit(committables)
        self.finish()

    def finish(self) -> None:
        """Files that were being written on the local disk are of no use to anybody."""
        if not is_local(self._table.url):
            return
        folder, mine = os.path.join(self._table.url, PENDING), pending_prefix(self.ctx)
        with contextlib.suppress(OSError):
            for name in os.listdir(folder):
                if name.startswith(mine):
                    os.unlink(os.path.join(folder, name))
            os.rmdir(folder)  # only when it is empty
