"""`docs/checkpoint-format.md` is true and complete: its own reader, json and pyarrow alone, reads what runs write."""

from __future__ import annotations

import dataclasses
import json
import re
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

import duckdb
import numpy as np
import pyarrow as pa
import pytest

import rayflow as rf
from rayflow.core import manifest as manifest_module
from rayflow.partition import hash_columns, key_groups
from rayflow.storage.filesystem import ObjectStore
from rayflow.storage.savepoint_copy import write_savepoint
from rayflow.storage.snapshots import SnapshotStore
from tests.test_read_checkpoint import by_hand, expected

PAGE = Path(__file__).resolve().parent.parent / "docs" / "checkpoint-format.md"
TEXT = PAGE.read_text(encoding="utf-8")


def block(name: str) -> str:
    (found,) = re.findall(rf"```python {name}\n(.*?)```", TEXT, re.DOTALL)
    return str(found)


def reader() -> dict[str, Any]:
    source = block("reader")
    assert "import rayflow" not in source
    assert "from rayflow" not in source
    names: dict[str, Any] = {}
    exec(compile(source, str(PAGE), "exec"), names)
    return names


def run_flow(url: Path, state: str = "fs") -> None:
    """Running sums of 500 keys at parallelism 2, checkpoint after checkpoint, and open windows of the same rows."""
    rng = np.random.default_rng(5)
    size = 8_000
    rows = pa.table(
        {
            "at": pa.array(np.arange(size) * 1_000_000, pa.timestamp("us")),
            "k": pa.array(rng.integers(0, 500, size).astype(str).tolist(), pa.string()),
            "v": pa.array(rng.integers(-9, 9, size)),
        }
    )
    keyed = rf.from_arrow(rows, batch_rows=500).with_event_time("at", max_delay="0s").key_by("k")
    sums = keyed.agg(total=rf.sum("v"), n=rf.count())
    counted = keyed.window(rf.tumbling("1h")).agg(n=rf.count())
    rf.Flow("formatted", sums.collect(name="sums"), counted.collect(name="counts")).run(
        local=True,
        parallelism=2,
        checkpoints=rf.CheckpointConfig(str(url), interval="3ms", retain=100),
        config=rf.JobConfig(state=state),  # type: ignore[arg-type]
    )


def as_rows(table: pa.Table) -> list[tuple[Any, ...]]:
    return sorted(zip(*table.to_pydict().values(), strict=True), key=repr)


def test_the_reader_of_the_page_reads_every_state_of_a_run_as_rayflow_does(tmp_path: Path) -> None:
    run_flow(tmp_path)
    page = reader()
    modes = set()
    places = set()
    for folder in sorted((tmp_path / "formatted").glob("chk-*")):
        if not (folder / "manifest.json").exists():
            continue
        manifest = page["read_manifest"](folder / "manifest.json")
        own = rf.read_checkpoint(str(folder))
        for step in own.steps():
            for state in own.states(step):
                found = page["read_state"](folder.parent, manifest, step, state)
                theirs = own.table(step, state)
                assert found.schema.equals(theirs.schema), (step, state)
                assert as_rows(found) == as_rows(theirs), (folder.name, step, state)
        for part in manifest["subtasks"]:
            for handle in part["states"]:
                modes.add(handle["mode"])
                places.add("inline" if handle["inline"] else "section" if handle["section"] else "file")
    assert modes == {"append", "upsert"}
    assert {"inline", "section"} <= places


def test_the_reader_of_the_page_merges_pieces_and_subkeys(tmp_path: Path) -> None:
    by_hand(tmp_path)
    page = reader()
    manifest = page["read_manifest"](tmp_path / "chk-00000001" / "manifest.json")
    own = rf.read_checkpoint(str(tmp_path))
    for step, state in (("agg-1", "values"), ("process-1", "items")):
        found = page["read_state"](tmp_path, manifest, step, state)
        assert as_rows(found) == as_rows(own.table(step, state))


