"""How many sequences the first gradient is taken over, and how many of them at once."""

from __future__ import annotations

from collections.abc import Iterator

import torch

from causal_probe.tasks import Batch, Task, sample_batches

__all__ = ["AT_ONCE", "SEQUENCES_OF_SEVERAL", "TABLES_AT_ONCE", "batches_of", "table_entries"]

#: Sequences that the gradient is taken over where nodes have several parents.
SEQUENCES_OF_SEVERAL = 2**17
#: Entries of a batch of tokens, of their targets, and of a batch's tables of transitions: 64 MiB, of which sampling needs a few copies.
AT_ONCE = 2**18
TABLES_AT_ONCE = 2**24


def batches_of(task: Task, n_sequences: int, source: torch.Generator) -> Iterator[Batch]:
    """Fresh sequences, in batches that fit into memory with their targets and tables."""
    at_once = max(1, min(AT_ONCE // max(task.n_positions, task.d_vocab), TABLES_AT_ONCE // table_entries(task)))
    return sample_batches(task, n_sequences, source, batch_size=at_once)


def table_entries(task: Task) -> int:
    """Entries of the tables of transitions of one sequence."""
    degrees = {1} if task.is_tree else {degree for _, degree in task.graph.in_degree if degree}
    return sum(task.d_vocab ** (k + 1) for k in degrees)
