"""The plan of a sweep: a grid or a list of points, times probes, written out as cells."""

from __future__ import annotations

import dataclasses
import hashlib
import inspect
import itertools
import json
import math
import os
import reprlib
import sys
from collections import Counter
from collections.abc import Callable, Iterator, Mapping, Sequence
from functools import cache, cached_property
from pathlib import Path
from typing import Any, get_type_hints

import yaml

from causal_probe.arguments import check_value, near
from causal_probe.errors import CausalProbeError, show_path
from causal_probe.results import to_jsonable
from causal_probe.results.files import regular_size

__all__ = ["Cell", "fingerprint", "plan", "read_spec"]

#: The keys of a spec.
KEYS = ("probes", "grid", "cells", "settings", "threads")
#: Options that may name a file or folder; what is in it belongs to the cell.
PATHS = ("model", "graph", "corpus")
#: No sweep has more cells, no folder that a cell reads more files, and no spec is written in more bytes, holds more values (an alias counts
#: each time), or is nested deeper.
MOST_CELLS, MOST_FILES, MOST_BYTES, MOST_VALUES, DEEPEST = 10**6, 10**4, 2**24, 10**7, 50
#: What a cell's random numbers do not depend on: models are compared on the same sequences.
NOT_IN_THE_SEED = ("model", "revision", "dtype", "device", "device_map")


@dataclasses.dataclass(frozen=True)
class Cell:
    """One run of one probe at one point: what it holds decides the answer, and nothing else does.

    Attributes
    ----------
    probe
        The probe's name.
    seed
        As the spec counts them. The probe gets :attr:`derived_seed`.
    options
        The probe's other arguments, in plain JSON types.
    threads
        Of every numerical library, while the cell runs.
    inputs
        By option, the fingerprint of the file or folder that it names: names, sizes and content of the files.

    Examples
    --------
    >>> cell = Cell("gradient", 0, {"graph": "chain"}, 1, {})
    >>> cell.text
    '{"inputs":{},"options":{"graph":"chain"},"probe":"gradient","seed":0,"threads":1}'
    >>> cell.key
    '8773c35e79049254c00f7eac6cdadc89'
    """

    probe: str
    seed: int
    options: Mapping[str, Any]
    threads: int
    inputs: Mapping[str, str]

    @property
    def text(self) -> str:
        """The cell as canonical JSON: keys sorted, no spaces."""
        return _canonical(to_jsonable(self))

    @cached_property
    def key(self) -> str:
        """The name of the cell and of its file: the first 128 bits of the SHA-256 of :attr:`text`, in hexadecimal digits."""
        return hashlib.sha256(self.text.encode()).hexdigest()[:32]

    @property
    def derived_seed(self) -> int:
        """The probe's seed: the first 32 bits of the SHA-256 of the cell without its model and number of threads.

        So cells that differ in seed, probe, task or settings draw independently, and different models, such as the checkpoints
        of one run, are measured on the same sequences.
        """
        options = {name: value for name, value in self.options.items() if name not in NOT_IN_THE_SEED}
        text = _canonical(to_jsonable({"probe": self.probe, "seed": self.seed, "options": options}))
        return int(hashlib.sha256(f"seed {text}".encode()).hexdigest()[:8], 16)


class _EachKeyOnce(yaml.SafeLoader):  # type: ignore[misc]
    """Plain YAML, of which PyYAML would read the last of equal keys alone."""

    def construct_mapping(self, node: Any, deep: bool = False) -> dict[Any, Any]:
        """A mapping."""
        names = [key.value for key, _ in node.value if isinstance(key, yaml.ScalarNode) and key.value != "<<"]
        if twice := [name for name in names if names.count(name) > 1]:
            raise ValueError(f"the key {twice[0]!r} stands twice in one mapping")
        return dict(super().construct_mapping(node, deep=deep))


