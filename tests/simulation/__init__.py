"""The deterministic simulator: whole jobs, real operators, real loops; one seed is one run.

`python -m tests.simulation --seeds 200` runs a sweep, `python -m tests.simulation --seed N` replays one with its trace.
"""
