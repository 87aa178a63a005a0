"""What an ablated head's output is replaced by: its mean at the same position, or its mean over positions, in other sequences.

A mean at each position keeps what is the same in every sequence there: a head that writes *where* something is, which is the same in all
sequences of one period, is replaced by itself. The mean over positions as well, the *pooled* mean, takes that away. Position 0 is left out
of it and left alone by it, and so is an output that is much larger than is usual for the head: many models hold something else there, which is
no baseline for text, and which text is no baseline for. (The output at one other position would take as much away, and put false
content in its place, which hurts where the head is not needed.)

Each measured sequence has other sequences for a reference, which no other sequence shares. So the effects of an ablation are independent over
sequences, the noise of the reference included, and a t-test over sequences is exact as far as the t-test is.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any, Literal, TypeAlias

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor

from causal_probe.errors import CausalProbeError
from causal_probe.hooks import attention_hook, resample_ablate
from causal_probe.hooks.check import HookedModel
from causal_probe.hooks.edit import Edit
from causal_probe.hooks.record import each_batch, record

__all__ = ["BASELINES", "Baseline", "Baselines", "reference_tokens", "split_off_references", "take_baselines"]

Baseline: TypeAlias = Literal["mean", "pooled"]
#: The baselines by which verdicts are given, in prose.
BASELINES: Mapping[Baseline, str] = {
    "mean": "its mean at each position",
    "pooled": "its mean over all positions",
}
#: An output that is so many times as large as the head's median output in the sequence is an outlier.
OUTLIER = 10.0
#: Other sequences for each measured one, at least, over which the heads' means are taken, where given sequences are split.
FEWEST_REFERENCES = 3


def usual(z: Float[Tensor, "*batch pos d_head"]) -> Bool[Tensor, "*batch pos"]:
    """Where a head's outputs are neither at position 0 nor outliers.

    >>> usual(torch.tensor([[[1.0], [1.0], [2.0], [50.0]]])).tolist()
    [[False, True, True, False]]
    """
    norm = z.float().norm(dim=-1)
    typical = norm[..., 1:].median(-1, keepdim=True).values
    inside: Tensor = (norm <= OUTLIER * typical) | (typical == 0)
    inside[..., 0] = False
    return inside


class Baselines:
    """By layer, what replaces each head's output in each measured sequence.

    Attributes
    ----------
    mean
        [sequence, pos, head, d_head]: the mean over the sequence's references, at each position.
    pooled
        [sequence, head, d_head]: the mean over its references and their positions, without position 0 and outliers.
    """

    def __init__(self, mean: Mapping[int, Tensor], pooled: Mapping[int, Tensor]) -> None:
        self.mean = mean
        self.pooled = pooled

    @property
    def heads(self) -> dict[int, int]:
        """By layer that has attention, its number of heads."""
        return {layer: self.mean[layer].shape[2] for layer in sorted(self.mean)}

    def edit(self, baseline: Baseline, layer: int, head: int, sequences: slice) -> Edit:
        """Replace one head's output in these of the measured sequences."""
        if baseline == "mean":
            return resample_ablate(layer, head, donors=self.mean[layer][sequences, :, head])

        def replace(z: Float[Tensor, "batch pos head d_head"], hook: Any) -> Float[Tensor, "batch pos head d_head"]:
            z = z.clone()
            z[:, :, head] = self._pooled(z[:, :, head], layer, head, sequences)
            return z

        return attention_hook(layer, "z"), replace

    def replacement(self, baseline: Baseline, layer: int, sequences: slice, z: Tensor) -> Tensor:
        """What replaces the outputs z [batch, pos, head, d_head] of a layer's heads in these of the measured sequences."""
        if baseline == "mean":
            return self.mean[layer][sequences].to(z)
        return torch.stack([self._pooled(z[:, :, head], layer, head, sequences) for head in range(z.shape[2])], 2)

    def distance(self, layer: int, head: int, sequences: slice, z: Tensor) -> dict[Baseline, Float[Tensor, " batch"]]:
        """By baseline, how far it is from one head's outputs, as a share of their size: mean squares, over positions but 0."""
        own = z[:, :, head].double()
        size = own[:, 1:].square().sum((1, 2)).clamp(min=torch.finfo(own.dtype).tiny)
        found: dict[Baseline, Tensor] = {
            "mean": self.mean[layer][sequences, :, head].to(own),
            "pooled": self._pooled(own, layer, head, sequences),
        }
        return {name: (own - its)[:, 1:].square().sum((1, 2)) / size for name, its in found.items()}

    def _pooled(self, own: Tensor, layer: int, head: int, sequences: slice) -> Float[Tensor, "batch pos d_head"]:
        mean = self.pooled[layer][sequences, None, head].to(own)
        return torch.where(usual(own)[..., None], mean, own)


