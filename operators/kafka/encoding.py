"""Rows as Kafka messages: values, keys, partitions, timestamps and headers, encoded by column.

What comes out are lists of Python objects, because the client takes one message a call; everything up to there is done
by pyarrow (and pyruhvro for Avro) on whole batches.
"""

from __future__ import annotations

import json
import struct
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Literal

import pyarrow as pa
import pyarrow.compute as pc

from rayflow.errors import ConfigError, DataError, PlanError
from rayflow.operators.json_lines import check_json, json_texts, json_values
from rayflow.operators.sources.schemas import describe

ValueFormat = Literal["json", "avro", "arrow", "raw"]
FORMATS: tuple[ValueFormat, ...] = ("json", "avro", "arrow", "raw")
Header = tuple[str, bytes | None]
_ARROW_ROWS_MAX = 10_000
_AVRO_TYPES: dict[str, Any] = {
    "bool": "boolean",
    "int8": "int",
    "int16": "int",
    "int32": "int",
    "int64": "long",
    "uint8": "int",
    "uint16": "int",
    "float": "float",
    "double": "double",
    "string": "string",
    "large_string": "string",
    "date32[day]": {"type": "int", "logicalType": "date"},
    "timestamp[ms]": {"type": "long", "logicalType": "timestamp-millis"},
    "timestamp[us]": {"type": "long", "logicalType": "timestamp-micros"},
}


@dataclass(slots=True)
class Messages:
    """Messages in the order of their rows; lists of one length, None where nothing was asked for."""

    values: list[bytes | None]
    keys: list[bytes | None] | None = None
    partitions: list[int] | None = None
    timestamps: list[int] | None = None
    """Milliseconds since the epoch; 0: now."""
    headers: list[list[Header]] | None = None
    nbytes: int = 0
    """About, of what the rows take in memory."""

    def __len__(self) -> int:
        return len(self.values)


@dataclass(frozen=True, slots=True)
class Encoding:
    """How rows become messages. Immutable and picklable; `Encoder` does it."""

    format: ValueFormat = "json"
    key: tuple[str, ...] = ()
    headers: str | tuple[Header, ...] = ()
    """A column (a map, or a struct, of texts or bytes), or headers that every message has."""
    timestamp: str | None = None
    partition: str | None = None
    avro_schema: str | None = None
    avro_schema_id: int | None = None
    """Framed for a schema registry under this id; None: bare."""

    def __post_init__(self) -> None:
        if self.format not in FORMATS:
            raise ConfigError(f"write_kafka(format) must be one of {FORMATS}, got {self.format!r}")
        if self.format == "arrow" and (self.key or self.timestamp or self.partition or isinstance(self.headers, str)):
            raise ConfigError(
                'write_kafka(format="arrow") makes one message of many rows, so there can be no key, timestamp, '
                'partition or headers of a row; leave them out or use format="json"'
            )
        if self.format != "avro" and (self.avro_schema is not None or self.avro_schema_id is not None):
            raise ConfigError(f'avro_schema and avro_schema_id need format="avro", got format={self.format!r}')

    @property
    def meta_columns(self) -> list[str]:
        """Columns that are not part of the value: they say how and where it goes."""
        headers = [self.headers] if isinstance(self.headers, str) else []
        return [c for c in (self.timestamp, self.partition, *headers) if c is not None]

    def check(self, schema: pa.Schema) -> pa.Schema:
        """The schema of the values. Raises `PlanError` for columns that are not there or have the wrong type."""
        for option, names in (
            ("key", self.key),
            ("timestamp", (self.timestamp,)),
            ("partition", (self.partition,)),
            ("headers", (self.headers if isinstance(self.headers, str) else None,)),
        ):
            for name in names:
                if name is not None and name not in schema.names:
                    raise PlanError(
                        f"write_kafka({option}={name!r}): there is no such column; available: {', '.join(schema.names)}"
                    )
        self._check_types(schema)
        left_out = set(self.meta_columns) if self.format != "raw" else {*self.meta_columns, *self.key}
        values = [name for name in schema.names if name not in left_out]
        if self.format == "raw" and "value" in values:
            values = ["value"]
        if not values or (self.format == "raw" and len(values) > 1):
            raise PlanError(
                f"write_kafka(format={self.format!r}) expected "
                + ('one column beside the key, or one called "value"' if values else "a column for the value")
                + f", got {describe(schema)}; select the columns before the sink"
            )
        value = pa.schema([schema.field(name) for name in values])
        if self.format == "json":
            check_json(value, function="write_kafka")
        if self.format == "raw" and not _is_bytes(value.field(0).type):
            raise PlanError(
                f'write_kafka(format="raw") writes a binary or string column, got {describe(value)}; cast it'
            )
        return value

    def _check_types(self, schema: pa.Schema) -> None:
        if self.timestamp is not None and not pa.types.is_timestamp(schema.field(self.timestamp).type):
            raise PlanError(
                f"write_kafka(timestamp={self.timestamp!r}) must be a timestamp column, "
                f"got {schema.field(self.timestamp).type}"
            )
        if self.partition is not None and not pa.types.is_integer(schema.field(self.partition).type):
            raise PlanError(
                f"write_kafka(partition={self.partition!r}) must be an integer column, "
                f"got {schema.field(self.partition).type}"
            )
        if isinstance(self.headers, str) and not (
            pa.types.is_map(schema.field(self.headers).type) or pa.types.is_struct(schema.field(self.headers).type)
        ):
            raise PlanError(
                f"write_kafka(headers={self.headers!r}) must be a map or struct column, "
                f"got {schema.field(self.headers).type}"
            )


