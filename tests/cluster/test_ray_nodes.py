"""Several nodes: subtasks find each other, and a node that vanishes costs no row and doubles none (rule R3)."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
from ray.exceptions import ActorDiedError, ActorUnavailableError, RayActorError

from rayflow.cluster import processes
from rayflow.cluster.processes import ProcessEnded, Processes, reason_of, uncaught
from rayflow.core.ids import SubtaskId

ROOT = Path(__file__).resolve().parents[2]

NODE_DIED = """The actor died unexpectedly before finishing this task.
\tclass_name: SubtaskProcess
\tip: 127.0.0.3
The actor died because its node has died. Node Id: faaea2050b
\tthe actor's node was terminated unexpectedly: health check failed due to missing too many heartbeats"""


@pytest.fixture(scope="module")
def told() -> dict[str, Any]:
    """What `node_loss` saw; it has compared every output with DuckDB."""
    done = subprocess.run(
        [sys.executable, "-m", "tests.cluster.node_loss"],
        cwd=ROOT,
        capture_output=True,
        text=True,
        check=False,
        timeout=240,
    )
    assert done.returncode == 0, done.stderr
    found = json.loads(done.stdout.splitlines()[-1])
    assert isinstance(found, dict)
    return found


@pytest.mark.ray
@pytest.mark.slow
def test_subtasks_on_two_nodes_bind_their_own_address_and_send_to_that_of_the_other(told: dict[str, Any]) -> None:
    spread = told["spread"]
    one, other = spread["nodes"]
    assert spread["bound"] == [[one, one], [other, other]]
    assert [one, other] in spread["dialled"]
    assert [other, one] in spread["dialled"]
    assert spread["restarts"] == 0


@pytest.mark.ray
@pytest.mark.slow
def test_the_subtasks_of_a_lost_node_are_replaced_on_others(told: dict[str, Any]) -> None:
    lost = told["worker_lost"]
    assert lost["lost"] > 0
    assert lost["left"] == 0
    assert lost["restarts"] >= 1


@pytest.mark.ray
@pytest.mark.slow
def test_with_too_few_cpus_left_the_job_waits_says_so_and_goes_on_with_a_new_node(told: dict[str, Any]) -> None:
    waiting = told["too_few_cpus"]
    assert waiting["lost"] > 0
    assert waiting["state"] == "deploying"
    assert "of 4 processes have not started; the cluster has 0 of 1 CPUs free, the job takes 2" in waiting["detail"]
    assert waiting["on_new_node"] > 0


@pytest.mark.ray
@pytest.mark.slow
def test_a_coordinator_whose_node_is_lost_goes_on_elsewhere(told: dict[str, Any]) -> None:
    assert told["coordinator_lost"] == {"coordinator_moved": True, "left": 0}


def test_a_lost_node_is_told_as_such() -> None:
    error = RayActorError(error_msg=NODE_DIED)
    assert not uncaught(error)
    assert reason_of(error) == "node has died. Node Id: faaea2050b"


@pytest.mark.parametrize(("error", "kills"), [(ActorUnavailableError("no route", None), 1), (ActorDiedError(), 0)])
def test_a_process_that_cannot_be_reached_is_killed_and_replaced(
    error: RayActorError, kills: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    """It may live behind a broken connection and hold its CPU; one that Ray knows to be dead needs no killing."""
    killed: list[object] = []
    monkeypatch.setattr(processes, "_kill", killed.append)
    subtask, actor = SubtaskId("window-1", 0), object()
    running = Processes("life", None, (), {}, lambda _: None)
    running._running[subtask] = processes._Process(actor, 1, None)
    assert running.ended(ProcessEnded(subtask, 1, error)) is not None
    assert killed == [actor] * kills
