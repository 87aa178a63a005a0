from __future__ import annotations

import math

import pytest
import torch
from transformer_lens.config import TransformerBridgeConfig
from transformer_lens.hook_points import HookPoint
from transformer_lens.HookedRootModule import HookedRootModule
from transformer_lens.model_bridge.sources import build_bridge_from_module

from causal_probe.errors import CausalProbeError
from causal_probe.hooks import attention_hook, find_faults, preflight, to_hooked
from causal_probe.hooks.check import _modules
from causal_probe.hooks.tokens import content_tokens
from tests import tiny_huggingface as tiny
from tests.tiny_models import MODELS, N_POSITIONS, disentangled, random_tokens

KINDS = {**MODELS, **{kind: lambda make=make: to_hooked(make()) for kind, make in tiny.CAUSAL.items()}}


def tokens_for(kind, **options):
    return random_tokens(3, **options) if kind in MODELS else tiny.tokens(**options)


def faults(model, tokens, **options):
    found = find_faults(model, tokens, **options)
    assert len({finding.kind for finding in found}) == len(found)
    return {finding.kind: finding.message for finding in found}


def only_fault(model, tokens, **options):
    (finding,) = find_faults(model, tokens, **options)
    with pytest.raises(CausalProbeError) as error:
        preflight(model, tokens, **options)
    assert str(error.value).endswith(f" can't be measured on these tokens: {finding.message}")
    assert "\n" not in str(error.value)
    return finding.kind, finding.message


@pytest.mark.parametrize("kind", KINDS)
def test_nothing_is_wrong_with_a_sound_model(kind):
    assert find_faults(KINDS[kind](), tokens_for(kind), hooks=("pattern", "z", "q", "k", "v")) == ()
    assert preflight(KINDS[kind](), tokens_for(kind)) is None


# --------------------------------------------------------------------------------------------------------------- the model


def test_what_is_no_hooked_model():
    kind, message = only_fault(torch.nn.Linear(1, 1), random_tokens(1))
    assert kind == "no-surface"
    assert message.startswith("A Linear can't be probed: it has no cfg, hook_dict, hooks, run_with_hooks.")


def test_missing_hooks():
    kind, message = only_fault(disentangled(), random_tokens(2), hooks=("pattern", "result"))
    assert kind == "missing-hooks"
    assert message.startswith(
        "DisentangledTransformer has no hook point blocks.0.attn.hook_result, blocks.1.attn.hook_result. The nearest "
    )


@pytest.mark.parametrize(("kind", "hooks"), [("bert", ("pattern",)), ("opt", ("pattern",)), ("opt", ("attn_scores",))])
def test_dead_hooks(kind, hooks):
    found = faults(to_hooked(getattr(tiny, kind)()), tiny.tokens(), hooks=hooks)
    names = ", ".join(attention_hook(layer, hooks[0]) for layer in range(2))
    assert found["dead-hooks"] == (
        f"{names}: decorative, for the model's output does not depend on the values there. What they show may not be what the "
        "model uses, an edit there does nothing, and its effect would be reported as zero."
    )
    assert ("not-causal" in found) == (kind == "bert")


def test_a_dead_pattern_is_found_beside_a_live_z():
    found = faults(to_hooked(tiny.opt()), tiny.tokens(), hooks=("z", "pattern"))
    assert found["dead-hooks"].startswith(f"{attention_hook(0, 'pattern')}, {attention_hook(1, 'pattern')}: decorative")


def test_attention_that_is_not_eager():
    model = tiny.opt()
    model.set_attn_implementation("sdpa")
    bridge = build_bridge_from_module(model, architecture="OPTForCausalLM", hf_config=model.config)
    assert only_fault(bridge, tiny.tokens()) == (
        "not-eager",
        "blocks.0.attn.hook_pattern, blocks.1.attn.hook_pattern: no value passes, because the attention is 'sdpa', which makes no "
        'patterns. Load the model with attn_implementation="eager".',
    )


def test_a_model_that_looks_ahead():
    found = faults(to_hooked(tiny.bert()), tiny.tokens())
    assert found["not-causal"] == (
        "L0H0, L0H1, L1H0, L1H1 attend to later positions: the model is not causal, and a parent must come before its child."
    )


class OwnModel(HookedRootModule):
    """One layer whose pattern hook carries ``pattern``, or nothing."""

    def __init__(self, pattern=None):
        super().__init__()
        self.pattern = pattern
        self.blocks = torch.nn.ModuleList([torch.nn.Module()])
        self.blocks[0].attn = torch.nn.Module()
        self.blocks[0].attn.hook_pattern = HookPoint()
        self.cfg = TransformerBridgeConfig(d_model=1, d_head=1, n_layers=1, n_ctx=9, n_heads=1, d_vocab=5)
        self.setup()

    def forward(self, tokens):
        if self.pattern is None:
            return torch.zeros(*tokens.shape, 5)
        return self.blocks[0].attn.hook_pattern(self.pattern(tokens)).sum() * torch.ones(*tokens.shape, 5)


