"""Benchmarks live in files named ``bench_*.py``: ``make bench`` runs them, ``make test`` never does."""
