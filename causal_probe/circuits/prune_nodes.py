"""Which heads and MLPs does a behaviour need? Greedy pruning over nodes, from the last layer to the first and back, to a fixed point."""

from __future__ import annotations

import math
from collections.abc import Callable, Collection, Mapping, Sequence
from functools import partial
from typing import Annotated, Any, Literal

import numpy as np
import torch
from jaxtyping import Float, Int
from torch import Tensor
from tqdm.auto import tqdm

from causal_probe.arguments import Help, Seed
from causal_probe.circuits.contrasts import ABOUT, contrast_of
from causal_probe.circuits.interventions import Interventions, edges_of, placed
from causal_probe.circuits.judging import FEWEST, smallest_effect
from causal_probe.circuits.known import Edge
from causal_probe.circuits.nodes import NodeCircuit, Sweep
from causal_probe.circuits.partial import Layers
from causal_probe.circuits.prompts import Prompts, Score
from causal_probe.circuits.pruning import prune
from causal_probe.errors import CausalProbeError
from causal_probe.hooks import attention_hook
from causal_probe.hooks.batches import probe
from causal_probe.hooks.check import HookedModel, describe, live_hooks, undisturbed
from causal_probe.probes.qk_stream import layer_of

__all__ = ["prune_nodes"]

#: By this many passes nothing changes any more, or the search ends.
MOST_SWEEPS = 20

Share = Annotated[float, Help("A share.", above=0, below=1)]
Draws = Annotated[int, Help("How many.", least=0)]


