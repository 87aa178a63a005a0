"""Training against optimiser steps written by hand on the hooked forward, and what a run leaves as it was."""

from __future__ import annotations

import itertools
import json
import math
import subprocess
import sys
from typing import Any

import pytest
import torch

from causal_probe import graphs
from causal_probe.errors import CausalProbeError
from causal_probe.models import DisentangledTransformer
from causal_probe.probes import head_graphs
from causal_probe.tasks import InContextMarkov
from causal_probe.training import evaluate, fit, give_matcher, joint, staged, task_loss
from causal_probe.training.stages import Stage

TREE = InContextMarkov(graphs.from_parents([None, 0, 1, 0]), d_vocab=3, concentration=0.3)
LONGER = InContextMarkov(graphs.chain(5), d_vocab=3, concentration=0.3)
DAG = InContextMarkov(graphs.from_parents([None, None, (0, 1), (1, 2), (0, 3), (2, 4)]), d_vocab=3, concentration=0.3)
EVERYTHING = ("A0", "A1", "W_U")
#: A plain step multiplies the weights by 1 - 1e24.
WILD = {"learning_rate": 1e12, "weight_decay": 1e12, "steps": 30}


def seeded(seed: int = 0) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


def build(
    task: InContextMarkov = TREE,
    heads: tuple[int, ...] = (1, 1),
    *,
    dtype: torch.dtype = torch.float64,
    only_positions: bool = False,
    scale: float = 0.5,
) -> DisentangledTransformer:
    model = DisentangledTransformer(task.d_vocab, task.n_positions, heads, dtype=dtype)
    generator = seeded(1)
    for parameter in model.parameters():
        parameter.data = scale * torch.randn(parameter.shape, generator=generator, dtype=dtype)
    if only_positions:
        token = model.subspaces(0)["token"]
        model.A[0].data[:, token] = 0
        model.A[0].data[:, :, token] = 0
    return model


def stage(moves: tuple[str, ...] = EVERYTHING, **settings: Any) -> Stage:
    return Stage(
        **{"name": "test", "steps": 3, "batch_size": 16, "optimizer": "sgd", "learning_rate": 0.5, "moves": moves}
        | settings
    )


def weights(model: DisentangledTransformer) -> dict[str, torch.Tensor]:
    return {name: parameter.detach().clone() for name, parameter in model.named_parameters()}


def names_of(moves: tuple[str, ...]) -> set[str]:
    return {"W_U" if move == "W_U" else f"blocks.{move.split('.')[0][1:]}.attn.A" for move in moves}


def fit_by_hand(model: DisentangledTransformer, task: InContextMarkov, run: Stage, seed: int) -> list[float]:
    """The same run on the hooked forward, all positions, with torch's own loss; the losses before each step."""
    generator = seeded(seed)
    moving = {name: p for name, p in model.named_parameters() if name in names_of(run.moves)}
    if run.optimizer == "sgd":
        optimizer: Any = torch.optim.SGD(moving.values(), weight_decay=run.weight_decay)
    else:
        optimizer = torch.optim.AdamW(moving.values(), weight_decay=run.weight_decay)
    position = model.subspaces(0)["position"]
    losses = []
    for step in range(run.steps):
        batch = task.sample(run.batch_size, generator, dtype=torch.float64)
        optimizer.zero_grad()
        # torch's cross-entropy takes distributions as targets
        loss = torch.nn.functional.cross_entropy(model(batch.tokens)[:, -1], batch.target)
        loss.backward()
        if "A0.position" in run.moves:
            gradient = model.A[0].grad
            assert gradient is not None
            block = gradient[:, position, position].clone()
            gradient.zero_()[:, position, position] = block
        held = model.A[0].detach()[:, position, position].clone()
        factor = 1.0 if run.schedule == "constant" else (1 + math.cos(math.pi * step / run.steps)) / 2
        optimizer.param_groups[0]["lr"] = run.learning_rate * factor
        optimizer.step()
        if "A0.tokens" in run.moves:
            model.A[0].data[:, position, position] = held
        losses.append(loss.item())
    return losses


