"""Which edges of a model carry what a metric asks for? Screened, tested one by one, and reported on three separate parts of the prompts."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from itertools import combinations
from typing import Any, Literal

import numpy as np
import torch
from jaxtyping import Float, Int
from scipy import stats
from torch import Tensor
from tqdm.auto import tqdm

from causal_probe.arguments import Count, Level, Seed
from causal_probe.circuits.contrasts import ABOUT, contrast_of
from causal_probe.circuits.found import Circuit, CircuitEdge, Gate, Size, members_of
from causal_probe.circuits.interventions import Interventions, edges_of
from causal_probe.circuits.known import Edge
from causal_probe.circuits.partial import SIDES, Layers
from causal_probe.circuits.prompts import Prompts, Score
from causal_probe.circuits.screen import attributions
from causal_probe.errors import CausalProbeError
from causal_probe.hooks.batches import probe, read_tokens
from causal_probe.hooks.check import HookedModel, describe, undisturbed
from causal_probe.hooks.record import token_batches
from causal_probe.hooks.tokens import special_tokens
from causal_probe.probes.p_values import holm, t_interval, t_p_value

__all__ = ["find_circuit"]

#: Prompts in each of the three parts, at least.
FEWEST = 8
#: Among so many unconfirmed edges all pairs are tested, where every edge is.
PAIRED = 16
#: Random circuits of each size.
RANDOM = 3
POWER = 0.8
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
        ``"mean"``: by the mean of these; ``"mean-by-position"``; ``"corrupted"``: by that in the corrupted prompt; ``"zero"``. What clean and replaced parts have in
        common is in no circuit: ``settings["contrast_is"]`` says what that is.
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
    parts = _split(len(tokens), seed)
    if pairs is not None and pairs < 0:
        raise CausalProbeError(f"pairs is {pairs}; it is a whole number of at least 0.")
    if sampled > most:
        raise CausalProbeError(
            f"sampled is {sampled}, and only {most} edges are tested (`most`). Draw fewer at random."
        )
    if level >= 0.5:
        raise CausalProbeError(f"level is {level}; a test of edges has a level below one half.")
    if delta is not None and not 0 <= delta < math.inf:
        raise CausalProbeError(f"delta is {delta}; it is a finite number of at least 0.")
    generator, drawn = torch.Generator().manual_seed(seed), np.random.default_rng(seed)
    with undisturbed(model):
        device = describe(model)["device"] or "cpu"
        tokens = tokens.to(device)
        layers, special = Layers(model, tokens), special_tokens(model).ids

        def runs(number: int) -> Interventions:
            rows = parts[number]
            clean = layers.clean(tokens[rows.to(device)])
            broken = None if corrupted is None or contrast != "corrupted" else layers.clean(corrupted[rows].to(device))
            made = contrast_of(contrast, layers, clean, broken, special, generator)
            return Interventions(layers, clean, made, score, rows)

        # 1. Screen
        run = runs(0)
        edges = edges_of(layers, run.read)
        fall = run.before - run.without(edges)
        least = _smallest(delta, run.before, fall, name)
        screened = attributions(run)
        del run
        chosen, at_random = _chosen(edges, screened, most, sampled, drawn)
        # 2. Test
        run = runs(1)
        with tqdm(total=len(chosen), desc="edges", disable=not progress) as bar:
            effects = run.effects(chosen, bar.update).cpu().numpy()
        tested = _tested(chosen, effects, screened, at_random, level, least, correction)
        confirmed = sorted(
            (edge for edge in chosen if tested[edge].status == "confirmed"), key=lambda edge: -tested[edge].effect
        )
        n_pairs = (PAIRED if len(chosen) == len(edges) else 0) if pairs is None else pairs
        gates = _gates(run, chosen, effects, tested, screened, n_pairs, level, least, correction)
        members = members_of(confirmed, gates)
        del run
        # 3. Report
        run = runs(2)
        baseline = run.without(edges)
        again = dict(zip(members, run.effects(members).cpu().numpy(), strict=True))
        curve = _curve(run, edges, members, baseline, sizes, drawn)
        clean_mean, base_mean = float(run.before.mean()), float(baseline.mean())
    found = list(tested.values())
    for number, edge in enumerate(found):
        if (edge.source, edge.receiver) in again:
            value, stderr, _ = _mean(again[edge.source, edge.receiver])
            found[number] = edge._replace(again=value, again_stderr=stderr)
    unread = [f"L{layer}" for layer in layers.carriers if layers.attends[layer] != SIDES]
    mlps = [f"L{layer}.mlp" for layer, read in enumerate(layers.mlps) if layers.reader.has_mlps and not read]
    settings = {
        "split": [len(rows) for rows in parts], "contrast_is": ABOUT[contrast], "correction": correction, "most": most, "sampled": sampled,
        "pairs": n_pairs, "seed": seed, "prompts": given.name, "attention_not_read": unread, "mlps_not_read": mlps, **{f"prompts_{key}": value for key, value in given.settings.items()},
    }  # fmt: skip
    return Circuit(
        edges=tuple(sorted(found, key=lambda edge: -edge.effect)),
        clean=clean_mean,
        baseline=base_mean,
        delta=least,
        level=level,
        contrast=contrast,
        metric=name,
        candidates=len(edges),
        missed=_missed(found, len(edges)),
        detectable=_detectable([edge.stderr for edge in found], len(parts[1]), level, least),
        sizes=curve,
        gates=gates,
        settings=settings,
        provenance=describe(model),
    )


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


def _split(n: int, seed: int) -> list[Int[Tensor, " row"]]:
    if n < 3 * FEWEST:
        raise CausalProbeError(
            f"{n} prompts can't be split into a screen, a test and a report of {FEWEST} or more each: give {3 * FEWEST} at least, and more for small effects."
        )
    order = torch.randperm(n, generator=torch.Generator().manual_seed(seed))
    third = n // 3
    return [order[:third].sort().values, order[third : n - third].sort().values, order[n - third :].sort().values]


def _smallest(delta: float | None, clean: Tensor, fall: Tensor, name: str) -> float:
    """The smallest effect of interest; a metric that doesn't fall is refused."""
    mean, stderr, n = _mean(fall.cpu().numpy())
    if not bool(torch.isfinite(fall).all()):
        raise CausalProbeError(f"The metric ({name}) is not finite on some prompt, so its falls can't be averaged.")
    if t_p_value(mean, stderr, n) > 0.01:
        raise CausalProbeError(
            f"The metric ({name}) doesn't fall when every edge is ablated: {float(clean.mean()):.4g} without any change, and a fall of {mean:.3g} (standard error {stderr:.2g}). "
            "There is nothing to find: does the model do the task, and is the metric higher where it does?"
        )
    return mean / 100 if delta is None else delta