@probe
def prune_nodes(
    model: HookedModel,
    prompts: Any,
    metric: Literal["logit-difference", "probability-difference"] = "logit-difference",
    *,
    keep: Share = 0.8,
    contrast: Literal["corrupted-mean", "mean-by-position", "zero"] = "corrupted-mean",
    edges: bool = False,
    n_random: Draws = 20,
    seed: Seed = 0,
    progress: bool = False,
) -> NodeCircuit:
    """Find the heads and MLPs that a behaviour needs, by iterative node pruning.

    Nodes are tried one after another, alternately from the last layer to the first and from the first to the last. A node is ablated for good if
    the metric without it and without all that went before is at least ``keep`` times the clean one; until a pass takes nothing away. Half of the prompts, drawn at random, serve
    the search; the circuit's share is reported on the other half, beside random circuits. There is no test of single nodes: what stands in for another may be left
    out, and which of the two depends on the order. :func:`~causal_probe.circuits.find_circuit` tests edges.

    Parameters
    ----------
    model
        A causal model whose sources add to one stream.
    prompts
        :class:`~causal_probe.circuits.Prompts` with wrong answers, such as those of :func:`~causal_probe.circuits.task_prompts`; 16 at least.
    metric
        Of the prompts, positive in the clean model.
    keep
        The share of the clean metric that is to be left.
    contrast
        By what a head's ``hook_z`` or an MLP's ``hook_mlp_out`` is replaced: its mean over the corrupted prompts at each position, that over the clean ones, or zero.
    edges
        Prune the edges between what is left, too, from the logits back, by the same rule (two forwards and more an edge).
    n_random
        How many random circuits.
    seed
        Of the split and of the random circuits.
    progress
        Show a bar of each pass, on standard error.

    Raises
    ------
    CausalProbeError
        If there are too few prompts, they have no wrong answers or no corrupted prompts and those are asked for; the metric is not positive, or doesn't fall when every node is ablated;
        or nothing depends on the heads' hook points.

    References
    ----------
    Lan, Torr & Barez, "Towards Interpretable Sequence Continuation: Analyzing Shared Circuits in Large Language Models", 2024 (keep = 0.8). Conmy et al., "Towards Automated Circuit Discovery", 2023 (the greedy rule over
    edges).

    Examples
    --------
    >>> from causal_probe import circuits
    >>> known = circuits.known_circuit("key-composition")
    >>> tokens = known.sample(48, torch.Generator().manual_seed(0))
    >>> answers = known.model(tokens)[:, -1].argsort(-1, descending=True)
    >>> prompts = circuits.Prompts("mine", tokens, (tokens.shape[1] - 1,), answers[:, None, :1], answers[:, None, 1:2])
    >>> prune_nodes(known.model, prompts, contrast="mean-by-position").nodes
    ('L0H0', 'L1H0')
    """
    if not isinstance(prompts, Prompts):
        raise CausalProbeError(
            f"`prompts` is a {type(prompts).__name__}. Give circuits.Prompts, such as circuits.task_prompts(model, 'successor')."
        )
    if len(prompts) < 2 * FEWEST:
        raise CausalProbeError(
            f"{len(prompts)} prompts can't be split into search and report: give {2 * FEWEST} at least."
        )
    if contrast == "corrupted-mean" and prompts.corrupted is None:
        raise CausalProbeError(
            "The contrast 'corrupted-mean' takes corrupted prompts, and there are none. Give them, or choose mean-by-position."
        )
    score = prompts.score(metric)
    order = torch.randperm(len(prompts), generator=torch.Generator().manual_seed(seed))
    halves = [half.sort().values for half in order.tensor_split(2)]
    with undisturbed(model):
        device = describe(model)["device"] or "cpu"
        tokens = prompts.tokens.to(device)
        layers = Layers(model, tokens)

        def replaced_by(rows: Tensor) -> Tensor | None:
            chosen = prompts.corrupted if contrast == "corrupted-mean" else prompts.tokens
            return None if contrast == "zero" or chosen is None else chosen[rows].to(device)

        ablated = [Ablated(layers, tokens[rows.to(device)], replaced_by(rows), score, rows) for rows in halves]
        search, report = ablated
        clean = search.before.mean().item()
        if not clean > 0:
            raise CausalProbeError(
                f"The metric ({metric}) is {clean:.3g} without any change, and a share of it means nothing. Does the model do the task?"
            )
        if not report.before.mean().item() > 0:
            raise CausalProbeError(
                f"The metric ({metric}) is {report.before.mean().item():.3g} on the prompts of the report, and {clean:.3g} on those of the search. Give more prompts."
            )
        smallest_effect(None, search.before, search.before - search.without(search.nodes), metric, "every node")
        left_out, sweeps = _swept(search, keep * clean, progress)
        left = [node for node in search.nodes if node not in set(left_out)]
        kept, kept_stderr = _ratio(report.without(left_out), report.before)
        drawn = np.random.default_rng(seed)
        others = [_random(search.nodes, left, drawn) for _ in range(n_random)]
        random_kept = tuple(
            _ratio(report.without([n for n in search.nodes if n not in each]), report.before)[0] for each in others
        )
        found: tuple[Edge, ...] | None = None
        edges_kept: tuple[float | None, float | None] = (None, None)
        if edges:
            found, edges_kept = _edges(layers, prompts, contrast, score, halves, left, keep)
        return NodeCircuit(
            nodes=tuple(left),
            candidates=len(search.nodes),
            clean=report.before.mean().item(),
            baseline=report.without(report.nodes).mean().item(),
            kept=kept,
            kept_stderr=kept_stderr,
            random_kept=random_kept,
            sweeps=tuple(sweeps),
            edges=found,
            edges_kept=edges_kept[0],
            edges_kept_stderr=edges_kept[1],
            settings={
                "prompts": prompts.name,
                **{f"prompts_{key}": value for key, value in prompts.settings.items()},
                "metric": metric,
                "keep": keep,
                "contrast": contrast,
                "contrast_is": ABOUT[contrast],
                "edges": edges,
                "n_random": n_random,
                "seed": seed,
                "split": [len(rows) for rows in halves],
                "heads": layers.heads,
                "not_pruned": search.fixed,
            },
            provenance=describe(model),
        )


