"""Results of mechanisms: what is saved comes back, and a model that was not saved is asked for in one sentence."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import torch

from causal_probe import graphs, models, results, tasks
from causal_probe.errors import CausalProbeError
from causal_probe.mechanisms import descent_alignment, layer_features, mesa_optimizer, train_mesa, weight_graphs
from causal_probe.mechanisms.dynamics import dynamics
from causal_probe.mechanisms.layer_features import LayerFeatures
from causal_probe.models import LinearTransformer
from causal_probe.results import Result

PROCESS = tasks.AutoregressiveProcess(2, 8, start="sparse")
MARKOV = tasks.InContextMarkov(graphs.chain(5), d_vocab=3)
WAVES = tasks.SineRegression(4)


def features() -> LayerFeatures:
    torch.manual_seed(0)
    model = LinearTransformer(2, 5, d_hidden=4, d_features=3).initialise(tasks.generator(0, "weights"), scale=0.5)
    return layer_features(model, WAVES, n_sequences=50)


RESULTS: dict[str, Callable[[], Result]] = {
    "descent": lambda: descent_alignment(LinearTransformer(3, 5), tasks.LinearRegression(2, 4), n_sequences=8),
    "features": features,
    "mesa": lambda: mesa_optimizer(models.mesa_step(2, 8, a=0.1), PROCESS, n_sequences=16),
    "training": lambda: train_mesa(PROCESS, steps=2, batch_size=8),
    "dynamics": lambda: dynamics([0, 1, 2, 3], {"moves": [0, 0, 1, 1], "still": [1, 1, 1, 1]}),
    "weights": lambda: weight_graphs(models.hand_set(graphs.chain(5), 3), MARKOV, n_sequences=32),
}


@pytest.mark.parametrize("name", RESULTS)
def test_a_saved_result_comes_back(name: str, tmp_path: Path) -> None:
    found = RESULTS[name]()
    for suffix in ("safetensors", "json", "csv"):
        found.save(tmp_path / f"a.{suffix}")
    again = results.load(tmp_path / "a.safetensors")
    assert type(again) is type(found)
    assert again.to_dict() == found.to_dict()
    assert json.loads((tmp_path / "a.json").read_text())["kind"] == found.KIND
    assert repr(again) == repr(found)
    assert again.cite().methods == found.cite().methods
    assert "causal-probe" in found.methods
    assert found.provenance["versions"] == again.provenance["versions"]


def test_what_is_undefined_has_a_reason() -> None:
    found = RESULTS["descent"]().to_dict()
    assert {row["cosine"] for row in found["means"]} == {None}
    assert list(found["undefined"]) == ["means.cosine"]


def test_features_from_a_file_say_what_they_lack(tmp_path: Path) -> None:
    found = features()
    assert found(torch.zeros(1, 1)).shape == (1, found.root.shape[1])
    found.save(tmp_path / "a.safetensors")
    again = LayerFeatures.load(tmp_path / "a.safetensors")
    np.testing.assert_array_equal(again.spectrum, found.spectrum)
    with pytest.raises(CausalProbeError, match="does not hold the model"):
        again(torch.zeros(1, 1))
