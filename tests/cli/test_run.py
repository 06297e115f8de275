"""`rayflow run` and `rayflow explain`, in this process and without Ray."""

from __future__ import annotations

import json
import sys
from pathlib import Path

import cloudpickle
import pytest
from click.testing import CliRunner, Result

from rayflow.cli.loading import Target, load_flow, load_module
from rayflow.cli.main import main

FLOW = """
import pyarrow as pa
import rayflow as rf

print("noise of the user")
rows = pa.table({"k": [1, 2, 1] * 10, "v": list(range(30))})

def doubled(batch):
    print("more noise")
    return batch.set_column(1, "v", pa.compute.multiply(batch.column("v"), 2))

flow = rf.Flow("doubles", rf.from_arrow(rows, batch_rows=7).map_batches(doubled).collect())

if __name__ == "__main__":
    raise SystemExit("the main block ran")
"""


@pytest.fixture
def file(tmp_path: Path) -> Path:
    path = tmp_path / "doubles.py"
    path.write_text(FLOW)
    return path


def rayflow(*arguments: str | Path) -> Result:
    return CliRunner().invoke(main, [str(a) for a in arguments])


def one_sentence(result: Result, code: int) -> str:
    """The last line of standard error, after checking that there is no traceback."""
    assert result.exit_code == code, result.output
    assert "Traceback" not in result.output
    assert "Error" not in result.stdout
    return result.stderr.strip().splitlines()[-1]


def test_run_prints_rows_and_a_summary(file: Path) -> None:
    result = rayflow("run", file, "--local")
    assert result.exit_code == 0, result.output
    assert "collect-1: 30 rows, the first 20" in result.stdout
    assert "doubles: finished in" in result.stdout
    assert "no restarts" in result.stdout


def test_json_is_alone_on_standard_output(file: Path) -> None:
    result = rayflow("run", file, "--local", "--json", "-p", "2")
    assert result.exit_code == 0, result.output
    found = json.loads(result.stdout)
    assert found["status"] == "finished"
    assert sorted(row["v"] for row in found["tables"]["collect-1"]) == [2 * v for v in range(30)]
    assert "noise of the user" in result.stderr


def test_strict_refuses_what_is_written_twice_and_explain_tells_so_before(file: Path, tmp_path: Path) -> None:
    weak, checkpoints = tmp_path / "weak.py", tmp_path / "checkpoints"
    weak.write_text(FLOW.replace(".collect()", ".for_each_batch(lambda *given: None, name='calls')"))
    told = "gives at least once and not exactly-once: sink 'calls' writes rows again after a failure"
    assert told in one_sentence(rayflow("run", weak, "--local", "--checkpoints", checkpoints, "--strict"), 1)
    assert not checkpoints.exists()
    explained = rayflow("explain", weak, "--strict")
    assert told in one_sentence(explained, 1)
    assert "calls: at least once: sink 'calls' writes rows again" in explained.stdout
    assert rayflow("explain", weak).exit_code == 0
    assert rayflow("explain", file, "--strict").exit_code == 0
    assert rayflow("run", file, "--local", "--checkpoints", checkpoints, "--strict").exit_code == 0
    assert "--strict" in one_sentence(rayflow("run", file, "--local", "--strict"), 2)


def test_a_run_continues_from_its_checkpoints_or_refuses(file: Path, tmp_path: Path) -> None:
    url = tmp_path / "checkpoints"
    first = rayflow("run", file, "--local", "--json", "--checkpoints", url, "--interval", "5ms")
    again = rayflow("run", file, "--local", "--json", "--checkpoints", url)
    assert first.exit_code == again.exit_code == 0, first.output + again.output
    assert json.loads(first.stdout)["tables"] == json.loads(again.stdout)["tables"]
    refused = rayflow("run", file, "--local", "--checkpoints", url, "--start", "fresh")
    assert 'start="latest" to go on' in one_sentence(refused, 1)


def test_a_run_goes_back_to_a_checkpoint_by_number(file: Path, tmp_path: Path) -> None:
    url = tmp_path / "checkpoints"
    first = json.loads(rayflow("run", file, "--local", "--json", "--checkpoints", url, "--interval", "2ms").stdout)
    back = first["checkpoint"] - 1
    again = rayflow("run", file, "--local", "--json", "--checkpoints", url, "--start", str(back))
    assert again.exit_code == 0, again.output
    assert json.loads(again.stdout)["tables"] == first["tables"]
    wrong = rayflow("run", file, "--local", "--checkpoints", url, "--start", "yesterday")
    assert "expected latest, fresh or the number" in one_sentence(wrong, 2)
    gone = rayflow("run", file, "--local", "--checkpoints", url, "--start", "12345")
    assert "12345" in one_sentence(gone, 1)


def test_state_in_memory_writes_no_checkpoint(file: Path, tmp_path: Path) -> None:
    result = rayflow("run", file, "--local", "--checkpoints", tmp_path / "c", "--state", "memory")
    assert result.exit_code == 0, result.output
    assert not (tmp_path / "c").exists()


def test_explain_prints_the_plan_and_a_flowchart(file: Path) -> None:
    text = rayflow("explain", file, "-p", "2")
    assert text.exit_code == 0, text.output
    assert "chain from_arrow-1 x2" in text.stdout
    assert "noise" not in text.stdout
    assert rayflow("explain", file, "--mermaid").stdout.startswith("flowchart LR")


