"""von Oswald et al. 2022: with an MLP before it, a linear layer is gradient descent on deep features, seen on sine waves."""

from __future__ import annotations

import math
from functools import partial
from typing import Any

import numpy as np
import torch

from causal_probe import viz
from causal_probe.mechanisms.descent import Algorithm, descent_alignment, feature_descent
from causal_probe.mechanisms.layer_features import function_cosine, layer_features
from causal_probe.models import LinearTransformer
from causal_probe.papers.base import Line, Reproduction, Run, reproduction
from causal_probe.papers.descent import PAPER
from causal_probe.papers.shared import loss_curve, set_weights, stretches, weights_of
from causal_probe.tasks import SineRegression, generator
from causal_probe.training import adam, minimise, regression_loss

__all__ = ["sine"]

#: Least cosine for phases over the whole turn; the authors draw them from half a turn.
LAWS = {"whole turn": 2 * math.pi, "half a turn": math.pi}
#: A layer may read y by its values or by its keys; where it begins by the keys, it stays with one feature, and its loss is five times
#: as large. So a few initialisations are trained for a while, and the one with the lowest training loss goes on.
STARTS = 4
#: The variance of the attention's initial weights is this over their rows; the MLP's is 1 over them.
INITIAL_SCALE = 0.05
STEPS = {True: {"first": 500, "rest": 2_500}, False: {"first": 800, "rest": 8_000}}
BATCH, RATE, CLIP = 256, 3e-3, 1.0
SEQUENCES = {True: 2_000, False: 20_000}
SEEDS = {True: 1, False: 3}


def build() -> LinearTransformer:
    """The authors' 40 features; 64 hidden units instead of their 160."""
    return LinearTransformer(2, 11, d_hidden=64, d_features=40)


