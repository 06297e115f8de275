"""A short version of `benchmarks.kill_runs`, and that its judge can say no."""

from __future__ import annotations

import random
from functools import partial
from pathlib import Path

import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq
import pytest

from benchmarks.kill_runs import Bids, Shape, When, draw_kills, one_run, runs, told
from benchmarks.places import LocalPlace, S3Place, s3_place
from rayflow.core.manifest import Manifest
from rayflow.storage.checkpoints import CheckpointStore
from rayflow.storage.filesystem import ObjectStore
from tests.servers import S3Server


@pytest.mark.ray
@pytest.mark.usefixtures("cluster")
def test_four_runs_with_kills_give_what_duckdb_gives(tmp_path: Path) -> None:
    done = list(runs(local=3, s3=0, coordinator=1, seed=11, folder=tmp_path, state=1))
    assert [told(run) for run in done if not run.ok] == []
    assert [run.where for run in done] == ["local"] * 3 + ["state"]
    assert sum(run.coordinator_kills for run in done) == 2
    assert all(len(run.kills) > run.coordinator_kills for run in done), "every run loses a subtask"


@pytest.fixture(scope="module")
def bids(tmp_path_factory: pytest.TempPathFactory) -> Bids:
    return Bids(tmp_path_factory.mktemp("bids"), rows=100_000)


@pytest.mark.parametrize("shape", Shape)
def test_the_right_rows_are_right_in_any_order(bids: Bids, shape: Shape) -> None:
    assert bids.difference(shape, bids.expected(shape).sort_by([("auction", "descending")])) == ""


@pytest.mark.parametrize("shape", [Shape.WINDOWS, Shape.BIDS])
def test_a_row_twice_a_row_lost_and_a_row_changed_are_each_seen(bids: Bids, shape: Shape) -> None:
    table = bids.expected(shape)
    assert bids.difference(shape, pa.concat_tables([table, table.slice(5, 1)])) == "1 rows too many, 0 missing"
    assert bids.difference(shape, table.slice(1)) == "0 rows too many, 1 missing"
    one = table.slice(0, 1)
    changed = one.set_column(0, "auction", pc.add(one["auction"], 1_000_000))
    assert bids.difference(shape, pa.concat_tables([table.slice(1), changed])) == "1 rows too many, 1 missing"


def test_running_sums_from_lost_and_doubled_bids_and_restored_from_elsewhere_are_each_seen(bids: Bids) -> None:
    table = bids.expected(Shape.RUNNING)
    judged = partial(bids.difference, Shape.RUNNING)
    assert judged(pa.concat_tables([table, table.slice(5, 1)])) == "1 rows too many, 0 missing"
    of_one = pc.equal(table["auction"], table["auction"][0])
    last = pc.max(table.filter(of_one)["n"])
    assert judged(table.filter(pc.invert(pc.and_(of_one, pc.equal(table["n"], last))))) == "0 rows too many, 1 missing"
    later = pc.and_(of_one, pc.greater(table["n"], 1))
    for name, what in (("n", "a bid counted twice"), ("total", "a price that is not one of its bids")):
        off = pc.add(table[name], later.cast(pa.int64()))
        assert judged(table.set_column(table.column_names.index(name), name, off)) == "1 rows too many, 1 missing", what


def test_a_run_that_raises_is_a_failed_run(bids: Bids, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(*args: object) -> None:
        raise OSError("no")

    monkeypatch.setattr("benchmarks.kill_runs.flow", refuse)
    run = one_run(1, LocalPlace(tmp_path), tmp_path, bids, where="local", coordinator=False)
    assert not run.ok
    assert "FAILED (OSError: no)" in told(run)


def test_what_is_left_in_a_local_place_is_seen(tmp_path: Path) -> None:
    place = LocalPlace(tmp_path)
    out = Path(place.out)
    out.mkdir()
    pq.write_table(pa.table({"a": [1]}), out / "part-00000-00000001-0000.parquet")
    ObjectStore(str(tmp_path / "checkpoints" / "job"))
    assert place.leftovers("job") == []
    (out / "_rayflow").mkdir()
    chk = tmp_path / "checkpoints" / "job" / "chk-00000007"
    chk.mkdir(parents=True)
    assert place.leftovers("job") == [str(out / "_rayflow"), str(chk)]
    chk.mkdir(parents=True, exist_ok=True)  # the listing has removed it: an empty folder is no object
    (chk / "window-0.runs.arrow").write_bytes(b"x")
    shared = tmp_path / "checkpoints" / "job" / "shared"
    shared.mkdir(parents=True)
    (shared / "abc.arrow").write_bytes(b"x")
    assert place.leftovers("job")[1:] == ["chk-00000007/window-0.runs.arrow", "shared/abc.arrow"]


def test_a_manifest_is_no_leftover_and_a_void_one_is(tmp_path: Path) -> None:
    place = LocalPlace(tmp_path)
    Path(place.out).mkdir()
    checkpoints = CheckpointStore(ObjectStore(str(tmp_path / "checkpoints" / "job")), "job")
    found = checkpoints.claim()
    checkpoints.commit(
        Manifest(
            job="job",
            checkpoint=found.next_checkpoint,
            kind="final",
            attempt=found.next_attempt,
            incarnation=found.number,
            run_id=found.run_id,
            created_at=0.0,
            max_parallelism=8,
            parallelism={},
            operators={},
            subtasks=(),
            pending_splits=(),
        )
    )
    assert place.leftovers("job") == []
    checkpoints.latest(found, unresolved=[found.next_checkpoint + 1])  # type: ignore[list-item]
    assert place.leftovers("job") == [f"chk-{found.next_checkpoint + 1:08d}/manifest.json"]


def test_what_is_left_on_s3_is_seen(moto_server: S3Server) -> None:
    place: S3Place = s3_place(moto_server)
    assert place.leftovers("job") == []
    place.client.put_object(Bucket=place.bucket, Key="out/_rayflow/x", Body=b"")
    place.client.create_multipart_upload(Bucket=place.bucket, Key="out/part-1.parquet")
    place.client.put_object(Bucket=place.bucket, Key="checkpoints/job/shared/abc.arrow", Body=b"")
    assert place.leftovers("job") == [
        "out/_rayflow/x",
        "unfinished upload of out/part-1.parquet",
        "shared/abc.arrow",
    ]


def test_the_same_seed_draws_the_same_kills_and_the_first_hits_a_running_job() -> None:
    for seed in range(200):
        kills = draw_kills(random.Random(seed), coordinator=seed % 5 == 0)
        assert kills == draw_kills(random.Random(seed), coordinator=seed % 5 == 0)
        assert kills[0].when in (When.COMPLETED, When.UNDER_WAY)
        assert 1 <= sum(not kill.coordinator for kill in kills) <= 3
        assert sum(kill.coordinator for kill in kills) == (seed % 5 == 0)
        assert all(kill.when is not When.INPUT_ENDED for kill in kills[:-1]), "it opens the gate"
