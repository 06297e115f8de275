"""Pieces, sections, blocks, folders and other roots: where the state of a subtask lies, and how little is read."""

from __future__ import annotations

import base64
import io
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import numpy as np
import pyarrow as pa
import pytest

from rayflow.core.ids import SubtaskId
from rayflow.core.keygroups import key_group_range
from rayflow.core.manifest import FileRef, StateHandle
from rayflow.core.restore import clip
from rayflow.errors import ConfigError, CorruptCheckpointError, ProtocolError, StorageError
from rayflow.operators.base import FolderFile, FrozenFolder, FrozenState, FrozenTable, Piece, new_piece
from rayflow.storage.arrow_files import checksum
from rayflow.storage.faults import flipped
from rayflow.storage.reuse import Reuse, Written
from rayflow.storage.snapshots import SnapshotStore, rows_that_count
from rayflow.storage.store import MemoryStore, Store

G = 128
ME = SubtaskId("chain", 0)


def rows(n: int, start: int = 0) -> pa.RecordBatch:
    """Keys that are all different and values that do not compress."""
    values = np.random.default_rng(start).integers(0, 1 << 62, n)
    return pa.record_batch({"k": np.arange(start, start + n), "v": values})


def keyed(*pieces: Piece, name: str = "s", batches: tuple[pa.RecordBatch, ...] = ()) -> FrozenTable:
    return FrozenTable(name, batches, key_columns=("k",), pieces=pieces, mode="upsert", meta={"n": len(pieces)})


def write(
    store: Store, checkpoint: int, *tables: FrozenTable, reuse: Reuse | None = None, inline: int | None = 0
) -> Written:
    return SnapshotStore(store, G, inline).write(checkpoint, ME, 1, [("op", FrozenState(tables))], reuse)


def read_all(store: Store, handles: tuple[StateHandle, ...], groups: range | None = None) -> list[int]:
    snapshots = SnapshotStore(store, G)
    return sorted(k for h in handles for k in snapshots.read(h, groups).table["k"].to_pylist())


# -------------------------------------------------------------------------------------------------- where it is written


def test_all_but_large_pieces_lies_in_one_object_a_checkpoint() -> None:
    store = MemoryStore()
    small, large = new_piece([rows(100)]), new_piece([rows(20_000, 1000)])
    first = keyed(small, large, batches=(rows(10, 100_000),))
    other = FrozenTable("list", (pa.record_batch({"x": ["a", "b"]}),), spread="list")
    handles = write(store, 7, first, other).handles
    assert [path for path, _ in store.list()] == ["chk-00000007/chain-0.arrows", "shared/00000007-op-0.s-1.arrow"]
    assert [(h.name, h.piece, h.mode, h.spread, h.meta) for h in handles] == [
        ("s", small.id, "upsert", "subtask", {"n": 2}),
        ("s", large.id, "upsert", "subtask", {"n": 2}),
        ("s", "", "upsert", "subtask", {"n": 2}),
        ("list", "", "append", "list", None),
    ]
    sections = [h.section for h in handles if h.section is not None]
    assert len(sections) == 3
    assert all(section.offset % 64 == 0 for section in sections)
    pack = store.get("chk-00000007/chain-0.arrows")
    for section, n in zip(sections, (100, 10, 2), strict=True):
        data = pack[section.offset : section.offset + section.nbytes]
        assert checksum(data) == section.checksum
        assert pa.ipc.open_file(io.BytesIO(data)).read_all().num_rows == n, "a whole Arrow file by itself"
    assert read_all(store, handles[:3]) == [*range(100), *range(1000, 21_000), *range(100_000, 100_010)]


def test_uploaded_bytes_are_what_storage_got() -> None:
    store = MemoryStore()
    written = write(store, 1, keyed(new_piece([rows(20_000)]), batches=(rows(10),)))
    assert written.uploaded_bytes == sum(size for _, size in store.list())
    assert sum(h.nbytes for h in written.handles) == written.uploaded_bytes


