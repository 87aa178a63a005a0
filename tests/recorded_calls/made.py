"""What the calls are made on: tasks, models and texts, all tiny and seeded."""

from __future__ import annotations

from typing import Any

import numpy as np
import torch

from causal_probe import graphs, hooks, models, tasks
from tests import tiny_huggingface

#: A forest: nodes 0 and 3 are roots.
FOREST = graphs.from_parents([None, 0, 0, None, 2, 3, 4])
TWO_PARENTS = graphs.two_parent_tree(9)


def forest_task() -> Any:
    """Over :data:`FOREST`, eight positions."""
    return tasks.InContextMarkov(FOREST, 3, 0.1)


def two_parent_task() -> Any:
    """Over :data:`TWO_PARENTS`, ten positions."""
    return tasks.InContextMarkov(TWO_PARENTS, 3, 0.1)


def induction_model() -> Any:
    """An ideal induction circuit, set by hand, with a little noise, so that no two heads and no two numbers are alike."""
    model = models.DisentangledTransformer(d_vocab=12, n_positions=24, heads=(2, 1))
    source = torch.Generator().manual_seed(7)
    for parameter in model.parameters():
        parameter.data = 0.1 * torch.randn(parameter.shape, generator=source)
    model.block(0, 0, query="position", key="position").diagonal(-1).fill_(30)
    model.block(1, 0, query="token", key="L0H0.token").diagonal().fill_(12)
    model.output_block("L1H0.token").diagonal().fill_(9)
    return model


def hugging_face(kind: str = "llama", **options: Any) -> Any:
    """A tiny random Hugging Face model behind TransformerLens' hook points."""
    return hooks.to_hooked(tiny_huggingface.CAUSAL[kind](**options))


def texts() -> list[str]:
    """Documents of 0 to 39 words."""
    draw = np.random.default_rng(0)
    return [" ".join(f"t{token}" for token in draw.integers(3, 12, draw.integers(0, 40))) for _ in range(16)]


def reader() -> Any:
    """A model with a tokenizer."""
    return hooks.to_hooked(tiny_huggingface.llama(), tiny_huggingface.tokenizer(bos=True))


def next_token_loss(model: Any, tokens: torch.Tensor) -> torch.Tensor:
    """Mean over positions of minus the log probability of the next token, by sequence."""
    logits = model(tokens)[:, :-1].log_softmax(-1)
    losses: torch.Tensor = -logits.gather(2, tokens[:, 1:, None])[..., 0].mean(1)
    return losses
