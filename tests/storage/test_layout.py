"""Every path has one builder; what users name cannot collide or leave the directory."""

from __future__ import annotations

from hypothesis import example, given, settings
from hypothesis import strategies as st

from rayflow.core.ids import CheckpointId
from rayflow.storage import layout
from rayflow.storage.layout import Decision
from rayflow.storage.store import check_path

TEXT = st.text(max_size=150)


def test_the_documented_paths() -> None:
    assert layout.manifest_path(42) == "chk-00000042/manifest.json"
    assert layout.pack_path(42, "window", 3) == "chk-00000042/window-3.arrows"
    assert layout.piece_path(42, "window", 3, "runs", 1) == "shared/00000042-window-3.runs-1.arrow"
    assert layout.immutable_path(42, "window", 3, "1-ab.c") == "shared/00000042-window-3.1-ab%2Ec.sst"
    assert layout.released_path(42) == "chk-00000042/released"
    assert layout.claim_path(3) == "coordinators/00000003.claim.json"
    assert (
        layout.decision_path(Decision(3, CheckpointId(42), 101, 201))
        == "coordinators/00000003.restored-00000042.ids-00000101-00000201.json"
    )
    assert layout.job_root("s3://bucket/pre/", "delays v1.2") == "s3://bucket/pre/delays%20v1.2"
    assert layout.job_root("memory://", "job") == "memory://job"
    assert layout.job_root("/", "..") == "/%2E."


@given(TEXT, TEXT)
@example(".", "%2E")
@example("", "%")
@example("a" * 101, "a" * 102)
@example("ü", "%C3%BC")
@settings(max_examples=300, deadline=None)
def test_quoting_is_injective_and_safe(one: str, other: str) -> None:
    assert (layout.quote(one) == layout.quote(other)) == (one == other)
    assert check_path(layout.quote(one)) == layout.quote(one)
    assert "/" not in layout.quote(one)
    assert len(layout.quote(one)) <= 100
    assert layout.unquote(layout.quote(one)) in (one, None)


@given(TEXT, st.integers(0, 99), TEXT, TEXT, st.integers(0, 99), TEXT)
@example("a-1", 2, "b", "a", 12, "b")
@example("a.0", 0, "b", "a", 0, "0.b")
@settings(max_examples=300, deadline=None)
def test_state_paths_are_injective(a: str, i: int, x: str, b: str, j: int, y: str) -> None:
    same = (a, i, x) == (b, j, y)
    assert (layout.piece_path(1, a, i, x, 0) == layout.piece_path(1, b, j, y, 0)) == same
    assert (layout.immutable_path(1, a, i, x) == layout.immutable_path(1, b, j, y)) == same
    assert (layout.pack_path(1, a, i) == layout.pack_path(1, b, j)) == ((a, i) == (b, j))
    assert layout.parse_checkpoint(check_path(layout.pack_path(1, a, i))) == 1
    assert layout.parse_manifest(layout.pack_path(1, a, i)) is None
    for path in (layout.piece_path(1, a, i, x, 0), layout.immutable_path(1, a, i, x)):
        assert layout.parse_shared(check_path(path)) == 1
        assert path.startswith(layout.shared_prefix(1))
        assert len(path) <= 255
    assert layout.parse_immutable(layout.immutable_path(1, a, i, x)) in (x, None)
    assert layout.parse_immutable(layout.piece_path(1, a, i, x, 0)) is None


@given(st.integers(1, 10**10))
@settings(deadline=None)
def test_parsers_are_the_inverse(n: int) -> None:
    assert layout.parse_manifest(layout.manifest_path(n)) == n
    assert layout.parse_checkpoint(layout.manifest_path(n)) == n
    assert layout.parse_claim(layout.claim_path(n)) == n
    for restored in (None, CheckpointId(n)):
        decision = Decision(n, restored, n, n + 100)
        assert layout.parse_decision(layout.decision_path(decision)) == decision


def test_foreign_paths_are_nobodys() -> None:
    for path in ("chk-1/manifest.json", "chk-00000001/x/manifest.json", "savepoints/chk-00000001/manifest.json"):
        assert layout.parse_manifest(path) is None
    assert layout.parse_claim("coordinators/.abc.tmp") is None
    assert layout.parse_decision("coordinators/00000001.claim.json") is None
