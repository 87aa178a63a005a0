"""What a layer copies: golden attention, and finite differences."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from causal_probe import CausalProbeError
from causal_probe.hooks.continuous import OnSequences
from causal_probe.models import LinearTransformer
from causal_probe.probes import copy_sensitivity, scan


def copier(offset: int, *, n: int = 6, strength: float = 60.0) -> LinearTransformer:
    """A softmax layer that copies the token ``offset`` places to the left, by turning sinusoidal positions."""
    model = LinearTransformer(3, n, softmax=True, mask="causal", d_positions=20)
    with torch.no_grad():
        attention = model.blocks[0].attn
        angle = offset / 10_000 ** (torch.arange(0, 20, 2) / 20)
        for pair, turn in enumerate(angle.tolist()):  # (sin, cos)(i - offset) from (sin, cos)(i)
            s, c = np.sin(turn), np.cos(turn)
            at = slice(3 + 2 * pair, 5 + 2 * pair)
            attention.W_Q[0, at, at] = strength * torch.tensor([[c, s], [-s, c]], dtype=torch.float32)
        attention.W_K[0] = torch.eye(23)
        attention.W_V[0, :3, :3] = torch.eye(3)
        attention.W_O[0] = torch.eye(23)
    return model


def inputs(n: int = 6, *, d: int = 3) -> torch.Tensor:
    return torch.randn(8, n, d, generator=torch.Generator().manual_seed(0))


@pytest.mark.parametrize("offset", [0, 1, 2])
def test_a_copier_is_found_and_not_mistaken(offset: int) -> None:
    found = copy_sensitivity(copier(offset), inputs())
    rows = range(offset, 6)
    for other in range(3):
        share, _ = found.share(-other, list(range(2, 6)))
        assert share is not None
        assert (share > 0.9) == (other == offset), (other, share)
    assert found.share(-offset, list(rows))[0] > 0.9


def test_scan_says_the_same_of_continuous_tokens() -> None:
    for offset, called in ((1, True), (0, False)):
        held = OnSequences(copier(offset), inputs())
        scores = scan(held, held.tokens, templates=["previous-token"], queries=[1, 3, 5])
        assert bool(scores.called()) == called


def test_against_finite_differences() -> None:
    model = copier(1, strength=2.0).double()
    x = inputs().double()[:2]
    found = copy_sensitivity(model, x)
    step = 1e-6
    with torch.no_grad():
        squares = np.zeros((2, 6, 6))
        for j in range(6):
            for entry in range(3):
                moved = x.clone()
                moved[:, j, entry] += step
                outs = [model.run_with_cache(each)[1]["attn_out", 0] for each in (moved, x)]
                squares[:, :, j] += ((outs[0] - outs[1]) / step).square().sum(-1).numpy()
    np.testing.assert_allclose(found.sensitivity, np.sqrt(squares).mean(0), rtol=1e-3, atol=1e-5)
    np.testing.assert_allclose(found.shares.sum(-1), 1)


def test_what_it_refuses() -> None:
    model = copier(1)
    with pytest.raises(CausalProbeError, match="sequences of vectors"):
        copy_sensitivity(model, inputs()[:0])
    with pytest.raises(CausalProbeError, match="hook_attn_out"):
        copy_sensitivity(model, inputs(), layer=3)
    with pytest.raises(CausalProbeError, match="No position has an input"):
        copy_sensitivity(model, inputs()).share(-6)
