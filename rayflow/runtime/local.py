"""The local runtime: the subtasks of a job in this process, without Ray, in a fixed order and with virtual time.

For tests, debugging and notebooks (``flow.run(local=True)``, ``stream.show()``). A user's exception comes out with
its own traceback; nothing depends on the speed of the machine.
"""

from __future__ import annotations

import time
from collections.abc import Callable

from rayflow.errors import ProtocolError
from rayflow.runtime.inprocess import World

STEP_S = 0.001
"""Virtual time that one round takes; checkpoint intervals are measured in it."""
IDLE_SLEEP_S = 0.005


class LocalDriver:
    """Runs a `World` to its end, going round the subtasks in plan order."""

    def __init__(self, world: World, *, on_round: Callable[[World], None] | None = None) -> None:
        self._world = world
        self._on_round = on_round

    def run(self) -> None:
        """Returns when the job has ended; its outcome is in ``world.coordinator.outcome``."""
        world = self._world
        world.coordinator.start()
        while not world.coordinator.ended:
            if self._round():
                world.clock.advance_to(world.clock.now + STEP_S)
            else:
                self._idle()
            if self._on_round is not None:
                self._on_round(world)
        for subtask in list(world.slots):
            world.retire_subtask(subtask)

    def _round(self) -> bool:
        world, progressed = self._world, False
        while world.coordinator_inbox or world.coordinator_tasks or world.coordinator_tick():
            progressed = True
            if world.coordinator_inbox:
                world.coordinator_deliver_one()
            elif world.coordinator_tasks:
                world.coordinator_run_task()
        for subtask in sorted(world.slots):
            slot = world.slots[subtask]
            while slot.inbox or slot.tasks:
                progressed = True
                if slot.inbox:
                    slot.deliver_one()
                else:
                    slot.run_task()
            progressed = progressed or slot.runtime.busy
            slot.work()
        return progressed

    def _idle(self) -> None:
        """Nothing to do now: go on to the next deadline; wait a little in case a source waits for the real world."""
        deadline = self._world.next_deadline()
        if deadline is None:
            if not self._world.coordinator_inbox:
                raise ProtocolError("the local runtime has nothing to do although the job has not ended")
            return
        looks = bool(self._world.coordinator.machine.topology.discovering)
        if looks or any(slot.runtime.polling for slot in self._world.slots.values()):
            time.sleep(IDLE_SLEEP_S)
        self._world.clock.advance_to(deadline)
