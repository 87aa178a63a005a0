"""Variable binding end to end with tiny settings; and the measurements on models whose answers and heads are known."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
from transformer_lens import HookedRootModule
from transformer_lens.hook_points import HookPoint

from causal_probe.papers import binding, reproduce
from causal_probe.tasks import generator
from causal_probe.tasks.variable_binding import LINE, Programs

TASK = binding.task_of()
PROGRAMS = TASK.sample(150, generator(0, "a test"))


@pytest.mark.parametrize("quick", [True, False])
def test_it_runs(monkeypatch: pytest.MonkeyPatch, quick: bool) -> None:
    values = {"STEPS": {True: 6, False: 6}, "BATCH": 8, "SEEDS": {True: 1, False: 2}, "PROGRAMS": {True: 40, False: 40}, "MOMENTS": 5, "WATCHED": 32}  # fmt: skip
    for name, value in values.items():
        assert hasattr(binding, name)
        monkeypatch.setattr(binding, name, value)
    result = reproduce("variable-binding", quick=quick)
    assert result.figures
    assert len({line.quantity for line in result.lines}) == len(result.lines)
    assert not result.holds  # six steps teach nothing


class Follows(HookedRootModule):
    """Answers by running the program from its tokens; with ``direct`` it reads the query's line alone. Its heads have no part in that: every head looks at the true
    parent's right-hand side, but with the share ``wrong`` at the first line."""

    def __init__(self, *, direct: bool = False, wrong: float = 0.0) -> None:
        super().__init__()
        self.direct, self.wrong = direct, wrong
        self.cfg = SimpleNamespace(n_layers=binding.LAYERS, n_heads=binding.HEADS, d_vocab=TASK.d_vocab)
        self.blocks = torch.nn.ModuleList([torch.nn.Module() for _ in range(binding.LAYERS)])
        for block in self.blocks:
            block.attn = torch.nn.Module()
            block.attn.hook_pattern, block.attn.hook_attn_scores = HookPoint(), HookPoint()  # type: ignore[union-attr]
        self.setup()

    def forward(self, tokens: torch.Tensor) -> torch.Tensor:
        logits = torch.zeros(*tokens.shape, TASK.d_vocab)
        pattern = torch.zeros(len(tokens), binding.HEADS, *[tokens.shape[1]] * 2)
        for n, row in enumerate(tokens.tolist()):
            holds: dict[int, tuple[int, int]] = {}
            for line in range(binding.LINES):
                left, right = row[LINE * line], row[LINE * line + 2]
                if right in holds:
                    pattern[n, :, LINE * line + 2, LINE * holds[right][1] + 2] = 1 - self.wrong
                    pattern[n, :, LINE * line + 2, 2] += self.wrong
                holds[left] = ((right if self.direct else holds.get(right, (right, 0))[0]), line)
            pattern[n, :, -1, LINE * holds[row[-1]][1] + 2] = 1
            logits[n, -1, holds[row[-1]][0]] = 9
        for block in self.blocks:
            block.attn.hook_pattern(pattern)  # type: ignore[union-attr, operator]
        return logits


def test_a_model_that_follows_is_read_and_confirmed() -> None:
    found = binding.probe(Follows(), 60, 0)
    assert found["accuracy"] == [1, 1]
    assert all(each.endswith("right-hand side") for each in found["heads"])
    for name in ("read", "intervened", "confirmed"):
        assert found[name] == (1, 1)
    assert (found["lines"], found["query"]) == (1, 1)
    assert 0.2 < found["chance"] < 0.7


def test_a_model_that_reads_one_line_alone_has_shorter_ways() -> None:
    """Its heads look right, and interventions say what it does: the query's line matters, and acts through none; the line before it does not."""
    acts = binding.intervened(Follows(direct=True), PROGRAMS)
    truth = binding.on_path(PROGRAMS.parents.numpy())
    one = PROGRAMS.hops.numpy() == 1
    np.testing.assert_array_equal(acts[one], truth[one])
    precision, recall = binding.precision_recall(acts[~one], truth[~one])
    assert precision == 1
    assert recall == 0.5


def test_heads_that_look_elsewhere_are_wrong_there() -> None:
    found = binding.probe(Follows(wrong=0.8), 60, 0)
    assert found["lines"] < 1
    assert found["query"] == 1
    assert found["intervened"] == (1, 1)
    assert found["confirmed"][1] == found["read"][1] < 1


def test_ways_and_their_edges_by_plain_loops() -> None:
    parents = PROGRAMS.parents.numpy()
    found = binding.on_path(parents)
    for n, its in enumerate(parents.tolist()):
        edges, at = set(), binding.LINES
        while its[at] >= 0:
            edges.add((at, its[at]))
            at = its[at]
        assert {(int(c), int(p)) for c, p in np.argwhere(found[n])} == edges
    assert binding.precision_recall(found, np.zeros_like(found)) == (0, 0)
    assert len(binding.ways()) == len(binding.looked(Follows(), _some(3)))


def test_a_hidden_line_costs_what_a_layer_reads() -> None:
    """A random model's answer, with the scores of one line's tokens hidden by hand."""
    model, programs = binding.build(3), _some(4)
    found = binding.cut(model, programs)
    n = torch.arange(4)

    def hide(scores: torch.Tensor, hook: Any) -> torch.Tensor:
        hidden = torch.zeros(26, 26, dtype=torch.bool)
        hidden[14:16, 4:8] = True  # line 3, from its right-hand side on, does not see line 1
        return scores.masked_fill(hidden, -1e9)

    with torch.no_grad():
        whole = binding.answer(model, programs)[n, programs.answers]
        with model.hooks(fwd_hooks=[(f"blocks.{layer}.attn.hook_attn_scores", hide) for layer in range(3)]):
            less = binding.answer(model, programs)[n, programs.answers]
    np.testing.assert_allclose(found[:, 3, 1], (whole - less).numpy(), atol=1e-5)
    assert not found[:, 2, 2:].any()


def _some(n: int) -> Programs:
    return Programs(*(each[:n] for each in (PROGRAMS.tokens, PROGRAMS.answers, PROGRAMS.parents, PROGRAMS.hops)))
