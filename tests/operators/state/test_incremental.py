"""What a checkpoint of a table costs: it grows with what changed, and pieces are let go."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import numpy.typing as npt
import pyarrow as pa
import pytest

from rayflow.errors import StateSchemaError
from rayflow.operators.base import RestoredState
from rayflow.operators.state import journal
from rayflow.operators.state.keyed import KeyedState
from rayflow.operators.state.table import StateTable
from tests.operators.state.fakes import World

KEYS = pa.schema([("k", pa.int64())])
VALUES = pa.schema([("a", pa.int64()), ("b", pa.float64()), ("c", pa.string())])
ROWS = 100_000
GROUPS = range(128)


@pytest.fixture
def world(tmp_path: Path) -> World:
    return World("fs", tmp_path)


def _full(world: World) -> tuple[KeyedState, StateTable]:
    state = KeyedState(world.context(), ("k",))
    table = state.table("values", KEYS, VALUES)
    _write(table, np.arange(ROWS))
    return state, table


def _write(table: StateTable, keys: npt.NDArray[np.int64]) -> None:
    slots = table.slots([pa.array(keys)], insert=True)
    table.set(slots, "a", pa.array(keys))
    table.set(slots, "c", pa.array(keys).cast(pa.string()))


def test_a_state_that_has_not_changed_uploads_nothing(world: World) -> None:
    state, _ = _full(world)
    first = world.save(state.freeze(), GROUPS)
    before = world.bytes_written
    again = world.save(state.freeze(), GROUPS)
    assert world.bytes_written == before
    assert [id for id, _ in again.tables[0][1]] == [id for id, _ in first.tables[0][1]]
    restored = KeyedState(world.context(), ("k",))
    restored.restore(world.give_back([again], world.context()))
    restored.table("values", KEYS, VALUES)
    world.save(restored.freeze(), GROUPS)
    assert world.bytes_written == before, "pieces keep their ids over a restore"


def test_touching_one_percent_uploads_at_most_five_and_live_pieces_stay_bounded(world: World) -> None:
    state, table = _full(world)
    frozen = state.freeze()
    lengths = {piece.id: sum(map(len, piece.batches)) for piece in frozen.tables[0].pieces}
    world.save(frozen, GROUPS)
    full = world.bytes_written
    rng = np.random.default_rng(3)
    for _ in range(150):
        before = world.bytes_written
        _write(table, rng.integers(0, ROWS, ROWS // 100))
        frozen = state.freeze()
        pieces = frozen.tables[0].pieces
        lengths |= {piece.id: sum(map(len, piece.batches)) for piece in pieces if piece.batches}
        world.save(frozen, GROUPS)
        assert sum(lengths[piece.id] for piece in pieces) <= 4 * ROWS
        assert len(pieces) < 150
        assert world.bytes_written - before <= 0.05 * full


def test_tiny_changes_do_not_pile_up_pieces(world: World) -> None:
    state, table = _full(world)
    world.save(state.freeze(), GROUPS)
    full = world.bytes_written
    for n in range(300):
        _write(table, np.arange(n, n + 3))
        frozen = state.freeze()
        world.save(frozen, GROUPS)
        assert len(frozen.tables[0].pieces) < 64
    assert world.bytes_written - full < 10 * full


def test_removing_everything_leaves_no_pieces(world: World) -> None:
    state, table = _full(world)
    world.save(state.freeze(), GROUPS)
    table.delete(table.slots([pa.array(np.arange(ROWS))], insert=False))
    frozen = state.freeze().tables[0]
    assert frozen.pieces == ()
    assert frozen.schema == pa.schema([*KEYS, *VALUES])


def test_rows_without_an_id_are_uploaded_again_without_another_copy(world: World) -> None:
    rows = pa.table({"k": [1, 2], "a": [1, 2], "b": [0.5, None], "c": ["x", None]})
    state = KeyedState(world.context(), ("k",))
    state.restore([RestoredState("values", rows), RestoredState("unknown", rows, piece="old")])
    table = state.table("values", KEYS, VALUES)
    assert table.rows == 2
    frozen = {found.name: found for found in state.freeze().tables}
    assert [piece.id for piece in frozen["unknown"].pieces] == ["old"]
    assert frozen["values"].pieces[0].batches[0].column("a").chunk(0).equals(rows.column("a").chunk(0))


def test_restored_rows_of_other_columns_migrate_or_are_refused(world: World) -> None:
    rows = pa.table({"k": pa.array([1, 2], pa.int64()), "a": pa.array([1, 2], pa.int32())})
    state = KeyedState(world.context(), ("k",))
    state.restore([RestoredState("values", rows, piece="p"), RestoredState("text", rows, piece="q")])
    table = state.table("values", KEYS, VALUES)
    found = pa.Table.from_batches(list(table.scan()))
    assert found.to_pylist() == [{"k": k, "a": k, "b": None, "c": None} for k in (1, 2)]
    assert state.freeze().tables[0].pieces[0].id != "p", "other rows, another id"
    with pytest.raises(StateSchemaError, match="text"):
        state.table("text", KEYS, pa.schema([("a", pa.string())]))


def test_a_wide_table_leaves_no_more_cells_to_a_freeze_than_a_narrow_one(world: World) -> None:
    columns = [f"v{i}" for i in range(63)]
    state = KeyedState(world.context(), ("k",))
    table = state.table("wide", KEYS, pa.schema([(name, pa.int64()) for name in columns]))
    most = journal.SEAL_CELLS // (1 + len(columns))
    for low in range(0, ROWS, 10_000):
        table.slots([pa.array(np.arange(low, low + 10_000))], insert=True)
    pieces = state.freeze().tables[0].pieces
    rows = [sum(map(len, piece.batches)) for piece in pieces]
    assert sum(rows) == ROWS
    assert rows[-1] <= most + 10_000
