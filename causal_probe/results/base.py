"""The base of all results: printing, display, files and citation follow from the fields."""

from __future__ import annotations

import dataclasses
import os
import sys
from collections.abc import Mapping
from pathlib import Path
from typing import Any, ClassVar, TypeVar

from causal_probe.arguments import checked
from causal_probe.errors import CausalProbeError
from causal_probe.results.citing import Citation, cite
from causal_probe.results.decoding import Undecodable, decode, put_back
from causal_probe.results.files import (
    check_format,
    read_arrays,
    seal,
    write_arrays,
    write_bytes,
    write_json,
    write_text,
)
from causal_probe.results.jsonable import set_aside, to_jsonable
from causal_probe.results.provenance import measured_with, this_process
from causal_probe.results.showing import Table
from causal_probe.results.tables import csv_text, parquet_bytes

__all__ = ["Result", "load"]

R = TypeVar("R", bound="Result")

#: The classes of results by their kind.
_CLASSES: dict[str, type[Result]] = {}


@dataclasses.dataclass(frozen=True, eq=False, repr=False)
class Result:
    """A finding and its provenance: the base of every result, a dataclass with ``frozen=True, eq=False, repr=False``.

    A class says what it is by ``KIND`` (and ``FORMAT``, which grows when its fields change), what it builds on by ``WORKS`` and
    :attr:`methods`, and how it is shown by :meth:`table`. Files, JSON, tables and the citation follow from these and from the fields.
    A class may have an attribute ``undefined``: by name, the reasons for what is None.

    Attributes
    ----------
    settings
        The arguments of the call.
    provenance
        The environment of the measurement: ``versions`` and ``threads`` of the process that made the result, taken when it is made, beside
        what the class is given (``describe(model)``: ``model``, ``dtype``, ``device``). A file, a copy and a merged result keep them.

    Examples
    --------
    >>> @dataclasses.dataclass(frozen=True, eq=False, repr=False)
    ... class Length(Result):
    ...     KIND = "an example"
    ...     WORKS = ("elhage2021",)
    ...     each: tuple[int, ...]
    ...
    ...     @property
    ...     def methods(self):
    ...         return f"Lengths were measured ({self.measured_with})."
    ...
    ...     def table(self):
    ...         return Table("Lengths", ["sequence", "length"], list(enumerate(self.each)))
    >>> Length((3, 5))
    Lengths
      sequence  length
             0       3
             1       5
    >>> Length((3, 5)).to_dict()["each"]
    [3, 5]
    """

    #: A short name that never changes, by which a file finds its class; and the number of what is written under it.
    KIND: ClassVar[str]
    FORMAT: ClassVar[int] = 1
    #: Keys of the bibliography.
    WORKS: ClassVar[tuple[str, ...]] = ()
    #: Properties that JSON states beside the fields.
    DERIVED: ClassVar[tuple[str, ...]] = ()

    settings: Mapping[str, Any] = dataclasses.field(default_factory=dict, kw_only=True)
    provenance: Mapping[str, Any] = dataclasses.field(default_factory=dict, kw_only=True)

    def __init_subclass__(cls, **options: Any) -> None:
        super().__init_subclass__(**options)
        if "KIND" in vars(cls):
            other = _CLASSES.setdefault(cls.KIND, cls)
            if (other.__module__, other.__qualname__) != (cls.__module__, cls.__qualname__):
                raise TypeError(f"{cls.__qualname__} and {other.__qualname__} are both of the kind {cls.KIND!r}.")
            _CLASSES[cls.KIND] = cls

    def __post_init__(self) -> None:
        """Record the process, unless the result comes with what recorded it already."""
        if "versions" not in self.provenance:
            object.__setattr__(self, "provenance", this_process(**self.provenance))

    # ------------------------------------------------------------------------------------------------- what a class says

    @property
    def methods(self) -> str:
        """One sentence for a methods section."""
        raise NotImplementedError(f"{type(self).__name__} says no methods")

    @property
    def works(self) -> tuple[str, ...]:
        """Keys of the bibliography: ``WORKS``, unless they depend on what was measured."""
        return self.WORKS

    def table(self) -> Table:
        """The table by which the result is shown."""
        raise NotImplementedError(f"{type(self).__name__} has no table")

    # ------------------------------------------------------------------------------------------------------ what follows

    @property
    def measured_with(self) -> str:
        """The software, dtype and device, for the end of a methods sentence."""
        return measured_with(self.provenance)

    def cite(self) -> Citation:
        """The works behind this result, and one sentence for a methods section."""
        return cite(*self.works, methods=self.methods)

    def to_dict(self) -> dict[str, Any]:
        """Everything in plain JSON types: ``kind``, ``format``, the fields, ``undefined``, ``settings`` and ``provenance``."""
        plain: dict[str, Any] = to_jsonable(self)
        last = {name: plain.pop(name) for name in ("settings", "provenance")}
        return {**plain, "undefined": to_jsonable(getattr(self, "undefined", {})), **last}

    def to_pandas(self) -> Any:
        """The rows of :meth:`table`; what is undefined is missing, as pandas has it."""
        import pandas as pd  # what only reads or writes does without

        shown = self.table()
        return pd.DataFrame([list(row) for row in shown.rows], columns=list(shown.columns))

    def plot(self, *what: Any, **options: Any) -> Any:
        """The picture of this result, where there is one.

        The pictures of each kind of result:

        - head scores, a scan: ``plot("induction", value="excess")``, every head, by default against all templates; head scores also
          ``plot("induction", model=model)``, the called heads on one sequence, in circuitsvis;
        - a verification: the rise of the loss without each head; ``plot("dependence")``, which heads need which;
        - upstream: the confirmed arrows, by layer;
        - QK attributions: the sources that matter most;
        - a circuit: its edges between components, by layer;
        - evidence: ``plot("L0H1", truth=dag)``, a head's graph; without a head, every head's values;
        - a discovery: ``plot("L5H3")``, a head's mixed graph, by default the first;
        - a recovery: the true graph above, the found one below; ``plot("training")``, the loss;
        - a leaderboard: ``plot("skill")``, one figure by model and graph; a comparison of evidence: its F1;
        - methods on known circuits: AUROC by kind of circuit; ``plot("edges")``, by kind of edge;
        - graph selectivity: ``plot("L2H0")``, a head's attention on the parents of each graph, in the sequences of each graph and in all;
        - dynamics: the series with their change-points;
        - phases: the weights of the reference predictors along a training, and the residual;
        - a reproduction: ``plot(name)``, one of its figures, by default the first.

        Other options (``title``, say) go to the function of :mod:`causal_probe.viz` that draws it.

        Raises
        ------
        CausalProbeError
            If results of this class have no picture, or none of this name.
        """
        # Pictures are drawn in a room above this one; the package stands above all rooms.
        return sys.modules[__name__.partition(".")[0]].plot(self, *what, **options)

    @checked
    def save(self, path: str | os.PathLike[str]) -> None:
        """Write the result to ``path``, whole or not at all.

        The suffix says what is written: ``.safetensors`` everything, for :func:`load`; ``.json`` :meth:`to_dict`; ``.csv`` or ``.parquet``
        :meth:`to_pandas`.

        Raises
        ------
        CausalProbeError
            If the suffix is another one, or the file can't be written.
        """
        suffix = Path(path).suffix
        if suffix == ".safetensors":
            plain, arrays = set_aside(self)
            write_arrays(path, arrays, about=plain)
        elif suffix == ".json":
            write_json(path, seal(self.to_dict()))
        elif suffix == ".csv":
            write_text(path, csv_text(self.to_pandas()))
        elif suffix == ".parquet":
            write_bytes(path, parquet_bytes(self.to_pandas()))
        else:
            raise CausalProbeError(
                f"A result can't be saved as {os.fspath(path)!r}. Its name ends in .safetensors (all, to be loaded again), .json, .csv or "
                ".parquet."
            )

    @classmethod
    def load(cls: type[R], path: str | os.PathLike[str]) -> R:
        """Load a ``.safetensors`` file that :meth:`save` has written.

        Raises
        ------
        CausalProbeError
            If the file is missing, damaged, of another class, or of another format.
        """
        found = load(path)
        if not isinstance(found, cls):
            raise CausalProbeError(f"{path} holds {found.KIND} ({type(found).__name__}), no {cls.__name__}.")
        return found

    def __repr__(self) -> str:
        return self.table().text()

    def _repr_html_(self) -> str:
        return self.table().html()


