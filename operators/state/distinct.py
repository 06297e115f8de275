"""The distinct keys of a batch, and which of them each row has."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc

from rayflow.operators.grouping import Int64Array


def distinct(columns: Sequence[pa.Array]) -> tuple[Int64Array, Int64Array]:
    """(row in which each distinct key first appears, in that order; position of each row's key among them).

    ``columns`` as `rayflow.operators.grouping.plain_key` gives them; a null is a key like any other.
    """
    codes, n = _codes(columns[0])
    for column in columns[1:]:
        more, m = _codes(column)
        # n and m are at most the number of rows, so the product is far from 64 bits.
        codes, n = _codes(pa.array(codes * m + more))
    first = np.full(n, len(codes), np.int64)
    first[codes[::-1]] = np.arange(len(codes) - 1, -1, -1)
    return first, codes


def index_in(columns: Sequence[pa.Array], keys: Sequence[pa.Array]) -> Int64Array:
    """The position among ``keys`` (distinct, of the same types) of every row; each must be there."""
    _, codes = distinct([pa.concat_arrays([key, column]) for key, column in zip(keys, columns, strict=True)])
    found = codes[len(keys[0]) :]
    if len(found) and int(found.max()) >= len(keys[0]):
        raise AssertionError("a row has a key that was not asked for")
    return found


def _codes(column: pa.Array) -> tuple[Int64Array, int]:
    encoded = pc.dictionary_encode(column, null_encoding="encode")
    return encoded.indices.cast(pa.int64()).to_numpy(), len(encoded.dictionary)


__all__ = ["distinct", "index_in"]
