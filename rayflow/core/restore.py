"""One manifest restores all subtasks (rule R1): who gets which state, which splits begin where.

R2  sources resume at the positions of the manifest.
K3  keyed state goes to every subtask whose key-group range overlaps the groups that count in it.
K4  the number of key groups is that of the manifest.
Operator state without keys is dealt out by its `StateHandle.spread`.
"""

from __future__ import annotations

from rayflow.core.ids import SubtaskId
from rayflow.core.keygroups import key_group_range
from rayflow.core.manifest import Manifest, SplitState, StateHandle
from rayflow.core.topology import Topology


def mismatch(manifest: Manifest, topology: Topology) -> str | None:
    """Why this manifest cannot restore this topology, in one sentence; None when it can.

    Nothing is dropped silently: state of an operator or splits of a source that the flow no longer has are a mismatch.
    """
    where = f"checkpoint {manifest.checkpoint}"
    if manifest.max_parallelism != topology.max_parallelism:
        return (
            f"{where} has {manifest.max_parallelism} key groups, this flow has max_parallelism="
            f"{topology.max_parallelism}; run it with max_parallelism={manifest.max_parallelism}"
        )
    for snapshot in manifest.subtasks:
        for handle in snapshot.states:
            if topology.chain_of(handle.operator) is None:
                return (
                    f"{where} holds state {handle.name!r} of operator {handle.operator!r}, which this flow does not "
                    "have; give the operator its old name or start on an empty checkpoint directory"
                )
            if handle.keyed and handle.operator not in topology.keyed_operators:
                return (
                    f"{where} holds keyed state {handle.name!r} of operator {handle.operator!r}, which is not keyed in "
                    "this flow; key the stream as before or start on an empty checkpoint directory"
                )
    for split in splits_of(manifest):
        if split.source not in topology.sources:
            return (
                f"{where} holds split {split.split_id!r} of source {split.source!r}, which this flow does not have; "
                "give the source its old name or start on an empty checkpoint directory"
            )
    return None


def splits_of(manifest: Manifest | None) -> tuple[SplitState, ...]:
    """Every split that is not read up: those nobody had, and those that were begun, with their positions."""
    if manifest is None:
        return ()
    begun = tuple(split for snapshot in manifest.subtasks for split in snapshot.splits)
    return manifest.pending_splits + begun


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


def _receivers(handle: StateHandle, parallelism: int, max_parallelism: int) -> list[int]:
    if not handle.keyed:
        if handle.spread == "union" or (handle.spread == "list" and handle.parallelism != parallelism):
            return list(range(parallelism))
        return [handle.subtask % parallelism]
    old = groups_of(handle, max_parallelism)
    return [i for i in range(parallelism) if _overlap(old, key_group_range(i, parallelism, max_parallelism))]


def _overlap(a: range, b: range) -> bool:
    return max(a.start, b.start) < min(a.stop, b.stop)