def test_a_known_piece_is_named_again_and_not_written() -> None:
    store = MemoryStore()
    large, small = Piece("p1", (rows(20_000),)), Piece("p2", (rows(100, 50_000),))
    first = write(store, 1, keyed(large, small)).handles
    large.batches = small.batches = ()
    second = write(store, 2, keyed(large, small, Piece("p3", (rows(5, 60_000),))), reuse=Reuse.of(first))
    assert [h.file for h in second.handles[:2]] == [h.file for h in first]
    assert [path for path, _ in store.list("chk-00000002")] == ["chk-00000002/chain-0.arrows"]
    assert second.uploaded_bytes < 10_000
    assert {h.meta["n"] for h in second.handles} == {3}, "the meta of the newest freeze"
    assert len(read_all(store, second.handles)) == 20_105


def test_a_piece_whose_rows_are_gone_and_whose_file_is_not_known_is_never_an_empty_state() -> None:
    with pytest.raises(ProtocolError, match="'s' of operator 'op'.*piece p1.*would be lost"):
        write(MemoryStore(), 1, keyed(Piece("p1", ())))


def test_state_in_memory_touches_no_storage_and_names_pieces_again_too() -> None:
    store = MemoryStore()
    piece = Piece("p", (rows(20_000),))
    first = write(store, 1, keyed(piece), inline=None)
    piece.batches = ()
    second = write(store, 2, keyed(piece), inline=None, reuse=Reuse.of(first.handles))
    assert second.handles == first.handles
    assert store.list() == []
    assert len(read_all(store, second.handles)) == 20_000


def test_of_a_savepoint_nothing_is_named_again() -> None:
    (handle,) = write(MemoryStore(), 1, keyed(Piece("p", (rows(20_000),)))).handles
    assert handle.file is not None
    assert Reuse.of([handle]).pieces
    assert not Reuse.of([replace(handle, file=replace(handle.file, root="/elsewhere"))]).pieces


# ---------------------------------------------------------------------------------------------------- reading of ranges


@pytest.mark.parametrize("shared", [True, False])
def test_a_subtask_reads_its_own_range_only(shared: bool) -> None:
    store = MemoryStore()
    many = rows(400_000)
    frozen = keyed(new_piece([many])) if shared else keyed(batches=(many,))
    (handle,) = write(store, 1, frozen).handles
    seen = 0
    for parallelism in (2, 4):
        for index in range(parallelism):
            own = key_group_range(index, parallelism, G)
            snapshots = SnapshotStore(store, G)
            table = snapshots.read(handle, own).table
            seen += table.num_rows
            share = handle.nbytes * table.num_rows / handle.rows
            assert share * 0.9 < snapshots.bytes_read < share * 1.1, (parallelism, index)
    assert seen == 2 * 400_000


def test_reading_the_whole_file_would_be_caught() -> None:
    """The broken variant: without blocks all of it is read, whatever the range."""
    store = MemoryStore()
    (handle,) = write(store, 1, keyed(new_piece([rows(400_000)]))).handles
    snapshots = SnapshotStore(store, G)
    table = snapshots.read(replace(handle, blocks=()), range(32)).table
    assert table.equals(SnapshotStore(store, G).read(handle, range(32)).table)
    assert snapshots.bytes_read > 3 * handle.nbytes * table.num_rows / handle.rows


def test_the_schema_is_read_without_the_rows() -> None:
    store = MemoryStore()
    (handle,) = write(store, 1, keyed(new_piece([rows(100_000)]))).handles
    snapshots = SnapshotStore(store, G)
    assert snapshots.read_schema(handle).equals(rows(1).schema, check_metadata=True)
    assert snapshots.key_columns(handle) == ("k",)
    assert snapshots.bytes_read < 10_000


