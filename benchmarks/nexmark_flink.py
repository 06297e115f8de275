"""Nexmark in Flink SQL, on the same machine and the same events; for `benchmarks.nexmark`.

`apache-flink` from PyPI is installed in an environment of its own by `environment`, for it needs other versions of
many packages. Flink reads the events from CSV files, the only format of its package that holds them, and throws its
results away; parallelism, checkpoint interval and watermark delay are those of the rayflow runs.
"""

from __future__ import annotations

import json
import re
import shutil
import subprocess
import sys
import tempfile
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.csv

from benchmarks.nexmark_flink_sql import FLINK_SQL
from examples.nexmark.generator import Kind, Nexmark, schema

FOLDER = Path(tempfile.gettempdir()) / "rayflow-flink"
FILE_ROWS = 250_000


@dataclass(frozen=True, slots=True)
class FlinkRun:
    query: str
    seconds: float | None
    """Run time of the job by Flink's own count; None: it failed."""
    error: str = ""


def available() -> str:
    """Why Flink cannot be run here; empty if it can."""
    return "" if shutil.which("java") else "there is no java"


def environment(folder: Path = FOLDER) -> Path:
    """The Python of an environment with apache-flink, made if it is not there; takes a minute and 2 GB."""
    python = folder / "env" / "bin" / "python"
    done = folder / "installed"
    if not done.exists():
        folder.mkdir(parents=True, exist_ok=True)
        subprocess.run([sys.executable, "-m", "venv", "--clear", str(folder / "env")], check=True)
        subprocess.run(
            [str(python), "-m", "pip", "install", "-q", "--disable-pip-version-check", "apache-flink"],
            check=True, stdout=subprocess.DEVNULL,
        )  # fmt: skip
        done.touch()
    return python


def run(
    queries: Iterable[str], config: Nexmark, *, parallelism: int, interval_ms: int, delay_ms: int, folder: Path
) -> list[FlinkRun]:
    """One query after another in one Flink process, behind a first one that warms it up and is not counted."""
    python = environment()
    wanted = [name for name in queries if name in FLINK_SQL]
    task = {
        "tables": {kind.value: _table(config, kind, folder / kind.value) for kind in Kind},
        "queries": {"warm": _quoted("q2")} | {name: _quoted(name) for name in wanted},
        "parallelism": parallelism,
        "interval_ms": interval_ms,
        "delay_ms": delay_ms,
    }
    job = Path(__file__).with_name("nexmark_flink_job.py")
    done = subprocess.run(
        [str(python), str(job)], input=json.dumps(task), stdout=subprocess.PIPE, text=True, check=False, cwd=folder
    )
    found: dict[str, FlinkRun] = {}
    for line in done.stdout.splitlines():
        if line.startswith("{"):
            told = json.loads(line)
            found[told["query"]] = FlinkRun(told["query"], told.get("seconds"), told.get("error", ""))
    missing = f"Flink ended with exit code {done.returncode} before this query"
    return [found.get(name, FlinkRun(name, None, missing)) for name in wanted]


def _quoted(name: str) -> str:
    """``dateTime`` is a word of Flink's SQL."""
    return re.sub(r"\bdateTime\b", "`dateTime`", FLINK_SQL[name])


def _table(config: Nexmark, kind: Kind, folder: Path) -> dict[str, Any]:
    """Event times of Flink SQL have milliseconds."""
    folder.mkdir(parents=True)
    options = pa.csv.WriteOptions(include_header=False, quoting_style="needed")
    in_milliseconds = pa.schema(
        [(f.name, pa.timestamp("ms") if pa.types.is_timestamp(f.type) else f.type) for f in schema(kind)]
    )
    rows = config.count(kind)
    for i, first in enumerate(range(0, rows, FILE_ROWS)):
        batch = config.batch(kind, first, min(FILE_ROWS, rows - first))
        pa.csv.write_csv(batch.cast(in_milliseconds, safe=False), folder / f"{i:06d}.csv", options)
    columns = ", ".join(f"`{field.name}` {_sql_type(field.type)}" for field in schema(kind))
    return {"columns": columns, "files": str(folder)}


def _sql_type(kind: pa.DataType) -> str:
    return "timestamp(3)" if pa.types.is_timestamp(kind) else "bigint" if pa.types.is_integer(kind) else "string"