@checked
def load(path: str | os.PathLike[str]) -> Result:
    """The result in a ``.safetensors`` file, of whatever kind. Arrays of torch come back on the CPU.

    Raises
    ------
    CausalProbeError
        If the file is missing or damaged, or its kind or its format is not one of this version's.

    Examples
    --------
    >>> import tempfile
    >>> from causal_probe.graphs import chain
    >>> with tempfile.TemporaryDirectory() as folder:
    ...     load(f"{folder}/nothing.safetensors")
    Traceback (most recent call last):
    causal_probe.errors.CausalProbeError: Can't read ...: No such file or directory.
    """
    if (suffix := Path(path).suffix) in (".json", ".csv", ".parquet"):
        raise CausalProbeError(
            f"A result is loaded from its .safetensors file; {suffix} holds no more than its numbers. Name that file."
        )
    arrays, about = read_arrays(path)
    kind = _CLASSES.get(str(about.get("kind")))
    if kind is None:
        raise CausalProbeError(
            f"{path} holds {about.get('kind') or 'no result'}, which no class that is imported reads. Import causal_probe's part that "
            "measures it first, or upgrade."
        )
    check_format(path, about, kind.FORMAT)
    try:
        found: Result = decode(kind, put_back(about, arrays), _class_of)
    except (Undecodable, TypeError) as error:
        raise CausalProbeError(f"{path} does not hold a whole {kind.__name__}: {error}.") from error
    return found


def _class_of(kind: str) -> type[Result]:
    if kind not in _CLASSES:
        raise Undecodable(f"no class reads {kind!r}")
    return _CLASSES[kind]