def test_one_huge_group_is_cut_into_several_blocks() -> None:
    store = MemoryStore()
    batch = pa.record_batch({"k": np.zeros(200_000, np.int64), "v": np.arange(200_000)})
    (handle,) = write(store, 1, keyed(batches=(batch,))).handles
    assert len(handle.group_rows) == 1
    assert len(handle.blocks) >= 5
    assert SnapshotStore(store, G).read(handle).table["v"].to_pylist() == list(range(200_000)), "in their order"


@pytest.mark.parametrize(
    "kind",
    [pa.dictionary(pa.int32(), pa.string()), pa.list_(pa.dictionary(pa.int8(), pa.string()))],
)
def test_tables_with_dictionaries_have_no_blocks_and_are_read_whole(kind: pa.DataType) -> None:
    store = MemoryStore()
    value = ["a"] if pa.types.is_list(kind) else "a"
    batch = pa.record_batch({"k": pa.array(range(50)), "d": pa.array([value] * 50, kind)})
    (handle,) = write(store, 1, keyed(batches=(batch,))).handles
    assert handle.blocks == ()
    assert SnapshotStore(store, G).read_schema(handle).equals(batch.schema)
    parts = [SnapshotStore(store, G).read(handle, key_group_range(i, 3, G)).table for i in range(3)]
    assert sorted(k for part in parts for k in part["k"].to_pylist()) == list(range(50))
    assert {str(v) for part in parts for v in part["d"].to_pylist()} == {str(value)}


def test_rows_of_groups_that_belong_to_others_are_not_state() -> None:
    """A file from before a rescale is named by several subtasks: each key counts once (rule K3)."""
    store = MemoryStore()
    (handle,) = write(store, 1, keyed(Piece("p", (rows(10_000),)))).handles
    clipped = [clip(handle, key_group_range(i, 4, G), G) for i in range(4)]
    assert len({h.piece for h in clipped}) == 4, "another part of the rows is another piece"
    assert sum(map(rows_that_count, clipped)) == 10_000
    assert read_all(store, tuple(clipped), range(G)) == list(range(10_000))
    again = [clip(h, range(40), G) for h in clipped]
    assert read_all(store, tuple(again), range(G)) == read_all(store, (handle,), range(40))
    assert clip(handle, range(G), G).piece == "p", "all of it is the same piece"
    assert [h.piece for h in again[:2]] == ["p@0-32", "p@32-40"]


# --------------------------------------------------------------------------------------------------------------- damage


def _at(offset: int) -> Callable[[bytes], bytes]:
    return lambda data: data[:offset] + bytes([data[offset] ^ 1]) + data[offset + 1 :]


