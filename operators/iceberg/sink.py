"""``write_iceberg``: one snapshot of an Iceberg table a checkpoint, made by the coordinator for all subtasks.

One transaction adds the files and sets the table property ``rayflow.checkpoint.<run>.<operator>`` to the checkpoint, so
whoever makes it again (a coordinator that was restarted) finds it in the table. One that does not know yet that it was
replaced is refused by the catalog, because the snapshot that it follows is not the newest any more; it looks again, and
finds it too. The property, not the snapshots: those expire. Readers see a checkpoint whole or not at all.
"""

from __future__ import annotations

import random
import time
from collections.abc import Mapping, Sequence
from dataclasses import KW_ONLY, dataclass, field
from typing import Any, ClassVar, Literal

import pyarrow as pa

from rayflow.core.manifest import Json
from rayflow.errors import CommitLostError, ConfigError, DataError, SchemaChangedError
from rayflow.operators.base import Committer, Guarantee
from rayflow.operators.iceberg.files import IcebergOperator, missing
from rayflow.operators.iceberg.table import IcebergTable, check_library, columns_of, tries_once
from rayflow.operators.sinks.files import Rolling
from rayflow.operators.sinks.hive import HiveFolders
from rayflow.operators.sinks.parquet import COMPRESSIONS

Mode = Literal["append", "error"]
_TRIES = 6
"""Of a commit while others commit to the table all the time; the waits between them are about a second in all."""


@dataclass(frozen=True)
class IcebergSink:
    """Appends all rows to an Iceberg table, which is made when it is not there."""

    table: str
    _: KW_ONLY
    catalog: Mapping[str, str] = field(repr=False)
    partition_by: Sequence[str] = ()
    mode: Mode = "append"
    compression: str = "zstd"
    max_file_bytes: int = 512 * 1024 * 1024

    guarantee: ClassVar[Guarantee] = "exactly_once"
    stateful: ClassVar[bool] = False

    def __post_init__(self) -> None:
        check_library()
        names = (self.partition_by,) if isinstance(self.partition_by, str) else tuple(self.partition_by)
        object.__setattr__(self, "partition_by", names)
        object.__setattr__(self, "catalog", {str(k): str(v) for k, v in dict(self.catalog).items()})
        if not all(self.table.split(".")) or "." not in self.table:
            raise ConfigError(f'write_iceberg(table) must be "namespace.table", got {self.table!r}')
        if not {"type", "py-catalog-impl", "uri"} & set(self.catalog):
            raise ConfigError(
                "write_iceberg(catalog) must say what catalog it is, as pyiceberg's load_catalog wants it, for example "
                f'{{"type": "rest", "uri": "http://…"}}; got {sorted(self.catalog) or "nothing"}'
            )
        if self.catalog.get("type") == "in-memory":
            raise ConfigError("write_iceberg(catalog) cannot be in memory: the processes of a job each had their own")
        if self.mode not in ("append", "error"):
            raise ConfigError(f'write_iceberg(mode) must be "append" or "error", got {self.mode!r}')
        if self.compression not in COMPRESSIONS:
            raise ConfigError(
                f"write_iceberg(compression) must be one of {', '.join(COMPRESSIONS)}, got {self.compression!r}"
            )
        if self.max_file_bytes < 1:
            raise ConfigError(f"write_iceberg(max_file_bytes) must be at least 1, got {self.max_file_bytes}")
        self._folders()

    def output_schema(self, schema: pa.Schema | None) -> pa.Schema | None:
        """The schema of the input, checked. Raises `PlanError` for what an Iceberg table cannot hold."""
        if schema is not None:
            columns_of(schema)
            folders = self._folders()
            if folders is not None:
                folders.check(schema, function="write_iceberg")
        return schema

    def build(self) -> IcebergOperator:
        rolling = Rolling(max_bytes=self.max_file_bytes)
        return IcebergOperator(self._table(), self.compression, rolling, tuple(self.partition_by))

    def committer(self) -> IcebergCommitter:
        return IcebergCommitter(self._table(), tuple(self.partition_by), refuse_existing=self.mode == "error")

    def _table(self) -> IcebergTable:
        return IcebergTable(self.table, self.catalog)

    def _folders(self) -> HiveFolders | None:
        return HiveFolders(tuple(self.partition_by), keep_columns=True) if self.partition_by else None