class Encoder:
    """Encodes the batches of one schema. ``where`` names the step in messages."""

    def __init__(self, encoding: Encoding, schema: pa.Schema, where: str) -> None:
        self._encoding = encoding
        self._where = where
        self._names = encoding.check(schema).names
        self._avro = ""
        if encoding.format == "avro":
            self._avro = encoding.avro_schema or avro_schema(pa.schema([schema.field(n) for n in self._names]))
        self._frame = b"" if encoding.avro_schema_id is None else struct.pack(">bI", 0, encoding.avro_schema_id)

    def encode(self, batch: pa.RecordBatch) -> Messages:
        """Raises `DataError` for a value that cannot be encoded."""
        try:
            return self._encode(batch)
        except (pa.ArrowException, ValueError, TypeError) as error:
            raise DataError(f"{self._where} cannot encode {describe(batch.schema)}: {error}") from error

    def _encode(self, batch: pa.RecordBatch) -> Messages:
        how = self._encoding
        value = batch.select(self._names)
        if how.format == "arrow":
            values = _streams(value)
        elif how.format == "avro":
            values = self._avro_values(value)
        elif how.format == "raw":
            values = value.column(0).cast(pa.large_binary()).to_pylist()
        else:
            values = json_texts(value).cast(pa.large_binary()).to_pylist()
        constant = how.headers if not isinstance(how.headers, str) else ()
        return Messages(
            values,
            self._keys(batch) if how.key else None,
            None if how.partition is None else self._partitions(batch.column(how.partition)),
            None if how.timestamp is None else _milliseconds(batch.column(how.timestamp)),
            _headers(batch.column(how.headers))
            if isinstance(how.headers, str)
            else ([list(constant)] * len(values) if constant else None),
            batch.nbytes,
        )

    def _keys(self, batch: pa.RecordBatch) -> list[bytes | None]:
        """One column of text or bytes as it is; other keys as JSON: a value, or an object of several."""
        names = self._encoding.key
        column = batch.column(names[0])
        if len(names) > 1:
            column = json_texts(batch.select(names))
        elif pa.types.is_dictionary(column.type):
            column = column.cast(column.type.value_type)
        if not _is_bytes(column.type):
            column = pc.if_else(column.is_valid(), json_values(column), pa.scalar(None, pa.large_string()))
        found: list[bytes | None] = column.cast(pa.large_binary()).to_pylist()
        return found

    def _partitions(self, column: pa.Array) -> list[int]:
        if column.null_count or (len(column) and pc.min(column).as_py() < 0):
            raise DataError(
                f"{self._where} expected a partition number in column {self._encoding.partition!r}, got "
                f"{'null' if column.null_count else pc.min(column).as_py()}; fill it, or leave partition= out"
            )
        found: list[int] = column.to_pylist()
        return found

    def _avro_values(self, value: pa.RecordBatch) -> list[bytes | None]:
        import pyruhvro

        try:
            chunks = pyruhvro.serialize_record_batch(value, self._avro, 1)
        except BaseException as error:
            # It panics over what does not fit its schema: a `BaseException` of its own.
            if not isinstance(error, Exception) and type(error).__name__ != "PanicException":
                raise
            raise DataError(
                f"{self._where} cannot encode {describe(value.schema)} by the Avro schema {self._avro[:200]}: "
                f"{(str(error).splitlines() or [''])[0]}"
            ) from error
        found = [each for chunk in chunks for each in chunk.to_pylist()]
        return [self._frame + each for each in found] if self._frame else found


