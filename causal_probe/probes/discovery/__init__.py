"""Causal discovery from attention: self-attention read as a structural equation model over the tokens of one input.

:func:`~causal_probe.probes.discover` does it all for a model. Beneath it, each usable by itself:

- :func:`attention_correlation`: from a pattern to the correlations of its tokens;
- :class:`FisherZ`, :class:`DSeparation`: tests of conditional independence;
- :func:`pc`, :func:`icd`, :func:`ordered_icd`, :func:`fci`: from a test to a mixed graph.
"""

from __future__ import annotations

from causal_probe.probes.discovery.correlation import Correlation, attention_correlation, output_correlation
from causal_probe.probes.discovery.discover import discover, learn
from causal_probe.probes.discovery.fci import data_with_correlation, fci
from causal_probe.probes.discovery.icd import icd, ordered_icd
from causal_probe.probes.discovery.independence import DSeparation, FisherZ, IndependenceTest, OrderCount
from causal_probe.probes.discovery.pc import pc
from causal_probe.probes.discovery.result import AttentionGraph, Discovery
from causal_probe.probes.discovery.search import Evidence, Learned, Search

__all__ = [
    "AttentionGraph",
    "Correlation",
    "DSeparation",
    "Discovery",
    "Evidence",
    "FisherZ",
    "IndependenceTest",
    "Learned",
    "OrderCount",
    "Search",
    "attention_correlation",
    "data_with_correlation",
    "discover",
    "fci",
    "icd",
    "learn",
    "ordered_icd",
    "output_correlation",
    "pc",
]
