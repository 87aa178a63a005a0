"""Calls: the reproductions of papers' figures, each with its sizes cut down to next to nothing."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from importlib import import_module
from typing import Any
from unittest.mock import patch

from causal_probe import mechanisms, papers, tasks
from causal_probe.training import adam
from tests.recorded_calls.calls import Numbers, call
from tests.recorded_calls.fields import of_weights

#: Where the reproductions are. Some modules share their names with a function, so they are imported by their names.
ROOM = "causal_probe.papers"


@contextmanager
def cut(module: str, **sizes: Any) -> Iterator[None]:
    """Constants of a module of reproductions replaced, each of which must be there."""
    with patch.multiple(import_module(f"{ROOM}.{module}"), **sizes):
        yield


def reproduce(name: str) -> Numbers:
    """The table's numbers (what is said in words is NaN), without seconds, and the arrays."""
    found = papers.reproduce(name, quick=True, seed=1)
    for line in found.lines:
        if "(seconds)" in line.quantity:
            continue
        shown = (line.ours, line.standard_error, line.paper, line.holds)
        yield [value if isinstance(value, (int, float)) else None for value in shown]
    yield [found.arrays[name] for name in sorted(found.arrays)]


@call
def reproduce_figures_2_and_6() -> Numbers:
    with cut("trees", STEPS={True: 32}, REST={True: 6}, EVALUATION=256, BATCH=64):
        yield from reproduce("figure-2")
        yield from reproduce("figure-6")


@call
def reproduce_figures_5_and_7() -> Numbers:
    small = {"REST": {True: 4}, "CONTROL": {True: 4}, "EVALUATION": 256, "FITTING": 512, "POSITIONS": 12}
    with cut("two_parents", **small):
        yield from reproduce("figure-5")
        yield from reproduce("figure-7")


@call
def reproduce_figure_8() -> Numbers:
    with cut("residual", SIZE={True: {"steps": 8, "batch_size": 32}}, EVALUATION=256):
        yield from reproduce("figure-8")


@call
def reproduce_figure_9() -> Numbers:
    with cut("forests", FORESTS=4, JOINT={True: {"forests": 2, "steps": 16}}, REST={True: 4}, PROBING=512, BATCH=64):
        yield from reproduce("figure-9")


@call
def reproduce_ood() -> Numbers:
    with cut("out_of_distribution", LENGTHS={True: (8, 12)}, STEPS={True: 4}, SEQUENCES={True: 8}, READING=512):
        yield from reproduce("ood")


@call
def reproduce_sample_complexity() -> Numbers:
    small = {"GRADIENT": (32, 512), "STAGED": (4, 64), "JOINT": {True: ((1024, 48), (64, 48))}, "LOOKS": 4}
    number = {"GRADIENT_FORESTS": {True: 4}, "STAGED_FORESTS": {True: 3}, "JOINT_FORESTS": {True: 1}}
    with cut("sequences_needed", **small, **number):
        yield from reproduce("sample-complexity")


@call
def reproduce_evidence() -> Numbers:
    with cut(
        "evidence", GRAPHS=("chain",), MODELS=("copy parents",), POSITIONS=6, INPUTS={True: 2}, SEQUENCES={True: 64}
    ):
        yield from reproduce("evidence")


@call
def reproduce_copy() -> Numbers:
    with cut("copying", adam=lambda steps, batch_size: adam(100, batch_size=32)):
        yield from reproduce("copy")


@call
def reproduce_softmax() -> Numbers:
    with cut("standard", TRAINING={True: {"steps": 10, "batch_size": 32}}, SEQUENCES={True: 100}):
        yield from reproduce("softmax")


@call
def reproduce_sine() -> Numbers:
    with cut("waves", STEPS={True: {"first": 5, "rest": 10}}, STARTS=2, BATCH=32, SEQUENCES={True: 100}):
        yield from reproduce("sine")


@call
def reproduce_mesa() -> Numbers:
    train = mechanisms.train_mesa
    with cut("mesa", train_mesa=lambda process, **options: train(process, **{**options, "steps": 5, "batch_size": 64})):
        yield from reproduce("mesa")


@call
def reproduce_mesa_moments() -> Numbers:
    yield from reproduce("mesa-moments")


@call
def reproduce_gradient_descent() -> Numbers:
    """One and two layers, trained for a few steps; and layers that are added one at a time."""
    with cut("descent", adam=lambda *steps, **options: adam(20, batch_size=32)):
        yield from reproduce("gradient-descent")
        yield from reproduce("gradient-descent-layers")
    growth = [(depth, 0.1, adam(5, batch_size=16)) for depth in (1, 2)]
    grown = import_module(f"{ROOM}.descent").grown(tasks.LinearRegression(3, 4), growth, seed=1, scale=0.1)
    yield from of_weights(grown)
