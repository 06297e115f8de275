"""One seed, one run; and sweeps of many."""

from __future__ import annotations

import hashlib
import multiprocessing
from collections import Counter
from collections.abc import Iterator
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass, field
from itertools import cycle
from random import Random

from rayflow.core.events import JobState
from rayflow.runtime.assembly import JobSpec
from rayflow.storage.retention import PINNED_KIND
from tests.simulation.faults import FaultBudget, Faults, Violation
from tests.simulation.scenario import PROTOCOL, Mode, Scenario, Space, draw
from tests.simulation.storage import Observer
from tests.simulation.target import Row, Target
from tests.simulation.tiny import forget_local_files, tiny
from tests.simulation.world import SimWorld, describe

STEPS_MAX = 60_000


@dataclass(frozen=True)
class Result:
    seed: int
    what: str
    violation: str = ""
    """Empty: the run was right."""
    trace: tuple[str, ...] = ()
    steps: int = 0
    checkpoints: int = 0
    """Manifests that ever were."""
    attempts: int = 0
    duplicates: int = 0
    """Rows that came more than once (at-least-once only)."""
    faults: dict[str, int] = field(default_factory=dict)
    digest: str = ""
    """Of the whole trace, if it was asked for."""
    space: Space = PROTOCOL

    def report(self) -> str:
        lines = [f"seed {self.seed}: {self.violation}", f"  {self.what}", f"  faults: {self.faults}", *self.trace]
        space = "" if self.space == PROTOCOL else f"--space {self.space} "
        return "\n".join([*lines, f"replay: python -m tests.simulation {space}--seed {self.seed}"])


def run_seed(
    seed: int,
    *,
    mode: Mode = "exactly_once",
    monitors: bool = True,
    keep: int | None = 60,
    digest: bool = False,
    faults: FaultBudget | None = None,
    space: Space = PROTOCOL,
) -> Result:
    """Run one seed to its end. ``keep`` None keeps the whole trace."""
    rng = Random(seed)
    drawn = FaultBudget.draw(rng)
    if space != PROTOCOL:  # state to lose comes with time: crashes are spread over the whole run
        drawn.crash_horizon *= 20
    injected = Faults(rng, faults or drawn)
    observer = Observer()
    scenario = draw(rng, injected, lambda: Target(injected, observer.names_token), mode, space)
    world = make_world(scenario, rng, injected, observer, keep=None if digest else keep)
    world.monitors.enabled = monitors
    violation = ""
    try:
        with tiny() if scenario.incremental else nullcontext():
            play(world)
            plans = cycle((scenario.plan_again or scenario.plan, scenario.plan))
            while wants_another_run(world, scenario):
                world.run_again(next(plans))
                play_on(world)
        check_end(world, scenario)
    except Violation as found:
        violation = str(found)
    except AssertionError as found:
        violation = f"invariant: {found!r} at {_where(found)}"
    finally:
        forget_local_files()
    lines = tuple(map(describe, world.trace)) if violation or keep is None or digest else ()
    return Result(
        seed=seed,
        what=scenario.what,
        violation=violation,
        trace=lines if violation or keep is None else (),
        steps=world.steps,
        checkpoints=len(observer.ever),
        attempts=world.coordinator.machine.restarts + 1,
        duplicates=sum(sum((t.rows() - e).values()) for t, e in zip(scenario.targets, scenario.expected, strict=True)),
        faults=dict(injected.happened),
        digest=hashlib.sha256("\n".join(lines).encode()).hexdigest() if digest else "",
        space=space,
    )


def wants_another_run(world: SimWorld, scenario: Scenario) -> bool:
    """Whether a user would start the job again: it was stopped or cancelled, or it failed without being restarted."""
    happened = sum(world.faults.happened.values())
    fresh, world.faults_at_run = happened > world.faults_at_run, happened
    state = world.coordinator.outcome.state
    if state is JobState.FAILED:
        return fresh and scenario.settings.restart.strategy == "none"
    return state in (JobState.STOPPED, JobState.CANCELLED)


