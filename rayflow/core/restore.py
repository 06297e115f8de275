"""One manifest restores all subtasks (rule R1): who gets which state, which splits begin where.

R2  sources resume at the positions of the manifest.
K3  keyed state goes to every subtask whose key-group range overlaps the groups that count in it.
K4  the number of key groups is that of the manifest.
Operator state without keys is dealt out by its `StateHandle.spread`.
"""

from __future__ import annotations

from dataclasses import replace
from difflib import get_close_matches

from rayflow.core.ids import SubtaskId
from rayflow.core.keygroups import key_group_range
from rayflow.core.manifest import Manifest, SplitState, StateHandle
from rayflow.core.seen import SeenSplits
from rayflow.core.topology import Topology


def mismatch(manifest: Manifest, topology: Topology) -> str | None:
    """Why this manifest cannot restore this topology, in one sentence; None when it can.

    Nothing is dropped silently: state of an operator, splits of a source or output prepared by a sink that the flow no
    longer has are a mismatch, unless `Topology.allow_dropped` names it.
    """
    where = f"checkpoint {manifest.checkpoint}"
    if manifest.max_parallelism != topology.max_parallelism:
        return (
            f"{where} has {manifest.max_parallelism} key groups, this flow has max_parallelism="
            f"{topology.max_parallelism}; run it with max_parallelism={manifest.max_parallelism}, or re-bucket a "
            f"savepoint of it: rayflow rebucket SAVEPOINT TARGET --max-parallelism {topology.max_parallelism}"
        )
    for name, what in unmatched(manifest, topology).items():
        if name not in topology.allow_dropped:
            return f"{where} holds {what}, which this flow does not have; {remedy(name, manifest, topology)}"
    for problem in not_seen(manifest, topology):
        return f"{where} {problem}"
    for snapshot in manifest.subtasks:
        for handle in snapshot.states:
            known = topology.chain_of(handle.operator) is not None
            if known and handle.keyed and handle.operator not in topology.keyed_operators:
                return (
                    f"{where} holds keyed state {handle.name!r} of operator {handle.operator!r}, which is not keyed in "
                    "this flow; key the stream as before or start on an empty checkpoint directory"
                )
    return None


def unmatched(manifest: Manifest, topology: Topology) -> dict[str, str]:
    """Ids of operators and sources that hold something in the manifest and are not in the flow -> what they hold."""
    found: dict[str, str] = {}
    for snapshot in manifest.subtasks:
        for handle in snapshot.states:
            if topology.chain_of(handle.operator) is None:
                found.setdefault(handle.operator, f"state {handle.name!r} of operator {handle.operator!r}")
    for split in splits_of(manifest):
        if split.source not in topology.sources:
            found.setdefault(split.source, f"split {split.split_id!r} of source {split.source!r}")
    for snapshot in manifest.subtasks:
        for committable in snapshot.committables:
            if topology.chain_of(committable.operator) is None:
                found.setdefault(committable.operator, f"output to be committed by sink {committable.operator!r}")
    return found


def remedy(name: str, manifest: Manifest, topology: Topology) -> str:
    """What to do about ``name``, which the flow does not have: near names of the flow first."""
    title = manifest.operators.get(name)
    called = f" ({title})" if title and title != name else ""
    old = {h.operator for snapshot in manifest.subtasks for h in snapshot.states}
    old |= {split.source for split in splits_of(manifest)}
    now = {o for operators in topology.operators_of.values() for o in operators} | topology.sources
    near = get_close_matches(name, sorted(now - old), n=3, cutoff=0.5)
    # A step that lost or won its name keeps its label: "window-1" and name="per_origin" have no letter in common.
    meant = f"it has {' and '.join(map(repr, near))}, near in name: " if near else ""
    return (
        f"{meant}give the step its old name{called} by name={name!r}, or leave what it holds behind by "
        f"allow_dropped=({name!r},), on the command line --allow-dropped {name}"
    )


def splits_of(manifest: Manifest | None) -> tuple[SplitState, ...]:
    """Every split that is not read up: those nobody had, and those that were begun, with their positions."""
    if manifest is None:
        return ()
    begun = tuple(split for snapshot in manifest.subtasks for split in snapshot.splits)
    return manifest.pending_splits + begun


def seen_of(manifest: Manifest | None, source: str) -> SeenSplits | None:
    """What was ever found of a source that went on looking; None when it did not."""
    seen = () if manifest is None else manifest.seen_splits
    return next((s for s in seen if s.source == source), None)


def not_seen(manifest: Manifest, topology: Topology) -> list[str]:
    """Sources that look for new splits now and did not then: which ones were read to their end is not known (R2)."""
    return [
        f"does not tell which splits of source {source!r} were read to their end, because the source did not look for "
        "new ones then; leave that out again, or give the source another name= to read everything from the beginning"
        for source in sorted(topology.discovering)
        if source in manifest.parallelism and source not in topology.endless and seen_of(manifest, source) is None
    ]


def states_for(manifest: Manifest | None, topology: Topology) -> dict[SubtaskId, tuple[StateHandle, ...]]:
    """The handles each subtask restores from, in the order of the manifest."""
    result: dict[SubtaskId, list[StateHandle]] = {s: [] for s in topology.subtasks}
    for snapshot in manifest.subtasks if manifest is not None else ():
        for handle in snapshot.states:
            chain = topology.chain_of(handle.operator)
            if chain is not None:
                for index in _receivers(handle, topology.parallelism[chain], topology.max_parallelism):
                    result[SubtaskId(chain, index)].append(handle)
    return {s: tuple(handles) for s, handles in result.items()}


def groups_of(handle: StateHandle, max_parallelism: int) -> range:
    """The key groups whose rows in ``handle`` are state."""
    if handle.groups is not None:
        return range(*handle.groups)
    return key_group_range(handle.subtask, handle.parallelism, max_parallelism)


def clip(handle: StateHandle, key_groups: range, max_parallelism: int) -> StateHandle:
    """The handle as the owner of ``key_groups`` names it: what lies outside does not count (rule K3).

    A part of a piece is another piece and has another id, or the parts would be one again after the next rescale.
    """
    if not handle.keyed:
        return handle
    before = groups_of(handle, max_parallelism)
    start = max(before.start, key_groups.start)
    own = range(start, max(start, min(before.stop, key_groups.stop)))
    piece = handle.piece
    if piece and own != before:
        piece = f"{piece.partition('@')[0]}@{own.start}-{own.stop}"
    return replace(handle, groups=(own.start, own.stop), piece=piece)


def _receivers(handle: StateHandle, parallelism: int, max_parallelism: int) -> list[int]:
    if not handle.keyed:
        if handle.spread == "union" or (handle.spread == "list" and handle.parallelism != parallelism):
            return list(range(parallelism))
        return [handle.subtask % parallelism]
    old = groups_of(handle, max_parallelism)
    return [i for i in range(parallelism) if _overlap(old, key_group_range(i, parallelism, max_parallelism))]


def _overlap(a: range, b: range) -> bool:
    return max(a.start, b.start) < min(a.stop, b.stop)
