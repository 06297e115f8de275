"""Write-ahead log: the rows of a checkpoint lie in files beside it, and are written to the target when it is complete.

The coordinator commits for all subtasks together: one transaction of the target for each completion, with the marks of
all its parts in it. So a reader of the target sees whole checkpoints, and a commit that was interrupted anywhere is
repeated without harm: what has its mark is left out (rule S1). Files are removed after that.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import asdict, dataclass
from typing import ClassVar

import pyarrow as pa

from rayflow.core.manifest import Json
from rayflow.errors import CommitLostError, DataError
from rayflow.operators.base import Committer, CommitterContext
from rayflow.operators.sql.marks import Mark, newest_of, prune_due
from rayflow.operators.sql.segments import Flush, Segment, SegmentSinkOperator
from rayflow.operators.sql.staging import StagedFiles, staging_of
from rayflow.operators.sql.target import RowCheck, TargetSession, TransactionalTarget


@dataclass(frozen=True, slots=True)
class StagedFile:
    name: str
    nbytes: int
    rows: int
    sha256: str


@dataclass(frozen=True, slots=True)
class Promise:
    """A committable: the rows of one subtask of one checkpoint, and the files that hold them, in their order."""

    mark: Mark
    files: tuple[StagedFile, ...]

    def to_json(self) -> Json:
        files: list[Json] = [asdict(f) for f in self.files]
        return {**self.mark.to_json(), "files": files}

    @classmethod
    def from_json(cls, value: Json) -> Promise:
        mark = Mark.from_json(value)
        return cls(mark, tuple(StagedFile(**f) for f in value["files"]))


class StagingOperator(SegmentSinkOperator):
    """Writes rows to staged files; the target is only asked whether it would take them."""

    def __init__(self, target: TransactionalTarget | None, flush: Flush) -> None:
        super().__init__(flush)
        self._target = target
        self._rows_check: RowCheck | None = None

    def _begin(self, schema: pa.Schema) -> None:
        if self._target is not None:
            self._target.check_schema(schema, str(self.ctx))
            self._rows_check = self._target.row_check(schema, str(self.ctx))

    def _check(self, rows: pa.RecordBatch) -> None:
        if self._rows_check is not None:
            self._rows_check(pa.Table.from_batches([rows]))

    def _segment(self) -> Segment:
        return _StagedSegment(staging_of(self.ctx.staging, self.ctx.operator, self.ctx))


class _StagedSegment(Segment):
    def __init__(self, files: StagedFiles) -> None:
        self._files = files
        self._written: list[StagedFile] = []

    def write(self, rows: pa.Table) -> None:
        name, nbytes, sha256 = self._files.put(rows)
        self._written.append(StagedFile(name, nbytes, rows.num_rows, sha256))

    def seal(self, mark: Mark) -> Json | None:
        return Promise(mark, tuple(self._written)).to_json()


class WriteAheadCommitter(Committer):
    whole: ClassVar[bool] = True

    def __init__(self, target: TransactionalTarget, schema: pa.Schema | None) -> None:
        self._target = target
        self._schema = schema
        self._newest = 0

    def open(self, ctx: CommitterContext) -> None:
        super().open(ctx)
        self._files = staging_of(ctx.staging, ctx.operator, ctx)

    def commit(self, committables: Sequence[Json]) -> None:
        promises = [Promise.from_json(each) for each in committables]
        if not promises:
            return
        session = self._target.connect(str(self.ctx))
        try:
            self._commit(session, promises)
        finally:
            session.close()
        self._files.remove({f.name for p in promises for f in p.files})

    def recover(self, committables: Sequence[Json], *, fresh: bool) -> None:
        session = self._target.connect(str(self.ctx))
        try:
            session.ensure(self._schema)
        finally:
            session.close()
        self.commit(committables)
        self._files.remove_all()

    def finish(self) -> None:
        self._files.remove_all()

    def _commit(self, session: TargetSession, promises: Sequence[Promise]) -> None:
        marks = [p.mark for p in promises]
        session.ensure(None)
        known = session.known(marks)
        due = [p for p in promises if not known.has(p.mark)]
        if not due:
            return
        try:
            self._write(session, sorted(due, key=lambda p: (p.mark.checkpoint, p.mark.subtask)))
        except BaseException as error:
            session.rollback()
            if isinstance(error, CommitLostError | DataError) and all(map(session.known(marks).has, marks)):
                return  # one who did not know that it was replaced has made this very commit, and removed the files
            raise
        newest = newest_of(marks)
        if prune_due(self._newest, newest):
            session.prune(self.ctx.job, self.ctx.run_id, self.ctx.operator, newest)
        self._newest = newest

    def _write(self, session: TargetSession, promises: Sequence[Promise]) -> None:
        """In one transaction."""
        files = [file for promise in promises for file in promise.files]
        rows = self._files.get(files[0].name, files[0].nbytes, files[0].sha256)
        session.ensure(rows.schema)
        session.begin()
        session.write(rows)
        for file in files[1:]:
            session.write(self._files.get(file.name, file.nbytes, file.sha256))
        session.record([p.mark for p in promises])
        session.commit()


__all__ = ["Promise", "StagedFile", "StagingOperator", "WriteAheadCommitter"]
