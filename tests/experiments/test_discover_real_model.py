"""Discovery and explanations on real pretrained models: SmolLM2-135M-Instruct (a 4-bit GGUF file) and the MiniLM encoder.

How long they take is printed by ``make bench``; here it is asked whether what is said is so, by running the models by hand.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch

from causal_probe.experiments import discover_in_text
from causal_probe.experiments.discover_in_text import TextDiscovery
from causal_probe.reports import report
from tests.real_model import minilm_folder

pytestmark = pytest.mark.slow

LETTER = "The old keeper wrote a long letter to his daughter and closed it with the"
RAIN = (
    "In spite of the rain the old teacher thought that the new film, which we saw last week with my sister and her "
    "friends in town, was unwatchable."
)


@pytest.fixture(scope="module")
def letter(smollm2: Any) -> TextDiscovery:
    return discover_in_text(smollm2, LETTER, explain=-1, max_size=2)


def decided(model: Any, tokens: list[int]) -> int:
    with torch.no_grad():
        return int(model(torch.tensor([tokens]))[0, -1].argmax())


def test_smollm2_finds_graphs_and_explains_its_next_word(letter: TextDiscovery, smollm2: Any) -> None:
    """Every explaining set changes the next word, every smaller one that leave-one-out tried does not, by plain forward passes."""
    found = letter.discovery
    assert len(found.nodes) == 15
    assert [each.name for each in found.graphs] == [f"L29H{head}" for head in range(9)]
    assert found.settings["algorithm"] == "ordered-icd"
    assert found.settings["samples"] == 576
    for each in found.graphs:
        for (i, j), evidence in each.evidence.items():
            assert evidence.p is None or (evidence.p > 0.01) == (not each.graph.has_edge(i, j))
    tokens = found.settings["tokens"]
    tokenizer = smollm2.tokenizer
    replacement = tokenizer.unk_token_id
    original = decided(smollm2, tokens)
    assert letter.decision == tokenizer.decode([original])
    cleann = letter.explanations["cleann"]
    assert cleann.decision == original
    assert cleann.sets
    for nodes, after in zip(cleann.sets, cleann.changed_to, strict=True):
        changed = [replacement if place in nodes else token for place, token in enumerate(tokens)]
        assert decided(smollm2, changed) == after != original
    # All that the graphs allow and that change it: nothing joined to the target was passed over.
    if cleann.size == 1:
        joined = {node for each in found.graphs for node in each.graph.predecessors(cleann.target)}
        alone = {
            node
            for node in joined
            if decided(smollm2, [replacement if place == node else token for place, token in enumerate(tokens)])
            != original
        }
        assert {node for (node,) in cleann.sets} == alone


def test_the_report_on_smollm2(letter: TextDiscovery) -> None:
    page = report(letter).to_html()
    assert page.count("<svg") == 9
    assert "Why this decision?" in page


@pytest.mark.skipif(minilm_folder() is None, reason="needs the MiniLM encoder's wheel")
@pytest.mark.parametrize("words", [False, True])
def test_minilm(words: bool) -> None:
    folder = minilm_folder()
    assert folder is not None
    found = discover_in_text(Path(folder), RAIN, words=words).discovery
    assert len(found.graphs) == 12
    assert found.nodes[0] == "[CLS]"
    assert found.nodes[-1] == "[SEP]"
    assert len(found.texts) > 32  # more than thirty words, "unwatchable" in pieces
    assert any(text.startswith("##") for text in found.texts)
    assert (len(found.nodes) < len(found.texts)) == words
    assert all(each.stopped is None for each in found.graphs)
    assert all(each.graph.number_of_edges() > 0 for each in found.graphs)
