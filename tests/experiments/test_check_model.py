from __future__ import annotations

import json
import sys

import pytest
import torch

from causal_probe import hooks
from causal_probe.errors import CausalProbeError
from causal_probe.experiments import check_model, open_model
from causal_probe.models import save
from tests import tiny_huggingface as tiny
from tests.tiny_models import MODELS, disentangled


@pytest.fixture
def folder(tmp_path):
    """A tiny Llama with a tokenizer."""
    folder = tmp_path / "tiny-llama"
    tiny.llama().save_pretrained(folder)
    tiny.tokenizer(bos=True).save_pretrained(folder)
    return folder


def test_everything_works_on_a_sound_model(folder):
    found = check_model(folder, device="cpu")
    assert found.ok
    assert not found.findings
    assert len(found.answers) == 5
    assert str(found).splitlines()[:6] == [
        "tiny-llama: 2 layers of 4 on 2 heads, 50 tokens, context 32, float32 on cpu",
        "  found  what",
        "  works  read attention (scan, head graphs)",
        "  works  edit attention (edge effects)",
        "  works  ablate heads (verify)",
        "  works  gradients by score",
    ]
    assert str(found).count("\n  yes    ") == 5
    assert str(found).endswith("\n  BOS token 1; the tokenizer puts [1] in front")


def test_a_saved_disentangled_transformer(tmp_path):
    save(disentangled(), tmp_path / "mine")
    found = check_model(tmp_path / "mine", device="cpu")
    assert found.ok
    assert str(found).startswith("mine: 2 layers of 2 heads, 5 tokens, context 7, float64 on cpu\n")
    assert "  no BOS token; there is no tokenizer" in str(found)


@pytest.mark.parametrize("kind", MODELS)
def test_a_model_can_be_given_itself(kind):
    works = check_model(MODELS[kind]()).abilities
    assert {ability for ability, can in works.items() if not can} <= {"gradients by score"}


def test_a_model_whose_patterns_are_decorative():
    found = check_model(tiny.opt())
    assert {ability.split(" (")[0]: works for ability, works in found.abilities.items()} == {
        "read attention": True,
        "edit attention": False,
        "ablate heads": True,
        "gradients by score": True,  # through the mask
    }
    assert [finding.kind for finding in found.findings] == ["dead-hooks"]
    lines = str(found).splitlines()
    assert "  works  read attention (scan, head graphs)" in lines
    assert "  NO     a head reads the value at the position that its pattern names" in lines
    assert sum(line.startswith("  - blocks.0.attn.hook_") for line in lines) == 1


def test_gradients_work_where_the_probe_takes_them_and_nowhere_else():
    from causal_probe import probes
    from tests.architectures.zoo import ARCHITECTURES, tokens

    for name, route in (("OPT", "mask"), ("GPT-2", "scores"), ("XGLM", None)):
        model = ARCHITECTURES[name].build()
        assert check_model(model).abilities["gradients by score"] == (route is not None)
        if route is not None:
            found = probes.score_gradients(hooks.to_hooked(model), tokens(2, 8))
            assert set(found.settings["routes"].values()) == {route}


def test_a_model_without_attention():
    found = check_model(tiny.mamba())
    assert not any(found.abilities.values())
    assert found.answers == ()
    assert {finding.kind for finding in found.findings} == {"missing-hooks"}


def test_a_bridge_that_computes_something_else_than_the_model(folder, monkeypatch):
    # As TransformerLens' bridges of Falcon with ALiBi do.
    module = sys.modules["causal_probe.experiments.opening"]  # where models are given their hooks

    def to_wrong(model, tokenizer, name):
        hooked = original(model, tokenizer, name)
        hooked.add_hook("blocks.0.hook_out", lambda value, hook: value * 1.01)
        return hooked

    original = module.to_hooked
    monkeypatch.setattr(module, "to_hooked", to_wrong)
    found = check_model(folder, device="cpu")
    assert not any(found.abilities.values())
    assert "  NO     the hooks change nothing by being there" in str(found)


def test_it_is_plain_json(folder):
    found = json.loads(json.dumps(check_model(folder, device="cpu").to_dict(), allow_nan=False))
    assert abs(found["model"].pop("hooked_difference")) < 1e-3  # log-probabilities before and after hooking
    assert found["model"] == {
        "model": "tiny-llama", "dtype": "float32", "device": "cpu", "layers": 2, "heads": 4, "key_value_heads": 2, "vocabulary": 50,
        "context": 32, "tokenizer": True, "bos": 1, "added_before": [1], "special_tokens": 4, "shift": 1,
    }  # fmt: skip
    assert all(found["abilities"].values())
    assert [answer["passed"] for answer in found["answers"]] == [True] * 5
    assert found["findings"] == []
    assert "transformer-lens" in found["provenance"]["versions"]
    silent = check_model(tiny.opt()).to_dict()["answers"]
    assert any(answer["error"] is None for answer in silent)  # there are no scores to compare with


def test_the_hooked_and_the_loaded_model_share_their_weights(folder):
    hooked, loaded = open_model(folder, dtype="float64", device="cpu")
    assert hooked.cfg.model_name == "tiny-llama"
    assert loaded.model.dtype == torch.float64
    torch.testing.assert_close(hooked(tiny.tokens()), loaded.model(tiny.tokens()).logits)


def test_a_device_that_is_not_there(folder):
    with pytest.raises(CausalProbeError, match="'nowhere' can't be used here"):
        check_model(folder, device="nowhere")


def test_of_a_hybrid_it_says_which_layers_have_attention():
    from tests.architectures.zoo import ARCHITECTURES

    found = check_model(ARCHITECTURES["LFM2"].build())
    assert found.ok
    assert found.model["attention_layers"] == [1, 3]
    assert "attention in the layers 1, 3 alone" in repr(found)


def test_patterns_that_can_be_read_and_not_edited_are_told_apart():
    from tests.architectures.zoo import ARCHITECTURES

    found = check_model(ARCHITECTURES["OPT"].build())
    assert found.abilities["read attention (scan, head graphs)"]
    assert found.abilities["ablate heads (verify)"]
    assert not found.abilities["edit attention (edge effects)"]