def avro_schema(schema: pa.Schema, name: str = "row") -> str:
    """The Avro record schema (JSON text) for columns of simple types, all of which may be null.

    Raises `ConfigError` for others: there is more than one way to write those.
    """
    fields = []
    for field in schema:
        is_time = pa.types.is_timestamp(field.type)
        kind = _AVRO_TYPES.get(f"timestamp[{field.type.unit}]" if is_time else str(field.type))
        if kind is None:
            raise ConfigError(
                f'write_kafka(format="avro") knows no Avro type for column {field.name!r} of type {field.type}; '
                "give avro_schema=, or cast the column"
            )
        fields.append({"name": field.name, "type": ["null", kind], "default": None})
    return json.dumps({"type": "record", "name": name, "fields": fields})


def fixed_headers(headers: Mapping[str, str | bytes]) -> tuple[Header, ...]:
    return tuple((k, v.encode() if isinstance(v, str) else bytes(v)) for k, v in headers.items())


def _streams(batch: pa.RecordBatch) -> list[bytes | None]:
    """Arrow IPC streams of a part of the rows each, with their schema."""
    found: list[bytes | None] = []
    for start in range(0, batch.num_rows, _ARROW_ROWS_MAX):
        out = pa.BufferOutputStream()
        with pa.ipc.new_stream(out, batch.schema) as writer:
            writer.write_batch(batch.slice(start, _ARROW_ROWS_MAX))
        found.append(out.getvalue().to_pybytes())
    return found


def _milliseconds(column: pa.Array) -> list[int]:
    in_ms = column.cast(pa.timestamp("ms", column.type.tz), safe=False).cast(pa.int64())
    found: list[int] = pc.fill_null(in_ms, 0).to_pylist()
    return found


def _headers(column: pa.Array) -> list[list[Header]]:
    found = []
    for value in column.to_pylist():
        pairs = value.items() if isinstance(value, dict) else value or ()
        found.append([(str(k), v.encode() if isinstance(v, str) else v) for k, v in pairs])
    return found


def _is_bytes(kind: pa.DataType) -> bool:
    return any(
        check(kind)
        for check in (pa.types.is_string, pa.types.is_large_string, pa.types.is_binary, pa.types.is_large_binary)
    )


def columns_of(option: str, value: str | Sequence[str] | None) -> tuple[str, ...]:
    """``"a"``, ``["a", "b"]`` or None as a tuple. Raises `ConfigError`."""
    names = () if value is None else (value,) if isinstance(value, str) else tuple(value)
    if not all(isinstance(name, str) for name in names) or len(set(names)) != len(names):
        raise ConfigError(f"write_kafka({option}) takes a column name or several different ones, got {value!r}")
    return names
