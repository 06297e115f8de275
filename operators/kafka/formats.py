"""Formats of Kafka messages: many values in, one record batch out, decoded by column.

A format decodes a list of values at once and says `Malformed` when one of them cannot be read; who calls finds out
which by halving. Columns that a schema does not have are left out, those that a message does not have are null, and a
value of another type is malformed: so producers may add and drop columns while a job runs.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Sequence
from dataclasses import dataclass

import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.json as pj

from rayflow.errors import ConfigError
from rayflow.operators.sources.schemas import plain

_JSON_BYTES_MAX = 512 * 1024 * 1024


class Malformed(Exception):
    """Some value of a list cannot be read; the message says why, in words for people."""


@dataclass(frozen=True, slots=True)
class Decoded:
    """Rows of some messages."""

    batch: pa.RecordBatch
    rows: Sequence[int] | None = None
    """How many rows each message gave; None: one each."""


class Format(ABC):
    """How values of messages become rows. Immutable and picklable."""

    messages_max: int = 10_000
    """Decoded at once at most."""

    @property
    @abstractmethod
    def schema(self) -> pa.Schema:
        """The columns that come out."""

    @abstractmethod
    def decode(self, values: Sequence[bytes]) -> Decoded:
        """Rows in the order of the values, which are not None. Raises `Malformed`."""


@dataclass(frozen=True)
class RawFormat(Format):
    """The value as it is, in one binary column ``value``."""

    @property
    def schema(self) -> pa.Schema:
        return pa.schema([("value", pa.binary())])

    def decode(self, values: Sequence[bytes]) -> Decoded:
        return Decoded(pa.RecordBatch.from_arrays([pa.array(values, pa.binary())], schema=self.schema))


@dataclass(frozen=True)
class JsonFormat(Format):
    """One JSON object a message, pretty-printed or not, read with the columns and types of ``columns``.

    Timestamps and dates are ISO 8601 texts; decimals texts or numbers. All values are parsed as one document a line
    ``{"v": <value>}``: what is no single object breaks its line, so that no message can pass for another one's row.
    """

    columns: pa.Schema

    def __post_init__(self) -> None:
        if not isinstance(self.columns, pa.Schema) or not len(self.columns):
            raise ConfigError(
                f'format="json" needs schema=pa.schema([...]) with a column at least, got {self.columns!r}'
            )
        schema = plain(self.columns)
        if len(set(schema.names)) != len(schema.names):
            raise ConfigError(f"a schema must name each column once, got {schema.names}")
        object.__setattr__(self, "columns", schema)
        try:
            self.decode([b"{}"])
        except Malformed as error:
            raise ConfigError(f'format="json" cannot read columns of these types: {error}; got {schema}') from error

    @property
    def schema(self) -> pa.Schema:
        return self.columns

    def decode(self, values: Sequence[bytes]) -> Decoded:
        text = b'{"v":' + b'}\n{"v":'.join(values) + b"}\n"
        if len(text) > _JSON_BYTES_MAX and len(values) > 1:
            half = len(values) // 2
            return Decoded(pa.concat_batches([self.decode(values[:half]).batch, self.decode(values[half:]).batch]))
        if not text.isascii():  # pyarrow takes any bytes into its strings
            try:
                text.decode()
            except UnicodeDecodeError as error:
                raise Malformed(f"it is no UTF-8: {error.reason}") from error
        read_as = pa.struct([pa.field(f.name, _json_type(f.type)) for f in self.columns])
        try:
            table = pj.read_json(
                pa.BufferReader(text),
                read_options=pj.ReadOptions(use_threads=False, block_size=len(text) + 64),
                parse_options=pj.ParseOptions(
                    explicit_schema=pa.schema([("v", read_as)]), unexpected_field_behavior="ignore"
                ),
            )
            rows = table.column("v").combine_chunks()
            if len(rows) != len(values) or rows.null_count:
                raise Malformed("expected one JSON object a message")
            arrays = [
                column if column.type == field.type else column.cast(field.type)
                for column, field in zip(rows.flatten(), self.columns, strict=True)
            ]
        except (pa.ArrowException, NotImplementedError) as error:
            raise Malformed(_plainly(error)) from error
        return Decoded(pa.RecordBatch.from_arrays(arrays, schema=self.columns))


@dataclass(frozen=True)
class ArrowFormat(Format):
    """Arrow IPC: each message a stream of its own (schema and batches), or one bare record batch of ``columns``.

    A message gives as many rows as it has; a hundred or more are worth their schema. Streams are matched by the names
    of columns, bare batches have exactly these columns.
    """

    columns: pa.Schema
    messages_max = 256

    def __post_init__(self) -> None:
        if not isinstance(self.columns, pa.Schema) or not len(self.columns):
            raise ConfigError(f'format="arrow" needs schema=pa.schema([...]), got {self.columns!r}')
        object.__setattr__(self, "columns", self.columns.remove_metadata())

    @property
    def schema(self) -> pa.Schema:
        return plain(self.columns)

    def decode(self, values: Sequence[bytes]) -> Decoded:
        batches: list[pa.RecordBatch] = []
        rows: list[int] = []
        for value in values:
            before = len(batches)
            try:
                batches += self._batches(value)
            except (pa.ArrowException, OSError, ValueError, EOFError) as error:
                raise Malformed(_plainly(error)) from error
            rows.append(sum(batch.num_rows for batch in batches[before:]))
        schema = self.schema
        return Decoded(pa.concat_batches(batches) if batches else pa.RecordBatch.from_pylist([], schema=schema), rows)

    def _batches(self, value: bytes) -> list[pa.RecordBatch]:
        kind = pa.ipc.read_message(value).type
        if kind == "record batch":
            found = [pa.ipc.read_record_batch(pa.py_buffer(value), self.columns)]
        elif kind == "schema":
            found = list(pa.ipc.open_stream(value))
        else:
            raise Malformed(f"expected an Arrow stream or record batch, got a message of type {kind!r}")
        for batch in found:
            batch.validate(full=True)  # bytes from outside: offsets that point anywhere would end the process
        return [fitted(batch, self.schema) for batch in found]


def fitted(batch: pa.RecordBatch, schema: pa.Schema) -> pa.RecordBatch:
    """The columns of ``schema`` by name: others left out, missing ones null, wider types where nothing is lost.

    Raises `Malformed` for a type that does not fit.
    """
    arrays = []
    for field in schema:
        at = batch.schema.get_field_index(field.name)
        if at < 0:
            arrays.append(pa.nulls(batch.num_rows, field.type))
            continue
        column = batch.column(at)
        if column.type != field.type and not _widens(column.type, field.type):
            raise Malformed(f"column {field.name!r} is {column.type}, expected {field.type}")
        arrays.append(column if column.type == field.type else pc.cast(column, field.type))
    return pa.RecordBatch.from_arrays(arrays, schema=schema)


def _widens(narrow: pa.DataType, wide: pa.DataType) -> bool:
    if pa.types.is_dictionary(narrow):
        return bool(narrow.value_type == wide)
    if pa.types.is_integer(narrow) and pa.types.is_integer(wide):
        fits = narrow.bit_width <= wide.bit_width
        return bool(fits and pa.types.is_signed_integer(narrow) == pa.types.is_signed_integer(wide))
    if pa.types.is_floating(wide):
        return bool(
            pa.types.is_integer(narrow) or (pa.types.is_floating(narrow) and narrow.bit_width <= wide.bit_width)
        )
    return bool(pa.types.is_null(narrow) or {str(narrow), str(wide)} <= {"string", "large_string"})


def _json_type(kind: pa.DataType) -> pa.DataType:
    """What pyarrow is to read for a type: it reads no dates from texts; they pass as timestamps."""
    if pa.types.is_date(kind):
        return pa.timestamp("s")
    if pa.types.is_struct(kind):
        return pa.struct([pa.field(f.name, _json_type(f.type)) for f in kind])
    if pa.types.is_list(kind):
        return pa.list_(_json_type(kind.value_type))
    return kind


def _plainly(error: Exception) -> str:
    """pyarrow's rows and columns are those of its document, which say nothing to anybody."""
    message = (str(error).splitlines() or [type(error).__name__])[0]
    message = message.replace("Column(/v/", "Column(").replace("Column(/v)", "the message")
    return message.split(" in row ")[0]
