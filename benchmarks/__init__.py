"""Measurements. What a program measured is committed in benchmarks/results, with its device."""
