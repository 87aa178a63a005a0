"""Score patterns against templates: their targets on a batch, and what every head puts there."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from jaxtyping import Bool, Float, Int
from numpy.typing import NDArray
from torch import Tensor

from causal_probe.errors import CausalProbeError
from causal_probe.hooks.batches import of_tokens
from causal_probe.hooks.patterns import attention_on_nothing, given_patterns
from causal_probe.hooks.record import Rows, row_slack
from causal_probe.hooks.visible import Masks
from causal_probe.probes.head_scores import HeadScores
from causal_probe.probes.template_sums import TemplateSums
from causal_probe.probes.templates import TEMPLATES, Template, find_templates

__all__ = ["Scores", "Targets", "compile_targets", "score_patterns", "settings_of"]

#: At most this many Booleans [sequence, query, key, template] are looked at at once (4 MiB).
MASKS = 2**22
#: At most this many numbers [sequence, pair, head or template] are worked on at once (8 MiB).
NUMBERS = 2**20


class Scores(Rows):
    """The raw sums of every sequence, added up as the micro-batches pass.

    Parameters
    ----------
    templates
        The template.
    queries
        Only these rows are scored; all by default.
    masks
        The mask of each layer's visible keys; by default all of the past.
    to_nothing
        Whether a layer's heads can attend to nothing; by default none can.
    """

    def __init__(
        self,
        templates: tuple[Template, ...],
        queries: Sequence[int] | None,
        masks: Masks | None = None,
        to_nothing: Callable[[int], bool] = lambda layer: False,
    ) -> None:
        super().__init__()
        self.templates = templates
        self._queries = queries
        self._masks, self._to_nothing = masks, to_nothing
        self._tokens = torch.zeros(0, 0, dtype=torch.long)
        self._groups: list[Targets] = []
        self._within: list[tuple[Tensor, list[Targets]]] = []
        self._shared = np.zeros((len(templates), len(templates)), dtype=np.int64)

    def start(self, tokens: Int[Tensor, "batch pos"]) -> None:
        """Find the targets."""
        self._tokens, self._within = tokens, []
        if self._masks is not None:
            self._masks.start()
        self._groups = compile_targets(self.templates, tokens, queries=self._queries)

    def reduce(self, layer: int, *values: Float[Tensor, "batch head query key"]) -> dict[str, NDArray[Any]]:
        """Each head's attention on the targets, and on position 0, over the scored rows: [sequence, head, template]; those rows, and chance."""
        (pattern,) = values
        groups = self._seen(layer, pattern)
        parts = torch.split(pattern, [len(targets.pairs) for targets in groups])
        pairs = list(zip(groups, parts, strict=True))
        nothing = [targets.nothing(part).float() for targets, part in pairs] if self._to_nothing(layer) else []
        return {
            **({"nothing": _joined(nothing)} if nothing else {}),
            "attention": _joined([targets.attention(part).float() for targets, part in pairs]),
            "sink": _joined([targets.sink(part).float() for targets, part in pairs]),
            "rows": _joined([targets.rows for targets in groups]),
            "chance": _joined([targets.chance.double() for targets in groups]),
        }

    def _seen(self, layer: int, pattern: Float[Tensor, "batch head query key"]) -> list[Targets]:
        """The targets that a layer shows."""
        seen = None if self._masks is None else self._masks.of(layer, pattern)
        if seen is None:
            return self._groups
        known = next((targets for mask, targets in self._within if torch.equal(mask, seen)), None)
        if known is None:
            known = compile_targets(self.templates, self._tokens, queries=self._queries, seen=seen)
            self._within.append((seen, known))
        return known

    def add(self, reduced: Mapping[int, Mapping[str, NDArray[Any]]]) -> None:
        """The micro-batch has passed."""
        for targets in self._groups:
            self._shared += targets.shared.cpu().numpy()
        super().add(reduced)

    def scored(self) -> tuple[dict[str, TemplateSums], dict[tuple[str, str], int]]:
        """By template, the sums; by pair of templates, how many targets they share."""
        arrays = self.arrays()
        layers = sorted(name[1] for name in arrays if name[0] == "sink")
        names = [template.name for template in self.templates]
        n_layers = 1 + max(layers)
        none = arrays["sink", layers[0]][:, :0]  # a layer without attention has no heads
        attention, sink = (
            [arrays.get((what, layer), none) for layer in range(n_layers)] for what in ("attention", "sink")
        )
        nothing = (
            [arrays.get(("nothing", n), np.zeros_like(sink[n])) for n in range(n_layers)]
            if any(name[0] == "nothing" for name in arrays)
            else []
        )
        rows, chance = (
            np.stack(
                [arrays.get((what, layer), np.zeros_like(arrays[what, layers[0]])) for layer in range(n_layers)], 1
            )
            for what in ("rows", "chance")
        )  # [sequence, layer, template]
        if all(np.array_equal(rows[:, layer], rows[:, layers[0]]) for layer in layers) and all(
            np.array_equal(chance[:, layer], chance[:, layers[0]]) for layer in layers
        ):
            rows, chance = rows[:, layers[:1]], chance[:, layers[:1]]
        sums = {
            name: TemplateSums(
                attention=tuple(its[..., i] for its in attention),
                sink=tuple(its[..., i] for its in sink),
                rows=rows[..., i],
                chance=chance[..., i],
                nothing=tuple(its[..., i] for its in nothing),
            )
            for i, name in enumerate(names)
        }
        return sums, {
            (one, other): int(self._shared[i, j]) for i, one in enumerate(names) for j, other in enumerate(names)
        }