@pytest.mark.parametrize(
    ("heads", "run"),
    [
        ((1, 1), stage()),
        ((1, 1), stage(("A0.position",))),
        ((2, 1), stage(("A0.position", "A1"), weight_decay=0.1)),
        ((2, 2), stage(("A1", "W_U"), schedule="cosine")),
        ((2, 1), stage(optimizer="adamw", learning_rate=0.01, weight_decay=0.1, schedule="cosine")),
        ((1, 2), stage(("A0.position", "W_U"), optimizer="adamw", learning_rate=0.01)),
        ((1, 1, 1), stage(("A0", "A2"))),
        ((2, 1), stage(("A0.tokens", "A1", "W_U"), optimizer="adamw", learning_rate=0.01, weight_decay=0.1)),
        ((2,), stage(("A0", "W_U"))),
    ],
    ids=lambda value: "-".join(map(str, value if isinstance(value, tuple) else (value.optimizer, *value.moves))),
)
@pytest.mark.parametrize("task", [TREE, DAG], ids=["tree", "dag"])
def test_steps_equal_steps_written_by_hand(task: InContextMarkov, heads: tuple[int, ...], run: Stage) -> None:
    ours, theirs = (build(task, heads, only_positions="A0.position" in run.moves) for _ in range(2))
    before = weights(ours)
    history = fit(ours, task, [run], generator=seeded(2))
    losses = fit_by_hand(theirs, task, run, seed=2)
    assert history.loss == pytest.approx(losses, rel=1e-12)
    for name, weight in weights(ours).items():
        torch.testing.assert_close(weight, weights(theirs)[name], rtol=1e-10, atol=1e-12)
        assert torch.equal(weight, before[name]) == (name not in names_of(run.moves))  # frozen: to the last bit


def test_all_but_the_position_block_moves() -> None:
    model = build()
    before = weights(model)["blocks.0.attn.A"]
    fit(model, TREE, [stage(("A0.tokens",), optimizer="adamw", weight_decay=0.1)], generator=seeded())
    moved = model.A[0].detach() != before
    position = model.subspaces(0)["position"]
    assert not bool(moved[:, position, position].any())
    moved[:, position, position] = True
    assert bool(moved.all())


def test_the_position_block_alone_moves() -> None:
    model = build(only_positions=True)
    before = weights(model)["blocks.0.attn.A"]
    fit(model, TREE, [stage(("A0.position",))], generator=seeded())
    moved = model.A[0].detach() != before
    position = model.subspaces(0)["position"]
    # A row of one key has no choice: the first position's gradient is zero, and so are those of future keys.
    assert torch.equal(
        moved[0, position, position], torch.ones(5, 5).tril()[:, :].bool() & (torch.arange(5) > 0)[:, None]
    )
    moved[:, position, position] = False
    assert not bool(moved.any())


def test_history_counts_steps_and_sequences_across_stages() -> None:
    run = [
        stage(("W_U",), name="first", steps=2, batch_size=8),
        stage(name="none", steps=0),
        stage(name="last", steps=3),
    ]
    history = fit(build(), TREE, run, generator=seeded())
    assert history.step == (0, 1, 2, 3, 4)
    assert history.stage == ("first", "first", "last", "last", "last")
    assert history.n_sequences == 2 * 8 + 3 * 16
    assert len(history.loss) == 5


def test_no_stage_at_all() -> None:
    model, calls = build(), []
    before = weights(model)
    history = fit(model, TREE, [], generator=seeded(), callback=lambda step, _: calls.append(step))
    assert (history.step, history.stage, history.loss, history.n_sequences) == ((), (), (), 0)
    assert calls == [0]
    assert all(torch.equal(weight, before[name]) for name, weight in weights(model).items())


