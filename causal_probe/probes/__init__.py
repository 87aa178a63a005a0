"""The questions, asked of *any* model and tokens: what does each head attend to, and which of it does the model need?

A probe takes any model with TransformerLens' hook points and returns a frozen result that prints, compares, cites and saves itself.
"""

from __future__ import annotations

from causal_probe.probes.edge_effects import EdgeEffects, edge_effects
from causal_probe.probes.head_graphs import Candidate, HeadGraphs, head_graphs
from causal_probe.probes.match import HeadMatch, match_heads

__all__ = ["Candidate", "EdgeEffects", "HeadGraphs", "HeadMatch", "edge_effects", "head_graphs", "match_heads"]
