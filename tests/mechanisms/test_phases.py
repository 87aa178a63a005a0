"""Mixtures of reference predictors: planted ones are found, the optimum is that of another solver, stages are seen in order."""

from __future__ import annotations

import re
from typing import Any

import numpy as np
import pytest
import torch
from scipy.optimize import minimize

from causal_probe.errors import CausalProbeError
from causal_probe.mechanisms import WatchPhases
from causal_probe.mechanisms.phases import EVEN, Phases, fit_mixture
from causal_probe.tasks import GraphMixture, MarkovMixture, generator

TASK = MarkovMixture(3, n_positions=20, d_vocab=4, concentration=0.5, seed=1)
BATCH = TASK.sample(64, generator(1, "phases"))
REFERENCES = {name: predict(BATCH)[:, 1:] for name, predict in TASK.references().items()}


def test_a_planted_mixture_is_found() -> None:
    p = torch.stack([*REFERENCES.values()]).flatten(1, 2).numpy()
    planted = np.array([0.1, 0.0, 0.25, 0.05, 0.6])
    weights, divergence = fit_mixture(np.tensordot(planted, p, 1), p)
    np.testing.assert_allclose(weights, planted, atol=0.02)
    assert divergence.mean() < 2e-5


@pytest.mark.parametrize("seed", range(4))
def test_the_divergence_is_the_least(seed: int) -> None:
    """Against softmax coordinates and BFGS from several starts, on predictions that are no mixture."""
    rng = np.random.default_rng(seed)
    q, p = rng.dirichlet([0.5] * 4, size=60), rng.dirichlet([0.3] * 4, size=(5, 60))
    weights, divergence = fit_mixture(q, p)
    mixed_in = (1 - EVEN) * p + EVEN / 4

    def other(z: np.ndarray) -> float:
        w = np.exp(z - z.max())
        mixed = np.tensordot(w / w.sum(), mixed_in, 1)
        return float((q * np.log(q / mixed)).sum() / 60)

    best = min(minimize(other, rng.normal(size=5), method="BFGS").fun for _ in range(3))
    assert weights.sum() == pytest.approx(1)
    assert weights.min() >= 0
    assert divergence.mean() == pytest.approx(best, abs=2e-5)
    assert divergence.mean() >= best - 1e-8


def test_certain_references_that_are_wrong_do_no_harm() -> None:
    q = np.full((3, 2), 0.5)
    weights, divergence = fit_mixture(q, np.stack([np.eye(2)[[0, 0, 0]], q]))
    assert weights[1] > 0.999
    assert divergence.mean() < 1e-4


class Plays:
    """Predicts as a mixture of references that changes with the step."""

    def __init__(self, weights: dict[str, float]) -> None:
        self.weights = weights

    def __call__(self, tokens: torch.Tensor) -> torch.Tensor:
        assert torch.equal(tokens, BATCH.tokens)
        law = sum(weight * REFERENCES[name] for name, weight in self.weights.items())
        assert isinstance(law, torch.Tensor)
        return torch.nn.functional.pad(law.clamp_min(1e-12).log(), (0, 0, 0, 1))  # row t predicts token t + 1


def stages() -> Phases:
    watch = WatchPhases.of_task(TASK, BATCH)
    for step in range(0, 120, 10):
        name = "uniform" if step < 40 else "inference, unigram" if step < 70 else "retrieval, bigram"
        watch(step, Plays({name: 0.9, "inference, bigram": 0.1}))
    return watch.phases()


def test_stages_are_found_in_order(tmp_path: Any) -> None:
    found = stages()
    assert found.leading == (("uniform", 0, 30), ("inference, unigram", 40, 60), ("retrieval, bigram", 70, 110))
    assert found.nearest == ("uniform",) * 4 + ("inference, unigram",) * 3 + ("retrieval, bigram",) * 5
    changes = found.dynamics().changes
    assert (changes["uniform"].step, changes["retrieval, bigram"].step) == (40, 70)  # type: ignore[union-attr]
    assert found.residual.max() < 2e-5
    np.testing.assert_allclose(found.weights.sum(1), 1)
    own = found.weights[-1, found.names.index("retrieval, bigram")]
    assert own == pytest.approx(0.9, abs=0.05)
    found.save(tmp_path / "phases.safetensors")
    again = Phases.load(tmp_path / "phases.safetensors")
    assert again.to_dict() == found.to_dict()
    assert len(found.plot().axes) == 2
    assert "park2025" in found.cite().bibtex


