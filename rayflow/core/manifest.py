"""The manifest: the one file that makes a checkpoint exist (rules C2, C5), and the values it is made of.

`encode` and `decode` are exact inverses and deterministic: the same manifest gives the same bytes on every machine, and
the checksum at the end covers all that stands before it. A manifest that is torn, flipped or of a newer version is
refused with the reason; it is never half understood.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from typing import Any, Final

from rayflow.core.ids import Attempt, CheckpointId, SubtaskId
from rayflow.core.seen import SeenSplits
from rayflow.errors import CorruptCheckpointError

Json = Any
"""A JSON value (null, bool, int, float, str, list, object with string keys); opaque to the core."""

FORMAT_VERSION: Final = 3
READABLE_VERSIONS: Final = (1, 2, 3)
"""Version 1 had no blocks, pieces, sections or folders, version 2 no splits that were seen: what they lack has a
default that means the same."""


@dataclass(frozen=True, slots=True)
class FileRef:
    """A durable immutable file. ``path`` is relative to the job's checkpoint directory, with forward slashes."""

    path: str
    nbytes: int
    checksum: str
    """``sha256:<hex>`` of the whole file."""
    root: str | None = None
    """URL of the directory that ``path`` is relative to; None: the job's own. Only what was imported from a savepoint
    has one, and nothing with one is ever deleted, nor named by a checkpoint that is taken later."""


@dataclass(frozen=True, slots=True)
class Section:
    """Bytes ``offset`` to ``offset + nbytes`` of a file that holds several tables, one after the other."""

    offset: int
    nbytes: int
    checksum: str
    """``sha256:<hex>`` of these bytes."""


@dataclass(frozen=True, slots=True)
class Block:
    """One message of an Arrow IPC file, to be read and checked by itself: the schema, or a record batch."""

    first_row: int
    offset: int
    """From the beginning of the table's own bytes (of its section, where it has one)."""
    nbytes: int
    checksum: str
    """``sha256:<hex>`` of these bytes."""


@dataclass(frozen=True, slots=True)
class StateHandle:
    """One piece of one named state of one operator: an Arrow table, in a file or inline (base64 Arrow IPC file).

    A state may have several pieces in one subtask, listed oldest first; ``mode`` says how they make one table. Keyed
    state is sorted by key group: ``group_rows`` lists ``(group, first row)`` in ascending order for the groups that
    have rows, so that a subtask can restore its own range by reading a row range (rule K3).
    """

    operator: str
    subtask: int
    parallelism: int
    name: str
    rows: int
    keyed: bool
    file: FileRef | None = None
    inline: str | None = None
    group_rows: tuple[tuple[int, int], ...] = ()
    meta: Json = None
    """Small JSON beside the table (a watermark, a counter)."""
    section: Section | None = None
    """Where in ``file`` the table stands; None: the file is the table."""
    blocks: tuple[Block, ...] = ()
    """Ascending. The first is the head of the file, with the schema and no rows; each further one is a record batch.
    Empty: the table can only be read as a whole."""
    groups: tuple[int, int] | None = None
    """Key groups [first, last + 1) of it that count; rows of others are not state. None: all that the writer's subtask
    owned. A file that was written before a rescale is named by several subtasks, each with its own groups."""
    piece: str = ""
    """Unique name of an immutable piece that later checkpoints may name again; "": written for this one only."""
    spread: str = "subtask"
    """How state without keys is dealt out at another parallelism: ``subtask`` (the state of old subtask i goes to
    subtask i modulo the new parallelism), ``list`` (row by row in turn), ``union`` (everybody gets all)."""
    mode: str = "append"
    """``append``: the state is the rows of all pieces. ``upsert``: a key has one row, the one in the last piece that
    has it, and none if that one says ``__deleted``."""
    format: str = "arrow"
    """``arrow``, or ``rocksdb``: then ``parts`` are files of a RocksDB checkpoint, the rows of the table (``file``,
    ``data``) are the others, ``rows`` counts those in the store, and ``meta`` tells its tables."""
    parts: tuple[tuple[str, FileRef], ...] = ()
    """(name inside the folder, file)."""

    @property
    def files(self) -> tuple[FileRef, ...]:
        """Every file it stands on."""
        own = () if self.file is None else (self.file,)
        return (*own, *(file for _, file in self.parts))

    @property
    def nbytes(self) -> int:
        """How large the piece is, whoever wrote it."""
        if self.section is not None:
            own = self.section.nbytes
        else:
            own = len(self.inline or "") if self.file is None else self.file.nbytes
        return own + sum(file.nbytes for _, file in self.parts)


