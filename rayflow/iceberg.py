"""Streams that end in Iceberg tables. See docs/iceberg.md."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

from rayflow.operators.iceberg.sink import IcebergSink, Mode

if TYPE_CHECKING:
    from rayflow.stream import StreamEnd


class WritesIceberg:
    """The part of a `Stream` that writes Iceberg tables."""

    def _sink(self, label: str, operator: Any, *, detail: str = "", name: str | None = None) -> StreamEnd:
        raise NotImplementedError

    def write_iceberg(
        self,
        table: str,
        *,
        catalog: Mapping[str, str],
        partition_by: str | Sequence[str] = (),
        mode: Mode = "append",
        compression: str = "zstd",
        name: str | None = None,
    ) -> StreamEnd:
        """Exactly-once rows appended to the Iceberg table ``"namespace.table"``, one snapshot a checkpoint.

        ``catalog``: properties as for ``pyiceberg.catalog.load_catalog``, those of the storage too; ``name`` is that of
        the catalog. The table is made from the columns of the rows where there is none; ``mode="error"`` refuses one
        that has rows. ``partition_by`` names the identity partitions of the table, which may have no others. Readers
        see a checkpoint whole or not at all, and find it in the summary of the snapshot. Raises `PlanError` for types
        that a table cannot hold. Needs ``pip install 'rayflow[iceberg]'``.
        """
        sink = IcebergSink(table, catalog=catalog, partition_by=partition_by, mode=mode, compression=compression)
        return self._sink("write_iceberg", sink, detail=table, name=name)
