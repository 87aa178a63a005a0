"""The table of calls, and what is kept of each.

A call is a function without arguments that yields the raw numbers of a result: arrays, tensors, numbers, None (undefined), or
sequences of these, in a fixed order. It names every field it takes, so that after a change of names only these functions change;
never the order or the choice of what they yield, nor the name of a call,
by which it is compared. Seconds, versions and paths are no numbers.
"""

from __future__ import annotations

import hashlib
import math
import time
import warnings
from collections.abc import Callable, Iterable, Iterator, Sequence
from typing import Any, TypeAlias

import numpy as np
import torch
from numpy.typing import NDArray

from causal_probe import CausalProbeError

__all__ = ["CALLS", "Numbers", "Piece", "call", "flatten", "measure"]

#: What a call yields: an array, a tensor, a number, None, or a sequence of these.
Piece: TypeAlias = Any
Numbers: TypeAlias = Iterator[Piece]

#: By name, what is computed.
CALLS: dict[str, Callable[[], Iterable[Piece]]] = {}


def call(function: Callable[[], Iterable[Piece]]) -> Callable[[], Iterable[Piece]]:
    """Enter a function in :data:`CALLS` under its name."""
    if function.__name__ in CALLS:
        raise ValueError(f"there are two calls {function.__name__}")
    CALLS[function.__name__] = function
    return function


def flatten(piece: Piece) -> Iterator[NDArray[Any]]:
    """The arrays of a piece, each of float64, float32 or int64, in order; None is NaN.

    >>> [array.tolist() for array in flatten([None, (True, 2), 0.5])]
    [[nan], [1], [2], [0.5]]
    """
    if piece is None:
        piece = math.nan
    if isinstance(piece, torch.Tensor):
        piece = piece.detach().resolve_conj().cpu().numpy()
    if isinstance(piece, (bool, int, float, complex, np.generic)):
        piece = np.asarray(piece)
    if isinstance(piece, np.ndarray):
        if piece.dtype.kind in "biu":
            piece = piece.astype(np.int64)
        elif piece.dtype.kind == "c":
            piece = np.stack([piece.real, piece.imag], -1)
        if piece.dtype not in (np.int64, np.float64, np.float32):
            raise TypeError(f"an array of {piece.dtype} holds no numbers")
        yield np.ascontiguousarray(piece).reshape(-1)
    elif isinstance(piece, (Sequence, Iterator)) and not isinstance(piece, (str, bytes)):
        for each in piece:
            yield from flatten(each)
    else:
        raise TypeError(f"a {type(piece).__name__} is no array and no number: name the fields to take")


def measure(function: Callable[[], Iterable[Piece]], *, kept: int) -> dict[str, Any]:
    """How many numbers a call gives, their hash, and ``kept`` of them; or that it refuses, and with which kind of error."""
    torch.manual_seed(0)
    np.random.seed(0)  # noqa: NPY002 - what some library may draw without a generator
    began = time.process_time()
    digest, arrays = hashlib.sha256(), []
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            for piece in function():
                for array in flatten(piece):
                    values = np.where(np.isnan(array), np.nan, array).astype(array.dtype)  # one NaN for all
                    digest.update(values.astype(values.dtype.newbyteorder("<")).tobytes())
                    arrays.append(values.astype(np.float64))
    except CausalProbeError as error:
        return {"refused": type(error).__name__, "says": str(error)}
    numbers = np.concatenate(arrays) if arrays else np.empty(0)
    if not len(numbers):
        raise ValueError("the call gives no numbers")
    at = np.unique(np.linspace(0, len(numbers) - 1, min(kept, len(numbers))).round().astype(int))
    return {
        "count": len(numbers),
        "sha256": digest.hexdigest(),
        "numbers": numbers[at].tolist(),
        "cpu_seconds": round(time.process_time() - began, 2),
    }
