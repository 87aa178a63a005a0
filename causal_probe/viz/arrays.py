"""Arrays, tensors and lists of numbers as float64 numpy arrays, without importing torch."""

from __future__ import annotations

from typing import Any

import numpy as np
from numpy.typing import NDArray

from causal_probe.errors import CausalProbeError

__all__ = ["as_array"]


def as_array(values: Any, *, name: str, axes: str) -> NDArray[np.float64]:
    """``values`` as a finite float64 array.

    Parameters
    ----------
    values
        An array, a tensor of any dtype and device (with or without gradient), or nested lists of numbers.
    name
        The name of the values in the error message.
    axes
        The names of the axes, by spaces: ``"head query key"``. Their number is the number of dimensions asked for.

    Raises
    ------
    CausalProbeError
        If the values aren't numbers, aren't finite, are none at all, or have another number of axes.
    """
    if hasattr(values, "detach"):
        values = values.detach().cpu().double()  # numpy has no bfloat16
    try:
        array = np.asarray(values, dtype=np.float64)
    except (TypeError, ValueError) as error:
        raise CausalProbeError(f"{name} were expected to be numbers of shape [{axes}]: {error}.") from error
    if array.ndim != len(axes.split()) or array.size == 0:
        raise CausalProbeError(f"{name} were expected in the shape [{axes}]; found the shape {list(array.shape)}.")
    if not np.isfinite(array).all():
        bad = int((~np.isfinite(array)).sum())
        raise CausalProbeError(
            f"{name} hold {bad} of {array.size} values that are NaN or infinite, which can't be drawn."
        )
    return array