# -------------------------------------------------------------------------------------------------------------------- tests


def _chosen(
    edges: Sequence[Edge], screened: dict[Edge, float], most: int, sampled: int, drawn: np.random.Generator
) -> tuple[list[Edge], set[Edge]]:
    """The edges that are tested, and those among them that were drawn at random."""
    if len(edges) <= most:
        return list(edges), set()
    order = sorted(edges, key=lambda edge: -abs(screened[edge]))
    best, others = order[: most - sampled], order[most - sampled :]
    some = {others[i] for i in drawn.choice(len(others), sampled, replace=False)}
    wanted = {*best, *some}
    return [edge for edge in edges if edge in wanted], some


def _mean(values: Float[np.ndarray, " row"]) -> tuple[float, float, int]:
    return float(values.mean()), float(values.std(ddof=1) / math.sqrt(len(values))), len(values)


def _adjusted(p_values: list[float], correction: str) -> Float[np.ndarray, " test"]:
    each = np.array(p_values, dtype=float)
    if not len(each):
        return each
    found: np.ndarray = stats.false_discovery_control(each) if correction == "fdr" else holm(each)
    return found


def _tested(
    edges: Sequence[Edge],
    effects: Float[np.ndarray, "edge row"],
    screened: dict[Edge, float],
    at_random: set[Edge],
    level: float,
    delta: float,
    correction: str,
) -> dict[Edge, CircuitEdge]:
    means = [_mean(each) for each in effects]
    above = _adjusted([t_p_value(*mean, above=delta) for mean in means], correction)
    below = _adjusted([t_p_value(-mean[0], *mean[1:], above=delta) for mean in means], correction)
    found = {}
    for edge, mean, p, p_negative in zip(edges, means, above, below, strict=True):
        low, high = t_interval(*mean, coverage=1 - 2 * level) if level < 0.5 else (mean[0], mean[0])
        within = -delta <= low and high <= delta
        status = (
            "confirmed"
            if p <= level
            else "negative"
            if p_negative <= level
            else "negligible"
            if within
            else "undecided"
        )
        value, stderr, _ = mean
        found[edge] = CircuitEdge(
            *edge, status, value, stderr, low, high, float(p), None, None, screened[edge], edge in at_random
        )
    return found


