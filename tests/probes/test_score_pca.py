"""Principal components of scores: planted fields, and scikit-learn on the same numbers."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import torch

from causal_probe.errors import CausalProbeError
from causal_probe.models import DisentangledTransformer
from causal_probe.probes.score_pca import _components, score_pca
from tests.tiny_models import MODELS, disentangled, random_tokens


@pytest.mark.parametrize("rank", [1, 2, 3])
def test_a_sum_of_fixed_fields_has_as_many_components(rank: int) -> None:
    rng = np.random.default_rng(rank)
    scores = rng.normal(size=21) + rng.normal(size=(40, rank)) @ rng.normal(size=(rank, 21))
    _, found = _components(scores, 6, 3, [rng.permutation(21)[:many] for many in (3, 6)])
    for name in ("explained", "held_out", "row_explained"):
        assert found[name][rank - 1 :] == pytest.approx(1, abs=1e-9), name
        assert (found[name][: rank - 1] < 0.9999).all(), name
    assert found["rebuilt"] == pytest.approx([0, 0], abs=1e-9)


def test_a_planted_head_of_one_field() -> None:
    """Scores that hang on the last token alone: an indicator of it for a fixed field of keys."""
    model = DisentangledTransformer(d_vocab=4, n_positions=8, heads=(2,))
    _ = model.block(0, 0, query="token", key="position").copy_(
        torch.randn(4, 8, generator=torch.Generator().manual_seed(0))
    )
    tokens = torch.randint(4, (60, 8), generator=torch.Generator().manual_seed(1))
    found = score_pca(model, tokens, n_components=3)
    assert found.row_explained[0] == pytest.approx([*found.row_explained[0][:2], 1])  # four tokens: three directions
    assert found.constant == ((0, 1),)  # its scores are 0 everywhere
    assert not found.explained[1].any()
    assert "L0H1: its scores are the same" in str(found)
    assert found.heads == ((0, 0), (0, 1))


@pytest.mark.parametrize("kind", MODELS)
def test_every_number_by_another_way(kind: str) -> None:
    model: Any = MODELS[kind]()
    tokens = random_tokens(30)
    found = score_pca(model, tokens, n_components=2)
    with torch.no_grad():
        _, cache = model.run_with_cache(tokens)
    query, key = np.tril_indices(7)
    bases = []
    for number, (layer, head) in enumerate(found.heads):
        scores = cache[f"blocks.{layer}.attn.hook_attn_scores"][:, head].double().numpy()[:, query, key]
        values = np.linalg.eigvalsh(np.cov(scores.T))[::-1]
        np.testing.assert_allclose(found.explained[number], np.cumsum(values[:2]) / values.sum(), atol=1e-5)
        first, second = scores[:15], scores[15:]
        vectors = np.linalg.eigh(np.cov(first.T))[1][:, ::-1][:, :2]
        away = second - first.mean(0)
        held = [np.square(away @ vectors[:, : k + 1]).sum() / np.square(away).sum() for k in range(2)]
        np.testing.assert_allclose(found.held_out[number], held, atol=1e-4)
        bases.append(vectors)
    for a, one in enumerate(bases):
        for b, other in enumerate(bases):
            angles = np.linalg.svd(one.T @ other)[1]  # cosines of the principal angles
            assert found.overlap[a, b] == pytest.approx(np.square(angles).mean(), abs=1e-4)
    assert found.chance == pytest.approx(2 / 28)
    assert (np.diff(found.held_out) >= -1e-9).all()


def test_what_can_t_be_taken_apart_is_refused() -> None:
    with pytest.raises(CausalProbeError, match="takes 10; 9 were given"):
        score_pca(disentangled(), random_tokens(9))
    with pytest.raises(CausalProbeError, match="too few scores"):
        score_pca(disentangled(), random_tokens(20, n=3), n_components=5)


def test_overlaps_with_another_model_and_by_layer() -> None:
    one, two = disentangled((2, 1)), disentangled((2, 1), scale=2.0)
    tokens = random_tokens(30)
    first, second = (score_pca(model, tokens, n_components=2) for model in (one, two))
    assert first.overlap_with(first) == pytest.approx(first.overlap)
    between = first.overlap_with(second)
    for i, u in enumerate(first.components):
        assert u @ u.T == pytest.approx(np.eye(2), abs=1e-6)
        for j, v in enumerate(second.components):
            cosines = np.linalg.svd(u @ v.T, compute_uv=False)  # of the principal angles
            assert between[i, j] == pytest.approx(np.square(cosines).mean(), abs=1e-6)
    by_layer = first.overlap_by_layer
    assert by_layer[0, 1] == pytest.approx(first.overlap[:2, 2].mean())
    assert by_layer[0, 0] == pytest.approx(first.overlap[0, 1])
    assert np.isnan(by_layer[1, 1])  # one head
    with pytest.raises(CausalProbeError, match="`n_components` is 2 here and 1 there"):
        first.overlap_with(score_pca(one, tokens, n_components=1))