@dataclass(frozen=True, slots=True)
class SplitState:
    """A piece of a source and how far it has been read. ``split`` and ``position`` are JSON of the source's own.

    ``order`` is the place of the split in the source's reading order; pools hand out splits in that order.
    """

    source: str
    split_id: str
    order: int
    split: Json
    position: Json = None
    """None: not begun. Otherwise where the next row is: all before it lies before the barrier."""
    newest_us: int | None = None
    """The largest event time that its reader has seen, where it has one: event time goes on from it after a restore."""


@dataclass(frozen=True, slots=True)
class Committable:
    """What a sink prepared; committing it twice is a no-op (rule S1)."""

    operator: str
    payload: Json


@dataclass(frozen=True, slots=True)
class SnapshotStats:
    """How long one subtask's part took, in seconds, and how large it was."""

    start_delay_s: float = 0.0
    alignment_s: float = 0.0
    sync_s: float = 0.0
    async_s: float = 0.0
    nbytes: int = 0
    """Of the whole state, whoever wrote it and when."""
    rows: int = 0
    uploaded_bytes: int = 0
    """What this checkpoint has written: an incremental one less than ``nbytes``."""


@dataclass(frozen=True, slots=True)
class SubtaskSnapshot:
    """All that one subtask contributes to one checkpoint. Everything it names is durable."""

    subtask: SubtaskId
    states: tuple[StateHandle, ...] = ()
    splits: tuple[SplitState, ...] = ()
    """Begun and unfinished splits of a source subtask."""
    committables: tuple[Committable, ...] = ()
    """All that was prepared up to this checkpoint and is not known to be committed."""
    stats: SnapshotStats = field(default_factory=SnapshotStats)


@dataclass(frozen=True, slots=True)
class Manifest:
    """A complete checkpoint of a whole job."""

    job: str
    checkpoint: CheckpointId
    kind: str
    attempt: Attempt
    incarnation: int
    """Which coordinator of this directory wrote it (rule C8)."""
    run_id: str
    created_at: float
    """Unix seconds, for people; never used for a decision."""
    max_parallelism: int
    parallelism: Mapping[str, int]
    """Chain id -> number of subtasks."""
    operators: Mapping[str, str]
    """Stateful operator id -> a readable description, for matching on restore."""
    subtasks: tuple[SubtaskSnapshot, ...]
    pending_splits: tuple[SplitState, ...] = ()
    """Splits that no subtask had when the checkpoint was triggered."""
    seen_splits: tuple[SeenSplits, ...] = ()
    """All that were ever found, of sources that go on looking for new ones: those that stand nowhere else are read."""
    version: int = FORMAT_VERSION

    def files(self) -> tuple[FileRef, ...]:
        """Every file this manifest refers to, each once (rule C7: they live as long as a retained manifest names them).

        Files of savepoints that it was imported from are among them; they have a ``root``.
        """
        found = {(f.root, f.path): f for sub in self.subtasks for s in sub.states for f in s.files}
        return tuple(found.values())

    def committables(self, operator: str) -> tuple[Json, ...]:
        return committables_of(self.subtasks, operator)


def committables_of(snapshots: Iterable[SubtaskSnapshot], operator: str) -> tuple[Json, ...]:
    """What ``operator`` prepared and is to be committed: subtask by subtask, the oldest of each first."""
    return tuple(c.payload for sub in snapshots for c in sub.committables if c.operator == operator)


