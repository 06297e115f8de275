"""The checkpoints of one job: who may write them (C8), the commit point (C2, C5), and what to go on from (R1).

The protocol and why it is atomic stand in `rayflow.storage.fencing`. Deleting stands in `rayflow.storage.retention`.
"""

from __future__ import annotations

import json
import time
import uuid
from collections.abc import Callable, Iterable
from dataclasses import dataclass, replace

from rayflow.core.ids import Attempt, CheckpointId
from rayflow.core.manifest import FORMAT_VERSION, Manifest, decode, encode
from rayflow.errors import CorruptCheckpointError, FencedError, ProtocolError, StorageError
from rayflow.storage.catalog import VOID_MARK, CheckpointInfo, CheckpointReader, OpenRoot, Problem
from rayflow.storage.fencing import IDS_A_BLOCK, Directory
from rayflow.storage.layout import (
    COORDINATORS,
    Decision,
    checkpoint_folder,
    claim_path,
    decision_path,
    manifest_path,
    parse_claim,
    released_path,
    shared_prefix,
)
from rayflow.storage.retention import Contents, Retention
from rayflow.storage.store import PutOutcome, Store

LISTED_A_REQUEST = 1000
"""Objects that S3 tells at once."""

ATTEMPTS_AN_INCARNATION = 10_000
"""Attempts of coordinator i are numbered from i times this, so that no two coordinators share one (rule C6)."""


@dataclass(frozen=True, slots=True)
class Incarnation:
    """One life of a coordinator on this directory, and what it goes on from."""

    number: int
    manifest: Manifest | None
    """The newest that counts; None: nothing was ever committed."""
    next_checkpoint: CheckpointId
    next_attempt: Attempt
    run_id: str
    """What manifests are stamped with; see `life_of`."""

    @property
    def life(self) -> str:
        """Of the directory: the same for every coordinator that ever works on it, and of no other directory."""
        return life_of(self.run_id)


def life_of(run_id: str) -> str:
    """The directory's part of a run id, which is ``<origin>`` or ``<origin>.<life>``.

    A job that begins with a savepoint of another directory keeps the origin, so that going back to what it has gone on
    from is noticed, and has a life of its own, so that its output is not taken for that of the first (rule C8).
    """
    return run_id.rpartition(".")[2]


def origin_of(run_id: str) -> str:
    """Where the state comes from: the life of the directory in which it began; see `life_of`."""
    return run_id.partition(".")[0]


