"""The studies: a model and a question, end to end, from loading to a result that prints, compares and cites itself.

What a study returns is a class of the module beside it, such as :class:`causal_probe.experiments.recovery.Recovery`.
"""

from __future__ import annotations

from causal_probe.experiments.check_model import check_model
from causal_probe.experiments.compare_evidence import compare_evidence, measure_evidence
from causal_probe.experiments.discover_in_text import discover_in_text
from causal_probe.experiments.explanations import explain_sentiment, explain_sessions
from causal_probe.experiments.in_context_graph import in_context_graph
from causal_probe.experiments.known_circuits import known_circuits
from causal_probe.experiments.leaderboard import leaderboard
from causal_probe.experiments.merge_scans import merge_scans
from causal_probe.experiments.model_circuit import model_circuit as model_circuit
from causal_probe.experiments.model_structure import model_structure as model_structure
from causal_probe.experiments.opening import open_model

# Of the commands; in Python there is causal_probe.discovery.graph_from_sequences. Not offered.
from causal_probe.experiments.own_sequences import graph_from_file as graph_from_file
from causal_probe.experiments.plan_sequences import plan_sequences as plan_sequences
from causal_probe.experiments.recover import recover
from causal_probe.experiments.recover_by_gradient import recover_by_gradient, recover_from_tokens
from causal_probe.experiments.scan import scan

__all__ = [
    "check_model",
    "compare_evidence",
    "discover_in_text",
    "explain_sentiment",
    "explain_sessions",
    "in_context_graph",
    "known_circuits",
    "leaderboard",
    "measure_evidence",
    "merge_scans",
    "open_model",
    "recover",
    "recover_by_gradient",
    "recover_from_tokens",
    "scan",
]


def __dir__() -> list[str]:
    return [*__all__]
