"""Recovering the graph of any task, not only of the paper's."""

from __future__ import annotations

import json

import networkx as nx
import pytest
import torch

from causal_probe import graphs, tasks
from causal_probe.errors import CausalProbeError
from causal_probe.experiments import recover
from causal_probe.experiments.recovery import Recovery
from causal_probe.reports import report

GRAPH = graphs.from_parents([None, 0, 0, None, 3])


@pytest.fixture(scope="module")
def ring() -> Recovery:
    return recover(tasks.RingWalk(GRAPH, d_vocab=4), steps=300, batch_size=256, probe_sequences=4096, device="cpu")


def test_a_ring_walk_is_recovered_and_compared_with_its_own_references(ring: Recovery) -> None:
    assert ring.exact
    assert set(ring.recovered.edges) == set(GRAPH.edges)
    assert list(ring.reference_losses) == ["uniform", "in-context unigram", "known-graph"]
    own = ring.reference_losses["known-graph"]
    assert own < ring.loss < ring.reference_losses["uniform"]
    # Whoever takes it for the paper's task smooths with the wrong prior and pools nothing: far from what the graph is worth.
    sample = ring.task.sample(4096, torch.Generator().manual_seed(0))
    paper = tasks.InContextMarkov(GRAPH, d_vocab=4).references()["known-graph"](sample)
    assert own < float(tasks.cross_entropy(paper, sample.target).mean()) - 0.05


def test_its_law_stands_in_the_settings_the_methods_and_the_call(ring: Recovery) -> None:
    assert ring.settings["task"] == "ring-walk task over a known graph (4 states, 6 positions)"
    assert ring.settings["task"] in ring.cite().methods
    assert "Dirichlet" not in ring.cite().methods
    assert "# task: RingWalk(6 positions, 3 edges, d_vocab=4)\nexperiments.recover(task, " in ring.call
    json.dumps(ring.to_dict(), allow_nan=False)
    assert "if the graph is known" in report(ring).to_html()


def test_the_papers_task_is_what_a_graph_makes() -> None:
    options = {"steps": 5, "batch_size": 8, "probe_sequences": 64, "device": "cpu"}
    made = recover(GRAPH, d_vocab=4, concentration=0.3, **options)
    given = recover(tasks.InContextMarkov(GRAPH, 4, 0.3), **options)
    assert given.settings == made.settings
    assert given.loss == made.loss
    assert given.reference_losses == made.reference_losses


def test_what_a_task_fixes_is_not_asked_for_again() -> None:
    with pytest.raises(CausalProbeError, match="has its own graph and law"):
        recover(tasks.RingWalk(GRAPH, d_vocab=4), d_vocab=4, concentration=0.2)


def test_a_task_without_a_law_of_redrawn_roots_is_tested_without() -> None:
    class NoRedraw(tasks.RingWalk):
        redraw = None

    found = recover(NoRedraw(nx.DiGraph(GRAPH), 4), steps=5, batch_size=8, probe_sequences=64, device="cpu")
    assert not found.effects[0].redrawn
    assert "redrawn" not in found.cite().methods