class CheckpointStore(CheckpointReader):
    """Checkpoints of ``job`` below the root of ``store`` (see `layout.job_root`).

    `list`, `read` and `verify` may be called at any time. A coordinator calls `claim` once and may then `commit`,
    `latest`, `retain`, `discard` and `sweep`, one at a time. All raise `StorageError` if storage fails, and those of
    a coordinator `FencedError` once a later one has claimed the directory: it must then stop and touch nothing.
    """

    def __init__(
        self,
        store: Store,
        job: str,
        *,
        wall_time: Callable[[], float] = time.time,
        nonce: Callable[[], str] = lambda: uuid.uuid4().hex,
        open_root: OpenRoot | None = None,
    ) -> None:
        super().__init__(store, job, open_root=open_root)
        self._wall_time = wall_time
        self._nonce = nonce
        self._decision: Decision | None = None
        self._run_id = ""
        self._recoveries = 0
        self._fenced = False  # for ever: claiming again would fence the one that took over, and so on in turns
        self._begun: set[CheckpointId] = set()  # manifests whose write was begun, ever; grows by one a checkpoint
        self._unsettled: set[CheckpointId] = set()  # those whose outcome is unknown
        self._retention = Retention(store, self._contents)
        self._retain_in = 0  # checkpoints until retention looks at the directory again

    # --------------------------------------------------------------------------------------------- becoming coordinator

    def claim(self, *, start_from: CheckpointId | None = None) -> Incarnation:
        """Take the directory over: fence every earlier coordinator, and find what to go on from.

        ``start_from`` goes on from that checkpoint instead of the newest; all newer ones are void from then on. Raises
        `CorruptCheckpointError` if the newest that counts is not whole: it is named, and the last whole one before it
        is offered, but never taken silently. Raises `FencedError` if another coordinator claimed meanwhile.
        """
        if self._fenced:
            raise FencedError(
                f"a later run owns the checkpoint directory of job {self._job!r}; this one stops (rule C8)"
            )
        number = self._take_number()
        directory = self.survey()
        manifest = self.choose(directory, start_from)
        self._run_id = self._run_id_of(directory, manifest)
        self._decide(number, directory, None if manifest is None else manifest.checkpoint)
        self._check_not_fenced()
        assert self._decision is not None
        return Incarnation(
            number=number,
            manifest=manifest,
            next_checkpoint=CheckpointId(self._decision.ids_from),
            next_attempt=Attempt(number * ATTEMPTS_AN_INCARNATION),
            run_id=self._run_id,
        )

    def adopt(self, manifest: Manifest, kind: str) -> CheckpointId:
        """Make ``manifest``, which was written elsewhere, the newest checkpoint here; the id it got.

        Takes the directory over, as `claim` does, so that a job which runs on it is fenced; call nothing else then.
        What was there stays and is older: nothing is void, so a crash in the middle changes nothing. It need not even
        be readable: a savepoint is what one goes back to when it is not. The id is above that of ``manifest`` too,
        because sinks name their output by checkpoints (rule C4).
        """
        number = self._take_number()
        directory = self.survey()
        origin, life = origin_of(manifest.run_id), self._life_here(directory)
        self._run_id = origin if origin == life else f"{origin}.{life}"
        newest = directory.manifests[0] if directory.manifests else None
        self._decide(number, directory, newest, above=manifest.checkpoint)
        assert self._decision is not None
        own = replace(
            manifest,
            job=self._job,
            checkpoint=CheckpointId(self._decision.ids_from),
            kind=kind,
            attempt=Attempt(number * ATTEMPTS_AN_INCARNATION),
            incarnation=number,
            run_id=self._run_id,
            version=FORMAT_VERSION,
        )
        self.commit(own)
        return own.checkpoint

    def latest(self, incarnation: Incarnation, unresolved: Iterable[CheckpointId] = ()) -> Incarnation:
        """Read again after a failure of subtasks; the coordinator goes on.

        First every manifest whose write has an unknown outcome (``unresolved``, and those that `commit` knows of) is
        decided for good: found, or made impossible by a void mark in its place. Otherwise it could turn up after the
        sinks have aborted what it names. ``next_checkpoint`` is above all that storage has seen; the caller, who also
        knows what it has triggered, takes the maximum with its own count (rule C4).
        """
        self._own(incarnation.number)
        self._check_not_fenced()
        for checkpoint in sorted({*unresolved, *self._unsettled}):
            self._settle(checkpoint)
        directory = self.survey()
        manifest = self.choose(directory, None)
        self._check_not_fenced()
        self._recoveries += 1
        assert self._decision is not None
        seen = max([self._decision.ids_from - 1, *directory.folders, *self._begun])
        return replace(
            incarnation,
            manifest=manifest,
            next_checkpoint=CheckpointId(seen + 1),
            next_attempt=Attempt(incarnation.number * ATTEMPTS_AN_INCARNATION + self._recoveries),
        )

    def check_owner(self) -> None:
        """Raises `FencedError` once a later coordinator has claimed the directory; for acts storage cannot guard."""
        self._check_owned()

    def _take_number(self) -> int:
        number = max((parse_claim(path) or 0 for path, _ in self._store.list(COORDINATORS)), default=0) + 1
        while True:
            body = {"job": self._job, "created_at": self._wall_time(), "nonce": self._nonce()}
            if self._store.put_if_absent(claim_path(number), _json(body)) is PutOutcome.CREATED:
                return number
            number += 1

    def _decide(self, number: int, directory: Directory, restored: CheckpointId | None, *, above: int = 0) -> None:
        first = max(directory.next_id(), CheckpointId(above + 1))
        block = (first - 1) // IDS_A_BLOCK + 1
        decision = Decision(number, restored, first, block * IDS_A_BLOCK + 1)
        self._store.put_if_absent(decision_path(decision), self._note())
        self._decision = decision

    def _run_id_of(self, directory: Directory, manifest: Manifest | None) -> str:
        """That of the newest manifest, else of the last coordinator that noted one, else new."""
        if manifest is not None:
            return manifest.run_id
        return next(filter(None, map(self._noted_run_id, reversed(directory.decisions))), "") or self._nonce()

    def _life_here(self, directory: Directory) -> str:
        """Of this directory, whatever is imported into it. Its manifests need not be readable for that."""
        noted = next(filter(None, map(self._noted_run_id, reversed(directory.decisions))), "")
        return life_of(noted) if noted else self._nonce()

    def _note(self) -> bytes:
        return _json({"run_id": self._run_id, "created_at": self._wall_time()})

    def _noted_run_id(self, decision: Decision) -> str:
        try:
            return str(json.loads(self._store.get(decision_path(decision)))["run_id"])
        except (FileNotFoundError, KeyError, TypeError, ValueError):
            return ""  # its name is what counts; a lost note costs a new id of a run that has committed nothing

    # ----------------------------------------------------------------------------------------------------- commit point

    def commit(self, manifest: Manifest) -> None:
        """Make the checkpoint exist (rule C2). Returning is the permission to tell: not before, and not otherwise.

        Idempotent: the same manifest again is found and checked. After a `StorageError` the outcome is unknown, and
        `latest` will decide it. `FencedError`: a later coordinator owns the directory; tell nobody.
        """
        decision = self._own(manifest.incarnation)
        if manifest.job != self._job:
            raise ProtocolError(f"manifest of job {manifest.job!r} given to the checkpoints of job {self._job!r} (C5)")
        self._reserve(decision, manifest.checkpoint)
        self._begun.add(manifest.checkpoint)
        self._unsettled.add(manifest.checkpoint)
        self._write_manifest(manifest)
        self._check_not_fenced()
        # Older ones are superseded, whatever became of them: a recovery takes the newest.
        self._unsettled = {n for n in self._unsettled if n > manifest.checkpoint}

    def _write_manifest(self, manifest: Manifest) -> None:
        path, data = manifest_path(manifest.checkpoint), encode(manifest)
        if self._store.put_if_absent(path, data) is PutOutcome.CREATED:
            return
        found = self.fetch(path)
        if found == VOID_MARK:
            raise StorageError(
                f"checkpoint {manifest.checkpoint} was given up at a recovery and cannot be committed (C5)"
            )
        if found != data:
            raise FencedError(
                f"{path} of job {self._job!r} was written by another coordinator: two runs use this checkpoint "
                "directory; give each its own, or stop the other one (rule C8)"
            )

    def _check_not_fenced(self) -> None:
        assert self._decision is not None
        number = self._decision.incarnation
        # Listed, not asked for by the next number: retention of a still later coordinator prunes all but the highest.
        later = self._store.list(COORDINATORS, after=claim_path(number))
        highest = max((parse_claim(path) or 0 for path, _ in later), default=0)
        if highest > number:
            self._fenced = True
            raise FencedError(
                f"a later run took over the checkpoint directory of job {self._job!r} (this is coordinator {number}, "
                f"there is {claim_path(highest)}); this one stops and changes nothing more (rule C8)"
            )

    def _reserve(self, decision: Decision, checkpoint: CheckpointId) -> None:
        """Extend the block of ids while there is still half of it to go."""
        until = decision.ids_until
        while checkpoint + IDS_A_BLOCK // 2 >= until:
            until += IDS_A_BLOCK
        if until != decision.ids_until:
            extended = replace(decision, ids_until=until)
            self._store.put_if_absent(decision_path(extended), self._note())
            self._decision = extended

    def _settle(self, checkpoint: CheckpointId) -> None:
        path = manifest_path(checkpoint)
        if self._store.put_if_absent(path, VOID_MARK) is PutOutcome.EXISTS:
            data = self.fetch(path)
            try:
                if data != VOID_MARK:
                    decode(data, path=path)
            except CorruptCheckpointError:
                # Torn while it was written by us, and nobody was told of it: giving it up loses nothing.
                self._store.put(path, VOID_MARK)
        self._unsettled.discard(checkpoint)

    def _own(self, number: int) -> Decision:
        if self._decision is None or self._decision.incarnation != number:
            raise ProtocolError(f"coordinator {number} acts on a directory it has not claimed (rule C8)")
        return self._decision

    # --------------------------------------------------------------------------------------------------------- deleting

    def retain(self, newest: CheckpointId, keep: int) -> None:
        """``newest`` is complete: keep it and the ``keep - 1`` before it; see `Retention.retain`.

        Looks at the directory once in so many checkpoints as it has thousands of files, so what this costs a checkpoint
        does not grow with them; until then that many more are kept.
        """
        if self._retention.learn():
            self._retain_in = 0
            return
        self._retain_in -= 1
        if self._retain_in > 0:
            return
        self._check_owned()
        directory = self.survey()
        self._retain_in = len(directory.files) // LISTED_A_REQUEST
        self._retention.retain(directory, newest, keep)

    def discard(self, checkpoint: CheckpointId) -> None:
        """Delete the files of an aborted checkpoint; `ProtocolError` if a write of its manifest was begun (C7)."""
        self._check_owned()
        if checkpoint in self._begun or self._store.exists(manifest_path(checkpoint)):
            raise ProtocolError(
                f"the files of checkpoint {checkpoint} may be named by its manifest: not discarded (C7)"
            )
        # Nobody else names what it wrote: a file is named again only after its writer is complete.
        self._store.delete_prefix(checkpoint_folder(checkpoint))
        self._store.delete_prefix(shared_prefix(checkpoint))

    def release(self, checkpoint: CheckpointId) -> None:
        """The user needs the savepoint ``checkpoint`` no longer: retention treats it as any other from now on."""
        self._check_owned()
        self._store.put_if_absent(released_path(checkpoint), self._note())

    def sweep(self, keep: int, *, upto: CheckpointId | None = None) -> None:
        """The job is over: leave nothing that no retained manifest names; see `Retention.sweep`.

        ``upto``: ids above it are not touched; by default those that this coordinator has not reserved.
        """
        self._check_owned()
        assert self._decision is not None
        bound = CheckpointId(self._decision.ids_until - 1) if upto is None else upto
        self._retention.sweep(self.survey(), keep, bound, self._decision.incarnation)

    def _contents(self, checkpoint: CheckpointId) -> Contents | None:
        manifest = self.load(checkpoint)
        if manifest is None:
            return None
        own = frozenset(file.path for file in manifest.files() if file.root is None)
        return Contents(manifest.kind, manifest.incarnation, own)

    def _check_owned(self) -> None:
        if self._decision is None:
            raise ProtocolError("only a coordinator that has claimed the directory may act on it (rule C8)")
        self._check_not_fenced()


def _json(body: object) -> bytes:
    return (json.dumps(body, sort_keys=True) + "\n").encode()


__all__ = ["CheckpointInfo", "CheckpointReader", "CheckpointStore", "Incarnation", "Problem"]
