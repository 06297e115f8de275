"""What a subtask tells others of event time: its watermark, that it is idle, and how far its source has got.

W1  a watermark that was sent is never followed by a lower one.
W2  `Idle` lies behind all output, and a `Watermark` takes it back before the next row goes out; in between no watermark
    is sent, because it would say that the channel is back.

Watermarks go out on the clock, and at once when those of the inputs have advanced: never with every batch.
"""

from __future__ import annotations

from collections.abc import Callable

from rayflow.core.ids import MAX_WATERMARK, MIN_WATERMARK
from rayflow.core.messages import Idle, SourceProgress, Watermark
from rayflow.core.subtask import SubtaskMachine
from rayflow.runtime.chain import ChainRunner
from rayflow.runtime.emitter import Emitter
from rayflow.runtime.source import SourceRunner


class EventTimeSpeaker:
    """Belongs to one attempt of one subtask."""

    def __init__(
        self,
        machine: SubtaskMachine,
        chain: ChainRunner,
        emitter: Emitter,
        source: SourceRunner | None,
        report: Callable[[SourceProgress], None],
    ) -> None:
        self._machine = machine
        self._chain = chain
        self._emitter = emitter
        self._source = source
        self._report = report
        self._sent = MIN_WATERMARK
        self._idle = False
        """Everybody behind was told that nothing comes from here for now."""
        self._progress = SourceProgress(MIN_WATERMARK, False)
        """What the coordinator was told last; it begins with this."""

    def advance(self, time: int) -> None:
        """The inputs have got to ``time``: the operators emit what is due, then the watermark goes on (W1)."""
        self.be_active()
        self._forward(self._chain.advance(time))

    def on_clock(self) -> None:
        """Say what has changed. Sources and operators that take event time from rows are heard only here."""
        source = self._source
        upstream = self._machine.input_watermark if source is None else source.watermark
        if upstream < MAX_WATERMARK:
            self._forward(self._chain.advance(upstream))
            self._say_whether_idle()
        if source is not None and source.aligned:
            progress = SourceProgress(source.watermark, source.idle)
            if progress != self._progress:
                self._progress = progress
                self._report(progress)

    def be_active(self) -> None:
        """Rows come, or may: those behind wait for this subtask again."""
        if self._idle:
            self._idle = False
            self._emitter.broadcast(Watermark(self._sent))

    def _say_whether_idle(self) -> None:
        if self._machine.output_blocked or self._machine.has_input:
            return  # something waits, so that it was quiet means nothing
        inputs_idle = self._machine.inputs_idle if self._source is None else self._source.idle
        if not self._chain.idle(inputs_idle):
            self.be_active()
        elif not self._idle:
            self._idle = True
            self._emitter.broadcast(Idle())

    def _forward(self, time: int) -> None:
        # End of input says the same as the maximum, and says it last.
        if self._sent < time < MAX_WATERMARK and not self._idle:
            self._sent = time
            self._emitter.broadcast(Watermark(time))
