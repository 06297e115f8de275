"""``rayflow checkpoints list | show | verify``: what a checkpoint directory holds, and whether it is whole."""

from __future__ import annotations

import json
from collections.abc import Iterable
from datetime import UTC, datetime
from typing import Any

import click

from rayflow.cli.inspection import Verdict, only_job, open_jobs, resolve
from rayflow.cli.inspection import verify as verified
from rayflow.cli.options import as_json, print_json, storage_options
from rayflow.cli.tables import print_table, size, table
from rayflow.core.ids import SubtaskId
from rayflow.core.manifest import FileRef, Manifest, StateHandle, SubtaskSnapshot, encode
from rayflow.storage.catalog import CheckpointInfo
from rayflow.storage.snapshots import rows_that_count


@click.group()
def checkpoints() -> None:
    """Look into a checkpoint directory: URL is the folder of one job, or the folder above several."""


@checkpoints.command("list")
@click.argument("url")
@storage_options
@as_json
def list_(url: str, storage_options: dict[str, str], as_json: bool) -> None:
    """All checkpoints, newest first."""
    found = [(directory, directory.reader.list()) for directory in open_jobs(url, storage_options)]
    if as_json:
        print_json([{"job": d.job, "url": d.url, "checkpoints": [_info_json(i) for i in infos]} for d, infos in found])
        return
    shown = table("job", "checkpoint", "kind", "taken (UTC)", "size", "uploaded", "")
    for directory, infos in found:
        for info in infos:
            shown.add_row(
                directory.job,
                str(info.checkpoint),
                info.kind,
                _moment(info.created_at),
                size(info.nbytes),
                size(info.uploaded_bytes),
                _mark(info),
            )
        if not infos:
            shown.add_row(directory.job, "none", "", "", "", "", "")
    print_table(shown)


@checkpoints.command()
@click.argument("url")
@click.argument("which", default="latest", metavar="[N|latest]")
@storage_options
@as_json
def show(url: str, which: str, storage_options: dict[str, str], as_json: bool) -> None:
    """What one checkpoint holds: subtasks, states, positions, committables, sizes, durations."""
    manifest = resolve(only_job(url, storage_options), which)
    if as_json:
        print_json(_manifest_json(manifest))
        return
    parallelism = ", ".join(f"{chain} x{n}" for chain, n in manifest.parallelism.items())
    click.echo(
        f"checkpoint {manifest.checkpoint} of job {manifest.job!r}: {manifest.kind}, "
        f"taken {_moment(manifest.created_at)}, attempt {manifest.attempt}, run {manifest.run_id}\n"
        f"{parallelism}; {manifest.max_parallelism} key groups"
    )
    shown = table(
        "subtask", "state rows", "size", "uploaded", "waited", "aligned", "frozen", "written", "splits", "to commit"
    )
    for part in manifest.subtasks:
        shown.add_row(*_subtask_row(part))
    print_table(shown)
    if any(part.states for part in manifest.subtasks):
        shown = table("state", "subtask", "pieces", "rows", "key groups", "size", "files")
        for pieces in _by_state(manifest):
            shown.add_row(*_state_row(pieces))
        print_table(shown)
    splits = [(str(part.subtask), split) for part in manifest.subtasks for split in part.splits]
    if splits or manifest.pending_splits:
        shown = table("split", "of", "position")
        for owner, split in splits:
            shown.add_row(split.split_id, owner, str(split.position))
        for split in manifest.pending_splits:
            shown.add_row(split.split_id, f"{split.source}, not assigned", str(split.position))
        print_table(shown)
    for seen in manifest.seen_splits:
        click.echo(f"{seen.source} looks for new splits and has found {len(seen)} so far")
    for part in manifest.subtasks:
        for committable in part.committables:
            click.echo(f"to commit by {committable.operator}, {part.subtask}: {committable.payload}")


