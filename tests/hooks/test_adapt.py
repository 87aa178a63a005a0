from __future__ import annotations

import copy
import importlib.metadata

import pytest
import torch
import transformers

from causal_probe.errors import CausalProbeError, CausalProbeWarning
from causal_probe.hooks import attention_hook, mean_patterns, to_hooked
from causal_probe.hooks.check import describe, is_live
from causal_probe.hooks.tokens import content_tokens, special_tokens
from tests import tiny_huggingface as tiny
from tests.tiny_models import MODELS, disentangled


def eager(model):
    twin = copy.deepcopy(model)
    twin.set_attn_implementation("eager")
    return twin


@pytest.mark.parametrize("kind", tiny.CAUSAL)
def test_a_hooked_model_computes_what_the_hugging_face_model_computes(kind):
    model, tokens = tiny.CAUSAL[kind](), tiny.tokens()
    hooked = to_hooked(model)
    with torch.no_grad():
        torch.testing.assert_close(hooked(tokens), model(tokens).logits)
        patterns = eager(model)(tokens, output_attentions=True).attentions
    found = {layer: its.mean for layer, its in mean_patterns(hooked, tokens).items()}
    for layer, pattern in enumerate(patterns):
        torch.testing.assert_close(found[layer], pattern.mean(0).double(), atol=1e-6, rtol=0)
        assert pattern.std() > 0.05  # far from uniform: heads and positions can be told apart


@pytest.mark.parametrize("kind", tiny.CAUSAL)
@pytest.mark.parametrize("what", ["attn_scores", "pattern", "q", "k", "v", "z"])
def test_every_hook_of_the_attention_is_live(kind, what):
    hooked = to_hooked(tiny.CAUSAL[kind]())
    for layer in range(2):
        assert is_live(hooked, attention_hook(layer, what), lambda: hooked(tiny.tokens(1, 4)))


@pytest.mark.parametrize("kind", [*tiny.CAUSAL, "bert"])
def test_the_callers_model_stays_as_it_was(kind):
    model = getattr(tiny, kind)()
    model.train()
    next(model.parameters()).requires_grad_(False)
    model.set_attn_implementation("sdpa" if kind != "bloom" else "eager")

    def state():
        return {
            "modules": {name: type(module) for name, module in model.named_modules()},
            "tensors": {
                name: (id(tensor), tensor.requires_grad) for name, tensor in model.state_dict(keep_vars=True).items()
            },
            "training": model.training,
            "attention": model.config._attn_implementation,
            "hooks": [len(module._forward_hooks) for module in model.modules()],
            "config": model.config.to_dict(),
        }

    before, tokens = state(), tiny.tokens()
    torch.manual_seed(0)
    logits = model(tokens).logits
    hooked = to_hooked(model)
    hooked(tokens)
    assert state() == before
    torch.manual_seed(0)
    assert torch.equal(model(tokens).logits, logits)


def test_the_weights_are_shared_not_copied():
    model = tiny.llama()
    hooked = to_hooked(model)
    before = hooked(tiny.tokens())
    with torch.no_grad():
        model.model.layers[1].self_attn.v_proj.weight.zero_()
    assert not torch.allclose(hooked(tiny.tokens()), before)
    torch.testing.assert_close(hooked(tiny.tokens()), model(tiny.tokens()).logits)


@pytest.mark.parametrize("kind", MODELS)
def test_what_has_hooks_is_returned_as_it_is(kind):
    model = MODELS[kind]()
    assert to_hooked(model) is model


def test_what_is_neither_is_refused():
    with pytest.raises(CausalProbeError, match=r"^A Linear can't be given hooks: give a TransformerLens model, "):
        to_hooked(torch.nn.Linear(1, 1))


def test_an_architecture_without_a_bridge_is_refused():
    with pytest.raises(CausalProbeError, match=r"^TransformerLens can't put hooks on a GPT2Model: "):
        to_hooked(tiny.gpt2().transformer)


def test_the_name_is_the_given_one_or_the_models_own():
    model = tiny.gpt2()
    assert to_hooked(model, name="mine").cfg.model_name == "mine"
    assert to_hooked(model).cfg.model_name == "GPT2LMHeadModel"
    model.config.name_or_path = "owner/model"
    assert to_hooked(model).cfg.model_name == "owner/model"


# -------------------------------------------------------------------------------------------------------------- the same model