def _joined(tensors: Sequence[Tensor]) -> NDArray[Any]:
    joined: NDArray[Any] = torch.cat(list(tensors)).cpu().numpy()
    return joined


@of_tokens
def score_patterns(
    patterns: Any,
    tokens: Int[Tensor, "batch pos"],
    templates: str | Template | Iterable[str | Template] = tuple(TEMPLATES),
    *,
    queries: Sequence[int] | None = None,
) -> HeadScores:
    """Score attention patterns that you have already, as :func:`scan` does.

    Parameters
    ----------
    patterns
        Of all layers, [batch, head, query, key]: a TransformerLens ``ActivationCache`` (or any mapping with its names,
        ``blocks.{layer}.attn.hook_pattern``), or a list with one tensor or array for each layer, as from nnsight,
        ``output_attentions``, or NumPy.
    tokens
        The tokens that they were made on.
    templates, queries
        As for :func:`scan`.

    Raises
    ------
    CausalProbeError
        If a template is unknown or returns something else, the patterns don't fit the tokens, their rows don't sum to one or less, or
        they look ahead.

    Examples
    --------
    >>> import torch
    >>> previous = torch.eye(4).roll(1, 0).tril()
    >>> previous[0, 0] = 1
    >>> score_patterns([previous.expand(2, 1, 4, 4)], torch.randint(9, (2, 4)), "previous-token").of(0, 0, "previous-token").score
    1.0
    """
    wanted = find_templates(templates)
    tokens = torch.as_tensor(tokens)
    n_pos = tokens.shape[1]
    given = given_patterns(patterns)
    if wrong := [
        list(its.shape) for its in given.values() if its.shape[:1] + its.shape[2:] != (len(tokens), n_pos, n_pos)
    ]:
        raise CausalProbeError(
            f"Patterns of {len(tokens)} sequences of {n_pos} tokens are [{len(tokens)}, head, {n_pos}, {n_pos}]; there are {wrong}."
        )
    some_to_nothing = attention_on_nothing(given) is not None
    if ahead := [layer for layer, its in given.items() if bool((its.triu(1) > row_slack(its.dtype)).any())]:
        raise CausalProbeError(
            f"The patterns of layer {ahead[0]} attend to later positions. Templates are about earlier ones: give those of a causal model."
        )
    scores = Scores(wanted, queries, to_nothing=lambda layer: some_to_nothing)
    scores.start(tokens)
    scores.add({layer: scores.reduce(layer, pattern) for layer, pattern in given.items()})
    first = next(iter(given.values()))
    return HeadScores(
        wanted,
        *scores.scored(),
        settings=settings_of([(wanted, {"kind": "given"})], queries),
        provenance={"model": "patterns", "dtype": str(first.dtype).removeprefix("torch."), "device": str(first.device)},
    )


def settings_of(
    parts: Iterable[tuple[Sequence[Template], Mapping[str, Any]]], queries: Sequence[int] | None
) -> dict[str, Any]:
    """The settings of a result, of which each part has templates and what is told of their tokens."""
    tokens = [{"templates": [template.name for template in templates], **about} for templates, about in parts]
    return {"queries": None if queries is None else list(queries), "tokens": tokens}


