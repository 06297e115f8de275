"""How expressions speak: the parts of their error messages."""

from __future__ import annotations

import difflib
from collections.abc import Sequence
from typing import Any, Final

import pyarrow as pa

_NAMES_SHOWN: Final = 20
_VALUES_SHOWN: Final = 5
# What to do about the kernels' most frequent complaints, by a word in them.
_REMEDIES: Final = (
    ("overflow", "cast to a wider type first"),
    ("divide by zero", "guard it with when(), or use / which gives inf"),
    ("no kernel matching", "cast one side so that the types fit"),
    ("Cannot compare timestamp", "compare with a datetime that has a zone like the column's, or cast the column"),
    ("ailed to parse", "clean the text first, or guard it with when()"),
    ("out of bounds", "filter such rows, or cast with safe=False"),
    ("truncated", "round first, or cast with safe=False"),
)


def tell_missing(name: str, schema: pa.Schema) -> str:
    """Why ``name`` is not a column of ``schema``, with the nearest name."""
    if name in schema.names:
        return f"column {name!r} stands more than once in the schema; rename one of them"
    by_lower = {known.lower(): known for known in schema.names}
    near = difflib.get_close_matches(name.lower(), by_lower, n=1, cutoff=0.6)
    question = f"did you mean {by_lower[near[0]]!r}? " if near else ""
    return f"column {name!r} is not in the schema; {question}available: {list_names(schema.names)}"


def list_names(names: Sequence[str]) -> str:
    more = len(names) - _NAMES_SHOWN
    shown = ", ".join(names[:_NAMES_SHOWN]) or "no columns"
    return f"{shown} and {more} more" if more > 0 else shown


def reason(error: BaseException) -> str:
    """The first line of an error, and what to do where we know."""
    text = (str(error).splitlines() or [type(error).__name__])[0].strip()
    remedy = next((remedy for word, remedy in _REMEDIES if word in text), None)
    return f"{text}; {remedy}" if remedy else text


def shown_option(value: Any) -> str:
    if not isinstance(value, pa.Array):
        return str(value) if isinstance(value, pa.DataType) else repr(value)
    shown = ", ".join(repr(item) for item in value[:_VALUES_SHOWN].to_pylist())
    return f"[{shown}, ...]" if len(value) > _VALUES_SHOWN else f"[{shown}]"
