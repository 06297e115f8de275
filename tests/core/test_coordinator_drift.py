"""What the coordinator tells sources with a maximum drift: the slowest, in this attempt only (C6)."""

from __future__ import annotations

from dataclasses import replace

from rayflow.core.events import SubtaskDied
from rayflow.core.ids import MAX_WATERMARK
from rayflow.core.messages import InputEnded, SlowestSource, SourceProgress
from rayflow.core.roster import Heard
from tests.core.desk import MIDDLE_0, SETTINGS, SOURCE_0, SOURCE_1, Desk, commands
from tests.core.fakes import small_topology

BOTH = (SOURCE_0, SOURCE_1)


def desk() -> Desk:
    found = Desk(SETTINGS, replace(small_topology(), aligned=frozenset({"source"})))
    found.start()
    found.to_running()
    return found


def told(slowest: int, *subtasks: object) -> dict[object, SlowestSource]:
    return {subtask: SlowestSource(slowest) for subtask in subtasks}


def test_all_sources_are_told_the_slowest_when_it_has_changed() -> None:
    d = desk()
    assert commands(d.report(SOURCE_0, SourceProgress(10, False)), SlowestSource) == {}
    assert commands(d.report(SOURCE_1, SourceProgress(4, False)), SlowestSource) == told(4, *BOTH)
    assert commands(d.report(SOURCE_0, SourceProgress(11, False)), SlowestSource) == {}
    assert commands(d.report(SOURCE_1, SourceProgress(4, True)), SlowestSource) == told(11, *BOTH)
    assert commands(d.report(SOURCE_1, SourceProgress(5, False)), SlowestSource) == told(5, *BOTH)


def test_one_that_has_ended_is_waited_for_by_nobody() -> None:
    d = desk()
    d.report(SOURCE_0, SourceProgress(10, False))
    assert commands(d.report(SOURCE_1, InputEnded()), SlowestSource) == told(10, SOURCE_0)
    assert commands(d.report(SOURCE_0, InputEnded()), SlowestSource) == {}


def test_a_new_attempt_knows_nothing_of_the_old_one() -> None:
    d = desk()
    d.report(SOURCE_0, SourceProgress(10, False))
    d.report(SOURCE_1, SourceProgress(20, False))
    d.tell(SubtaskDied(SOURCE_0, 1, "gone"))
    d.wait(5.0)
    d.recovered()
    d.ready_to_running()
    late = d.report(SOURCE_1, SourceProgress(40, False), attempt=1)
    assert commands(late, SlowestSource) == {}
    assert d.heard("SourceProgress", Heard.STALE) == 1
    assert commands(d.report(SOURCE_0, SourceProgress(3, False)), SlowestSource) == {}, "the other has said nothing yet"
    assert commands(d.report(SOURCE_1, SourceProgress(7, False)), SlowestSource) == told(3, *BOTH)


def test_progress_of_others_is_unknown() -> None:
    d = desk()
    assert commands(d.report(MIDDLE_0, SourceProgress(1, False)), SlowestSource) == {}
    assert d.heard("SourceProgress", Heard.UNKNOWN) == 1
    plain = Desk()
    plain.start()
    plain.to_running()
    plain.report(SOURCE_0, SourceProgress(MAX_WATERMARK, False))
    assert plain.heard("SourceProgress", Heard.UNKNOWN) == 1