@pytest.mark.parametrize("part", ["head", "block", "last block"])
@pytest.mark.parametrize("shared", [True, False])
def test_a_flipped_byte_is_found_in_the_block_and_named(shared: bool, part: str) -> None:
    store = MemoryStore()
    many = rows(100_000)
    frozen = keyed(new_piece([many])) if shared else keyed(batches=(many,))
    (handle,) = write(store, 1, frozen).handles
    assert handle.file is not None
    block = handle.blocks[{"head": 0, "block": 1, "last block": -1}[part]]
    base = 0 if handle.section is None else handle.section.offset
    store.put(handle.file.path, _at(base + block.offset + block.nbytes // 2)(store.get(handle.file.path)))
    with pytest.raises(CorruptCheckpointError, match=f"{handle.file.path}.*checksum.*manifest says"):
        SnapshotStore(store, G).read(handle)
    if part == "last block":
        assert SnapshotStore(store, G).read(handle, range(2)).table.num_rows > 0, "who does not need it does not care"


def test_a_flipped_byte_in_a_section_that_is_read_whole_is_named() -> None:
    store = MemoryStore()
    batch = pa.record_batch({"d": pa.array(["a", "b"] * 50).dictionary_encode()})
    (handle,) = write(store, 1, FrozenTable("d", (batch,))).handles
    assert handle.file is not None
    store.put(handle.file.path, flipped(store.get(handle.file.path)))
    with pytest.raises(CorruptCheckpointError, match="chk-00000001/chain-0.arrows.*checksum"):
        SnapshotStore(store, G).read(handle)


def test_a_file_that_is_too_short_or_gone_is_named() -> None:
    store = MemoryStore()
    (handle,) = write(store, 1, keyed(new_piece([rows(50_000)]))).handles
    assert handle.file is not None
    data = store.get(handle.file.path)
    store.put(handle.file.path, data[: len(data) // 2])
    with pytest.raises(CorruptCheckpointError, match=r"shared/00000001-op-0.s-0.arrow.*bytes, its manifest says"):
        SnapshotStore(store, G).read(handle)
    store.delete(handle.file.path)
    with pytest.raises(CorruptCheckpointError, match=r"shared/00000001-op-0.s-0.arrow.* is missing"):
        SnapshotStore(store, G).read(handle)


def test_blocks_that_contradict_each_other_are_refused() -> None:
    store = MemoryStore()
    (handle,) = write(store, 1, keyed(new_piece([rows(50_000)]))).handles
    for blocks in (handle.blocks[::-1], handle.blocks[1:]):
        with pytest.raises(CorruptCheckpointError, match="index of blocks"):
            SnapshotStore(store, G).read(replace(handle, blocks=blocks))
    with pytest.raises(CorruptCheckpointError, match="rows that its manifest says"):
        SnapshotStore(store, G).read(replace(handle, blocks=(handle.blocks[0], *handle.blocks[2:])))


# ---------------------------------------------------------------------------------------------- version 1, other roots


def test_a_state_file_of_format_version_1_is_still_read() -> None:
    """One whole file a state, no blocks, no sections: the handle as its manifest had it."""
    (modern,) = write(MemoryStore(), 1, keyed(batches=(rows(1000),)), inline=None).handles
    data = base64.b64decode(modern.inline or "")
    store = MemoryStore()
    store.put("chk-00000003/op-0.s.arrow", data)
    file = FileRef("chk-00000003/op-0.s.arrow", len(data), checksum(data))
    old = StateHandle("op", 0, 1, "s", 1000, True, file=file, group_rows=modern.group_rows)
    assert read_all(store, (old,)) == list(range(1000))
    assert sum(len(read_all(store, (old,), key_group_range(i, 3, G))) for i in range(3)) == 1000
    assert SnapshotStore(store, G).read_schema(old) == rows(1).schema


def test_files_of_another_root_are_read_from_there() -> None:
    mine, theirs = MemoryStore(), MemoryStore()
    (handle,) = write(theirs, 1, keyed(Piece("p", (rows(20_000),)))).handles
    assert handle.file is not None
    rooted = replace(handle, file=replace(handle.file, root="s3://bucket/savepoint"))
    opened: list[str] = []

    def open_root(url: str) -> Store:
        opened.append(url)
        return theirs

    snapshots = SnapshotStore(mine, G, open_root=open_root)
    for _ in range(2):
        restored = snapshots.read(rooted, range(G))
        assert restored.table.num_rows == 20_000
        assert restored.piece == "", "what it was cannot be named again"
    assert opened == ["s3://bucket/savepoint"]
    assert SnapshotStore(theirs, G).read(handle, range(G)).piece == "p"


# -------------------------------------------------------------------------------------------------------------- folders


class Folder:
    """A frozen store on local disk of two immutable files and one that changes."""

    def __init__(self, folder: Path, *tables: str, name: str = "store") -> None:
        self.folder, self.tables, self.released = folder, tables, 0
        self.frozen = FrozenFolder(name, {"tables": list(tables)}, self.finish, self.release)

    def finish(self) -> tuple[dict[str, FolderFile], int]:
        files = {}
        for table in self.tables:
            (self.folder / f"{table}.sst").write_bytes(table.encode() * 1000)
            files[f"{table}.sst"] = FolderFile(self.folder / f"{table}.sst", f"{table}-unique")
        (self.folder / "CURRENT").write_bytes(" ".join(self.tables).encode())
        files["CURRENT"] = FolderFile(self.folder / "CURRENT")
        return files, 10 * len(self.tables)

    def release(self) -> None:
        self.released += 1


def write_folder(store: Store, checkpoint: int, folder: Folder, reuse: Reuse | None = None) -> Written:
    return SnapshotStore(store, G).write(checkpoint, ME, 1, [("op", FrozenState(folders=(folder.frozen,)))], reuse)


def test_a_folder_comes_back_and_its_immutable_files_are_uploaded_once(tmp_path: Path) -> None:
    store = MemoryStore()
    first = write_folder(store, 1, Folder(tmp_path, "a", "b"))
    assert [path for path, _ in store.list()] == [
        "shared/00000001-op-0.a-unique.sst",
        "shared/00000001-op-0.b-unique.sst",
    ]
    second = write_folder(store, 2, Folder(tmp_path, "b", "c"), Reuse.of(first.handles))
    assert [path for path, _ in store.list("shared/00000002")] == ["shared/00000002-op-0.c-unique.sst"]
    (handle,) = second.handles
    assert (handle.format, handle.rows, handle.keyed, handle.meta) == ("rocksdb", 20, True, {"tables": ["b", "c"]})
    assert second.uploaded_bytes < first.uploaded_bytes < handle.nbytes + first.uploaded_bytes
    snapshots = SnapshotStore(store, G)
    restored = snapshots.read(handle, range(G)).folder
    assert restored is not None
    assert (restored.exact, restored.key_groups) == (True, range(G))
    assert restored.immutable == {"b.sst": "b-unique", "c.sst": "c-unique"}
    target = tmp_path / "restored"
    target.mkdir()
    restored.download(target)
    assert {p.name: p.read_bytes()[:3] for p in target.iterdir()} == {
        "b.sst": b"bbb",
        "c.sst": b"ccc",
        "CURRENT": b"b c",
    }
    half = snapshots.read(handle, range(64)).folder
    assert half is not None
    assert (half.exact, half.key_groups) == (False, range(64))


def test_a_folder_is_damaged_named_or_has_no_place(tmp_path: Path) -> None:
    store = MemoryStore()
    (handle,) = write_folder(store, 1, Folder(tmp_path, "a")).handles
    path = "shared/00000001-op-0.a-unique.sst"
    store.put(path, flipped(store.get(path)))
    restored = SnapshotStore(store, G).read(handle, range(G)).folder
    assert restored is not None
    with pytest.raises(CorruptCheckpointError, match=f"{path}.*checksum"):
        restored.download(tmp_path)
    (file,) = handle.parts
    for name in ("../escape", "a/b", ""):
        evil = SnapshotStore(store, G).read(replace(handle, parts=((name, file[1]),)), range(G)).folder
        assert evil is not None
        store.put(path, b"a" * 1000)
        with pytest.raises(CorruptCheckpointError, match="no plain name"):
            evil.download(tmp_path)
    with pytest.raises(ConfigError, match='state="memory"'):
        SnapshotStore(store, G, None).write(1, ME, 1, [("op", FrozenState(folders=(Folder(tmp_path).frozen,)))])
    gone = Folder(tmp_path / "nowhere")
    gone.finish = lambda: ({"x": FolderFile(tmp_path / "nowhere" / "x", "x")}, 1)  # type: ignore[method-assign]
    frozen = replace(gone.frozen, finish=gone.finish)
    with pytest.raises(StorageError, match="cannot be uploaded.*nowhere"):
        SnapshotStore(store, G).write(1, ME, 1, [("op", FrozenState(folders=(frozen,)))])
