"""One subtask as a Ray actor: `run_subtask` on the actor's own thread, and the world around it (`SubtaskHost`).

The actor has two threads: one is in `run` from the beginning to the end, the other takes commands. The reference that
`run` answered with is how the coordinator learns of a death: Ray fails it as soon as the process is gone (measured:
12 ms after a SIGKILL), and nobody polls. No concurrency groups (they stall), no retries of calls (they would overtake).

A process does not know which subtask it will be before `run`: so a spare one can wait, warm, for the next death.
"""

from __future__ import annotations

import os
import time
import traceback
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import pyarrow as pa
import ray

from rayflow.cluster.background import Background
from rayflow.cluster.exchange_client import ExchangeClient
from rayflow.cluster.exchange_server import ExchangeServer
from rayflow.cluster.inbox import Inbox
from rayflow.cluster.package import unpack
from rayflow.core.ids import Attempt, ChannelId, SubtaskId
from rayflow.core.messages import CommandEnvelope, Element, ReportEnvelope
from rayflow.runtime.assembly import JobSpec
from rayflow.runtime.ports import ChannelBroken, CommandArrived, CreditArrived, ElementArrived, SubtaskEvent
from rayflow.runtime.subtask_loop import SubtaskRuntime, run_subtask

EXCHANGE_CLOSE_S = 0.2
"""The process is about to be killed: nobody waits long for a peer that does not end its stream."""


class RayHost:
    """The `SubtaskHost` of a subtask on Ray. All but the events of other threads happens on the loop thread."""

    def __init__(
        self, spec: JobSpec, token: str, inbox: Inbox[SubtaskEvent], report: Callable[[ReportEnvelope], None]
    ) -> None:
        self._job = f"{spec.plan.name}/{spec.submission}"
        self._token = token
        self._inbox = inbox
        self._report = report
        self._client: ExchangeClient | None = None
        self._broken: BaseException | None = None
        self._background: Background[SubtaskEvent] = Background("rayflow-uploader", inbox.put, self._fail)
        self._server = ExchangeServer(
            ray.util.get_node_ip_address(),
            token,
            lambda attempt, channel, element: inbox.put(ElementArrived(attempt, channel, element)),
            window_bytes=spec.config.inflight_bytes,
            on_broken=lambda attempt, channel, error: inbox.put(ChannelBroken(attempt, channel, str(error))),
        )
        self._pid = os.getpid()
        self._node = str(ray.get_runtime_context().get_node_id())

    @property
    def address(self) -> str:
        return self._server.address

    @property
    def pid(self) -> int:
        return self._pid

    @property
    def node(self) -> str:
        return self._node

    def now(self) -> float:
        return time.monotonic()

    def wall_time(self) -> float:
        return time.time()

    def accept(self, attempt: Attempt, channels: Sequence[ChannelId]) -> None:
        self._server.accept(self._job, attempt, channels)

    def connect(self, attempt: Attempt, addresses: Mapping[ChannelId, str]) -> None:
        inbox = self._inbox
        self._client = ExchangeClient(
            self._token,
            self._job,
            attempt,
            on_credit=lambda channel, taken: inbox.put(CreditArrived(attempt, channel, taken)),
            on_broken=lambda channel, error: inbox.put(ChannelBroken(attempt, channel, str(error))),
        )
        for channel, address in addresses.items():
            self._client.connect(channel, address)

    def disconnect(self) -> None:
        if self._client is not None:
            self._client.close()
            self._client = None

    def send(self, channel: ChannelId, element: Element) -> None:
        assert self._client is not None, "nothing is sent before Launch"
        self._client.send(channel, element)

    def return_credit(self, channel: ChannelId, nbytes: int) -> None:
        self._server.return_credit(channel, nbytes)

    def report(self, envelope: ReportEnvelope) -> None:
        self._report(envelope)

    def background(self, task: Callable[[], SubtaskEvent]) -> None:
        self._background.put(task)

    def close(self) -> None:
        self.disconnect()
        self._server.close(EXCHANGE_CLOSE_S)

    def _fail(self, error: BaseException) -> None:
        """A task of the loop lets its own errors come as events, so this is a bug; the subtask must not hang on it."""
        traceback.print_exception(error)
        os._exit(70)


class SubtaskProcess:
    """The actor class. ``life`` names the life of the coordinator it belongs to: a later one takes no reports of it."""

    def __init__(self, life: str, coordinator: Any, *slices: bytes) -> None:
        # One core a subtask is what the plan counts on; Arrow's own pools would fight with the other subtasks.
        pa.set_cpu_count(1)
        pa.set_io_thread_count(2)
        self._inbox: Inbox[SubtaskEvent] = Inbox()
        self._coordinator = coordinator
        self._life = life
        package = unpack(slices)
        self._spec = package.spec()
        _, self._snapshots, _ = package.open_stores()
        self._host = RayHost(self._spec, package.token, self._inbox, self._send_report)

    def warm(self) -> int:
        """Answers when the process is up: its pid."""
        return os.getpid()

    def run(self, subtask: SubtaskId) -> None:
        """Be this subtask until it is shut down. Raises what the loop itself raises, which is a bug in it."""
        try:
            run_subtask(SubtaskRuntime(subtask, self._spec, self._host, self._snapshots), self._inbox, time.monotonic)
        finally:
            self._host.close()

    def command(self, envelope: CommandEnvelope) -> None:
        self._inbox.put(CommandArrived(envelope))

    def _send_report(self, envelope: ReportEnvelope) -> None:
        self._coordinator.report.remote(self._life, envelope)


SubtaskActor: Any = ray.remote(max_restarts=0, max_task_retries=0, max_concurrency=2)(SubtaskProcess)
