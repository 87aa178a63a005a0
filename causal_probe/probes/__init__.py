"""The questions, asked of *any* model and tokens: what does each head attend to, and which of it does the model need?

A probe takes any model with TransformerLens' hook points and returns a frozen result that prints, compares, cites and saves itself.

What does each head look at?
    :func:`scan` scores heads by templates: :data:`TEMPLATES`, :func:`template`, :func:`induction`, :func:`offset`,
    :func:`from_graph`, :func:`successor_of_parent`, or a :class:`Template` of your own, on :func:`repeated_tokens` by default.
    :func:`score_patterns` scores patterns without a model. :func:`head_graphs`: which position does each position look at?
    :func:`match_heads`: which head looks at which parent? :func:`graph_selectivity`: does it follow a graph that changes from sequence
    to sequence? :func:`~causal_probe.probes.posterior_alignment.posterior_alignment`: does it weigh graphs as the exact posterior does?
Does the model need it?
    :func:`verify` ablates what a scan flagged, by the constants in a :class:`Rule`, on the loss :func:`next_token`.
    :func:`ablate_heads` takes some heads away; :func:`edge_effects` cuts single edges.
Why does a head look there?
    :func:`qk_attributions` takes its scores apart by what it reads, a dictionary's features among it (:func:`causal_probe.probes.qk_split.parts_along`);
    :func:`upstream` by the heads that wrote it. :func:`causal_probe.probes.attribution_graph.attribution_graph`
    writes either for circuit-tracer's viewer.
What is in the weights?
    :func:`head_weights`, :func:`composition`; :func:`implied_step` reads linear attention as gradient descent. :func:`~causal_probe.probes.score_pca.score_pca`: in how few
    directions do a head's scores vary?
What does the model do with its context?
    :func:`in_context_score`, :func:`copy_losses`, :func:`copy_sensitivity`. :func:`~causal_probe.probes.permutation_sensitivity.permutation_sensitivity`: does the order of the context matter,
    and in which layers?
What would training do?
    :func:`score_gradients`: the gradient of the loss with respect to every attention score.
Which tokens depend on which, and which decide?
    :func:`discover_from_attention`, and then :func:`explain` with :func:`outputs_of`.

Classes of results and all else are imported from their modules, such as :class:`causal_probe.probes.head_scores.HeadScores`.
"""

from __future__ import annotations

from causal_probe.probes.ablate_heads import ablate_heads
from causal_probe.probes.copying import copy_sensitivity
from causal_probe.probes.discover_from_attention import discover_from_attention
from causal_probe.probes.edge_effects import edge_effects
from causal_probe.probes.explain import explain, outputs_of
from causal_probe.probes.graph_selectivity import graph_selectivity
from causal_probe.probes.head_graphs import head_graphs
from causal_probe.probes.implied_step import implied_step
from causal_probe.probes.in_context import copy_losses, in_context_score
from causal_probe.probes.match import match_heads
from causal_probe.probes.measures import next_token
from causal_probe.probes.qk_attributions import qk_attributions
from causal_probe.probes.scan import scan
from causal_probe.probes.score_gradients import score_gradients
from causal_probe.probes.scoring import score_patterns
from causal_probe.probes.sequences import repeated_tokens
from causal_probe.probes.templates import (
    TEMPLATES,
    Template,
    from_graph,
    induction,
    offset,
    successor_of_parent,
    template,
)
from causal_probe.probes.upstream_heads import upstream
from causal_probe.probes.verification import Rule
from causal_probe.probes.verify import verify
from causal_probe.probes.weights import composition, head_weights

__all__ = [
    "Rule",
    "TEMPLATES",
    "Template",
    "ablate_heads",
    "composition",
    "copy_losses",
    "copy_sensitivity",
    "discover_from_attention",
    "edge_effects",
    "explain",
    "from_graph",
    "graph_selectivity",
    "head_graphs",
    "head_weights",
    "implied_step",
    "in_context_score",
    "induction",
    "match_heads",
    "next_token",
    "offset",
    "outputs_of",
    "qk_attributions",
    "repeated_tokens",
    "scan",
    "score_gradients",
    "score_patterns",
    "successor_of_parent",
    "template",
    "upstream",
    "verify",
]


def __dir__() -> list[str]:
    return [*__all__]
