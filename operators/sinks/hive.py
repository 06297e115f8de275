"""Folders by the values of columns: ``day=2026-11-01/country=DE``, as Hive, Spark, pyarrow and DuckDB know them.

Values are percent-quoted, so that none of them can name another folder; a null is ``__HIVE_DEFAULT_PARTITION__``. The
columns are not in the files: readers take them from the names of the folders.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any
from urllib.parse import quote

import numpy as np
import pyarrow as pa

from rayflow.errors import ConfigError, DataError, PlanError
from rayflow.operators.sources.schemas import describe

NULL = "__HIVE_DEFAULT_PARTITION__"
_NAME_BYTES_MAX = 255
"""Of a folder, in all usual file systems."""
_CODES_MAX = 2**31


@dataclass(frozen=True, slots=True)
class HiveFolders:
    columns: tuple[str, ...]
    keep_columns: bool = False
    """Also in the files, for readers that take nothing from the names of folders."""

    def __post_init__(self) -> None:
        if not all(isinstance(name, str) and name for name in self.columns) or not self.columns:
            raise ConfigError(f"partition_by must name columns, got {list(self.columns)!r}")
        if len(set(self.columns)) != len(self.columns):
            raise ConfigError(f"partition_by names a column twice: {', '.join(self.columns)}")
        for name in self.columns:
            if name.startswith(("_", ".")):
                raise ConfigError(
                    f"partition_by names {name!r}, but readers leave out folders that begin with '_' or '.'; rename it"
                )

    def check(self, schema: pa.Schema, *, function: str) -> None:
        """Raises `PlanError` for a column that is not there or cannot be told by the name of a folder."""
        for name in self.columns:
            if name not in schema.names:
                raise PlanError(f"{function}(partition_by) names {name!r}, but the rows have {describe(schema)}")
            if not _nameable(schema.field(name).type):
                raise PlanError(
                    f"{function}(partition_by) names {name!r} of type {schema.field(name).type}; expected integers, "
                    f"texts, dates or booleans: make such a column of it first"
                )
        if len(schema.names) == len(self.columns) and not self.keep_columns:
            raise PlanError(f"{function}(partition_by) names all columns, so that nothing is left for the files")

    def split(self, batch: pa.RecordBatch) -> Iterator[tuple[str, pa.RecordBatch]]:
        """(folder, its rows in their order, without the columns if they are not kept).

        Raises `DataError` for a value without a name.
        """
        codes, values = self._codes(batch)
        rest = batch if self.keep_columns else batch.drop_columns(list(self.columns))
        order = np.argsort(codes, kind="stable")
        edges = np.flatnonzero(np.diff(codes[order])) + 1
        if not len(edges):
            yield self._folder(values, 0), rest
            return
        for rows in np.split(order, edges):
            # Rows of their own, not a slice of sorted ones: a folder with few rows would keep all others in memory.
            yield self._folder(values, int(rows[0])), rest.take(pa.array(rows))

    def _codes(self, batch: pa.RecordBatch) -> tuple[Any, list[tuple[Any, pa.Array]]]:
        """A number for each row, equal where all columns are; and for each column its dictionary by row."""
        codes, size = np.zeros(batch.num_rows, np.int64), 1
        values = []
        for name in self.columns:
            coded = batch.column(name).dictionary_encode(null_encoding="encode")
            own = coded.indices.to_numpy(zero_copy_only=False)
            values.append((own, coded.dictionary))
            if size * len(coded.dictionary) > _CODES_MAX:
                seen, codes = np.unique(codes, return_inverse=True)
                size = len(seen)
            codes, size = codes * len(coded.dictionary) + own, size * len(coded.dictionary)
        return (codes.astype(np.uint16) if size <= 2**16 else codes), values  # 16 bits are sorted by radix

    def _folder(self, values: list[tuple[Any, pa.Array]], row: int) -> str:
        return "/".join(
            _segment(name, dictionary[int(codes[row])].as_py())
            for name, (codes, dictionary) in zip(self.columns, values, strict=True)
        )

    @property
    def first(self) -> str:
        """How every folder begins."""
        return f"{quote(self.columns[0], safe='')}="


def _segment(name: str, value: Any) -> str:
    if value is None:
        text = NULL
    elif value == NULL:
        raise DataError(f"column {name!r} has the text {NULL}, which readers take for a null; replace it")
    elif isinstance(value, bool):
        text = "true" if value else "false"
    else:
        text = quote(str(value), safe="")
    segment = f"{quote(name, safe='')}={text}"
    if len(segment) > _NAME_BYTES_MAX:
        raise DataError(
            f"column {name!r} has a value that makes a folder name of {len(segment)} bytes (expected at most "
            f"{_NAME_BYTES_MAX}): {str(value)[:40]!r}…; partition by something shorter"
        )
    return segment


def _nameable(kind: pa.DataType) -> bool:
    if pa.types.is_dictionary(kind):
        return _nameable(kind.value_type)
    text = pa.types.is_string(kind) or pa.types.is_large_string(kind) or pa.types.is_string_view(kind)
    return bool(text or pa.types.is_integer(kind) or pa.types.is_date(kind) or pa.types.is_boolean(kind))