def test_the_same_seed_gives_the_same_weights() -> None:
    models = [build(dtype=torch.float32) for _ in range(3)]
    histories = [
        fit(model, TREE, [stage()], generator=seeded(seed)) for model, seed in zip(models, (5, 5, 6), strict=True)
    ]
    assert histories[0] == histories[1] != histories[2]
    first, second, other = (torch.cat([p.flatten() for p in model.parameters()]) for model in models)
    assert torch.equal(first, second)
    assert not torch.equal(first, other)


def test_a_callback_sees_the_model_before_every_step_and_after_the_last() -> None:
    model, seen = build(), []

    def look(step: int, looked_at: DisentangledTransformer) -> None:
        assert looked_at is model
        seen.append((step, weights(model)["W_U"]))

    fit(model, TREE, [stage(("W_U",), steps=2), stage(("W_U",), steps=1)], generator=seeded(), callback=look)
    assert [step for step, _ in seen] == [0, 1, 2, 3]
    assert torch.equal(seen[0][1], weights(build())["W_U"])
    assert torch.equal(seen[3][1], weights(model)["W_U"])
    assert not any(torch.equal(a, b) for (_, a), (_, b) in itertools.pairwise(seen))


def test_a_callback_may_probe_and_draw_without_changing_the_run() -> None:
    ours, theirs = build(), build()
    tokens = TREE.sample(8, seeded(9)).tokens
    fit(ours, TREE, [stage()], generator=seeded(), callback=lambda _, model: model.run_with_cache(tokens))
    fit(theirs, TREE, [stage()], generator=seeded())
    assert all(torch.equal(weight, weights(theirs)[name]) for name, weight in weights(ours).items())
    assert not any(point.has_hooks() for point in ours.hook_dict.values())


@pytest.mark.parametrize("how", ["ends", "raises", "is interrupted", "diverges"])
def test_flags_and_gradients_are_as_they_were(how: str) -> None:
    model = build()
    model.A[1].requires_grad_(False)
    kept = torch.ones_like(model.W_U)
    model.W_U.grad = kept

    def fail(step: int, _: DisentangledTransformer) -> None:
        if step == 1 and how in ("raises", "is interrupted"):
            raise {"raises": RuntimeError, "is interrupted": KeyboardInterrupt}[how]

    run = stage(**WILD) if how == "diverges" else stage()
    if how == "ends":
        fit(model, TREE, [run], generator=seeded(), callback=fail)
    else:
        error = {"raises": RuntimeError, "is interrupted": KeyboardInterrupt, "diverges": CausalProbeError}[how]
        with pytest.raises(error):
            fit(model, TREE, [run], generator=seeded(), callback=fail)
    assert [p.requires_grad for p in (model.A[0], model.A[1], model.W_U)] == [True, False, True]
    assert model.W_U.grad is kept
    assert torch.equal(kept, torch.ones_like(kept))
    assert model.A[0].grad is None
    assert model.A[1].grad is None


def test_gradients_that_are_turned_off_outside() -> None:
    """Notebooks of the field begin with torch.set_grad_enabled(False)."""
    ours, theirs = build(), build()
    with torch.no_grad():
        fit(ours, TREE, [stage()], generator=seeded())
        assert not torch.is_grad_enabled()
    fit(theirs, TREE, [stage()], generator=seeded())
    assert all(torch.equal(weight, weights(theirs)[name]) for name, weight in weights(ours).items())


def test_progress_is_shown_on_standard_error_alone(capsys: pytest.CaptureFixture[str]) -> None:
    fit(build(), TREE, [stage(name="the stage")], generator=seeded())
    assert capsys.readouterr() == ("", "")
    fit(build(), TREE, [stage(name="the stage")], generator=seeded(), progress=True)
    out, err = capsys.readouterr()
    assert out == ""
    assert "the stage" in err
    assert "3/3" in err


