"""Scanning SmolLM2-135M-Instruct, as a 4-bit GGUF file: its known heads, their graphs, and the report."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import networkx as nx
import numpy as np
import pytest
import torch

from causal_probe import graphs
from causal_probe.experiments import scan
from causal_probe.experiments.model_scan import ModelScan
from causal_probe.probes import from_graph, head_graphs, repeated_tokens, template
from causal_probe.reports import save

pytestmark = pytest.mark.slow

#: Scores on 50 random tokens repeated, after a BOS token, of another draw. Over five seeds of 32 sequences the means here are 0.887,
#: 0.764, 0.734 and 0.883, with standard errors of 0.003, 0.004, 0.005 and 0.001 (while fragments of characters were drawn too: 0.881,
#: 0.758, 0.723 and 0.882).
KNOWN = {
    (18, 6, "induction"): 0.90,
    (17, 3, "induction"): 0.78,
    (17, 4, "induction"): 0.76,
    (16, 0, "previous-token"): 0.89,
}


@pytest.fixture(scope="module")
def found(smollm2: Any) -> ModelScan:
    options = {"templates": ["previous-token", "induction"], "bos": "yes", "period": 50}
    return scan(smollm2, **options, n_sequences=32)


def test_its_known_heads(found: ModelScan) -> None:
    assert [row.name for row in found.rows("induction")][:3] == ["L18H6", "L17H3", "L17H4"]
    assert found.rows("previous-token")[0].name == "L16H0"
    for head, score in KNOWN.items():
        assert found.scores.of(*head).score == pytest.approx(score, abs=0.03)


def test_its_heads_graphs(smollm2: Any) -> None:
    tokens = repeated_tokens(smollm2, n_sequences=8, period=50, bos="yes", seed=1).tokens
    found = head_graphs(smollm2, tokens, per="sequence")
    chain = from_graph(graphs.chain(tokens.shape[1]))
    for head, truth in {(18, 6): template("induction"), (16, 0): chain}.items():
        comparison = found.compare(truth, *head)
        assert comparison.precision is not None
        assert comparison.recall is not None
        assert min(comparison.precision, comparison.recall) >= 0.9
    # What L18H6 has nothing to copy from has no parent.
    assert (found.parents(18, 6)[:, :51] < 0).mean() > 0.95

    # The same DAG with its parents shuffled is what chance gives.
    shuffled = np.random.default_rng(0).permutation(np.arange(1, 51))
    dag = nx.empty_graph(tokens.shape[1], create_using=nx.DiGraph)
    dag.add_edges_from((int(parent), child) for child, parent in zip(range(51, 101), shuffled, strict=True))
    by_chance = found.compare(dag, 18, 6)
    assert by_chance.recall is not None
    assert by_chance.recall < 0.1


def test_its_report(found: ModelScan, tmp_path: Path) -> None:
    path = save(found, tmp_path / "out")
    assert path.stat().st_size < 3e6
    page = path.read_text(encoding="utf-8")
    assert "Below the line L18H6 on one sequence" in page
    assert "English text" in page
    repeated, text = found.examples
    assert text.tokens[1:4] == ("The", " old", " keeper")
    position = {head: index for index, head in enumerate(found.leading)}
    previous = torch.from_numpy(text.patterns[position[16, 0]]).diagonal(-1)
    assert previous.mean() > 0.5  # a previous-token head is one on real text too
    assert len(repeated.tokens) == 41
