"""Avro messages, bare or with the framing of a schema registry (a zero byte, the schema id in four, the datum).

Decoded by `pyruhvro` (the extra ``rayflow[avro]``) straight into Arrow. It has no bytes, fixed and decimal, and no
unions but of one type and null: schemas with these are refused while the flow is built.
An Avro datum does not say its schema. The one it was written with must be known, or it is read as something else:
bare messages are all of one schema; framed ones name it by id, and ids never change their meaning, so that a replay
reads the same (rule R2). A field that the writer did not have takes the reader's default, or null.
"""

from __future__ import annotations

import json
import urllib.error
import urllib.request
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import pyarrow as pa

from rayflow.errors import ConfigError, ConnectorError
from rayflow.operators.kafka.formats import Decoded, Format, Malformed, fitted
from rayflow.operators.sources.schemas import plain

_REGISTRY_TIMEOUT_S = 5.0
_FRAME_BYTES = 5
_NO_FRAME = b"\xff" * _FRAME_BYTES


@dataclass(frozen=True)
class AvroFormat(Format):
    """Bare Avro data, all written with the record schema ``avro`` (JSON text). Bytes behind a datum are not noticed."""

    avro: str

    def __post_init__(self) -> None:
        _arrow_schema(self.avro)

    @property
    def schema(self) -> pa.Schema:
        return plain(_arrow_schema(self.avro))

    def decode(self, values: Sequence[bytes]) -> Decoded:
        return Decoded(fitted(_deserialize(values, self.avro), self.schema))


@dataclass(frozen=True)
class RegistryAvroFormat(Format):
    """Avro data in the framing of Confluent's schema registry; ``avro`` is the schema to read them as.

    ``registry`` gives the schemas they were written with: a mapping of ids, or the URL of a registry, which is asked
    once for each id (with credentials, where it wants some, as ``https://user:password@host``).
    """

    avro: str
    registry: Mapping[int, str] | str = field(repr=False)
    _known: dict[int, str] = field(default_factory=dict, init=False, repr=False, compare=False)

    def __post_init__(self) -> None:
        _arrow_schema(self.avro)
        if not isinstance(self.registry, str):
            for written in self.registry.values():
                _arrow_schema(written)

    @property
    def schema(self) -> pa.Schema:
        return plain(_arrow_schema(self.avro))

    def decode(self, values: Sequence[bytes]) -> Decoded:
        heads = b"".join([value[:_FRAME_BYTES] if len(value) >= _FRAME_BYTES else _NO_FRAME for value in values])
        frames = np.frombuffer(heads, np.dtype([("magic", "u1"), ("id", ">u4")]))
        if frames["magic"].any():
            raise Malformed(
                "expected the framing of a schema registry: a zero byte and the id of a schema in four bytes"
            )
        data = [value[_FRAME_BYTES:] for value in values]
        edges = np.flatnonzero(np.diff(frames["id"])) + 1
        pieces = [
            self._piece(int(frames["id"][first]), data[first:last])
            for first, last in zip([0, *edges], [*edges, len(data)], strict=True)
        ]
        return Decoded(pa.concat_batches(pieces))

    def _piece(self, schema_id: int, data: Sequence[bytes]) -> pa.RecordBatch:
        written = self._written(schema_id)
        batch = _deserialize(data, written)
        if written == self.avro:
            return fitted(batch, self.schema)
        for each in json.loads(self.avro)["fields"]:
            if each["name"] not in batch.schema.names and each.get("default") is not None:
                kind = self.schema.field(each["name"]).type
                batch = batch.append_column(each["name"], pa.array([each["default"]] * len(data), kind))
        return fitted(batch, self.schema)

    def _written(self, schema_id: int) -> str:
        if not isinstance(self.registry, str):
            if schema_id not in self.registry:
                raise Malformed(f"it is of schema {schema_id}; registry= has {sorted(self.registry)}: add it")
            return self.registry[schema_id]
        if schema_id not in self._known:
            self._known[schema_id] = _fetch(self.registry, schema_id)
        return self._known[schema_id]


