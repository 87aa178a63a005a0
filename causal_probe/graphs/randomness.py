"""Named, independent streams of NumPy's random numbers from one seed."""

from __future__ import annotations

import zlib
from typing import SupportsIndex

import numpy as np

from causal_probe.errors import CausalProbeError

__all__ = ["numpy_generator", "seed_sequence"]


def numpy_generator(seed: int, purpose: str) -> np.random.Generator:
    """A NumPy generator for one purpose of a run: streams of different seeds or purposes are independent.

    Examples
    --------
    >>> int(numpy_generator(0, "words").integers(100)) == int(numpy_generator(0, "words").integers(100))
    True
    """
    return np.random.default_rng(seed_sequence(seed, purpose))


def seed_sequence(seed: SupportsIndex, purpose: str) -> np.random.SeedSequence:
    """The seed of such a generator.

    Raises
    ------
    CausalProbeError
        If the seed is no whole number of at least 0.
    """
    if isinstance(seed, bool) or not isinstance(seed, int) or seed < 0:
        raise CausalProbeError(f"A seed must be a whole number of at least 0, not {seed!r}.")
    return np.random.SeedSequence(seed, spawn_key=(zlib.crc32(purpose.encode(errors="surrogatepass")),))
