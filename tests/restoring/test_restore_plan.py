"""The restore plan: every kind of verdict, the same in a dry run, at a start and at a recovery (`core.restore`)."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pyarrow as pa
import pytest
from click.testing import CliRunner

import rayflow as rf
from rayflow.cli.main import main
from rayflow.restore_plan import RestorePlan, Verdict, restore_plan
from tests.restoring import flows
from tests.restoring.stopping import files_below, newest, run, savepoint_of


@pytest.fixture(scope="module")
def savepoint(tmp_path_factory: pytest.TempPathFactory) -> str:
    """Of flow ``totals``, stopped in the middle at parallelism 2."""
    folder = tmp_path_factory.mktemp("taken")
    run(flows.totals(), folder / "a", rounds=15, config=flows.CONFIG)
    return savepoint_of(folder / "a", "totals", folder / "savepoint")


def planned(flow: rf.Flow, url: str, **options: Any) -> RestorePlan:
    return restore_plan(flow, url, config=flows.CONFIG, **options)


def verdicts(found: RestorePlan) -> dict[tuple[str, str], Verdict]:
    return {(line.step, line.state): line.verdict for line in found.lines}


def test_the_same_flow_matches_at_another_parallelism(savepoint: str) -> None:
    found = planned(flows.totals(), savepoint, parallelism=4)
    assert not found.refused
    assert verdicts(found)["from_arrow-1", "splits"] is Verdict.MATCHED
    assert verdicts(found)["totals", "values"] is Verdict.MATCHED
    assert verdicts(found)["rows", "rows"] is Verdict.MATCHED
    assert {line.parallelism for line in found.lines} == {(2, 4)}
    (line,) = [line for line in found.lines if line.state == "values"]
    assert line.rows
    assert str(found).splitlines()[-1] == "it can be restored"


class WithMore(flows.Totals):
    """A new nullable column, and a state of its own."""

    last = rf.ValueState(pa.int64())
    tags = rf.ListState(pa.string())


class Narrower(rf.KeyedProcess):
    """A column less, and one of another type."""

    n = rf.ValueState(pa.string())

    def process_batch(self, batch: pa.RecordBatch, ctx: Any) -> None: ...


def test_new_columns_are_taken_over_and_new_states_are_empty(savepoint: str) -> None:
    found = planned(flows.totals(WithMore), savepoint)
    assert not found.refused
    assert verdicts(found)["totals", "values"] is Verdict.CHANGED
    assert verdicts(found)["totals", "tags"] is Verdict.NEW
    (line,) = [line for line in found.lines if line.verdict is Verdict.CHANGED]
    assert "last" in line.detail


def test_other_types_are_refused_with_the_reason(savepoint: str, tmp_path: Path) -> None:
    flow = rf.Flow("totals", flows.source().key_by("k").process(Narrower, name="totals").collect(name="rows"))
    found = planned(flow, savepoint)
    assert found.refused
    assert verdicts(found)["totals", "values"] is Verdict.REFUSED
    (problem,) = found.problems
    assert "state 'values' of step 'totals' cannot be taken over" in problem
    assert "total" in problem
    with pytest.raises(rf.StateSchemaError, match="cannot start from .*'values' of step 'totals'"):
        run(flow, tmp_path / "dir", start=savepoint, config=flows.CONFIG)
    assert files_below(tmp_path) == {}


def test_a_renamed_step_is_refused_with_near_names(savepoint: str, tmp_path: Path) -> None:
    flow = flows.totals(name="totals-by-key")
    found = planned(flow, savepoint)
    assert verdicts(found)["totals", "values"] is Verdict.REFUSED
    assert verdicts(found)["totals-by-key", "values"] is Verdict.NEW
    (problem,) = found.problems
    assert "state 'values' of operator 'totals', which this flow does not have" in problem
    assert "'totals-by-key'" in problem
    assert "allow_dropped=('totals',)" in problem
    with pytest.raises(rf.ConfigError, match="--allow-dropped totals"):
        run(flow, tmp_path / "dir", start=savepoint, config=flows.CONFIG)


def test_what_is_allowed_by_name_is_left_behind_for_good(savepoint: str, tmp_path: Path) -> None:
    flow = flows.totals(name="anew")
    found = planned(flow, savepoint, allow_dropped=["totals"])
    assert not found.refused
    assert verdicts(found)["totals", "values"] is Verdict.DROPPED
    result = run(flow, tmp_path / "dir", start=savepoint, config=flows.CONFIG, allow_dropped=["totals"], rounds=3)
    assert result.status == "stopped"
    kept = newest(tmp_path / "dir", "totals")
    assert {h.operator for sub in kept.subtasks for h in sub.states} == {"anew", "rows"}
    assert run(flow, tmp_path / "dir", config=flows.CONFIG).status == "finished"  # nothing to allow any more


def test_the_same_holds_for_the_checkpoints_of_a_changed_flow(tmp_path: Path) -> None:
    """At a recovery there is no savepoint: the core refuses by the same rule."""
    run(flows.totals(), tmp_path / "dir", rounds=10, config=flows.CONFIG)
    flow = flows.totals(name="anew")
    with pytest.raises(rf.JobFailedError, match=r"operator 'totals', which this flow does not have.*allow_dropped"):
        run(flow, tmp_path / "dir", config=flows.CONFIG)
    result = run(flow, tmp_path / "dir", config=flows.CONFIG, allow_dropped=["totals"])
    assert result.status == "finished"


def test_a_source_that_is_gone_and_one_that_is_new(savepoint: str, tmp_path: Path) -> None:
    stream = flows.source(name="other").key_by("k").process(flows.Totals, name="totals")
    flow = rf.Flow("totals", stream.collect(name="rows"))
    found = planned(flow, savepoint)
    assert verdicts(found)["from_arrow-1", "splits"] is Verdict.REFUSED
    assert verdicts(found)["other", "splits"] is Verdict.NEW
    assert "of source 'from_arrow-1', which this flow does not have" in found.problems[0]
    result = run(flow, tmp_path / "dir", start=savepoint, config=flows.CONFIG, allow_dropped=["from_arrow-1"])
    counts = dict.fromkeys(range(flows.KEYS), 0)
    for row in result.table("rows").to_pylist():
        counts[row["k"]] = max(counts[row["k"]], row["n"])
    each = flows.ROWS // flows.KEYS
    assert all(count >= each for count in counts.values()), "the new source was read from its beginning"
    assert any(count > each for count in counts.values()), "on top of what was there"


def test_a_new_source_beside_the_old_one_is_read_whole(savepoint: str, tmp_path: Path) -> None:
    both = flows.source().union(flows.source(name="second"))
    flow = rf.Flow("totals", both.key_by("k").process(flows.Totals, name="totals").collect(name="rows"))
    assert verdicts(planned(flow, savepoint))["second", "splits"] is Verdict.NEW
    result = run(flow, tmp_path / "dir", start=savepoint, config=flows.CONFIG, parallelism=3)
    totals = {key: total for key, (_, total) in flows.last_of(result.table("rows")).items()}
    assert totals == {key: 2 * flows.total(key) for key in range(flows.KEYS)}


def windows(**aggregates: Any) -> rf.Flow:
    stream = flows.source().key_by("k").window(rf.tumbling("1s")).agg(name="windows", **aggregates)
    return rf.Flow("windows", stream.write_parquet("nowhere"))


def test_open_windows_take_no_other_aggregates(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Not even such as a table could: the rows that have come are known to the old ones only."""
    monkeypatch.chdir(tmp_path)
    run(windows(n=rf.count()), tmp_path / "a", rounds=15, config=flows.CONFIG)
    url = savepoint_of(tmp_path / "a", "windows", tmp_path / "savepoint")
    assert not planned(windows(n=rf.count()), url).refused
    (problem,) = planned(windows(n=rf.count(), total=rf.sum("v")), url).problems
    assert "state 'windows' of step 'windows' cannot be taken over: new column 'total" in problem


