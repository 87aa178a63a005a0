"""Named, independent streams of random numbers from one seed."""

from __future__ import annotations

import zlib

import numpy as np
import torch

from causal_probe.errors import CausalProbeError

__all__ = ["check_batch_size", "generator", "numpy_generator"]


def generator(seed: int, purpose: str, *, device: str | torch.device = "cpu") -> torch.Generator:
    """A torch generator for one purpose of a run.

    Streams of different seeds or purposes are independent, so that, say, drawing more training batches leaves the
    evaluation sequences as they were.

    >>> generator(0, "training").initial_seed() == generator(0, "evaluation").initial_seed()
    False
    """
    return torch.Generator(device=device).manual_seed(int(_sequence(seed, purpose).generate_state(1, np.uint64)[0]))


def numpy_generator(seed: int, purpose: str) -> np.random.Generator:
    """The same for numpy.

    Examples
    --------
    >>> int(numpy_generator(0, "words").integers(100)) == int(numpy_generator(0, "words").integers(100))
    True
    """
    return np.random.default_rng(_sequence(seed, purpose))


def check_batch_size(batch_size: int) -> None:
    """Raise unless at least one sequence is asked for."""
    if batch_size < 1:
        raise CausalProbeError(f"A batch must hold at least one sequence; batch_size is {batch_size}.")


def _sequence(seed: int, purpose: str) -> np.random.SeedSequence:
    if isinstance(seed, bool) or not isinstance(seed, int) or seed < 0:
        raise CausalProbeError(f"A seed must be a whole number of at least 0, not {seed!r}.")
    return np.random.SeedSequence(seed, spawn_key=(zlib.crc32(purpose.encode()),))
