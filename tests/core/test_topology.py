"""What the core knows of a plan, and how a manifest fits it."""

from __future__ import annotations

from dataclasses import replace

import pytest

from rayflow.core.ids import ChannelId, SubtaskId
from rayflow.core.keygroups import key_group_range
from rayflow.core.manifest import StateHandle, SubtaskSnapshot
from rayflow.core.restore import states_for
from rayflow.core.topology import Topology
from rayflow.errors import ConfigError, ProtocolError
from tests.core.desk import LAST, MIDDLE_0, SOURCE_0, SOURCE_1, SOURCES, manifest_of
from tests.core.fakes import small_topology


def test_neighbours() -> None:
    t = small_topology()
    assert t.roots == tuple(SOURCES)
    assert [c.source for c in t.inputs_of(MIDDLE_0)] == SOURCES
    assert [c.target for c in t.outputs_of(MIDDLE_0)] == [LAST]
    assert t.inputs_of(SOURCE_0) == ()
    assert t.outputs_of(LAST) == ()
    assert t.chain_of("count") == "middle"
    assert t.chain_of("gone") is None
    assert t.is_source(SOURCE_1)
    assert not t.is_source(LAST)


def test_a_topology_that_contradicts_itself_is_refused() -> None:
    t = small_topology()
    with pytest.raises(ProtocolError, match="parallelism says"):
        replace(t, subtasks=t.subtasks[1:])
    with pytest.raises(ProtocolError, match="not in the topology"):
        replace(t, channels=(*t.channels, ChannelId(9, LAST, SubtaskId("gone", 0))))
    with pytest.raises(ProtocolError, match="without input"):
        replace(t, sources=frozenset())
    with pytest.raises(ConfigError, match="max_parallelism"):
        replace(t, max_parallelism=1)


def rescaled(old: int, new: int) -> tuple[Topology, dict[SubtaskId, tuple[StateHandle, ...]]]:
    topology = small_topology(1, new, 1)
    handles = tuple(StateHandle("count", i, old, "runs", 0, keyed=True) for i in range(old))
    manifest = manifest_of(1, topology=topology, subtasks=(SubtaskSnapshot(MIDDLE_0, states=handles),))
    return topology, states_for(manifest, topology)


@pytest.mark.parametrize("old", range(1, 17))
@pytest.mark.parametrize("new", range(1, 17))
def test_every_group_finds_its_new_owner(old: int, new: int) -> None:
    """K3: a subtask is given the state of exactly the groups it owns, or more, never less."""
    topology, states = rescaled(old, new)
    for index in range(new):
        covered = {g for h in states[SubtaskId("middle", index)] for g in key_group_range(h.subtask, old, 16)}
        own = set(key_group_range(index, new, topology.max_parallelism))
        assert own <= covered
        for handle in states[SubtaskId("middle", index)]:
            assert own & set(key_group_range(handle.subtask, old, 16)), "a handle that holds nothing of its own"
