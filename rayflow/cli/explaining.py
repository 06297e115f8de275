"""A checkpoint in sentences: where its time and its bytes went, and what could be done about it."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Final

from rayflow.cli.tables import size
from rayflow.core.manifest import Manifest, SubtaskSnapshot

LONG_S: Final = 0.05
"""Phases shorter than this are nobody's trouble."""
UNEVEN: Final = 2.0
"""A subtask with so many times the mean state of its chain is told of."""
UNEVEN_BYTES: Final = 1_000_000


def sentences(manifest: Manifest) -> list[str]:
    """Of a complete checkpoint, the general ones first."""
    return [*_whole(manifest), *_time(manifest), *_state(manifest), *_rest(manifest)]


def _whole(manifest: Manifest) -> Iterator[str]:
    stats = [part.stats for part in manifest.subtasks]
    nbytes, uploaded = sum(s.nbytes for s in stats), sum(s.uploaded_bytes for s in stats)
    share = f", {100 * uploaded / nbytes:.3g} % of it" if nbytes else ""
    yield (
        f"checkpoint {manifest.checkpoint} of job {manifest.job!r} ({manifest.kind}, attempt {manifest.attempt}) is "
        f"complete: {len(stats)} subtasks, {sum(s.rows for s in stats):,} rows of state in {size(nbytes)}; it wrote "
        f"{size(uploaded)}{share}"
    )


def _time(manifest: Manifest) -> Iterator[str]:
    if not manifest.subtasks:
        return
    slowest = max(manifest.subtasks, key=_seconds)
    s = slowest.stats
    yield (
        f"the slowest subtask was {slowest.subtask} with {_s(_seconds(slowest))}: {_s(s.start_delay_s)} until its "
        f"first barrier, {_s(s.alignment_s)} aligning, {_s(s.sync_s)} freezing, {_s(s.async_s)} writing"
    )
    phase, seconds = max(
        (("delay", s.start_delay_s), ("align", s.alignment_s), ("freeze", s.sync_s), ("write", s.async_s)),
        key=lambda pair: pair[1],
    )
    if seconds < LONG_S:
        return
    if phase == "delay":
        yield (
            f"most of it went by before a barrier reached {slowest.subtask}: barriers queue behind rows, so a step in "
            "front of it, or it itself, is slower than its input; give it more subtasks or let it do less a row"
        )
    elif phase == "align":
        yield (
            f"most of it {slowest.subtask} waited for its other inputs, whose barriers came later: the steps in front "
            'of it are of different speed; mode="at_least_once" does not wait'
        )
    elif phase == "freeze":
        yield (
            f"most of it {slowest.subtask} stood still to freeze its state: that should take milliseconds whatever the "
            "state; a snapshot or a sink of your own may do there what belongs to the background"
        )
    else:
        rate = f" at {size(int(s.uploaded_bytes / seconds))}/s" if s.uploaded_bytes else ""
        yield (
            f"most of it {slowest.subtask} wrote {size(s.uploaded_bytes)} to storage{rate}, while it went on "
            "processing; more subtasks write side by side, and faster or nearer storage helps"
        )


def _state(manifest: Manifest) -> Iterator[str]:
    sizes: dict[tuple[str, str], int] = {}
    for part in manifest.subtasks:
        for handle in part.states:
            key = (handle.operator, handle.name)
            sizes[key] = sizes.get(key, 0) + handle.nbytes
    if sizes and sum(sizes.values()):
        (operator, name), nbytes = max(sizes.items(), key=lambda item: item[1])
        share = 100 * nbytes / sum(sizes.values())
        yield f"the largest state is {operator}.{name} with {size(nbytes)}, {share:.3g} % of all"
    chains: dict[str, list[SubtaskSnapshot]] = {}
    for part in manifest.subtasks:
        chains.setdefault(part.subtask.chain, []).append(part)
    for parts in chains.values():
        mean = sum(part.stats.nbytes for part in parts) / len(parts)
        most = max(parts, key=lambda part: part.stats.nbytes)
        if len(parts) > 1 and most.stats.nbytes > max(UNEVEN * mean, UNEVEN_BYTES):
            yield (
                f"state is uneven: {most.subtask} has {size(most.stats.nbytes)}, the mean of its chain is "
                f"{size(int(mean))}; some keys have most of the rows, or there are few keys"
            )


def _rest(manifest: Manifest) -> Iterator[str]:
    begun = sum(len(part.splits) for part in manifest.subtasks)
    if begun or manifest.pending_splits:
        yield f"{begun} splits of sources were being read, {len(manifest.pending_splits)} were not begun"
    waiting = sum(len(part.committables) for part in manifest.subtasks)
    if waiting:
        yield f"{waiting} prepared outputs of sinks were to be committed with it"


def _seconds(part: SubtaskSnapshot) -> float:
    s = part.stats
    return s.start_delay_s + s.alignment_s + s.sync_s + s.async_s


def _s(seconds: float) -> str:
    return f"{seconds:.3g} s" if seconds >= 1 else f"{seconds * 1000:.3g} ms"
