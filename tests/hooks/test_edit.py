from __future__ import annotations

import numpy as np
import pytest
import torch

from causal_probe import models
from causal_probe.errors import CausalProbeError
from causal_probe.hooks import (
    attention_hook,
    edited,
    mean_ablate,
    mean_heads,
    one_hot_row,
    replace_row,
    resample_ablate,
    uniform_row,
    zero_ablate,
)
from tests.tiny_models import MODELS, disentangled, random_tokens

TOKENS = random_tokens(3)


def value_at(model, name, *edits):
    """What passes a hook point, last in the row of its hooks."""
    seen = []
    with edited(model, *edits), torch.no_grad():
        model.run_with_hooks(TOKENS, fwd_hooks=[(name, lambda value, hook: seen.append(value.clone()))])
    return seen[-1].double().numpy()


@pytest.mark.parametrize("kind", MODELS)
@pytest.mark.parametrize(
    "row", [uniform_row(4), one_hot_row(2), torch.tensor([0.25, 0.0, 0.75])], ids=["even", "one", "own"]
)
def test_a_replaced_row_is_what_the_head_reads_by_and_the_only_change(kind, row):
    model = MODELS[kind]()
    pattern, z = attention_hook(0, "pattern"), attention_hook(0, "z")
    expected = value_at(model, pattern)
    expected[:, 1, 4] = 0
    expected[:, 1, 4, : len(row)] = row.numpy()
    edit = replace_row(0, 1, query=4, row=row)
    np.testing.assert_allclose(value_at(model, pattern, edit), expected, atol=1e-7)
    v = value_at(model, attention_hook(0, "v"))
    np.testing.assert_allclose(
        value_at(model, z, edit), np.einsum("bhqk,bkhd->bqhd", expected, v), rtol=1e-5, atol=1e-5
    )


@pytest.mark.parametrize("kind", MODELS)
def test_ablations_replace_one_head_everywhere(kind):
    model = MODELS[kind]()
    z = attention_hook(0, "z")
    expected = value_at(model, z)
    expected[:, :, 1] = 0
    np.testing.assert_allclose(value_at(model, z, zero_ablate(0, 1)), expected, atol=1e-7)
    reference = random_tokens(5, seed=3)
    mean = mean_heads(model, reference, layer=0).mean
    assert torch.equal(mean_heads(model, reference, layer="L0H1").mean, mean[:, 1])
    np.testing.assert_array_equal(value_at(model, z, zero_ablate("L0H1")), value_at(model, z, zero_ablate(0, 1)))
    expected[:, :, 1] = mean[:, 1].numpy()
    np.testing.assert_allclose(value_at(model, z, mean_ablate(0, 1, reference=mean[:, 1])), expected, atol=1e-6)
    expected[:, :, 1] = mean[:, 1].mean(0).numpy()
    np.testing.assert_allclose(value_at(model, z, mean_ablate(0, 1, reference=mean[:, 1].mean(0))), expected, atol=1e-6)


@pytest.mark.parametrize("kind", MODELS)
def test_resample_ablation_puts_other_sequences_in_one_heads_place(kind):
    model = MODELS[kind]()
    z = attention_hook(0, "z")
    clean = torch.as_tensor(value_at(model, z))
    expected = clean.clone()
    expected[:, :, 1] = clean.roll(1, 0)[:, :, 1]
    found = value_at(model, z, resample_ablate(0, 1, donors=clean.roll(1, 0)[:, :, 1]))
    np.testing.assert_allclose(found, expected, atol=1e-6)
    assert not np.allclose(found, clean)


@pytest.mark.parametrize("kind", MODELS)
@pytest.mark.parametrize(
    ("what", "edit"), [("pattern", replace_row(0, 0, query=3, row=one_hot_row(0))), ("z", zero_ablate(0, 0))]
)
def test_the_models_own_tensors_are_not_written_to(kind, what, edit):
    model = MODELS[kind]()
    seen = []
    own = [(attention_hook(0, what), lambda value, hook: seen.append((value, value.clone())))]
    with torch.no_grad(), model.hooks(fwd_hooks=own), edited(model, edit):
        edited_output = model(TOKENS)
    assert not torch.allclose(edited_output, model(TOKENS))
    (value, copy), *_ = seen
    assert torch.equal(value, copy)