def test_a_hook_that_never_fires():
    assert faults(OwnModel(), random_tokens(2))["silent-hooks"] == (
        "blocks.0.attn.hook_pattern: no value passes. The model does not use this attention."
    )


def test_a_pattern_of_another_shape():
    model = OwnModel(lambda tokens: torch.eye(tokens.shape[1]).expand(len(tokens), -1, -1))
    assert only_fault(model, random_tokens(2)) == (
        "shape",
        "The pattern hooks should carry [batch, head, query, key]; they carry [2, 7, 7].",
    )


def test_nan_in_patterns():
    model = disentangled()
    model.A[0].data[1] = math.nan
    assert only_fault(model, random_tokens(2)) == (
        "nan",
        "There is NaN in the patterns of L0H1, L1H0: check the weights for NaN, and the tokens for rows that are all masked.",
    )


def test_rows_that_do_not_sum_to_one():
    model = disentangled()

    def halve(pattern, hook):
        pattern = pattern.clone()
        pattern[:, 1, 3] *= 0.5
        pattern[:, 1, 4] *= 2
        return pattern

    with model.hooks(fwd_hooks=[(attention_hook(0, "pattern"), halve)]):
        assert only_fault(model, random_tokens(2)) == (
            "row-sums",
            "Rows of the patterns of L0H1 don't sum to one but to 0.5 ... 2: attention is not normalised there, or a hook of yours "
            "changes it.",
        )


def test_many_heads_are_not_listed_one_by_one():
    model = disentangled((3, 3))
    model.A[0].data[:] = math.nan
    assert "patterns of L0H0, L0H1, L0H2, L1H0 and 2 more heads: " in faults(model, random_tokens(2))["nan"]


def test_half_precision_sums_to_one_closely_enough():
    assert find_faults(to_hooked(tiny.llama().bfloat16()), tiny.tokens()) == ()


def test_a_model_that_fails():
    def fail(pattern, hook):
        raise KeyError("no such thing\nat all")

    model = disentangled()
    with model.hooks(fwd_hooks=[(attention_hook(0, "pattern"), fail)]):
        kind, message = only_fault(model, random_tokens(2))
    assert (kind, message) == ("fails", "The model fails on them with KeyError: 'no such thing\\nat all'")
    kind, message = only_fault(model, random_tokens(2), attention_mask=torch.ones(2, N_POSITIONS, dtype=torch.long))
    assert kind == "fails"
    assert message.startswith("The model fails on them with TypeError: ")


# -------------------------------------------------------------------------------------------------------------- the tokens


@pytest.mark.parametrize(
    ("tokens", "found"),
    [
        ([[1, 2]], "a list"),
        (torch.zeros(2, 3), "torch.float32 [2, 3]"),
        (torch.zeros(3, dtype=torch.long)[None, :, None], "torch.int64 [1, 3, 1]"),
        (torch.zeros(2, 3, dtype=torch.bool), "torch.bool [2, 3]"),
    ],
)
def test_what_are_no_tokens(tokens, found):
    assert only_fault(disentangled(), tokens) == (
        "tokens",
        f"Tokens must be a tensor of whole numbers [batch, pos]; they are {found}.",
    )


def test_no_tokens_at_all():
    empty = torch.zeros(0, 4, dtype=torch.long)
    assert only_fault(disentangled(), empty) == ("tokens", "There are no tokens: their shape is [0, 4].")


def test_a_mask_of_another_shape():
    assert only_fault(to_hooked(tiny.llama()), tiny.tokens(3, 12), attention_mask=torch.ones(3, 11)) == (
        "tokens",
        "The attention mask must have the tokens' shape, [3, 12]; it is [3, 11].",
    )


def test_sequences_that_are_too_long():
    assert only_fault(to_hooked(tiny.gpt2()), tiny.tokens(2, tiny.N_CTX + 1)) == (
        "too-long",
        "The sequences have 33 tokens, and the model's context holds 32: shorten them.",
    )
    # Its n_ctx is one more than the positions that it has.
    assert only_fault(disentangled(), random_tokens(2, n=N_POSITIONS + 1)) == (
        "too-long",
        "The sequences have 8 tokens, and the model's context holds 7: shorten them.",
    )
    assert find_faults(to_hooked(tiny.gpt2()), tiny.tokens(2, tiny.N_CTX)) == ()
    assert find_faults(disentangled(), random_tokens(2)) == ()


@pytest.mark.parametrize("token", [-1, tiny.D_VOCAB])
def test_tokens_of_another_vocabulary(token):
    tokens = tiny.tokens()
    tokens[2, 4] = token
    least, most = min(int(tokens.min()), token), max(int(tokens.max()), token)
    assert only_fault(to_hooked(tiny.gpt2()), tokens) == (
        "vocabulary",
        f"The token ids run from {least} to {most}, and the model's vocabulary from 0 to 49: use its own tokenizer.",
    )