class Ablated:
    """A model on some prompts, with nodes ablated: their outputs are replaced by the same whatever comes before them.

    Attributes
    ----------
    nodes
        All that can be ablated, from the first layer to the last.
    fixed
        MLPs that can't.
    before
        The metric of the unedited model, by row.
    """

    def __init__(
        self,
        layers: Layers,
        tokens: Int[Tensor, "row pos"],
        others: Int[Tensor, "row pos"] | None,
        score: Score,
        rows: Int[Tensor, " row"],
    ) -> None:
        self.layers, self.tokens, self.score, self.rows = layers, tokens, score, rows
        points = {layer: attention_hook(layer, "z") for layer in layers.carriers}
        mlps = {n: f"blocks.{n}.hook_mlp_out" for n in range(layers.n) if layers.reader.has_mlps}
        names = [*points.values(), *mlps.values()]
        found, logits = layers.run(tokens, names=[*names, *layers.reader.streams])
        assert logits is not None
        self.before = self._scored(logits)
        live = live_hooks(
            layers.model, [name for name in names if name in found], lambda: self._scored(layers.model(tokens))
        )
        if dead := [name for name in points.values() if name not in live]:
            raise CausalProbeError(
                f"The metric does not depend on the value at {dead[0]}, so heads can't be ablated. Load it with eager attention."
            )
        if others is not None:
            found, _ = layers.run(others, names=names)
        self.means = {
            name: torch.zeros_like(found[name][:1]) if others is None else found[name].mean(0, keepdim=True)
            for name in live
        }
        self.hooks: dict[str, tuple[str, int | None]] = {}
        for layer in range(layers.n):
            self.hooks |= {f"L{layer}H{head}": (points[layer], head) for head in range(layers.heads[layer])}
            if mlps.get(layer) in live:
                self.hooks[f"L{layer}.mlp"] = (mlps[layer], None)
        self.nodes = [*self.hooks]
        self.fixed = [f"L{layer}.mlp" for layer, name in mlps.items() if name not in live]
        self._below: tuple[tuple[int, frozenset[str]], Tensor] | None = None

    def _scored(self, logits: Tensor) -> Float[Tensor, " row"]:
        return self.score(logits, self.rows).double()

    def without(self, gone: Collection[str]) -> Float[Tensor, " row"]:
        """The metric with these nodes ablated, by row."""
        _, logits = self.layers.run(self.tokens, puts=self._puts(gone))
        assert logits is not None
        return self._scored(logits)

    def value(self, gone: Sequence[str]) -> float:
        """The mean metric; the stream below the last of these nodes is kept until other nodes are gone below it."""
        layer = layer_of(gone[-1])
        below = frozenset(node for node in gone if layer_of(node) < layer)
        if self._below is None or self._below[0] != (layer, below):
            name = self.layers.reader.streams[layer]
            found, _ = self.layers.run(self.tokens, puts=self._puts(below), names=[name], stop=name)
            self._below = (layer, below), found[name]
        logits = self.layers.to_logits(self.tokens, layer, self._below[1], self._puts(set(gone) - below))
        return float(self._scored(logits).mean())

    def _puts(self, gone: Collection[str]) -> dict[str, Callable[[Tensor], Tensor]]:
        """By hook point, the value with what is gone replaced by its mean."""
        heads: dict[str, list[int]] = {}
        puts: dict[str, Callable[[Tensor], Tensor]] = {}
        for node in gone:
            name, head = self.hooks[node]
            if head is None:
                puts[name] = partial(_as_large, self.means[name])
            else:
                heads.setdefault(name, []).append(head)
        return puts | {name: partial(_replaced, self.means[name], which) for name, which in heads.items()}


def _as_large(mean: Tensor, value: Tensor) -> Tensor:
    return mean.to(value).expand_as(value)


def _replaced(
    mean: Float[Tensor, "one pos head d"], heads: list[int], z: Float[Tensor, "row pos head d"]
) -> Float[Tensor, "row pos head d"]:
    z = z.clone()
    z[:, :, heads] = mean[:, :, heads].to(z)
    return z