def test_the_reader_of_the_page_takes_only_the_key_groups_that_count(tmp_path: Path) -> None:
    """After a rescale several subtasks name one file, each with its own groups."""
    by_hand(tmp_path)
    page = reader()
    manifest = page["read_manifest"](tmp_path / "chk-00000001" / "manifest.json")
    whole = page["read_state"](tmp_path, manifest, "agg-1", "values")
    for part in manifest["subtasks"]:
        for handle in part["states"]:
            handle["groups"] = [2, 5] if part["index"] == 0 else [11, 12]
    found = page["read_state"](tmp_path, manifest, "agg-1", "values")
    groups = key_groups(hash_columns([whole["k"]]), manifest["max_parallelism"])
    counted = whole.filter(pa.array([group in (2, 3, 4, 11) for group in groups.tolist()]))
    assert 0 < found.num_rows < whole.num_rows
    assert as_rows(found) == as_rows(counted)


def test_the_reader_of_the_page_needs_no_rayflow(tmp_path: Path) -> None:
    by_hand(tmp_path)
    program = (
        "import sys; sys.modules['rayflow'] = None\n"
        + block("reader")
        + f"\nm = read_manifest({str(tmp_path / 'chk-00000001/manifest.json')!r})\n"
        + f"print(read_state({str(tmp_path)!r}, m, 'agg-1', 'values').num_rows)\n"
    )
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, check=True)
    assert int(done.stdout) == rf.read_checkpoint(str(tmp_path)).table("agg-1", "values").num_rows


