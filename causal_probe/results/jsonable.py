"""Results in plain JSON types, and with their arrays set aside for a binary file.

One walk makes both forms. In JSON an array is a nested list and NaN is refused: what is undefined is None, with a reason beside it. Where
arrays are set aside, ``{"$array": name}`` stands in the array's place.
"""

from __future__ import annotations

import dataclasses
import enum
import math
import os
import sys
from collections.abc import Mapping
from typing import Any

import networkx as nx
import numpy as np
from numpy.typing import NDArray

from causal_probe.errors import CausalProbeError

__all__ = ["ARRAY", "BINARY", "UNSAVED", "set_aside", "to_jsonable"]

#: Metadata of a dataclass's field: not in JSON, only in the file that can be read back (large arrays).
BINARY: Mapping[str, bool] = {"causal_probe.json": False}
#: Metadata of a dataclass's field with a default: in no file (a live model); a loaded result has the default.
UNSAVED: Mapping[str, bool] = {"causal_probe.json": False, "causal_probe.saved": False}
#: The key that replaces an array that is set aside.
ARRAY = "$array"

Arrays = dict[str, NDArray[Any]]


def to_jsonable(value: Any) -> Any:
    """``value`` in plain JSON types: arrays as nested lists, graphs as node-link with the key ``edges``, named tuples as mappings.

    A mapping whose keys are neither strings nor numbers is a list of ``[key, value]``. Of a dataclass that names properties in ``DERIVED``,
    these stand beside its fields; a field with the metadata :data:`BINARY` is left out.

    Raises
    ------
    CausalProbeError
        For NaN, an infinity, or a type that has no plain form. What is undefined is None, never NaN.

    Examples
    --------
    >>> import numpy as np
    >>> to_jsonable({"weights": np.eye(2), "heads": (1, 1), "error": None})
    {'weights': [[1.0, 0.0], [0.0, 1.0]], 'heads': [1, 1], 'error': None}
    """
    return _plain(value, None, "")


def set_aside(value: Any) -> tuple[Any, Arrays]:
    """``value`` in plain JSON types, and by name the arrays for which :data:`ARRAY` stands in it.

    Raises
    ------
    CausalProbeError
        As for :func:`to_jsonable`. Arrays may hold NaN.

    Examples
    --------
    >>> import numpy as np
    >>> set_aside({"layers": [np.zeros(1)]})
    ({'layers': [{'$array': 'layers.0'}]}, {'layers.0': array([0.])})
    """
    arrays: Arrays = {}
    return _plain(value, arrays, ""), arrays


def saved_fields(kind: Any) -> list[dataclasses.Field[Any]]:
    """The fields of a dataclass that a file which can be read back holds."""
    return [field for field in dataclasses.fields(kind) if field.metadata.get("causal_probe.saved", True)]


def is_named_tuple(kind: Any) -> bool:
    """Whether a class is a named tuple."""
    return isinstance(kind, type) and issubclass(kind, tuple) and hasattr(kind, "_fields")


def _plain(value: Any, arrays: Arrays | None, at: str) -> Any:
    if isinstance(value, enum.Enum):
        return _plain(value.value, arrays, at)
    if value is None or isinstance(value, (bool, int, str)):
        return value
    if isinstance(value, (float, np.floating)):
        if not math.isfinite(value):
            raise CausalProbeError(
                f"A result was to be written as JSON and holds {value!r}. What is undefined must be None with a reason beside it."
            )
        return float(value)
    if isinstance(value, (np.integer, np.bool_)):
        return value.item()
    if hasattr(value, "detach"):  # a tensor, without importing torch here
        value = value.detach().cpu()
        return _plain(value.tolist(), None, at) if arrays is None else _reference(value.numpy(), arrays, at)
    if isinstance(value, np.ndarray):
        return _plain(value.tolist(), None, at) if arrays is None else _reference(value, arrays, at)
    if isinstance(value, os.PathLike):
        return os.fspath(value)
    if isinstance(value, nx.Graph):
        return _plain(nx.node_link_data(value, edges="edges"), arrays, at)
    if dataclasses.is_dataclass(value) and not isinstance(value, type):
        return _dataclass(value, arrays, at)
    if is_named_tuple(type(value)):
        value = value._asdict()
    if isinstance(value, Mapping):
        return _mapping(value, arrays, at)
    if isinstance(value, (list, tuple, set, frozenset)):
        items = sorted(value) if isinstance(value, (set, frozenset)) else value
        return [_plain(item, arrays, _below(at, index)) for index, item in enumerate(items)]
    pandas = sys.modules.get("pandas")
    if pandas is not None and isinstance(value, pandas.DataFrame):
        return _frame(value, arrays, at)
    raise CausalProbeError(f"A value of type {type(value).__name__} can't be written as JSON.")


def _below(at: str, name: object) -> str:
    return f"{at}.{name}" if at else str(name)


def _reference(value: NDArray[Any], arrays: Arrays, at: str) -> dict[str, str]:
    name = at or "array"
    while name in arrays:  # a key may hold the dot that joins two
        name += "'"
    arrays[name] = value
    return {ARRAY: name}


def _dataclass(value: Any, arrays: Arrays | None, at: str) -> dict[str, Any]:
    kind = getattr(value, "KIND", None)
    plain: dict[str, Any] = {} if kind is None else {"kind": kind, "format": value.FORMAT}
    fields = saved_fields(value)
    if arrays is None:
        fields = [field for field in fields if field.metadata.get("causal_probe.json", True)]
        derived = getattr(value, "DERIVED", ())
        plain |= {name: _plain(getattr(value, name), None, name) for name in derived}
    return plain | {field.name: _plain(getattr(value, field.name), arrays, _below(at, field.name)) for field in fields}


def _mapping(value: Mapping[Any, Any], arrays: Arrays | None, at: str) -> Any:
    if arrays is not None and ARRAY in value:
        raise CausalProbeError(
            f"A result holds a mapping with the key {ARRAY!r}, which stands for an array in its file."
        )
    if all(isinstance(key, (str, int, float, np.number)) for key in value):
        return {str(key): _plain(item, arrays, _below(at, key)) for key, item in value.items()}
    return [
        [_plain(key, arrays, f"{at}.{index}.key"), _plain(item, arrays, _below(at, index))]
        for index, (key, item) in enumerate(value.items())
    ]


def _frame(frame: Any, arrays: Arrays | None, at: str) -> dict[str, Any]:
    columns: dict[str, Any] = {}
    for name in frame.columns:
        column = frame[name].to_numpy()
        if arrays is not None and column.dtype.kind in "biuf":
            columns[str(name)] = _reference(column, arrays, _below(at, name))
        else:
            missing = frame[name].isna()
            columns[str(name)] = [
                None if absent else _plain(item, None, at)
                for item, absent in zip(column.tolist(), missing, strict=True)
            ]
    return columns