def read_spec(path: str | os.PathLike[str]) -> dict[str, Any]:
    """A spec from a YAML file (JSON is YAML).

    Raises
    ------
    CausalProbeError
        If the file can't be read, or is no mapping.
    """
    try:
        regular_size(Path(path).expanduser())
        with open(Path(path).expanduser(), encoding="utf-8") as file:
            text = file.read(MOST_BYTES + 1)
        if len(text) > MOST_BYTES:
            raise ValueError(f"it has more than {MOST_BYTES:,} characters")
        content = yaml.load(text, Loader=_EachKeyOnce)
    except OSError as error:
        raise CausalProbeError(f"Can't read {show_path(path)}: {error.strerror or error}.") from error
    except (ValueError, RecursionError, RuntimeError, yaml.YAMLError) as error:
        reason = "it is nested too deep" if isinstance(error, RecursionError) else " ".join(str(error).split())
        raise CausalProbeError(f"{show_path(path)} can't be read as a YAML file: {reason}.") from error
    if not isinstance(content, dict):
        raise CausalProbeError(f"{path} must hold a mapping with {', '.join(KEYS)}; it is a {type(content).__name__}.")
    check_size(content)
    return content


def check_size(spec: Any) -> None:
    """Refuse a spec that is too large, nested too deep, refers to itself, or holds text that can't be written: before anything is made of it.

    Raises
    ------
    CausalProbeError
        If it is so.
    """
    values: dict[int, int] = {}  # by object, so that what is named many times is looked at once

    def count(value: Any, above: tuple[int, ...]) -> int:
        if isinstance(value, str) and not value.isascii() and any("\ud800" <= letter <= "\udfff" for letter in value):
            raise CausalProbeError(
                f"A sweep's spec holds the text {value!a:.100}, which no file can hold: it has half of a surrogate pair."
            )
        if not isinstance(value, (Mapping, list, tuple)):
            return 1
        if id(value) in above:
            raise CausalProbeError("A sweep's spec holds a list or mapping that contains itself.")
        if len(above) > DEEPEST:
            raise CausalProbeError(f"A sweep's spec is nested more than {DEEPEST} deep.")
        if id(value) not in values:
            its = [*value, *value.values()] if isinstance(value, Mapping) else value
            values[id(value)] = 1 + sum(count(each, (*above, id(value))) for each in its)
        return values[id(value)]

    if (found := count(spec, ())) > MOST_VALUES:
        raise CausalProbeError(
            f"A sweep's spec holds {found:.3g} values, aliases written out; {MOST_VALUES:,} are the most."
        )


def plan(spec: Mapping[str, Any], probes: Mapping[str, Callable[..., Any]]) -> tuple[Cell, ...]:
    """The cells of a spec, in its order: points outermost, probes innermost.

    Parameters
    ----------
    spec
        See :func:`causal_probe.sweep`.
    probes
        By name, what is called with a cell's options and its derived seed. The arguments that it takes are the options that
        there are.

    Raises
    ------
    CausalProbeError
        If the spec can't be understood, names a probe or an option that there is not, gives an option a value of another type, says
        something twice, or holds a cell twice.

    Examples
    --------
    >>> def probe(*, seed: int, graph: str) -> None: ...
    >>> spec = {"probes": "probe", "grid": {"graph": ["chain", "pairs"], "seed": [0, 1]}}
    >>> [(cell.options["graph"], cell.seed) for cell in plan(spec, {"probe": probe})]
    [('chain', 0), ('chain', 1), ('pairs', 0), ('pairs', 1)]
    """
    check_size(spec)
    if unknown := sorted(map(str, set(spec) - set(KEYS))):
        raise CausalProbeError(
            f"A sweep's spec says {', '.join(KEYS)}; this one also says {', '.join(unknown)}{near(unknown[0], KEYS)} Options of a probe "
            "go into grid, cells or settings."
        )
    threads = spec.get("threads", 1)
    if not _is_whole(threads) or threads < 1:
        raise CausalProbeError(f"threads is the number of threads of each cell, 1 or more; it is {_shown(threads)}.")
    wanted = _probes_of(spec.get("probes"), probes)
    common = _mapping(spec.get("settings"), "settings")
    grid = _mapping(spec.get("grid"), "grid")
    for what, its in {"settings": common, **{f"the settings of {name}": own for name, own in wanted.items()}}.items():
        if both := sorted(set(its) & set(grid)):
            raise CausalProbeError(f"{', '.join(both)} is said both by the grid and by {what}; say it in one of them.")
    fingerprints: dict[str, str] = {}
    cells = [
        _cell(probes[name], name, {**common, **own, **point}, threads, fingerprints)
        for point in _points(spec, len(wanted))
        for name, own in wanted.items()
    ]
    counts = Counter(cell.key for cell in cells)
    if twice := [cell.text for cell in cells if counts[cell.key] > 1]:
        raise CausalProbeError(f"The sweep holds a cell twice: {twice[0]}")
    return tuple(cells)


