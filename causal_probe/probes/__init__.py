"""The questions, asked of *any* model and tokens: what does each head attend to, and which of it does the model need?

A probe takes any model with TransformerLens' hook points and returns a frozen result that prints, compares, cites and saves itself.
"""

from __future__ import annotations

from causal_probe.probes.ablation import Measured, next_token
from causal_probe.probes.bootstrap import bootstrap_intervals
from causal_probe.probes.copying import CopySensitivity, copy_sensitivity
from causal_probe.probes.discover_from_attention import discover_from_attention
from causal_probe.probes.discovered_graphs import AttentionGraph, Discovery
from causal_probe.probes.edge_effects import edge_effects
from causal_probe.probes.edge_tests import EdgeEffects
from causal_probe.probes.evidence import AboveZero, Evidence, Quantity
from causal_probe.probes.explain import Explanation, ExplanationSummary, explain, outputs_of, summarise
from causal_probe.probes.head_graphs import head_graphs
from causal_probe.probes.head_scores import HeadScore, HeadScores
from causal_probe.probes.implied_step import ImpliedStep, ImpliedSteps, implied_step
from causal_probe.probes.in_context import CopyLosses, InContextScore, copy_losses, in_context_score
from causal_probe.probes.match import HeadMatch, match_heads
from causal_probe.probes.p_values import Estimate
from causal_probe.probes.qk_attributions import PairGraph, QKAttributions, qk_attributions
from causal_probe.probes.scan import scan
from causal_probe.probes.score_gradients import score_gradients
from causal_probe.probes.scoring import score_patterns
from causal_probe.probes.sequence_graphs import SequenceComparison, SequenceGraphs
from causal_probe.probes.sequences import Sequences, ngram_tokens, repeated_tokens
from causal_probe.probes.template_choice import choose_templates
from causal_probe.probes.templates import (
    TEMPLATES,
    Template,
    from_graph,
    induction,
    offset,
    successor_of_parent,
    template,
)
from causal_probe.probes.upstream_heads import Arrow, Upstream, upstream
from causal_probe.probes.verification import HeadVerdict, JointEffect, Rule, Verification
from causal_probe.probes.verify import verify
from causal_probe.probes.weights import Composition, HeadWeights, composition, head_weights

__all__ = [
    "AboveZero",
    "AttentionGraph",
    "Arrow",
    "Composition",
    "CopyLosses",
    "CopySensitivity",
    "Discovery",
    "EdgeEffects",
    "Evidence",
    "Estimate",
    "Explanation",
    "ExplanationSummary",
    "HeadMatch",
    "HeadScore",
    "HeadScores",
    "HeadVerdict",
    "HeadWeights",
    "ImpliedStep",
    "ImpliedSteps",
    "InContextScore",
    "JointEffect",
    "Measured",
    "PairGraph",
    "QKAttributions",
    "Rule",
    "Quantity",
    "SequenceComparison",
    "SequenceGraphs",
    "Sequences",
    "TEMPLATES",
    "Template",
    "Upstream",
    "Verification",
    "bootstrap_intervals",
    "choose_templates",
    "composition",
    "copy_losses",
    "copy_sensitivity",
    "discover_from_attention",
    "edge_effects",
    "explain",
    "from_graph",
    "head_graphs",
    "head_weights",
    "implied_step",
    "in_context_score",
    "induction",
    "match_heads",
    "next_token",
    "ngram_tokens",
    "offset",
    "outputs_of",
    "qk_attributions",
    "repeated_tokens",
    "scan",
    "score_gradients",
    "score_patterns",
    "successor_of_parent",
    "summarise",
    "template",
    "upstream",
    "verify",
]

#: What tab completion offers: where a notebook begins. The rest of ``__all__``, most of it classes of results, is as public.
_OFFERED = (
    "composition",
    "discover_from_attention",
    "edge_effects",
    "explain",
    "from_graph",
    "head_graphs",
    "head_weights",
    "implied_step",
    "in_context_score",
    "induction",
    "match_heads",
    "offset",
    "qk_attributions",
    "scan",
    "score_gradients",
    "score_patterns",
    "successor_of_parent",
    "template",
    "upstream",
    "verify",
)


def __dir__() -> list[str]:
    return [*_OFFERED]
