"""The common base of all reproductions: a result with the paper's numbers beside ours, and parts that are computed once.

A reproduction is a function ``(run: Run) -> Reproduction`` under :func:`reproduction`, which enters it in
:data:`causal_probe.papers.REPRODUCTIONS`. All that takes long it does in named *parts*, each a call of ``run.part(name, compute)``: with a
folder, a part that is finished is written there, and the same command reads it instead of computing it again.

>>> run = Run(quick=True)
>>> run.part("sum", lambda: {"total": 1 + 1, "terms": [1, 1]})
{'total': 2, 'terms': [1, 1]}
"""

from __future__ import annotations

import dataclasses
import os
import re
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import pandas as pd
from matplotlib.figure import Figure
from numpy.typing import NDArray

from causal_probe import viz
from causal_probe.errors import CausalProbeError
from causal_probe.options.studies import ReproduceOptions
from causal_probe.results import (
    BINARY,
    UNSAVED,
    Result,
    Table,
    list_files,
    read_arrays,
    read_sealed,
    seal,
    to_jsonable,
    write_arrays,
    write_json,
)
from causal_probe.training.checkpoint import Checkpoint

__all__ = ["PARTS", "REGISTERED", "Line", "Reproduction", "Run", "Study", "reproduction"]

#: The result's file, which is written last: a folder that has it holds a whole reproduction.
RESULT = "result.json"
#: The folder of finished parts, and the file that names their run.
PARTS, BEGUN = "parts", "parts/run.json"
#: The settings that say which run a folder belongs to. All others follow from them in one version of the code; what a part depends on
#: besides, its own settings say.
IDENTITY = ("name", "quick", "seed")
#: The files of a part, and what a kill in the middle of writing leaves of any file.
OF_A_PART = re.compile(r"parts/[a-z0-9]+(-[a-z0-9]+)*(\.checkpoint)?\.(json|safetensors)")
CUT_SHORT = re.compile(r"(.*/)?\.[^/]*\.causal-probe-(partial|lock)")


@dataclasses.dataclass(frozen=True)
class Line:
    """One quantity: our measured value and the paper's.

    Attributes
    ----------
    quantity
        Its name, with the unit.
    ours
        Our value; None if it is undefined, and then ``note`` says why.
    standard_error
        Of ``ours``; None where it is exact or has none.
    paper
        The paper's number, or its claim in words; None if it gives neither.
    checked
        The source: where in the paper or its code, or the computation that stands in for it.
    holds
        Whether our value agrees with the paper (rule in ``note``); None if the paper gives nothing to compare.
    note
        Anything that a reader needs to use the number.
    """

    quantity: str
    ours: float | int | str | None
    standard_error: float | None = None
    paper: float | int | str | None = None
    checked: str = ""
    holds: bool | None = None
    note: str = ""


