"""Streams that end in Delta Lake tables. See docs/delta.md."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

from rayflow.operators.delta.sink import DeltaSink, Mode

if TYPE_CHECKING:
    from rayflow.stream import StreamEnd


class WritesDelta:
    """The part of a `Stream` that writes Delta tables."""

    def _sink(self, label: str, operator: Any, *, detail: str = "", name: str | None = None) -> StreamEnd:
        raise NotImplementedError

    def write_delta(
        self,
        path: str,
        *,
        partition_by: str | Sequence[str] = (),
        mode: Mode = "append",
        compression: str = "snappy",
        storage_options: Mapping[str, Any] | None = None,
        name: str | None = None,
    ) -> StreamEnd:
        """Exactly-once rows appended to the Delta table at ``path`` (local folder or ``s3://``), a commit a checkpoint.

        The table is made from the columns of the rows where there is none; ``mode="error"`` refuses one that is there.
        Readers see a checkpoint whole or not at all, and find it in the log as the application transaction
        (``rayflow-<run>-<step>``, checkpoint). ``storage_options`` as for fsspec; keys in capitals (``AWS_REGION``)
        go to deltalake as they are. Needs ``pip install 'rayflow[delta]'``.
        """
        sink = DeltaSink(
            path,
            partition_by=partition_by,
            mode=mode,
            compression=compression,
            storage_options=dict(storage_options or {}),
        )
        return self._sink("write_delta", sink, detail=str(path), name=name)
