"""Saving and loading: a model comes back exactly, or one error says why not."""

from __future__ import annotations

import hashlib
import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file

from causal_probe.errors import CausalProbeError
from causal_probe.models import DisentangledTransformer, load, save
from causal_probe.results import read_sealed, seal, write_json
from tests.models.definition import SHAPES, random_model, random_tokens


@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.float16, torch.bfloat16])
def test_round_trip(shape: tuple[int, int, tuple[int, ...]], dtype: torch.dtype, tmp_path: Path) -> None:
    model = random_model(*shape, dtype=dtype)
    save(model, tmp_path / "new" / "folder")
    loaded = load(tmp_path / "new" / "folder")
    assert (loaded.d_vocab, loaded.n_positions, loaded.heads) == shape
    assert loaded.cfg.dtype == dtype
    for name, weights in model.state_dict().items():
        assert torch.equal(loaded.state_dict()[name], weights)
    tokens = random_tokens(model)
    assert torch.equal(loaded(tokens), model(tokens))
    assert sorted(path.name for path in (tmp_path / "new" / "folder").iterdir()) == ["model.json", "model.safetensors"]


def test_saving_again_replaces(tmp_path: Path) -> None:
    save(random_model(), tmp_path)
    model = random_model(4, 5, (2,), seed=1)
    save(model, str(tmp_path))
    assert torch.equal(load(tmp_path).A[0], model.A[0])


def edit_shape(**changes: Any) -> Callable[[Path], object]:
    def edit(folder: Path) -> None:
        path = folder / "model.json"
        write_json(path, seal({**read_sealed(path), **changes}))

    return edit


def edit_weights(change: Callable[[dict[str, torch.Tensor]], object]) -> Callable[[Path], object]:
    def edit(folder: Path) -> None:
        weights = load_file(folder / "model.safetensors")
        change(weights)
        save_file(weights, folder / "model.safetensors")
        edit_shape(weights=hashlib.sha256((folder / "model.safetensors").read_bytes()).hexdigest())(folder)

    return edit


def truncate(folder: Path) -> None:
    path = folder / "model.safetensors"
    path.write_bytes(path.read_bytes()[:-5])


DAMAGES: dict[str, tuple[Callable[[Path], object], str]] = {
    "no shape": (lambda folder: (folder / "model.json").unlink(), "Can't read"),
    "no weights": (lambda folder: (folder / "model.safetensors").unlink(), "missing or corrupt"),
    "shape is no JSON": (lambda folder: (folder / "model.json").write_text('{"kind": '), "expected to be a JSON file"),
    "shape is binary": (lambda folder: (folder / "model.json").write_bytes(b"\xff\xfe\x00"), "expected to be a JSON"),
    "shape is a list": (lambda folder: (folder / "model.json").write_text("[]"), "holds no checksum"),
    "foreign kind": (edit_shape(kind="gpt2"), "does not describe a disentangled transformer"),
    "newer format": (edit_shape(format=2), "written in format 2; this version reads format 1. Update causal-probe"),
    "size is missing": (edit_shape(d_vocab=None), "must be whole numbers"),
    "size is a fraction": (edit_shape(d_vocab=3.7), "must be whole numbers"),
    "size is text": (edit_shape(n_positions="6"), "must be whole numbers"),
    "size is true": (edit_shape(n_positions=True), "must be whole numbers"),
    "heads is text": (edit_shape(heads="11"), "must be whole numbers"),
    "heads is a number": (edit_shape(heads=1), "must be whole numbers"),
    "other dtype": (edit_shape(dtype="float32"), "don't fit its model.json, in shape or dtype: W_U, blocks.0"),
    "unknown dtype": (edit_shape(dtype="int8"), "its dtype is 'int8', not one of float64"),
    "dtype is a list": (edit_shape(dtype=["float64"]), "its dtype is ['float64']"),
    "other size": (edit_shape(d_vocab=4), "don't fit its model.json, in shape or dtype: W_U, blocks.0.attn.A"),
    "impossible size": (edit_shape(d_vocab=10**30), "don't fit its model.json"),
    "impossible depth": (edit_shape(heads=[1] * 500), "don't fit its model.json"),
    "no layers": (edit_shape(heads=[]), "don't fit its model.json"),
    "weights are empty": (lambda folder: (folder / "model.safetensors").write_bytes(b""), "missing or corrupt"),
    "weights are cut off": (truncate, "missing or corrupt"),
    "weights are noise": (
        lambda folder: (folder / "model.safetensors").write_bytes(b"\xff" * 99),
        "missing or corrupt",
    ),
    "a weight is missing": (edit_weights(lambda weights: weights.pop("W_U")), "in shape or dtype: W_U."),
    "a weight too many": (edit_weights(lambda w: w.update(W_E=torch.zeros(1, dtype=torch.float64))), "W_E."),
    "NaN": (edit_weights(lambda weights: weights["W_U"].fill_(torch.nan)), "hold NaN or infinities, in W_U"),
    "infinity": (edit_weights(lambda weights: weights["blocks.1.attn.A"][0, 0].fill_(-torch.inf)), "blocks.1.attn.A"),
}


@pytest.mark.parametrize("damage", DAMAGES)
def test_damaged_files_raise(damage: str, tmp_path: Path) -> None:
    save(random_model(), tmp_path)
    do, message = DAMAGES[damage]
    do(tmp_path)
    with pytest.raises(CausalProbeError) as error:
        load(tmp_path)
    assert message in str(error.value)
    assert str(tmp_path) in str(error.value)


def test_a_size_that_fits_its_weights_and_is_none(tmp_path: Path) -> None:
    """The files agree with each other; the model refuses."""
    save(random_model(d_vocab=2, n_positions=2, heads=(1,)), tmp_path)
    edit_shape(d_vocab=1, n_positions=3)(tmp_path)
    edit_weights(lambda weights: weights.update(W_U=weights["W_U"][:, :1].contiguous()))(tmp_path)
    with pytest.raises(CausalProbeError, match="d_vocab must be at least 2, not 1"):
        load(tmp_path)


@pytest.mark.parametrize("value", [torch.nan, torch.inf])
def test_what_could_not_be_loaded_is_not_saved(value: float, tmp_path: Path) -> None:
    model = random_model()
    model.A[1].data[0, 2, 3] = value
    with pytest.raises(CausalProbeError, match=r"to be saved hold NaN or infinities, in blocks\.1\.attn\.A"):
        save(model, tmp_path / "model")
    assert not (tmp_path / "model").exists()


def test_a_folder_that_cannot_be_written(tmp_path: Path) -> None:
    model = DisentangledTransformer(3, 5)
    (tmp_path / "file").write_text("mine")
    for folder in (tmp_path / "file", tmp_path / "file" / "below"):
        with pytest.raises(CausalProbeError, match="Can't save the model in"):
            save(model, folder)
    (tmp_path / "in the way" / "model.safetensors").mkdir(parents=True)
    with pytest.raises(CausalProbeError, match="Can't save the model in"):
        save(model, tmp_path / "in the way")
    assert os.listdir(tmp_path / "in the way") == ["model.safetensors"]  # nothing half-written is left
    assert (tmp_path / "file").read_text() == "mine"
