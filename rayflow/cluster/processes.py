"""The processes of a job's subtasks: started, commanded, stopped, and their deaths told. Used by the coordinator actor.

They are owned by the coordinator's process and not detached: Ray ends them when it dies, and a new coordinator starts
its own. Deaths are pushed by Ray as the failure of the reference that `run` answered with; nobody polls.
"""

from __future__ import annotations

import contextlib
import os
import re
import signal
from collections.abc import Callable, Mapping
from concurrent.futures import Future
from dataclasses import dataclass
from typing import Any, Final

import ray

from rayflow.cluster.subtask_actor import SubtaskActor
from rayflow.core.ids import SubtaskId
from rayflow.core.messages import CommandEnvelope, Shutdown

CLOSE_GRACE_S: Final = 2.0
"""A subtask that was told to shut down has this long to close what user code holds open; then it is killed."""


@dataclass(frozen=True, slots=True)
class ProcessEnded:
    """News from Ray; ``error`` None: its loop returned."""

    subtask: SubtaskId
    incarnation: int
    error: BaseException | None


@dataclass(slots=True)
class _Process:
    actor: Any
    incarnation: int
    run: Any
    """Reference of the long call. Held, or Ray would not tell its end."""
    told_to_close: bool = False


class Processes:
    """All methods are called on the coordinator's loop thread.

    ``tell`` is called on a thread of Ray's, on which no call to Ray may be made: that would wait for itself.
    It enqueues, and the loop gives the news back to `ended`.
    """

    def __init__(
        self,
        life: str,
        coordinator: Any,
        slices: tuple[bytes, ...],
        cpus: Mapping[str, float],
        tell: Callable[[ProcessEnded], None],
    ) -> None:
        self._life = life
        self._coordinator = coordinator
        self._slices = [ray.put(piece) for piece in slices]
        self._cpus = cpus
        self._tell = tell
        self._running: dict[SubtaskId, _Process] = {}
        self._spare: tuple[Any, Any] | None = None
        """A process that is no subtask yet, and the reference that answers when it is up."""
        self._closing: dict[tuple[SubtaskId, int], _Process] = {}

    def start(self, subtask: SubtaskId, incarnation: int) -> None:
        """Commands may be sent at once: Ray keeps them until the process is up."""
        actor = self._take_spare() or self._new(self._cpus[subtask.chain])
        process = _Process(actor, incarnation, actor.run.remote(subtask))
        self._running[subtask] = process
        tell = self._tell

        def done(run: Future[Any]) -> None:
            tell(ProcessEnded(subtask, incarnation, run.exception()))

        process.run.future().add_done_callback(done)

    def keep_spare(self) -> None:
        """Have a process ready for the next death: starting one takes more than a second, all else of a recovery less
        than a tenth. It takes no CPU of the plan's until it is needed."""
        if self._spare is None:
            actor = self._new(0)
            self._spare = actor, actor.warm.remote()

    def _take_spare(self) -> Any:
        """The spare process if it is up; None otherwise."""
        if self._spare is None or not ray.wait([self._spare[1]], timeout=0)[0]:
            return None
        (actor, warm), self._spare = self._spare, None
        try:
            ray.get(warm)
        except ray.exceptions.RayError:
            return None  # it died, or could not be started
        return actor

    def _new(self, cpus: float) -> Any:
        return SubtaskActor.options(num_cpus=cpus).remote(self._life, self._coordinator, *self._slices)

    def send(self, envelope: CommandEnvelope) -> None:
        process = self._running.get(envelope.subtask)
        if process is not None:
            process.told_to_close = process.told_to_close or isinstance(envelope.command, Shutdown)
            call = process.actor.command.remote(envelope)
            tell, incarnation = self._tell, process.incarnation

            def done(call: Future[Any]) -> None:
                error = call.exception()
                if error is not None:
                    tell(ProcessEnded(envelope.subtask, incarnation, error))

            # A command that did not arrive leaves a gap that its receiver would wait behind for ever.
            call.future().add_done_callback(done)

    def stop(self, subtask: SubtaskId, incarnation: int, *, pid: int | None) -> None:
        """Kill the process; one that was told to shut down is given `CLOSE_GRACE_S` to do so.

        ``pid`` on this node, if it is known: Ray asks a process to die and waits 5 s (measured) for one that is
        stopped, and holds its CPU so long.
        """
        process = self._running.get(subtask)
        if process is None or process.incarnation != incarnation:
            return
        del self._running[subtask]
        if process.told_to_close:
            self._closing[subtask, incarnation] = process
            return
        _kill(process.actor)
        if pid:
            with contextlib.suppress(ProcessLookupError):
                os.kill(pid, signal.SIGKILL)

    @property
    def closing(self) -> bool:
        """Whether some process was told to shut down and has not yet."""
        return bool(self._closing)

    def kill_all(self) -> None:
        """Whatever is left. Afterwards there is no process of the job."""
        for process in [*self._closing.values(), *self._running.values()]:
            _kill(process.actor)
        if self._spare is not None:
            _kill(self._spare[0])
        self._spare = None
        self._closing.clear()
        self._running.clear()

    def ended(self, news: ProcessEnded) -> str | None:
        """Why the process is gone, when that is news to the protocol: not when it was to be stopped."""
        closing = self._closing.pop((news.subtask, news.incarnation), None)
        if closing is not None:
            _kill(closing.actor)
            return None
        process = self._running.get(news.subtask)
        if process is None or process.incarnation != news.incarnation:
            return None
        del self._running[news.subtask]
        if not isinstance(news.error, ray.exceptions.ActorDiedError):
            # The loop is over, or the process cannot be reached (its node is lost, or only the way there) and may live:
            # its subtask gets another one, so it must not hold its CPU.
            _kill(process.actor)
        return "its loop returned" if news.error is None else reason_of(news.error)


def reason_of(error: BaseException) -> str:
    """Why the process is gone: in one line, and behind it the traceback if it was an exception that nobody caught."""
    text = re.sub(r"\x1b\[[0-9;]*m", "", str(error)).strip()
    if uncaught(error):
        return f"it raised {text.splitlines()[-1].strip()}\n{text}"
    found = re.search(r"The actor (?:is dead|died) because (?:its )?(.+?)(?: Some common causes|\n|$)", text)
    return found[1].strip() if found else " ".join(text.split())[:300]


def uncaught(error: Any) -> bool:
    """Whether the process did not die but raised, in its constructor or in its loop: it would do so again."""
    if isinstance(error, ray.exceptions.RayActorError):
        return bool(error.actor_init_failed)
    return isinstance(error, ray.exceptions.RayTaskError)  # not OutOfMemoryError: Ray has killed the process


def _kill(actor: Any) -> None:
    with contextlib.suppress(Exception):  # gone already, or Ray is going down: both are what is wanted
        ray.kill(actor)
