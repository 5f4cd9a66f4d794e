"""Measurements of vqcodec on real files: `python -m benchmarks --help`, and README.md beside this file.

A subcommand is a module with `run`, which measures and saves a JSON file, and `table`, which makes it text.
Only `__main__` prints.
"""