def test_dropping_what_the_flow_has_is_refused(savepoint: str) -> None:
    with pytest.raises(rf.PlanError, match="allow_dropped names step 'totals', which this flow has"):
        planned(flows.totals(), savepoint, allow_dropped=["totals"])
    with pytest.raises(rf.PlanError, match="takes the names of steps"):
        planned(flows.totals(), savepoint, allow_dropped="totals")


def test_a_step_that_keeps_no_state_now_is_refused(savepoint: str) -> None:
    plain = flows.source().filter(rf.col("v") >= 0, name="totals").collect(name="rows")
    found = planned(rf.Flow("totals", plain), savepoint)
    assert "which keeps no state in this flow" in " ".join(found.problems)


def test_several_problems_are_all_told(savepoint: str) -> None:
    flow = rf.Flow("other", flows.source(name="other").collect(name="rows"))
    found = restore_plan(flow, savepoint)
    assert len(found.problems) == 5  # name, key groups, process, source, columns of the rows
    with pytest.raises(rf.ConfigError, match=r"\(4 more: see rayflow restore-plan\)"):
        found.check()


FILE = """
import rayflow as rf
from tests.restoring import flows
flow = flows.totals(name={name!r})
"""


@pytest.fixture
def program(tmp_path: Path) -> Path:
    file = tmp_path / "program.py"
    file.write_text(FILE.format(name="totals"))
    return file


