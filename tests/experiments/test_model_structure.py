"""All questions about structure at once: each part is what its own probe says, and what can't be asked is said."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from causal_probe.errors import CausalProbeError
from causal_probe.experiments import model_structure
from causal_probe.experiments.model_structure import ModelStructure
from causal_probe.hooks import to_hooked
from causal_probe.models import DisentangledTransformer
from causal_probe.probes.permutation_sensitivity import permutation_sensitivity
from causal_probe.probes.score_pca import score_pca
from causal_probe.reports import report
from causal_probe.syntax import dependency_heads, generated_sentences, tree_projection
from tests import tiny_huggingface as tiny

SMALL: dict[str, Any] = {"n_sentences": 20, "n_sequences": 8, "length": 8, "n_components": 2}


def english() -> Any:
    """A random GPT-2 with a word for each word of the grammar, a full stop, and five weekdays."""
    from tokenizers import Tokenizer, models, pre_tokenizers
    from transformers import PreTrainedTokenizerFast

    words = sorted({word for each in generated_sentences(500, seed=3) for word in each.words})
    names = ["?", "<s>", ".", "in", *words, "Monday", "Tuesday", "Wednesday", "Thursday", "Friday"]
    fast = Tokenizer(models.WordLevel({name: i for i, name in enumerate(names)}, unk_token="?"))
    fast.pre_tokenizer = pre_tokenizers.Whitespace()
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=fast, unk_token="?", bos_token="<s>")
    return to_hooked(tiny.gpt2(vocab_size=len(names), bos_token_id=1, n_positions=32).double(), tokenizer)


def test_each_part_is_its_own_probe_s() -> None:
    model = english()
    found = model_structure(model, seed=2, **SMALL)
    sentences = generated_sentences(20, seed=2)
    assert found.dependencies is not None
    assert found.dependencies.to_governor == dependency_heads(model, sentences).to_governor
    text = " ".join(" ".join([*each.words, "."]) for each in sentences).split()
    ids = model.tokenizer.convert_tokens_to_ids(text)
    begins = found.order is not None and found.order.settings["start"]
    rows = torch.tensor([[1] * begins + ids[i * 8 : i * 8 + 8] for i in range(8)])
    assert found.order is not None
    assert found.order.tokens == permutation_sensitivity(model, rows, n_permutations=2, start=begins, seed=2).tokens
    assert found.scores is not None
    assert np.array_equal(found.scores.held_out, score_pca(model, rows, n_components=2).held_out)
    assert [each.words for each in found.continuation] == [
        tuple(f" {d}day" for d in ("Mon", "Tues", "Wednes", "Thurs", "Fri"))
    ]
    assert set(found.left_out) == {"numerals", "months", "number-words", "letters"}
    assert len(found.questions) == len(found.table().rows) == 5
    assert set(found.undefined) == {"trees"}
    assert found.call.startswith("from causal_probe import experiments")


def test_a_treebank_of_one_s_own(tmp_path: Path) -> None:
    words = ["the", "old", "dog", "saw", "a", "cat"]
    tree = [(3, "det"), (3, "amod"), (4, "nsubj"), (0, "root"), (6, "det"), (4, "obj")]
    sentence = "\n".join(
        f"{i}\t{w}\t_\t_\t_\t_\t{g}\t{r}\t_\t_" for i, (w, (g, r)) in enumerate(zip(words, tree, strict=True), 1)
    )
    (tmp_path / "own.conllu").write_text((sentence + "\n\n") * 12)
    found = model_structure(
        english(), conllu=tmp_path / "own.conllu", **{**SMALL, "n_sentences": 10}, out=tmp_path / "out"
    )
    assert found.settings["sentences"] == 10
    again = ModelStructure.load(tmp_path / "out" / "structure.safetensors")
    assert again.questions == found.questions
    assert again.scores is not None


def test_what_can_not_be_asked() -> None:
    with pytest.raises(CausalProbeError, match="it has none"):
        model_structure(DisentangledTransformer(d_vocab=3, n_positions=4), **SMALL)
    strange = [((f"zebra{i}", "ran"), (1, -1), ("nsubj", "root")) for i in range(8)]
    with pytest.raises(CausalProbeError, match="doesn't know these words"):
        dependency_heads(english(), strange)
    found = model_structure(english(), **{**SMALL, "length": 500, "n_sequences": 50})
    assert found.order is found.scores is None
    assert "Give more sentences, or a smaller `length`" in found.left_out["order"]
    assert found.left_out["scores"] == found.left_out["order"]


def test_an_encoder_is_asked_for_trees(tmp_path: Path) -> None:
    import transformers

    tokenizer = english().tokenizer
    config = transformers.BertConfig(
        vocab_size=len(tokenizer), hidden_size=16, num_hidden_layers=2, num_attention_heads=2, intermediate_size=16, max_position_embeddings=40
    )  # fmt: skip
    torch.manual_seed(0)
    encoder = transformers.BertModel(config).eval()
    encoder.save_pretrained(tmp_path / "encoder")
    tokenizer.save_pretrained(tmp_path / "encoder")
    found = model_structure(tmp_path / "encoder", seed=3, **SMALL)
    assert found.trees is not None
    sentences = generated_sentences(20, seed=3)
    expected = tree_projection(encoder, sentences, tokenizer=tokenizer, seed=3)
    assert [each.f1 for each in found.trees.trees] == pytest.approx([each.f1 for each in expected.trees])
    assert found.dependencies is found.order is found.scores is None
    assert found.continuation == ()
    assert "asked of language models" in found.left_out["all else"]
    assert set(found.undefined) == {"dependencies", "order", "scores"}
    assert [row[0] for row in found.questions] == ["brackets of the encoder's trees"]
    assert "Does it compute along trees?" in report(found).to_html()
