"""Causal discovery: from tests of conditional independence to a mixed graph. Nothing here knows a transformer.

- :class:`FisherZ`, :class:`DSeparation`: tests of conditional independence;
- :func:`pc`, :func:`icd`, :func:`ordered_icd`, :func:`fci`: from a test to a mixed graph;
- :func:`graph_from_sequences`: from token sequences as they are to a dependence forest, each claim with its null and level.

:func:`causal_probe.probes.discover_from_attention` reads the correlations of tokens out of a model's attention and learns from them.
"""

from __future__ import annotations

from causal_probe.discovery.fci import fci
from causal_probe.discovery.icd import icd, ordered_icd
from causal_probe.discovery.independence import DSeparation, FisherZ, IndependenceTest
from causal_probe.discovery.pc import pc
from causal_probe.discovery.search import Learned
from causal_probe.discovery.sequences import graph_from_sequences

__all__ = [
    "DSeparation",
    "FisherZ",
    "IndependenceTest",
    "Learned",
    "fci",
    "graph_from_sequences",
    "icd",
    "ordered_icd",
    "pc",
]


def __dir__() -> list[str]:
    return [*__all__]
