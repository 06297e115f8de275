"""`python -m tests.simulation --seeds 200 [--start 0] [--jobs 2]`, or `--seed N` to replay one with its trace.

Without `--space` half of the seeds draw flows of the protocol and half those of event time.
"""

from __future__ import annotations

import argparse
import sys
import time
from collections import Counter
from itertools import chain

from tests.simulation import events
from tests.simulation.run import run_seed, sweep
from tests.simulation.scenario import EVENTS, PROTOCOL


def main(arguments: list[str]) -> int:
    parser = argparse.ArgumentParser(prog="python -m tests.simulation", description=__doc__)
    parser.add_argument("--seeds", type=int, default=200, help="how many")
    parser.add_argument("--start", type=int, default=0, help="the first")
    parser.add_argument("--seed", type=int, help="replay this one, with its whole trace")
    parser.add_argument("--jobs", type=int, default=1, help="processes")
    parser.add_argument("--mode", choices=("exactly_once", "at_least_once"), default="exactly_once")
    parser.add_argument("--space", choices=(PROTOCOL, EVENTS, *events.KINDS), help="which flows")
    parser.add_argument("--keep-going", action="store_true", help="do not stop at the first failing seed")
    given = parser.parse_args(arguments)
    if given.seed is not None:
        result = run_seed(given.seed, mode=given.mode, keep=None, space=given.space or PROTOCOL)
        print("\n".join(result.trace))
        print(f"{result.what}\n{result.faults}, {result.steps} steps, {result.checkpoints} checkpoints")
        print(result.violation or "clean")
        return 1 if result.violation else 0
    began, failed, steps = time.perf_counter(), 0, 0
    kinds: Counter[str] = Counter()
    spaces = [given.space] if given.space else [PROTOCOL] if given.mode == "at_least_once" else [PROTOCOL, EVENTS]
    each, more = divmod(given.seeds, len(spaces))
    sweeps = (
        sweep(range(given.start, given.start + each + (at < more)), mode=given.mode, jobs=given.jobs, space=space)
        for at, space in enumerate(spaces)
    )
    for result in chain.from_iterable(sweeps):
        steps += result.steps
        kinds.update(result.faults)
        if result.violation:
            failed += 1
            print(result.report(), end="\n\n", flush=True)
            if not given.keep_going:
                return 1
    took = time.perf_counter() - began
    print(f"{given.seeds - failed} of {given.seeds} seeds clean in {took:.1f} s ({given.seeds / took:.1f} a second)")
    print(f"{steps} steps; faults: {dict(kinds)}")
    return 1 if failed else 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
