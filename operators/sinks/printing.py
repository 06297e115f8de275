"""Prints rows as they come. At least once: after a failure rows that were printed before are printed again."""

from __future__ import annotations

import sys
from dataclasses import KW_ONLY, dataclass
from typing import ClassVar

import pyarrow as pa

from rayflow.errors import ConfigError
from rayflow.operators.base import Committer, Guarantee, SinkOperator

_CELL_MAX = 40


@dataclass(frozen=True, slots=True)
class PrintSink:
    """Prints at most ``limit`` rows in each subtask (None: all), a table for each batch, to standard output."""

    limit: int | None = 100
    guarantee: ClassVar[Guarantee] = "at_least_once"
    _: KW_ONLY
    title: str = ""

    def __post_init__(self) -> None:
        if self.limit is not None and self.limit < 1:
            raise ConfigError(f"print(limit) must be at least 1 or None, got {self.limit}")

    @property
    def stateful(self) -> bool:
        return False

    def build(self) -> PrintOperator:
        return PrintOperator(self)

    def committer(self) -> Committer | None:
        return None


class PrintOperator(SinkOperator):
    def __init__(self, sink: PrintSink) -> None:
        self._sink = sink
        self._seen = 0
        self._printed = 0

    def process(self, batch: pa.RecordBatch, input_index: int) -> None:
        self._seen += batch.num_rows
        room = batch.num_rows if self._sink.limit is None else self._sink.limit - self._printed
        shown = batch.slice(0, max(0, room))
        if shown.num_rows:
            self._printed += shown.num_rows
            self._say("\n".join(table_lines(shown)))

    def on_end(self) -> None:
        if self._seen > self._printed:
            self._say(f"… and {self._seen - self._printed:,} more rows")

    def _say(self, text: str) -> None:
        who = [self._sink.title] if self._sink.title else []
        if self.ctx.parallelism > 1:
            who.append(f"[{self.ctx.subtask}]")
        prefix = " ".join(who)
        lines = [f"{prefix} {line}" if prefix else line for line in text.splitlines()]
        sys.stdout.write("\n".join(lines) + "\n")  # one write, so that subtasks do not mix within a table
        sys.stdout.flush()


def table_lines(batch: pa.RecordBatch) -> list[str]:
    """The batch as aligned text, header first; numbers to the right, long cells cut."""
    columns = []
    for field, column in zip(batch.schema, batch.columns, strict=True):
        cells = [field.name, *(_cell(value) for value in column.to_pylist())]
        width = max(map(len, cells))
        number = pa.types.is_integer(field.type) or pa.types.is_floating(field.type) or pa.types.is_decimal(field.type)
        columns.append([cell.rjust(width) if number else cell.ljust(width) for cell in cells])
    lines = ["  ".join(row).rstrip() for row in zip(*columns, strict=True)]
    rule = "  ".join("─" * len(column[0]) for column in columns)
    return [lines[0], rule, *lines[1:]] if lines else [f"({batch.num_rows} rows without columns)"]


def _cell(value: object) -> str:
    if value is None:
        return "null"
    text = f"{value:.6g}" if isinstance(value, float) else str(value)
    text = text.replace("\n", "⏎")
    return text if len(text) <= _CELL_MAX else text[: _CELL_MAX - 1] + "…"
