"""A task's sequences, so many at a time."""

from __future__ import annotations

from collections.abc import Iterator

import torch

from causal_probe.tasks.markov import Batch, InContextMarkov

__all__ = ["batches"]


def batches(
    task: InContextMarkov, n_sequences: int, generator: torch.Generator, *, at_once: int = 1024
) -> Iterator[Batch]:
    """Fresh sequences in batches of at most ``at_once``, the last one smaller if need be.

    Examples
    --------
    >>> from causal_probe import graphs
    >>> task = InContextMarkov(graphs.chain(5), 3, 0.1)
    >>> [len(batch.tokens) for batch in batches(task, 5, torch.Generator().manual_seed(0), at_once=2)]
    [2, 2, 1]
    """
    for start in range(0, n_sequences, at_once):
        yield task.sample(min(at_once, n_sequences - start), generator)
