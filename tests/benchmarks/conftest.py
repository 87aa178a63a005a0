"""Benchmarks live in files named ``bench_*.py``: ``make bench`` runs them, ``make test`` never does."""

from __future__ import annotations

from collections.abc import Iterator

import jaxtyping
import pytest


@pytest.fixture(autouse=True)
def _no_checks_of_shapes() -> Iterator[None]:
    """What is timed is what a user runs, and shapes are checked at run time in tests only."""
    jaxtyping.config.update("jaxtyping_disable", True)
    yield
    jaxtyping.config.update("jaxtyping_disable", False)
