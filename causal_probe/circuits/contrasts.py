"""By what a source's part is replaced: the contrast, on which it depends what is in a circuit."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor

from causal_probe.circuits.partial import Clean, Layers
from causal_probe.errors import CausalProbeError
from causal_probe.probes.qk_stream import StreamParts

__all__ = ["ABOUT", "Contrast", "contrast_of", "contrast_with"]

#: What each contrast is, and what is not in a circuit that is found with it.
ABOUT: Mapping[str, str] = {
    "resample": "the part at another (prompt, position), one for all sources; what is the same at all of them is in no circuit, and neither is what passes at "
    "position 0, at special tokens and at outlier positions",
    "mean": "the part's mean over prompts and positions; what is the same at all of them is in no circuit, and neither is what passes at position 0, at special "
    "tokens and at outlier positions; a mean may be far from all parts",
    "mean-by-position": "the part's mean over prompts at each position; what depends on the position alone is in no circuit",
    "corrupted-mean": "the part's mean over the corrupted prompts at each position; what depends on the position alone, or is the same in corrupted prompts on the "
    "average, is in no circuit",
    "corrupted": "the part in the corrupted prompt; what both prompts have in common is in no circuit",
    "zero": "zero; whatever is written counts, constants too, and no model has seen such a stream",
}
#: A position is an outlier where the stream of some layer is so many times as long as that layer's median.
OUTLIER = 10.0


@dataclass(frozen=True, eq=False)
class Contrast:
    """What replaces the parts of each source, on some prompts.

    Attributes
    ----------
    name
        A key of :data:`ABOUT`.
    place
        Where parts are replaced, [row, pos].
    """

    name: str
    layers: Layers
    clean: StreamParts
    place: Bool[Tensor, "row pos"]
    donors: Int[Tensor, " kept"] | Int[Tensor, "row pos"] | None = None
    other: StreamParts | None = None

    def replacement(self, source: str) -> Float[Tensor, "row pos d_model"]:
        """What stands in the source's place; the part itself where nothing is replaced."""
        part = self.layers.part(self.clean, source)
        if self.name == "zero":
            return torch.zeros_like(part)
        if self.other is not None:  # parts of other prompts, row by row: at the same position, or at the donors'
            part = self.layers.part(self.other, source)
            if self.name == "corrupted-mean":
                return part.mean(0, keepdim=True).expand_as(part)
            return part if self.donors is None else part.take_along_dim(self.donors[..., None], 1)
        if self.name == "mean-by-position":
            return part.mean(0, keepdim=True).expand_as(part)
        kept = part[self.place]
        new = part.clone()
        new[self.place] = kept.mean(0) if self.donors is None else kept[self.donors]
        return new

    def delta(self, source: str, now: Tensor | None = None) -> Float[Tensor, "row pos d_model"]:
        """What is added to a receiver's input: the replacement less what the source writes, in the clean run or ``now``."""
        change = self.replacement(source) - (self.layers.part(self.clean, source) if now is None else now)
        change[~self.place] = 0
        return change


def contrast_of(
    name: str,
    layers: Layers,
    clean: Clean,
    corrupted: Clean | None,
    special: frozenset[int],
    generator: torch.Generator,
) -> Contrast:
    """A contrast on the prompts of one clean run.

    Raises
    ------
    CausalProbeError
        If there is no such contrast, or there are no corrupted prompts and they are asked for, or no position is left to take parts from.
    """
    if name not in ABOUT:
        raise CausalProbeError(f"Unknown contrast {name!r}; choose from {', '.join(ABOUT)}.")
    everywhere = torch.ones_like(clean.tokens, dtype=torch.bool)
    if name in ("corrupted", "corrupted-mean"):
        if corrupted is None:
            raise CausalProbeError(
                f"The contrast {name!r} takes corrupted prompts, and there are none. Give them, or choose resample."
            )
        return Contrast(name, layers, clean.parts, everywhere, other=corrupted.parts)
    if name in ("zero", "mean-by-position"):
        return Contrast(name, layers, clean.parts, everywhere)
    place = _ordinary(clean, special)
    n = int(place.sum())
    if n < 2:
        raise CausalProbeError(
            "Parts are taken from other positions, and fewer than two are left without position 0, special tokens and outliers. Give longer prompts, or choose "
            "the contrast zero or mean-by-position."
        )
    if name == "mean":
        return Contrast(name, layers, clean.parts, place)
    order = torch.randperm(n, generator=generator)  # each gets the next one's in a random order, and so never its own
    donors = torch.empty_like(order)
    donors[order] = order.roll(1)
    return Contrast(name, layers, clean.parts, place, donors=donors.to(clean.tokens.device))


def contrast_with(
    name: str,
    layers: Layers,
    clean: Clean,
    others: Clean,
    special: frozenset[int],
    generator: torch.Generator,
) -> Contrast:
    """A contrast of each row with another prompt's of its own: ``"resample"`` (a position of that drawn at random) or ``"corrupted"`` (the same position).

    Raises
    ------
    CausalProbeError
        If there is no such contrast, or no position is left to take parts from or to replace.
    """
    if name == "corrupted":
        return Contrast(name, layers, clean.parts, torch.ones_like(clean.tokens, dtype=torch.bool), other=others.parts)
    if name != "resample":
        raise CausalProbeError(
            f"The contrast {name!r} is none between one prompt and its baselines; choose resample or corrupted."
        )
    place, weights = _ordinary(clean, special), _ordinary(others, special).double()
    if not bool(place.any()) or not bool(weights.any(1).all()):
        raise CausalProbeError(
            "Parts are taken from other positions, and none is left without position 0, special tokens and outliers. Give longer texts, or choose the contrast corrupted."
        )
    donors = torch.multinomial(weights.cpu(), clean.tokens.shape[1], replacement=True, generator=generator)
    return Contrast(name, layers, clean.parts, place, donors=donors.to(clean.tokens.device), other=others.parts)


def _ordinary(clean: Clean, special: frozenset[int]) -> Bool[Tensor, "row pos"]:
    """All positions but the first, special tokens and outliers."""
    special_there = torch.isin(clean.tokens, torch.tensor(sorted(special), device=clean.tokens.device))
    place = ~outliers(clean) & ~special_there
    place[:, 0] = False
    return place


def outliers(clean: Clean) -> Bool[Tensor, "row pos"]:
    """Where the stream of some layer is far longer than elsewhere: attention sinks and the like."""
    found = torch.zeros_like(clean.tokens, dtype=torch.bool)
    for stream in clean.streams[1:]:
        length = stream.norm(dim=-1)
        found |= length > OUTLIER * length.median()
    return found
