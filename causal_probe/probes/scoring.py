"""Score patterns against templates, batch by batch: the engine under :func:`~causal_probe.probes.scan`."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from jaxtyping import Float, Int
from numpy.typing import NDArray
from torch import Tensor

from causal_probe.errors import CausalProbeError
from causal_probe.hooks import HookedModel, each_batch
from causal_probe.hooks.stream import Reduce, reduce_patterns
from causal_probe.probes.head_scores import Evidence, HeadScores
from causal_probe.probes.targets import Targets, compile_targets
from causal_probe.probes.templates import SHIPPED, Template, find_templates
from causal_probe.results import versions

__all__ = ["Part", "Scored", "micro_batch_size", "micro_batches", "score_batches", "score_patterns", "settings_of"]

#: Without a batch size, what a micro-batch's patterns of all layers, or its logits, take up at most, in bytes: some models keep
#: all patterns for the length of a forward.
MICRO_BATCH = 2**28


@dataclass(frozen=True, eq=False)
class Part:
    """Templates that are scored on the same sequences."""

    templates: tuple[Template, ...]
    tokens: Any
    settings: Mapping[str, Any]


@dataclass(frozen=True, eq=False)
class _Sums:
    """What is left of a batch's pattern [batch, head, query, key]: sums over the scored rows, [batch, head, template]."""

    attention: Tensor
    sink: Tensor


@dataclass(frozen=True, eq=False)
class _Counts:
    """What is left of a batch's targets, [batch, template] and, shared, [template, template]."""

    rows: NDArray[np.int64]
    chance: NDArray[np.float64]
    shared: Any


@dataclass(frozen=True, eq=False)
class Scored:
    """Evidence by template, and the shared targets of pairs of them."""

    evidence: dict[str, Evidence]
    shared: dict[tuple[str, str], int]


def score_batches(
    model: HookedModel,
    templates: tuple[Template, ...],
    batches: Any,
    queries: Sequence[int] | None,
    batch_size: int | None,
) -> Scored:
    """Run a model over batches of tokens, once, and score every head's patterns at their hooks."""
    counts: list[_Counts] = []

    def reducer(tokens: Tensor) -> Reduce[_Sums]:
        targets = compile_targets(templates, tokens, queries=queries)
        counts.append(_count(targets))
        return lambda layer, pattern: _reduce(targets, pattern)

    pieces = micro_batches(model, batches) if batch_size is None else batches
    sums = reduce_patterns(model, pieces, reducer, batch_size=batch_size)
    return _gather(templates, counts, sums)


def micro_batch_size(model: HookedModel, pos: int) -> int:
    """How many sequences of ``pos`` tokens a forward pass takes by default, at least 1."""
    cfg = model.cfg
    per_layer = int(getattr(cfg, "n_heads", 1)) * pos * pos
    numbers = max(int(cfg.n_layers) * per_layer, pos * int(getattr(cfg, "d_vocab", 1)))
    return max(1, MICRO_BATCH // (4 * numbers))


def score_patterns(
    patterns: Sequence[Float[Tensor, "batch _head query key"]],
    tokens: Int[Tensor, "batch pos"],
    *,
    templates: str | Template | Iterable[str | Template] = SHIPPED,
    queries: Sequence[int] | None = None,
) -> HeadScores:
    """Score attention patterns that are already there, one tensor for each layer, as :func:`scan` does.

    Raises
    ------
    CausalProbeError
        If a template is unknown or returns something else, or the patterns don't fit the tokens.
    """
    wanted = find_templates(templates)
    n_pos = tokens.shape[1]
    if wrong := [
        list(each.shape) for each in patterns if (*each.shape[:1], *each.shape[2:]) != (len(tokens), n_pos, n_pos)
    ]:
        raise CausalProbeError(
            f"Patterns of {len(tokens)} sequences of {n_pos} tokens are [{len(tokens)}, head, {n_pos}, {n_pos}]; there are {wrong}."
        )
    targets = compile_targets(wanted, tokens, queries=queries)
    reduced = {layer: _reduce(targets, pattern) for layer, pattern in enumerate(patterns)}
    scored = _gather(wanted, [_count(targets)], [reduced])
    return HeadScores(
        templates=wanted,
        evidence=scored.evidence,
        shared=scored.shared,
        settings=settings_of([Part(wanted, tokens, {"kind": "given"})], queries),
        provenance={
            "model": "patterns",
            "dtype": str(patterns[0].dtype).removeprefix("torch."),
            "device": str(patterns[0].device),
            "versions": versions(),
        },
    )


def settings_of(parts: Sequence[Part], queries: Sequence[int] | None) -> dict[str, Any]:
    """What a result says of how it came about."""
    tokens = [{"templates": [template.name for template in part.templates], **part.settings} for part in parts]
    return {"queries": None if queries is None else list(queries), "tokens": tokens}


def micro_batches(model: HookedModel, batches: Any) -> Iterator[Any]:
    """The batches, in pieces of :func:`micro_batch_size`."""
    for batch in each_batch(batches):
        tokens = getattr(batch, "tokens", batch)
        if isinstance(tokens, Tensor) and tokens.ndim == 2:
            yield from torch.split(tokens, micro_batch_size(model, tokens.shape[1]))
        else:
            yield batch  # what is wrong with it is said where it is run


def _reduce(targets: Sequence[Targets], pattern: Tensor) -> _Sums:
    parts = torch.split(pattern, [len(target.pairs) for target in targets])
    return _Sums(
        torch.cat([target.attention(part) for target, part in zip(targets, parts, strict=True)]).float(),
        torch.cat([target.sink(part) for target, part in zip(targets, parts, strict=True)]).float(),
    )


def _count(targets: Sequence[Targets]) -> _Counts:
    return _Counts(
        torch.cat([target.rows for target in targets]).cpu().numpy(),
        torch.cat([target.chance for target in targets]).double().cpu().numpy(),
        sum(target.shared.cpu().numpy() for target in targets),
    )


def _gather(templates: tuple[Template, ...], counts: Sequence[_Counts], sums: Sequence[Mapping[int, _Sums]]) -> Scored:
    """The batches' sums, in order, by template."""
    layers = sorted(sums[0])
    attention = {layer: torch.cat([found[layer].attention.cpu() for found in sums]).numpy() for layer in layers}
    sink = {layer: torch.cat([found[layer].sink.cpu() for found in sums]).numpy() for layer in layers}
    rows = np.concatenate([count.rows for count in counts])
    chance = np.concatenate([count.chance for count in counts])
    shared = sum(count.shared for count in counts)
    names = [template.name for template in templates]
    return Scored(
        {
            name: Evidence(
                attention=tuple(attention[layer][..., i] for layer in layers),
                sink=tuple(sink[layer][..., i] for layer in layers),
                rows=rows[:, i],
                chance=chance[:, i],
            )
            for i, name in enumerate(names)
        },
        {(one, other): int(shared[i, j]) for i, one in enumerate(names) for j, other in enumerate(names)},
    )