def test_of_a_tokenizer_only_ids_that_occur_matter():
    model = to_hooked(tiny.llama(vocab_size=40), tiny.tokenizer())
    assert not find_faults(model, tiny.tokens() % 30 + 3)
    assert int(content_tokens(model).max()) == 39
    found = only_fault(model, model.to_tokens("t7 t45"))
    assert found == (
        "vocabulary",
        "The token ids run from 7 to 45, and the model's vocabulary from 0 to 39: use its own tokenizer.",
    )


@pytest.mark.parametrize("where", [slice(-1, None), slice(0, 1), slice(-3, None)])
def test_padding_without_a_mask(where):
    model, tokens = to_hooked(tiny.llama(), tiny.tokenizer()), tiny.tokens()
    tokens[1, where] = 0
    assert only_fault(model, tokens) == (
        "padding",
        "1 of 3 sequences begin or end with padding (token 0), and attention to padding would count: no probe takes a mask. Give "
        "sequences without padding: cut them to one length, or measure those of each length by themselves.",
    )
    mask = (tokens != 0).long()
    assert find_faults(model, tokens, attention_mask=mask) == ()


def test_one_token_that_ends_a_text_and_pads_too_is_no_padding():
    model, tokens = to_hooked(tiny.llama(), tiny.tokenizer(pad=False)), tiny.tokens()  # pads with </s>, 2
    tokens[:, -1] = 2
    assert find_faults(model, tokens) == ()
    tokens[:, -2] = 2
    assert only_fault(model, tokens)[0] == "padding"


def test_one_token_that_starts_a_text_and_pads_too_is_no_padding():
    model, tokens = to_hooked(tiny.gpt2(pad_token_id=0)), tiny.tokens()  # 0 starts, ends and pads
    tokens[:, 0] = tokens[:, -1] = 0
    assert find_faults(model, tokens) == ()
    tokens[0, 1] = 0
    assert "1 of 3 sequences begin or end with padding (token 0)" in only_fault(model, tokens)[1]


# ---------------------------------------------------------------------------------------------------------------- together


def test_all_that_is_wrong_is_said_at_once():
    model = to_hooked(tiny.bert(), tiny.tokenizer())
    tokens = tiny.tokens(3, tiny.N_CTX + 8)
    tokens[0, 0], tokens[1, -1] = 99, 0
    kinds = [finding.kind for finding in find_faults(model, tokens, hooks=("pattern", "result_of_all"))]
    assert kinds == ["missing-hooks", "too-long", "vocabulary", "padding", "not-causal", "dead-hooks"]
    with pytest.raises(CausalProbeError) as error:
        preflight(model, tokens, hooks=("pattern", "result_of_all"))
    message = str(error.value)
    assert message.startswith(
        "BertForMaskedLM can't be measured on these tokens, for 6 reasons: (1) TransformerBridge has no hook"
    )
    assert all(f"({number}) " in message for number in range(1, 7))
    assert "\n" not in message


def test_bad_tokens_do_not_hide_a_bad_model():
    assert list(faults(to_hooked(tiny.opt()), "no tokens")) == ["tokens", "dead-hooks"]


# ------------------------------------------------------------------------------------------------------- left as it was


def state_of(model):
    return (
        [(id(module), module.training) for module in _modules(model)],
        [(id(p), p.requires_grad, p.dtype, p.device, p.grad) for p in model.parameters()],
        {name: (len(point.fwd_hooks), len(point.bwd_hooks)) for name, point in model.hook_dict.items()},
        torch.is_grad_enabled(),
        torch.get_rng_state().tolist(),
    )


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("fails", [False, True])
@pytest.mark.parametrize("gradients", [False, True])
def test_the_model_is_left_as_it_was(kind, fails, gradients):
    model = KINDS[kind]()
    model.train()
    next(model.parameters()).requires_grad_(False)
    seen = []

    def callers(value, hook):
        seen.append(value.shape)
        if fails:
            raise RuntimeError("mine")

    with torch.set_grad_enabled(gradients), model.hooks(fwd_hooks=[(attention_hook(1, "pattern"), callers)]):
        before = state_of(model)
        found = find_faults(model, tokens_for(kind), hooks=("pattern", "z"))
        assert state_of(model) == before
    assert [finding.kind for finding in found] == (["fails"] if fails else [])
    assert seen  # the caller's hook was active


def test_the_model_is_left_as_it_was_when_interrupted():
    model = disentangled()

    def interrupt(value, hook):
        raise KeyboardInterrupt

    before = state_of(model)
    with model.hooks(fwd_hooks=[(attention_hook(1, "pattern"), interrupt)]), pytest.raises(KeyboardInterrupt):
        find_faults(model, random_tokens(2))
    assert state_of(model) == before


def test_the_callers_tokens_are_not_changed():
    tokens = tiny.tokens(3, 40)
    tokens[0, 0] = 99
    before = tokens.clone()
    find_faults(to_hooked(tiny.gpt2()), tokens)
    assert torch.equal(tokens, before)
