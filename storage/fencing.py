"""Which manifests of a checkpoint directory count, when several coordinators have used it (rule C8). Pure.

A starting coordinator  (1) creates claim i, create-if-absent, with i one above the highest;
                        (2) lists the directory and picks the newest manifest m that counts;
                        (3) creates decision i = "restored m" (or none).
A coordinator commits n (1) by creating manifest n, create-if-absent;
                        (2) and by then seeing that no claim above its own exists. Only then it tells anybody.
Manifest n, written by coordinator k, counts unless a later coordinator j > k decided for some m < n (or for none).

Why nothing that was told is ever lost: the claim precedes the listing, the write precedes the check. If coordinator k
saw no later claim, then every later claim was created after that look, hence after manifest n was there, hence the
listing behind that claim shows n: the later one restores n or something newer. If k does see a later claim, it tells
nobody, and the later one has either seen n (and restores it, which commits what it names) or decided for an older
manifest, which makes n void for ever, even when the write of n reaches a slow store only then. Turn either pair round
and both may be right in their own eyes: k finds no claim, j finds no manifest, k writes and tells, j goes on from
before n. `tests/storage/test_fencing.py` runs every interleaving of the two, of this order and of the two wrong
ones.

The store must list what was written (a local disk and S3 do). The check in (2) lists the claims: to ask for the next
number alone is not enough, because retention of a still later coordinator prunes claims, though never the highest, and
one that has slept through two takeovers would think itself alone.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass

from rayflow.core.ids import CheckpointId
from rayflow.storage.layout import Decision, parse_checkpoint, parse_claim, parse_decision, parse_manifest

IDS_A_BLOCK = 100
"""Ids are reserved in blocks: those that a dead coordinator triggered without leaving a trace are never used again."""


@dataclass(frozen=True, slots=True)
class Directory:
    """One listing of a job's checkpoint directory, understood."""

    files: Mapping[str, int]
    """Path -> size in bytes, all that was listed."""
    claims: tuple[int, ...]
    decisions: tuple[Decision, ...]
    manifests: tuple[CheckpointId, ...]
    """Newest first."""
    folders: Mapping[CheckpointId, tuple[str, ...]]
    """Checkpoint -> every path in its folder, the manifest too."""

    def next_id(self) -> CheckpointId:
        """Above every id that was ever used or reserved here (rule C4)."""
        used = max(self.folders, default=0)
        return CheckpointId(max([used + 1, *(d.ids_until for d in self.decisions)]))

    def reserved(self, incarnation: int) -> Decision | None:
        """The decision of this coordinator, with all the ids it has reserved so far."""
        return max((d for d in self.decisions if d.incarnation == incarnation), default=None)


def understand(listing: Iterable[tuple[str, int]]) -> Directory:
    files = dict(listing)
    folders: dict[CheckpointId, list[str]] = {}
    for path in files:
        if (checkpoint := parse_checkpoint(path)) is not None:
            folders.setdefault(checkpoint, []).append(path)
    return Directory(
        files=files,
        claims=tuple(sorted(c for path in files if (c := parse_claim(path)) is not None)),
        decisions=tuple(sorted(d for path in files if (d := parse_decision(path)) is not None)),
        manifests=tuple(sorted((m for path in files if (m := parse_manifest(path)) is not None), reverse=True)),
        folders={checkpoint: tuple(sorted(paths)) for checkpoint, paths in folders.items()},
    )


def counts(checkpoint: int, incarnation: int, decisions: Sequence[Decision]) -> bool:
    """True if no later coordinator than ``incarnation`` has gone on from before ``checkpoint``."""
    return not any(d.incarnation > incarnation and (d.restored is None or checkpoint > d.restored) for d in decisions)


def may_count(checkpoint: int, decisions: Sequence[Decision]) -> bool:
    """Whether a manifest that cannot be read might count; its writer is judged by who had reserved its id."""
    writers = [d.incarnation for d in decisions if d.ids_from <= checkpoint < d.ids_until]
    return not writers or counts(checkpoint, max(writers), decisions)
