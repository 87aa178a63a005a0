"""Where a model runs."""

from __future__ import annotations

from typing import Annotated, TypeAlias

import torch

from causal_probe.arguments import DEVICE, Help, checked
from causal_probe.errors import CausalProbeError

__all__ = ["Device", "Dtype", "choose_device"]

#: A device of torch that is there.
Device: TypeAlias = Annotated[str | torch.device, DEVICE]
#: A dtype that weights can have.
Dtype: TypeAlias = Annotated[
    torch.dtype,
    Help(
        "Of weights.",
        what="a floating-point or complex dtype of torch",
        allows=lambda its: its.is_floating_point or its.is_complex,
    ),
]


@checked
def choose_device(device: str) -> torch.device:
    """The device that a name stands for; ``"auto"`` is a GPU if there is one.

    Raises
    ------
    CausalProbeError
        If the name is unknown, or there is no such device here.

    Examples
    --------
    >>> choose_device("cpu")
    device(type='cpu')
    """
    if device == "auto":
        device = "cuda" if torch.cuda.is_available() else "cpu"
    try:
        place = torch.device(device)
        torch.zeros(1, device=place).item()
    except (RuntimeError, AssertionError, NotImplementedError) as error:  # torch raises each, by device and build
        reason = str(error).splitlines()[0][:200].rstrip(".")
        raise CausalProbeError(
            f"The device {device!r} can't be used here ({reason}). Name another one, or auto."
        ) from error
    return place
