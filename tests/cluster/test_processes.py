"""Why a process is gone, in words; without a cluster. The texts are those of Ray 2.60."""

from __future__ import annotations

from ray.exceptions import OutOfMemoryError, RayActorError, RayTaskError

from rayflow.cluster.processes import reason_of, uncaught

KILLED = """The actor died unexpectedly before finishing this task.
\tclass_name: SubtaskProcess
\tpid: 17130
The actor is dead because its worker process has died. Worker exit type: SYSTEM_ERROR Worker exit detail: Worker \
unexpectedly exits with a connection error code 2. End of file. Some common causes include: (1) the process was"""

CREATION = """The actor died because of an error raised in its creation task, \x1b[36mray::Sub.__init__()\x1b[39m
  File "mine.py", line 88, in __setstate__
ImportError: no module named 'mine'"""


def test_a_killed_process_in_one_line_without_the_guesses() -> None:
    error = RayActorError(error_msg=KILLED)
    assert not uncaught(error)
    assert reason_of(error) == (
        "worker process has died. Worker exit type: SYSTEM_ERROR Worker exit detail: Worker unexpectedly exits with a "
        "connection error code 2. End of file."
    )


def test_a_process_that_could_not_start_with_its_story_behind_it() -> None:
    error = RayActorError(error_msg=CREATION, actor_init_failed=True)
    assert uncaught(error)
    first, *story = reason_of(error).splitlines()
    assert first == "it raised ImportError: no module named 'mine'"
    assert any("in __setstate__" in line for line in story)
    assert "\x1b" not in reason_of(error)


def test_a_loop_that_raised_is_told_like_one_that_could_not_start() -> None:
    error = RayTaskError("run", "Traceback ...\n  File ...\nProtocolError: C6", ValueError())
    assert uncaught(error)
    assert reason_of(error).splitlines()[0] == "it raised ProtocolError: C6"


def test_words_that_are_not_known_are_kept() -> None:
    assert reason_of(RayActorError(error_msg="gone\nfor good")) == "gone for good"
    assert not uncaught(None)


def test_a_process_that_ray_killed_for_its_memory_has_died() -> None:
    error = OutOfMemoryError("Task was killed due to the node running low on memory.")
    assert not uncaught(error)
    assert "low on memory" in reason_of(error)