@pytest.mark.parametrize("kind", [*tiny.CAUSAL, "opt", "bert", "mamba"])
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.float16, torch.bfloat16])
def test_hooked_is_the_same_model_and_the_figure_is_kept(kind, dtype):
    hooked = to_hooked(getattr(tiny, kind)().to(dtype))
    assert 0 <= hooked.hooked_difference < {torch.float64: 1e-6, torch.float32: 1e-5}.get(dtype, 0.01)
    assert describe(hooked)["hooked_difference"] == hooked.hooked_difference


def distort(bridge):
    """A bridge that forgets to scale the logits."""
    bridge.unembed.register_forward_hook(lambda module, inputs, output: output * 1.1)
    return bridge


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.float16, torch.bfloat16])
def test_a_bridge_that_computes_something_else_is_refused_or_warned_of(dtype, monkeypatch):
    from transformer_lens.model_bridge import sources

    build = sources.build_bridge_from_module
    monkeypatch.setattr(sources, "build_bridge_from_module", lambda *args, **options: distort(build(*args, **options)))
    model = tiny.gpt2().to(dtype)
    with pytest.raises(
        CausalProbeError, match=r"^With hooks a GPT2LMHeadModel is another model: its log-probabilities on 8 tokens"
    ):
        to_hooked(model)
    with pytest.warns(CausalProbeWarning, match="is another model"):
        hooked = to_hooked(model, check="warn")
    assert hooked.hooked_difference > 0.1
    assert "hooked_difference" not in describe(to_hooked(model, check="off"))


def test_coheres_bridge_of_transformer_lens_3_9_is_another_model():
    shape = {**tiny._shape(2), "bos_token_id": 1, "eos_token_id": 2, "pad_token_id": 0}
    model = tiny._random(transformers.CohereForCausalLM, transformers.CohereConfig(**shape))
    if importlib.metadata.version("transformer-lens").startswith("3.9"):
        with pytest.raises(CausalProbeError, match="With hooks a CohereForCausalLM is another model"):
            to_hooked(model)
    else:
        assert to_hooked(model).hooked_difference < 1e-5


def test_a_model_in_training_is_compared_without_dropout_and_stays_in_training():
    model = tiny.gpt2().train()
    hooked = to_hooked(model)
    assert hooked.hooked_difference < 1e-5
    assert hooked.original_model.training


class Lora(torch.nn.Module):
    """A linear map with an adapter, as the package peft makes it."""

    def __init__(self, base_layer):
        super().__init__()
        self.base_layer = base_layer
        self.lora_A = torch.nn.ModuleDict({"default": torch.nn.Linear(16, 2, bias=False)})
        self.lora_B = torch.nn.ModuleDict({"default": torch.nn.Linear(2, 16, bias=False)})

    def forward(self, x):
        return self.base_layer(x) + self.lora_B["default"](self.lora_A["default"](x))


def test_adapters_are_refused_with_the_way_out():
    model = tiny.llama()
    model.model.layers[1].self_attn.q_proj = Lora(model.model.layers[1].self_attn.q_proj)
    for given in (model, torch.nn.ModuleDict({"base_model": model})):
        with pytest.raises(CausalProbeError, match=r"holds adapters \(.*q_proj\.base_layer.*merge_and_unload\(\)"):
            to_hooked(given)


def test_gemmas_attention_functions_stay_as_they_were():
    from transformers.models.gemma2 import modeling_gemma2
    from transformers.models.gemma3 import modeling_gemma3

    before = [module.eager_attention_forward for module in (modeling_gemma2, modeling_gemma3)]
    assert [function.__module__ for function in before] == [modeling_gemma2.__name__, modeling_gemma3.__name__]
    shape = {**tiny._shape(2), "num_key_value_heads": 1, "head_dim": 8}
    for model in (
        tiny._random(transformers.Gemma2ForCausalLM, transformers.Gemma2Config(**shape)),
        tiny._random(transformers.Gemma3ForCausalLM, transformers.Gemma3TextConfig(**shape)),
    ):
        hooked = to_hooked(model)
        _, kept = hooked.run_with_cache(tiny.tokens())
        assert {attention_hook(0, "rot_q"), attention_hook(0, "rot_k")} <= set(kept)
        assert hooked.hooked_difference < 1e-5
    assert [module.eager_attention_forward for module in (modeling_gemma2, modeling_gemma3)] == before


# --------------------------------------------------------------------------------------------------------------- tokenizers


@pytest.mark.parametrize("bos", [False, True])
def test_a_bos_token_is_put_in_front_where_the_tokenizer_does_it_and_where_it_is_asked_for(bos):
    hooked = to_hooked(tiny.llama(), tiny.tokenizer(bos=bos))
    assert hooked.to_tokens("t7 t9").tolist() == [[1, 7, 9] if bos else [7, 9]]
    assert hooked.to_tokens("t7 t9", prepend_bos=True).tolist() == [[1, 7, 9]]
    assert hooked.to_tokens("t7 t9", prepend_bos=False).tolist() == [[7, 9]]


