"""What a query is: a flow over the events, and the SQL that says the same over the finished tables."""

from __future__ import annotations

import inspect
from collections.abc import Callable
from dataclasses import dataclass
from typing import Final

from examples.nexmark.generator import Kind, Nexmark
from examples.nexmark.source import Events
from rayflow.stream import Stream

Build = Callable[[Events], Stream]


@dataclass(frozen=True, slots=True)
class Query:
    name: str
    build: Build
    sql: str
    """For DuckDB, over the tables ``person``, ``auction`` and ``bid``."""
    reads: tuple[Kind, ...]
    reading: str
    """For DuckDB: how to read the rows of the flow, the table ``output``, to have the result. A flow that tells how
    the result changes as rows come is read by its last word."""

    @property
    def title(self) -> str:
        """What it asks."""
        return (inspect.getdoc(self.build) or "").partition("\n")[0]

    def rows(self, config: Nexmark) -> int:
        """That the flow reads."""
        return sum(config.count(kind) for kind in self.reads)


QUERIES: Final[dict[str, Query]] = {}
"""By name, filled by the modules of the queries (`examples.nexmark.queries`)."""


def query(sql: str, *, reads: tuple[Kind, ...] = (Kind.BID,), reading: str = "from output") -> Callable[[Build], Build]:
    """Register a flow under the name of its function."""

    def register(build: Build) -> Build:
        name = build.__name__
        QUERIES[name] = Query(name, build, sql, reads, reading)
        return build

    return register
