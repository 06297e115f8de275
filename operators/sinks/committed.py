"""A record of what each checkpoint committed: ``_rayflow_manifest/<checkpoint>-<subtask>.json`` beside the output.

A record is written when all its files are visible, so a reader that takes the files of all records sees each checkpoint
of a subtask whole, or not at all. Files that were prepared for a checkpoint which was aborted then are committed with
the next one and keep its number. Writing a record again writes the same bytes. ``merge-<n>.json`` says what
`rf.compact_files` has replaced by what.
"""

from __future__ import annotations

import json
import re
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import Any

from rayflow.core.manifest import Json
from rayflow.errors import DataError
from rayflow.operators.sources.paths import normalise, open_fs

FOLDER = "_rayflow_manifest"
MERGE = "merge-"
_NAME = re.compile(r"(?:^|/)part-(\d+)-(\d+)-\d+(-[^./]+)?\.[^/]*$")


@dataclass(frozen=True, slots=True, order=True)
class CommittedFile:
    """A file of the output."""

    checkpoint: int
    """Of a merged file: the newest in it."""
    subtask: int
    """Of a merged file: -1."""
    url: str
    rows: int
    nbytes: int


@dataclass(frozen=True, slots=True)
class Merge:
    """A file that replaces others; with ``path`` "" none does, and the number is used up."""

    path: str
    checkpoint: int
    rows: int
    nbytes: int
    replaces: tuple[str, ...]


def merge_record(merge: Merge) -> dict[str, Any]:
    file = {"path": merge.path, "rows": merge.rows, "nbytes": merge.nbytes}
    files = [file] if merge.path else []
    return {"format": 1, "checkpoint": merge.checkpoint, "files": files, "replaces": list(merge.replaces)}


def records(files: Iterable[tuple[str, Json]]) -> dict[str, bytes]:
    """(path below the output, committable) of what was committed together -> name of the record, its content."""
    found: dict[str, dict[str, Any]] = {}
    for path, committable in files:
        match = _NAME.search(path)
        assert match is not None, path
        subtask, checkpoint, run = int(match[1]), int(match[2]), match[3] or ""
        record = found.setdefault(
            f"{checkpoint:08d}-{subtask:05d}{run}.json",
            {"format": 1, "checkpoint": checkpoint, "subtask": subtask, "files": []},
        )
        record["files"].append({"path": path, "rows": committable["rows"], "nbytes": committable["nbytes"]})
    for record in found.values():
        record["files"].sort(key=lambda file: str(file["path"]))
    return {name: (json.dumps(record, indent=1) + "\n").encode() for name, record in found.items()}


def committed_files(path: str, *, storage_options: Mapping[str, Any] | None = None) -> list[CommittedFile]:
    """The files of an output written with ``manifest=True``, by checkpoint; ``[]`` while there is none.

    What they list is there and whole: give their ``url`` to any reader. Raises `DataError` for a record that is none.
    """
    options = dict(storage_options or {})
    root = normalise(path)[0].rstrip("/")
    fs, below = open_fs(f"{root}/{FOLDER}", options)
    try:
        names = [name for name in fs.find(below) if name.endswith(".json")]
    except FileNotFoundError:
        return []
    return sorted(file for _, file in committed_in(fs.cat(names) if names else {}, root)[0])


def committed_in(contents: Mapping[str, bytes], root: str) -> tuple[list[tuple[str, CommittedFile]], dict[int, Merge]]:
    """What records of these names and contents say: (path below the output, file) by checkpoint; merges by number."""
    files: dict[str, CommittedFile] = {}
    merges: dict[int, Merge] = {}
    for name, content in contents.items():
        base = name.rpartition("/")[2]
        try:
            record = json.loads(content)
            checkpoint, subtask = int(record["checkpoint"]), int(record.get("subtask", -1))
            for file in record["files"]:
                url = f"{root.rstrip('/')}/{file['path']}"
                files[file["path"]] = CommittedFile(checkpoint, subtask, url, int(file["rows"]), int(file["nbytes"]))
            if base.startswith(MERGE):
                made: dict[str, Any] = record["files"][0] if record["files"] else {"path": "", "rows": 0, "nbytes": 0}
                number = int(base[len(MERGE) : -len(".json")])
                merges[number] = Merge(
                    made["path"], checkpoint, made["rows"], made["nbytes"], tuple(record["replaces"])
                )
        except (ValueError, KeyError, TypeError) as error:
            raise DataError(
                f"{root}/{FOLDER}/{base} is not a record of committed files: {error!r}; remove or restore it"
            ) from error
    for merge in merges.values():
        for path in merge.replaces:
            files.pop(path, None)
    return sorted(files.items(), key=lambda item: item[1]), merges


def merged_away(contents: Iterable[bytes]) -> frozenset[str]:
    """The paths that the records of merges with these contents replace."""
    return frozenset(path for content in contents for path in json.loads(content)["replaces"])
