"""Comparing schemas and fitting batches to the one that a source has promised."""

from __future__ import annotations

import pyarrow as pa


def plain(schema: pa.Schema) -> pa.Schema:
    """The schema that batches have inside the engine: no metadata, every column may hold nulls, no dictionaries.

    Nullability and metadata differ between writers of the same data and say nothing that an operator relies on;
    dictionaries differ from batch to batch.
    """
    return pa.schema([pa.field(f.name, _decoded(f.type)) for f in schema])


def same_columns(a: pa.Schema, b: pa.Schema) -> bool:
    """Same names, types and order; nullability and metadata do not count."""
    return bool(a.names == b.names and a.types == b.types)


def conform(batch: pa.RecordBatch, schema: pa.Schema) -> pa.RecordBatch:
    """``batch`` with exactly ``schema``, which is `plain` of the batch's own; copies only dictionaries."""
    if batch.schema.equals(schema, check_metadata=True):
        return batch
    if not schema.names:
        return batch
    arrays = [c if c.type == t else c.cast(t) for c, t in zip(batch.columns, schema.types, strict=True)]
    return pa.RecordBatch.from_arrays(arrays, schema=schema)


def describe(schema: pa.Schema) -> str:
    """One line for messages: ``{a: int64, b: string}``."""
    return "{" + ", ".join(f"{f.name}: {f.type}" for f in schema) + "}"


def difference(expected: pa.Schema, got: pa.Schema) -> str:
    """The first difference in words, for messages about wide schemas."""
    for name in expected.names:
        if name not in got.names:
            return f"column {name!r} is missing"
    for name in got.names:
        if name not in expected.names:
            return f"column {name!r} is not expected"
    for name in expected.names:
        want, have = expected.field(name).type, got.field(name).type
        if want != have:
            return f"column {name!r} is {have}, not {want}"
    return "the columns stand in another order"


def _decoded(kind: pa.DataType) -> pa.DataType:
    return kind.value_type if pa.types.is_dictionary(kind) else kind
