"""The coordinator's loop: performs the actions of the pure `CoordinatorMachine` through a `CoordinatorHost`.

Everything that touches storage or sinks runs as a background task, one at a time and in order, and comes back as an
event: the loop itself never waits. C2 lives in the order of two events: `ManifestWritten` is only ever told after
`CheckpointStore.commit` has returned, and only the machine's answer to it tells a subtask to commit.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from typing import Protocol, assert_never

from rayflow.config import CheckpointConfig, JobConfig, duration_us
from rayflow.core.coordinator import CoordinatorMachine, CoordinatorSettings
from rayflow.core.events import (
    CleanUp,
    CommitWhole,
    CoordinatorAction,
    CoordinatorEvent,
    DiscardCheckpoint,
    Discover,
    Discovered,
    JobCleaned,
    JobEnded,
    JobState,
    LoadLatest,
    LookFailed,
    ManifestFailed,
    ManifestWritten,
    Note,
    Recovered,
    RecoverSinks,
    RecoveryFailed,
    Retain,
    SendCommand,
    SinksFailed,
    SinksRecovered,
    StartSubtask,
    StopSubtask,
    WholeCommitted,
    WholeFailed,
    WriteManifest,
)
from rayflow.core.ids import Attempt, CheckpointId, SubtaskId
from rayflow.core.manifest import Manifest, SplitState, SubtaskSnapshot, committables_of
from rayflow.core.messages import CommandEnvelope, FailureCause
from rayflow.errors import CorruptCheckpointError, DataError, FencedError, StateTooLargeError, StorageError
from rayflow.operators.base import Committer, Staging
from rayflow.plan import Plan
from rayflow.runtime.assembly import committers_of
from rayflow.runtime.failures import cause_of
from rayflow.storage.catalog import OFFER
from rayflow.storage.checkpoints import CheckpointStore, Incarnation
from rayflow.storage.failures import is_transient
from rayflow.storage.snapshots import check_memory_state

CHECKPOINT_FIGURES = (
    "checkpoints",
    "checkpoint_bytes",
    "checkpoint_sync_s_max",
    "checkpoint_async_s_max",
    "checkpoint_alignment_s_max",
)


class CoordinatorHost(Protocol):
    """The world around the coordinator. All methods return at once."""

    def now(self) -> float:
        """Seconds of a clock that never goes back."""

    def wall_time(self) -> float:
        """Unix seconds, for people."""

    def start_subtask(self, subtask: SubtaskId, incarnation: int) -> None: ...

    def stop_subtask(self, subtask: SubtaskId, incarnation: int) -> None: ...

    def send(self, envelope: CommandEnvelope) -> None: ...

    def background(self, task: Callable[[], CoordinatorEvent | None]) -> None:
        """Run the task off the loop, one at a time and in order; what it returns comes as an event."""

    def look(self, task: Callable[[], CoordinatorEvent | None]) -> None:
        """The same beside those tasks: it may take long, and no checkpoint waits for it."""


@dataclass(slots=True)
class Outcome:
    """How the job ended; ``state`` None while it runs."""

    state: JobState | None = None
    cause: FailureCause | None = None
    manifest: Manifest | None = None
    """The newest complete one of this coordinator's life."""


def settings_of(config: JobConfig, checkpoints: CheckpointConfig | None) -> CoordinatorSettings:
    """The core's settings; without checkpoints only the final one is taken."""
    return CoordinatorSettings(
        interval_s=None if checkpoints is None else duration_us(checkpoints.interval) / 1e6,
        timeout_s=600.0 if checkpoints is None else duration_us(checkpoints.timeout) / 1e6,
        min_pause_s=0.0 if checkpoints is None else duration_us(checkpoints.min_pause) / 1e6,
        tolerable_failures=3 if checkpoints is None else checkpoints.tolerable_failures,
        hang_timeout_s=duration_us(config.hang_timeout) / 1e6,
        restart=config.restart,
    )


