from __future__ import annotations

import pytest
import torch

from causal_probe.errors import CausalProbeError
from causal_probe.hooks import attention_hook, self_test, to_hooked
from tests import tiny_huggingface as tiny
from tests.tiny_models import MODELS, disentangled, random_tokens


def failed(model, tokens, **options):
    return {answer.question for answer in self_test(model, tokens, **options) if not answer.passed}


@pytest.mark.parametrize("kind", tiny.CAUSAL)
def test_a_sound_model_knows_every_answer(kind):
    original = tiny.CAUSAL[kind]()
    answers = self_test(to_hooked(original), tiny.tokens(), original=original)
    assert {answer.question: answer.passed for answer in answers} == {
        "pattern-moves-values": True,
        "pattern-is-read-back": True,
        "softmax-of-scores": True,
        "same-as-original": True,
        "nothing-stays": True,
    }


@pytest.mark.parametrize("kind", MODELS)
def test_models_of_transformer_lens_and_of_our_own_know_them_too(kind):
    # A native bridge of TransformerLens 4 shows the pattern where the scores should be.
    assert failed(MODELS[kind](), random_tokens(2)) <= {"softmax-of-scores"}


@pytest.mark.parametrize("kind", ["opt", "bert"])
def test_decorative_hooks_are_noticed(kind):
    model = getattr(tiny, kind)()
    assert failed(to_hooked(model), tiny.tokens(), original=model) == {"pattern-moves-values", "softmax-of-scores"}


def tampered(name, change, tokens):
    model = disentangled((2, 2))
    with model.hooks(fwd_hooks=[(name, lambda value, hook: change(value))]):
        return failed(model, tokens)


@pytest.mark.parametrize(
    ("what", "change", "questions"),
    [
        # Off by one position, and of another head: z no longer follows the pattern.
        ("z", lambda z: z.roll(1, dims=1), {"pattern-moves-values"}),
        ("z", lambda z: z.flip(2), {"pattern-moves-values"}),
        ("z", lambda z: z * torch.nan, {"pattern-moves-values", "nothing-stays"}),  # NaN is not even itself
        ("pattern", lambda pattern: pattern.transpose(2, 3), {"softmax-of-scores"}),
    ],
)
def test_swapped_and_shifted_values_are_noticed(what, change, questions):
    assert tampered(attention_hook(1, what), change, random_tokens(2)) == questions


def test_another_model_is_not_the_original():
    other = tiny.llama(rope_parameters={"rope_theta": 100.0, "rope_type": "default"})
    assert failed(to_hooked(tiny.llama()), tiny.tokens(), original=other) == {"same-as-original"}


def test_a_model_that_remembers_is_noticed():
    model = disentangled()
    calls = []

    def drift(value, hook):
        calls.append(None)
        return value + len(calls)

    with model.hooks(fwd_hooks=[("hook_embed", drift)]):
        assert "nothing-stays" in failed(model, random_tokens(2))


def test_a_model_without_the_hooks_is_told_which():
    with pytest.raises(CausalProbeError, match=r"no hook point blocks\.0\.attn\.hook_v, "):
        self_test(to_hooked(tiny.mamba()), tiny.tokens())
