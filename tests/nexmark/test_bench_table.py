"""The table of the benchmark: it fits, nothing is cut off, and every query stands beside its bar."""

from __future__ import annotations

import io

from rich.console import Console

from benchmarks.nexmark import JOINS, WIDTH, bar, table_of
from benchmarks.nexmark_flink import FlinkRun
from examples.nexmark.__main__ import cores
from examples.nexmark.check import Difference
from examples.nexmark.generator import Nexmark
from examples.nexmark.queries import ALL
from examples.nexmark.run import How, Outcome

EQUAL = Difference(1_840_000, 1_840_000, 0, 0)


def shown(outcomes: list[Outcome], flink: dict[str, FlinkRun]) -> str:
    out = io.StringIO()
    Console(file=out, width=WIDTH).print(table_of(outcomes, flink, Nexmark(events=100_000_000), How(parallelism=16)))
    return out.getvalue()


def test_a_row_a_query_and_nothing_is_cut_off() -> None:
    outcomes = [Outcome(name, 92_000_000, 1.0, 0.5, EQUAL, 0, 3) for name in ALL]
    flink = {name: FlinkRun(name, 123.4) for name in ALL if name != "q6"}
    text = shown(outcomes, flink)
    assert "…" not in text
    assert max(map(len, text.splitlines())) <= WIDTH
    assert len([line for line in text.splitlines() if "│ q" in line]) == len(ALL)
    assert "Flink tells every change" in " ".join(text.split())
    (q0,) = [line for line in text.splitlines() if "│ q0 " in line]
    assert [cell.strip() for cell in q0.strip("│").split("│")] == [
        "q0", "92.00", "92.00", f"{92 / cores(How(parallelism=16)):.2f}", "184.00", "0.75", "123.4", "3 x met", "equal"
    ]  # fmt: skip


def test_bars_are_three_times_but_for_joins_and_a_query_that_falls_short_is_marked() -> None:
    assert {bar(name) for name in JOINS} == {1.0}
    assert {bar(name) for name in ALL if name not in JOINS} == {3.0}
    outcomes = [Outcome(name, 1_000_000, 1.0, 0.5, EQUAL, 0, 3) for name in ("q18", "q20")]
    text = shown(outcomes, {name: FlinkRun(name, 2.0) for name in ("q18", "q20")})
    q18, q20 = (line for line in text.splitlines() if "│ q" in line)
    assert "3 x MISSED" in q18
    assert "1 x met" in q20


def test_a_wrong_result_is_told_in_full() -> None:
    text = shown([Outcome("q1", 1_000, 1.0, 0.5, Difference(10, 9, 0, 1), 0, 3)], {})
    assert "missing" in text
    assert "…" not in text
