"""How many seeds of the deterministic simulator are clean, and how long they take.

`python -m benchmarks.simulator [--seeds 2000] [--start 0] [--jobs N]`. A seed is one whole job with drawn crashes,
storage faults and schedule; it is clean when its committed output equals that of a run without faults and no rule was
broken.
"""

from __future__ import annotations

import argparse
import os
import sys
import time

from benchmarks.figures import emit
from tests.simulation.run import sweep

SEEDS = 2000
SECONDS_MAX = 600


def main(arguments: list[str]) -> int:
    parser = argparse.ArgumentParser(prog="python -m benchmarks.simulator", description=__doc__)
    parser.add_argument("--seeds", type=int, default=SEEDS)
    parser.add_argument("--start", type=int, default=0)
    parser.add_argument("--jobs", type=int, default=min(2, os.cpu_count() or 1), help="processes")
    given = parser.parse_args(arguments)
    began, clean, crashes, faults = time.perf_counter(), 0, 0, 0
    for result in sweep(range(given.start, given.start + given.seeds), jobs=given.jobs):
        crashes += result.faults.get("crash", 0)
        faults += sum(result.faults.values())
        if result.violation:
            print(result.report(), file=sys.stderr, flush=True)
        else:
            clean += 1
    took = time.perf_counter() - began
    emit("simulator_seeds_clean", float(clean), "seeds", f"all {given.seeds}", clean == given.seeds)
    bar = f"<= {SECONDS_MAX}" if given.seeds == SEEDS else None
    emit("simulator_time", took, "s", bar, bar is None or took <= SECONDS_MAX)
    emit("simulator_crashes", float(crashes), "crashes")
    emit("simulator_faults", float(faults), "faults")
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