def _probes_of(asked: Any, probes: Mapping[str, Callable[..., Any]]) -> dict[str, dict[str, Any]]:
    """By name, the settings that are a probe's own."""
    if isinstance(asked, str):
        asked = [asked]
    if isinstance(asked, Sequence):
        asked = dict.fromkeys(map(str, asked))
    if not isinstance(asked, Mapping) or not asked:
        raise CausalProbeError(f"A sweep needs probes, one or more of {', '.join(probes)}; found {_shown(asked)}.")
    if unknown := sorted(map(str, set(asked) - set(probes))):
        raise CausalProbeError(
            f"There is no probe {', '.join(unknown)} for a sweep{near(unknown[0], probes)} There are {', '.join(probes)}."
        )
    return {str(name): _mapping(own, f"the settings of {name}") for name, own in asked.items()}


def _points(spec: Mapping[str, Any], n_probes: int) -> Iterator[dict[str, Any]]:
    grid = _mapping(spec.get("grid"), "grid")
    listed = spec.get("cells")
    if listed is None and not grid:
        raise CausalProbeError(
            "A sweep needs points: a grid (lists of values by option), cells (a list of mappings), or both."
        )
    axes: dict[str, Sequence[Any]] = {
        name: v if isinstance(v, (list, tuple, range)) else [v] for name, v in grid.items()
    }
    if empty := [name for name, values in axes.items() if not values]:
        raise CausalProbeError(f"The grid has no values for {', '.join(empty)}.")
    if listed is not None and (not isinstance(listed, (list, tuple)) or not listed):
        raise CausalProbeError(f"cells must be a list of mappings; found {_shown(listed)}.")
    points = len(listed) if listed is not None else 1
    cells = math.prod((points, n_probes, *map(_length, axes.values())))
    if cells > MOST_CELLS:
        raise CausalProbeError(
            f"The sweep has {cells:,} cells, more than the {MOST_CELLS:,} that one can have. Cut it into several."
        )
    for point in [{}] if listed is None else listed:
        given = _mapping(point, "a cell")
        if both := sorted(set(given) & set(axes)):
            raise CausalProbeError(f"{', '.join(both)} is said both by the grid and by a cell; say it in one of them.")
        for values in itertools.product(*axes.values()):
            yield {**given, **dict(zip(axes, values, strict=True))}


