"""The figures plumbing: one JSON line a figure, a table at the end, and no way to pass by saying nothing."""

from __future__ import annotations

import io
import json
from pathlib import Path

import pytest
from rich.console import Console

from benchmarks import __main__ as bench
from benchmarks.figures import KEYS, Figure, emit, parse


class FlushCounter(io.StringIO):
    flushed = 0

    def flush(self) -> None:
        self.flushed += 1
        super().flush()


@pytest.fixture
def scripts(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A package `scripted` that child processes can import; a test writes its modules."""
    package = tmp_path / "scripted"
    package.mkdir()
    (package / "__init__.py").touch()
    repository = Path(__file__).resolve().parent.parent
    monkeypatch.setenv("PYTHONPATH", f"{tmp_path}:{repository}")
    return package


def test_a_figure_is_one_flushed_line_with_exactly_the_five_keys() -> None:
    stream = FlushCounter()
    figure = emit("recovery", 1.5, "s", bar="<= 5", ok=True, stream=stream)
    assert stream.getvalue().count("\n") == 1
    assert list(json.loads(stream.getvalue())) == list(KEYS)
    assert parse(stream.getvalue()) == figure
    assert stream.flushed >= 1


def test_a_value_that_is_no_number_is_refused() -> None:
    with pytest.raises(ValueError, match="'ratio'.*finite"):
        emit("ratio", float("nan"), "", stream=io.StringIO())


@pytest.mark.parametrize(
    "line",
    [
        "loading 20 million rows",
        "",
        "3",
        '{"figure": "a", "value": 1, "unit": "s", "bar": null}',
        '{"figure": "a", "value": 1, "unit": "s", "bar": null, "ok": true, "more": 1}',
        '{"figure": "a", "value": 1, "unit": "s", "bar": null, "ok": "yes"}',
    ],
)
def test_other_lines_are_not_figures(line: str) -> None:
    assert parse(line) is None


def test_figures_are_streamed_and_prose_goes_to_stderr(scripts: Path, capfd: pytest.CaptureFixture[str]) -> None:
    (scripts / "good.py").write_text(
        "from benchmarks.figures import emit\nprint('warming up')\nemit('rows', 5, 'rows/s', bar='>= 1', ok=True)\n"
    )
    run = bench.run_module("good", package="scripted")
    assert run == bench.ModuleRun("good", (Figure("rows", 5, "rows/s", ">= 1", True),), 0)
    out, err = capfd.readouterr()
    assert parse(out) == run.figures[0]
    assert "warming up" in err
    assert bench.passed([run])


@pytest.mark.parametrize(
    ("body", "failure"),
    [
        ("emit('rows', 5, 'rows/s')\nraise SystemExit(3)", "exit code 3"),
        ("pass", "gave no figure"),
        ("emit('rows', 5, 'rows/s', bar='>= 9', ok=False)", None),
    ],
)
def test_a_crash_a_silence_and_a_missed_bar_fail_the_run(scripts: Path, body: str, failure: str | None) -> None:
    (scripts / "bad.py").write_text(f"from benchmarks.figures import emit\n{body}\n")
    run = bench.run_module("bad", package="scripted")
    assert not bench.passed([run])
    assert (run.failure is None) if failure is None else (failure in (run.failure or ""))


def test_a_module_that_does_not_exist_fails_the_run(scripts: Path) -> None:
    assert not bench.passed([bench.run_module("absent", package="scripted")])


def test_the_table_names_every_figure_and_every_failure() -> None:
    missed = Figure("overhead", 7.25, "%", "<= 5", ok=False)
    runs = [bench.ModuleRun("a", (missed,), 0), bench.ModuleRun("b", (), 1)]
    stream = io.StringIO()
    Console(file=stream, width=120).print(bench.table_of(runs))
    text = stream.getvalue()
    for expected in (
        "figure",
        "value",
        "unit",
        "bar",
        "ok",
        "overhead",
        "7.25",
        "<= 5",
        "NO",
        "b ended with exit",
    ):
        assert expected in text


def test_the_exit_code_tells(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    good = Figure("rows", 5, "rows/s", None, ok=True)
    monkeypatch.setattr(bench, "run_module", lambda module: bench.ModuleRun(module, (good,), 0))
    assert bench.main(["recovery"]) == 0
    assert bench.main([]) == 0
    monkeypatch.setattr(bench, "run_module", lambda module: bench.ModuleRun(module, (), 0))
    assert bench.main(["recovery"]) == 1
    assert bench.main(["no_such_benchmark"]) == 2
    assert "window_vs_duckdb" in capsys.readouterr().err