def test_the_command_exits_1_when_it_would_be_refused(savepoint: str, program: Path, tmp_path: Path) -> None:
    call = ["restore-plan", str(program), "--from", savepoint, "--max-parallelism", "13", "-p", "4"]
    good = CliRunner().invoke(main, call)
    assert good.exit_code == 0, good.output
    assert "2 -> 4" in good.output
    program.write_text(FILE.format(name="renamed"))
    bad = CliRunner().invoke(main, call)
    assert bad.exit_code == 1
    assert "refused: it holds state 'values' of operator 'totals'" in bad.output
    as_json = CliRunner().invoke(main, [*call, "--json"])
    assert as_json.exit_code == 1
    body = json.loads(as_json.stdout)
    assert not body["ok"]
    assert {s["verdict"] for s in body["states"] if s["step"] == "totals"} == {"refused"}
    assert CliRunner().invoke(main, [*call, "--allow-dropped", "totals"]).exit_code == 0
    nothing = CliRunner().invoke(main, [*call[:3], str(tmp_path / "nothing")])
    assert nothing.exit_code == 1
    assert "is not a savepoint" in nothing.output


def test_run_from_goes_on_and_rebucket_writes_anew(savepoint: str, program: Path, tmp_path: Path) -> None:
    runner = CliRunner()
    call = ["run", str(program), "--local", "--json", "--from"]
    done = runner.invoke(main, [*call, savepoint, "--max-parallelism", "13"])
    assert done.exit_code == 0, done.output
    assert json.loads(done.stdout)["metrics"]["rows_in"] < flows.ROWS
    refused = runner.invoke(main, [*call, savepoint])
    assert refused.exit_code == 1
    assert "rayflow rebucket" in refused.output
    made = runner.invoke(main, ["rebucket", savepoint, str(tmp_path / "128"), "--max-parallelism", "128"])
    assert made.exit_code == 0, made.output
    assert runner.invoke(main, [*call, made.stdout.strip()]).exit_code == 0
    assert "did you mean --start" in runner.invoke(main, [*call, "fresh"]).output
    assert "give one of them" in runner.invoke(main, [*call, savepoint, "--start", "3"]).output
    assert runner.invoke(main, [*call, "latest"]).exit_code == 0