@checkpoints.command()
@click.argument("url")
@storage_options
@as_json
@click.pass_context
def verify(ctx: click.Context, url: str, storage_options: dict[str, str], as_json: bool) -> None:
    """Read every byte of every checkpoint and compare sizes and checksums; exit code 1 if something is wrong."""
    verdicts = [verdict for directory in open_jobs(url, storage_options) for verdict in verified(directory)]
    broken = [v for v in verdicts if v.problems and not v.ignored]
    if as_json:
        print_json({"ok": not broken, "checkpoints": [_verdict_json(v) for v in verdicts]})
    else:
        for verdict in verdicts:
            _tell(verdict)
        click.echo(
            f"{len(broken)} of {len(verdicts)} checkpoints cannot be restored"
            if broken
            else f"{len(verdicts)} checkpoints, all whole"
        )
    if broken:
        ctx.exit(1)


def _tell(verdict: Verdict) -> None:
    name = f"{verdict.job.job} checkpoint {verdict.checkpoint.checkpoint}"
    note = " (superseded, never restored)" if verdict.ignored else ""
    if not verdict.problems:
        click.echo(f"{name}: whole{note}")
    for problem in verdict.problems:
        click.echo(f"{name}: {problem.path}: {problem.what}{note}")


# ---------------------------------------------------------------------------------------------------------------- words


def _mark(info: CheckpointInfo) -> str:
    if info.problem:
        return info.problem
    return "" if info.counts else "superseded, never restored"


def _moment(unix_s: float) -> str:
    return f"{datetime.fromtimestamp(unix_s, UTC):%Y-%m-%d %H:%M:%S}" if unix_s else "-"


def _ms(seconds: float) -> str:
    return f"{seconds * 1000:.1f} ms"


def _subtask_row(part: SubtaskSnapshot) -> Iterable[str]:
    stats = part.stats
    return (
        str(part.subtask),
        f"{stats.rows:,}",
        size(stats.nbytes),
        size(stats.uploaded_bytes),
        _ms(stats.start_delay_s),
        _ms(stats.alignment_s),
        _ms(stats.sync_s),
        _ms(stats.async_s),
        str(len(part.splits)),
        str(len(part.committables)),
    )


def _by_state(manifest: Manifest) -> list[list[StateHandle]]:
    """The pieces of each state of each subtask, oldest first."""
    found: dict[tuple[SubtaskId, str, str], list[StateHandle]] = {}
    for part in manifest.subtasks:
        for state in part.states:
            found.setdefault((part.subtask, state.operator, state.name), []).append(state)
    return list(found.values())


def _state_row(pieces: list[StateHandle]) -> Iterable[str]:
    first = pieces[0]
    files = list(dict.fromkeys(_place(file) for piece in pieces for file in piece.files))
    groups = {group for piece in pieces for group, _ in piece.group_rows}
    shown = files[:3] or ["in the manifest"]
    return (
        f"{first.operator}.{first.name}",
        str(first.subtask),
        str(len(pieces)),
        f"{sum(map(rows_that_count, pieces)):,}",
        str(len(groups)) if groups else "",
        size(sum(piece.nbytes for piece in pieces)),
        ", ".join(shown) + (f" and {len(files) - 3} more" if len(files) > 3 else ""),
    )


def _place(file: FileRef) -> str:
    return file.path if file.root is None else f"{file.root}/{file.path}"


def _info_json(info: CheckpointInfo) -> dict[str, object]:
    return {
        "checkpoint": info.checkpoint,
        "path": info.path,
        "kind": info.kind,
        "created_at": info.created_at,
        "nbytes": info.nbytes,
        "uploaded_bytes": info.uploaded_bytes,
        "counts": info.counts,
        "problem": info.problem or None,
    }


def _verdict_json(verdict: Verdict) -> dict[str, object]:
    return {
        "job": verdict.job.job,
        "checkpoint": verdict.checkpoint.checkpoint,
        "superseded": verdict.ignored,
        "problems": [{"path": p.path, "what": p.what} for p in verdict.problems],
    }


def _manifest_json(manifest: Manifest) -> dict[str, object]:
    """The manifest's own JSON, with the length of inline state in its place, and without the digests of splits."""
    body: dict[str, Any] = json.loads(encode(manifest))
    for part in body["subtasks"]:
        for state in part["states"]:
            inline = state.pop("inline")
            state["inline_bytes"] = None if inline is None else len(inline)
    for seen in body.get("seen_splits", ()):
        del seen["digests"]
    return body
