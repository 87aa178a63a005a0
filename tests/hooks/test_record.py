from __future__ import annotations

import weakref
from types import SimpleNamespace

import numpy as np
import pytest
import torch

from causal_probe.errors import CausalProbeError
from causal_probe.hooks import attention_hook, mean_heads, mean_patterns, moments
from causal_probe.hooks.moments import Moments
from causal_probe.hooks.record import Beside, record
from causal_probe.probes.sequence_graphs import LargestParents
from tests.tiny_models import MODELS, disentangled, random_tokens, transformer_lens


def cached(model, tokens, what, layer):
    """What passes a hook point, by TransformerLens' own cache."""
    _, cache = model.run_with_cache(tokens)
    return cache[attention_hook(layer, what)].detach().double().numpy()


@pytest.mark.parametrize("kind", MODELS)
def test_means_and_standard_errors_are_those_of_the_full_cache(kind):
    model, tokens = MODELS[kind](), random_tokens(9)
    found = mean_patterns(model, [tokens[:4], tokens[4:]])
    assert found[0].count == 9
    for layer in (0, 1):
        patterns = cached(model, tokens, "pattern", layer)
        assert patterns.std(0).max() > 0.01
        np.testing.assert_allclose(found[layer].mean.numpy(), patterns.mean(0), atol=1e-7)
        np.testing.assert_allclose(found[layer].stderr.numpy(), patterns.std(0, ddof=1) / 3, atol=1e-7)


@pytest.mark.parametrize("most", [4, 6, 11])
def test_two_reductions_in_one_pass_are_those_of_two_passes(most):
    """Where a batch is too large and is halved, too."""
    model, tokens = disentangled((2, 1), scale=0.3), random_tokens(11)
    forward = model.forward

    def limited(given, *args, **kwargs):
        if len(given) > most:
            raise torch.OutOfMemoryError("too many")
        return forward(given, *args, **kwargs)

    model.forward = limited
    for n in (1, 4, 8, 20):
        both = Beside(LargestParents(), LargestParents(), n)
        record(model, [tokens[:7], tokens[7:]], both)
        for found, its in ((both.whole, tokens), (both.first, tokens[:n])):
            expected = record(model, its, LargestParents(), batch_size=2).arrays()
            for name, values in found.arrays().items():
                np.testing.assert_allclose(values, expected[name], atol=1e-6)


def test_layers_may_differ_in_their_number_of_heads():
    found = mean_patterns(disentangled((2, 1, 3), scale=0.3), random_tokens(2))
    assert [list(mean.shape) for mean in (its.mean for its in found.values())] == [[2, 7, 7], [1, 7, 7], [3, 7, 7]]


def test_one_sequence_has_no_standard_error():
    assert mean_patterns(disentangled(), random_tokens(1))[0].stderr is None


def test_batches_may_be_split_and_may_carry_their_tokens():
    model, tokens = disentangled(), random_tokens(10)
    whole = mean_patterns(model, tokens)
    for batches in (tokens, [SimpleNamespace(tokens=tokens[:5]), tokens[5:]], SimpleNamespace(tokens=tokens)):
        split = mean_patterns(model, batches, batch_size=3)
        assert split[0].count == 10
        torch.testing.assert_close(split[1].mean, whole[1].mean)
        torch.testing.assert_close(split[1].stderr, whole[1].stderr)


def test_moments_do_not_depend_on_how_they_are_chunked(monkeypatch):
    values = torch.randn(50, 3, 4, generator=torch.Generator().manual_seed(0))
    whole = Moments.of(values)
    monkeypatch.setattr(moments, "CHUNK", 24)  # two sequences at once
    chunked = Moments.of(values)
    torch.testing.assert_close(chunked.sums, whole.sums)
    torch.testing.assert_close(chunked.squares, whole.squares)
    np.testing.assert_allclose(whole.stderr.numpy(), values.double().numpy().std(0, ddof=1) / 50**0.5)


@pytest.mark.parametrize("kind", MODELS)
def test_no_pattern_outlives_its_layer(kind):
    model = MODELS[kind]()
    passed = []

    def watch(value, hook):
        assert all(earlier() is None for earlier in passed)
        passed.append(weakref.ref(value))

    watched = [(attention_hook(layer, "pattern"), watch) for layer in (0, 1)]
    with torch.no_grad(), model.hooks(fwd_hooks=watched):
        mean_patterns(model, [random_tokens(2), random_tokens(2)])
    assert len(passed) == 4


