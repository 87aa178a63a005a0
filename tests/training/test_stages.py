"""Stages, schedules, and what staged training is given."""

from __future__ import annotations

import dataclasses
import math
from typing import Any

import pytest
import torch

from causal_probe.errors import CausalProbeError
from causal_probe.models import DisentangledTransformer
from causal_probe.training import give_matcher, joint, staged
from causal_probe.training.stages import Stage

SETTINGS: dict[str, Any] = {
    "name": "a", "steps": 8, "batch_size": 4, "optimizer": "sgd", "learning_rate": 0.2, "moves": ("W_U",),
}  # fmt: skip


def test_schedules() -> None:
    constant, cosine = Stage(**SETTINGS), Stage(**SETTINGS, schedule="cosine")
    assert [constant.rate_at(step) for step in range(8)] == [0.2] * 8
    # cos 0, 45, 90, 135, 180 degrees
    values = [0.2, 0.1 * (1 + math.sqrt(0.5)), 0.1, 0.1 * (1 - math.sqrt(0.5)), 0.0]
    assert [cosine.rate_at(step) for step in (0, 2, 4, 6, 8)] == pytest.approx(values, abs=1e-15)


@pytest.mark.parametrize("schedule", ["constant", "cosine"])
def test_cosine_is_torchs_own(schedule: str) -> None:
    weight = torch.nn.Parameter(torch.zeros(1))
    optimizer = torch.optim.SGD([weight], lr=0.2)
    theirs = torch.optim.lr_scheduler.LambdaLR(optimizer, lambda _: 1.0)
    if schedule == "cosine":
        optimizer = torch.optim.SGD([weight], lr=0.2)
        theirs = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, T_max=8)
    ours = Stage(**{**SETTINGS, "schedule": schedule})
    for step in range(8):
        assert ours.rate_at(step) == pytest.approx(theirs.get_last_lr()[0], abs=1e-12)
        optimizer.step()
        theirs.step()


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"steps": -1}, "steps must not be negative, not -1"),
        ({"batch_size": 0}, "batch_size must be at least 1, not 0"),
        ({"learning_rate": 0.0}, "learning_rate must be positive and at most 1e.12, not 0.0"),
        ({"learning_rate": math.nan}, "`learning_rate` is nan"),
        ({"learning_rate": math.inf}, "`learning_rate` is inf"),
        ({"weight_decay": -0.1}, "weight_decay must be from 0 to 1e.12, not -0.1"),
        ({"weight_decay": math.nan}, "`weight_decay` is nan"),
    ],
)
def test_a_stage_that_can_not_be(change: dict[str, Any], message: str) -> None:
    with pytest.raises(CausalProbeError, match=message):
        Stage(**{**SETTINGS, **change})


@pytest.mark.parametrize(
    ("field", "value", "message"),
    [
        ("optimizer", "adam", "optimizer must be sgd or adamw, not 'adam'"),
        ("schedule", "linear", "schedule must be constant or cosine, not 'linear'"),
    ],
)
def test_a_choice_that_there_is_not(field: str, value: str, message: str) -> None:
    stage = Stage(**SETTINGS)
    object.__setattr__(stage, field, value)  # past the types, which are checked at run time in tests only
    with pytest.raises(CausalProbeError, match=message):
        stage.__post_init__()


def test_all_problems_are_told_at_once() -> None:
    with pytest.raises(
        CausalProbeError, match=r"steps must not be negative.*; batch_size must be.*; learning_rate must"
    ):
        Stage("a", -1, 0, "sgd", -1.0, ("W_U",))


@pytest.mark.parametrize("heads", [(1, 1), (2, 1), (3, 2)])
def test_what_is_given_is_that_and_no_more(heads: tuple[int, int]) -> None:
    model = DisentangledTransformer(3, 6, heads)
    given = give_matcher(model, beta=0.5)
    eye = torch.eye(3)
    expected = {}
    for head in range(heads[0]):
        expected[1, 0, "token", f"L0H{head}.token"] = 0.5 * eye
    for key, block in model.named_blocks().items():
        assert torch.equal(block, expected.get(key, torch.zeros_like(block)))
    for part in model.subspaces(2):
        block = model.output_block(part)
        assert torch.equal(block, eye if part == "L1H0.token" else torch.zeros_like(block))
    # And it is said, one sentence a block.
    assert len(given) == len(expected) + 1
    for (_, _, query, key), sentence in zip(expected, given, strict=False):
        assert sentence == f"L1H0 compares ({query}, {key}): 0.5 I"
    assert given[-1] == "W_U reads L1H0.token: I"


def test_other_weights_stay() -> None:
    model = DisentangledTransformer(3, 6)
    for parameter in model.parameters():
        parameter.data.fill_(7)
    give_matcher(model)
    assert int((model.A[0] != 7).sum()) == 0
    assert int((model.A[1] != 7).sum()) == 9
    assert int((model.W_U != 7).sum()) == 9


@pytest.mark.parametrize("heads", [(1,), (1, 1, 1)])
def test_staged_training_is_for_two_layers(heads: tuple[int, ...]) -> None:
    model = DisentangledTransformer(3, 6, heads)
    with pytest.raises(
        CausalProbeError, match=f"defined for two layers; the model has {len(heads)}. Use joint training"
    ):
        give_matcher(model)
    assert not any(bool(parameter.any()) for parameter in model.parameters())


def test_staged_moves_the_graph_first_and_the_rest_then() -> None:
    graph, rest = staged(n_positions=20)
    assert (graph.moves, rest.moves) == (("A0.position",), ("A1", "W_U"))
    assert (graph.optimizer, graph.learning_rate) == ("sgd", 3000)
    assert staged(n_positions=40)[0].learning_rate == 4 * graph.learning_rate
    assert staged(n_positions=40, graph_learning_rate=1.0)[0].learning_rate == 1
    assert staged(n_positions=9, steps=3, batch_size=7, optimizer="sgd", learning_rate=0.5)[1] == dataclasses.replace(
        rest, steps=3, batch_size=7, optimizer="sgd", learning_rate=0.5
    )


def test_joint_moves_everything_at_the_authors_rates() -> None:
    (sgd,), (adamw,) = joint(), joint(optimizer="adamw")
    assert sgd.moves == adamw.moves == ("A0", "A1", "W_U")
    assert joint(n_layers=3)[0].moves == ("A0", "A1", "A2", "W_U")
    assert (sgd.learning_rate, adamw.learning_rate) == (1, 0.01)
    (own,) = joint(steps=5, batch_size=6, learning_rate=7.0, schedule="cosine", weight_decay=8.0)
    assert (own.steps, own.batch_size, own.learning_rate, own.schedule, own.weight_decay) == (5, 6, 7, "cosine", 8)
