"""Every store against `StoreConformance`, and what is particular to each."""

from __future__ import annotations

import contextlib
import errno
import os
import pickle
import uuid
from pathlib import Path

import pytest
import s3fs

from rayflow.errors import ConfigError, StorageError
from rayflow.storage.filesystem import MemoryStore, ObjectStore, PutOutcome, Store
from rayflow.storage.local import LocalDriver
from rayflow.storage.remote import RETRY_DELAYS_S, S3Driver, retried
from tests.servers import S3Server
from tests.storage.conformance import StoreConformance

AWKWARD = "pre fix/50%/ü#1?v=2"


class TestMemoryStore(StoreConformance):
    @pytest.fixture
    def store(self) -> Store:
        return MemoryStore()

    @pytest.fixture
    def another(self, store: Store) -> Store:
        return store

    def test_cannot_leave_its_process(self) -> None:
        with pytest.raises(TypeError, match="ObjectStore"):
            pickle.dumps(MemoryStore())


class TestLocal(StoreConformance):
    @pytest.fixture
    def store(self, tmp_path: Path) -> Store:
        return ObjectStore(str(tmp_path / AWKWARD))

    @pytest.fixture
    def another(self, store: Store) -> Store:
        copy = pickle.loads(pickle.dumps(store))
        assert isinstance(copy, ObjectStore)
        return copy


class TestFsspecMemory(StoreConformance):
    @pytest.fixture
    def store(self) -> Store:
        return ObjectStore(f"memory://{uuid.uuid4().hex}/{AWKWARD}")

    @pytest.fixture
    def another(self, store: Store) -> Store:
        assert isinstance(store, ObjectStore)
        return ObjectStore(store.url)


class TestMoto(StoreConformance):
    @pytest.fixture
    def store(self, moto_server: S3Server) -> Store:
        return ObjectStore(f"{moto_server.bucket()}/{AWKWARD}", moto_server.storage_options)

    @pytest.fixture
    def another(self, store: Store) -> Store:
        copy = pickle.loads(pickle.dumps(store))
        assert isinstance(copy, ObjectStore)
        return copy


