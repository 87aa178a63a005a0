"""Named, independent streams of random numbers from one seed."""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Annotated, Any, SupportsIndex, TypeAlias

import numpy as np
import torch

from causal_probe.arguments import DEVICE, checked
from causal_probe.errors import CausalProbeError
from causal_probe.graphs.randomness import numpy_generator, seed_sequence

#: A device of torch that is there.
Device: TypeAlias = Annotated[str | torch.device, DEVICE]

#: Sequences that one batch may hold.
MOST_AT_ONCE = 2**24

__all__ = ["check_batch_size", "generator", "numpy_generator", "out_of_range"]


@checked
def generator(seed: SupportsIndex, purpose: str, *, device: Device = "cpu") -> torch.Generator:
    """A torch generator on ``device`` for one purpose of a run; :func:`numpy_generator` gives NumPy's.

    Streams of different seeds or purposes are independent, so that, say, drawing more training batches leaves the
    evaluation sequences as they were.

    >>> generator(0, "training").initial_seed() == generator(0, "evaluation").initial_seed()
    False
    """
    start = seed_sequence(seed, purpose).generate_state(1, np.uint64)[0]
    return torch.Generator(device=device).manual_seed(int(start))


def out_of_range(counts: Mapping[str, tuple[int, int]], positive: Mapping[str, float]) -> list[str]:
    """What to say of numbers of things that are below their least, ``name: (number, least)``, and of scales that are not positive."""
    return [
        f"{name} must be a whole number of at least {least}, not {number!r}"
        for name, (number, least) in counts.items()
        if isinstance(number, bool) or not isinstance(number, int) or number < least
    ] + [f"{name} must be positive and finite, not {x!r}" for name, x in positive.items() if not 0 < x < math.inf]


def check_batch_size(batch_size: Any, generator: Any) -> None:
    """Raise unless at least one sequence is asked for, no more than fit into any memory, and drawn from a generator of torch's."""
    if isinstance(batch_size, bool) or not isinstance(batch_size, int) or batch_size > MOST_AT_ONCE:
        raise CausalProbeError(
            f"A batch holds a whole number of sequences of at most {MOST_AT_ONCE:,}; batch_size is {batch_size!r}."
        )
    if not isinstance(generator, torch.Generator):
        raise CausalProbeError(
            f"Sequences are drawn from a torch.Generator, such as tasks.generator(0, 'mine'); found a {type(generator).__name__}."
        )
    if batch_size < 1:
        raise CausalProbeError(f"A batch must hold at least one sequence; batch_size is {batch_size}.")
