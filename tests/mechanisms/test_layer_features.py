"""The features of a layer behind an MLP: of layers that are a gradient step on known features, and of layers that are none."""

from __future__ import annotations

import pytest
import torch
from jaxtyping import Float
from torch import Tensor

from causal_probe import CausalProbeError
from causal_probe.mechanisms import descent_alignment, feature_descent, layer_features
from causal_probe.mechanisms.layer_features import function_cosine
from causal_probe.models import LinearTransformer
from causal_probe.tasks import SineRegression, generator

D = 4
TASK = SineRegression(8)


def layer(metric: Float[Tensor, "d d"], *, by_keys: float = 0.0) -> LinearTransformer:
    """A drawn MLP below a layer with prediction = sum_j y_j phi(x_j)' G phi(x_q), and by_keys times sum_j y_j^2 beside."""
    model = LinearTransformer(2, 9, d_hidden=12, d_features=D, dtype=torch.float64)
    model.initialise(generator(0, "weights"))
    attention = model.blocks[0].attn
    with torch.no_grad():
        for weight in (attention.W_Q, attention.W_K, attention.W_V, attention.W_O):
            weight.zero_()
        attention.W_Q[0, :D, :D] = metric.mT  # scores are phi(x_q) . G' phi(x_j)
        attention.W_Q[0, :D, D] = by_keys
        attention.W_K[0] = torch.eye(D + 1)
        attention.W_V[0] = torch.eye(D + 1)
        attention.W_O[0, D, D] = -1
    return model


def positive() -> Float[Tensor, "d d"]:
    root = torch.randn(D, D, generator=generator(1, "metric"), dtype=torch.float64)
    return root @ root.mT


def cosines(model: LinearTransformer) -> tuple[float, float]:
    own = feature_descent(layer_features(model, TASK), TASK, name="own", dtype=torch.float64)
    cosine = descent_alignment(model, TASK, algorithms=[own], n_sequences=1_000)[0, "own"].cosine
    assert cosine is not None
    batch = TASK.sample(200, generator(3, "x"), dtype=torch.float64)
    return cosine, float(function_cosine(model, own, TASK, batch).mean())


def test_a_positive_metric_is_a_gradient_step_on_features() -> None:
    model = layer(positive())
    found = layer_features(model, TASK)
    assert found.off < 1e-6
    x = TASK.sample(50, generator(2, "x"), dtype=torch.float64).x_query
    assert model.features is not None
    phi = model.features(x)
    torch.testing.assert_close(found(x) @ found(x).mT, phi @ positive() @ phi.mT)  # C'C = G
    assert cosines(model) == pytest.approx((1, 1), abs=1e-9)


def test_they_do_not_depend_on_the_basis_of_the_mlp() -> None:
    model = layer(positive())
    turned = layer(positive())
    B = torch.randn(D, D, generator=generator(4, "basis"), dtype=torch.float64)
    inverse = torch.linalg.inv(B)
    with torch.no_grad():
        assert turned.features is not None
        turned.features.W_out.copy_(turned.features.W_out @ B)  # phi -> phi B, and G -> B^-1 G B^-1'
        turned.features.b_out.copy_(turned.features.b_out @ B)
        turned.blocks[0].attn.W_Q[0, :D, :D] = inverse @ positive() @ inverse.mT
    x = TASK.sample(50, generator(2, "x"), dtype=torch.float64).x_query
    one, other = layer_features(model, TASK), layer_features(turned, TASK)
    torch.testing.assert_close(one(x) @ one(x).mT, other(x) @ other(x).mT)
    torch.testing.assert_close(one.spectrum, other.spectrum)
    # One plain step on the MLP's output does depend on it, though both models are one function.
    plain = feature_descent(turned.features, TASK, name="plain", dtype=torch.float64)
    assert descent_alignment(turned, TASK, algorithms=[plain], n_sequences=500)[0, "plain"].prediction_distance > 0.01


def test_a_metric_that_is_none_is_told() -> None:
    turn = torch.zeros(D, D, dtype=torch.float64)
    turn[0, 1], turn[1, 0] = 1, -1
    found = layer_features(layer(turn), TASK)
    assert found.off > 0.9  # antisymmetric: nothing of it is a metric
    assert layer_features(layer(-positive()), TASK).off == pytest.approx(1)
    mixed = layer(positive() + 3 * positive().norm() * turn)
    assert 0.5 < layer_features(mixed, TASK).off < 1
    assert cosines(mixed)[1] < 0.9


def test_what_else_the_weights_do_is_seen_in_the_cosine() -> None:
    assert cosines(layer(positive(), by_keys=100.0))[1] < 0.7


def test_an_untrained_layer_is_no_gradient_step() -> None:
    model = LinearTransformer(2, 9, d_hidden=12, d_features=D).initialise(generator(5, "weights"), scale=1.0)
    own = feature_descent(layer_features(model, TASK), TASK, name="own")
    cosine = descent_alignment(model, TASK, algorithms=[own], n_sequences=500)[0, "own"].cosine
    assert cosine is not None
    assert cosine < 0.9


def test_what_it_refuses() -> None:
    with pytest.raises(CausalProbeError, match="one linear layer behind an MLP"):
        layer_features(LinearTransformer(2, 9), TASK)
    with pytest.raises(CausalProbeError, match="one linear layer behind an MLP"):
        layer_features(LinearTransformer(2, 9, 2, d_hidden=4, d_features=4), TASK)
    with pytest.raises(CausalProbeError, match="pass no y on"):
        layer_features(LinearTransformer(2, 9, d_hidden=4, d_features=4), TASK)