def test_layers_behind_the_last_one_asked_for_are_not_run():
    model = disentangled()
    ran = []
    with model.hooks(fwd_hooks=[(attention_hook(1, "pattern"), lambda value, hook: ran.append(1))]):
        assert list(mean_patterns(model, random_tokens(2), layers=[0])) == [0]
    assert not ran


@pytest.mark.parametrize("kind", MODELS)
def test_the_callers_own_edits_are_measured(kind):
    model = MODELS[kind]()

    def all_on_self(pattern, hook):
        return torch.eye(pattern.shape[-1]).to(pattern).expand_as(pattern)

    with model.hooks(fwd_hooks=[(attention_hook(0, "pattern"), all_on_self)]):
        found = mean_patterns(model, random_tokens(3))
    assert torch.equal(found[0].mean, torch.eye(7, dtype=torch.float64).expand(2, 7, 7))


@pytest.mark.parametrize("kind", MODELS)
def test_mean_heads_is_the_mean_of_what_the_heads_read(kind):
    model, tokens = MODELS[kind](), random_tokens(6)
    z = cached(model, tokens, "z", 1)
    np.testing.assert_allclose(mean_heads(model, tokens, layer=1).mean.numpy(), z.mean(0), atol=1e-6)


def test_patterns_that_are_not_probabilities_are_refused():
    model = disentangled()
    name = attention_hook(1, "pattern")

    def halve(pattern, hook):
        pattern = pattern.clone()
        pattern[1, 0, 3] /= 2
        return pattern

    message = r"sequence 1, head 0, query 3 sums to 0\.5\. Give sequences without padding"
    with model.hooks(fwd_hooks=[(name, halve)]), pytest.raises(CausalProbeError, match=message):
        mean_patterns(model, random_tokens(2))
    model.A[0].data[0, 0, 0] = torch.nan
    with pytest.raises(
        CausalProbeError, match=r"blocks\.0\.attn\.hook_pattern does not carry attention probabilities.*nan"
    ):
        mean_patterns(model, torch.zeros(2, 7, dtype=torch.long))
    assert not any(point.fwd_hooks for point in model.hook_dict.values())


@pytest.mark.parametrize(
    ("batches", "message"),
    [
        ([], "There are no sequences"),
        ([random_tokens(2), random_tokens(2, n=5)], "lengths 5, 7"),
        (torch.rand(2, 7), r"whole numbers \[batch, pos\]; they are torch.float32 \[2, 7\]"),
        (["some text"], "Text was given, and the model has no tokenizer"),
    ],
)
def test_batches_that_can_not_be_averaged_are_refused(batches, message):
    with pytest.raises(CausalProbeError, match=message):
        mean_patterns(disentangled(), batches)


def test_a_layer_that_is_not_there_is_refused():
    with pytest.raises(CausalProbeError, match=r"no hook point blocks\.2\.attn\.hook_pattern"):
        mean_patterns(transformer_lens(), random_tokens(2), layers=[0, 2])


def test_a_hook_that_never_fires_is_reported():
    model = disentangled()
    model.forward = lambda tokens: tokens  # runs no layer
    with pytest.raises(CausalProbeError, match=r"blocks\.1\.attn\.hook_pattern did not fire for every sequence"):
        mean_patterns(model, random_tokens(2), layers=[1])


class Together:
    """Keeps how far what the heads read is from their patterns times their values."""

    def __init__(self) -> None:
        self.errors: list[float] = []
        self.sizes: list[int] = []

    def start(self, tokens):
        self.sizes.append(len(tokens))

    def reduce(self, layer, *values):
        v, pattern, z = values
        read = torch.einsum("bhqk,bkhd->bqhd", pattern, v.repeat_interleave(z.shape[2] // v.shape[2], dim=2))
        return float((read - z).abs().max())

    def add(self, reduced):
        self.errors += [reduced[layer] for layer in sorted(reduced)]


@pytest.mark.parametrize("kind", MODELS)
def test_the_values_of_a_layer_are_seen_together(kind):
    found = record(MODELS[kind](), random_tokens(5), Together(), points=("v", "pattern", "z"), batch_size=3)
    assert found.sizes == [3, 2]
    assert len(found.errors) == 4
    assert max(found.errors) < 1e-5


def test_of_a_hook_that_fires_twice_the_last_value_counts():
    model, tokens = disentangled(), random_tokens(3)
    point = model.hook_dict[attention_hook(0, "pattern")]
    run = type(point).forward

    def twice(value):
        run(point, torch.eye(7, dtype=torch.float64).expand_as(value))
        return run(point, value)

    point.forward = twice
    found = mean_patterns(model, tokens)
    torch.testing.assert_close(found[0].mean, mean_patterns(disentangled(), tokens)[0].mean)
    assert found[0].count == 3
