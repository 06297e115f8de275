"""What `import rayflow as rf` promises: its names, their documentation, their manner of calling, and the README."""

from __future__ import annotations

import doctest
import importlib
import inspect
import os
import pkgutil
import re
import shlex
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
from click.testing import CliRunner

import rayflow as rf
from rayflow.cli.main import main
from rayflow.delta import WritesDelta
from rayflow.files import WritesFiles
from rayflow.iceberg import WritesIceberg
from rayflow.keyed import DeduplicatedStream
from rayflow.keyed_process import ConnectedStream, ProcessResult
from rayflow.ordered import SortedStream
from rayflow.sql import WritesTables
from rayflow.windowed import WindowedStream, WindowResult

README = Path(__file__).resolve().parent.parent / "README.md"

SOURCES = {
    "from_arrow", "from_generator", "read_csv", "read_json", "read_kafka", "read_parquet", "read_source", "Source",
    "topic_pattern",
}  # fmt: skip
CONNECTORS = {
    "Committer", "CommitterContext", "OperatorContext", "Polled", "RestoredState", "Sink", "SinkOperator",
    "SplitReader",
}  # fmt: skip
EXPRESSIONS = {"coalesce", "col", "lit", "when", "Expr"}
AGGREGATES = {
    "UserAggregate", "aggregate", "approx_count_distinct", "arg_max", "arg_min", "collect", "count", "count_distinct",
    "first", "last", "max", "mean", "median", "min", "quantile", "stddev", "sum", "variance",
}  # fmt: skip
FILES = {"CommittedFile", "Compacted", "committed_files", "compact_files"}
RUNNING = {"CheckpointConfig", "Flow", "JobConfig", "JobResult", "JobStatus", "Restart", "SubtaskInfo", "attach"}
STREAMS = {"KeyedStream", "Stream", "count_window", "every", "global_window", "session", "sliding", "tumbling"}
STATE = {
    "AggregatingState", "BroadcastProcess", "BroadcastState", "FrozenState", "FrozenTable", "KeyedProcess", "ListState",
    "MapState", "ReducingState", "ValueState",
}  # fmt: skip
SAVEPOINTS = {"RestorePlan", "rebucket", "restore_plan"}
CHECKPOINTS = {"Checkpoint", "StateDifference", "diff", "read_checkpoint"}
ERRORS = {
    "ClusterError", "CommitLostError", "ConfigError", "ConnectorError", "CorruptCheckpointError", "DataError",
    "FencedError", "JobCancelledError", "JobFailedError", "PlanError", "RayflowError", "StateSchemaError",
    "StorageError", "UserCodeError",
}  # fmt: skip
WARNINGS = {"GuaranteeWarning"}

METHODS = {
    rf.Stream: {
        "broadcast", "collect", "drop", "filter", "flat_map", "key_by", "lookup", "map", "map_batches",
        "map_batches_async", "print", "rebalance", "rename", "select", "show", "sort_by_event_time", "take", "to_arrow",
        "union", "with_columns", "with_event_time", "write",
    },
    WritesDelta: {"write_delta"},
    WritesIceberg: {"write_iceberg"},
    WritesFiles: {"write_csv", "write_json", "write_parquet"},
    WritesTables: {"for_each_batch", "write_duckdb", "write_postgres", "write_sqlite"},
    rf.KeyedStream: {
        "agg", "connect", "deduplicate", "join", "join_asof", "process", "reduce", "top", "window",
    },
    ProcessResult: {"side"},
    ConnectedStream: {"process"},
    DeduplicatedStream: {"late"},
    SortedStream: {"late"},
    WindowedStream: {"agg", "deduplicate", "top"},
    WindowResult: {"late"},
    rf.Checkpoint: {"info", "meta", "schema", "states", "steps", "table"},
    rf.Flow: {"explain", "plan", "run", "submit", "to_mermaid"},
}  # fmt: skip

POSITIONAL_DEFAULTS = {
    "count": {"column"}, "Stream.take": {"n"}, "Stream.show": {"n"}, "JobResult.table": {"name"},
    "every": {"period"}, "read_checkpoint": {"checkpoint"},
}  # fmt: skip
"""The one argument that the name of the function speaks of; everything else is an option."""


def public_callables() -> Iterator[tuple[str, Callable[..., Any]]]:
    """Functions of `rayflow`, and public methods of its classes (errors and `Expr` operators aside)."""
    for name in rf.__all__:
        value = getattr(rf, name)
        if inspect.isfunction(value):
            yield name, value
    for owner in (*METHODS, rf.JobResult, rf.Restart, rf.Expr):
        for name in vars(owner):
            value = getattr(owner, name)
            if not name.startswith("_") and inspect.isfunction(value):
                yield f"{owner.__name__}.{name}", value


def test_names_are_those_promised() -> None:
    assert (
        set(rf.__all__)
        == SOURCES
        | CONNECTORS
        | EXPRESSIONS
        | AGGREGATES
        | RUNNING
        | STREAMS
        | STATE
        | SAVEPOINTS
        | CHECKPOINTS
        | ERRORS
        | WARNINGS
        | FILES
    )
    assert len(rf.__all__) == len(set(rf.__all__))
    assert all(hasattr(rf, name) for name in rf.__all__)


