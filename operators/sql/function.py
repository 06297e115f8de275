"""Rows of complete checkpoints for a user's function: at least once, with what it takes to leave out a repetition.

Rows are kept beside the checkpoints (as in `write_ahead`) and given to the function when their checkpoint is complete,
all rows of a subtask and a checkpoint at once. What has been given is noted by an empty file, and the rows are removed:
between the return of the function and that note a crash makes it be called again with the same checkpoint and subtask.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Final

import pyarrow as pa

from rayflow.core.manifest import Json
from rayflow.errors import RayflowError, UserCodeError
from rayflow.operators.base import Committer, CommitterContext
from rayflow.operators.sql.staging import DONE, staging_of
from rayflow.operators.sql.write_ahead import Promise

NOTES_KEPT: Final = 20
"""A checkpoint that is restored is one of the newest; older ones are not asked for again."""
BatchFunction = Callable[[int, int, pa.Table], object]
"""``fn(checkpoint, subtask, table)``."""


class FunctionCommitter(Committer):
    def __init__(self, fn: BatchFunction) -> None:
        self._fn = fn
        self._noted: list[str] = []

    def open(self, ctx: CommitterContext) -> None:
        super().open(ctx)
        self._files = staging_of(ctx.staging, ctx.operator, ctx)

    def commit(self, committables: Sequence[Json]) -> None:
        for each in committables:
            promise = Promise.from_json(each)
            names = {f.name for f in promise.files}
            if not self._files.is_done(promise.files[0].name):
                self._call(promise)
                self._files.note_done(promise.files[0].name)
                self._noted.append(promise.files[0].name)
            self._files.remove(names)
        kept = max(NOTES_KEPT, len(committables))  # the newest checkpoint may name all of these again
        self._files.remove({name + DONE for name in self._noted[:-kept]})
        self._noted = self._noted[-kept:]

    def recover(self, committables: Sequence[Json], *, fresh: bool) -> None:
        self.commit(committables)
        self._files.remove_all(but=frozenset(Promise.from_json(each).files[0].name for each in committables))

    def _call(self, promise: Promise) -> None:
        rows = pa.concat_tables([self._files.get(f.name, f.nbytes, f.sha256) for f in promise.files])
        mark = promise.mark
        try:
            self._fn(mark.checkpoint, mark.subtask, rows)
        except RayflowError:
            raise
        except Exception as error:
            raise UserCodeError(
                f"{self.ctx} subtask {mark.subtask}: the function of for_each_batch raised {type(error).__name__} for "
                f"{rows.num_rows} rows of checkpoint {mark.checkpoint}: {error}"
            ) from error
