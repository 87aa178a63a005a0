"""Sums over sequences: what is kept of a quantity when nothing of the size of a batch may be kept."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import TypeVar

import torch
from jaxtyping import Float
from torch import Tensor

from causal_probe.errors import CausalProbeError

__all__ = ["Moments", "merged"]

K = TypeVar("K")

#: At most this many entries are converted to float64 at once (32 MiB).
CHUNK = 2**22


@dataclass(frozen=True, eq=False)
class Moments:
    """Count, sum and sum of squares of a quantity over sequences, in float64.

    They add up exactly as the sequences do: merging the moments of two halves gives those of the whole, to rounding.

    Attributes
    ----------
    count
        Number of sequences.
    sums, squares
        Sum over sequences of the quantity and of its square, in the quantity's shape.

    Examples
    --------
    >>> import torch
    >>> halves = Moments.of(torch.tensor([1.0, 2.0])).merge(Moments.of(torch.tensor([6.0])))
    >>> halves.count, halves.mean.item(), round(halves.stderr.item(), 4)   # sqrt(7 / 3)
    (3, 3.0, 1.5275)
    """

    #: Stated in JSON beside the sums.
    DERIVED = ("mean", "stderr")

    count: int
    sums: Float[Tensor, "*shape"]
    squares: Float[Tensor, "*shape"]

    @classmethod
    def of(cls, values: Float[Tensor, "batch *shape"]) -> Moments:
        """The moments of one batch, on its device (on the CPU where the device has no float64)."""
        device = "cpu" if values.device.type == "mps" else values.device
        sums = torch.zeros(values.shape[1:], dtype=torch.float64, device=device)
        squares = torch.zeros_like(sums)
        for chunk in torch.split(values.detach(), max(1, CHUNK // max(1, sums.numel()))):
            exact = chunk.to(device).double()
            sums += exact.sum(0)
            squares += exact.square().sum(0)
        return cls(len(values), sums, squares)

    def merge(self, other: Moments) -> Moments:
        """The moments over the sequences of both.

        Raises
        ------
        CausalProbeError
            If the two quantities differ in shape.
        """
        if self.sums.shape != other.sums.shape:
            raise CausalProbeError(
                f"Results of the shapes {list(self.sums.shape)} and {list(other.sums.shape)} can't be merged: they must come "
                "from the same model, on sequences of one length."
            )
        sums, squares = (theirs.to(self.sums.device) for theirs in (other.sums, other.squares))
        return Moments(self.count + other.count, self.sums + sums, self.squares + squares)

    @property
    def mean(self) -> Float[Tensor, "*shape"]:
        """Mean over sequences."""
        return self.sums / self.count

    @property
    def stderr(self) -> Float[Tensor, "*shape"] | None:
        """Standard error of the mean: sample standard deviation (n - 1) over sqrt(n). None for one sequence.

        A spread below about 1e-8 of the mean is rounding.
        """
        if self.count < 2:
            return None
        variance = (self.squares - self.sums.square() / self.count) / (self.count - 1)
        return (variance.clamp(min=0) / self.count).sqrt()


def merged(total: Mapping[K, Moments], new: Mapping[K, Moments]) -> dict[K, Moments]:
    """By name, the moments over the sequences of both; ``total`` is empty, or has the same names."""
    return {name: total[name].merge(its) if total else its for name, its in new.items()}