@dataclasses.dataclass(frozen=True, eq=False, repr=False)
class Reproduction(Result):
    """A paper's experiment, done again.

    Attributes
    ----------
    name
        By which it is asked for, such as ``"gradient-descent"``.
    title
        One line.
    paper
        Keys of :data:`causal_probe.results.BIBLIOGRAPHY`.
    summary
        The finding, in a sentence or two.
    lines
        The table.
    figures
        matplotlib figures by their file's name, without an ending. They are in no file but their own.
    captions
        A description of each figure, by the same names.
    notes
        Deviations from the paper and claims that don't hold, one paragraph each.
    method
        The procedure, in one sentence for a methods section.
    arrays
        Raw values behind the table and the figures.
    settings
        All choices, including ``name``, ``quick`` and ``seed``.
    """

    KIND = "reproduction"
    DERIVED = ("holds", "methods")

    name: str
    title: str
    paper: tuple[str, ...]
    summary: str
    lines: tuple[Line, ...]
    figures: Mapping[str, Figure] = dataclasses.field(default_factory=dict, metadata=UNSAVED)
    captions: Mapping[str, str] = dataclasses.field(default_factory=dict)
    notes: tuple[str, ...] = ()
    method: str = ""
    arrays: Mapping[str, NDArray[Any]] = dataclasses.field(default_factory=dict, metadata=BINARY)

    def __post_init__(self) -> None:
        super().__post_init__()
        wrong = [name for name in (*self.figures, *self.arrays) if not re.fullmatch(r"[a-z0-9][a-z0-9_.-]*", name)]
        if wrong:
            raise CausalProbeError(
                f"Figures and arrays are named in lower case, as files can be; these are not: {wrong}."
            )

    @property
    def holds(self) -> bool:
        """Whether our value agrees with the paper in every line that compares them."""
        return all(line.holds is not False for line in self.lines)

    @property
    def works(self) -> tuple[str, ...]:
        """Keys of the bibliography."""
        return self.paper

    @property
    def methods(self) -> str:
        """One sentence for a methods section."""
        said = (self.method or f"{self.title} ({self.name}), done again").removesuffix(".")
        return f"{said} ({self.measured_with})."

    @property
    def undefined(self) -> dict[str, str]:
        """Why a line has no number of ours."""
        return {line.quantity: line.note for line in self.lines if line.ours is None}

    def table(self) -> Table:
        """Ours beside the paper's."""
        columns = ("quantity", "ours", "stderr", "paper", "holds")
        rows = [
            (
                line.quantity,
                f"undefined: {line.note}" if line.ours is None else line.ours,
                line.standard_error,
                line.paper,
                None if line.holds is None else "yes" if line.holds else "NO",
            )
            for line in self.lines
        ]
        return Table(self.title, columns, rows, (self.summary,))

    def to_pandas(self) -> pd.DataFrame:
        """The table: one row for each line."""
        return pd.DataFrame([dataclasses.asdict(line) for line in self.lines])

    @property
    def call(self) -> str:
        """The Python that gives this result."""
        return ReproduceOptions.call("papers.reproduce", self.settings)

    def write(
        self, folder: str | os.PathLike[str], *, page: Callable[[Reproduction, Path], object] | None = None
    ) -> None:
        """Write one SVG for each figure, ``arrays.safetensors``, the page by ``page`` and, last, ``result.json``.

        Each file is written whole or not at all, in a new or empty folder or one of the same name, ``quick`` and ``seed``.

        Raises
        ------
        CausalProbeError
            If ``folder`` can't be written, or holds anything else.
        """
        target = _open(folder, self.settings, overwrite=False)
        for name, figure in self.figures.items():
            viz.write_svg(figure, target / f"{name}.svg", description=self.captions.get(name, ""))
        if self.arrays:
            write_arrays(target / "arrays.safetensors", self.arrays)
        if page is not None:
            page(self, target)
        files = sorted({*list_files(target), RESULT})
        write_json(target / RESULT, seal({**self.to_dict(), "files": files}))


# ------------------------------------------------------------------------------------------------------------ a run's parts


class Run:
    """The inputs of a reproduction: its options, and a way to do its parts once.

    Parameters
    ----------
    quick
        Do a smaller run, of less than five minutes on two CPU cores.
    seed
        Of all random numbers.
    progress
        Show progress bars on standard error.
    folder
        Where finished parts are kept; None: nowhere.
    settings
        Other settings that the parts depend on: ``name``. A folder of another name, ``quick`` or ``seed`` is refused.
    overwrite
        Remove the files of an earlier run with other settings.

    Raises
    ------
    CausalProbeError
        If the folder can't be written, or holds anything but an earlier run of the same settings.
    """

    def __init__(
        self,
        *,
        quick: bool = False,
        seed: int = 0,
        progress: bool = False,
        folder: str | os.PathLike[str] | None = None,
        settings: Mapping[str, Any] | None = None,
        overwrite: bool = False,
    ) -> None:
        self.quick, self.seed, self.progress = quick, seed, progress
        self.settings: dict[str, Any] = {"quick": quick, "seed": seed, **(settings or {})}
        self._parts = None if folder is None else _open(folder, self.settings, overwrite=overwrite) / PARTS

    def part(
        self, name: str, compute: Callable[[], Mapping[str, Any]], *, settings: Mapping[str, Any] | None = None
    ) -> dict[str, Any]:
        """The values of ``compute()``, computed once.

        Parameters
        ----------
        name
            In kebab-case; one for each part.
        compute
            Returns plain values and NumPy arrays by their names. Plain values come back as JSON gives them, in the first run and
            in every later one alike: tuples are lists. Arrays come back as they are.
        settings
            Settings that the part depends on. A part with other settings, or without its arrays, is refused.

        Raises
        ------
        CausalProbeError
            If the name is not one, or the folder holds a part of that name which can't be used.
        """
        if not re.fullmatch(r"[a-z0-9]+(-[a-z0-9]+)*", name):
            raise CausalProbeError(f"A part's name is in kebab-case, such as 'seed-0'; this one is {name!r}.")
        done = None if self._parts is None else self._parts / f"{name}.json"
        if done is not None and done.is_file():
            return _read_part(done, to_jsonable(settings))
        content = dict(compute())
        arrays = {key: value for key, value in content.items() if isinstance(value, np.ndarray)}
        values = to_jsonable({key: value for key, value in content.items() if key not in arrays})
        if done is not None:
            if arrays:
                write_arrays(done.with_suffix(".safetensors"), arrays)
            identity = {"kind": "part", "settings": settings, "arrays": sorted(arrays)}
            write_json(done, seal({**identity, "values": values}))  # last: a part with this file is whole
            self._checkpoint_file(name).unlink(missing_ok=True)
        return {**values, **arrays}

    def checkpoint(
        self, name: str, *, every: int = 500, settings: Mapping[str, Any] | None = None
    ) -> Checkpoint | None:
        """Where the training in the part ``name`` keeps how far it is; None without a folder. It is deleted when the part is done.

        Parameters
        ----------
        every
            Training steps between two checkpoints.
        settings
            Settings that the training depends on. A checkpoint with other settings is refused.
        """
        if self._parts is None:
            return None
        identity = {**{key: self.settings.get(key) for key in IDENTITY}, "part": name, "settings": settings}
        return Checkpoint(self._checkpoint_file(name), to_jsonable(identity), every=every)

    def _checkpoint_file(self, name: str) -> Path:
        assert self._parts is not None
        return self._parts / f"{name}.checkpoint.safetensors"