@pytest.mark.parametrize("owner", METHODS, ids=lambda owner: owner.__name__)
def test_methods_are_those_promised(owner: type) -> None:
    own = {name for name, value in vars(owner).items() if not name.startswith("_") and not isinstance(value, property)}
    own |= {name for name, value in vars(owner).items() if name == "late" and isinstance(value, property)}
    assert own == METHODS[owner]


def test_every_public_name_is_documented() -> None:
    bare = [name for name in rf.__all__ if not inspect.getdoc(getattr(rf, name))]
    bare += [name for name, function in public_callables() if not inspect.getdoc(function)]
    # A dataclass without a docstring gets its signature as one, which says nothing.
    bare += [name for name in rf.__all__ if (inspect.getdoc(getattr(rf, name)) or "").startswith(f"{name}(")]
    assert bare == []


def test_options_are_keyword_only() -> None:
    wrong = {}
    for name, function in public_callables():
        parameters = inspect.signature(function).parameters.values()
        loose = {p.name for p in parameters if p.default is not p.empty and p.kind is not p.KEYWORD_ONLY}
        if loose - POSITIONAL_DEFAULTS.get(name, set()):
            wrong[name] = loose
    assert wrong == {}


def test_errors_have_one_base() -> None:
    assert all(issubclass(getattr(rf, name), rf.RayflowError) for name in ERRORS)


def test_fewer_than_fifteen_knobs_a_configuration() -> None:
    for config in (rf.CheckpointConfig, rf.JobConfig):
        assert len(inspect.signature(config).parameters) < 15


def test_building_planning_and_running_locally_do_not_import_ray(tmp_path: Path) -> None:
    program = (
        "import sys, pyarrow as pa, rayflow as rf\n"
        "flow = rf.Flow('f', rf.from_arrow(pa.table({'x': [1]})).collect())\n"
        "flow.explain()\n"
        "assert flow.run(local=True).table().num_rows == 1\n"
        "assert 'ray' not in sys.modules, 'ray was imported'\n"
    )
    subprocess.run([sys.executable, "-c", program], check=True, cwd=tmp_path, timeout=60)


def test_building_reads_nothing(tmp_path: Path) -> None:
    rows = rf.read_csv(str(tmp_path / "missing.csv"), event_time="t").filter(rf.col("x") > 0)
    flow = rf.Flow("lazy", rows.write_parquet(str(tmp_path / "out")))
    assert not list(tmp_path.iterdir())
    with pytest.raises(rf.RayflowError, match="missing.csv"):
        flow.plan()


def test_examples_in_docstrings_run() -> None:
    failed = 0
    for info in pkgutil.walk_packages(rf.__path__, "rayflow."):
        if not info.name.startswith("rayflow.cluster"):  # imports ray; nothing there is for users to call
            failed += doctest.testmod(importlib.import_module(info.name)).failed
    assert failed == 0


# --------------------------------------------------------------------------------------------------------- the README


def blocks(language: str) -> list[str]:
    fenced = re.findall(r"^```(\w*)\n(.*?)^```$", README.read_text(), re.MULTILINE | re.DOTALL)
    return [text for kind, text in fenced if kind == language]


@pytest.fixture
def reader(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A folder as the README's reader has it: with the CSV it shows."""
    monkeypatch.chdir(tmp_path)
    (csv,) = blocks("csv")
    (tmp_path / "flights.csv").write_text(csv)
    return tmp_path


def test_python_of_the_readme_runs(reader: Path) -> None:
    program, *more = blocks("python")
    assert more, "the README shows a program and how to try it out"
    namespace: dict[str, Any] = {"__name__": "delays"}
    for block in (program, *more):
        exec(compile(block, "README.md", "exec"), namespace)
    (rows,) = rf.read_parquet("out/").to_arrow().group_by([]).aggregate([("n", "sum")]).to_pylist()
    assert rows == {"n_sum": 4}


def test_commands_of_the_readme_run(reader: Path) -> None:
    """As they stand there, but for ``--local``."""
    (reader / "delays.py").write_text(blocks("python")[0])
    commands = [shlex.split(line, comments=True) for block in blocks("") for line in block.splitlines()]
    called = [words[1:] for words in commands if words[:1] == ["rayflow"]]
    assert {words[0] for words in called} == {"run", "explain", "checkpoints", "state", "restore-plan"}
    for words in called:
        result = CliRunner().invoke(main, [*words, *(["--local"] if words[0] == "run" else [])])
        assert result.exit_code == 0, f"{words}: {result.output}"
    assert sorted(os.listdir(reader)) == ["checkpoints", "delays.py", "flights.csv", "out"]


def test_targets_of_the_readme_exist() -> None:
    makefile = (README.parent / "Makefile").read_text()
    targets = set(re.findall(r"`?make ([a-z-]+)", README.read_text()))
    assert targets
    assert all(re.search(rf"^{target}:", makefile, re.MULTILINE) for target in targets)
