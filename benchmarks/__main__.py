"""`make bench`: run every benchmark in a process of its own, pass its figures on, end with a table.

Exit code 0 when every module ran, gave at least one figure, and every figure is ok; 1 otherwise.
Name modules to run only these: `python -m benchmarks recovery credit_bound`.
"""

from __future__ import annotations

import subprocess
import sys
from collections.abc import Sequence
from dataclasses import dataclass

from rich.console import Console
from rich.table import Table

from benchmarks.figures import Figure, parse

MODULES = (
    "window_vs_duckdb",
    "sliding_windows",
    "running_sum",
    "big_state",
    "join_state",
    "restore_ranges",
    "many_checkpoints",
    "parquet_sink",
    "exchange",
    "postgres_sink",
    "recovery",
    "kafka_source",
    "credit_bound",
    "memory_flat",
    "kill_runs",
    "simulator",
)


@dataclass(frozen=True, slots=True)
class ModuleRun:
    """What one benchmark module gave."""

    module: str
    figures: tuple[Figure, ...]
    exit_code: int

    @property
    def failure(self) -> str | None:
        """Why the run as such is no measurement; None when it is one."""
        if self.exit_code != 0:
            return f"{self.module} ended with exit code {self.exit_code}"
        if not self.figures:
            return f"{self.module} gave no figure"
        return None


def run_module(module: str, *, package: str = "benchmarks") -> ModuleRun:
    """Run `python -m <package>.<module>`, streaming: figures to stdout, anything else it prints to stderr."""
    figures = []
    command = [sys.executable, "-m", f"{package}.{module}"]
    with subprocess.Popen(command, stdout=subprocess.PIPE, text=True) as process:
        assert process.stdout is not None
        for line in process.stdout:
            figure = parse(line)
            if figure is None:
                print(line, end="", file=sys.stderr, flush=True)
            else:
                print(line, end="", flush=True)
                figures.append(figure)
    return ModuleRun(module, tuple(figures), process.returncode)


def table_of(runs: Sequence[ModuleRun]) -> Table:
    """All figures, one row each; a module that failed has a row of its own."""
    table = Table(title="rayflow benchmarks")
    table.add_column("figure")
    table.add_column("value", justify="right")
    table.add_column("unit")
    table.add_column("bar")
    table.add_column("ok")
    for run in runs:
        for figure in run.figures:
            value = f"{figure.value:,.4g}" if isinstance(figure.value, float) else str(figure.value)
            bar = "" if figure.bar is None else str(figure.bar)
            table.add_row(figure.figure, value, figure.unit, bar, "yes" if figure.ok else "NO")
        if run.failure:
            table.add_row(run.failure, "", "", "", "NO")
        table.add_section()
    return table


def passed(runs: Sequence[ModuleRun]) -> bool:
    return all(run.failure is None and all(figure.ok for figure in run.figures) for run in runs)


def main(arguments: Sequence[str]) -> int:
    unknown = sorted(set(arguments) - set(MODULES))
    if unknown:
        print(f"no benchmark {', '.join(unknown)}; there are {', '.join(MODULES)}", file=sys.stderr)
        return 2
    runs = [run_module(module) for module in arguments or MODULES]
    Console().print(table_of(runs))
    return 0 if passed(runs) else 1


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
