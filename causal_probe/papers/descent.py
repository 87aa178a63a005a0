"""von Oswald et al. 2022: trained linear attention is gradient descent, with more layers GD++."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from typing import Any

import numpy as np
import torch

from causal_probe import viz
from causal_probe.mechanisms.descent import Algorithm, algorithm_of, descent_alignment, interpolate
from causal_probe.models import LinearTransformer
from causal_probe.papers.base import Line, Reproduction, Run, reproduction
from causal_probe.papers.shared import loss_curve, mean_and_error, set_weights, stretches, weights_of
from causal_probe.probes import implied_step
from causal_probe.tasks import LinearRegression, SineRegression, generator, one_step_optimum
from causal_probe.tasks.least_squares import Descent, fit_descent
from causal_probe.training import adam, minimise, regression_loss
from causal_probe.training.stages import Stage

__all__ = ["gradient_descent", "gradient_descent_layers"]

PAPER = ("vonoswald2023",)
#: The initial weights are a quarter of the authors' in variance, so that what training never moves
#: (the columns that write where nothing reads) weighs less in the distance to the form.
INITIAL_SCALE = 5e-4
#: Five layers of shared weights: from small weights a product of this many stays on its plateau, and what two layers learn diverges in
#: five. Adding one layer at a time does neither.
GROWTH = tuple(
    (depth, 0.1, adam(steps, batch_size=512, learning_rate=rate, warm=warm))
    for depth, steps, rate, warm in ((1, 400, 5e-3, 0.3), (2, 800, 3e-3, 0.3), (3, 800, 3e-3, 0.3), (4, 800, 3e-3, 0.3), (5, 3_000, 3e-3, 0.5))
)  # fmt: skip
#: Along the valley of GD++, eta and gamma grow together, and the loss falls little: larger batches, and a smaller rate.
LAST = {"steps": 3_500, "batch_size": 1_024, "learning_rate": 7e-4, "warm": 0.3, "clip": 0.01}


def trained(
    run: Run,
    name: str,
    task: LinearRegression | SineRegression,
    build: Callable[[], LinearTransformer],
    *,
    seed: int,
    scale: float = INITIAL_SCALE,
    growth: Sequence[tuple[int, float, tuple[Stage, ...]]] = (),
    **options: Any,
) -> tuple[LinearTransformer, list[float]]:
    """A model trained on a task in one part of a run, and its losses, averaged over 50 steps each."""

    def train() -> dict[str, Any]:
        model = build().initialise(generator(seed, "weights"), scale=scale)
        if growth:
            model = grown(task, growth, seed=seed, scale=scale, progress=run.progress)
        loss = regression_loss(model, task, generator(seed, "training"))
        clip = options.pop("clip", None)
        history = minimise(model, loss, adam(**options), clip=clip, progress=run.progress)
        return {"losses": stretches(history.loss), **weights_of(model)}

    kept = run.part(name, train)
    return set_weights(build(), kept), kept["losses"]


def grown(
    task: LinearRegression | SineRegression,
    growth: Sequence[tuple[int, float, tuple[Stage, ...]]],
    *,
    seed: int,
    scale: float,
    progress: bool = False,
) -> LinearTransformer:
    """Layers of shared weights, trained one layer deeper at a time: each depth begins with the weights of the last.

    Parameters
    ----------
    growth
        For each depth: how many layers, the largest norm of a gradient, and the stages of its training.
    """
    source, before = generator(seed, "growth"), None
    for depth, clip, stages in growth:
        model = LinearTransformer(task.d_token, task.n_positions, depth, shared=True)
        before = (
            model.initialise(generator(seed, "weights"), scale=scale)
            if before is None
            else set_weights(model, weights_of(before))
        )
        minimise(model, regression_loss(model, task, source), stages, clip=clip, progress=progress)
    assert before is not None
    return before


def _sweep(model: LinearTransformer, algorithm: Algorithm, d: int, n: int, sequences: int) -> dict[str, list[float]]:
    """Losses of model and algorithm away from the training distribution, as multiples of the loss of predicting zero."""
    found: dict[str, list[float]] = {}
    for name, values in (("input", np.linspace(0.5, 2, 7)), ("weight", np.linspace(0.5, 5, 7))):
        for value in values:
            by_name = {"input_scale": 0.5 * value} if name == "input" else {"w_scale": value}
            task = LinearRegression(d, n, **by_name)
            batch = task.sample(sequences, generator(7, "out of distribution"))
            zero = float(batch.target.square().mean())
            with torch.no_grad():
                ours = model.predict(batch.tokens)
                theirs = algorithm.predict(batch.x, batch.y, batch.x_query)
            squares = [(prediction - batch.target).square().squeeze(-1) / zero for prediction in (ours, theirs)]
            found.setdefault(f"{name}_at", []).append(float(value))
            found.setdefault(f"{name}_model", []).append(float(squares[0].mean()))
            found.setdefault(f"{name}_gd", []).append(float(squares[1].mean()))
            gap = squares[0] - squares[1]
            found.setdefault(f"{name}_gap", []).append(float(gap.mean()))
            found.setdefault(f"{name}_gap_error", []).append(float(gap.std()) / math.sqrt(sequences))
    return found


@reproduction("gradient-descent", "One trained linear layer is one step of gradient descent", minutes=(1, 4))
def gradient_descent(run: Run) -> Reproduction:
    """One trained linear layer beside one step of gradient descent."""
    seeds = range(run.seed, run.seed + (2 if run.quick else 5))
    steps, sequences = (1_500, 10_000) if run.quick else (5_000, 100_000)
    task = LinearRegression(10, 10)
    best = one_step_optimum(task)
    assert best.loss is not None
    optimum = best.loss
    reference = algorithm_of(best, task)
    losses, rows = {}, []
    for seed in seeds:
        build = lambda: LinearTransformer(11, 11)  # noqa: E731
        model, losses[seed] = trained(run, f"seed-{seed}", task, build, seed=seed, steps=steps)

        def probe(model: LinearTransformer = model, seed: int = seed) -> dict[str, Any]:
            found = descent_alignment(model, task, algorithms=[reference], n_sequences=sequences, seed=seed)
            line, step = found[0, reference.name], implied_step(model).layers[0]
            middle = descent_alignment(
                interpolate(model, best.eta), task, algorithms=[reference], n_sequences=sequences, seed=seed
            )[0, reference.name]
            return {
                **line._asdict(),
                "eta": step.eta,
                "off_qk": step.off_qk[0],
                "off_ov": step.off_ov[0],
                "off_ov_read": step.off_ov_read[0],
                "middle_excess": middle.excess,
                "middle_excess_error": middle.excess_error,
                **_sweep(model, reference, 10, 10, sequences),
            }

        rows.append(run.part(f"seed-{seed}-probed", probe))

    def each(name: str) -> np.ndarray[Any, Any]:
        return np.array([row[name] for row in rows])

    loss = best.loss + each("excess")  # paired with the closed form's predictor on the same tasks
    off = np.maximum(each("off_qk"), each("off_ov"))
    gap = max(
        max(map(abs, np.subtract(row[f"{name}_model"], row[f"{name}_gd"]) / np.array(row[f"{name}_gd"])))
        for row in rows
        for name in ("input", "weight")
    )
    n = len(rows)

    def over(name: str, values: Any, paper: Any, checked: str, rule: Callable[[Any], Any], words: str) -> Line:
        good = int(np.sum(rule(values)))
        return Line(name, *mean_and_error(values), paper, checked, good == n, f"{words}: {good} of {n} seeds")

    lines = (
        over("loss", loss, 0.2080, "the authors' code, one seed", lambda v: v <= 1.01 * optimum, f"within 1% of the optimum {best.loss:.4f}"),
        over("sensitivity cosine", each("cosine"), 0.9994, "the authors' code", lambda v: v >= 0.999, "at least 0.999"),
        over("sensitivity distance", each("sensitivity_distance"), 0.11, "the authors' code", lambda v: v <= 0.2, "at most 0.2"),
        over("prediction distance", each("prediction_distance"), 0.026, "the authors' code", lambda v: v <= 0.03, "at most 0.03"),
        over("implied eta / N", each("eta"), best.eta[0], "closed form of the optimum", lambda v: abs(v / best.eta[0] - 1) <= 0.03, "within 3%"),
        over("share of the weights off the form", off, None, "", lambda v: v <= 0.05, "at most 5%"),
        over("the same, of what is read", np.maximum(each("off_qk"), each("off_ov_read")), None, "", lambda v: v <= 0.05, "at most 5%"),
        over("loss of the interpolated model", best.loss + each("middle_excess"), "as trained and as GD", "the paper, in words", lambda v: v <= 1.02 * loss, "within 2% of the trained model's"),
        Line("largest relative gap of the losses, out of distribution", float(gap), None, "curves coincide", "the paper, in words", bool(gap < 0.05), "below 5% over inputs at 0.5 to 2 and weights at 0.5 to 5 times the training's"),
    )  # fmt: skip
    first = rows[0]
    figures = {
        "training": viz.curves(
            {"": {f"seed {seed}": loss_curve(values, steps) for seed, values in list(losses.items())[:5]}},
            x_name="training step",
            y_name="loss",
            references={"": {f"one step of GD, {best.loss:.4f}": best.loss}},
        ),
        "out-of-distribution": viz.curves(
            {
                title: {
                    "trained layer": viz.Curve(first[f"{name}_at"], first[f"{name}_model"]),
                    "one step of GD": viz.Curve(first[f"{name}_at"], first[f"{name}_gd"]),
                }
                for name, title in (("input", "wider inputs"), ("weight", "larger weights"))
            },
            x_name="multiple of the training's range",
            y_name="loss / loss of predicting 0",
            y_scale="log",
        ),
    }
    return Reproduction(
        name="gradient-descent",
        title="One linear self-attention layer learns one step of gradient descent",
        paper=PAPER,
        summary=f"On {n} of {n} seeds the trained layer was compared with the best single step of gradient descent: the mean excess "
        f"loss is {float(np.mean(each('excess'))):.1e} of {best.loss:.4f}, the mean sensitivity cosine {float(np.mean(each('cosine'))):.4f}.",
        lines=lines,
        figures=figures,
        captions={
            "training": "Mean losses of consecutive steps, one curve for each seed.",
            "out-of-distribution": "Losses of the first seed's layer and of gradient descent with the step of the training distribution.",
        },
        notes=(
            "Adam at 0.003 for half of the steps, then along half a cosine to zero; the authors have Adam at 0.001, constant, with the "
            "gradient's norm clipped to 0.001. Initial weights have a quarter of the authors' variance.",
            "Losses are paired: the excess over the closed form's predictor on the same tasks, added to that predictor's exact loss.",
            "In the last layer nothing reads the x that is written, so training leaves those columns of W_V W_O where they began; they are "
            "in the share off the form, and out of it in the line below.",
        ),
        method=f"A one-layer linear transformer was trained on in-context linear regression (N = d = 10, inputs uniform in (-0.5, 0.5), "
        f"{steps} steps of 2,048 tasks, {n} seeds) and compared with one step of gradient descent on {sequences} tasks.",
        arrays={"loss": loss, "cosine": each("cosine"), "eta": each("eta")},
        settings={**run.settings, "seeds": list(seeds), "steps": steps, "n_sequences": sequences},
    )


@reproduction(
    "gradient-descent-layers",
    "Layers of shared weights are GD++, gradient descent with curvature correction",
    minutes=(1, 5),
)
def gradient_descent_layers(run: Run) -> Reproduction:
    """Two and five layers of shared weights beside GD and GD++."""
    task = LinearRegression(10, 10)
    sequences = 10_000 if run.quick else 100_000
    depths = (2,) if run.quick else (2, 5)
    lines: list[Line] = []
    panels, references, arrays, settings = {}, {}, {}, {}
    for depth in depths:
        options: dict[str, Any] = {"steps": 1_000 if run.quick else 5_000}
        growth: list[tuple[int, float, tuple[Stage, ...]]] = []
        if depth > 2:
            growth, options = [*GROWTH], {**LAST}
        settings[f"training_{depth}_layers"] = options

        def build(depth: int = depth) -> LinearTransformer:
            return LinearTransformer(11, 11, depth, shared=True)

        model, losses = trained(
            run, f"layers-{depth}", task, build, seed=run.seed, scale=0.002, growth=growth, **options
        )

        def fit(depth: int = depth) -> dict[str, Any]:
            fits = {"gd": (False, False), "gdpp": (True, True), "gd_shared": (False, True)}
            found = {name: fit_descent(task, depth, curvature=c, shared=s) for name, (c, s) in fits.items()}
            return {name: [each.eta, each.gamma, each.loss, each.standard_error] for name, each in found.items()}

        fitted = {
            name: Descent(tuple(eta), tuple(gamma), loss, error)
            for name, (eta, gamma, loss, error) in run.part(f"descents-{depth}", fit).items()
        }

        def probe(depth: int = depth, model: LinearTransformer = model, fitted: Any = fitted) -> dict[str, Any]:
            algorithms = [algorithm_of(fitted[name], task) for name in ("gd", "gdpp")]
            found = descent_alignment(model, task, algorithms=algorithms, n_sequences=sequences, seed=run.seed)
            gd, gdpp = (found[-1, algorithm.name]._asdict() for algorithm in algorithms)
            closer, closer_error = found.closer(algorithms[1].name, algorithms[0].name)
            gain = found.cosine[-1, 1] - found.cosine[-1, 0]
            return {
                "gd": gd, "gdpp": gdpp, "closer": closer, "closer_error": closer_error,
                "cosine_gain": float(gain.mean()), "cosine_gain_error": float(gain.std() / math.sqrt(len(gain))),
                "by_layer": found.model_loss.mean(1).tolist(),
            }  # fmt: skip

        row = run.part(f"layers-{depth}-probed", probe)
        gd, gdpp = row["gd"], row["gdpp"]
        ratio = gdpp["model_loss"] / gdpp["algorithm_loss"]
        error = gdpp["excess_error"] / gdpp["algorithm_loss"]
        lines += [
            Line(f"{depth} layers: loss", gdpp["model_loss"], None, "below GD", "the paper, in words", gd["excess"] + 3 * gd["excess_error"] < 0, f"below {depth} steps of GD ({gd['algorithm_loss']:.4f}, steps fitted one by one) by more than 3 standard errors, paired"),
            Line(f"{depth} layers: loss over that of fitted GD++", ratio, error, 1.0, "the paper, in words", ratio <= 1.03, "at most 1.03, paired"),
            Line(f"{depth} layers: sensitivity cosine to GD++", gdpp["cosine"], gdpp["cosine_error"], "near 1", "the paper, in words"),
            Line(f"{depth} layers: the same to GD", gd["cosine"], gd["cosine_error"], "lower", "the paper, in words", row["cosine_gain"] > 3 * row["cosine_gain_error"], "below that to GD++ by more than 3 standard errors, paired"),
            Line(f"{depth} layers: predictions nearer to GD++ than to GD by", row["closer"], row["closer_error"], "positive", "the paper, in words", row["closer"] > 3 * row["closer_error"], "more than 3 standard errors"),
        ]  # fmt: skip
        panels[f"{depth} layers"] = {"trained": loss_curve(losses, options["steps"])}
        references[f"{depth} layers"] = {
            f"{name}, {row[key]['algorithm_loss']:.4f}": row[key]["algorithm_loss"]
            for key, name in (("gd", "GD"), ("gdpp", "GD++"))
        }
        arrays[f"by_layer_{depth}"] = np.array(row["by_layer"])
    return Reproduction(
        name="gradient-descent-layers",
        title="Layers of linear self-attention learn gradient descent with curvature correction",
        paper=PAPER,
        summary="; ".join(f"{line.quantity}: {line.ours:.4f}" for line in lines if "over that" in line.quantity) + ".",
        lines=tuple(lines),
        figures={"training": viz.curves(panels, x_name="training step", y_name="loss", references=references)},
        captions={"training": "Loss in training; the lines are GD and GD++ with as many fitted steps."},
        notes=(
            "Layers share their weights, as the authors' recurrent models; GD++ has one eta and one gamma for all of its steps, fitted to "
            "the task, and plain GD a fitted step of its own for each.",
            "Five layers are grown: one layer is trained, then two that begin with its weights, and so on; the weights of the construction are "
            "nowhere put in. Losses of deep models have heavy tails: a rare sequence whose sum of x x' has a large eigenvalue counts for many.",
        ),
        method="Recurrent linear transformers were compared with fitted gradient descent and GD++.",
        arrays=arrays,
        settings={**run.settings, **settings, "n_sequences": sequences},
    )
