"""What a checkpoint or savepoint would give to a plan, told before anything starts: the restore plan.

State is mapped by operator id: ``name=`` of the step, or its label and ordinal. Nothing is dropped silently (see
`rayflow.core.restore.mismatch`, which holds the same at every recovery); a change of columns is taken over where no
value is lost by it (`rayflow.operators.state.evolution`), else refused with the reason.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from enum import Enum
from typing import Any

import pyarrow as pa

from rayflow.core.manifest import Manifest, StateHandle
from rayflow.core.restore import not_seen, remedy, splits_of, unmatched
from rayflow.core.topology import Topology
from rayflow.errors import ConfigError, StateSchemaError
from rayflow.operators.state.evolution import Outcome, compare
from rayflow.plan import Plan, PlannedOperator

SPLITS = "splits"
OUTPUT = "output"

SchemaOf = Callable[[StateHandle], pa.Schema]


class Verdict(Enum):
    MATCHED = "matched"
    NEW = "new"
    """Starts empty; a new source is read from its beginning."""
    DROPPED = "dropped"
    """Left behind, because the user named it."""
    CHANGED = "changed"
    """Its columns are others now, and the rows are taken over."""
    KEPT = "kept"
    """The step does not declare it any more; it stays in the checkpoints."""
    REFUSED = "refused"


@dataclass(frozen=True, slots=True)
class RestoreLine:
    """One state of one step, the splits of a source, or what a sink has prepared."""

    step: str
    """Operator id."""
    state: str
    """Its name; ``splits`` of a source, ``output`` of a sink."""
    verdict: Verdict
    detail: str = ""
    parallelism: tuple[int | None, int | None] = (None, None)
    """(in the checkpoint, in the flow)."""
    rows: int | None = None


@dataclass(frozen=True, slots=True)
class RestorePlan:
    """What would be restored, and why it would be refused."""

    flow: str
    url: str
    job: str
    """Name of the flow that it was taken of."""
    checkpoint: int
    kind: str
    max_parallelism: tuple[int, int]
    lines: tuple[RestoreLine, ...]
    problems: tuple[str, ...]
    """One sentence each. Empty: it can be restored."""
    schema_problems: int = 0

    @property
    def refused(self) -> bool:
        return bool(self.problems)

    def __str__(self) -> str:
        words: list[tuple[str, ...]] = [("step", "state", "rows", "parallelism", "", "")]
        words += [_words(line) for line in self.lines]
        widths = [max(len(row[i]) for row in words) for i in range(5)]
        told = [
            f"restore of flow {self.flow!r} from {self.kind} {self.checkpoint} of job {self.job!r} at {self.url}",
            *("  ".join(w.ljust(n) for w, n in zip(row, [*widths, 0], strict=True)).rstrip() for row in words),
        ]
        told += [f"refused: {problem}" for problem in self.problems] or ["it can be restored"]
        return "\n".join(told)

    def to_json(self) -> dict[str, object]:
        return {
            "flow": self.flow,
            "url": self.url,
            "job": self.job,
            "checkpoint": self.checkpoint,
            "kind": self.kind,
            "max_parallelism": list(self.max_parallelism),
            "ok": not self.refused,
            "states": [
                {
                    "step": line.step,
                    "state": line.state,
                    "verdict": line.verdict.value,
                    "detail": line.detail,
                    "parallelism": list(line.parallelism),
                    "rows": line.rows,
                }
                for line in self.lines
            ],
            "problems": list(self.problems),
        }

    def check(self) -> None:
        """Raises `StateSchemaError` or `ConfigError` with the first problem, when there is one."""
        if not self.problems:
            return
        more = len(self.problems) - 1
        hint = f" ({more} more: see rayflow restore-plan)" if more else ""
        error = StateSchemaError if self.schema_problems == len(self.problems) else ConfigError
        raise error(f"cannot start from {self.url}: {self.problems[0]}{hint}")


def plan_restore(
    plan: Plan, manifest: Manifest, schema_of: SchemaOf, *, url: str, allow_other_flow: bool = False
) -> RestorePlan:
    """Compare all that ``manifest`` holds with what ``plan`` has. Reads schemas only.

    Raises `CorruptCheckpointError` when a schema that is needed cannot be read.
    """
    return _Comparison(plan, manifest, schema_of).result(url, allow_other_flow)


class _Comparison:
    def __init__(self, plan: Plan, manifest: Manifest, schema_of: SchemaOf) -> None:
        self._plan = plan
        self._manifest = manifest
        self._schema_of = schema_of
        self._topology: Topology = plan.topology()
        self._problems: list[str] = []
        self._schema_problems: list[str] = []

    def result(self, url: str, allow_other_flow: bool) -> RestorePlan:
        plan, manifest = self._plan, self._manifest
        if manifest.job != plan.name and not allow_other_flow:
            self._problems.append(
                f"it was taken of flow {manifest.job!r}, this one is {plan.name!r}; if that is meant, pass "
                "allow_other_flow=True (--allow-other-flow)"
            )
        if manifest.max_parallelism != plan.max_parallelism:
            self._problems.append(
                f"it has {manifest.max_parallelism} key groups, this flow has max_parallelism={plan.max_parallelism}, "
                f"which is fixed for the life of a job (rule K4); run it with max_parallelism="
                f"{manifest.max_parallelism}, or re-bucket the savepoint: rayflow rebucket {url} TARGET "
                f"--max-parallelism {plan.max_parallelism}"
            )
        self._problems += [f"it {problem}" for problem in not_seen(manifest, self._topology)]
        lines = [*self._gone(), *self._sources(), *self._operators(), *self._outputs()]
        return RestorePlan(
            flow=plan.name,
            url=url,
            job=manifest.job,
            checkpoint=manifest.checkpoint,
            kind=manifest.kind,
            max_parallelism=(manifest.max_parallelism, plan.max_parallelism),
            lines=tuple(lines),
            problems=(*self._problems, *self._schema_problems),
            schema_problems=len(self._schema_problems),
        )

    def _gone(self) -> Iterator[RestoreLine]:
        """What the flow does not have any more."""
        for name, what in unmatched(self._manifest, self._topology).items():
            allowed = name in self._topology.allow_dropped
            if not allowed:
                told = remedy(name, self._manifest, self._topology)
                self._problems.append(f"it holds {what}, which this flow does not have; {told}")
            verdict = Verdict.DROPPED if allowed else Verdict.REFUSED
            states = self._states_of(name)
            splits = sum(split.source == name for split in splits_of(self._manifest))
            for state, handles in states.items():
                old = self._old_parallelism(handles)
                yield RestoreLine(name, state, verdict, "no such step", (old, None), _rows(handles))
            if splits:
                old_readers = self._manifest.parallelism.get(name)
                yield RestoreLine(name, SPLITS, verdict, "no such source", (old_readers, None), splits)
            if not states and not splits:
                yield RestoreLine(name, OUTPUT, verdict, "no such sink")

    def _sources(self) -> Iterator[RestoreLine]:
        left = Counter(split.source for split in splits_of(self._manifest))
        begun = Counter(s.source for s in splits_of(self._manifest) if s.position is not None)
        for chain in self._plan.chains:
            if chain.source is None:
                continue
            old = self._manifest.parallelism.get(chain.id)
            degrees = (old, chain.parallelism)
            if old is None and not left[chain.id]:
                yield RestoreLine(chain.id, SPLITS, Verdict.NEW, "read from its beginning", degrees)
            else:
                told = f"{begun[chain.id]} of them begun" if left[chain.id] else "all read"
                yield RestoreLine(chain.id, SPLITS, Verdict.MATCHED, told, degrees, left[chain.id])

    def _operators(self) -> Iterator[RestoreLine]:
        for chain in self._plan.chains:
            for operator in chain.operators:
                states = self._states_of(operator.id)
                if not operator.stateful:
                    if states and not operator.is_sink:
                        self._problems.append(
                            f"it holds state {next(iter(states))!r} of step {operator.id!r}, which keeps no state in "
                            f"this flow; give this step another name and pass allow_dropped=({operator.id!r},)"
                        )
                        for state, handles in states.items():
                            yield self._line(operator, state, handles, Verdict.REFUSED, chain.parallelism, "no state")
                    continue
                yield from self._operator(operator, states, chain.parallelism)

    def _operator(
        self, operator: PlannedOperator, states: Mapping[str, list[StateHandle]], parallelism: int
    ) -> Iterator[RestoreLine]:
        declared = _declared(operator)
        if not states and not declared:
            yield RestoreLine(operator.id, "", Verdict.NEW, "starts empty", (None, parallelism))
        for name in [n for n in declared or () if n not in states]:
            yield RestoreLine(operator.id, name, Verdict.NEW, "starts empty", (None, parallelism))
        keys = tuple(getattr(operator.factory, "keys", ()) or ())
        for name, handles in states.items():
            verdict, told = Verdict.MATCHED, ""
            if handles[0].keyed and not keys:
                verdict, told = Verdict.REFUSED, "keyed before, not keyed now"
                self._problems.append(
                    f"it holds keyed state {name!r} of step {operator.id!r}, which is not keyed in this flow; key the "
                    "stream as before"
                )
            elif handles[0].format == "arrow" and declared is not None and name not in declared:
                verdict, told = Verdict.KEPT, "not declared any more; it stays in the checkpoints"
            elif handles[0].format == "arrow" and declared is not None:
                verdict, told = self._compared(operator, name, handles, declared[name], keys)
            yield self._line(operator, name, handles, verdict, parallelism, told)

    def _compared(
        self,
        operator: PlannedOperator,
        name: str,
        handles: list[StateHandle],
        new: pa.Schema,
        keys: tuple[str, ...],
    ) -> tuple[Verdict, str]:
        before, migrates = self._schema_of(handles[-1]), getattr(operator.factory, "migrates_state", True)
        if not migrates:  # whether nulls may come is known from the rows only
            before, new = _nullable(before), _nullable(new)
        found = compare(before, new, keys if handles[0].keyed else ())
        if found.outcome is Outcome.SAME:
            return Verdict.MATCHED, ""
        if found.outcome is Outcome.MIGRATES and migrates:
            return Verdict.CHANGED, "; ".join(found.changes)
        reasons = "; ".join(found.reasons or found.changes)
        self._schema_problems.append(
            f"state {name!r} of step {operator.id!r} cannot be taken over: {reasons}; keep the old columns and types, "
            "or give the step another name= and leave the old state behind by allow_dropped"
        )
        return Verdict.REFUSED, reasons

    def _outputs(self) -> Iterator[RestoreLine]:
        counts = Counter(c.operator for sub in self._manifest.subtasks for c in sub.committables)
        for name, n in counts.items():
            if self._topology.chain_of(name) is not None:
                yield RestoreLine(name, OUTPUT, Verdict.MATCHED, "committed first, if it is not yet", rows=n)

    def _states_of(self, operator: str) -> dict[str, list[StateHandle]]:
        found: dict[str, list[StateHandle]] = {}
        for snapshot in self._manifest.subtasks:
            for handle in snapshot.states:
                if handle.operator == operator:
                    found.setdefault(handle.name, []).append(handle)
        return found

    def _line(
        self,
        operator: PlannedOperator,
        state: str,
        handles: list[StateHandle],
        verdict: Verdict,
        parallelism: int,
        told: str,
    ) -> RestoreLine:
        degrees = (self._old_parallelism(handles), parallelism)
        return RestoreLine(operator.id, state, verdict, told, degrees, _rows(handles))

    def _old_parallelism(self, handles: list[StateHandle]) -> int | None:
        for snapshot in self._manifest.subtasks:
            if any(handle in snapshot.states for handle in handles[:1]):
                return self._manifest.parallelism.get(snapshot.subtask.chain)
        return None


def _declared(operator: PlannedOperator) -> Mapping[str, pa.Schema] | None:
    """The states that the step will have, where it can tell before it runs."""
    tell: Any = getattr(operator.factory, "state_schemas", None)
    return None if tell is None else tell(operator.schema)


def _nullable(schema: pa.Schema) -> pa.Schema:
    return pa.schema([field.with_nullable(True) for field in schema])


def _rows(handles: list[StateHandle]) -> int:
    return sum(handle.rows for handle in handles)


def _words(line: RestoreLine) -> tuple[str, ...]:
    old, new = ("-" if n is None else str(n) for n in line.parallelism)
    degrees = "" if line.parallelism == (None, None) else f"{old} -> {new}"
    rows = "" if line.rows is None else f"{line.rows:,}"
    return line.step, line.state, rows, degrees, line.verdict.value, line.detail
