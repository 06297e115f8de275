"""Processes die while rows flow; the results are those of a run without deaths (rule R3)."""

from __future__ import annotations

import signal
import subprocess
import sys
from pathlib import Path

import pytest

import rayflow as rf
from rayflow.cluster.job import Job, attach
from tests.cluster import flows
from tests.cluster.ray_harness import kill, process_is_gone, recovered, running, subtask_processes, until

pytestmark = [pytest.mark.ray, pytest.mark.usefixtures("cluster")]

ROOT = Path(__file__).resolve().parents[2]


def checkpoints(tmp_path: Path) -> rf.CheckpointConfig:
    return rf.CheckpointConfig(str(tmp_path / "checkpoints"), interval="200ms")


def pids(job: Job) -> dict[tuple[str, int], int]:
    return {(s.step, s.index): s.pid for s in job.subtasks()}


def finish(job: Job, gate: Path) -> rf.JobResult:
    """Let the rest through, but not before a checkpoint shows that the job goes on."""
    job.checkpoint()
    gate.touch()
    return job.wait(60)


def test_a_killed_subtask_is_replaced_and_the_survivors_are_reset_in_place(tmp_path: Path, gate: Path) -> None:
    out = tmp_path / "out"
    job = flows.windows_flow(gate, out).submit(parallelism=2, checkpoints=checkpoints(tmp_path))
    running(job)
    attempt, before = job.status().attempt, pids(job)
    assert len(set(before.values())) == len(before) == 4
    victim = next(iter(before))
    kill(before[victim])
    recovered(job, attempt)
    after = pids(job)
    assert after[victim] not in before.values()
    assert {k: v for k, v in after.items() if k != victim} == {k: v for k, v in before.items() if k != victim}
    assert finish(job, gate).restarts == 1
    flows.assert_windows(out)


def test_with_a_spare_process_a_recovery_takes_a_moment(tmp_path: Path, gate: Path) -> None:
    """5 s are promised; this takes 0.1 s on an idle machine."""
    out = tmp_path / "out"
    job = flows.windows_flow(gate, out).submit(parallelism=1, checkpoints=checkpoints(tmp_path))
    running(job)
    until(lambda: len(subtask_processes()) == len(job.subtasks()) + 1, "there is a spare process")
    attempt = job.status().attempt
    kill(job.subtasks()[-1].pid)
    recovered(job, attempt)
    detected, again = (max(e.at for e in job.timeline() if e.what == what) for what in ("failure detected", "running"))
    assert again - detected < 5.0
    finish(job, gate)
    flows.assert_windows(out)


def test_every_subtask_killed_at_once(tmp_path: Path, gate: Path) -> None:
    out = tmp_path / "out"
    job = flows.windows_flow(gate, out).submit(parallelism=2, checkpoints=checkpoints(tmp_path))
    running(job)
    attempt, before = job.status().attempt, pids(job)
    kill(*before.values())
    recovered(job, attempt)
    assert not set(pids(job).values()) & set(before.values())
    finish(job, gate)
    flows.assert_windows(out)


def test_killed_again_and_again(tmp_path: Path, gate: Path) -> None:
    out = tmp_path / "out"
    job = flows.doubled(gate, out).submit(parallelism=2, checkpoints=checkpoints(tmp_path))
    running(job)
    for turn in range(4):
        attempt = job.status().attempt
        kill(job.subtasks()[turn % 2].pid)
        recovered(job, attempt)
        job.checkpoint()
    finish(job, gate)
    flows.assert_doubled(out)


def test_the_coordinator_killed(tmp_path: Path, gate: Path) -> None:
    out = tmp_path / "out"
    job = flows.windows_flow(gate, out).submit(parallelism=2, checkpoints=checkpoints(tmp_path))
    running(job)
    first, attempt, before = job.coordinator(), job.status().attempt, pids(job)
    kill(first.pid)
    recovered(job, attempt)
    second = job.coordinator()
    assert (second.pid, second.life) != (first.pid, first.life)
    for pid in before.values():
        until(lambda pid=pid: process_is_gone(pid), "the subtasks of the dead coordinator are gone")  # type: ignore[misc]
    finish(job, gate)
    flows.assert_windows(out)


def test_the_driver_killed_and_then_a_subtask_and_the_coordinator(tmp_path: Path, gate: Path, cluster: str) -> None:
    """The job needs nothing of the process that started it, not even to start its processes again. Its plan is larger
    than what Ray keeps of an argument in one piece."""
    out = tmp_path / "out"
    program = (
        "import os, sys, ray\n"
        "from pathlib import Path\n"
        "import rayflow as rf\n"
        "from tests.cluster import flows\n"
        f"ray.init(address={cluster!r}, logging_level='ERROR', log_to_driver=False)\n"
        f"flow = flows.windows_flow(Path({str(gate)!r}), Path({str(out)!r}), ballast=os.urandom(300_000))\n"
        f"checkpoints = rf.CheckpointConfig({str(tmp_path / 'checkpoints')!r}, interval='200ms')\n"
        "print(flow.submit(parallelism=2, checkpoints=checkpoints).name, flush=True)\n"
        "sys.stdin.read()\n"
    )
    with subprocess.Popen(
        [sys.executable, "-c", program], cwd=ROOT, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True
    ) as driver:
        assert driver.stdout is not None
        name = driver.stdout.readline().strip()
        job = attach(name)
        running(job)
        driver.kill()
    assert attach("windows").name == name
    attempt = job.status().attempt
    kill(job.subtasks()[0].pid)
    recovered(job, attempt)
    attempt = job.status().attempt
    kill(job.coordinator().pid)
    recovered(job, attempt)
    finish(job, gate)
    flows.assert_windows(out)


def test_a_stopped_subtask_is_found_and_replaced(tmp_path: Path, gate: Path) -> None:
    """SIGSTOP: alive for Ray, but its loop gives no sign."""
    out = tmp_path / "out"
    config = rf.JobConfig(hang_timeout="4s")
    job = flows.windows_flow(gate, out).submit(parallelism=2, checkpoints=checkpoints(tmp_path), config=config)
    running(job)
    attempt, before = job.status().attempt, pids(job)
    victim = next(iter(before))
    kill(before[victim], sig=signal.SIGSTOP)
    recovered(job, attempt)
    assert any(e.what == "subtask hung" for e in job.timeline())
    after = pids(job)
    assert after[victim] != before[victim]
    until(lambda: process_is_gone(before[victim]), "the stopped process is gone")
    finish(job, gate)
    flows.assert_windows(out)


def test_state_in_memory_survives_a_subtask(tmp_path: Path, gate: Path) -> None:
    out = tmp_path / "out"
    job = flows.windows_flow(gate, out).submit(
        parallelism=2, checkpoints=checkpoints(tmp_path), config=rf.JobConfig(state="memory")
    )
    running(job)
    attempt = job.status().attempt
    kill(job.subtasks()[2].pid)
    recovered(job, attempt)
    finish(job, gate)
    flows.assert_windows(out)


def test_state_in_memory_does_not_survive_the_coordinator_and_says_so(tmp_path: Path, gate: Path) -> None:
    """Starting over would write twice what is committed already."""
    out = tmp_path / "out"
    job = flows.windows_flow(gate, out).submit(
        parallelism=2, checkpoints=checkpoints(tmp_path), config=rf.JobConfig(state="memory")
    )
    running(job)
    kill(job.coordinator().pid)
    with pytest.raises(rf.JobFailedError, match=r'state="memory".*CheckpointConfig'):
        job.wait(60)