def encode(manifest: Manifest) -> bytes:
    """JSON text with sorted keys, one trailing newline, and a ``sha256`` member over the rest (rule C5)."""
    body = _manifest_json(manifest)
    body["sha256"] = _digest(body)
    return (json.dumps(body, sort_keys=True, indent=1, ensure_ascii=False) + "\n").encode()


def decode(data: bytes, *, path: str) -> Manifest:
    """The manifest in ``data``.

    Raises `CorruptCheckpointError` naming ``path`` when the bytes are torn, flipped or of a version not known here.
    """
    try:
        body = json.loads(data)
    except ValueError as error:
        raise CorruptCheckpointError(f"manifest {path} is not whole: {error}; use an earlier checkpoint") from error
    if not isinstance(body, dict):
        raise CorruptCheckpointError(f"manifest {path} is not a JSON object; use an earlier checkpoint")
    version = body.get("version")
    if version not in READABLE_VERSIONS:
        raise CorruptCheckpointError(
            f"manifest {path} has format version {version!r}, this rayflow reads "
            f"{' and '.join(map(str, READABLE_VERSIONS))}; upgrade rayflow"
        )
    stated = body.pop("sha256", None)
    found = _digest(body)
    if stated != found:
        raise CorruptCheckpointError(
            f"manifest {path} has checksum {found}, its own text says {stated}; use an earlier checkpoint"
        )
    try:
        return _manifest_from(body)
    except (KeyError, TypeError, ValueError) as error:
        raise CorruptCheckpointError(
            f"manifest {path} lacks or misstates {error}; use an earlier checkpoint"
        ) from error


def _digest(body: Mapping[str, Json]) -> str:
    text = json.dumps(body, sort_keys=True, separators=(",", ":"), ensure_ascii=False)
    return hashlib.sha256(text.encode()).hexdigest()


def _manifest_json(m: Manifest) -> dict[str, Json]:
    seen = {"seen_splits": [s.to_json() for s in m.seen_splits]} if m.seen_splits else {}
    return {
        **seen,
        "version": m.version,
        "job": m.job,
        "checkpoint": m.checkpoint,
        "kind": m.kind,
        "attempt": m.attempt,
        "incarnation": m.incarnation,
        "run_id": m.run_id,
        "created_at": m.created_at,
        "max_parallelism": m.max_parallelism,
        "parallelism": dict(m.parallelism),
        "operators": dict(m.operators),
        "subtasks": [snapshot_json(s) for s in m.subtasks],
        "pending_splits": [_split_json(s) for s in m.pending_splits],
    }


def _manifest_from(body: Mapping[str, Json]) -> Manifest:
    return Manifest(
        job=str(body["job"]),
        checkpoint=CheckpointId(int(body["checkpoint"])),
        kind=str(body["kind"]),
        attempt=Attempt(int(body["attempt"])),
        incarnation=int(body["incarnation"]),
        run_id=str(body["run_id"]),
        created_at=float(body["created_at"]),
        max_parallelism=int(body["max_parallelism"]),
        parallelism={str(k): int(v) for k, v in body["parallelism"].items()},
        operators={str(k): str(v) for k, v in body["operators"].items()},
        subtasks=tuple(snapshot_from(s) for s in body["subtasks"]),
        pending_splits=tuple(_split_from(s) for s in body["pending_splits"]),
        seen_splits=tuple(SeenSplits.from_json(s) for s in body.get("seen_splits", ())),
        version=int(body["version"]),
    )


