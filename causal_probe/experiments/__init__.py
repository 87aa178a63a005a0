"""The studies: a model and a question, end to end, from loading to a result that prints, compares and cites itself."""

from __future__ import annotations

from causal_probe.experiments.check_model import ModelCheck, check_model, open_model
from causal_probe.experiments.compare_evidence import compare_evidence, measure_evidence
from causal_probe.experiments.compared_evidence import Agreement, EvidenceRow, EvidenceTable
from causal_probe.experiments.discover_in_text import TextDiscovery, discover_in_text
from causal_probe.experiments.explanations import ExplanationStudy, explain_sentiment, explain_sessions
from causal_probe.experiments.in_context_graph import InContextGraph, in_context_graph
from causal_probe.experiments.leaderboard import Leaderboard, leaderboard
from causal_probe.experiments.merge_scans import merge_scans
from causal_probe.experiments.recover import CHECKPOINT_FILE, Recovery, recover
from causal_probe.experiments.recover_by_gradient import GradientRecovery, recover_by_gradient, recover_from_tokens
from causal_probe.experiments.scan import ModelScan, scan

__all__ = [
    "Agreement",
    "CHECKPOINT_FILE",
    "EvidenceRow",
    "EvidenceTable",
    "ExplanationStudy",
    "GradientRecovery",
    "InContextGraph",
    "Leaderboard",
    "ModelCheck",
    "ModelScan",
    "Recovery",
    "TextDiscovery",
    "check_model",
    "compare_evidence",
    "discover_in_text",
    "explain_sentiment",
    "explain_sessions",
    "in_context_graph",
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