def _fetch(url: str, schema_id: int) -> str:
    from urllib.parse import unquote, urlsplit

    parts = urlsplit(url)
    if parts.scheme not in ("http", "https"):
        raise ConfigError(
            f'registry must be a URL such as "http://host:8081" or a mapping of ids, got {parts.scheme!r}'
        )
    place = f"{parts.scheme}://{parts.netloc.rpartition('@')[2]}{parts.path.rstrip('/')}/schemas/ids/{schema_id}"
    request = urllib.request.Request(place, headers={"Accept": "application/json"})
    if parts.username is not None:
        import base64

        login = f"{unquote(parts.username)}:{unquote(parts.password or '')}".encode()
        request.add_header("Authorization", "Basic " + base64.b64encode(login).decode())
    try:
        with urllib.request.urlopen(request, timeout=_REGISTRY_TIMEOUT_S) as answer:
            schema = json.load(answer)["schema"]
    except urllib.error.HTTPError as error:
        if error.code == 404:
            raise Malformed(f"it is of schema {schema_id}, which the registry does not have") from error
        if error.code in (401, 403):
            raise ConfigError(f"the schema registry refuses {place}: {error}; check its credentials") from error
        raise ConnectorError(f"the schema registry did not give {place}: {error}; it is asked again") from error
    except (OSError, ValueError, KeyError) as error:
        raise ConnectorError(f"the schema registry did not give {place}: {error}; it is asked again") from error
    return str(schema)


def _library() -> Any:
    try:
        import pyruhvro
    except ImportError as error:
        raise ConfigError(
            "Avro messages need the library pyruhvro, which is not installed; pip install 'rayflow[avro]'"
        ) from error
    return pyruhvro


def _arrow_schema(avro: str) -> pa.Schema:
    """The Arrow schema of an Avro record schema; `ConfigError` for what cannot be read."""
    if not isinstance(avro, str):
        raise ConfigError(f"an Avro format needs schema= as JSON text, got {type(avro).__name__}")
    try:
        parsed = json.loads(avro)
    except ValueError as error:
        raise ConfigError(f"the Avro schema is no JSON: {error}") from error
    if not isinstance(parsed, dict) or parsed.get("type") != "record":
        raise ConfigError(f"the Avro schema must be a record, got {avro[:200]}")
    _check(parsed, parsed.get("name", "record"))
    try:
        return _library().deserialize_array([], avro).schema
    except ConfigError:
        raise
    except BaseException as error:
        raise ConfigError(f"the Avro schema cannot be read: {_reason(error)}") from error


def _check(kind: Any, path: str) -> None:
    """Refuse what pyruhvro does not have: it would panic at the first message."""
    if isinstance(kind, list):
        real = [each for each in kind if each != "null"]
        if len(real) > 1:
            raise ConfigError(f"Avro field {path!r} is a union of {len(real)} types; only [null, type] can be read")
        for each in real:
            _check(each, path)
    elif isinstance(kind, dict):
        if kind.get("logicalType") == "decimal":
            raise ConfigError(f"Avro field {path!r} is a decimal, which cannot be read; write it as a string")
        if kind.get("type") == "record":
            for each in kind["fields"]:
                _check(each["type"], f"{path}.{each['name']}")
        elif kind.get("type") == "array":
            _check(kind["items"], path)
        elif kind.get("type") == "map":
            _check(kind["values"], path)
        else:
            _check(kind.get("type"), path)
    elif kind in ("bytes", "fixed"):
        raise ConfigError(f"Avro field {path!r} is of type {kind}, which cannot be read; write it as a string")


def _deserialize(values: Sequence[bytes], avro: str) -> pa.RecordBatch:
    try:
        batch = _library().deserialize_array(list(values), avro)
    except BaseException as error:
        raise Malformed(_reason(error)) from error
    if batch.num_rows != len(values):
        raise Malformed(f"{len(values)} messages gave {batch.num_rows} rows")
    return batch


def _reason(error: BaseException) -> str:
    """A panic of the library is a `BaseException` of its own; what is not its doing goes on as it is."""
    if not isinstance(error, Exception) and type(error).__name__ != "PanicException":
        raise error
    return (str(error).splitlines() or [type(error).__name__])[0]
