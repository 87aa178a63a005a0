"""How many sequences does it take until the graph can be read: from one gradient, from staged training, from joint training?"""

from __future__ import annotations

from collections.abc import Sequence
from functools import partial
from typing import Any

import numpy as np

from causal_probe import viz
from causal_probe.first_gradient.graph import gradient_graphs
from causal_probe.models import DisentangledTransformer
from causal_probe.papers.base import Line, Reproduction, Run, reproduction
from causal_probe.papers.known_graphs import PAPER, parent_attention, train
from causal_probe.papers.shared import forests
from causal_probe.probes import head_graphs
from causal_probe.tasks import InContextMarkov, generator
from causal_probe.tasks.markov import Targets
from causal_probe.training import fit_many, give_matcher, joint, staged

__all__ = ["sample_complexity"]

#: The paper's task over random forests.
POSITIONS, VOCAB, ALPHA, ROOT_PROBABILITY = 20, 3, 0.1, 0.5
#: Forests on which each way is tried; the first of one list of seeds.
GRADIENT_FORESTS = {False: 200, True: 100}
STAGED_FORESTS = {False: 40, True: 16}
JOINT_FORESTS = {False: 20, True: 8}
#: Sequences from which one gradient is taken.
GRADIENT = tuple(2**k for k in range(4, 14))
#: Batch sizes of stage 1, which has 20 steps.
STAGED = tuple(2**k for k in range(13))
#: (batch size, steps) of joint SGD at the paper's rate of 1: the paper's batch, and a smaller one, which needs fewer sequences.
JOINT = {False: ((1024, 2048), (64, 4096)), True: ((1024, 576), (64, 1152))}
RATE, LOOKS = 1.0, 48
#: The share that counts as recovered, and the factor by which one gradient must beat joint SGD.
SHARE, AHEAD = 0.95, 100
WATCHING = 256