# -------------------------------------------------------------------------------------------------------------- losses


def test_task_loss_is_torchs_cross_entropy() -> None:
    generator = seeded()
    logits = torch.randn(20, 4, generator=generator, dtype=torch.float64)
    target = torch.rand(20, 4, generator=generator, dtype=torch.float64).softmax(-1)
    expected = torch.nn.functional.cross_entropy(logits, target, reduction="none")
    torch.testing.assert_close(task_loss(logits, target), expected)
    torch.testing.assert_close(task_loss(logits + 1e4, target), expected, rtol=1e-9, atol=0)


def test_evaluate_is_the_mean_over_sequences_of_all_batches() -> None:
    model = build()
    batches = [TREE.sample(n, seeded(n), dtype=torch.float64) for n in (3, 50)]
    losses = [task_loss(model(batch.tokens)[:, -1], batch.target).detach() for batch in batches]
    assert evaluate(model, batches) == pytest.approx(float(torch.cat(losses).mean()), rel=1e-12)
    with pytest.raises(CausalProbeError, match=r"there are no sequences\. Give at least one batch"):
        evaluate(model, [])


# -------------------------------------------------------------------------------------------------------------- errors


@pytest.mark.parametrize(
    ("model", "run", "message"),
    [
        (build(LONGER), [stage()], r"The task has 3 states and 5 positions; the model has 3 and 6\. Build a model"),
        (build(), [stage(("A2",))], r"'test' is to move \['A2'\]; it can move A0.position, A0.tokens, A0, A1, W_U\."),
        (build(), [stage(("W_E", "A1.position"))], r"is to move \['A1.position', 'W_E'\]"),
        (build(), [stage(()), stage()], "is to move nothing"),
        (build(), [stage(), stage(("A0.position",))], "'test' moves layer 0's position block alone. That needs"),
        (build(only_positions=True), [stage(("A0.position", "A0"))], "moves layer 0's position block alone"),
        (build(only_positions=True), [stage(), stage(("A0.position",))], "no stage up to this one that moves them"),
        (build(heads=(1,), only_positions=True), [stage(("A0.position",))], "needs a model of two layers or more"),
        (build(), [stage(("A0.tokens", "A0"))], "can't be together with A0"),
        (build(heads=(1,)), [stage(("A0.tokens",))], "needs a model of two layers or more"),
        (build(only_positions=True), [stage(("A0.tokens",)), stage(("A0.position",))], "no stage up to this one"),
    ],
)
def test_a_run_that_can_not_be_is_refused_before_anything_moves(
    model: DisentangledTransformer, run: list[Stage], message: str
) -> None:
    before, calls = weights(model), []
    with pytest.raises(CausalProbeError, match=message):
        fit(model, TREE, run, generator=seeded(), callback=lambda step, _: calls.append(step))
    assert not calls
    assert all(torch.equal(weight, before[name]) for name, weight in weights(model).items())


def test_a_generator_on_another_device() -> None:
    with pytest.raises(
        CausalProbeError, match=r"The generator is on cpu and the model on meta\. Make both on one device"
    ):
        fit(build().to("meta"), TREE, [stage()], generator=seeded())


def test_divergence_says_where_and_why() -> None:
    model = build(dtype=torch.float32)
    with pytest.raises(
        CausalProbeError, match=r"The loss is (nan|inf) at step 2 \(wild\): the learning rate 1e\+12 is too"
    ):
        fit(model, TREE, [stage(name="wild", **WILD)], generator=seeded())


def test_a_last_step_that_diverges_is_noticed_too() -> None:
    model = build(dtype=torch.float32)
    with pytest.raises(
        CausalProbeError, match=r"weights are not finite after 2 steps \(wild\): the learning rate 1e\+12"
    ):
        fit(model, TREE, [stage(name="wild", **WILD | {"steps": 2})], generator=seeded())