@dataclass(frozen=True, eq=False)
class Targets:
    """Where each template allows attention, sparsely: few of all pairs (query, key) are the target of any.

    Only scored rows are here: a query that has a target, and sees a key that is none.

    Attributes
    ----------
    pairs
        The pairs that are a target of at least one template, as ``query * pos + key``; padded with 0.
    members
        Which templates a pair is a target of; of none where it is padding.
    scored
        Which queries count, by template.
    chance
        Sum over the scored rows of the share of the visible keys that are targets: what uniform attention would get.
    shared
        Number of pairs, over the batch, that are targets of both of two templates.
    """

    pairs: Int[Tensor, "batch pair"]
    members: Bool[Tensor, "batch pair template"]
    scored: Bool[Tensor, "batch query template"]
    chance: Float[Tensor, "batch template"]
    shared: Int[Tensor, "template template"]

    @property
    def rows(self) -> Int[Tensor, "batch template"]:
        """Number of scored rows."""
        return self.scored.sum(1)

    def attention(self, pattern: Float[Tensor, "batch _head query key"]) -> Float[Tensor, "batch _head template"]:
        """Sum over the scored rows of the attention on the targets."""
        n_heads, flat = pattern.shape[1], pattern.flatten(2)
        exact = _exact(pattern)
        # A model that is spread over several devices has patterns on more than one.
        pairs, members = self.pairs.to(pattern.device), self.members.to(pattern.device)
        total = torch.zeros(len(pattern), n_heads, members.shape[-1], dtype=exact, device=pattern.device)
        for part in _slices(members, width=n_heads):
            found = flat.gather(2, pairs[:, None, part].expand(-1, n_heads, -1))
            total += found.to(exact) @ members[:, part].to(exact)
        return total

    def sink(self, pattern: Float[Tensor, "batch _head query key"]) -> Float[Tensor, "batch _head template"]:
        """Sum over the scored rows of the attention on position 0."""
        exact = _exact(pattern)
        return pattern[..., 0].to(exact) @ self.scored.to(pattern.device, exact)

    def nothing(self, pattern: Float[Tensor, "batch _head query key"]) -> Float[Tensor, "batch _head template"]:
        """Sum over the scored rows of the attention on nothing, that is, what a row's attention leaves to one."""
        exact = _exact(pattern)
        left = (1 - pattern.sum(-1, dtype=exact)).clamp(min=0)
        return left @ self.scored.to(pattern.device, exact)


def compile_targets(
    templates: Sequence[Template],
    tokens: Int[Tensor, "batch pos"],
    *,
    queries: Iterable[int] | None = None,
    seen: Bool[Tensor, "batch pos pos"] | None = None,
) -> list[Targets]:
    """The :class:`Targets` of consecutive groups of the sequences; as few groups as memory allows.

    Parameters
    ----------
    queries
        Only these rows are scored, negative ones counted from the end; all by default.
    seen
        Which keys each query sees; all of the past by default.

    Raises
    ------
    CausalProbeError
        If a template does not return what it must, or a query lies outside the sequences.
    """
    pos = tokens.shape[1]
    wanted = torch.zeros(pos, dtype=torch.bool, device=tokens.device)
    for query in range(pos) if queries is None else queries:
        if not -pos <= query < pos:
            raise CausalProbeError(f"There is no query {query} in sequences of {pos} tokens.")
        wanted[query] = True
    group = max(1, MASKS // (pos * pos * len(templates)))
    parts = torch.split(tokens, group)
    shown = [None] * len(parts) if seen is None else torch.split(seen.to(tokens.device), group)
    return [_compile(templates, part, wanted, its) for part, its in zip(parts, shown, strict=True)]


def _compile(
    templates: Sequence[Template],
    tokens: Int[Tensor, "batch pos"],
    wanted: Bool[Tensor, " pos"],
    seen: Bool[Tensor, "batch pos pos"] | None,
) -> Targets:
    batch, pos = tokens.shape
    masks = torch.stack([template(tokens) for template in templates], -1)  # [batch, query, key, template]
    if seen is not None:
        masks &= seen[..., None]
    n_targets = masks.sum(2)
    n_keys = torch.arange(1, pos + 1, device=tokens.device)[:, None] if seen is None else seen.sum(-1)[..., None]
    scored = (n_targets > 0) & (n_targets < n_keys) & wanted[:, None]
    masks &= scored[:, :, None]
    flat = masks.flatten(1, 2)
    sequence, pair = flat.any(-1).nonzero(as_tuple=True)
    n_pairs = sequence.bincount(minlength=batch)
    slot = torch.arange(len(pair), device=tokens.device) - (n_pairs.cumsum(0) - n_pairs)[sequence]
    most = int(n_pairs.max())
    pairs = torch.zeros(batch, most, dtype=torch.long, device=tokens.device)
    members = torch.zeros(batch, most, len(templates), dtype=torch.bool, device=tokens.device)
    pairs[sequence, slot] = pair
    members[sequence, slot] = flat[sequence, pair]
    exact = torch.float32 if tokens.device.type == "mps" else torch.float64
    shared = torch.zeros(len(templates), len(templates), dtype=exact, device=tokens.device)
    for part in _slices(members):
        each = members[:, part].flatten(0, 1).to(exact)
        shared += each.T @ each
    return Targets(
        pairs=pairs,
        members=members,
        scored=scored,
        chance=(n_targets / n_keys * scored).sum(1, dtype=exact),
        shared=shared.round().long(),
    )


def _slices(members: Bool[Tensor, "batch pair template"], *, width: int = 1) -> Iterator[slice]:
    """The pairs, in pieces of which :data:`NUMBERS` hold true; ``width`` numbers of each pair, or one for each template."""
    batch, n_pairs, n_templates = members.shape
    size = max(1, NUMBERS // (batch * max(width, n_templates)))
    return (slice(start, start + size) for start in range(0, n_pairs, size))


def _exact(values: Tensor) -> torch.dtype:
    return torch.float32 if values.device.type == "mps" else torch.float64
