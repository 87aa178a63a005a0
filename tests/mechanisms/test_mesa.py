"""Mesa-optimizers: a hand-set one, trained ones, and layers that are none."""

from __future__ import annotations

import pytest
import torch

from causal_probe import CausalProbeError
from causal_probe.mechanisms import mesa_optimizer, mesa_recovery, train_mesa
from causal_probe.models import LinearTransformer, mesa_step
from causal_probe.tasks import AutoregressiveProcess


def test_the_hand_set_layer_is_recognised() -> None:
    process = AutoregressiveProcess(3, 12, start="sparse", scale=0.5)
    found = mesa_optimizer(mesa_step(3, 11, a=2.0, b=2.0), process, n_sequences=200)
    assert found.product == pytest.approx(4) == pytest.approx(found.limit)
    assert found.off_kq == found.off_pv == 0
    assert found.best_step == pytest.approx(4, rel=1e-5)
    assert found.step_distance < 1e-3
    assert found.error < 1e-3
    assert found.verdict.startswith("one gradient step of size 4 ")
    assert found.verdict.endswith("and recovers W")


def test_what_is_recovered_is_what_the_formula_recovers() -> None:
    process = AutoregressiveProcess(3, 12, start="ones")
    found = mesa_optimizer(mesa_step(3, 11, a=process.limit, b=1.0), process, n_sequences=2_000)
    direct, error = mesa_recovery(process, n_sequences=2_000)
    assert abs(found.error - direct) < 5 * error
    assert "misses W" in found.verdict


def test_recovery_by_start_and_length() -> None:
    def at(start: str, length: int) -> float:
        return mesa_recovery(AutoregressiveProcess(3, length, start=start), n_sequences=500)[0]

    assert max(at("sparse", 5), at("sparse", 50)) < 1e-5
    assert at("ones", 200) < 0.4 * at("ones", 10)
    assert at("normal", 200) > 0.7 * at("normal", 10) > 0.5


def test_other_weights_are_no_gradient_step() -> None:
    process = AutoregressiveProcess(3, 12)
    model = mesa_step(3, 11)
    with torch.no_grad():
        model.blocks[0].attn.W_V[0, 0, 1] = 1.0
    found = mesa_optimizer(model, process, n_sequences=200)
    assert not found.is_gradient_step
    assert found.verdict.startswith("not vanilla gradient descent")
    assert found.off_pv == pytest.approx(0.5)  # one of four equal entries: a share of 1/2 of the norm
    assert "moment condition" in repr(found)
    assert "zheng2024" in found.cite().bibtex


@pytest.mark.parametrize(("start", "steps"), [("sparse", 80), ("ones", 120)])
def test_training_from_the_saddle(start: str, steps: int) -> None:
    process = AutoregressiveProcess(2, 8, start=start)
    trained = train_mesa(process, a=0.3, b=0.2, steps=steps, batch_size=128, rate=0.3)
    assert trained.product[0] == pytest.approx(0.06)
    found = mesa_optimizer(trained.model, process, n_sequences=1_000)
    assert trained.product[-1] == pytest.approx(found.product)
    if start == "sparse":
        assert found.product == pytest.approx(process.limit, rel=0.02)
        assert found.is_gradient_step
    else:
        assert not found.is_gradient_step
        assert abs(found.off_diagonal[0]) > 0.02


def test_what_it_refuses() -> None:
    process = AutoregressiveProcess(3, 12)
    for model in (mesa_step(2, 11), mesa_step(3, 5), LinearTransformer(6, 11, d_out=3, mask="causal")):
        with pytest.raises(CausalProbeError, match="one complex linear layer"):
            mesa_optimizer(model, process)
    with pytest.raises(CausalProbeError, match="real form"):
        train_mesa(AutoregressiveProcess(3, 12, real=True))
    with pytest.raises(CausalProbeError, match="At least 2 sequences"):
        mesa_optimizer(mesa_step(3, 11), process, n_sequences=1)
