"""A record of what each checkpoint committed: ``_rayflow_manifest/<checkpoint>-<subtask>.json`` beside the output.

A record is written when all its files are visible, so a reader that takes the files of all records sees each checkpoint
of a subtask whole, or not at all. Files that were prepared for a checkpoint which was aborted then are committed with
the next one and keep its number. Writing a record again writes the same bytes.
"""

from __future__ import annotations

import json
import re
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import Any

from rayflow.core.manifest import Json
from rayflow.errors import DataError
from rayflow.operators.sources.paths import is_local, normalise, open_fs

FOLDER = "_rayflow_manifest"
_NAME = re.compile(r"(?:^|/)part-(\d+)-(\d+)-\d+(-[^./]+)?\.[^/]*$")


@dataclass(frozen=True, slots=True, order=True)
class CommittedFile:
    """A file of the output."""

    checkpoint: int
    subtask: int
    url: str
    rows: int
    nbytes: int


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
    found = []
    try:
        names = sorted(name for name in fs.find(below) if name.endswith(".json"))
    except FileNotFoundError:
        return []
    for name, content in (fs.cat(names) if names else {}).items():
        try:
            record = json.loads(content)
            for file in record["files"]:
                url = f"{root}/{file['path']}"
                found.append(CommittedFile(record["checkpoint"], record["subtask"], url, file["rows"], file["nbytes"]))
        except (ValueError, KeyError, TypeError) as error:
            where = name if is_local(root) else f"{root}/{FOLDER}/{name.rpartition('/')[2]}"
            raise DataError(f"{where} is not a record of committed files: {error}; remove or restore it") from error
    return sorted(found)