@pytest.mark.slow
class TestSeaweed(StoreConformance):
    races = 1  # its losers wait for its lock in steps of a second

    @pytest.fixture
    def store(self, s3_server: S3Server) -> Store:
        return ObjectStore(f"{s3_server.bucket()}/{AWKWARD}", s3_server.storage_options)

    @pytest.fixture
    def another(self, store: Store) -> Store:
        copy = pickle.loads(pickle.dumps(store))
        assert isinstance(copy, ObjectStore)
        return copy

    def test_a_large_object_goes_up_in_parts(self, store: Store, monkeypatch: pytest.MonkeyPatch) -> None:
        monkeypatch.setattr("rayflow.storage.remote._SINGLE_PUT_MAX", 12 * 1024 * 1024)
        data = os.urandom(1024) * 1024 * 14
        store.put("large", data)
        assert store.get("large") == data

    def test_a_large_object_that_fails_half_way_leaves_nothing(
        self, store: Store, s3_server: S3Server, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        monkeypatch.setattr("rayflow.storage.remote._SINGLE_PUT_MAX", 12 * 1024 * 1024)
        call, parts = s3fs.S3FileSystem._call_s3, list[int]()

        async def cut_off(self: s3fs.S3FileSystem, method: str, *args: object, **options: object) -> object:
            if method == "upload_part":
                parts.append(1)
                if len(parts) == 2:
                    raise OSError("the cable was cut")
            return await call(self, method, *args, **options)

        data = os.urandom(1024) * 1024 * 14
        store.put("large", b"the old one")
        monkeypatch.setattr(s3fs.S3FileSystem, "_call_s3", cut_off)
        with pytest.raises(StorageError, match="cable was cut"):
            store.put("large", data)
        parts.clear()
        with pytest.raises(StorageError, match="cable was cut"):
            store.put("new", data)
        assert store.list() == [("large", len(b"the old one"))]
        assert isinstance(store, ObjectStore)
        with contextlib.closing(s3_server.client()) as client:
            bucket = store.url.removeprefix("s3://").partition("/")[0]
            assert not client.list_multipart_uploads(Bucket=bucket).get("Uploads"), "what was sent costs nothing"


def test_a_relative_path_means_the_same_in_every_process(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    store = ObjectStore("checkpoints")
    monkeypatch.chdir("/")
    store.put("a", b"x")
    assert (tmp_path / "checkpoints" / "a").read_bytes() == b"x"
    assert ObjectStore(f"file://{tmp_path}/checkpoints").get("a") == b"x"


@pytest.mark.parametrize("url", ["gs://bucket/x", "http://host/x", "abfs://c/x"])
def test_a_place_without_create_if_absent_is_refused(url: str) -> None:
    with pytest.raises(ConfigError, match="only if it is absent"):
        ObjectStore(url)


def test_an_s3_url_needs_a_bucket() -> None:
    with pytest.raises(ConfigError, match="names no bucket"):
        ObjectStore("s3://")


def test_delete_prefix_of_nothing_does_not_delete_everything(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="needs a prefix"):
        ObjectStore(str(tmp_path)).delete_prefix("")


def test_secrets_are_never_shown() -> None:
    store = ObjectStore("s3://bucket/x", {"key": "k", "secret": "hush", "endpoint_url": "http://127.0.0.1:1"})
    assert "hush" not in repr(store)
    assert "hush" not in str(vars(store)["url"])


# ---------------------------------------------------------------------------------------------- what goes wrong, local


def test_a_full_disk_says_so_and_leaves_nothing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    store = ObjectStore(str(tmp_path))
    store.put("chk/a", b"old")

    def full(descriptor: int) -> None:
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    monkeypatch.setattr(os, "fsync", full)
    with pytest.raises(StorageError, match="disk full.*nothing committed is lost.*No space left") as caught:
        store.put("chk/a", b"new")
    with pytest.raises(StorageError, match="disk full"):
        store.put_if_absent("chk/b", b"new")
    assert str(tmp_path) in str(caught.value)
    assert "chk/a" in str(caught.value)
    assert store.get("chk/a") == b"old"
    assert store.list() == [("chk/a", 3)], "no temporary file is left"


def test_a_root_that_is_a_file_is_told(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("x")
    store = ObjectStore(str(tmp_path / "file"))
    with pytest.raises(StorageError, match="is a file"):
        store.put("a", b"x")
    with pytest.raises(StorageError, match="is a file"):
        store.put_if_absent("a", b"x")
    with pytest.raises(StorageError, match="is a file"):
        store.list()


def test_a_writer_killed_in_the_middle_leaves_only_a_temporary(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    class Killed(BaseException):
        pass

    def killed(*_: object) -> None:
        raise Killed

    store = ObjectStore(str(tmp_path))
    with monkeypatch.context() as patch:
        patch.setattr(os, "replace", killed)
        patch.setattr(os, "unlink", killed)  # a dead process does not clean up
        with pytest.raises(Killed):
            store.put("chk-00000001/manifest.json", b"whole")
    assert not store.exists("chk-00000001/manifest.json")
    ((leftover, _),) = store.list()
    assert leftover.startswith("chk-00000001/.")
    assert leftover.endswith(".tmp")
    store.delete(leftover)
    assert list(tmp_path.iterdir()) == []


def test_the_file_is_synced_before_its_name_and_the_folder_after(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    story: list[str] = []
    sync, replace, link = os.fsync, os.replace, os.link

    def spied_sync(descriptor: int) -> None:
        story.append("folder" if os.path.isdir(f"/proc/self/fd/{descriptor}") else "file")
        sync(descriptor)

    def spied_replace(a: str, b: str) -> None:
        story.append("name")
        replace(a, b)

    def spied_link(a: str, b: str) -> None:
        story.append("name")
        link(a, b)

    driver = LocalDriver(str(tmp_path))
    monkeypatch.setattr(os, "fsync", spied_sync)
    monkeypatch.setattr(os, "replace", spied_replace)
    monkeypatch.setattr(os, "link", spied_link)
    driver.put("a", b"x")
    assert story == ["file", "name", "folder"]
    story.clear()
    driver.put_if_absent("new/b", b"x")
    assert story == ["folder", "file", "name", "folder"], "first: the new folder's own name"


def test_a_folder_that_vanishes_under_a_writer_is_made_again(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    store = ObjectStore(str(tmp_path))
    link = os.link
    done: list[int] = []

    def swept_first(a: str, b: str) -> None:
        if not done:
            done.append(1)
            store.delete_prefix("chk/")
        link(a, b)

    monkeypatch.setattr(os, "link", swept_first)
    assert store.put_if_absent("chk/a", b"x") is PutOutcome.CREATED
    assert store.list() == [("chk/a", 1)]


# ------------------------------------------------------------------------------------------------- what goes wrong, S3


def test_a_missing_bucket_is_a_failure_and_not_a_missing_object(moto_server: S3Server) -> None:
    store = ObjectStore("s3://there-is-none/x", moto_server.storage_options)
    for call in (lambda: store.get("a"), lambda: store.put("a", b"x"), lambda: store.list()):
        with pytest.raises(StorageError, match="bucket does not exist"):
            call()


def test_missing_credentials_are_told(monkeypatch: pytest.MonkeyPatch, moto_server: S3Server, tmp_path: Path) -> None:
    for name in ("AWS_ACCESS_KEY_ID", "AWS_SECRET_ACCESS_KEY", "AWS_SESSION_TOKEN", "AWS_PROFILE"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setenv("AWS_EC2_METADATA_DISABLED", "true")
    monkeypatch.setenv("AWS_CONFIG_FILE", str(tmp_path / "none"))
    monkeypatch.setenv("AWS_SHARED_CREDENTIALS_FILE", str(tmp_path / "none"))
    store = ObjectStore("s3://bucket/x", {"endpoint_url": moto_server.endpoint_url})
    with pytest.raises(StorageError, match="no credentials: pass storage_options"):
        store.put("a", b"x")


def test_an_unreachable_server_is_told(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("rayflow.storage.remote.RETRY_DELAYS_S", (0.0,))
    store = ObjectStore("s3://bucket/x", {"key": "k", "secret": "hush", "endpoint_url": "http://127.0.0.1:9"})
    with pytest.raises(StorageError, match="cannot be reached.*endpoint_url") as caught:
        store.put_if_absent("a", b"x")
    assert "hush" not in str(caught.value)


class Flaky:
    """Fails with the given errors, one a call, then answers."""

    def __init__(self, *errors: Exception) -> None:
        self.errors = list(errors)
        self.calls = 0

    def __call__(self) -> str:
        self.calls += 1
        if self.errors:
            raise self.errors.pop(0)
        return "done"


def test_transient_errors_are_tried_again_with_growing_pauses() -> None:
    pauses: list[float] = []
    assert retried(Flaky(), pauses.append) == ("done", False)
    assert retried(Flaky(ConnectionError(), TimeoutError()), pauses.append) == ("done", True)
    assert pauses == list(RETRY_DELAYS_S[:2])


def test_other_errors_are_not_tried_again() -> None:
    flaky = Flaky(PermissionError())
    with pytest.raises(PermissionError):
        retried(flaky, lambda _: None)
    assert flaky.calls == 1


def test_retrying_is_bounded() -> None:
    flaky = Flaky(*[ConnectionError() for _ in range(50)])
    with pytest.raises(ConnectionError):
        retried(flaky, lambda _: None)
    assert flaky.calls == len(RETRY_DELAYS_S) + 1


class LostAnswer(S3Driver):
    """Sends the write, and then the connection breaks; ``foreign``: somebody else was first, unnoticed."""

    foreign = False
    lost = False

    def _call(self, method: str, **arguments: object) -> object:
        if method == "put_object" and not self.lost:
            self.lost = True
            body = b"somebody else's" if self.foreign else arguments["Body"]
            super()._call(method, **{**arguments, "Body": body})
            raise ConnectionError("the answer got lost")
        return super()._call(method, **arguments)


@pytest.mark.parametrize(("foreign", "expected"), [(False, PutOutcome.CREATED), (True, PutOutcome.EXISTS)])
def test_an_ambiguous_create_is_resolved_by_reading_back(
    moto_server: S3Server, monkeypatch: pytest.MonkeyPatch, foreign: bool, expected: PutOutcome
) -> None:
    monkeypatch.setattr("rayflow.storage.remote.RETRY_DELAYS_S", (0.0,))
    driver = LostAnswer(moto_server.bucket().removeprefix("s3://"), moto_server.storage_options)
    driver.foreign = foreign
    assert driver.put_if_absent("a", b"mine") is expected


class Ignorant(S3Driver):
    """A server that takes conditional writes and knows no condition, as some do."""

    def _call(self, method: str, **arguments: object) -> object:
        arguments.pop("IfNoneMatch", None)
        return super()._call(method, **arguments)


def test_a_server_that_ignores_conditions_is_found_out(moto_server: S3Server, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("rayflow.storage.filesystem.S3Driver", Ignorant)
    store = ObjectStore(moto_server.bucket(), moto_server.storage_options)
    with pytest.raises(StorageError, match="ignores If-None-Match.*honours conditional writes") as caught:
        store.put_if_absent("coordinators/00000001.claim.json", b"x")
    assert caught.value.__cause__ is not None, "so that the job ends at once"
