"""Which edges of a model carry what a metric asks for? Screened, tested one by one, and reported on three separate parts of the prompts."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Any, Literal

import torch
from jaxtyping import Int
from torch import Tensor

from causal_probe.arguments import Count, Level, Seed
from causal_probe.circuits.contrasts import contrast_of
from causal_probe.circuits.found import Circuit
from causal_probe.circuits.interventions import Interventions
from causal_probe.circuits.judging import split
from causal_probe.circuits.partial import Layers
from causal_probe.circuits.prompts import Prompts, Score
from causal_probe.circuits.three_parts import Asked, screen_test_report
from causal_probe.errors import CausalProbeError
from causal_probe.hooks.batches import probe, read_tokens
from causal_probe.hooks.check import HookedModel, describe, undisturbed
from causal_probe.hooks.record import token_batches
from causal_probe.hooks.tokens import special_tokens

__all__ = ["find_circuit"]

LOSS = "log-probability of the next token"

Metric = Callable[[Tensor, Tensor], Tensor]


@probe
def find_circuit(
    model: HookedModel,
    prompts: Any,
    metric: str | Metric | None = None,
    *,
    contrast: str = "resample",
    level: Level = 0.05,
    delta: float | None = None,
    correction: Literal["fdr", "family-wise"] = "fdr",
    most: Count = 400,
    sampled: Count = 40,
    pairs: int | None = None,
    sizes: Count = 4,
    seed: Seed = 0,
    progress: bool = False,
) -> Circuit:
    """Find the edges that carry a behaviour, with a test for each.

    An edge goes from what writes into the stream (embeddings, heads, MLPs) to what reads it (a head's queries, keys and values, an MLP, the logits). It is ablated by
    replacing, in the receiver's input alone, what the source has written there; all behind is computed anew. Prompts are split at random into three parts:

    1. *Screen*: every edge's effect to first order. The ``most`` - ``sampled`` largest are tested, and ``sampled`` drawn at random from the others, which tell
       what the screen has missed. Where there are no more than ``most`` edges, all are tested.
    2. *Test*: each edge is ablated alone. Estimand: the mean fall of the metric. H0: at most ``delta``. Unit of replication: the prompt; one-sided paired t-test. Family:
       the tested edges, by Benjamini and Hochberg at ``level`` (or by Holm).
    3. *Report*: effects of confirmed edges again; the circuit kept alone and taken away alone, beside random edges.

    Parameters
    ----------
    model
        A causal model whose sources add to one stream.
    prompts
        :class:`~causal_probe.circuits.Prompts`, such as those of :func:`~causal_probe.circuits.task_prompts`; or tokens [prompt, pos].
    metric
        Of ``Prompts``: ``"logit-difference"`` (default where there are wrong answers), ``"log-probability"``, ``"probability-difference"``. Of tokens: a function
        (logits [row, pos, vocabulary], tokens [row, pos]) -> [row], higher is better; None for the mean log-probability of the next token (the loss, its sign turned).
        The metric is signed: a distance from the clean run, such as KL, is never at most 0 without an edge, so a test of it against ``delta`` says nothing.
    contrast
        By what a part is replaced. ``"resample"``: by that at another (prompt, position), position 0, special tokens and outlier positions neither taken nor replaced;
        ``"mean"``: by the mean of these; ``"mean-by-position"``; ``"corrupted"``: by that in the corrupted prompt; ``"corrupted-mean"``: by the mean over
        corrupted prompts at each position; ``"zero"``. What clean and replaced parts have in common is in no circuit: ``settings["contrast_is"]`` says what that is.
    level
        Of the tests.
    delta
        The smallest effect of interest, in units of the metric; None: a hundredth of the metric's fall when every edge is ablated, on the prompts of the screen.
    correction
        ``"fdr"``: the expected share of false ones among the confirmed edges is at most ``level``; ``"family-wise"``: the probability of any.
    most, sampled
        How many edges are tested; how many of these are drawn at random.
    pairs
        Among so many edges that are not confirmed, those of the largest estimates, all pairs are ablated together, to see what stands in for what (OR gates).
        None: 16 where every edge is tested, else 0.
    sizes
        At how many sizes the circuit is kept and taken away.
    seed
        Of the split and of the draws.
    progress
        Show a bar of the edges that are tested, on standard error.

    Raises
    ------
    CausalProbeError
        If there are fewer than 24 prompts; the metric doesn't fall when every edge is ablated; there is no such contrast or metric; or the model's parts of a
        forward pass can't be run, or its stream can't be taken apart.

    References
    ----------
    Elhage et al., "A Mathematical Framework for Transformer Circuits", 2021. Hanna et al., "Have Faith in Faithfulness", 2024 (gradients along a path). Shi et al.,
    "Hypothesis Testing the Circuit Hypothesis in LLMs", 2024 (tests of whole circuits). Kramar et al., "AtP*", 2024 (what a screen misses). Miller et al., "Transformer
    Circuit Faithfulness Metrics Are Not Robust", 2024 (it depends on the contrast).

    Examples
    --------
    >>> from causal_probe import circuits
    >>> known = circuits.known_circuit("key-composition")
    >>> tokens = known.sample(96, torch.Generator().manual_seed(0))
    >>> found = find_circuit(known.model, tokens, known.metric)
    >>> found.compare(known)[:2], len(found.confirmed), round(found.kept, 2)
    ((1.0, 1.0), 9, 1.0)
    """
    given, name, score = _asked(model, prompts, metric)
    tokens, corrupted = given.tokens, given.corrupted
    parts = split(len(tokens), seed)
    asked = Asked(level, delta, correction, most, sampled, pairs, sizes, seed, progress)
    generator = torch.Generator().manual_seed(seed)
    with undisturbed(model):
        device = describe(model)["device"] or "cpu"
        tokens = tokens.to(device)
        layers, special = Layers(model, tokens), special_tokens(model).ids

        def runs(number: int) -> Interventions:
            rows = parts[number]
            clean = layers.clean(tokens[rows.to(device)])
            broken = (
                None
                if corrupted is None or not contrast.startswith("corrupted")
                else layers.clean(corrupted[rows].to(device))
            )
            made = contrast_of(contrast, layers, clean, broken, special, generator)
            return Interventions(layers, clean, made, score, rows)

        found = screen_test_report(layers, runs, name, contrast, asked)
    about = {"prompts": given.name, **{f"prompts_{key}": value for key, value in given.settings.items()}}
    return replace(found, settings={**found.settings, **about}, provenance=describe(model))


# ------------------------------------------------------------------------------------------------------------ what is asked


@dataclass(frozen=True)
class _Given:
    name: str
    tokens: Tensor
    corrupted: Tensor | None
    settings: dict[str, Any]


def _asked(model: HookedModel, prompts: Any, metric: Any) -> tuple[_Given, str, Score]:
    """The prompts, the metric's name, and the metric by rows."""
    if isinstance(prompts, Prompts):
        if metric is not None and not isinstance(metric, str):
            raise CausalProbeError(
                "Prompts with answers have metrics of their own, by name; give a function with plain tokens."
            )
        name = metric or ("log-probability" if prompts.wrong is None else "logit-difference")
        corrupted = None if prompts.corrupted is None else _tokens(model, prompts.corrupted)
        given = _Given(prompts.name, _tokens(model, prompts.tokens), corrupted, dict(prompts.settings))
        return given, name, prompts.score(name)
    tokens = _tokens(model, prompts)
    given = _Given("tokens", tokens, None, {})
    if metric is None:
        if tokens.shape[1] < 2:
            raise CausalProbeError("A next token has a token before it: give prompts of two tokens or more.")
        return given, LOSS, lambda logits, rows: _next_token(logits, given.tokens[rows])
    if isinstance(metric, str):
        raise CausalProbeError(
            f"Plain tokens have no answers, so there is no metric {metric!r} of them. Give circuits.Prompts, a function, or None for {LOSS}."
        )

    def score(logits: Tensor, rows: Tensor) -> Tensor:
        values = metric(logits, given.tokens[rows].to(logits.device))
        if not isinstance(values, Tensor) or values.shape != (len(rows),):
            found = list(values.shape) if isinstance(values, Tensor) else type(values).__name__
            raise CausalProbeError(
                f"The metric gives {found} for {len(rows)} rows; it must give one number for each: [{len(rows)}]."
            )
        return values

    return given, str(getattr(metric, "__name__", "metric")), score


def _tokens(model: HookedModel, prompts: Any) -> Int[Tensor, "prompt pos"]:
    batches = list(token_batches(read_tokens(model, prompts)))
    if not batches:
        raise CausalProbeError("There are no prompts.")
    return torch.cat(batches)


def _next_token(logits: Tensor, tokens: Tensor) -> Tensor:
    at = logits[:, :-1].log_softmax(-1)
    return at.gather(-1, tokens[:, 1:, None].to(at.device))[..., 0].mean(-1)
