"""Checkpoint directories written by hand, piece by piece, with the engine's own writer."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from pathlib import Path

import pyarrow as pa

from rayflow.core.ids import Attempt, CheckpointId, SubtaskId
from rayflow.core.manifest import Manifest, SplitState, SubtaskSnapshot, encode
from rayflow.operators.base import FrozenState, FrozenTable, new_piece
from rayflow.storage.filesystem import ObjectStore
from rayflow.storage.layout import claim_path, manifest_path
from rayflow.storage.snapshots import SnapshotStore

JOB = "by hand"
GROUPS = 16


def frozen(name: str, pieces: Sequence[pa.Table], keys: tuple[str, ...] = ("k",), *subkeys: str) -> FrozenState:
    """A state of one row a key in these pieces."""
    table = FrozenTable(
        name,
        schema=pieces[0].schema,
        key_columns=keys,
        pieces=tuple(new_piece([piece]) for piece in pieces),
        mode="upsert",
        subkey_columns=subkeys,
    )
    return FrozenState((table,))


def write_checkpoint(
    folder: Path, checkpoint: int, states: Sequence[Mapping[str, FrozenState]], splits: Sequence[SplitState] = ()
) -> Manifest:
    """``states``: for each subtask, operator id -> its state. ``folder`` is the directory of the job."""
    store = ObjectStore(str(folder))
    snapshots = []
    for index, own in enumerate(states):
        subtask = SubtaskId("chain", index)
        written = SnapshotStore(store, GROUPS).write(checkpoint, subtask, len(states), list(own.items()))
        snapshots.append(SubtaskSnapshot(subtask, written.handles, tuple(splits) if index == 0 else ()))
    manifest = Manifest(
        job=JOB,
        checkpoint=CheckpointId(checkpoint),
        kind="periodic",
        attempt=Attempt(1),
        incarnation=1,
        run_id="r",
        created_at=0.0,
        max_parallelism=GROUPS,
        parallelism={"chain": len(states)},
        operators={name: name for own in states for name in own},
        subtasks=tuple(snapshots),
    )
    store.put(claim_path(1), json.dumps({"job": JOB}).encode())
    store.put(manifest_path(checkpoint), encode(manifest))
    return manifest