def test_what_no_reference_explains_is_the_residual() -> None:
    watch = WatchPhases.of_task(TASK, BATCH, names=["uniform", "inference, unigram"])
    for step in range(4):
        watch(step, Plays({"retrieval, bigram": 1.0}))
    found = watch.phases()
    q, even = REFERENCES["retrieval, bigram"].numpy(), 1 / 4
    alone = (q * np.log(np.maximum(q, 1e-12) / even)).sum(-1).mean()
    assert found.divergence[0, 0] == pytest.approx(alone, abs=1e-5)
    assert 0.05 < found.residual[0] <= found.divergence[0].min() + 1e-5


def test_standard_errors_are_the_spread_over_data_sets() -> None:
    task = GraphMixture.of_lags((1, 2), 16, 3, seed=2)
    batch = task.sample(32 * 24, generator(2, "spread"))
    names = ["in-context bigram", "lag 1", "lag 2"]
    made, errors = [], []
    for part in batch.tokens.split(32):
        its = type(batch)(part, batch.labels[:32])
        references = {name: task.references()[name](its)[:, 3:] for name in names}
        # the square of a law: no mixture, so that the weights depend on the sequences
        law = (0.5 * references["lag 1"] + 0.5 * references["in-context bigram"]) ** 2
        law = law / law.sum(-1, keepdim=True)
        watch = WatchPhases(references, lambda model, law=law: law)
        watch(0, None)
        made.append(watch._found[0][0])
        errors.append(watch._found[0][1])
    spread, said = np.std(made, axis=0, ddof=1), np.sqrt(np.mean(np.square(errors), axis=0))
    assert (spread[:2] > 0.003).all()
    np.testing.assert_allclose(said[:2], spread[:2], rtol=0.5)


def watched_twice() -> None:
    watch = WatchPhases(REFERENCES, lambda model: torch.ones(64, 19, 4).double() / 4)
    watch(3, None)
    watch(3, None)


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: fit_mixture(np.ones((2, 2)), np.ones((1, 2, 2)) / 2), "predictions are not all probabilities"),
        (lambda: fit_mixture(np.ones((2, 2)) / 2, np.ones((1, 3, 2)) / 2), "found [2, 2] and [1, 3, 2]"),
        (lambda: fit_mixture(np.ones((2, 2)) / 2, np.ones((1, 2, 2)) / 2, start=np.array([np.nan])), "finite and not negative; found [nan]"),
        (lambda: fit_mixture(np.ones((2, 2)) / 2, np.ones((1, 2, 2)) / 2, start=np.ones(2)), "must be 1 weights"),
        (watched_twice, "Step 3 was to be watched after step 3"),
        (lambda: WatchPhases({"one": torch.ones(20, 2, 2) / 2}, lambda model: model), "two references or more"),
        (lambda: WatchPhases({name: torch.ones(9, 2, 2) / 2 for name in "ab"}, lambda model: model), "16 sequences"),
        (lambda: WatchPhases.of_task(TASK, BATCH, names=["bigram"]), "no reference 'bigram'. References: uniform,"),
        (lambda: WatchPhases.of_task(TASK, BATCH, first=20), "`first` is 20. It must be a whole number from 1 to 19"),
        (lambda: WatchPhases.of_task(TASK, BATCH).phases(), "four moments or more; 0"),
        (lambda: WatchPhases(REFERENCES, lambda model: torch.ones(2, 3, 4) / 4)(0, None), "of [2, 3, 4], the references of [64, 19, 4]"),
    ],
)  # fmt: skip
def test_bad_input(make: Any, message: str) -> None:
    with pytest.raises(CausalProbeError, match=re.escape(message)):
        make()