class _Recorder:
    """Sums over references, by the sequence whose they are, as micro-batches of references pass."""

    def __init__(self, n_sequences: int, each: int) -> None:
        self.n_sequences, self.each = n_sequences, each
        self.sums: dict[int, list[Tensor]] = {}
        self._begin = self._size = 0

    def start(self, tokens: Int[Tensor, "batch pos"]) -> None:
        self._size = len(tokens)

    def reduce(self, layer: int, *values: Tensor) -> list[Tensor]:
        (z,) = values
        owner = torch.arange(self._begin, self._begin + len(z), device=z.device) // self.each
        inside = usual(z.transpose(1, 2)).transpose(1, 2)[..., None]  # [batch, pos, head, 1]
        exact = z.to(torch.float32 if z.device.type == "mps" else torch.float64)
        parts = exact, (exact * inside).sum(1), inside.sum(1).to(exact)
        return [torch.zeros(self.n_sequences, *part.shape[1:]).to(part).index_add_(0, owner, part) for part in parts]

    def add(self, reduced: Mapping[int, list[Tensor]]) -> None:
        for layer, new in reduced.items():
            old = self.sums.get(layer)
            self.sums[layer] = new if old is None else [a + b for a, b in zip(old, new, strict=True)]
        self._begin += self._size


def take_baselines(model: HookedModel, reference: Int[Tensor, "reference pos"], n_sequences: int) -> Baselines:
    """Run the references, an equal number for each of ``n_sequences`` measured sequences, one group after the other."""
    each = len(reference) // n_sequences
    recorder = _Recorder(n_sequences, each)
    record(model, reference[: each * n_sequences], recorder, points=("z",))
    return Baselines(
        {layer: (total / each).float() for layer, (total, _, _) in recorder.sums.items()},
        {layer: (inside / count.clamp(min=1)).float() for layer, (_, inside, count) in recorder.sums.items()},
    )


def split_off_references(tokens: Any) -> tuple[Tensor, Tensor]:
    """Given sequences: those that are measured, and the references of each, in turn."""
    given = list(each_batch(tokens))
    if not all(isinstance(batch, Tensor) for batch in given):
        raise CausalProbeError(
            "Batches of your own need a `reference`: tokens of other sequences of the same length, 3 or more for each that is measured."
        )
    if not given:
        raise CausalProbeError("There are no sequences to measure on.")
    whole = torch.cat(given)
    measured = len(whole) // (1 + FEWEST_REFERENCES)
    if measured < 2:
        raise CausalProbeError(
            f"{len(whole)} sequences were given, of which one in {1 + FEWEST_REFERENCES} can be measured, and the others are what heads' means "
            f"are taken over; two must be measured. Give {2 * (1 + FEWEST_REFERENCES)} sequences or more, or a `reference` of other sequences."
        )
    return whole[:measured], whole[measured:]


def reference_tokens(reference: Any, batches: Sequence[Any]) -> Tensor:
    """The tokens of the references, at least one for each measured sequence."""
    found = torch.cat([getattr(batch, "tokens", batch) for batch in each_batch(reference)])
    tokens = getattr(batches[0], "tokens", batches[0])
    n = sum(len(getattr(batch, "tokens", batch)) for batch in batches)
    if len(found) < n or found.shape[1] != tokens.shape[1]:
        raise CausalProbeError(
            f"The reference holds {len(found)} sequences of {found.shape[1]} tokens; {n} of {tokens.shape[1]} are measured, and each needs one or "
            "more of its own, of the same length."
        )
    return found