def snapshot_json(s: SubtaskSnapshot) -> dict[str, Json]:
    return {
        "chain": s.subtask.chain,
        "index": s.subtask.index,
        "states": [_state_json(h) for h in s.states],
        "splits": [_split_json(x) for x in s.splits],
        "committables": [{"operator": c.operator, "payload": c.payload} for c in s.committables],
        "stats": {
            "start_delay_s": s.stats.start_delay_s,
            "alignment_s": s.stats.alignment_s,
            "sync_s": s.stats.sync_s,
            "async_s": s.stats.async_s,
            "nbytes": s.stats.nbytes,
            "rows": s.stats.rows,
            "uploaded_bytes": s.stats.uploaded_bytes,
        },
    }


def snapshot_from(body: Mapping[str, Json]) -> SubtaskSnapshot:
    return SubtaskSnapshot(
        subtask=SubtaskId(str(body["chain"]), int(body["index"])),
        states=tuple(_state_from(h) for h in body["states"]),
        splits=tuple(_split_from(x) for x in body["splits"]),
        committables=tuple(Committable(str(c["operator"]), c["payload"]) for c in body["committables"]),
        stats=SnapshotStats(**body["stats"]),
    )


def _state_json(h: StateHandle) -> dict[str, Json]:
    return {
        "operator": h.operator,
        "subtask": h.subtask,
        "parallelism": h.parallelism,
        "name": h.name,
        "rows": h.rows,
        "keyed": h.keyed,
        "file": None if h.file is None else _file_json(h.file),
        "inline": h.inline,
        "group_rows": [list(pair) for pair in h.group_rows],
        "meta": h.meta,
        "section": None if h.section is None else [h.section.offset, h.section.nbytes, h.section.checksum],
        "blocks": [[b.first_row, b.offset, b.nbytes, b.checksum] for b in h.blocks],
        "groups": None if h.groups is None else list(h.groups),
        "piece": h.piece,
        "spread": h.spread,
        "mode": h.mode,
        "format": h.format,
        "parts": [[name, _file_json(file)] for name, file in h.parts],
    }


def _file_json(file: FileRef) -> dict[str, Json]:
    body: dict[str, Json] = {"path": file.path, "nbytes": file.nbytes, "checksum": file.checksum}
    if file.root is not None:
        body["root"] = file.root
    return body


def _file_from(body: Mapping[str, Json]) -> FileRef:
    root = body.get("root")
    return FileRef(str(body["path"]), int(body["nbytes"]), str(body["checksum"]), None if root is None else str(root))


def _state_from(body: Mapping[str, Json]) -> StateHandle:
    file, section, groups = body["file"], body.get("section"), body.get("groups")
    return StateHandle(
        operator=str(body["operator"]),
        subtask=int(body["subtask"]),
        parallelism=int(body["parallelism"]),
        name=str(body["name"]),
        rows=int(body["rows"]),
        keyed=bool(body["keyed"]),
        file=None if file is None else _file_from(file),
        inline=None if body["inline"] is None else str(body["inline"]),
        group_rows=tuple((int(g), int(r)) for g, r in body["group_rows"]),
        meta=body["meta"],
        section=None if section is None else Section(int(section[0]), int(section[1]), str(section[2])),
        blocks=tuple(Block(int(r), int(o), int(n), str(c)) for r, o, n, c in body.get("blocks", ())),
        groups=None if groups is None else (int(groups[0]), int(groups[1])),
        piece=str(body.get("piece", "")),
        spread=str(body.get("spread", "subtask")),
        mode=str(body.get("mode", "append")),
        format=str(body.get("format", "arrow")),
        parts=tuple((str(name), _file_from(part)) for name, part in body.get("parts", ())),
    )


def _split_json(s: SplitState) -> dict[str, Json]:
    body = {"source": s.source, "split_id": s.split_id, "order": s.order, "split": s.split, "position": s.position}
    return body if s.newest_us is None else {**body, "newest_us": s.newest_us}


def _split_from(body: Mapping[str, Json]) -> SplitState:
    newest = body.get("newest_us")
    return SplitState(
        source=str(body["source"]),
        split_id=str(body["split_id"]),
        order=int(body["order"]),
        split=body["split"],
        position=body["position"],
        newest_us=None if newest is None else int(newest),
    )
