"""Minimising: against a by-hand descent, and what it refuses."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

from causal_probe import CausalProbeError
from causal_probe.models import LinearTransformer
from causal_probe.tasks import LinearRegression, generator
from causal_probe.training import adam, minimise, regression_loss
from causal_probe.training.checkpoint import Checkpoint
from causal_probe.training.stages import Stage


def parabola(start: float = 3.0) -> nn.Linear:
    model = nn.Linear(1, 1, bias=False)
    nn.init.constant_(model.weight, start)
    return model


def test_sgd_by_hand() -> None:
    model, seen = parabola(), []
    stages = [Stage("one", 3, 7, "sgd", 0.1, ("all",)), Stage("two", 1, 5, "sgd", 0.5, ("all",))]
    history = minimise(
        model,
        lambda n: 0.5 * model.weight.square().sum(),
        stages,
        callback=lambda step: seen.append((step, model.weight.item())),
    )
    w, expected = 3.0, [3.0]
    for rate in (0.1, 0.1, 0.1, 0.5):
        w -= rate * w
        expected.append(w)
    assert [value for _, value in seen] == pytest.approx(expected)
    assert history.loss == pytest.approx([0.5 * value**2 for value in expected[:-1]])
    assert history.stage == ("one", "one", "one", "two")
    assert history.n_sequences == 3 * 7 + 5


@pytest.mark.parametrize("second", ["adamw", "sgd"])
@pytest.mark.parametrize("until", [1, 3, 4, 5, 6, 9, 10])
def test_goes_on_from_a_checkpoint_as_if_nothing_had_happened(until: int, second: Any, tmp_path: Path) -> None:
    """Stopped in each stage, on their border, and after the end; the optimiser's moments live on where consecutive stages share it."""
    stages = [Stage("one", 5, 16, "adamw", 0.01, ("all",)), Stage("two", 5, 16, second, 0.02, ("all",), "cosine")]

    class Stop(Exception):
        pass

    def run(checkpoint: Checkpoint | None, until: int | None = None) -> tuple[dict[str, torch.Tensor], Any]:
        task, source = LinearRegression(2, 4), generator(0, "test")
        model = LinearTransformer(3, 5).initialise(generator(0, "weights"), scale=0.05)

        def stop(step: int) -> None:
            if step == until:
                raise Stop

        loss = regression_loss(model, task, source)
        history = minimise(model, loss, stages, callback=stop, generator=source, checkpoint=checkpoint)
        return model.state_dict(), history

    whole, history = run(None)
    with pytest.raises(Stop):
        run(Checkpoint(tmp_path / "c", {}, every=2), until)
    again, resumed = run(Checkpoint(tmp_path / "c", {}, every=2))
    assert resumed == history
    assert all(torch.equal(whole[name], again[name]) for name in whole)


def test_a_checkpoint_needs_the_data_s_generator(tmp_path: Path) -> None:
    with pytest.raises(CausalProbeError, match="needs the generator of its data"):
        minimise(parabola(), lambda n: torch.zeros(()), [], checkpoint=Checkpoint(tmp_path / "c", {}))


def test_clipping_bounds_the_step() -> None:
    model = parabola()
    minimise(model, lambda n: 0.5 * model.weight.square().sum(), [Stage("one", 1, 1, "sgd", 1.0, ("all",))], clip=0.25)
    assert model.weight.item() == pytest.approx(2.75, abs=1e-4)


def test_a_layer_learns_a_small_task() -> None:
    task = LinearRegression(2, 4)
    model = LinearTransformer(3, 5).initialise(generator(0, "weights"), scale=0.05)
    history = minimise(
        model, regression_loss(model, task, generator(0, "training")), adam(200, batch_size=256, learning_rate=0.02)
    )
    assert len(history.loss) == 200
    assert sum(history.loss[-20:]) < 0.75 * sum(history.loss[:20])


def test_what_it_refuses() -> None:
    model = parabola()
    with pytest.raises(CausalProbeError, match="learning rate 1e\\+10"):
        minimise(model, lambda n: model.weight.pow(4).sum(), [Stage("one", 50, 1, "sgd", 1e10, ("all",))])
    model.weight.requires_grad_(False)
    with pytest.raises(CausalProbeError, match="nothing to train"):
        minimise(model, lambda n: model.weight.sum(), adam(1))
    with pytest.raises(CausalProbeError, match="Build a model of the task's shape"):
        regression_loss(LinearTransformer(3, 5), LinearRegression(3, 4), generator(0, "x"))
