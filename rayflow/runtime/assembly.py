"""What one attempt of one subtask is made of, built from the plan."""

from __future__ import annotations

from collections.abc import Callable, Collection, Sequence
from dataclasses import dataclass
from pathlib import Path

from rayflow.config import JobConfig, duration_us
from rayflow.core.ids import Attempt, ChannelId, SubtaskId
from rayflow.core.keygroups import key_group_range
from rayflow.core.manifest import StateHandle
from rayflow.core.restore import clip
from rayflow.operators.base import (
    ColdStore,
    Committer,
    CommitterContext,
    OperatorContext,
    RestoredState,
    Staging,
    StateBackend,
)
from rayflow.plan import Chain, Plan
from rayflow.runtime.chain import ChainRunner
from rayflow.runtime.emitter import Emitter, Offer, partitioner_of
from rayflow.runtime.ports import SnapshotStore
from rayflow.runtime.scratch import Scratch
from rayflow.runtime.source import SourceRunner
from rayflow.runtime.uploads import Uploads
from rayflow.storage.snapshots import dealt


@dataclass(frozen=True, slots=True)
class JobSpec:
    """What a subtask has to know of its job beside the plan; the same for all of them."""

    plan: Plan
    config: JobConfig
    exactly_once: bool
    submission: str
    """Names the processes and channels of this start of the job; committers and operators go by `Launch.run_id`."""
    heartbeat_s: float | None = 1.0
    threads: bool = False
    """See `OperatorContext.threads`."""
    staging: Staging | None = None


def inputs_of(plan: Plan, subtask: SubtaskId) -> list[ChannelId]:
    return [c for edge in plan.edges_to(subtask.chain) for c in plan.channels(edge) if c.target == subtask]


def outputs_of(plan: Plan, subtask: SubtaskId) -> list[ChannelId]:
    return [c for edge in plan.edges_from(subtask.chain) for c in plan.channels(edge) if c.source == subtask]


def committers_of(
    plan: Plan, chains: Collection[Chain], *, run_id: str, staging: Staging | None, whole: bool
) -> dict[str, Committer]:
    """New committers by operator id, opened, of those sinks in ``chains`` that need one. Raises what opening raises.

    Without ``whole`` those are left out that only the coordinator may use (`Committer.whole`).
    """
    made: dict[str, Committer] = {}
    for chain in chains:
        for operator in chain.operators:
            committer = operator.factory.committer() if operator.is_sink else None
            if committer is not None and (whole or not committer.whole):
                committer.open(
                    CommitterContext(plan.name, run_id, operator.id, operator.title, chain.parallelism, staging)
                )
                made[operator.id] = committer
    return made


def _open_rocks(folder: Path, ctx: OperatorContext) -> ColdStore:
    from rayflow.storage.rocks import open_rocks  # only a job that asks for it needs the library

    return open_rocks(folder, ctx)


class Parts:
    """Builds the parts of an attempt; keeps none of them but the folders on local disk."""

    def __init__(
        self,
        spec: JobSpec,
        subtask: SubtaskId,
        attempt: Attempt,
        *,
        run_id: str,
        now: Callable[[], float],
        wall_time: Callable[[], float],
    ) -> None:
        self._spec = spec
        self._subtask = subtask
        self._attempt = attempt
        self._run_id = run_id
        self._now = now
        self._wall_time = wall_time
        self._plan = spec.plan.chain(subtask.chain)
        self.outputs = outputs_of(spec.plan, subtask)
        self.scratch = Scratch(spec.config.local_dir, spec.plan.name, subtask, attempt)
        self._backend = self._state_backend()

    @property
    def key_groups(self) -> range:
        return key_group_range(self._subtask.index, self._plan.parallelism, self._spec.plan.max_parallelism)

    def context(self, operator: str, title: str) -> OperatorContext:
        return OperatorContext(
            job=self._spec.plan.name,
            run_id=self._run_id,
            operator=operator,
            step=title,
            subtask=self._subtask.index,
            parallelism=self._plan.parallelism,
            max_parallelism=self._spec.plan.max_parallelism,
            attempt=self._attempt,
            key_groups=self.key_groups,
            now=self._now,
            wall_time=self._wall_time,
            backend=self._backend,
            staging=self._spec.staging,
            threads=self._spec.threads,
        )

    def _state_backend(self) -> StateBackend:
        config = self._spec.config
        if config.state != "rocksdb":
            return StateBackend(config.state or "fs", config.state_memory_bytes)
        return StateBackend("rocksdb", config.state_memory_bytes, self.scratch.folder, _open_rocks)

    def uploads(self, store: SnapshotStore, restored: Sequence[StateHandle] = ()) -> Uploads:
        """``restored``: what this attempt begins with; the pieces in it need not be written again."""
        own = [clip(h, self.key_groups, self._spec.plan.max_parallelism) for h in restored if not self._is_dealt(h)]
        committers = committers_of(
            self._spec.plan, (self._plan,), run_id=self._run_id, staging=self._spec.staging, whole=False
        )
        return Uploads(self._subtask, self._plan.parallelism, store, committers, own)

    def _is_dealt(self, handle: StateHandle) -> bool:
        """Whether this subtask gets only some of the rows of state without keys."""
        return not handle.keyed and handle.spread == "list" and handle.parallelism != self._plan.parallelism

    def emitter(self, offer: Offer) -> Emitter:
        plan, config = self._spec.plan, self._spec.config
        outputs = []
        for edge in plan.edges_from(self._subtask.chain):
            channels = [c for c in self.outputs if c.edge == edge.index]
            partitioner = partitioner_of(
                edge, len(channels), max_parallelism=plan.max_parallelism, subtask_index=self._subtask.index
            )
            outputs.append((edge, channels, partitioner))
        return Emitter(
            outputs,
            offer,
            batch_rows=config.batch_rows,
            linger_s=duration_us(config.linger) / 1e6,
            credit_bytes=config.inflight_bytes,
            now=self._now,
        )

    def chain(self, emitter: Emitter) -> ChainRunner:
        contexts = {operator.id: self.context(operator.id, operator.title) for operator in self._plan.operators}
        return ChainRunner(self._plan.operators, contexts, emitter.emit)

    def source(self) -> SourceRunner | None:
        planned = self._plan.source
        return None if planned is None else SourceRunner(planned, self.context(planned.id, planned.title))

    def states(self, handles: Sequence[StateHandle], store: SnapshotStore) -> dict[str, list[RestoredState]]:
        """The states by operator; keyed ones hold the rows of this subtask's key groups only (rule K3), and of a table
        that is dealt out row by row it gets every n-th row."""
        states: dict[str, list[RestoredState]] = {}
        for handle in handles:
            restored = store.read(handle, self.key_groups if handle.keyed else None)
            if self._is_dealt(handle):
                restored = dealt(restored, self._subtask.index, self._plan.parallelism)
            states.setdefault(handle.operator, []).append(restored)
        return states
