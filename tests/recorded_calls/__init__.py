"""Seeded calls over all that the package computes, for tests/same_numbers.py: the same numbers before and after a change?"""

from __future__ import annotations

from tests.recorded_calls import ground, mechanisms, papers, probes, studies
from tests.recorded_calls.calls import CALLS, measure

__all__ = ["CALLS", "ground", "measure", "mechanisms", "papers", "probes", "studies"]
