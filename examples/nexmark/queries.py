"""All queries that there are, by name and in the order of their numbers."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Final

from examples.nexmark import grouped, joined, ranked, stateless
from examples.nexmark.query import QUERIES, Query

MODULES: Final = (stateless, grouped, ranked, joined)
ALL: Final[Mapping[str, Query]] = dict(sorted(QUERIES.items(), key=lambda item: int(item[0][1:])))
MISSING: Final = tuple(f"q{i}" for i in range(23) if f"q{i}" not in ALL)
"""Queries of the standard whose operators are not there yet."""
