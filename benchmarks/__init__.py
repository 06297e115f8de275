"""Measurements beside a reference; one command each, every figure a JSON line (`benchmarks/figures.py`)."""
