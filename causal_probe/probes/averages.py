"""A quantity averaged over sequences: what evidence about the edges of graphs and about those of circuits has in common."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import Any, ClassVar, TypeVar

import numpy as np
import torch
from jaxtyping import Float
from torch import Tensor

from causal_probe.errors import CausalProbeError
from causal_probe.hooks.corpus import merge_readings
from causal_probe.hooks.moments import Moments
from causal_probe.results import Result, merge_provenance

__all__ = ["Averages", "Quantity", "as_arrays", "shapes"]

Same = TypeVar("Same", bound="Averages")


@dataclass(frozen=True)
class Quantity:
    """A quantity measured about an edge.

    Attributes
    ----------
    name
        One or two words: ``"attention"``.
    unit
        Of the values.
    chance
        The value of an edge that says nothing, in words.
    works
        The papers behind it, keys of the bibliography.
    sentence
        The averaged quantity, as half a methods sentence: "the attention from child to parent".
    threshold, level
        What makes a candidate an edge unless another claim is asked for: the least value; or, at this family-wise level, a test that
        its value is above zero. None of the two: it must be asked for.
    least, largest
        The range of the values; None where it has no end.
    """

    name: str
    unit: str
    chance: str
    works: tuple[str, ...]
    sentence: str
    threshold: float | None = None
    level: float | None = None
    least: float | None = None
    largest: float | None = None


@dataclass(frozen=True, eq=False, repr=False)
class Averages(Result):
    """Means over sequences of one quantity, with standard errors, in named arrays. Results of other settings can't be merged.

    Attributes
    ----------
    values
        By name (a layer, a receiver): the mean over sequences.
    stderr
        Its standard error over sequences, in the same shapes; None for one sequence.
    n_sequences
        Number of sequences.
    quantity
        What was measured.
    labels, n_by_label
        Groups of sequences that were averaged by themselves (the first axis of each array then), and their numbers of sequences.
    """

    values: Mapping[Any, Float[np.ndarray, "..."]]
    stderr: Mapping[Any, Float[np.ndarray, "..."]] | None
    n_sequences: int
    quantity: Quantity
    labels: tuple[str, ...] = ()
    n_by_label: tuple[int, ...] = ()

    #: The fields that are arrays by name.
    ARRAYS: ClassVar[tuple[str, ...]] = ("values", "stderr")

    # --------------------------------------------------------------------------------------------------------------- merging

    @classmethod
    def stack(cls: type[Same], groups: Mapping[str, Same]) -> Same:
        """The averages of several groups of sequences, by label, as one; :meth:`at` takes one out again.

        Raises
        ------
        CausalProbeError
            If there are none, or they differ in quantity, model, shape or settings.
        """
        if not groups:
            raise CausalProbeError("There are no groups to put together.")
        first, *others = groups.values()
        for other in others:
            first.check_alike(other)
        arrays: dict[str, Any] = {}
        for what in cls.ARRAYS:
            each = [getattr(group, what) for group in groups.values()]
            there = next((its for its in each if its is not None), None)
            # A group of one sequence has no standard error: NaN here, and None where it is taken out again.
            arrays[what] = there and {
                name: np.stack([np.full_like(array, np.nan) if its is None else its[name] for its in each])
                for name, array in there.items()
            }
        counts = tuple(group.n_sequences for group in groups.values())
        return replace(first, **arrays, n_sequences=sum(counts), labels=tuple(groups), n_by_label=counts)

    def at(self: Same, label: str) -> Same:
        """The averages of one group of sequences.

        Raises
        ------
        CausalProbeError
            If there is no such group.
        """
        if label not in self.labels:
            raise CausalProbeError(f"There is no group {label!r}; the groups are {', '.join(self.labels) or 'none'}.")
        place = self.labels.index(label)
        arrays: dict[str, Any] = {what: getattr(self, what) for what in self.ARRAYS}
        taken: dict[str, Any] = {
            what: its and {name: array[place] for name, array in its.items()} for what, its in arrays.items()
        }
        taken = {what: None if its and _undefined(its) else its for what, its in taken.items()}
        return replace(self, **taken, n_sequences=self.n_by_label[place], labels=(), n_by_label=())

    def merge(self: Same, other: Same) -> Same:
        """The result of one run over the sequences of both, group by group: sums and sums of squares are added, so it is that to rounding.

        Raises
        ------
        CausalProbeError
            If the quantities, models, shapes or settings differ, standard errors are not known, or shards of a corpus share documents.
        """
        if other is self:
            raise CausalProbeError(
                "A result is merged with one of other sequences, not with itself: its sequences would count twice."
            )
        if bool(self.labels) != bool(other.labels):
            raise CausalProbeError(
                "One of the results has groups of sequences, and the other none: take one group by .at(label)."
            )
        if self.labels:
            merged = {label: self.at(label) for label in self.labels}
            for label in other.labels:
                its = other.at(label)
                merged[label] = merged[label].merge(its) if label in merged else its
            return self.stack(merged)
        self.check_alike(other)
        provenance = merge_provenance(self.provenance, other.provenance)
        if "corpus" in provenance:
            provenance["corpus"] = merge_readings(self.provenance["corpus"], other.provenance["corpus"])
        mine, theirs = self.moments(), other.moments()
        moments = {name: its.merge(theirs[name]) for name, its in mine.items()}
        n = self.n_sequences + other.n_sequences
        rest: dict[str, Any] = {}
        # means whose spread is not kept; None where they are zero throughout
        for what in set(self.ARRAYS) - {"values", "stderr"}:
            each = [(one.n_sequences, getattr(one, what)) for one in (self, other)]
            if any(its is not None for _, its in each):
                rest[what] = {
                    name: np.asarray(sum(k * its[name] for k, its in each if its) / n) for name in self.values
                }
        # two sequences or more: there is a standard error
        return replace(
            replace(self, **rest),
            values={name: its.mean.numpy() for name, its in moments.items()},
            stderr={name: its.stderr.numpy() for name, its in moments.items() if its.stderr is not None},
            n_sequences=n,
            provenance=provenance,
        )

    def check_alike(self, other: Averages) -> None:
        """Raise unless both are of the same quantity, model and shape, measured in the same way."""
        for what, mine, theirs in (
            ("quantities", self.quantity.name, other.quantity.name),
            ("models", self.provenance["model"], other.provenance["model"]),
            ("shapes", shapes(self.values), shapes(other.values)),
            *((name, self.settings.get(name), other.settings.get(name)) for name in {*self.settings, *other.settings}),
            ("sequences (one is text)", "corpus" in self.provenance, "corpus" in other.provenance),
        ):
            if mine != theirs:
                raise CausalProbeError(f"Results can't be merged: their {what} differ, {mine} and {theirs}.")

    def moments(self) -> dict[Any, Moments]:
        """By name: the count, sum and sum of squares that the means and standard errors came from."""
        n = self.n_sequences
        if n > 1 and self.stderr is None:
            raise CausalProbeError(f"Means over {n} sequences without their standard errors can't be merged.")
        found = {}
        for name, mean in self.values.items():
            exact = torch.as_tensor(mean, dtype=torch.float64)
            spread = 0.0 if self.stderr is None else torch.as_tensor(self.stderr[name], dtype=torch.float64) ** 2
            found[name] = Moments(n, n * exact, n * exact**2 + n * (n - 1) * spread)
        return found

    # --------------------------------------------------------------------------------------------------------------- telling

    @property
    def works(self) -> tuple[str, ...]:
        """The papers behind the quantity."""
        return self.quantity.works

    @property
    def methods(self) -> str:
        """One sentence for a methods section."""
        return f"{self.told()} ({self.measured_with})."

    def told(self) -> str:
        """The method, as a sentence without its end."""
        sentence = self.quantity.sentence
        return (
            f"{sentence[:1].upper()}{sentence[1:]} was measured in {self.provenance['model']} and averaged over "
            f"{self.n_sequences:,} sequences"
        )

    @property
    def undefined(self) -> dict[str, str]:
        """Why there is no standard error."""
        return {} if self.stderr is not None else {"stderr": "a standard error needs two sequences or more"}


def _undefined(arrays: Mapping[Any, np.ndarray]) -> bool:
    return any(bool(np.isnan(array).any()) for array in arrays.values())


def shapes(values: Mapping[Any, np.ndarray]) -> dict[Any, list[int]]:
    """The shape of each array, by its name."""
    return {name: list(array.shape) for name, array in values.items()}


def as_arrays(tensors: Mapping[int, Tensor]) -> dict[int, np.ndarray]:
    """By layer, in double precision."""
    return {layer: tensor.double().cpu().numpy() for layer, tensor in tensors.items()}
