"""Saving and loading a disentangled transformer: a folder with ``model.json`` (its shape) and ``model.safetensors`` (its weights)."""

from __future__ import annotations

import os
from pathlib import Path

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file

from causal_probe.errors import CausalProbeError
from causal_probe.models.disentangled import DisentangledTransformer
from causal_probe.results import read_json, write_json

__all__ = ["load", "save"]

KIND = "causal-probe disentangled transformer"
FORMAT = 1


def save(model: DisentangledTransformer, folder: str | os.PathLike[str]) -> None:
    """Write ``model.json`` and ``model.safetensors`` into ``folder``, which is made if it is missing.

    The shape is written last, so that a folder with a ``model.json`` is a whole model.
    """
    folder = Path(folder)
    try:
        folder.mkdir(parents=True, exist_ok=True)
        weights = {name: tensor.detach().contiguous() for name, tensor in model.state_dict().items()}
        partial = folder / ".model.safetensors.partial"
        save_file(weights, partial)
        os.replace(partial, folder / "model.safetensors")
    except OSError as error:
        raise CausalProbeError(f"Can't save the model in {folder}: {error.strerror}.") from error
    write_json(
        folder / "model.json",
        {
            "kind": KIND,
            "format": FORMAT,
            "d_vocab": model.d_vocab,
            "n_positions": model.n_positions,
            "heads": model.heads,
            "dtype": str(model.W_U.dtype).removeprefix("torch."),
        },
    )


def load(folder: str | os.PathLike[str], *, device: str | torch.device = "cpu") -> DisentangledTransformer:
    """The model that :func:`save` wrote.

    Raises
    ------
    CausalProbeError
        If a file is missing, is not of this kind or format, is corrupt, or the weights don't fit the shape.
    """
    folder = Path(folder)
    shape = read_json(folder / "model.json")
    if not isinstance(shape, dict) or shape.get("kind") != KIND:
        raise CausalProbeError(f"{folder / 'model.json'} does not describe a disentangled transformer.")
    if shape.get("format") != FORMAT:
        raise CausalProbeError(
            f"{folder} was written in format {shape.get('format')!r}; this version reads format {FORMAT}. Update causal-probe."
        )
    dtypes = {"float32": torch.float32, "float64": torch.float64, "float16": torch.float16, "bfloat16": torch.bfloat16}
    try:
        model = DisentangledTransformer(
            int(shape["d_vocab"]),
            int(shape["n_positions"]),
            [int(n) for n in shape["heads"]],
            dtype=dtypes[shape["dtype"]],
        )
    except (KeyError, TypeError, ValueError) as error:
        raise CausalProbeError(f"{folder / 'model.json'} is not a whole description of a model: {error}.") from error
    try:
        weights = load_file(folder / "model.safetensors")
    except (OSError, SafetensorError) as error:
        raise CausalProbeError(
            f"Can't read {folder / 'model.safetensors'}: {error}. The file is missing or corrupt."
        ) from error
    expected = {name: tuple(tensor.shape) for name, tensor in model.state_dict().items()}
    found = {name: tuple(tensor.shape) for name, tensor in weights.items()}
    if expected != found:
        raise CausalProbeError(f"The weights in {folder} don't fit its model.json: expected {expected}, found {found}.")
    if not all(bool(torch.isfinite(tensor).all()) for tensor in weights.values()):
        raise CausalProbeError(f"The weights in {folder} hold NaN or infinities.")
    model.load_state_dict(weights)
    return model.to(device)
