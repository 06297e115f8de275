"""The manifest's codec: exact, deterministic, and never half understood (rule C5)."""

from __future__ import annotations

import json

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from rayflow.core.ids import Attempt, CheckpointId, SubtaskId
from rayflow.core.manifest import (
    Committable,
    FileRef,
    Manifest,
    SnapshotStats,
    SplitState,
    StateHandle,
    SubtaskSnapshot,
    decode,
    encode,
)
from rayflow.core.seen import SeenSplits, digest_of
from rayflow.errors import CorruptCheckpointError

# Surrogates cannot be encoded and never come from real names.
TEXT = st.text(st.characters(exclude_categories=["Cs"]), max_size=8)
COUNT = st.integers(0, 2**63 - 1)
SECONDS = st.floats(0, 1e12)
VALUES = st.recursive(
    st.none() | st.booleans() | st.integers(-(2**63), 2**63) | st.floats(allow_nan=False, allow_infinity=False) | TEXT,
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(TEXT, inner, max_size=3),
    max_leaves=5,
)
HANDLES = st.builds(
    StateHandle,
    operator=TEXT,
    subtask=COUNT,
    parallelism=COUNT,
    name=TEXT,
    rows=COUNT,
    keyed=st.booleans(),
    file=st.none() | st.builds(FileRef, TEXT, COUNT, TEXT),
    inline=st.none() | TEXT,
    group_rows=st.lists(st.tuples(COUNT, COUNT), max_size=3).map(tuple),
    meta=VALUES,
)
SPLITS = st.builds(SplitState, TEXT, TEXT, COUNT, VALUES, VALUES)
SNAPSHOTS = st.builds(
    SubtaskSnapshot,
    subtask=st.builds(SubtaskId, TEXT, COUNT),
    states=st.lists(HANDLES, max_size=2).map(tuple),
    splits=st.lists(SPLITS, max_size=2).map(tuple),
    committables=st.lists(st.builds(Committable, TEXT, VALUES), max_size=2).map(tuple),
    stats=st.builds(SnapshotStats, SECONDS, SECONDS, SECONDS, SECONDS, COUNT, COUNT),
)
SEEN = st.builds(SeenSplits, source=TEXT, digests=st.lists(st.binary(min_size=10, max_size=10)).map(b"".join))
MANIFESTS = st.builds(
    Manifest,
    job=TEXT,
    checkpoint=COUNT.map(CheckpointId),
    kind=TEXT,
    attempt=COUNT.map(Attempt),
    incarnation=COUNT,
    run_id=TEXT,
    created_at=SECONDS,
    max_parallelism=COUNT,
    parallelism=st.dictionaries(TEXT, COUNT, max_size=3),
    operators=st.dictionaries(TEXT, TEXT, max_size=3),
    subtasks=st.lists(SNAPSHOTS, max_size=3).map(tuple),
    pending_splits=st.lists(SPLITS, max_size=2).map(tuple),
    seen_splits=st.lists(SEEN, max_size=2).map(tuple),
)

SAMPLE = Manifest(
    seen_splits=(SeenSplits("source", digest_of("s0") + digest_of("s1")),),
    job="delays",
    checkpoint=CheckpointId(7),
    kind="periodic",
    attempt=Attempt(2),
    incarnation=1,
    run_id="r",
    created_at=1.5,
    max_parallelism=128,
    parallelism={"source": 2},
    operators={"count": "zählt"},
    subtasks=(
        SubtaskSnapshot(
            SubtaskId("source", 0),
            states=(
                StateHandle("count", 0, 2, "runs", 3, True, FileRef("chk-7/a.arrow", 10, "sha256:00"), None, ((1, 0),)),
            ),
            splits=(SplitState("source", "s0", 0, {"path": "a"}, 3, newest_us=-7),),
            committables=(Committable("sink", {"file": "part-0"}),),
        ),
    ),
)


@settings(max_examples=200, deadline=None)
@given(MANIFESTS)
def test_decode_is_the_inverse_of_encode(manifest: Manifest) -> None:
    data = encode(manifest)
    again = decode(data, path="m")
    assert again == manifest
    assert encode(again) == data


def test_what_a_manifest_names() -> None:
    assert [f.path for f in SAMPLE.files()] == ["chk-7/a.arrow"]
    assert SAMPLE.committables("sink") == ({"file": "part-0"},)
    assert SAMPLE.committables("other") == ()


def test_the_same_manifest_gives_the_same_bytes() -> None:
    """Member order of the maps does not show."""
    one = encode(SAMPLE)
    turned = Manifest(**{name: getattr(SAMPLE, name) for name in reversed(Manifest.__slots__)})
    assert encode(turned) == one
    assert one.endswith(b"\n")
    assert json.loads(one)["checkpoint"] == 7


def test_torn_at_any_byte_it_is_refused() -> None:
    data = encode(SAMPLE)
    for length in range(len(data) - 1):  # without the last newline it is whole
        with pytest.raises(CorruptCheckpointError, match="m.json"):
            decode(data[:length], path="m.json")


@pytest.mark.parametrize("bit", [0x01, 0x80, 0x20])
def test_no_flipped_bit_changes_what_is_read(bit: int) -> None:
    """Refused, or (in white space between members) read as what was written."""
    data = encode(SAMPLE)
    for place in range(len(data)):
        flipped = bytearray(data)
        flipped[place] ^= bit
        try:
            found = decode(bytes(flipped), path="m.json")
        except CorruptCheckpointError:
            continue
        assert found == SAMPLE, f"byte {place}"


def test_a_newer_version_is_refused_by_name() -> None:
    body = json.loads(encode(SAMPLE))
    body["version"] = 4
    with pytest.raises(CorruptCheckpointError, match="version 4.*upgrade rayflow"):
        decode(json.dumps(body).encode(), path="m.json")


@pytest.mark.parametrize("data", [b"", b"[]", b"null", b"7", b"{}", b'{"version": 1}', b"\xff\xfe", b"\x00" * 100])
def test_what_is_no_manifest_is_refused(data: bytes) -> None:
    with pytest.raises(CorruptCheckpointError, match="m.json"):
        decode(data, path="m.json")


@pytest.mark.parametrize("member", ["job", "subtasks", "pending_splits", "max_parallelism"])
def test_a_lacking_member_is_named(member: str) -> None:
    from rayflow.core.manifest import _digest

    body = json.loads(encode(SAMPLE))
    del body["sha256"], body[member]
    body["sha256"] = _digest(body)
    with pytest.raises(CorruptCheckpointError, match=member):
        decode(json.dumps(body).encode(), path="m.json")