class CoordinatorRuntime:
    """One coordinator of one job: `handle` applies an event and performs what the machine answers."""

    def __init__(
        self,
        plan: Plan,
        settings: CoordinatorSettings,
        *,
        store: CheckpointStore,
        retain: int,
        host: CoordinatorHost,
        memory_bound: int | None = None,
        staging: Staging | None = None,
    ) -> None:
        self.machine = CoordinatorMachine(plan.topology(), settings)
        self.outcome = Outcome()
        self._plan = plan
        self._store = store
        self._retain = retain
        self._host = host
        self._memory_bound = memory_bound
        self._incarnation: Incarnation | None = None
        self._discovered: dict[str, tuple[SplitState, ...]] = {}
        self._staging = staging
        self._committers: dict[str, Committer] | None = None
        """Opened once it is known for whom: when the directory has been claimed."""
        self._titles = {o.id: o.title for o in plan.sinks().values()}
        self._operators = {o.id: o.title for o in plan.operators().values() if o.stateful}
        self.checkpoint_figures = dict.fromkeys(CHECKPOINT_FIGURES, 0.0)
        """Over all checkpoints that were acknowledged by everybody; see `CHECKPOINT_FIGURES`."""

    @property
    def ended(self) -> bool:
        return self.outcome.state is not None

    def start(self) -> None:
        self._perform(self.machine.start(self._host.now()))

    def handle(self, event: CoordinatorEvent) -> None:
        if not self.ended:
            self._perform(self.machine.handle(event, self._host.now()))

    def next_deadline(self) -> float | None:
        return None if self.ended else self.machine.next_deadline()

    def _perform(self, actions: Sequence[CoordinatorAction]) -> None:
        for action in actions:
            match action:
                case SendCommand(attempt, subtask, sequence, command):
                    self._host.send(CommandEnvelope(attempt, subtask, sequence, command))
                case StartSubtask(subtask, incarnation):
                    self._host.start_subtask(subtask, incarnation)
                case StopSubtask(subtask, incarnation):
                    self._host.stop_subtask(subtask, incarnation)
                case LoadLatest(unresolved):
                    self._host.background(self._load(unresolved))
                case RecoverSinks(attempt, manifest):
                    self._host.background(self._recover_sinks(attempt, manifest))
                case Discover(attempt, source):
                    self._host.look(self._look(attempt, source))
                case WriteManifest():
                    self._host.background(self._write_manifest(action))
                case CommitWhole():
                    self._host.background(self._commit_whole(action))
                case DiscardCheckpoint(checkpoint):
                    self._host.background(_quietly(self._store.discard, checkpoint))
                case Retain(newest):
                    self._host.background(_quietly(self._store.retain, newest, self._retain))
                case CleanUp(outcome, manifest_complete):
                    self._host.background(self._clean_up(outcome, manifest_complete))
                case JobEnded(outcome, cause):
                    self.outcome.state, self.outcome.cause = outcome, self._with_offer(cause)
                case Note():
                    pass
                case _:
                    assert_never(action)

    def _with_offer(self, cause: FailureCause | None) -> FailureCause | None:
        """A state file that cannot be restored is found by a subtask, which does not know what else there is."""
        restored = self.outcome.manifest
        if cause is None or restored is None or cause.kind != CorruptCheckpointError.__name__:
            return cause
        if OFFER in cause.message:
            return cause  # found while the manifest was read, which tells it
        try:
            offer = self._store.offer_before(restored.checkpoint)
        except StorageError:
            return cause
        return replace(cause, message=f"{cause.message}. {offer}")

    # ------------------------------------------------------------------------------------------------ background tasks

    def _load(self, unresolved: tuple[CheckpointId, ...]) -> Callable[[], CoordinatorEvent]:
        def load() -> CoordinatorEvent:
            try:
                return self._recovered(unresolved)
            except Exception as error:
                fatal = _fatal(error, first=self._incarnation is None)
                return RecoveryFailed(cause_of(error, where="recovery", fatal=fatal))

        return load

    def _recovered(self, unresolved: tuple[CheckpointId, ...]) -> Recovered:
        """Claim the directory the first time; after a failure read it again."""
        if self._incarnation is None:
            self._incarnation = self._store.claim()
        else:
            self._incarnation = self._store.latest(self._incarnation, unresolved)
        found = self._incarnation
        if self._committers is None:
            self._committers = committers_of(
                self._plan, self._plan.chains, run_id=found.life, staging=self._staging, whole=True
            )
        if found.manifest is not None:
            self.outcome.manifest = found.manifest
        # A source that the checkpoint has not seen is new in the flow, and is read from its beginning.
        known = frozenset(() if found.manifest is None else found.manifest.parallelism)
        discovered = tuple(
            split for name in self._plan.sources() if name not in known for split in self._splits_of(name)
        )
        return Recovered(found.manifest, found.next_checkpoint, found.next_attempt, discovered, found.life)

    def _splits_of(self, source: str) -> tuple[SplitState, ...]:
        """What it discovers, asked once."""
        if source not in self._discovered:
            found = self._plan.sources()[source].source.discover()
            self._discovered[source] = tuple(
                SplitState(source, split_id, order, split) for order, (split_id, split) in enumerate(found)
            )
        return self._discovered[source]

    def _look(self, attempt: Attempt, source: str) -> Callable[[], CoordinatorEvent]:
        def look() -> CoordinatorEvent:
            try:
                found = tuple(self._plan.sources()[source].source.discover_again())
            except Exception as error:
                cause = cause_of(error, where=f"source {source!r}", fatal=(DataError,))
                reason = f"{type(error).__name__}: {error}"
                return LookFailed(attempt, source, reason, cause if cause.fatal else None)
            return Discovered(attempt, source, found)

        return look

    def _recover_sinks(self, attempt: Attempt, manifest: Manifest | None) -> Callable[[], CoordinatorEvent]:
        def recover() -> CoordinatorEvent:
            try:
                # Recovery removes what was prepared and is not named; that of a later run is not ours to remove.
                self._store.check_owner()
                for operator, committer in (self._committers or {}).items():
                    payloads = () if manifest is None else manifest.committables(operator)
                    committer.recover(payloads, fresh=manifest is None)
            except Exception as error:
                fatal = _fatal(error, first=manifest is None)
                return SinksFailed(attempt, cause_of(error, where="recovery of sinks", fatal=fatal))
            return SinksRecovered(attempt)

        return recover

    def _write_manifest(self, action: WriteManifest) -> Callable[[], CoordinatorEvent]:
        assert self._incarnation is not None
        self._count(action.snapshots)
        manifest = Manifest(
            job=self._plan.name,
            checkpoint=action.checkpoint,
            kind=action.kind.value,
            attempt=action.attempt,
            incarnation=self._incarnation.number,
            run_id=self._incarnation.run_id,
            created_at=self._host.wall_time(),
            max_parallelism=self._plan.max_parallelism,
            parallelism={c.id: c.parallelism for c in self._plan.chains},
            operators=self._operators,
            subtasks=action.snapshots,
            pending_splits=action.pending_splits,
            seen_splits=action.seen_splits,
        )

        def write() -> CoordinatorEvent:
            try:
                if self._memory_bound is not None:
                    check_memory_state(manifest.subtasks, self._memory_bound)
                self._store.commit(manifest)
            except FencedError as error:
                return ManifestFailed(manifest.checkpoint, str(error), fenced=True)
            except StateTooLargeError as error:
                return ManifestFailed(manifest.checkpoint, str(error), fatal=cause_of(error, where="checkpoint"))
            except Exception as error:
                return ManifestFailed(manifest.checkpoint, f"{type(error).__name__}: {error}")
            self.outcome.manifest = manifest
            return ManifestWritten(manifest.checkpoint)

        return write

    def _commit_whole(self, action: CommitWhole) -> Callable[[], CoordinatorEvent]:
        """In order behind the write of the manifest, and before that of any later one."""

        def commit() -> CoordinatorEvent:
            step = ""
            try:
                # A later run may have gone on from before this checkpoint: then it is not to be committed any more.
                self._store.check_owner()
                for operator, committer in (self._committers or {}).items():
                    step = self._titles[operator]
                    payloads = committables_of(action.snapshots, operator)
                    if committer.whole and payloads:
                        committer.commit(payloads)
            except Exception as error:
                cause = cause_of(error, where=f"commit of step {step!r}", fatal=(FencedError,))
                return WholeFailed(action.attempt, action.checkpoint, cause)
            return WholeCommitted(action.attempt, action.checkpoint)

        return commit

    def _count(self, snapshots: Sequence[SubtaskSnapshot]) -> None:
        figures = self.checkpoint_figures
        figures["checkpoints"] += 1
        for stats in (snapshot.stats for snapshot in snapshots):
            figures["checkpoint_bytes"] += stats.nbytes
            for name in ("sync_s", "async_s", "alignment_s"):
                key = f"checkpoint_{name}_max"
                figures[key] = max(figures[key], getattr(stats, name))

    def _clean_up(self, outcome: JobState, manifest_complete: bool) -> Callable[[], CoordinatorEvent]:
        def clean() -> CoordinatorEvent:
            try:
                if manifest_complete:
                    if outcome is JobState.FINISHED:
                        for committer in (self._committers or {}).values():
                            committer.finish()
                    self._store.sweep(self._retain)
            except Exception as error:
                return JobCleaned(cause_of(error, where="clean-up"))
            return JobCleaned()

        return clean


def _fatal(error: Exception, *, first: bool) -> tuple[type, ...]:
    """Which errors of a recovery end the job. A place that never could be used (no rights, no bucket, a full disk) ends
    it the first time; a job that has used it before waits for a remedy."""
    hopeless = first and error.__cause__ is not None and not is_transient(error)
    return (DataError, FencedError, StorageError) if hopeless else (DataError, FencedError)


def _quietly(function: Callable[..., object], *args: object) -> Callable[[], None]:
    """Deleting garbage must not fail a job: what is left is found by the next retention or by the sweep."""

    def task() -> None:
        try:
            function(*args)
        except Exception:
            return

    return task
