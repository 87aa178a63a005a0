"""Vectors into models of token ids, and token ids into models of vectors."""

from __future__ import annotations

import pytest
import torch

from causal_probe import CausalProbeError
from causal_probe.hooks import on_residual_stream
from causal_probe.hooks.continuous import OnSequences
from causal_probe.mechanisms import descent_alignment
from causal_probe.models import LinearTransformer
from causal_probe.tasks import LinearRegression
from tests.tiny_models import transformer_lens


def test_vectors_take_the_place_of_the_embedding() -> None:
    model = transformer_lens()
    d_model = model.cfg.d_model
    ids = torch.tensor([[1, 3, 0, 2]])
    seen: dict[str, torch.Tensor] = {}
    hooks = [
        (name, lambda value, hook, name=name: seen.__setitem__(name, value.detach().clone()))
        for name in ("hook_embed", "blocks.1.hook_resid_post")
    ]
    with torch.no_grad():
        model.run_with_hooks(ids, fwd_hooks=hooks)
    predict = on_residual_stream(model, read_in=torch.eye(d_model), read_out=torch.eye(d_model)[:, :2])
    found = predict(seen["hook_embed"])  # its own embedding, given as vectors, is the model as it is
    torch.testing.assert_close(found.detach(), seen["blocks.1.hook_resid_post"][:, -1, :2], rtol=1e-4, atol=1e-5)


def test_a_transformer_lens_model_is_asked_which_algorithm_it_runs() -> None:
    """An untrained one runs none of them: the cosine is that of unrelated directions, or nearly."""
    model, task = transformer_lens(), LinearRegression(3, 5)
    generator = torch.Generator().manual_seed(0)
    predict = on_residual_stream(
        model,
        read_in=torch.randn(4, model.cfg.d_model, generator=generator),
        read_out=0.1 * torch.randn(model.cfg.d_model, 1, generator=generator),
    )
    found = descent_alignment(predict, task, n_sequences=200)
    line = found[0, "GD, 1 step"]
    assert line.cosine is not None
    assert abs(line.cosine) < 0.5
    assert line.model_loss > line.algorithm_loss


def test_ids_name_the_vectors_of_sequences() -> None:
    model = LinearTransformer(3, 5).initialise(torch.Generator().manual_seed(0), scale=1.0)
    sequences = torch.randn(4, 5, 3, generator=torch.Generator().manual_seed(1))
    held = OnSequences(model, sequences)
    assert held.tokens.shape == (4, 5)
    torch.testing.assert_close(held(held.tokens[1:3]), model(sequences[1:3]))
    torch.testing.assert_close(held.run_with_hooks(held.tokens), model(sequences))
    with pytest.raises(CausalProbeError, match="Between 1 and 1 layers"):
        OnSequences(model, sequences, layers=2)


def test_a_model_without_the_hook_point() -> None:
    with pytest.raises(CausalProbeError, match="hook_embeds"):
        on_residual_stream(transformer_lens(), read_in=torch.eye(16), read_out=torch.eye(16), at="hook_embeds")