def train(run: Run, task: SineRegression, seed: int) -> dict[str, Any]:
    """A model from the best of :data:`STARTS` initialisations, with the losses of all of them."""
    steps = STEPS[run.quick]
    reached: list[tuple[float, LinearTransformer]] = []
    for start in range(STARTS):
        source = generator(seed, f"sine {start}")
        model = build().initialise(source, scale=INITIAL_SCALE)
        stages = adam(steps["first"], batch_size=BATCH, learning_rate=RATE, warm=1.0)
        history = minimise(model, regression_loss(model, task, source), stages, clip=CLIP, progress=run.progress)
        reached.append((float(np.mean(history.loss[-steps["first"] // 5 :])), model))
    _, model = min(reached, key=lambda each: each[0])
    stages = adam(steps["rest"], batch_size=BATCH, learning_rate=RATE, warm=0.3)
    loss = regression_loss(model, task, generator(seed, "sine training"))
    history = minimise(model, loss, stages, clip=CLIP, progress=run.progress)
    return {"losses": stretches(history.loss), "starts": [value for value, _ in reached], **weights_of(model)}


def probe(model: LinearTransformer, task: SineRegression, sequences: int, seed: int) -> dict[str, Any]:
    """The model beside one gradient step on its features in its own metric and as its MLP gives them, on x, and on the waves' own."""
    own = layer_features(model, task, seed=seed)
    algorithms = {
        "own": feature_descent(own, task, name="GD on the model's features, in the layer's metric"),
        "plain": feature_descent(model.features, task, name="GD on the MLP's output"),
        "x": feature_descent(None, task, name="GD on x"),
        "waves": feature_descent(lambda x: torch.cat([x.sin(), x.cos()], -1), task, name="GD on (sin x, cos x)"),
    }
    found = descent_alignment(model, task, algorithms=list(algorithms.values()), n_sequences=sequences, seed=seed)
    batch = task.sample(min(sequences, 2_000), generator(seed, "feature space"))
    row: dict[str, Any] = {
        "off": own.off,
        "spectrum": own.spectrum[:6].tolist(),
        "zero": float(0.5 * batch.target.square().mean()),
    }
    for name, algorithm in algorithms.items():
        functions = function_cosine(model, algorithm, task, batch)
        row[name] = found[0, algorithm.name]._asdict() | _mean("function", functions)
    gain = torch.from_numpy(found.cosine[0, 0] - found.cosine[0, 2])
    return row | _mean("gain", gain)


def _mean(name: str, values: torch.Tensor) -> dict[str, float]:
    return {
        f"{name}_cosine": float(values.mean()),
        f"{name}_cosine_error": float(values.std()) / math.sqrt(len(values)),
    }


@reproduction("sine", "With an MLP, linear attention learns gradient descent on deep features", minutes=(1, 6))
def sine(run: Run) -> Reproduction:
    """A linear layer behind an MLP, trained on sine waves of all phases and of the authors'."""
    laws = dict(list(LAWS.items())[: 1 if run.quick else 2])
    rows: dict[str, list[dict[str, Any]]] = {law: [] for law in laws}
    models: dict[str, LinearTransformer] = {}
    losses: dict[str, dict[str, list[float]]] = {law: {} for law in laws}
    for law, phases in laws.items():
        task = SineRegression(10, phases=phases)
        for seed in range(run.seed, run.seed + SEEDS[run.quick]):
            name = f"{law.replace(' ', '-')}-{seed}"
            kept = run.part(name, partial(train, run, task, seed))
            model = set_weights(build(), kept)
            models.setdefault(law, model)
            losses[law][f"seed {seed}"] = kept["losses"]
            row = run.part(f"{name}-probed", partial(probe, model, task, SEQUENCES[run.quick], seed))
            rows[law].append(row | {"starts": kept["starts"]})
    lines = [line for law, its in rows.items() for line in _lines(law, its, tolerance=1.2 if run.quick else 1.1)]
    summary = "; ".join(f"{law} {min(row['own']['cosine'] for row in its):.3f}" for law, its in rows.items())
    task = SineRegression(10, phases=LAWS["whole turn"])
    own = feature_descent(layer_features(models["whole turn"], task), task, name="GD on the model's features")
    return Reproduction(
        name="sine",
        title="With an MLP, linear attention learns gradient descent on deep features",
        paper=PAPER,
        summary="The least cosine over seeds between the sensitivities of the trained model and of one gradient step on its own features, in the "
        f"layer's metric, by the phases of the waves: {summary}.",
        lines=tuple(lines),
        figures={
            "training": viz.curves(
                {law: {name: loss_curve(each, STEPS[run.quick]["rest"]) for name, each in its.items()} for law, its in losses.items()},
                x_name="training step",
                y_name="loss",
                y_scale="log",
                references={law: {"GD on (sin x, cos x)": its[0]["waves"]["algorithm_loss"]} for law, its in rows.items()},
            ),
            "waves": viz.curves(waves(models["whole turn"], own, task, run.seed), x_name="x", y_name="y"),
        },
        captions={
            "training": "Losses of consecutive steps, after the first phase.",
            "waves": "Three sine waves, what the model predicts from ten examples of each, and what one gradient step on its own features does.",
        },
        notes=(
            "x is a scalar, so that the cosine of two sensitivities to it is the agreement of two signs: 0 is chance, and two good fits of one wave differ near "
            "every extremum. The authors' own code, run for this at batch 256 for 12,000 steps, ends at 0.89 and 0.90 to an MLP trained below a fixed gradient step, "
            "and two such MLPs agree with each other at 0.947 only. Here the features are the model's own, and nothing is trained for the comparison but one step size.",
            "With the authors' phases, half a turn, the coefficient of cos x is never negative. Its mean and the sum of y squared then tell of it, and a layer can use "
            "both without descending; over a whole turn neither tells anything.",
            f"Of {STARTS} initialisations the one with the lowest loss after {STEPS[run.quick]['first']} steps was trained on: "
            + "; ".join(f"{law}: " + ", ".join(f"{value:.4f}" for value in row["starts"]) for law, its in rows.items() for row in its[:1])
            + ". A layer can also read y by its keys and features by its values; from there one head can't reach a second feature.",
            "The MLP maps x to 40 features; y goes past it. In the authors' code the MLP sees both, and is added to a linear embedding.",
        ),
        method="A linear layer behind an MLP was compared with one gradient step on the MLP's features in the metric that the layer's weights define.",
        settings={**run.settings, "training": {**STEPS[run.quick], "batch_size": BATCH, "learning_rate": RATE, "starts": STARTS}, "n_sequences": SEQUENCES[run.quick]},
    )  # fmt: skip


def _lines(law: str, rows: list[dict[str, Any]], *, tolerance: float) -> list[Line]:
    """Measurements under one law of phases, each the worst over several seeds."""
    seeds = f"{len(rows)} seeds, the worst of them" if len(rows) > 1 else "one seed"

    def least(algorithm: str, measure: str = "cosine") -> tuple[float, float]:
        row = min((row[algorithm] for row in rows), key=lambda row: row[measure])
        return row[measure], row[f"{measure}_error"]

    cosine, function = least("own"), least("own", "function_cosine")
    gain = min(row["gain_cosine"] / row["gain_cosine_error"] for row in rows)
    ratio = max(row["own"]["model_loss"] / row["waves"]["algorithm_loss"] for row in rows)
    off, raw = max(row["off"] for row in rows), max(row["x"]["cosine"] for row in rows)
    theirs = "the authors' code and metric, see the notes" if law == "half a turn" else "the paper, in words"
    return [
        Line(f"{law}: loss over that of one gradient step on (sin x, cos x)", ratio, None, "falls to that of GD on a trained MLP", "the paper, in words", ratio <= tolerance, f"at most {tolerance}; {seeds}"),
        Line(f"{law}: share of the layer's metric that is no metric", off, None, 0.0, "a gradient step's is symmetric and positive", off <= 0.1, "at most 0.1 of its norm, read from the weights"),
        Line(f"{law}: sensitivity cosine to GD on the model's own features, in the layer's metric", *cosine, 0.89 if law == "half a turn" else "near 1", theirs, cosine[0] >= 0.95, f"at least 0.95; {seeds}"),
        Line(f"{law}: sensitivity cosine to GD on x", raw, None, "lower", "", gain > 3, "below that on features by more than 3 standard errors, paired, on every seed"),
        Line(f"{law}: cosine of the two predictions as functions of the query, own features", *function, "near 1", "", function[0] >= 0.95, "at least 0.95"),
        Line(f"{law}: sensitivity cosine to GD on the MLP's output as it is", *least("plain"), None, "", None, "depends on the basis of the features, which training has no reason to choose"),
    ]  # fmt: skip


@torch.no_grad()
def waves(
    model: LinearTransformer, algorithm: Algorithm, task: SineRegression, seed: int
) -> dict[str, dict[str, viz.Curve]]:
    """Three waves, and the answers to a model's and an algorithm's queries along them."""
    source = generator(seed, "waves")
    at = torch.linspace(-task.input_scale, task.input_scale, 81)[:, None]
    panels = {}
    for number in range(3):
        amplitude, phase = 0.1 + 0.4 * torch.rand(1, generator=source), task.phases * torch.rand(1, generator=source)
        x = task.input_scale * (2 * torch.rand(1, 10, 1, generator=source) - 1)
        x, y = x.expand(81, -1, -1), (amplitude * torch.sin(x + phase)).expand(81, -1, -1)
        curves = {
            "true": amplitude * torch.sin(at + phase),
            "model": model.predict(task.tokens(x, y, at)),
            "gradient step": algorithm.predict(x, y, at),
        }
        panels[f"wave {number + 1}"] = {
            name: viz.Curve(at[:, 0].tolist(), each[:, 0].tolist()) for name, each in curves.items()
        }
    return panels
