"""Running sums of first gradients, for many graphs (or queries) side by side, in memory that does not grow with the sequences."""

from __future__ import annotations

from collections.abc import Iterator

import torch
from jaxtyping import Float, Int
from torch import Tensor

__all__ = ["GradientStream"]

#: Sequences in the first blocks, and the number of blocks at which neighbours are merged in pairs: from then on there are always
#: 16 to 31 full blocks of one size. Their spread gives the standard error, their ends are where the graph is looked at.
FIRST_BLOCK = 16
MAX_BLOCKS = 32


class GradientStream:
    """Sum over sequences of u_i m_j, whole and by blocks.

    Parameters
    ----------
    rows
        How many are summed side by side.
    n_positions
        T. Only pairs of a child i and a position j up to i are kept, others are 0.
    scale
        The factor of the means.
    """

    def __init__(self, rows: int, n_positions: int, *, scale: float) -> None:
        self.scale = scale
        self.seen = 0
        self.block = FIRST_BLOCK
        self._past = torch.ones(n_positions, n_positions, dtype=torch.bool).tril()
        self._earlier = self._past.tril(-1)
        self._total = torch.zeros(rows, n_positions, n_positions, dtype=torch.float64)
        # Room for all blocks: one more at a time would copy those before again and again. What is not written yet takes no memory.
        self._room = torch.empty(rows, MAX_BLOCKS, n_positions, n_positions)
        self._full = 0
        self._open = torch.zeros(rows, n_positions, n_positions)
        self._in_open = 0

    def pieces(self, n: int) -> Iterator[slice]:
        """``n`` further sequences in pieces that end where blocks do."""
        start = 0
        while start < n:
            end = min(n, start + self.block - self._in_open)
            yield slice(start, end)
            start = end

    def add(self, u: Float[Tensor, "row batch pos"], m: Float[Tensor, "row batch pos"]) -> None:
        """Add one of :meth:`pieces`."""
        product = u.mT @ m
        self._total += product
        self._open += product
        self.seen += u.shape[1]
        self._in_open += u.shape[1]
        if self._in_open < self.block:
            return
        self._room[:, self._full] = self._open
        self._full += 1
        self._open.zero_()
        self._in_open = 0
        if self._full == MAX_BLOCKS:
            self._full //= 2
            self._room[:, : self._full] = self._room[:, ::2] + self._room[:, 1::2]
            self.block *= 2

    @property
    def mean(self) -> Float[Tensor, "row pos pos"]:
        """Mean over sequences, times the scale; 0 where j comes after i."""
        return self._total * self._past * (self.scale / self.seen)

    def leading_of(self, evidence: Float[Tensor, "row pos pos"]) -> Int[Tensor, "row pos"]:
        """For every child the earlier position with the largest entry; -1 for position 0."""
        found = evidence.masked_fill(~self._earlier, float("-inf")).argmax(-1)
        found[:, 0] = -1
        return found

    def leading(self) -> Int[Tensor, "row pos"]:
        """For every child the earlier position with the largest mean; -1 for position 0 and before anything was seen."""
        found = self.leading_of(self._total)
        return found if self.seen else torch.full_like(found, -1)

    def block_means(self) -> tuple[Float[Tensor, "row block pos pos"], Float[Tensor, " block"]]:
        """The means of the blocks, and how many sequences are in each."""
        blocks = self._room[:, : self._full]
        sizes = [self.block] * self._full
        if self._in_open:
            blocks = torch.cat([blocks, self._open[:, None]], 1)
            sizes.append(self._in_open)
        weights = torch.tensor(sizes, dtype=torch.float64)
        return blocks * self._past * (self.scale / weights.float()[:, None, None]), weights

    def stderr(self) -> Float[Tensor, "row pos pos"] | None:
        """The standard error of :attr:`mean`, from the spread of the blocks; None where there is one block."""
        means, sizes = self.block_means()
        return blocks_stderr(means, sizes)


def blocks_stderr(
    means: Float[Tensor, "row block *shape"], sizes: Float[Tensor, " block"]
) -> Float[Tensor, "row *shape"] | None:
    """The standard error of the mean over all sequences, from means over blocks of ``sizes`` sequences.

    Each block's squared deviation is weighted by its share of the sequences squared, and the sum is divided by 1 - (sum of the squared
    shares), which makes it an unbiased estimate of the mean's variance whatever the sizes: with sequences of variance v, a block of
    share w deviates by (1 / w - 1) v / N on average. With K blocks of one size it is the usual standard error of K values.
    """
    if len(sizes) < 2:
        return None
    share = (sizes / sizes.sum()).reshape(-1, *[1] * (means.ndim - 2)).to(means.dtype)
    mean = (means * share).sum(1, keepdim=True)
    variance = ((means - mean).square() * share.square()).sum(1) / (1 - share.square().sum())
    return variance.sqrt().double()
