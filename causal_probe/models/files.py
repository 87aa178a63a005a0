"""Saving and loading a disentangled transformer: a folder with ``model.json`` (its shape) and ``model.safetensors`` (its weights)."""

from __future__ import annotations

import hashlib
import os
from pathlib import Path

import torch
from safetensors import SafetensorError
from safetensors.torch import load as from_bytes
from safetensors.torch import save as to_bytes
from torch import Tensor

from causal_probe.arguments import checked
from causal_probe.errors import CausalProbeError
from causal_probe.models.device import Device
from causal_probe.models.disentangled import DisentangledTransformer
from causal_probe.models.subspaces import stream_widths
from causal_probe.results import read_sealed, seal, write_bytes, write_json

__all__ = ["is_saved_model", "load", "save"]

KIND = "causal-probe disentangled transformer"
FORMAT = 1
DTYPES = {"float64": torch.float64, "float32": torch.float32, "float16": torch.float16, "bfloat16": torch.bfloat16}


@checked
def save(model: DisentangledTransformer, folder: str | os.PathLike[str]) -> None:
    """Write ``model.json`` and ``model.safetensors`` into ``folder``, which is made if it is missing.

    The shape is written last, so that a folder with a ``model.json`` is a whole model.

    Raises
    ------
    CausalProbeError
        If the weights hold NaN or infinities, or the folder can't be written.

    Examples
    --------
    >>> import tempfile
    >>> from causal_probe.models import DisentangledTransformer
    >>> with tempfile.TemporaryDirectory() as folder:
    ...     save(DisentangledTransformer(d_vocab=3, n_positions=4), folder)
    ...     load(folder).cfg.n_layers
    2
    """
    if not os.fspath(folder):
        raise CausalProbeError("An empty text names no folder to save the model in.")
    folder = Path(folder)
    weights = {name: tensor.detach().contiguous() for name, tensor in model.state_dict().items()}
    _check_finite(weights, "of the model to be saved")
    content = to_bytes(weights)
    shape = {
        "kind": KIND,
        "format": FORMAT,
        "d_vocab": model.d_vocab,
        "n_positions": model.n_positions,
        "heads": model.heads,
        "dtype": str(model.W_U.dtype).removeprefix("torch."),
        "weights": hashlib.sha256(content).hexdigest(),
    }
    try:
        folder.mkdir(parents=True, exist_ok=True)
        write_bytes(folder / "model.safetensors", content)
        write_json(folder / "model.json", seal(shape))
    except (OSError, ValueError, CausalProbeError) as error:  # ValueError: a name that no folder can have
        raise CausalProbeError(f"Can't save the model in {folder}: {error}") from error


@checked
def load(folder: str | os.PathLike[str], *, device: Device = "cpu") -> DisentangledTransformer:
    """The model that :func:`save` wrote, with its weights on ``device``.

    Raises
    ------
    CausalProbeError
        If a file is missing, is not of this kind or format, is corrupt, or the weights don't fit the shape.

    Examples
    --------
    >>> import tempfile
    >>> from causal_probe.models import DisentangledTransformer, save
    >>> with tempfile.TemporaryDirectory() as folder:
    ...     save(DisentangledTransformer(d_vocab=3, n_positions=4, heads=(2, 1)), folder)
    ...     load(folder).heads
    (2, 1)
    """
    folder = Path(folder)
    d_vocab, n_positions, heads, dtype, checksum = _read_shape(folder)
    try:
        content = (folder / "model.safetensors").read_bytes()
        if hashlib.sha256(content).hexdigest() != checksum:
            raise ValueError("its checksum is not the one in model.json")
        weights = from_bytes(content)
    except (OSError, SafetensorError, ValueError) as error:
        raise CausalProbeError(
            f"Can't read {folder / 'model.safetensors'}: {error}. The file is missing or corrupt."
        ) from error
    # Compared before anything is built: a damaged size must not ask for memory.
    *widths, d_last = stream_widths(d_vocab, n_positions, heads)
    expected: dict[str, tuple[int, ...]] = {"W_U": (d_last, d_vocab)}
    for layer, (n_heads, d_in) in enumerate(zip(heads, widths, strict=True)):
        expected[f"blocks.{layer}.attn.A"] = (n_heads, d_in, d_in)
    found = {name: tuple(tensor.shape) for name, tensor in weights.items()}
    wrong = sorted(name for name in expected | found if expected.get(name) != found.get(name))
    wrong += sorted(name for name, tensor in weights.items() if tensor.dtype != DTYPES[dtype])
    if wrong:
        raise CausalProbeError(
            f"The weights in {folder} don't fit its model.json, in shape or dtype: {', '.join(wrong[:5])}. "
            "The files belong to two models, or one is damaged."
        )
    _check_finite(weights, f"in {folder}")
    model = DisentangledTransformer(d_vocab, n_positions, heads, dtype=DTYPES[dtype])
    model.load_state_dict(weights)
    return model.to(device)


def is_saved_model(folder: str | os.PathLike[str]) -> bool:
    """Whether ``folder`` has a ``model.json``, as :func:`save` writes it."""
    return (Path(folder) / "model.json").is_file()


def _read_shape(folder: Path) -> tuple[int, int, list[int], str, str]:
    """What ``model.json`` says, as :func:`save` wrote it: d_vocab, n_positions, heads, dtype, the weights' checksum."""
    path = folder / "model.json"
    shape = read_sealed(path)
    if shape.get("kind") != KIND:
        raise CausalProbeError(f"{path} does not describe a disentangled transformer.")
    if shape.get("format") != FORMAT:
        raise CausalProbeError(
            f"{path} was written in format {shape.get('format')!r}; this version reads format {FORMAT}. Update causal-probe."
        )
    d_vocab, n_positions, heads, dtype = (shape.get(key) for key in ("d_vocab", "n_positions", "heads", "dtype"))
    if not isinstance(heads, list) or not all(type(size) is int for size in (d_vocab, n_positions, *heads)):
        raise CausalProbeError(f"{path} is damaged: d_vocab, n_positions and heads must be whole numbers.")
    if not isinstance(dtype, str) or dtype not in DTYPES:
        raise CausalProbeError(f"{path} is damaged: its dtype is {dtype!r}, not one of {', '.join(DTYPES)}.")
    return d_vocab, n_positions, heads, dtype, str(shape.get("weights"))  # type: ignore[return-value]  # the sizes are checked one by one above


def _check_finite(weights: dict[str, Tensor], where: str) -> None:
    bad = [name for name, tensor in weights.items() if not torch.isfinite(tensor).all()]
    if bad:
        raise CausalProbeError(f"The weights {where} hold NaN or infinities, in {', '.join(bad)}. Training diverged?")