def _cell(
    function: Callable[..., Any], name: str, options: Mapping[str, Any], threads: int, fingerprints: dict[str, str]
) -> Cell:
    hints = _hints(function)
    seed = options.get("seed", 0)
    if not _is_whole(seed) or seed < 0:
        raise CausalProbeError(f"A seed must be a whole number of at least 0, not {_shown(seed)}.")
    given = {key: value for key, value in options.items() if key != "seed"}
    takes = {key: p for key, p in inspect.signature(function).parameters.items() if key not in ("seed", "options")}
    free = any(p.kind is p.VAR_KEYWORD for p in inspect.signature(function).parameters.values())
    if not free and (unknown := sorted(set(given) - set(takes))):
        raise CausalProbeError(
            f"The probe {name} has no option {', '.join(unknown)}{near(unknown[0], takes)} Its options are {', '.join(takes)} and seed. "
            f"Options of one probe alone go into its own settings: probes: {{{name}: {{...}}}}."
        )
    required = [key for key, p in takes.items() if p.default is p.empty and p.kind is p.KEYWORD_ONLY]
    if missing := sorted(set(required) - set(given)):
        raise CausalProbeError(f"The probe {name} needs {', '.join(missing)}.")
    plain = dict(to_jsonable(given))
    for option, value in plain.items():
        if option in hints:
            try:
                check_value(option, value, hints[option])
            except CausalProbeError as error:
                raise CausalProbeError(f"The probe {name}: {error}") from None
    if (options_class := getattr(function, "options", None)) is not None:
        try:
            options_class(**plain)
        except CausalProbeError as error:
            raise CausalProbeError(f"The probe {name}: {error}") from None
    inputs = {}
    for option in PATHS:
        value = plain.get(option)
        if isinstance(value, str) and os.path.exists(value):
            if value not in fingerprints:
                fingerprints[value] = fingerprint(value)
            inputs[option] = fingerprints[value]
    return Cell(name, seed, plain, threads, inputs)


@cache
def _hints(function: Callable[..., Any]) -> dict[str, Any]:
    """The types of a probe's options, as far as they can be found out; a shipped probe's class looks at them itself."""
    try:
        return {} if hasattr(function, "options") else get_type_hints(function, include_extras=True)
    except (NameError, TypeError):  # a name that only a type checker knows; something that carries no annotations
        return {}


def fingerprint(path: str | os.PathLike[str]) -> str:
    """What tells one file or folder from another: the first 128 bits of a SHA-256 (see :attr:`Cell.inputs`).

    Raises
    ------
    CausalProbeError
        If a file can't be read, or the folder holds so many that it is none of a model's.
    """
    top, found = Path(path), hashlib.sha256()
    files = list(itertools.islice(top.rglob("*"), MOST_FILES + 1)) if top.is_dir() else [top]
    if len(files) > MOST_FILES:
        raise CausalProbeError(
            f"{path} holds more than {MOST_FILES:,} files and folders, all of which would belong to the cell. Name the folder of one model."
        )
    try:
        for file in sorted(files):
            if file.is_file():
                found.update(
                    f"{file.relative_to(top).as_posix()} {file.stat().st_size}\n".encode(errors="surrogateescape")
                )
                with open(file, "rb") as content:
                    while piece := content.read(2**20):
                        found.update(piece)
    except OSError as error:
        raise CausalProbeError(f"Can't read {path}, which a cell names: {error.strerror or error}.") from error
    return found.hexdigest()[:32]


def _mapping(value: Any, what: str) -> dict[str, Any]:
    if value is None:
        return {}
    if not isinstance(value, Mapping):
        raise CausalProbeError(f"In a sweep's spec, {what} must be a mapping; found {_shown(value)}.")
    return {str(key): item for key, item in value.items()}


def _length(values: Sequence[Any]) -> int:
    try:
        return len(values)
    except OverflowError:  # a range
        return sys.maxsize


def _shown(value: Any) -> str:
    """A value in few characters, without looking at all of it."""
    short = reprlib.Repr()
    short.maxlevel, short.maxlist, short.maxtuple, short.maxdict = 2, 4, 4, 4
    return f"{short.repr(value):.100}"


def _is_whole(value: Any) -> bool:
    return isinstance(value, int) and not isinstance(value, bool)


def _canonical(value: Any) -> str:
    return json.dumps(value, sort_keys=True, separators=(",", ":"), ensure_ascii=False, allow_nan=False)
