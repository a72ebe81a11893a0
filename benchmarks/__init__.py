"""Benchmarks of the repository: `python -m benchmarks --help`."""