def _missed(edges: Sequence[CircuitEdge], n_edges: int) -> tuple[int, int, float, float] | None:
    """Of edges that the screen left out: tested, confirmed, and the interval of the share (Clopper and Pearson)."""
    if len(edges) == n_edges:
        return None
    left = [edge.status == "confirmed" for edge in edges if edge.sampled]
    interval = stats.binomtest(sum(left), len(left)).proportion_ci(0.95)
    return len(left), sum(left), float(interval.low), float(interval.high)


def _detectable(stderrs: Sequence[float], n: int, level: float, delta: float) -> float:
    """The effect that a test at level / (number of tests), the first step of either correction, finds with probability 0.8."""
    spread = float(np.median([each for each in stderrs if each > 0] or [0.0]))
    reach = stats.t.isf(level / len(stderrs), n - 1) + stats.t.ppf(POWER, n - 1)
    return delta + float(reach) * spread


def _gates(
    run: Interventions,
    edges: Sequence[Edge],
    effects: Float[np.ndarray, "edge row"],
    tested: dict[Edge, CircuitEdge],
    screened: dict[Edge, float],
    n: int,
    level: float,
    delta: float,
    correction: str,
) -> tuple[Gate, ...]:
    """Pairs of unconfirmed edges that have an effect together, and of confirmed edges into one receiver that need each other."""
    if n < 2:
        return ()
    alone = dict(zip(edges, effects, strict=True))
    weak = sorted(
        (e for e in edges if tested[e].status in ("negligible", "undecided")), key=lambda e: -abs(screened[e])
    )[:n]
    strong = sorted((e for e in edges if tested[e].status == "confirmed"), key=lambda e: -tested[e].effect)[:n]
    both = [("or", *pair) for pair in combinations(weak, 2)]
    both += [("and", *pair) for pair in combinations(strong, 2) if pair[0][1] == pair[1][1]]
    joint, p_values = [], []
    for kind, first, second in both:
        together = (run.before - run.without([first, second])).cpu().numpy()
        more = together - alone[first] - alone[second]
        tests = [together, more] if kind == "or" else [-more]
        joint.append(together)
        p_values.append(max(t_p_value(*_mean(each), above=delta) for each in tests))
    found = [
        Gate(kind, " -> ".join(first), " -> ".join(second), *_mean(together)[:2], float(p))
        for (kind, first, second), together, p in zip(both, joint, _adjusted(p_values, correction), strict=True)
        if p <= level
    ]
    return tuple(sorted(found, key=lambda gate: (gate.kind != "or", -gate.effect)))


# -------------------------------------------------------------------------------------------------------------------- report


def _curve(
    run: Interventions,
    edges: Sequence[Edge],
    members: Sequence[Edge],
    baseline: Tensor,
    n_sizes: int,
    drawn: np.random.Generator,
) -> tuple[Size, ...]:
    if not members:
        return ()
    n = len(members)
    wanted = sorted({max(1, round(n ** (i / n_sizes))) for i in range(1, n_sizes + 1)})
    span = (run.before - baseline).cpu().numpy()

    def share(values: Tensor, *, kept: bool) -> tuple[float, float]:
        part = (values - baseline if kept else run.before - values).cpu().numpy()
        ratio = part.mean() / span.mean()
        return float(ratio), float(np.std(part - ratio * span, ddof=1) / abs(span.mean()) / math.sqrt(len(part)))

    def both(circuit: Sequence[Edge]) -> tuple[float, float, float, float]:
        inside = set(circuit)
        others = [edge for edge in edges if edge not in inside]
        return *share(run.without(others), kept=True), *share(run.without(circuit), kept=False)

    found = []
    for size in wanted:
        others = [both([edges[i] for i in drawn.choice(len(edges), size, replace=False)]) for _ in range(RANDOM)]
        found.append(
            Size(
                size,
                *both(members[:size]),
                float(np.mean([o[0] for o in others])),
                float(np.mean([o[2] for o in others])),
            )
        )
    return tuple(found)
