"""von Oswald et al. 2022: with x and y in separate tokens, the first softmax layer learns to copy neighbours."""

from __future__ import annotations

from typing import Any

import numpy as np
import torch

from causal_probe import viz
from causal_probe.hooks.continuous import OnSequences
from causal_probe.models import LinearTransformer
from causal_probe.papers.base import Line, Reproduction, Run, reproduction
from causal_probe.papers.shared import set_weights, stretches, weights_of
from causal_probe.probes import copy_sensitivity, scan
from causal_probe.tasks import LinearRegression, generator, one_step_optimum
from causal_probe.training import adam, minimise, regression_loss

__all__ = ["copy"]

#: Wide positions: of ten entries, as the authors have, few tell neighbours apart, and the head stays diffuse for thousands of steps.
POSITIONS = 40
#: Of the initial weights; from the authors' 0.02 the plateau before the first copy is longer.
INITIAL_SCALE = 0.3


@reproduction("copy", "With separate tokens, the first softmax layer copies neighbours", minutes=(1, 3))
def copy(run: Run) -> Reproduction:
    """A softmax layer below a linear one, on separate tokens: the link to induction heads."""
    d, n = 3, 5
    task = LinearRegression(d, n, form="separate")
    options: dict[str, Any] = {"steps": 3_000 if run.quick else 8_000, "batch_size": 256 if run.quick else 1_024}
    rows = list(range(1, 2 * n, 2))  # the positions of y_1, y_2, ...: their left neighbours are x_1, x_2, ...
    inputs = task.sample(64, generator(run.seed, "copy probe")).tokens

    def build() -> LinearTransformer:
        return LinearTransformer(
            task.d_token, task.n_positions, 2, softmax=(True, False), mask="causal", d_positions=POSITIONS
        )

    def measure(model: LinearTransformer) -> tuple[float, float]:
        held = OnSequences(model, inputs, layers=1)
        score = next(iter(scan(held, held.tokens, templates=["previous-token"], queries=rows))).score
        share, _ = copy_sensitivity(model, inputs[:8]).share(-1, rows)
        assert score is not None
        assert share is not None
        return score, share

    def train() -> dict[str, Any]:
        model = build().initialise(generator(run.seed, "weights"), scale=INITIAL_SCALE)
        every, seen = options["steps"] // 20, []

        def watch(step: int) -> None:
            if step % every == 0:
                seen.append((step, *measure(model)))

        loss = regression_loss(model, task, generator(run.seed, "training"))
        history = minimise(model, loss, adam(**options), callback=watch, progress=run.progress)
        step, score, share = zip(*seen, strict=True)
        return {
            "losses": stretches(history.loss, 50),
            "step": step,
            "score": score,
            "share": share,
            **weights_of(model),
        }

    kept = run.part("model", train)
    model = set_weights(build(), kept)
    held = OnSequences(model, inputs, layers=1)
    scores = scan(held, held.tokens, templates=["previous-token"], queries=rows)
    head, called = next(iter(scores)), bool(scores.called())
    found = copy_sensitivity(model, inputs)
    left, left_error = found.share(-1, rows)
    own, own_error = found.share(0, rows)
    with torch.no_grad():
        batch = task.sample(20_000, generator(run.seed, "evaluation"))
        loss = float(0.5 * (model.predict(batch.tokens) - batch.target).square().sum(-1).mean())
    best = one_step_optimum(task).loss
    assert best is not None
    assert left is not None
    lines = (
        Line("attention of layer 0 from y_j to x_j (scan, previous-token)", head.score, head.stderr, "copies neighbours", "the paper, in words", called, f"scan itself calls it a previous-token head: excess over chance {head.excess:.3f}, surely above 0.5"),
        Line("share of layer 0's sensitivity that is to the left neighbour", left, left_error, "dominates", "the paper, in words", left > 0.5, "the copy probe, on the rows of y_j: above one half"),
        Line("share that is to the token itself", own, own_error, None, "the paper, in words", None, ""),
        Line("loss", loss, None, "about one step of GD", "the paper, in words", loss < 1.1 * best, f"within 10% of the best single step on joined tokens, {best:.4f}"),
    )  # fmt: skip
    return Reproduction(
        name="copy",
        title="With separate tokens, the first softmax layer learns to copy neighbours",
        paper=("vonoswald2023", "olsson2022"),
        summary=f"Layer 0 attends from y_j to x_j with weight {head.score:.3f}; the scan {'calls' if called else 'does not call'} it a "
        f"previous-token head, the first half of an induction head. The loss is {loss:.4f} beside {best:.4f} for one step of GD.",
        lines=lines,
        figures={
            "training": viz.curves(
                {
                    "loss": {"model": viz.Curve(50 * np.arange(len(kept["losses"])), kept["losses"])},
                    "layer 0": {
                        "attention to the left neighbour": viz.Curve(kept["step"], kept["score"]),
                        "share of the sensitivity": viz.Curve(kept["step"], kept["share"]),
                    },
                },
                x_name="training step",
                y_name=("loss", ""),
                references={"loss": {f"one step of GD, {best:.4f}": best}},
            )
        },
        captions={"training": "The loss falls as the first layer learns to copy x_j into y_j's position."},
        notes=(
            "Layers are causal, so that what is copied lies to the left and the copying head is a previous-token head. The authors' layers see "
            "both sides, and theirs copy from the right. Here y has an entry of its own.",
            f"N = {n} and d = {d}, {POSITIONS} entries of positions (the authors: 10, 10 and 10); the second layer is linear, as in their notebook.",
        ),
        method="A two-layer transformer with a softmax layer below a linear one was trained on regression with separate tokens.",
        settings={**run.settings, "training": options, "N": n, "d": d},
    )
