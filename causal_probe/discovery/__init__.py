"""Causal discovery: from tests of conditional independence to a mixed graph. Nothing here knows a transformer.

- :class:`FisherZ`, :class:`DSeparation`: tests of conditional independence;
- :func:`pc`, :func:`icd`, :func:`ordered_icd`, :func:`fci`: from a test to a mixed graph.

:func:`causal_probe.probes.discover_from_attention` reads the correlations of tokens out of a model's attention and learns from them.
"""

from __future__ import annotations

from causal_probe.discovery.fci import fci
from causal_probe.discovery.icd import icd, ordered_icd
from causal_probe.discovery.independence import DSeparation, FisherZ, IndependenceTest
from causal_probe.discovery.pc import pc
from causal_probe.discovery.search import Learned

__all__ = ["DSeparation", "FisherZ", "IndependenceTest", "Learned", "fci", "icd", "ordered_icd", "pc"]


def __dir__() -> list[str]:
    return [*__all__]
