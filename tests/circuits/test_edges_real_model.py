"""Edges of SmolLM2-135M-Instruct's induction circuit, ablated alone."""

from __future__ import annotations

from typing import Any

import pytest
import torch

from causal_probe import circuits
from causal_probe.circuits.contrasts import contrast_of
from causal_probe.circuits.interventions import Interventions, edges_of
from causal_probe.circuits.partial import Layers
from causal_probe.hooks.check import undisturbed
from causal_probe.hooks.tokens import special_tokens

pytestmark = pytest.mark.slow


def test_the_induction_head_s_keys_need_what_the_previous_token_head_wrote(smollm2: Any) -> None:
    prompts = circuits.task_prompts(smollm2, "induction", n=6, seed=11)
    with undisturbed(smollm2):
        layers = Layers(smollm2, prompts.tokens)
        clean = layers.clean(prompts.tokens)
        contrast = contrast_of(
            "resample", layers, clean, None, special_tokens(smollm2).ids, torch.Generator().manual_seed(0)
        )
        run = Interventions(layers, clean, contrast, prompts.score(), torch.arange(6))
        edges = edges_of(layers, run.read)
        assert len(edges) == 70_651  # keys and values by group
        known, others = ("L16H0", "L18H6.k"), [("L16H1", "L18H6.k"), ("L16H0", "L18H0.k"), ("L15H0", "L18H6.q")]
        effects = run.effects([known, *others])
    assert float(effects[0].mean()) > 2  # nats of the odds of the right token, at the positions of the second copy
    assert float(effects[0].min()) > 1
    assert float(effects[1:].mean(1).abs().max()) < 0.25 * float(effects[0].mean())
