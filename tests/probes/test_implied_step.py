"""The step that weights imply: golden constructions, and weights that imply none."""

from __future__ import annotations

import math

import numpy as np
import pytest
import torch

from causal_probe import CausalProbeError
from causal_probe.models import DisentangledTransformer, LinearTransformer, gradient_steps
from causal_probe.probes import implied_step


def test_of_a_construction_it_is_the_construction() -> None:
    found = implied_step(gradient_steps(3, 5, eta=[0.4, 0.6], gamma=[0.1, 0.0], d_out=2))
    assert found.eta == pytest.approx((0.4, 0.6))
    assert found.gamma == pytest.approx((0.1, 0.0))
    for layer in found.layers:
        assert layer.preconditioner is not None
        torch.testing.assert_close(layer.preconditioner, torch.eye(3, dtype=torch.float64))
        assert layer.off_qk == layer.off_ov == layer.off_ov_read == pytest.approx((0.0,), abs=1e-6)
        assert layer.off_form == pytest.approx(0.0, abs=1e-3)  # the root of a rounding error


def test_a_factor_that_moves_between_the_products_changes_nothing() -> None:
    model = gradient_steps(3, 5, eta=[0.4])
    with torch.no_grad():
        model.blocks[0].attn.W_Q *= -7
        model.blocks[0].attn.W_O /= -7
    assert implied_step(model).eta == pytest.approx((0.4,))


def test_heads_add_up() -> None:
    one, two = gradient_steps(3, 5, eta=[0.4]), LinearTransformer(4, 6, 1, 2)
    with torch.no_grad():
        for name in ("W_Q", "W_K", "W_V", "W_O"):
            getattr(two.blocks[0].attn, name).copy_(getattr(one.blocks[0].attn, name).expand(2, -1, -1))
    found = implied_step(two).layers[0]
    assert found.eta == pytest.approx(0.8)
    assert found.off_form == pytest.approx(0.0, abs=1e-3)


def test_a_start_belongs_to_the_form_only_if_it_is_given() -> None:
    W0 = torch.tensor([[1.0, -2.0, 0.5]])
    model = gradient_steps(3, 5, eta=[0.4], W0=W0)
    assert implied_step(model, W0=W0).eta == pytest.approx((0.4,))
    assert implied_step(model, W0=W0).layers[0].off_form == pytest.approx(0.0, abs=1e-3)
    # of the column (0.4 W0', -0.4), W0' is off the form of descent from zero
    expected = math.sqrt(float(W0.square().sum()) / float(1 + W0.square().sum()))
    assert implied_step(model).layers[0].off_ov == pytest.approx((expected,))


def test_the_share_off_the_form_by_hand() -> None:
    model = gradient_steps(2, 5, eta=[1.0])
    with torch.no_grad():
        model.blocks[0].attn.W_Q[0, 0, 1] = 1.0  # QK: I + one entry off the diagonal
        model.blocks[0].attn.W_O[0, 0, 1] = 2.0  # OV: y -> y at -1, and x_0 -> x_1, which nothing reads
    layer = implied_step(model).layers[0]
    assert layer.off_qk == pytest.approx((math.sqrt(1 / 3),))
    assert layer.off_ov == pytest.approx((math.sqrt(4 / 5),))
    assert layer.off_ov_read == pytest.approx((0.0,))
    assert layer.off_form == pytest.approx(math.sqrt(1 / 3))
    assert layer.preconditioner is not None
    np.testing.assert_allclose(layer.preconditioner, [[1, 1], [0, 1]])


def test_random_weights_imply_no_step() -> None:
    found = implied_step(LinearTransformer(6, 6).initialise(torch.Generator().manual_seed(0), scale=1.0)).layers[0]
    assert found.off_form is not None
    assert found.off_form > 0.9
    nothing = implied_step(LinearTransformer(6, 6)).layers[0]
    assert nothing.off_form is None
    assert nothing.preconditioner is None
    assert nothing.off_qk == (None,)


def test_a_subspace_of_a_wider_stream() -> None:
    model = gradient_steps(3, 5, eta=[0.4])
    rotation = torch.linalg.qr(torch.randn(9, 9, generator=torch.Generator().manual_seed(0))).Q[:4]

    class Wide:
        W_Q, W_K, W_V = (rotation.T @ w for w in (model.W_Q, model.W_K, model.W_V))
        W_O = model.W_O @ rotation

    found = implied_step(Wide(), d_x=3, d_out=1, read_in=rotation)
    assert found.eta == pytest.approx((0.4,), rel=1e-5)
    assert found.layers[0].off_ov[0] == pytest.approx(0.0, abs=1e-5)


def test_what_it_refuses() -> None:
    with pytest.raises(CausalProbeError, match="has no weights W_Q"):
        implied_step(DisentangledTransformer(3, 5))
    model = LinearTransformer(4, 6)
    with pytest.raises(CausalProbeError, match="need a read_in of shape"):
        implied_step(model, read_in=torch.eye(3))


def test_it_prints_and_cites() -> None:
    found = implied_step(gradient_steps(3, 5, eta=[0.4]))
    assert repr(found).splitlines()[-1].split()[:2] == ["0", "0.4"]
    assert "vonoswald2023" in found.cite().bibtex
    assert list(found.to_pandas().columns) == ["layer", "eta", "gamma", "off_qk", "off_ov", "off_ov_read", "off_form"]