def test_the_callers_tokenizer_stays_as_it_was_and_texts_of_several_lengths_can_be_given():
    tokenizer = tiny.tokenizer(pad=False)
    hooked = to_hooked(tiny.llama(), tokenizer)
    assert hooked.to_tokens(["t7 t9", "t5"]).tolist() == [[7, 9], [5, 2]]
    assert tokenizer.pad_token is None


@pytest.mark.parametrize("bos", [False, True])
def test_special_tokens_are_those_of_the_tokenizer_and_the_ids_that_it_never_gives(bos):
    found = special_tokens(to_hooked(tiny.llama(), tiny.tokenizer(bos=bos)))
    assert found.ids == {0, 1, 2, tiny.D_VOCAB - 1}  # the last row of the embedding has no token
    assert (found.bos, found.pad) == (1, 0)
    assert (found.before, found.after) == ((1,) if bos else (), ())


def test_added_special_tokens_are_special_and_added_words_are_not():
    tokenizer = tiny.tokenizer()
    tokenizer.add_tokens(["word"])
    tokenizer.add_special_tokens({"additional_special_tokens": ["<user>"]})
    word, user = tokenizer.convert_tokens_to_ids(["word", "<user>"])
    found = special_tokens(to_hooked(tiny.llama(vocab_size=tiny.D_VOCAB + 4), tokenizer)).ids
    assert user in found
    assert word not in found


def test_without_a_tokenizer_the_configuration_says_what_is_special():
    found = special_tokens(to_hooked(tiny.llama(pad_token_id=5)))
    assert (found.ids, found.bos, found.pad, found.before, found.after) == ({1, 2, 5}, 1, 5, (), ())


def test_ids_beyond_the_vocabulary_are_left_out_and_several_ends_are_taken():
    found = special_tokens(to_hooked(tiny.gpt2(bos_token_id=50256, eos_token_id=[3, 4])))
    assert (found.ids, found.bos) == ({3, 4}, None)


def test_fragments_of_characters_are_no_content():
    """A byte-level vocabulary, as GPT-2's: what stands for part of a character alone is left out, whole characters are not."""
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers
    from transformers import PreTrainedTokenizerFast

    spelt = pre_tokenizers.ByteLevel(add_prefix_space=False).pre_tokenize_str
    names = ["a", *(spelt(text)[0][0] for text in ("é", " b"))]
    names += [names[1][0], names[1][1], "o" + names[1][0]]  # the two bytes of é, and o with the first of them
    fast = Tokenizer(models.BPE({name: token for token, name in enumerate(names)}, []))
    fast.pre_tokenizer, fast.decoder = pre_tokenizers.ByteLevel(add_prefix_space=False), decoders.ByteLevel()
    hooked = to_hooked(tiny.gpt2(vocab_size=8), PreTrainedTokenizerFast(tokenizer_object=fast, eos_token="</s>"))
    assert content_tokens(hooked).tolist() == [0, 1, 2]


def test_without_a_tokenizer_all_but_special_tokens_are_content():
    assert content_tokens(to_hooked(tiny.llama(pad_token_id=5))).tolist() == [0, 3, 4, *range(6, tiny.D_VOCAB)]


def test_a_model_without_special_tokens_has_none():
    assert special_tokens(disentangled()).ids == frozenset()


@pytest.mark.parametrize("around", [None, ("[CLS]", "[SEP]")])
@pytest.mark.parametrize("known", ["b", "a", "A"])
def test_a_letter_that_a_tokenizer_does_not_know_is_no_bos_token(around, known):
    from tokenizers import Tokenizer, models, processors

    names = {"[UNK]": 0, "[CLS]": 1, "[SEP]": 2, known: 3}
    fast = Tokenizer(models.WordLevel(names, unk_token="[UNK]"))
    if around:
        fast.post_processor = processors.TemplateProcessing(
            single="[CLS] $A [SEP]", special_tokens=[("[CLS]", 1), ("[SEP]", 2)]
        )
    tokenizer = transformers.PreTrainedTokenizerFast(
        tokenizer_object=fast, unk_token="[UNK]", cls_token="[CLS]", sep_token="[SEP]", pad_token="[SEP]"
    )
    found = special_tokens(to_hooked(tiny.gpt2(), tokenizer))
    assert (found.before, found.after) == (((1,), (2,)) if around else ((), ()))