class IcebergCommitter(Committer):
    """S1: checkpoints that the table knows are not committed again."""

    whole = True

    def __init__(self, table: IcebergTable, partition_by: tuple[str, ...], *, refuse_existing: bool) -> None:
        self._table = table
        self._partition_by = partition_by
        self._refuse_existing = refuse_existing

    def mark(self, committable: Json) -> str:
        """The table property that holds the newest checkpoint of this sink, of the run that prepared the file: one that
        begins with a savepoint finds what the first has committed since."""
        return f"rayflow.checkpoint.{committable['run']}.{self.ctx.operator}"

    def commit(self, committables: Sequence[Json]) -> None:
        if not committables:
            return
        for tried in range(_TRIES):
            if self._commit(self._table.open(), committables):
                return
            # Somebody else has changed the table, or has made this very commit: the table tells which.
            time.sleep(random.uniform(0, 0.03 * 2**tried))
        raise self._table.failed("commit to", RuntimeError(f"other writers were faster, {_TRIES} times"))

    def _commit(self, table: Any, committables: Sequence[Json]) -> bool:
        """False when the table is not any more what it was when it was opened: then nothing has been committed."""
        from pyiceberg.exceptions import CommitFailedException

        self._check_table(table, committables)
        # A manifest holds all that was prepared up to its checkpoint and not committed before, so the checkpoint in the
        # table of the run that prepared a file says whether it is in there.
        due = [c for c in committables if c["checkpoint"] > int(table.properties.get(self.mark(c), -1))]
        if not due:
            return True
        self._check_files(table, due)
        due.sort(key=lambda c: int(c["checkpoint"]))
        marks = {self.mark(c): str(c["checkpoint"]) for c in due}
        newest = str(due[-1]["checkpoint"])
        told = {"rayflow.job": self.ctx.job, "rayflow.run": self.ctx.run_id, "rayflow.checkpoint": newest}
        handle = tries_once(table, self._partition_by)
        io, transaction = handle.io, handle.transaction()
        try:
            # Whether a file is in the table already is known, and asking pyiceberg reads all manifests of the table.
            transaction.add_files([c["path"] for c in due], snapshot_properties=told, check_duplicate_files=False)
        except (ValueError, KeyError) as error:
            raise SchemaChangedError(
                f"{self.ctx}: files prepared for a complete checkpoint do not fit the Iceberg table "
                f"{self._table.name!r}: {error}; undo what has been changed in its columns since"
            ) from error
        except Exception as error:
            raise self._table.failed("commit to", error) from error
        try:
            transaction.set_properties(marks)
            transaction.commit_transaction()
        except CommitFailedException:
            return False
        except Exception as error:  # it may have been committed: whoever commits next asks the table
            raise self._table.failed("commit to", error) from error
        io.clean()
        return True

    def _check_table(self, table: Any, committables: Sequence[Json]) -> None:
        expected = {c["table"] for c in committables}
        got = "none" if table is None else str(table.metadata.table_uuid)
        if expected != {got}:
            raise CommitLostError(
                f"{self.ctx}: rows were prepared for a complete checkpoint of the Iceberg table {self._table.name!r} "
                f"({', '.join(sorted(expected))}), but now there is {got}; restore the table or go back to an earlier "
                "checkpoint with a new one"
            )

    def _check_files(self, table: Any, due: Sequence[Json]) -> None:
        for committable in due:
            try:
                lost = missing(table, committable)
            except Exception as error:
                raise self._table.failed("look at a file of", error) from error
            if lost:
                raise CommitLostError(
                    f"{self.ctx}: {committable['path']} ({committable['rows']} rows) was prepared for a complete "
                    f"checkpoint of the Iceberg table {self._table.name!r}, but is gone or has changed; look for a "
                    "removal of orphan files younger than the job was down, restore the file or go back to an earlier "
                    "checkpoint with a new table"
                )

    def recover(self, committables: Sequence[Json], *, fresh: bool) -> None:
        if fresh and self._refuse_existing:
            table = self._table.open()
            # One without snapshots has no rows: an attempt that failed before its first checkpoint leaves it.
            if table is not None and table.current_snapshot() is not None:
                raise DataError(
                    f'{self.ctx}: {self._table.name!r} is an Iceberg table with rows already and mode="error" was '
                    'asked for; write elsewhere, or use mode="append"'
                )
        self.commit(committables)

    def finish(self) -> None:
        self._table.close()
