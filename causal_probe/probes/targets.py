"""The target sets of many templates on one batch, in the form in which a pattern is scored against all of them at once."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor

from causal_probe.errors import CausalProbeError
from causal_probe.probes.templates import Template

__all__ = ["Targets", "compile_targets"]

#: At most this many Booleans [sequence, query, key, template] are looked at at once (4 MiB).
MASKS = 2**22
#: At most this many numbers [sequence, pair, head or template] are worked on at once (8 MiB).
NUMBERS = 2**20


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


def compile_targets(
    templates: Sequence[Template], tokens: Int[Tensor, "batch pos"], *, queries: Iterable[int] | None = None
) -> list[Targets]:
    """The :class:`Targets` of consecutive groups of the sequences; as few groups as memory allows.

    Parameters
    ----------
    queries
        Only these rows are scored, negative ones counted from the end; all by default.

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
    return [_compile(templates, part, wanted) for part in torch.split(tokens, group)]


def _compile(templates: Sequence[Template], tokens: Int[Tensor, "batch pos"], wanted: Bool[Tensor, " pos"]) -> Targets:
    batch, pos = tokens.shape
    masks = torch.stack([template(tokens) for template in templates], -1)  # [batch, query, key, template]
    n_targets = masks.sum(2)
    n_keys = torch.arange(1, pos + 1, device=tokens.device)[:, None]
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
