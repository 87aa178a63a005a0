from __future__ import annotations

import pytest
import torch

from causal_probe.errors import CausalProbeError
from causal_probe.hooks import attention_hook, edited, zero_ablate
from causal_probe.hooks.check import describe, is_live, require_hooks, undisturbed
from causal_probe.models.loading import LoadedModel
from tests import tiny_huggingface
from tests.tiny_models import MODELS, disentangled, native_bridge, random_tokens

PATTERN = attention_hook(0, "pattern")


@pytest.mark.parametrize("kind", MODELS)
def test_a_hook_point_that_is_there_is_accepted(kind):
    model = MODELS[kind]()
    require_hooks(model, [attention_hook(layer, what) for layer in (0, 1) for what in ("pattern", "attn_scores", "z")])


def test_every_missing_hook_point_is_named_with_what_comes_near():
    with pytest.raises(CausalProbeError) as error:
        require_hooks(disentangled(), ["blocks.0.attn.hook_patern", PATTERN, "blocks.7.attn.hook_z"])
    message = str(error.value)
    assert "blocks.0.attn.hook_patern, blocks.7.attn.hook_z" in message
    assert "nearest that it has: " in message
    assert PATTERN in message.partition("nearest")[2]


def test_what_is_no_hooked_model_is_told_what_it_lacks():
    with pytest.raises(
        CausalProbeError, match=r"A Linear can't be probed: it has no cfg, hook_dict, hooks, run_with_hooks\."
    ):
        require_hooks(torch.nn.Linear(1, 1), [PATTERN])


@pytest.mark.parametrize("given", [tiny_huggingface.gpt2, lambda: LoadedModel(tiny_huggingface.gpt2(), None, "tiny")])
@pytest.mark.parametrize("ask", [describe, lambda model: require_hooks(model, ())])
def test_a_hugging_face_object_is_told_of_to_hooked(given, ask):
    with pytest.raises(
        CausalProbeError, match=r"hooks\.to_hooked\(model, tokenizer\).*hooks\.to_hooked\(\*models\.load_model"
    ):
        ask(given())


@pytest.mark.parametrize("kind", MODELS)
@pytest.mark.parametrize("gradients", [True, False])
def test_a_pattern_that_is_read_is_live_with_and_without_gradients_and_weights(kind, gradients):
    model = MODELS[kind]()
    for parameter in model.parameters():
        parameter.data.zero_()

    def run():
        with torch.set_grad_enabled(gradients):
            return model(random_tokens(2))[:, -1]

    assert is_live(model, PATTERN, run)


@pytest.mark.parametrize("gradients", [True, False])
def test_a_hook_whose_value_nothing_reads_is_dead(gradients):
    model = native_bridge(
        {"d_model": 8, "d_head": 4, "n_layers": 1, "n_ctx": 7, "n_heads": 2, "d_vocab": 5, "attn_only": True}
    )

    def run():
        with torch.set_grad_enabled(gradients):
            return model(random_tokens(2))[:, -1]

    # Its scores are shown after the pattern has been made of them.
    assert not is_live(model, attention_hook(0, "attn_scores"), run)
    assert is_live(model, attention_hook(0, "z"), run)


def test_a_hook_that_does_not_fire_is_dead():
    assert not is_live(disentangled(), PATTERN, lambda: torch.ones(1))


def state_of(model):
    return (
        [module.training for module in model.modules()],
        [parameter.requires_grad for parameter in model.parameters()],
        {name: (len(point.fwd_hooks), len(point.bwd_hooks)) for name, point in model.hook_dict.items()},
    )


@pytest.mark.parametrize("kind", MODELS)
@pytest.mark.parametrize("fails", [False, True])
def test_a_measured_model_is_left_as_it_was(kind, fails):
    model = MODELS[kind]()
    modules, parameters = list(model.modules()), list(model.parameters())
    for index, module in enumerate(modules):
        module.training = index % 2 == 0
    parameters[0].requires_grad_(False)
    seen = []
    model.hook_dict["hook_embed"].add_hook(lambda value, hook: seen.append(1))
    before = state_of(model)
    try:
        with undisturbed(model):
            assert not any(module.training for module in modules)
            assert not torch.is_grad_enabled()
            parameters[0].requires_grad_(True)
            parameters[1].requires_grad_(False)
            model.hook_dict[PATTERN].add_hook(lambda value, hook: value * 0)
            if fails:
                raise KeyError
    except KeyError:
        assert fails
    assert torch.is_grad_enabled()
    assert state_of(model) == before
    model(random_tokens(1))
    assert seen == [1]  # the caller's own hook is still there, and the one that was left behind is not
    model.reset_hooks()
    torch.testing.assert_close(model(random_tokens(1)), MODELS[kind]()(random_tokens(1)))


def test_an_edit_ends_with_its_block_also_after_an_exception():
    model = disentangled()
    whole = model(random_tokens(2))

    def run_and_fail():
        with edited(model, zero_ablate(0, 0)):
            assert not torch.equal(model(random_tokens(2)), whole)
            raise KeyError

    with pytest.raises(KeyError):
        run_and_fail()
    assert torch.equal(model(random_tokens(2)), whole)
    assert model.context_level == 0


def test_a_model_is_described_by_its_name_dtype_and_device():
    assert describe(disentangled()) == {
        "model": "disentangled-transformer",
        "dtype": "float64",
        "device": "cpu",
        "shift": 0,
    }


def test_dropout_of_a_hugging_face_model_is_off_inside_a_bridge_and_back_afterwards():
    """A bridge's own modules leave out GPT-2's dropout of the embeddings, which stands between the parts that it wraps."""
    from transformer_lens.model_bridge.sources import build_bridge_from_module
    from transformers import GPT2Config, GPT2LMHeadModel

    config = GPT2Config(vocab_size=5, n_positions=8, n_embd=8, n_layer=1, n_head=2, bos_token_id=0, eos_token_id=0)
    config._attn_implementation = "eager"
    hugging_face = GPT2LMHeadModel(config).train()
    bridge = build_bridge_from_module(hugging_face, architecture="GPT2LMHeadModel", hf_config=config)
    with undisturbed(bridge):
        assert torch.equal(bridge(random_tokens(2)), bridge(random_tokens(2)))
    assert all(module.training for module in hugging_face.modules())