@pytest.mark.parametrize(
    ("text", "target", "expected"),
    [
        ("x = 1\n", "", "has no flow at its top level"),
        (FLOW + "\nother = rf.Flow('other', rf.from_arrow(rows).collect())\n", "", "has 2 flows; name one: "),
        (FLOW, ":nothing", "has no flow 'nothing'; it has flow"),
        ("x = 1\n", ":flow", "has no flow 'flow'; it has none"),
    ],
)
def test_no_flow_and_several_are_wrong_calls(tmp_path: Path, text: str, target: str, expected: str) -> None:
    path = tmp_path / "some.py"
    path.write_text(text)
    assert expected in one_sentence(rayflow("run", f"{path}{target}", "--local"), 2)


def test_one_of_two_flows_is_chosen_by_name(tmp_path: Path) -> None:
    path = tmp_path / "two.py"
    path.write_text(FLOW + "\nother = rf.Flow('other', rf.from_arrow(rows).collect())\n")
    result = rayflow("run", f"{path}:other", "--local", "--json")
    assert result.exit_code == 0, result.output
    assert json.loads(result.stdout)["flow"] == "other"


def test_two_names_of_one_flow_are_one_flow(tmp_path: Path) -> None:
    path = tmp_path / "alias.py"
    path.write_text(FLOW + "\nalias = flow\n")
    assert rayflow("explain", path).exit_code == 0


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("import rayflow as rf\n\nboom = 1 / 0\n", "line 3: ZeroDivisionError: division by zero"),
        ("import rayflow as rf\nx = (\n", "line 2: "),
        ("import no_such_module_anywhere\n", "No module named 'no_such_module_anywhere'"),
        ("import sys\nsys.exit(3)\n", "it exits with 3 at its top level"),
        ("import rayflow as rf\nrf.Flow('', None)\n", "a flow needs a name"),
    ],
)
def test_a_file_that_cannot_be_loaded_is_told_in_one_sentence(tmp_path: Path, text: str, expected: str) -> None:
    path = tmp_path / "broken.py"
    path.write_text(text)
    assert expected in one_sentence(rayflow("run", path, "--local"), 1)
    assert "rayflow_file_broken" not in sys.modules


def test_missing_files_and_folders_are_wrong_calls(tmp_path: Path) -> None:
    assert "does not exist" in one_sentence(rayflow("run", tmp_path / "none.py", "--local"), 2)
    assert "is a folder" in one_sentence(rayflow("explain", tmp_path), 2)
    text = tmp_path / "flow.txt"
    text.write_text(FLOW)
    assert "must end with .py" in one_sentence(rayflow("explain", text), 2)


def test_options_without_checkpoints_are_refused(file: Path) -> None:
    assert "add --checkpoints URL" in one_sentence(rayflow("run", file, "--local", "--interval", "1s"), 2)
    assert "expected KEY=VALUE" in one_sentence(
        rayflow("run", file, "--local", "--checkpoints", "x", "--storage-option", "endpoint"), 2
    )


def test_a_bad_duration_is_told_in_one_sentence(file: Path, tmp_path: Path) -> None:
    result = rayflow("run", file, "--local", "--checkpoints", tmp_path / "c", "--interval", "soon")
    assert "CheckpointConfig(interval) must be a duration" in one_sentence(result, 1)


def test_an_exception_of_user_code_names_its_step(tmp_path: Path) -> None:
    path = tmp_path / "raises.py"
    path.write_text(FLOW.replace('print("more noise")', 'raise ValueError("no doubles today")'))
    message = one_sentence(rayflow("run", path, "--local"), 1)
    assert "map_batches" in message
    assert "no doubles today" in message


def test_traceback_on_demand(tmp_path: Path) -> None:
    path = tmp_path / "broken.py"
    path.write_text("boom = 1 / 0\n")
    result = rayflow("--traceback", "run", path, "--local")
    assert isinstance(result.exception, Exception)
    assert isinstance(result.exception.__cause__, ZeroDivisionError)


def test_code_of_the_file_and_of_its_neighbours_is_pickled_by_value(tmp_path: Path) -> None:
    (tmp_path / "neighbour_of_flow.py").write_text("def add(x):\n    return x + 1\n")
    path = tmp_path / "uses.py"
    path.write_text("from neighbour_of_flow import add\n\ndef twice(x):\n    return add(add(x))\n")
    module = load_module(path)
    data = cloudpickle.dumps(module.twice)
    assert cloudpickle.loads(data)(1) == 3
    # A worker has neither module: names of modules in the bytes would be looked up there and fail.
    for name in ("rayflow_file_uses", "neighbour_of_flow"):
        loaded = sys.modules.pop(name)
        try:
            assert cloudpickle.loads(data)(1) == 3
        finally:
            cloudpickle.unregister_pickle_by_value(loaded)


def test_a_flow_loaded_from_a_file_can_be_planned(file: Path) -> None:
    flow = load_flow(Target(file, "flow"))
    assert flow.name == "doubles"
    assert [chain.parallelism for chain in flow.plan(parallelism=3).chains] == [3]