@reproduction(
    "sample-complexity",
    "Sequences until the graph can be read: one gradient, staged and joint training",
    minutes=(4, 25),
)
def sample_complexity(run: Run) -> Reproduction:
    """The probability that all true parents lead, against the number of sequences."""
    curves: dict[str, tuple[list[int], list[float], int]] = {}
    whole: dict[str, tuple[list[int], list[float], int]] = {}
    kinds: tuple[tuple[str, Targets], ...] = (("soft targets", "soft"), ("hard targets", "hard"))
    for label, kind in kinds:
        part = run.part(f"gradient-{kind}", partial(_by_gradient, run, kind))
        curves[f"one gradient, {label}"] = (list(GRADIENT), part["leading"], GRADIENT_FORESTS[run.quick])
        whole[f"one gradient, {label}"] = (list(GRADIENT), part["exact"], GRADIENT_FORESTS[run.quick])
    part = run.part("staged", lambda: _by_stage(run))
    curves["staged, stage 1"] = (part["sequences"], part["leading"], STAGED_FORESTS[run.quick])
    for batch, steps in JOINT[run.quick]:
        seen = []
        for number, task in enumerate(_tasks(run, JOINT_FORESTS[run.quick])):
            stages = joint(steps=steps, batch_size=batch, optimizer="sgd", learning_rate=RATE)
            name = f"joint-{batch}-{number}"
            seen.append(train(run, name, task, stages, every=steps // LOOKS, seed=run.seed + number))
        right = np.mean([np.array(its.leading) == 1 for its in seen], axis=0)
        at = [max(1, batch * step) for step in seen[0].step]
        curves[f"joint SGD, batch {batch:,}"] = (at[1:], right[1:].tolist(), len(seen))

    needed = {name: first_above(x, y, SHARE) for name, (x, y, _) in curves.items()}
    halfway = {name: first_above(x, y, 0.5) for name, (x, y, _) in curves.items()}
    gradient = "one gradient, soft targets"
    lines = []
    for name, curve in curves.items():
        lines.append(
            _line(f"{name}: sequences until all true parents lead on {SHARE:.0%} of the forests", needed[name], *curve)
        )
        lines.append(_line(f"{name}: sequences until they do on half", halfway[name], *curve))
    for name, curve in whole.items():
        what = f"{name}: sequences until every edge and root is right on {SHARE:.0%} of the forests"
        lines.append(_line(what, first_above(*curve[:2], SHARE), *curve))
    for batch, _ in JOINT[run.quick]:
        name = f"joint SGD, batch {batch:,}"
        lines.append(
            _ratio(
                name, "half of the forests", halfway[name], halfway[gradient], curves[name], paper_batch=batch == 1024
            )
        )
    return Reproduction(
        name="sample-complexity",
        title="Sequences until the graph can be read: one gradient, staged and joint training",
        paper=PAPER,
        summary=f"All true parents lead on half of the forests after {_show(halfway[gradient])} sequences in one gradient, "
        f"{_show(halfway['staged, stage 1'])} in stage 1 of staged training, and {_show(halfway['joint SGD, batch 1,024'])} in joint SGD with the paper's batch.",
        lines=tuple(lines),
        figures={
            "recovery": viz.curves(
                {
                    "all true parents lead": {name: viz.Curve(x, y) for name, (x, y, _) in curves.items()},
                    "every edge and every root right": {name: viz.Curve(x, y) for name, (x, y, _) in whole.items()},
                },
                x_name="sequences",
                y_name="share of forests",
                x_scale="log",
            )
        },
        captions={"recovery": "Share of random forests on which every true parent leads its child's past (left), and on which roots are told apart as well (right)."},
        notes=(
            "The paper has no such picture; its joint training is the reference. What is compared is whether every true parent leads: attention after "
            "training, evidence in one gradient. Which nodes are roots is decided from the same sequences by one gradient only; a trained model "
            "needs further sequences for that, which are not counted, so the comparison favours training.",
            "Joint training is looked at along one run for each forest, staged training is done anew for each number of sequences. A later look may find fewer "
            "forests than an earlier one: a true parent may be overtaken again.",
        ),
        method="The share of random forests whose true parents all lead was measured against the number of sequences seen.",
        arrays={f"{_key(name)}.{axis}": np.array(values, dtype=float) for name, its in curves.items() for axis, values in zip(("sequences", "leading"), its[:2], strict=True)},
        settings={
            **run.settings, "n_positions": POSITIONS, "d_vocab": VOCAB, "concentration": ALPHA, "root_probability": ROOT_PROBABILITY,
            "forests": {"gradient": GRADIENT_FORESTS[run.quick], "staged": STAGED_FORESTS[run.quick], "joint": JOINT_FORESTS[run.quick]},
            "gradient": GRADIENT, "stage_1_batch_sizes": STAGED, "joint": JOINT[run.quick], "rate": RATE,
        },
    )  # fmt: skip


def first_above(x: Sequence[int], y: Sequence[float], level: float) -> int | None:
    """The first x at which y is at least ``level``; None if there is none.

    >>> first_above([1, 10, 100], [0.0, 0.6, 1.0], 0.5)
    10
    """
    return next((at for at, value in zip(x, y, strict=True) if value >= level), None)


def _tasks(run: Run, number: int) -> list[InContextMarkov]:
    return forests(
        run, number, n_positions=POSITIONS, d_vocab=VOCAB, concentration=ALPHA, root_probability=ROOT_PROBABILITY
    )


def _by_gradient(run: Run, kind: Targets) -> dict[str, Any]:
    tasks = _tasks(run, GRADIENT_FORESTS[run.quick])
    leading, exact = [], []
    for n in GRADIENT:
        sources = [generator(run.seed + number, f"{kind} {n}") for number in range(len(tasks))]
        found = gradient_graphs(tasks, sources, n_sequences=n, targets=kind)
        pairs = list(zip(found, tasks, strict=True))
        leading.append(float(np.mean([_all_lead(its.candidates, task) for its, task in pairs])))
        exact.append(float(np.mean([its.compare(task.graph).exact for its, task in pairs])))
    return {"leading": leading, "exact": exact}


def _all_lead(candidates: Sequence[int | None], task: InContextMarkov) -> bool:
    return all((candidates[child],) == task.parents[child] for child in task.children if task.parents[child])


def _by_stage(run: Run) -> dict[str, Any]:
    tasks = _tasks(run, STAGED_FORESTS[run.quick])
    sequences, leading = [], []
    for batch in STAGED:
        models = [DisentangledTransformer(VOCAB, POSITIONS, (1, 1)) for _ in tasks]
        for model in models:
            give_matcher(model)
        graph, _ = staged(n_positions=POSITIONS, graph_batch_size=batch)
        sources = [generator(run.seed + number, f"stage 1 {batch}") for number in range(len(tasks))]
        histories = fit_many(models, tasks, [graph], generators=sources, progress=run.progress)
        right = []
        for number, (model, task) in enumerate(zip(models, tasks, strict=True)):
            watching = task.sample(WATCHING, generator(run.seed + number, "watching")).tokens
            right.append(parent_attention(task, head_graphs(model, watching))[1] == 1)
        sequences.append(histories[0].n_sequences)
        leading.append(float(np.mean(right)))
    return {"sequences": sequences, "leading": leading}


def _line(quantity: str, value: int | None, x: Sequence[int], y: Sequence[float], forests: int) -> Line:
    if value is None:
        return Line(
            quantity, None, note=f"not reached with {x[-1]:,} sequences: {y[-1]:.0%} of {forests} forests there"
        )
    return Line(quantity, value, None, None, "first of the numbers that were tried", None, f"{forests} forests")


def _ratio(
    name: str,
    what: str,
    theirs: int | None,
    ours: int | None,
    curve: tuple[list[int], list[float], int],
    *,
    paper_batch: bool,
) -> Line:
    quantity = f"{name}: its sequences over those of one gradient, at {what}"
    if ours is None:
        return Line(quantity, None, note="one gradient did not get there")
    at_least = theirs is None
    ratio = (curve[0][-1] if theirs is None else theirs) / ours
    note = "at least: joint SGD was stopped before it got there" if at_least else ""
    rule = f"at least {AHEAD}" if paper_batch else "the paper's batch is 1,024"
    return Line(
        quantity, ratio, None, None, "", ratio >= AHEAD if paper_batch else None, "; ".join(filter(None, (rule, note)))
    )


def _show(value: int | None) -> str:
    return "more than were tried" if value is None else f"{value:,}"


def _key(name: str) -> str:
    return name.replace(",", "").replace(" ", "-").lower()
