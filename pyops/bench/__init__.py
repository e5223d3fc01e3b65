"""Benchmarks: what `python -m pyops bench` and the files in benchmarks/ share."""
