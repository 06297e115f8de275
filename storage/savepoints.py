"""Finding and opening savepoints, and checkpoints of other jobs, to start from (rules R1, K4).

A savepoint is a folder with a ``manifest.json`` and the files it names, by paths relative to that folder: it can be
moved and copied as any folder can. rayflow only reads it: what is imported from it names its files with the URL of the
folder (`FileRef.root`), and retention never touches a file with a root. Writing one: `rayflow.storage.savepoint_copy`.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import Any, Final

from rayflow.core.ids import CheckpointId
from rayflow.core.manifest import FileRef, Manifest, StateHandle, decode
from rayflow.errors import ConfigError, CorruptCheckpointError
from rayflow.storage.catalog import VOID_MARK, CheckpointReader
from rayflow.storage.fencing import Directory, counts, understand
from rayflow.storage.filesystem import ObjectStore
from rayflow.storage.layout import (
    CHECKPOINTS,
    COORDINATORS,
    SHARED,
    checkpoint_folder,
    parse_checkpoint,
)

MANIFEST: Final = "manifest.json"
KIND: Final = "savepoint"
"""Of the manifest of a savepoint, and of the checkpoint in the job's directory that it is a copy of."""
IMPORTED: Final = "import"
"""Kind of the checkpoint that a savepoint becomes in the directory of the job that starts from it."""


@dataclass(frozen=True, slots=True)
class Savepoint:
    """A savepoint, or a complete checkpoint of a job, that was found whole as far as sizes tell."""

    url: str
    """As it was found; absolute."""
    manifest: Manifest
    """Every file in it has a root."""

    def to_import(self) -> Manifest:
        """The manifest for another job's directory: nothing in it is uploaded under a name that is used again."""
        return replace(self.manifest, subtasks=_each_handle(self.manifest, lambda h: replace(h, piece="")))


def open_savepoint(url: str, storage_options: Mapping[str, Any] | None = None) -> Savepoint:
    """The savepoint in the folder ``url``, or the checkpoint whose folder (``…/<job>/chk-00000042``) it is.

    Raises `ConfigError` for a folder that is neither or holds several, `CorruptCheckpointError` for a manifest that is
    torn or of a newer version, and for a file that is missing or has another size. Checksums are compared on reading.
    """
    store = ObjectStore(url, storage_options)
    try:
        data = store.get(MANIFEST)
    except FileNotFoundError:
        raise ConfigError(_what_it_is(store)) from None
    manifest = decode(data, path=f"{store.url.rstrip('/')}/{MANIFEST}") if data != VOID_MARK else None
    root = store.url.rstrip("/")
    if manifest is None or _is_in_a_job(manifest):
        root, _, part = root.rpartition("/")
        _check_counts(CheckpointReader(ObjectStore(root, storage_options), manifest.job if manifest else ""), part, url)
    assert manifest is not None
    rooted = replace(manifest, subtasks=_each_handle(manifest, lambda h: _with_root(h, root)))
    for directory, files in _by_root(rooted).items():
        _check_sizes(ObjectStore(directory, storage_options), files, url)
    return Savepoint(store.url, rooted)


def job_of(url: str) -> tuple[str, CheckpointId] | None:
    """(directory of the job, checkpoint) when ``url`` names the folder of a checkpoint by its usual name."""
    root, _, part = ObjectStore(url).url.rstrip("/").rpartition("/")
    checkpoint = parse_checkpoint(f"{part}/{MANIFEST}")
    return None if checkpoint is None else (root, checkpoint)


def savepoint_after(reader: CheckpointReader, checkpoint: int) -> Manifest | None:
    """The newest complete checkpoint of a job, after that one, that was taken as a savepoint."""
    for newer in (n for n in reader.survey().manifests if n > checkpoint):
        try:
            manifest = reader.load(newer)
        except CorruptCheckpointError:
            continue  # gone between the listing and the reading: retention has run
        if manifest is not None and manifest.kind == KIND:
            return manifest
    return None


