"""Benchmarks; each script runs with ``python -m benchmarks.NAME``."""
