"""Measurements: python -m benchmarks.NAME prints one table and writes benchmarks/results/NAME.json."""
