"""What a subtask may name again instead of writing it again: the ground of incremental checkpoints (rules C5, C7).

A file of an earlier checkpoint may be named only if no retention can have deleted it. The newest complete checkpoint is
always retained, so it is enough that *it* names the file. A subtask does not know which one is the newest complete, but
it lies between the newest it was told of and the last it has written: so it names a file again if the newest that it
was told of names it, and all that it has written since then name the same. Tried and wrong: to ask only the newest that
it was told of. While the news of 5 was under way, 6 wrote the piece again, into another file; 7 then named the file of
5, which retention had deleted because 6 is complete and does not name it.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field

from rayflow.core.manifest import FileRef, StateHandle
from rayflow.storage.layout import parse_immutable


@dataclass(frozen=True, slots=True)
class Reuse:
    """Pieces and files by the names that are unique for ever."""

    pieces: Mapping[str, StateHandle] = field(default_factory=dict)
    """By id of the `Piece`."""
    files: Mapping[str, FileRef] = field(default_factory=dict)
    """By `FolderFile.immutable`."""

    @staticmethod
    def of(handles: Iterable[StateHandle]) -> Reuse:
        """What these handles name, but for files of savepoints, which no later checkpoint names."""
        own = [h for h in handles if all(file.root is None for file in h.files)]
        files = {name: file for h in own for _, file in h.parts if (name := parse_immutable(file.path)) is not None}
        return Reuse({h.piece: h for h in own if h.piece}, files)

    def agreed(self, later: Sequence[Reuse]) -> Reuse:
        """Only what all ``later`` ones, where they have it, name in the same place."""
        return Reuse(
            {
                name: handle
                for name, handle in self.pieces.items()
                if all(name not in other.pieces or _place(other.pieces[name]) == _place(handle) for other in later)
            },
            {
                name: file
                for name, file in self.files.items()
                if all(other.files.get(name, file) == file for other in later)
            },
        )


@dataclass(frozen=True, slots=True)
class Written:
    """What one subtask has made durable for one checkpoint."""

    handles: tuple[StateHandle, ...]
    """Of every state, its pieces oldest first; those that were named again among them."""
    uploaded_bytes: int
    """New files, and what goes into the manifest."""


def _place(handle: StateHandle) -> object:
    return handle.file, handle.section, handle.inline