def _is_in_a_job(manifest: Manifest) -> bool:
    """Files of a savepoint lie beside its manifest, in folders of other names than those of a job."""
    return any(f.root is None and f.path.startswith((CHECKPOINTS, SHARED)) for f in manifest.files())


def _each_handle(manifest: Manifest, change: Any) -> Any:
    return tuple(replace(sub, states=tuple(change(handle) for handle in sub.states)) for sub in manifest.subtasks)


def _with_root(handle: StateHandle, root: str) -> StateHandle:
    def rooted(file: FileRef) -> FileRef:
        return file if file.root is not None else replace(file, root=root)

    return replace(
        handle,
        file=None if handle.file is None else rooted(handle.file),
        parts=tuple((name, rooted(file)) for name, file in handle.parts),
    )


def _by_root(manifest: Manifest) -> dict[str, list[FileRef]]:
    found: dict[str, list[FileRef]] = {}
    for file in manifest.files():
        assert file.root is not None
        found.setdefault(file.root, []).append(file)
    return found


def _check_sizes(store: ObjectStore, files: list[FileRef], url: str) -> None:
    folders = {file.path.partition("/")[0] + "/" for file in files if "/" in file.path}
    prefixes = sorted(folders) if all("/" in file.path for file in files) else [""]
    sizes = {path: nbytes for prefix in prefixes for path, nbytes in store.list(prefix)}
    for file in files:
        size = sizes.get(file.path)
        if size != file.nbytes:
            found = "is missing" if size is None else f"has {size} bytes, its manifest says {file.nbytes}"
            raise CorruptCheckpointError(
                f"{file.path} of {url} {found}: it cannot be restored; copy the savepoint again as a whole, or use "
                "another one"
            )


def _check_counts(reader: CheckpointReader, part: str, url: str) -> None:
    checkpoint = parse_checkpoint(f"{part}/{MANIFEST}")
    if checkpoint is None:
        raise CorruptCheckpointError(
            f"{url} is a copy of a checkpoint's folder: the files its manifest names lie in the directory of its job; "
            f"start from that one, or take a savepoint, which can be moved"
        )
    manifest = reader.read(checkpoint)
    if not counts(checkpoint, manifest.incarnation, reader.survey().decisions):
        raise ConfigError(f"{url} does not count: a later run went on from before it; choose another checkpoint")


def _what_it_is(store: ObjectStore) -> str:
    """Why there is no manifest in this folder, in one sentence, and what to name instead."""
    base = store.url.rstrip("/")
    directory = understand([*store.list(CHECKPOINTS), *store.list(COORDINATORS)])
    if directory.manifests:
        return _several(base, directory)
    paths = [path for path, _ in store.list()]
    inside = sorted({path.removesuffix(f"/{MANIFEST}") for path in paths if path.endswith(f"/{MANIFEST}")})
    if inside:
        shown = ", ".join(f"{base}/{path}" for path in inside[:3])
        more = ", …" if len(inside) > 3 else ""
        return f"{base} is not a savepoint but holds {len(inside)} of them or of checkpoints; name one: {shown}{more}"
    if not paths:
        return f"{base} is not a savepoint: there is nothing; check the URL"
    return (
        f"{base} is not a savepoint: it holds {len(paths)} files but no {MANIFEST}; a savepoint whose writing was "
        "interrupted has none and cannot be used, take another"
    )


def _several(base: str, directory: Directory) -> str:
    folders = [f"{base}/{checkpoint_folder(n).rstrip('/')}" for n in directory.manifests]
    n = len(folders)
    what = "several checkpoints" if n > 1 else "a checkpoint"
    return f"{base} is the directory of a job, with {what}; name the one to start from: {', '.join(folders[:3])}"


__all__ = ["IMPORTED", "KIND", "MANIFEST", "Savepoint", "job_of", "open_savepoint", "savepoint_after"]
