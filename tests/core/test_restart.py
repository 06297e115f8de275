"""When a failed job starts again, and when it gives up."""

from __future__ import annotations

from dataclasses import fields

import pytest

from rayflow.core.ids import SubtaskId
from rayflow.core.messages import FailureCause
from rayflow.core.restart import GiveUp, RestartAfter, RestartPolicy, RestartSpec

A, B = SubtaskId("a", 0), SubtaskId("a", 1)
BOOM = FailureCause("boom", kind="ValueError", position="row 7")


def delays(policy: RestartPolicy, count: int, cause: FailureCause | None = None) -> list[float]:
    result = []
    for n in range(count):
        decision = policy.on_failure(cause or FailureCause(f"failure {n}"), 0.0)
        assert isinstance(decision, RestartAfter)
        result.append(decision.delay_s)
        policy.running(0.0)
    return result


def test_the_exponential_delay_grows_to_its_bound() -> None:
    policy = RestartPolicy(RestartSpec())
    assert delays(policy, 4) == [1.0, 1.5, 2.25, 3.375]
    assert delays(policy, 2000)[-1] == 60.0


def test_health_resets_the_delay() -> None:
    policy = RestartPolicy(RestartSpec(reset_after_s=300.0))
    delays(policy, 5)
    policy.running(10.0)
    assert policy.on_failure(BOOM, 309.0) == RestartAfter(7.59375)
    policy.running(400.0)
    assert policy.on_failure(BOOM, 700.0) == RestartAfter(1.0)


def test_fixed_delay_and_its_bound() -> None:
    policy = RestartPolicy(RestartSpec("fixed", initial_s=2.0, max_attempts=3))
    assert delays(policy, 3) == [2.0, 2.0, 2.0]
    last = FailureCause("the last")
    assert policy.on_failure(last, 0.0) == GiveUp(last)
    assert policy.on_death(A, last, 0.0) == GiveUp(last)


def test_none_gives_up_at_once() -> None:
    assert RestartPolicy(RestartSpec("none")).on_failure(BOOM, 0.0) == GiveUp(BOOM)
    assert RestartPolicy(RestartSpec("none")).on_death(A, BOOM, 0.0) == GiveUp(BOOM)


def test_the_same_failure_three_times_in_a_row() -> None:
    policy = RestartPolicy(RestartSpec())
    delays(policy, 2, BOOM)
    assert policy.on_failure(BOOM, 0.0) == GiveUp(BOOM)


@pytest.mark.parametrize(
    "other",
    [
        FailureCause("boom", kind="ValueError", position="row 8"),
        FailureCause("bang", kind="ValueError", position="row 7"),
        FailureCause("boom", kind="TypeError", position="row 7"),
        None,
    ],
    ids=["position", "message", "kind", "death"],
)
def test_another_failure_between_breaks_the_row(other: FailureCause | None) -> None:
    policy = RestartPolicy(RestartSpec())
    delays(policy, 2, BOOM)
    if other is None:
        policy.on_death(A, FailureCause("killed"), 0.0)
    else:
        policy.on_failure(other, 0.0)
    assert isinstance(policy.on_failure(BOOM, 0.0), RestartAfter)


def test_failures_without_a_position_may_repeat() -> None:
    delays(RestartPolicy(RestartSpec()), 10, FailureCause("storage is down"))


def test_each_subtask_dies_once_for_free_in_an_outage() -> None:
    policy = RestartPolicy(RestartSpec())
    policy.running(0.0)
    cause = FailureCause("killed")
    assert policy.on_death(A, cause, 100.0) == RestartAfter(0.0)
    assert policy.on_death(B, cause, 100.1) == RestartAfter(0.0)
    assert policy.restarts == 1
    assert policy.on_death(A, cause, 100.2) == RestartAfter(1.0)
    policy.running(103.0)
    assert policy.on_death(A, cause, 103.5) == RestartAfter(1.5)


@pytest.mark.parametrize("how", ["seconds", "checkpoints"])
def test_health_ends_the_outage(how: str) -> None:
    policy = RestartPolicy(RestartSpec())
    cause = FailureCause("killed")
    policy.running(0.0)
    policy.on_death(A, cause, 10.0)
    policy.running(11.0)
    if how == "checkpoints":
        for _ in range(3):
            policy.checkpoint_completed()
    assert policy.on_death(A, cause, 12.0 if how == "seconds" else 11.1) == RestartAfter(0.0)


def test_the_numbers_are_those_of_the_configuration() -> None:
    """``config.Restart`` lies above the core; the two must not drift apart."""
    from rayflow.config import Restart

    ours = {f.name: f.default for f in fields(RestartSpec)}
    assert ours == {f.name: f.default for f in fields(Restart)}
