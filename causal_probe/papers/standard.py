"""A standard softmax transformer, as TransformerLens makes it, trained on in-context regression: which algorithm does it run?"""

from __future__ import annotations

import math
import warnings
from functools import partial
from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor, nn

from causal_probe import viz
from causal_probe.hooks import on_residual_stream
from causal_probe.mechanisms.descent import DescentAlignment, descent_alignment, reference_algorithms
from causal_probe.papers.base import Line, Reproduction, Run, reproduction
from causal_probe.papers.shared import loss_curve, set_weights, stretches, weights_of
from causal_probe.tasks import LinearRegression, generator
from causal_probe.tasks.regression import TokenForm
from causal_probe.training import adam, minimise

__all__ = ["OnVectors", "softmax"]

D_X, EXAMPLES = 3, 8
#: Of the standard model; what else is TransformerLens' default, with layer norms and MLPs.
SHAPE: dict[str, Any] = {"n_layers": 2, "n_heads": 4, "d_model": 32, "d_head": 8, "d_mlp": 128, "act_fn": "gelu"}
TRAINING = {True: {"steps": 1_000, "batch_size": 128}, False: {"steps": 8_000, "batch_size": 512}}
SEQUENCES = {True: 2_000, False: 20_000}
FORMS: tuple[TokenForm, ...] = ("joint", "separate")


class OnVectors(nn.Module):
    """A TransformerLens model with a trainable map into its stream and one out of it: tokens [batch, pos, d_token] to answers.

    Parameters
    ----------
    task
        Whose tokens it reads.
    generator
        Of the initial weights: matrices normal with variance 1 / rows, vectors as TransformerLens has them.
    """

    def __init__(self, task: LinearRegression, generator: torch.Generator) -> None:
        super().__init__()
        self.model = standard_model(task.n_positions)
        d_model = SHAPE["d_model"]
        self.read_in = nn.Parameter(torch.zeros(task.d_token, d_model))
        self.read_out = nn.Parameter(torch.zeros(d_model, task.d_out))
        with torch.no_grad():
            for parameter in self.parameters():
                if parameter.ndim > 1:
                    drawn = torch.randn(parameter.shape, generator=generator)
                    parameter.copy_(drawn / math.sqrt(max(parameter.shape[-2:])))

    def forward(self, tokens: Float[Tensor, "batch pos d_token"]) -> Float[Tensor, "batch d_out"]:
        """The answer to the last token."""
        return on_residual_stream(self.model, read_in=self.read_in, read_out=self.read_out)(tokens)


def standard_model(n_positions: int) -> Any:
    """A ``HookedTransformer`` on TransformerLens 3, a native bridge on 4. Its token embedding is never used."""
    shape = {
        **SHAPE,
        "n_ctx": n_positions,
        "d_vocab": 1,
        "normalization_type": "LN",
        "seed": 0,
        "default_prepend_bos": False,
    }
    with torch.random.fork_rng(devices=[]):  # it draws initial weights that are drawn again
        try:
            from transformer_lens import HookedTransformer
        except ImportError:
            from transformer_lens.model_bridge.sources import boot_native

            return boot_native(shape)
        with warnings.catch_warnings():
            warnings.filterwarnings("ignore", "HookedTransformer is deprecated", DeprecationWarning)
            return HookedTransformer(shape)


def train(run: Run, task: LinearRegression) -> dict[str, Any]:
    """The weights and losses of one model."""
    model = OnVectors(task, generator(run.seed, "weights"))
    source, options = generator(run.seed, "training"), TRAINING[run.quick]

    def loss(batch_size: int) -> Tensor:
        batch = task.sample(batch_size, source)
        value: Tensor = 0.5 * (model(batch.tokens) - batch.target).square().sum(-1).mean()
        return value

    history = minimise(model, loss, adam(**options, warm=0.3), clip=1.0, progress=run.progress)
    return {"losses": stretches(history.loss), **weights_of(model)}


def align(run: Run, task: LinearRegression, model: OnVectors) -> DescentAlignment:
    """The trained model beside gradient descent, GD++ and least squares."""
    return descent_alignment(
        model, task, algorithms=reference_algorithms(task, 2), n_sequences=SEQUENCES[run.quick], seed=run.seed
    )


@reproduction("softmax", "Which algorithm does a standard softmax transformer run in context?", minutes=(1, 19))
def softmax(run: Run) -> Reproduction:
    """Two layers of a standard transformer on joint and on separate tokens."""
    lines: list[Line] = []
    panels: dict[str, dict[str, viz.Curve]] = {}
    references: dict[str, dict[str, float]] = {}
    nearest = {}
    for form in FORMS:
        task = LinearRegression(D_X, EXAMPLES, input_scale=1.0, form=form)
        kept = run.part(form, partial(train, run, task))

        def probe(task: LinearRegression = task, kept: dict[str, Any] = kept) -> dict[str, Any]:
            model = set_weights(OnVectors(task, generator(run.seed, "weights")), kept)
            found = align(run, task, model)
            return {"lines": [line._asdict() for line in found], "best": found.best().algorithm}

        row = run.part(f"{form}-probed", probe)
        nearest[form] = row["best"]
        by_name = {line["algorithm"]: line for line in row["lines"]}
        step = by_name["GD, 1 step"]
        zero = D_X * task.input_variance / 2
        lines += [
            Line(f"{form} tokens: loss", step["model_loss"], None, None, "", None, f"predicting 0: {zero:.4f}, one step of GD: {step['algorithm_loss']:.4f}"),
            Line(f"{form} tokens: excess over one step of GD", step["excess"], step["excess_error"], None, "", step["excess"] + 3 * step["excess_error"] < 0, "below 0 by more than 3 standard errors, paired: it does more than one step"),
            *(
                Line(f"{form} tokens: sensitivity cosine to {name}", line["cosine"], line["cosine_error"], None, "", None, f"distance of the predictions {line['prediction_distance']:.3f}, loss {line['algorithm_loss']:.4f}")
                for name, line in by_name.items()
            ),
        ]  # fmt: skip
        steps = TRAINING[run.quick]["steps"]
        panels[form] = {"trained": loss_curve(kept["losses"], steps)}
        references[form] = {
            f"{name}, {by_name[name]['algorithm_loss']:.4f}": by_name[name]["algorithm_loss"]
            for name in ("GD, 1 step", "GD++, 2 steps")
        }
    return Reproduction(
        name="softmax",
        title="Which algorithm does a standard softmax transformer run in context?",
        paper=("vonoswald2023",),
        summary="; ".join(f"{form} tokens: nearest to {name}" for form, name in nearest.items()) + ".",
        lines=tuple(lines),
        figures={"training": viz.curves(panels, x_name="training step", y_name="loss", references=references)},
        captions={"training": "Loss in training, beside one step of gradient descent and two of GD++."},
        notes=(
            "The paper's claims are about linear attention; nothing here bears them out or refutes them. The same questions are put to a model that any "
            "tool can load: vectors enter at hook_embed, and the answer is read from the residual stream of the last position.",
            f"d = {D_X}, N = {EXAMPLES}, inputs uniform in (-1, 1); {SHAPE['n_layers']} layers of {SHAPE['n_heads']} heads with layer norms and MLPs, causal.",
        ),
        method="A two-layer softmax transformer was trained on in-context linear regression and compared with known algorithms.",
        settings={**run.settings, "model": SHAPE, "training": TRAINING[run.quick], "n_sequences": SEQUENCES[run.quick]},
    )  # fmt: skip