@pytest.mark.parametrize("where", ["manifest", "file"])
def test_the_reader_of_the_page_refuses_what_is_damaged(tmp_path: Path, where: str) -> None:
    by_hand(tmp_path)
    page = reader()
    path = tmp_path / "chk-00000001" / "manifest.json"
    if where == "manifest":
        path.write_bytes(path.read_bytes().replace(b'"periodic"', b'"periodid"'))
        with pytest.raises(ValueError, match="the manifest is damaged"):
            page["read_manifest"](path)
        return
    manifest = page["read_manifest"](path)
    handle = next(h for part in manifest["subtasks"] for h in part["states"] if h["file"])
    file = tmp_path / handle["file"]["path"]
    data = bytearray(file.read_bytes())
    data[len(data) // 2] ^= 1
    file.write_bytes(data)
    with pytest.raises(ValueError, match="a state file is damaged"):
        page["read_state"](tmp_path, manifest, handle["operator"], handle["name"])


def test_duckdb_reads_the_tables_in_the_files(tmp_path: Path) -> None:
    run_flow(tmp_path)
    page = reader()
    folder = max((tmp_path / "formatted").glob("chk-*"))
    manifest = page["read_manifest"](folder / "manifest.json")
    step = next(s for s in rf.read_checkpoint(str(folder)).steps() if s.startswith("agg"))
    state = page["read_state"](folder.parent, manifest, step, rf.read_checkpoint(str(folder)).states(step)[0])
    with duckdb.connect(":memory:") as connection:
        connection.register("state", state)
        ((keys,),) = connection.execute("select count(distinct k) from state").fetchall()
    assert keys == 500


def test_the_hash_of_the_page_is_that_of_the_engine() -> None:
    names: dict[str, Any] = {}
    exec(compile(block("hash"), str(PAGE), "exec"), names)
    numbers = [0, 1, -1, 2**63 - 1, -(2**63), None, 12345]
    texts = ["", "a", "eight by", "more than eight bytes", "ä€", None, "x" * 300]
    for total in (1, 7, 128):
        for columns in ([numbers], [texts], [numbers, texts], [texts, numbers]):
            arrays = [pa.array(c, pa.int64() if c is numbers else pa.string()) for c in columns]
            groups = key_groups(hash_columns(arrays), total).tolist()
            assert [names["key_group"](row, total) for row in zip(*columns, strict=True)] == groups


def test_every_field_of_the_manifest_is_in_the_page(tmp_path: Path) -> None:
    """In what is written, and in the values it is made of: a new field cannot be forgotten here."""
    by_hand(tmp_path)
    written = json.loads((tmp_path / "chk-00000001" / "manifest.json").read_bytes())
    part = written["subtasks"][0]
    members = {*written, *part, *part["stats"], *part["splits"][0]}
    for handle in part["states"]:
        members |= {*handle, *(handle["file"] or {})}
    internal = {"subtask_id"}
    for value in vars(manifest_module).values():
        if dataclasses.is_dataclass(value) and isinstance(value, type):
            members |= {field.name for field in dataclasses.fields(value)} - internal
    missing = sorted(name for name in members if f"`{name}`" not in TEXT)
    assert missing == []


def test_every_file_name_of_the_layout_is_in_the_page() -> None:
    from rayflow.storage import layout

    assert layout.__doc__ is not None
    paths = re.findall(r"^    (\S+)", layout.__doc__, re.MULTILINE)
    assert paths
    plain = TEXT.replace("<chain>", "*")
    for path in paths:
        head = path.replace("<chain>", "*").split("/")[0]
        assert head in plain, path


def test_a_rocksdb_folder_can_be_decoded_by_the_page(tmp_path: Path) -> None:
    """Keys and values of a real folder, byte by byte as section 6 says, with RocksDB and Arrow alone."""
    import base64

    from rocksdict import AccessType, Options, Rdict

    run_flow(tmp_path, "rocksdb")
    root = tmp_path / "formatted"
    page = reader()
    last = max(path for path in root.glob("chk-*/manifest.json"))
    manifest = page["read_manifest"](last)
    found: dict[str, list[Any]] = {}
    for part in manifest["subtasks"]:
        for number, handle in enumerate(h for h in part["states"] if h["format"] == "rocksdb"):
            folder = tmp_path / f"{part['chain']}-{part['index']}-{number}"
            folder.mkdir()
            for name, file in handle["parts"]:
                (folder / name).write_bytes(
                    page["checked"]((root / file["path"]).read_bytes(), file["nbytes"], file["checksum"])
                )
            small, _ = page["read_piece"](root, manifest, {**handle, "format": "arrow", "keyed": False})
            for row in small.to_pylist():
                (folder / row["file"]).write_bytes(row["data"])
            (table,) = handle["meta"]["tables"]
            keys, *versions = (
                pa.ipc.read_schema(pa.py_buffer(base64.b64decode(text))) for text in (table["keys"], *table["versions"])
            )
            assert (keys.types, table["subkeys"]) == ([pa.string()], 0)
            values = versions[table["current"]]
            database = Rdict(str(folder), Options(raw_mode=True), access_type=AccessType.read_only())
            for key, value in database.items():
                assert isinstance(key, bytes)
                assert isinstance(value, bytes)
                group, number_of_table, length = int.from_bytes(key[:2], "big"), key[2], int.from_bytes(key[3:7], "big")
                text = key[7:].decode()
                assert (number_of_table, length) == (table["number"], len(key) - 7 + 1)
                assert group == key_groups(hash_columns([pa.array([text])]), manifest["max_parallelism"])[0]
                assert value[0] == table["current"]
                row, at = [], 1
                for kind in values.types:
                    assert pa.types.is_signed_integer(kind)
                    end = at + 1 + kind.bit_width // 8
                    row.append(int.from_bytes(value[at + 1 : end], "little", signed=True) if value[at] else None)
                    at = end
                assert at == len(value)
                found[text] = row
            database.close()
    own = rf.read_checkpoint(str(root))
    step = next(s for s in own.steps() if s.startswith("agg"))
    theirs = own.table(step, own.states(step)[0])
    assert {row[0]: list(row[1:]) for row in as_rows(theirs)} == found
    assert len(found) == 500


def test_a_savepoint_is_read_by_the_page_wherever_it_is(tmp_path: Path) -> None:
    written = by_hand(tmp_path / "job")
    store = ObjectStore(str(tmp_path / "job"))
    write_savepoint(written, SnapshotStore(store, written.max_parallelism), str(tmp_path / "saved"))
    shutil.rmtree(tmp_path / "job")
    shutil.move(tmp_path / "saved", tmp_path / "moved")
    page = reader()
    manifest = page["read_manifest"](tmp_path / "moved" / "manifest.json")
    assert manifest["kind"] == "savepoint"
    handles = [handle for part in manifest["subtasks"] for handle in part["states"]]
    assert all(handle["groups"] for handle in handles if handle["keyed"])
    assert all(set(handle["file"] or {}) <= {"path", "nbytes", "checksum"} for handle in handles)
    found = page["read_state"](tmp_path / "moved", manifest, "agg-1", "values")
    assert dict(zip(found["k"].to_pylist(), found["v"].to_pylist(), strict=True)) == expected()
    assert rf.read_checkpoint(str(tmp_path / "moved")).table("agg-1", "values").num_rows == len(expected())