def _swept(run: Ablated, least: float, progress: bool) -> tuple[list[str], list[Sweep]]:
    """What is taken away, and the passes."""
    gone: list[str] = []
    now, sweeps = float(run.before.mean()), []
    clean = now
    for number in range(MOST_SWEEPS):
        backward = number % 2 == 0
        left = [node for node in run.nodes if node not in set(gone)]
        before = len(gone)
        gone, now = prune(
            tqdm(left[::-1] if backward else left, desc=f"pass {number + 1}", disable=not progress),
            run.value,
            lambda now, after: after >= least,
            gone=gone,
            now=now,
        )
        sweeps.append(Sweep("backward" if backward else "forward", len(run.nodes) - len(gone), now / clean))
        if len(gone) == before:
            break
    return gone, sweeps


def _random(nodes: Sequence[str], left: Sequence[str], drawn: np.random.Generator) -> set[str]:
    """As many heads in each layer, and as many MLPs."""
    found: set[str] = set()
    kinds: dict[Any, list[str]] = {}
    for node in nodes:
        kinds.setdefault("mlp" if node.endswith(".mlp") else layer_of(node), []).append(node)
    for its in kinds.values():
        n = sum(node in set(left) for node in its)
        found |= {its[i] for i in drawn.choice(len(its), n, replace=False)}
    return found


def _ratio(after: Float[Tensor, " row"], before: Float[Tensor, " row"]) -> tuple[float, float]:
    """The share of the mean that is left, and its standard error (first order)."""
    share = float(after.mean() / before.mean())
    rest = (after - share * before).cpu().numpy()
    return share, float(rest.std(ddof=1) / abs(float(before.mean())) / math.sqrt(len(rest)))


def _edges(
    layers: Layers,
    prompts: Prompts,
    contrast: str,
    score: Score,
    halves: Sequence[Tensor],
    left: Sequence[str],
    keep: float,
) -> tuple[tuple[Edge, ...], tuple[float, float]]:
    """The edges between what is left, pruned from the logits back on the first half; and the share that they keep on the second."""
    runs = []
    for rows in halves:
        device = next(iter(layers.W_O)).device
        clean = layers.clean(prompts.tokens[rows].to(device))
        broken = None if prompts.corrupted is None else layers.clean(prompts.corrupted[rows].to(device))
        made = contrast_of(contrast, layers, clean, broken, frozenset(), torch.Generator().manual_seed(0))
        runs.append(Interventions(layers, clean, made, score, rows))
    search, report = runs
    every = edges_of(layers, search.read)
    there: Mapping[str, bool] = dict.fromkeys([*left, "logits", *layers.reader.embeddings], True)
    between = [
        (source, receiver)
        for source, receiver in every
        if (source in there or source.endswith(".mixer")) and _owners(layers, search, receiver) & {*there}
    ]
    gone = [edge for edge in every if edge not in set(between)]
    order = [edge for name in reversed(search.read) for edge in reversed([each for each in between if each[1] == name])]
    least = keep * float(search.before.mean())
    cut, _ = prune(
        order,
        lambda cut: float(search.without(cut).mean()),
        lambda now, after: after >= least,
        gone=gone,
        now=float(search.without(gone).mean()),
    )
    kept = tuple(edge for edge in between if edge not in set(cut))
    return kept, _ratio(report.without(cut), report.before)


def _owners(layers: Layers, run: Interventions, receiver: str) -> set[str]:
    """The nodes that a receiver belongs to: a head, all heads that share keys or values, an MLP, the logits."""
    its = run.read[placed(receiver)[0]]
    if its.side in ("mlp", "logits"):
        return {receiver}
    size = layers.heads[its.layer] // layers.groups[its.layer][its.side]
    return {f"L{its.layer}H{its.number * size + n}" for n in range(size)}
