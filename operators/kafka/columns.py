"""Columns that tell of a message what is not in its value: ``_topic``, ``_partition``, ``_offset``, ``_timestamp``,
``_key``, ``_headers``."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, Final

import numpy as np
import pyarrow as pa

from rayflow.errors import ConfigError

HEADERS: Final = pa.list_(pa.struct([("name", pa.string()), ("value", pa.binary())]))
TYPES: Final[dict[str, pa.DataType]] = {
    "_topic": pa.string(),
    "_partition": pa.int32(),
    "_offset": pa.int64(),
    "_timestamp": pa.timestamp("ms", "UTC"),
    "_key": pa.binary(),
    "_headers": HEADERS,
}


def chosen(metadata: bool | Sequence[str]) -> tuple[str, ...]:
    """The columns asked for; `ConfigError` for one that there is not."""
    if isinstance(metadata, bool):
        return tuple(TYPES) if metadata else ()
    if isinstance(metadata, str):
        metadata = [metadata]
    unknown = [name for name in metadata if name not in TYPES]
    if unknown or len(set(metadata)) != len(metadata):
        raise ConfigError(
            f"read_kafka(metadata) must name columns among {', '.join(TYPES)}, each once, got {list(metadata)}"
        )
    return tuple(metadata)


def column(name: str, messages: Sequence[Any]) -> pa.Array:
    """The column for messages of one partition, of the type in `TYPES`."""
    kind = type(messages[0])
    if name == "_topic":
        return pa.repeat(messages[0].topic(), len(messages))
    if name == "_partition":
        return pa.repeat(pa.scalar(messages[0].partition(), pa.int32()), len(messages))
    if name == "_offset":
        return pa.array(np.fromiter(map(kind.offset, messages), np.int64, len(messages)))
    if name == "_timestamp":
        kinds_and_ms = np.array(list(map(kind.timestamp, messages)), np.int64)
        return pa.array(kinds_and_ms[:, 1], mask=kinds_and_ms[:, 0] == 0).view(TYPES[name])
    if name == "_key":
        return pa.array(list(map(kind.key, messages)), pa.binary())
    return pa.array([headers or [] for headers in map(kind.headers, messages)], HEADERS)
