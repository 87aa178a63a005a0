"""Plain JSON types back into what they were, by the type hints of the class that they belong to.

A hint that says nothing (``Any``) leaves plain values as they are: a tuple among the settings comes back as a list. The library cattrs
does such things too; it turns ``5`` into ``"5"`` where a text is expected, and would need a hook for each of arrays, tensors, graphs, tables,
unions and mappings by pairs, which are most of what is here.
"""

from __future__ import annotations

import collections.abc
import dataclasses
import enum
import functools
import os
import types
import typing
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any, Literal, Union, get_args, get_origin

import networkx as nx
import numpy as np
from numpy.typing import NDArray

from causal_probe.results.jsonable import ARRAY, is_named_tuple, saved_fields

__all__ = ["Undecodable", "decode", "put_back"]


class Undecodable(ValueError):
    """A value that does not have the type of its hint."""


def put_back(plain: Any, arrays: Mapping[str, NDArray[Any]]) -> Any:
    """What :func:`~causal_probe.results.jsonable.set_aside` gave, with the arrays in their places.

    Raises
    ------
    Undecodable
        If an array is missing.
    """
    if isinstance(plain, list):
        return [put_back(item, arrays) for item in plain]
    if not isinstance(plain, dict):
        return plain
    if ARRAY not in plain:
        return {key: put_back(item, arrays) for key, item in plain.items()}
    if plain[ARRAY] not in arrays:
        raise Undecodable(f"the array {plain[ARRAY]!r} is missing")
    return arrays[plain[ARRAY]]


def decode(hint: Any, value: Any, find: Callable[[str], type], at: str = "") -> Any:
    """``value`` as the type that ``hint`` names.

    Parameters
    ----------
    hint
        A resolved type hint.
    find
        The class of results of a kind.
    at
        Where the value stands, for the error.

    Raises
    ------
    Undecodable
        If it is not of that type.

    Examples
    --------
    >>> decode(dict[int, tuple[float, ...]], {"3": [1, 2.5]}, find=type)
    {3: (1.0, 2.5)}
    """
    origin, inner = get_origin(hint), get_args(hint)
    if hint is Any or hint is object:
        return value
    if hasattr(named := origin or hint, "__value__"):  # an alias of Python 3.12, as NDArray is from NumPy 2.5 on
        return decode(named.__value__, value, find, at)
    if origin in (Union, types.UnionType):
        return _first_that_fits(inner, value, find, at)
    if origin is Literal:
        return _checked(value in inner, value, hint, at)
    if hint is None or hint is type(None):
        return _checked(value is None, value, hint, at)
    kind = origin or hint
    if hasattr(kind, "array_type"):  # a shape of jaxtyping
        array = _tensor(value, at) if _is_tensor(kind.array_type) else value
        return _checked(isinstance(array, kind), array, hint, at)
    if not isinstance(kind, type):
        raise Undecodable(f"{at}: {hint} is no type that can be read")
    if issubclass(kind, np.ndarray):
        return _checked(isinstance(value, np.ndarray), value, hint, at)
    if _is_tensor(kind):
        return _tensor(value, at)
    if dataclasses.is_dataclass(kind) or is_named_tuple(kind):
        return _fields(kind, value, find, at)
    if issubclass(kind, enum.Enum):
        _checked(value in [member.value for member in kind], value, hint, at)
        return kind(value)
    if kind is float:
        return float(_checked(isinstance(value, (int, float)) and not isinstance(value, bool), value, hint, at))
    if kind in (int, str, bool):
        return _checked(type(value) is kind, value, hint, at)
    if issubclass(kind, nx.Graph):
        return _graph(kind, value, at)
    if kind.__name__ == "DataFrame":
        make: Any = kind
        return make(_checked(isinstance(value, dict), value, hint, at))
    if issubclass(kind, os.PathLike):
        return Path(_checked(isinstance(value, str), value, hint, at))
    if issubclass(kind, collections.abc.Mapping):
        return _mapping(inner or (Any, Any), value, find, at)
    return _sequence(kind, inner or (Any, ...), value, find, at)