def _where(error: BaseException) -> str:
    tb = error.__traceback__
    while tb is not None and tb.tb_next is not None:
        tb = tb.tb_next
    return "" if tb is None else f"{tb.tb_frame.f_code.co_qualname}:{tb.tb_lineno}"


def make_world(
    scenario: Scenario, rng: Random, faults: Faults, observer: Observer, *, keep: int | None = 60
) -> SimWorld:
    spec = JobSpec(
        plan=scenario.plan,
        config=scenario.config,
        exactly_once=scenario.mode == "exactly_once",
        submission="sim",
        heartbeat_s=scenario.heartbeat_s,
    )
    return SimWorld(
        scenario.plan,
        spec,
        scenario.settings,
        rng=rng,
        faults=faults,
        observer=observer,
        targets=scenario.targets,
        wait_s=scenario.wait_s,
        retain=scenario.retain,
        inline_max_bytes=scenario.inline_max_bytes,
        keep=keep,
    )


def play(world: SimWorld, *, steps_max: int = STEPS_MAX) -> None:
    """Step until the job has ended."""
    world.start()
    play_on(world, steps_max=steps_max)


def play_on(world: SimWorld, *, steps_max: int = STEPS_MAX) -> None:
    while world.coordinator_down or not world.coordinator.ended:
        world.step()
        if world.steps > steps_max:
            raise Violation(f"no end after {steps_max} steps; the job is {world.coordinator.machine.state.value}")


def check_end(world: SimWorld, scenario: Scenario, outcome: JobState = JobState.FINISHED) -> None:
    """R3, and nothing left behind."""
    ended = world.coordinator.outcome
    if ended.state is not outcome:
        cause = "" if ended.cause is None else f"{ended.cause.message}\n{ended.cause.traceback}"
        raise Violation(f"the job is {ended.state} and not {outcome}: {cause}")
    for index, (target, expected) in enumerate(zip(scenario.targets, scenario.expected, strict=True)):
        check_output(f"sink {index}", target.rows(), expected, exact=scenario.mode == "exactly_once")
        if target.prepared:
            raise Violation(f"S1: {sorted(target.prepared)} are left prepared")
    if strays := world.observer.strays():
        raise Violation(f"C7: files that no manifest names are left: {strays}")
    kept = [m for m in world.observer.manifests.values() if m.kind != PINNED_KIND]
    if len(kept) > scenario.retain:
        raise Violation(f"C7: {sorted(world.observer.manifests)} are left, {scenario.retain} are to be kept")


def check_output(where: str, rows: Counter[Row], expected: Counter[Row], *, exact: bool) -> None:
    missing, extra = expected - rows, rows - expected
    if missing:
        raise Violation(f"R3: {where} lacks {sum(missing.values())} rows, such as {next(iter(missing))}")
    if extra and exact:
        raise Violation(f"R3: {where} has {sum(extra.values())} rows too many, such as {next(iter(extra))}")


def sweep(
    seeds: range,
    *,
    mode: Mode = "exactly_once",
    monitors: bool = True,
    jobs: int = 1,
    broken: AbstractContextManager[None] | None = None,
    space: Space = PROTOCOL,
) -> Iterator[Result]:
    """The results of all seeds, in any order with several ``jobs``."""
    if jobs == 1:
        with broken or nullcontext():
            for seed in seeds:
                yield run_seed(seed, mode=mode, monitors=monitors, space=space)
        return
    assert broken is None, "a broken engine is broken in this process only"
    with multiprocessing.get_context("spawn").Pool(jobs) as pool:
        yield from pool.imap_unordered(_Task(mode, monitors, space), seeds, chunksize=8)


@dataclass(frozen=True)
class _Task:
    mode: Mode
    monitors: bool
    space: Space

    def __call__(self, seed: int) -> Result:
        return run_seed(seed, mode=self.mode, monitors=self.monitors, space=self.space)