def test_weights_that_were_broken_before() -> None:
    with pytest.raises(
        CausalProbeError, match=r"at step 0 \(test\): the weights that the model began with are too large"
    ):
        fit(build(scale=math.nan), TREE, [stage()], generator=seeded())


# ------------------------------------------------------------------------------------------------------------- a graph


def test_staged_training_writes_a_small_graph_into_layer_0() -> None:
    truth = graphs.from_parents([None, 0, 0, 2, 1, 3])
    task = InContextMarkov(truth, d_vocab=3, concentration=0.1)
    model = DisentangledTransformer(3, task.n_positions)
    give_matcher(model)
    run = staged(n_positions=task.n_positions, steps=60)
    history = fit(model, task, run, generator=seeded())
    held_out = task.sample(4096, seeded(1))
    pattern = head_graphs(model, held_out.tokens).values[0][0]
    for parent, child in truth.edges:
        assert pattern[child, parent] > 0.9
    assert history.loss[0] > history.loss[-1]
    # Stage 1 is over when stage 2 begins: the graph is in layer 0 alone, and stage 2 has not touched it.
    assert history.n_sequences == 20 * 4096 + 60 * 512


def test_joint_training_from_zero_lowers_the_loss() -> None:
    task = InContextMarkov(graphs.chain(5), d_vocab=3, concentration=0.1)
    model = DisentangledTransformer(3, task.n_positions)
    history = fit(model, task, joint(steps=60, batch_size=512), generator=seeded())
    assert history.loss[0] == pytest.approx(math.log(3), rel=1e-5)  # all weights zero: uniform
    assert evaluate(model, [task.sample(2000, seeded(1))]) < 0.95 * math.log(3)


# ---------------------------------------------------------------------------------------------------------------- compiled


#: The form of the forward that all blocks take: the other one is a part of it.
BOTH_WAYS = """
import json, torch
from causal_probe import graphs, models, tasks, training
from causal_probe.training.stages import Stage

task = tasks.InContextMarkov(graphs.chain(5), 3, 0.1)
stages = [Stage("the rest", 3, 16, "adamw", 0.01, moves=("A0", "A1", "W_U"))]
found = []
for compiled in (False, True):
    model = models.DisentangledTransformer(3, task.n_positions).double()
    training.give_matcher(model)
    history = training.fit(model, task, stages, generator=tasks.generator(0, "training"), compiled=compiled)
    found.append([*history.loss, *(value for weights in model.parameters() for value in weights.flatten().tolist())])
print(json.dumps(found))
"""


def test_a_compiled_training_has_the_same_losses_and_weights():
    """In a process of its own: the checks of types that tests bring can't be compiled."""
    run = subprocess.run(
        [sys.executable, "-W", "error::UserWarning:causal_probe", "-c", BOTH_WAYS],
        capture_output=True,
        text=True,
        check=False,
    )
    assert run.returncode == 0, run.stderr[-2000:]
    slow, fast = json.loads(run.stdout)
    assert fast == pytest.approx(slow, rel=1e-7, abs=1e-9)
    assert any(value != 0 for value in slow[3:])


def test_a_step_that_can_not_be_compiled_is_refused_in_words(monkeypatch):
    def refuse(loss, **options):
        def run(*given):
            raise torch._dynamo.exc.BackendCompilerFailed("inductor", RuntimeError("no compiler"), None)

        return run

    monkeypatch.setattr(torch, "compile", refuse)
    task = InContextMarkov(graphs.chain(3), 3, 0.1)
    model = DisentangledTransformer(3, task.n_positions)
    before = [weights.clone() for weights in model.parameters()]
    with pytest.raises(CausalProbeError, match=r"can't be compiled \(BackendCompilerFailed: .*leave `compiled` out"):
        fit(model, task, joint(steps=2, batch_size=8), generator=seeded(), compiled=True)
    assert all(torch.equal(a, b) for a, b in zip(before, model.parameters(), strict=True))