@functools.cache
def hints_of(kind: type) -> dict[str, Any]:
    """The resolved hints of a class's fields."""
    return typing.get_type_hints(kind)


def _checked(fits: bool, value: Any, hint: Any, at: str) -> Any:
    if not fits:
        raise Undecodable(f"{at}: {hint!s} was expected, and {str(value)[:60]!r} found")
    return value


def _is_tensor(kind: Any) -> bool:
    return isinstance(kind, type) and kind.__module__ == "torch" and kind.__name__ in ("Tensor", "Parameter")


def _tensor(value: Any, at: str) -> Any:
    import torch  # only results that hold tensors come here

    return torch.from_numpy(_checked(isinstance(value, np.ndarray), value, torch.Tensor, at))


def _first_that_fits(hints: tuple[Any, ...], value: Any, find: Callable[[str], type], at: str) -> Any:
    reasons = []
    for hint in hints:
        try:
            return decode(hint, value, find, at)
        except Undecodable as error:
            reasons.append(str(error))
    raise Undecodable(reasons[0])


def _fields(kind: Any, value: Any, find: Callable[[str], type], at: str) -> Any:
    content = dict(_checked(isinstance(value, dict), value, kind.__name__, at))
    if hasattr(kind, "FORMAT"):  # a result: of this class or of one below it
        named = find(content.pop("kind", None) or kind.KIND)
        _checked(issubclass(named, kind), named.__name__, kind.__name__, at)
        kind = named
        _checked(content.pop("format", None) == kind.FORMAT, "another format", f"format {kind.FORMAT}", at)
    named_fields = kind._fields if is_named_tuple(kind) else [field.name for field in saved_fields(kind)]
    if set(named_fields) != set(content):
        wrong = ", ".join(sorted(set(named_fields) ^ set(content)))
        raise Undecodable(f"{at or kind.__name__}: fields that are missing or unknown: {wrong}")
    hints = hints_of(kind)
    return kind(**{name: decode(hints[name], content[name], find, f"{at}.{name}".strip(".")) for name in named_fields})


def _graph(kind: Any, value: Any, at: str) -> Any:
    try:
        graph = nx.node_link_graph(_checked(isinstance(value, dict), value, kind, at), edges="edges")
    except (KeyError, TypeError, nx.NetworkXError) as error:
        raise Undecodable(f"{at}: no graph ({error})") from error
    return _checked(isinstance(graph, kind), graph, kind, at)


def _mapping(inner: tuple[Any, Any], value: Any, find: Callable[[str], type], at: str) -> dict[Any, Any]:
    key_hint, hint = inner
    if isinstance(value, dict):
        number = key_hint if key_hint in (int, float) else None
        try:
            pairs = [(key if number is None else number(key), item) for key, item in value.items()]
        except ValueError as error:
            raise Undecodable(f"{at}: {error}") from error
    else:
        _checked(isinstance(value, list) and all(type(x) is list and len(x) == 2 for x in value), value, "pairs", at)
        pairs = [(key, item) for key, item in value]
    return {decode(key_hint, key, find, at): decode(hint, item, find, f"{at}.{key}") for key, item in pairs}


def _sequence(kind: Any, inner: tuple[Any, ...], value: Any, find: Callable[[str], type], at: str) -> Any:
    _checked(isinstance(value, list), value, kind.__name__, at)
    if kind is tuple and inner[-1] is not ...:
        _checked(len(inner) == len(value), value, f"{len(inner)} values", at)
        hints = list(inner)
    else:
        hints = [inner[0]] * len(value)
    items = [decode(hint, item, find, f"{at}.{i}") for i, (hint, item) in enumerate(zip(hints, value, strict=True))]
    made = {list: list, set: set, frozenset: frozenset, collections.abc.Set: frozenset}
    return made.get(kind, tuple)(items)
