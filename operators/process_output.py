"""What a `KeyedProcess` emits, made into batches of one schema an output."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import Any

import pyarrow as pa

from rayflow.errors import SchemaChangedError, UserCodeError
from rayflow.operators.base import MAIN
from rayflow.operators.grouping import flat


class Emitted:
    """Collects what one call emits; `drain` gives it away when user code has returned."""

    def __init__(self, where: object, name: str, schemas: Mapping[str, pa.Schema | None]) -> None:
        self._where = where
        self._name = name
        self._promised = {tag for tag, schema in schemas.items() if schema is not None}
        self._schemas = dict(schemas)
        self._batches: list[tuple[str, pa.RecordBatch]] = []
        self._rows: dict[str, list[Mapping[str, Any]]] = {}

    def columns(self, piece: Any, tag: str) -> None:
        """A RecordBatch, a Table or a mapping of name to array."""
        self._check(tag)
        if isinstance(piece, Mapping):
            piece = self._from_mapping(piece, tag)
        self._whole(piece, tag)

    def rows(self, piece: Any, tag: str) -> None:
        """A row as a dict, an iterable of them, or a RecordBatch or Table."""
        self._check(tag)
        if isinstance(piece, pa.RecordBatch | pa.Table):
            self._flush(tag)
            self._whole(piece, tag)
            return
        found = [piece] if isinstance(piece, Mapping) else piece
        if isinstance(found, str | bytes) or not hasattr(found, "__iter__"):
            raise self._wrong(piece, "a dict, a list of dicts, a pyarrow.RecordBatch or a pyarrow.Table")
        kept = self._rows.setdefault(tag, [])
        for row in found:
            if not isinstance(row, Mapping):
                raise self._wrong(row, "a dict a row")
            kept.append(row)

    def drain(self) -> Iterator[tuple[str, pa.RecordBatch]]:
        """(tag, batch) in the order of each tag."""
        for tag in list(self._rows):
            self._flush(tag)
        batches, self._batches = self._batches, []
        for tag, batch in batches:
            if batch.num_rows:
                yield tag, batch

    def _check(self, tag: str) -> None:
        if tag not in self._schemas:
            sides = ", ".join(repr(t) for t in self._schemas if t != MAIN) or "none"
            raise UserCodeError(
                f"{self._where}: {self._name} emitted to tag={tag!r}, which it does not declare; declared: {sides}; "
                "name it in the class attribute side_outputs"
            )

    def _whole(self, piece: Any, tag: str) -> None:
        if isinstance(piece, pa.RecordBatch):
            self._batches.append((tag, self._fitted(piece, tag)))
        elif isinstance(piece, pa.Table):
            self._batches += [(tag, self._fitted(batch, tag)) for batch in piece.to_batches()]
        else:
            raise self._wrong(piece, "a pyarrow.RecordBatch, a pyarrow.Table or a dict of columns")

    def _flush(self, tag: str) -> None:
        rows = self._rows.pop(tag, None)
        if not rows:
            return
        # Over all rows: pyarrow takes the names from the first one only and would drop the others silently.
        names = list(dict.fromkeys(name for row in rows for name in row))
        schema = self._schemas[tag]
        if schema is not None and set(names) <= set(schema.names):
            names = schema.names
        columns = {name: [row.get(name) for row in rows] for name in names}
        self._batches.append((tag, self._fitted(self._from_mapping(columns, tag), tag)))

    def _from_mapping(self, columns: Mapping[str, Any], tag: str) -> pa.RecordBatch:
        schema = self._schemas[tag]
        try:
            if schema is not None and set(columns) == set(schema.names):
                return pa.RecordBatch.from_arrays([_array(columns[f.name], f.type) for f in schema], schema=schema)
            return pa.RecordBatch.from_arrays(
                [_array(values, None) for values in columns.values()], names=[str(name) for name in columns]
            )
        except (pa.ArrowException, TypeError, ValueError, OverflowError) as error:
            wanted = "columns of equal length and one type each" if schema is None else brief(schema)
            raise self._misfit(
                f"{self._where}: {self._name} emitted what does not fit {wanted}: {error}; emit such values", tag
            ) from error

    def _fitted(self, batch: pa.RecordBatch, tag: str) -> pa.RecordBatch:
        schema = self._schemas[tag]
        if schema is None:
            if batch.num_rows:
                self._schemas[tag] = pa.schema([pa.field(f.name, f.type) for f in batch.schema])
            return batch
        if batch.schema.equals(schema):
            return batch
        if batch.schema.names != schema.names or batch.schema.types != schema.types:
            attribute = "output" if tag == MAIN else f"side_outputs[{tag!r}]"
            said = f"its attribute {attribute}" if tag in self._promised else "what it emitted first"
            raise self._misfit(
                f"{self._where}: {self._name} emitted columns {brief(batch.schema)}, expected {brief(schema)} ({said})"
                f"; emit these columns or declare {attribute}",
                tag,
            )
        return pa.RecordBatch.from_arrays(batch.columns, schema=schema)

    def _misfit(self, message: str, tag: str) -> UserCodeError:
        """Where the first rows decided the schema, a restart would forget it: that ends the job."""
        decided = self._schemas[tag] is not None and tag not in self._promised
        return (SchemaChangedError if decided else UserCodeError)(message)

    def _wrong(self, got: Any, expected: str) -> UserCodeError:
        return UserCodeError(f"{self._where}: {self._name} emitted {type(got).__name__}, expected {expected}")


def brief(schema: pa.Schema) -> str:
    return "{" + ", ".join(f"{f.name}: {f.type}" for f in schema) + "}"


def _array(values: Any, kind: pa.DataType | None) -> pa.Array:
    if isinstance(values, pa.Array | pa.ChunkedArray):
        values = flat(values)
        return values if kind is None or values.type.equals(kind) else values.cast(kind)
    return pa.array(values, kind)


__all__ = ["Emitted", "brief"]