def _read_part(done: Path, settings: Any) -> dict[str, Any]:
    """The values and arrays of a part, if it was computed with these settings and is whole."""
    kept = read_sealed(done)
    anew = f"Delete {done.name} to compute it again, or pass --overwrite to begin anew."
    if kept.get("settings") != settings:
        raise CausalProbeError(f"The part {done.stem} in {done.parent} was computed with other settings. {anew}")
    file = done.with_suffix(".safetensors")
    arrays = read_arrays(file)[0] if file.is_file() else {}
    if missing := sorted(set(kept.get("arrays", ())) - set(arrays)):
        raise CausalProbeError(f"The part {done.stem} in {done.parent} lacks its arrays {', '.join(missing)}. {anew}")
    return {**kept["values"], **arrays}


def _open(folder: str | os.PathLike[str], settings: Mapping[str, Any], *, overwrite: bool) -> Path:
    """The folder, made if it is missing, with the settings written into it; refused if it holds anything else than their run."""
    target = Path(folder)
    settings = {key: settings.get(key) for key in IDENTITY}
    try:
        if target.exists() and not target.is_dir():
            raise CausalProbeError(f"--out names {folder}, which is a file. Name a folder.")
        if (target / PARTS).is_symlink():
            raise CausalProbeError(f"{target / PARTS} is a link to another place. Name another folder.")
        there = list_files(target) if target.is_dir() else []
        for name in filter(CUT_SHORT.fullmatch, there):
            (target / name).unlink()
        if there := [name for name in there if not CUT_SHORT.fullmatch(name)]:
            if BEGUN not in there:
                raise CausalProbeError(
                    f"{folder} is not empty and holds no earlier reproduction. Name a new or empty folder."
                )
            if read_sealed(target / BEGUN) != to_jsonable(settings):
                if not overwrite:
                    raise CausalProbeError(
                        f"{folder} holds a reproduction of other settings. Name another folder, or pass --overwrite."
                    )
                _clear(target, there)
        (target / PARTS).mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise CausalProbeError(
            f"Can't make the folder {folder}: {error.strerror}. Name another one with --out."
        ) from error
    write_json(target / BEGUN, seal(settings))
    return target


def _clear(target: Path, there: list[str]) -> None:
    """Remove an earlier run's own files; refuse if there are others.

    What the result lists is taken at its word only where it names a file that is there: no name leads out of the folder.
    """
    listed = set(map(str, read_sealed(target / RESULT).get("files", ()))) if RESULT in there else set()
    own = [name for name in there if name in {*listed, RESULT} or OF_A_PART.fullmatch(name)]
    foreign = sorted(name for name in there if name not in own or (target / name).is_symlink())
    if foreign:
        raise CausalProbeError(
            f"{target} holds files that causal-probe did not write there ({', '.join(foreign[:3])}). Name another folder."
        )
    for name in own:
        (target / name).unlink()


# ---------------------------------------------------------------------------------------------------------------- registry


class Study(NamedTuple):
    """A reproduction that can be asked for.

    Attributes
    ----------
    function
        Does it.
    about
        One line.
    minutes
        Estimated time on one CPU core, from the measured time of a step: with ``quick``, and without.
    """

    function: Callable[[Run], Reproduction]
    about: str
    minutes: tuple[float, float]


#: Every reproduction by its name.
REGISTERED: dict[str, Study] = {}


def reproduction(
    name: str, about: str, *, minutes: tuple[float, float]
) -> Callable[[Callable[[Run], Reproduction]], Callable[[Run], Reproduction]]:
    """Enter a function as the reproduction ``name``.

    Parameters
    ----------
    about
        One line.
    minutes
        See :class:`Study`.
    """

    def enter(function: Callable[[Run], Reproduction]) -> Callable[[Run], Reproduction]:
        REGISTERED[name] = Study(function, about, minutes)
        return function

    return enter