def test_edits_made_in_a_loop_each_keep_their_own_place():
    model = disentangled()
    edits = [replace_row(0, head, query=query, row=one_hot_row(0)) for head, query in [(0, 5), (1, 2)]]
    pattern = value_at(model, attention_hook(0, "pattern"), *edits)
    on_first = (pattern[..., 0] == 1).all(0)
    assert {(int(head), int(query)) for head, query in np.argwhere(on_first)} == {(0, 0), (1, 0), (0, 5), (1, 2)}


@pytest.mark.parametrize("row", [torch.tensor([0.5, 0.4]), torch.tensor([1.5, -0.5]), torch.tensor([torch.nan, 1.0])])
def test_a_row_that_is_no_distribution_is_refused(row):
    with pytest.raises(CausalProbeError, match="must be a distribution over keys"):
        replace_row(0, 0, query=1, row=row)


@pytest.mark.parametrize(
    ("edit", "message"),
    [
        (
            replace_row(0, 2, query=1, row=one_hot_row(0)),
            r"head 2 was asked for at blocks\.0\.attn\.hook_pattern, .* from 0 to 1",
        ),
        (replace_row(0, 0, query=7, row=one_hot_row(0)), "query 7 was asked for"),
        (replace_row(0, 0, query=1, row=one_hot_row(7)), "key 7 was asked for"),
        (zero_ablate(1, 1), r"head 1 was asked for at blocks\.1\.attn\.hook_z"),
        (mean_ablate(0, 0, reference=torch.zeros(3)), r"shape \[3\] can't replace"),
        (mean_ablate(0, 0, reference=torch.zeros(4, 12)), r"shape \[4, 12\] can't replace .* \[7, 12\]"),
        (
            resample_ablate(0, 0, donors=torch.zeros(2, 7, 12)),
            r"shape \[2, 7, 12\] can't replace .* \[7, 12\], in \d+ sequences",
        ),
        (zero_ablate(5, 0), r"no hook point blocks\.5\.attn\.hook_z"),
    ],
)
def test_a_place_that_is_not_there_is_refused(edit, message):
    model = disentangled()
    with pytest.raises(CausalProbeError, match=message), edited(model, edit):
        model(TOKENS)
    assert not any(point.fwd_hooks for point in model.hook_dict.values())


def test_rows_that_all_sequences_share_are_edited_once_and_nobody_elses_hook_sees_that():
    """The last position's logits, by the short way and by the whole model: under edits, nested edits, and a hook that writes to what it is given."""
    model = models.DisentangledTransformer(d_vocab=5, n_positions=7, heads=[2, 1])
    model.block(0, 0, query="position", key="position").normal_(generator=torch.Generator().manual_seed(0))
    for part in ("token", "L0H0.token", "L0H1.position"):
        model.block(1, 0, query="token", key=part).normal_(generator=torch.Generator().manual_seed(1))
        model.output_block("L1H0.token").normal_(generator=torch.Generator().manual_seed(2))
    tokens = random_tokens(6) % 5
    name = attention_hook(0, "pattern")
    first, second = replace_row(0, 0, query=4, row=one_hot_row(2)), replace_row(0, 1, query=6, row=uniform_row(3))
    given = []

    def writes(pattern, hook):
        given.append(pattern.stride(0))
        pattern[1, 0, 6] = torch.eye(7)[0]  # of one sequence alone
        return pattern

    def same(*edits):
        with torch.no_grad(), edited(model, *edits):
            short, whole = model.predict(tokens), model(tokens)[:, -1]
        torch.testing.assert_close(short, whole)
        return short

    with torch.no_grad():
        plain = model.predict(tokens)
    one, both = same(first), same(first, second)
    assert not torch.allclose(plain, one)
    with edited(model, first):
        torch.testing.assert_close(same(second), both)
    own = same((name, writes))
    assert torch.allclose(own[[0, 2, 3, 4, 5]], plain[[0, 2, 3, 4, 5]])
    assert not torch.allclose(own[1], plain[1])
    same(first, (name, writes))
    with model.hooks(fwd_hooks=[(name, writes)]):
        same(first)
    assert 0 not in given  # it was never given one tensor for all sequences
