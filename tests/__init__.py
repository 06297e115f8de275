"""The tests; a package, so that `python -m tests.simulation` runs the simulator."""
