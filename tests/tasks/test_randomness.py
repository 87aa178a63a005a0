"""Streams of random numbers: reproducible, and apart for every seed and purpose."""

from __future__ import annotations

import pytest
import torch

from causal_probe.errors import CausalProbeError
from causal_probe.tasks import generator
from causal_probe.tasks.randomness import numpy_generator

STREAMS = [(seed, purpose) for seed in (0, 1, 2**40, 2**100) for purpose in ("training", "evaluation", "", "é")]


def test_the_same_stream_is_the_same() -> None:
    for seed, purpose in STREAMS:
        first, second = (torch.rand(5, generator=generator(seed, purpose)) for _ in range(2))
        assert torch.equal(first, second)
        assert (numpy_generator(seed, purpose).random(5) == numpy_generator(seed, purpose).random(5)).all()


def test_streams_of_other_seeds_and_purposes_differ() -> None:
    assert len({float(torch.rand((), generator=generator(*stream), dtype=torch.float64)) for stream in STREAMS}) == 16
    assert len({numpy_generator(*stream).random() for stream in STREAMS}) == 16


def test_neighbouring_seeds_are_uncorrelated() -> None:
    draws = torch.stack([torch.randn(2000, generator=generator(seed, "training")) for seed in range(20)])
    off_diagonal = torch.corrcoef(draws)[~torch.eye(20, dtype=torch.bool)]
    assert float(off_diagonal.abs().max()) < 5 / 2000**0.5


def test_streams_do_not_change_between_versions() -> None:
    """A seed that stands in a paper must give the same sequences in every later version."""
    assert generator(0, "training").initial_seed() == 16132294210408963099
    assert int(numpy_generator(0, "training").integers(2**32)) == 306960478


@pytest.mark.parametrize("seed", [-1, True])
def test_a_seed_that_is_none(seed: int) -> None:
    for make in (generator, numpy_generator):
        with pytest.raises(CausalProbeError, match=f"A seed must be a whole number of at least 0, not {seed!r}"):
            make(seed, "training")
