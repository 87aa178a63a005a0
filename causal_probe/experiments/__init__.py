"""Whole studies: a task, a model, its training, the probes, and the comparison with the truth."""

from causal_probe.experiments.check_model import ModelCheck, check_model, open_model
from causal_probe.experiments.descent import (
    Algorithm,
    DescentAlignment,
    descent_alignment,
    feature_descent,
    interpolate,
    reference_algorithms,
)
from causal_probe.experiments.discover import TextDiscovery, discover
from causal_probe.experiments.dynamics import ChangePoint, Dynamics, Watch, change_point
from causal_probe.experiments.evidence import compare_evidence, measure_evidence
from causal_probe.experiments.evidence_result import Agreement, EvidenceRow, EvidenceTable
from causal_probe.experiments.explanations import ExplanationStudy, explain_sentiment, explain_sessions
from causal_probe.experiments.gradient_graph import gradient_graph, gradient_graphs
from causal_probe.experiments.gradient_lemma import measure_lemma
from causal_probe.experiments.gradient_recovery import GradientRecovery, recover_by_gradient, recover_from_tokens
from causal_probe.experiments.gradient_result import GradientGraph
from causal_probe.experiments.gradient_sample_complexity import gradient_sample_complexity
from causal_probe.experiments.gradient_slots import GradientSlots, gradient_slots
from causal_probe.experiments.graph_choice import FAMILIES, choose_graph
from causal_probe.experiments.in_context_graph import InContextGraph, in_context_graph
from causal_probe.experiments.layer_features import LayerFeatures, function_cosine, layer_features
from causal_probe.experiments.leaderboard import Leaderboard, leaderboard
from causal_probe.experiments.merge_scans import merge_scans
from causal_probe.experiments.mesa import MesaOptimizer, MesaTraining, mesa_optimizer, mesa_recovery, train_mesa
from causal_probe.experiments.recover import CHECKPOINT_FILE, Recovery, Training, recover
from causal_probe.experiments.reproductions import PARTS, REPRODUCTIONS, Reproduction, reproduce
from causal_probe.experiments.scan import ModelScan, scan
from causal_probe.experiments.sweep import Sweep, sweep
from causal_probe.experiments.template_choice import choose_templates
from causal_probe.experiments.weight_graphs import weight_graphs
from causal_probe.experiments.weight_result import BlockGraph, WeightGraphs

__all__ = [
    "ChangePoint",
    "Dynamics",
    "Watch",
    "change_point",
    "BlockGraph",
    "Agreement",
    "Algorithm",
    "EvidenceRow",
    "EvidenceTable",
    "DescentAlignment",
    "CHECKPOINT_FILE",
    "FAMILIES",
    "PARTS",
    "REPRODUCTIONS",
    "GradientGraph",
    "GradientRecovery",
    "GradientSlots",
    "InContextGraph",
    "LayerFeatures",
    "Leaderboard",
    "MesaOptimizer",
    "MesaTraining",
    "ModelCheck",
    "ModelScan",
    "Recovery",
    "Reproduction",
    "Sweep",
    "Training",
    "WeightGraphs",
    "check_model",
    "choose_graph",
    "choose_templates",
    "compare_evidence",
    "ExplanationStudy",
    "TextDiscovery",
    "descent_alignment",
    "discover",
    "explain_sentiment",
    "explain_sessions",
    "feature_descent",
    "function_cosine",
    "gradient_graph",
    "gradient_graphs",
    "gradient_sample_complexity",
    "gradient_slots",
    "in_context_graph",
    "interpolate",
    "layer_features",
    "leaderboard",
    "mesa_optimizer",
    "mesa_recovery",
    "open_model",
    "measure_evidence",
    "measure_lemma",
    "recover",
    "recover_by_gradient",
    "recover_from_tokens",
    "reference_algorithms",
    "reproduce",
    "merge_scans",
    "scan",
    "sweep",
    "train_mesa",
    "weight_graphs",
]

#: What tab completion offers: where a notebook begins. The rest of ``__all__``, most of it classes of results, is as public.
_OFFERED = (
    "Watch",
    "check_model",
    "compare_evidence",
    "descent_alignment",
    "discover",
    "gradient_graph",
    "gradient_slots",
    "in_context_graph",
    "layer_features",
    "leaderboard",
    "merge_scans",
    "mesa_optimizer",
    "recover",
    "recover_by_gradient",
    "recover_from_tokens",
    "reproduce",
    "scan",
    "sweep",
    "weight_graphs",
)


def __dir__() -> list[str]:
    return [*_OFFERED]
