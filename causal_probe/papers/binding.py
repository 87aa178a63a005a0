"""Wu, Geiger and Milliere 2025: a transformer learns to follow variables through a program; each program has a graph of its own."""

from __future__ import annotations

import math
from dataclasses import replace
from functools import partial
from typing import Any

import numpy as np
import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor
from torch.nn import functional

from causal_probe import viz
from causal_probe.mechanisms import WatchPhases
from causal_probe.mechanisms.dynamics import change_point
from causal_probe.models.standard import StandardTransformer
from causal_probe.papers.base import Line, Reproduction, Run, reproduction
from causal_probe.papers.shared import loss_curve, quick_note, random_weights, set_weights, stretches, weights_of
from causal_probe.tasks import VariableBinding, generator
from causal_probe.tasks.variable_binding import LINE, Programs
from causal_probe.training import adam, minimise

__all__ = ["binding"]

LINES, HOPS = 6, (1, 2)
LAYERS, WIDTH, HEADS, D_HEAD = 3, 64, 4, 16
STEPS = {True: 4_000, False: 6_000}
BATCH, RATE, CLIP = 256, 1e-3, 1.0
SEEDS = {True: 1, False: 3}
PROGRAMS = {True: 1_000, False: 2_000}
#: Moments of a training that are watched, and the programs on which they are.
MOMENTS, WATCHED = 80, 256
#: An edge is confirmed if the answer's log-probability falls by this much (nats) when it is cut.
DROP = 1.0


def task_of() -> VariableBinding:
    """Six lines, six variables, ten constants; the query's chain has one line or two, each as often."""
    return VariableBinding(LINES, hops=HOPS)


def build(seed: int) -> StandardTransformer:
    """Attention alone, norms, learnt absolute positions; weights drawn."""
    task = task_of()
    model = StandardTransformer(task.d_vocab, task.n_positions, d_model=WIDTH, n_layers=LAYERS, n_heads=HEADS, d_head=D_HEAD, norm=True)  # fmt: skip
    return random_weights(model, generator(seed, "binding"))


def answer(model: Any, programs: Programs) -> Float[Tensor, "program d_vocab"]:
    """The model's log-probabilities at the query's variable."""
    found: Tensor = model(programs.tokens)[:, -1].double().log_softmax(-1)
    return found


def train(run: Run, seed: int) -> dict[str, Any]:
    """The loss of the answer alone, by Adam on fresh programs; at each moment the accuracy by hops and the mixture of predictors."""
    task, model, source = task_of(), build(seed), generator(seed, "binding training")
    watched = task.sample(WATCHED, generator(seed, "binding watched"))
    watch = WatchPhases(
        {name: predict(watched) for name, predict in task.references().items()},
        lambda model: answer(model, watched).exp()[:, None],
    )
    steps = STEPS[run.quick]
    moments = set(np.linspace(0, steps, min(MOMENTS, steps + 1)).round().astype(int).tolist())
    right: list[list[float]] = []

    def look(step: int) -> None:
        if step in moments:
            watch(step, model)
            right.append(accuracy(model, watched))

    def loss(batch_size: int) -> Float[Tensor, ""]:
        programs = task.sample(batch_size, source)
        return functional.cross_entropy(model(programs.tokens)[:, -1], programs.answers)

    stages = adam(steps, batch_size=BATCH, learning_rate=RATE, warm=0.7)
    history = minimise(model, loss, stages, clip=CLIP, callback=look, progress=run.progress)
    found = watch.phases()
    return {
        "losses": stretches(history.loss),
        "moments": list(found.steps),
        "mixture": found.weights,
        "mixture-errors": found.stderr,
        "residual": found.residual,
        "leading": [list(each) for each in found.leading],
        "right": np.array(right),
        **weights_of(model),
    }


@torch.no_grad()
def accuracy(model: Any, programs: Programs) -> list[float]:
    """The share of right answers among programs of each number of hops."""
    right = answer(model, programs).argmax(-1) == programs.answers
    return [float(right[programs.hops == n].double().mean()) for n in HOPS]


# ------------------------------------------------------------------------------------------------------------------ graphs


@torch.no_grad()
def looked(model: Any, programs: Programs) -> Float[np.ndarray, "way program node line"]:
    """The attention of each node on each earlier line, by way of looking (:func:`ways`). A line looks from its right-hand side, the query from its variable."""
    rows = torch.tensor([*range(2, LINE * LINES, LINE), LINE * LINES + 1])
    found: list[Tensor] = []

    def keep(pattern: Tensor, hook: Any) -> None:
        of_tokens = pattern[:, :, rows, : LINE * LINES].reshape(len(pattern), -1, LINES + 1, LINES, LINE)
        found.append(of_tokens.permute(1, 4, 0, 2, 3).flatten(0, 1))

    model.run_with_hooks(programs.tokens, fwd_hooks=[(f"blocks.{layer}.attn.hook_pattern", keep) for layer in range(LAYERS)])  # fmt: skip
    earlier = torch.arange(LINES) < torch.arange(LINES + 1)[:, None]
    masses: Float[np.ndarray, "way program node line"] = (torch.cat(found) * earlier).numpy()
    return masses


def ways() -> list[str]:
    """The ways of looking, in words: a head, and the token of an earlier line that it looks at."""
    tokens = ("variable", "=", "right-hand side", "line's end")
    return [f"L{layer}H{head} at the {token}" for layer in range(LAYERS) for head in range(HEADS) for token in tokens]


def wanted(programs: Programs) -> Bool[np.ndarray, "program node"]:
    """Nodes with a parent: the query, and lines whose right-hand side is a variable. That is plain from their tokens."""
    found: Bool[np.ndarray, "program node"] = (programs.parents >= 0).numpy()
    return found


def choose(masses: Float[np.ndarray, "way program node line"], programs: Programs) -> tuple[int, int]:
    """For lines, and for the query, the way of looking whose largest attention is most often on the parent."""
    right = (masses.argmax(-1) == programs.parents.numpy()) & wanted(programs)
    return int(right[..., :LINES].sum((1, 2)).argmax()), int(right[..., LINES].sum(1).argmax())


def read(
    masses: Float[np.ndarray, "way program node line"], chosen: tuple[int, int], has: Bool[np.ndarray, "program node"]
) -> Int[np.ndarray, "program node"]:
    """Each node's parent: the earlier line on which the attention is largest; -1 where the node has none."""
    lines, query = (masses[way].argmax(-1) for way in chosen)
    return np.where(has, np.concatenate([lines[:, :LINES], query[:, LINES:]], 1), -1)


@torch.no_grad()
def cut(model: Any, programs: Programs) -> Float[np.ndarray, "program node line"]:
    """How much the answer's log-probability falls if a node can't see an earlier line: all its tokens from the line's right-hand side on (or the query's) are hidden from
    all tokens of that line, in every head of every layer. 0 where the line is not earlier.
    """
    n = torch.arange(len(programs))
    whole = answer(model, programs)[n, programs.answers]
    found = np.zeros((len(programs), LINES + 1, LINES))
    for node in range(1, LINES + 1):
        rows = slice(LINE * node + 2, LINE * node + LINE) if node < LINES else slice(LINE * LINES, None)
        for line in range(node):

            def hide(scores: Tensor, hook: Any, rows: slice = rows, line: int = line) -> Tensor:
                scores = scores.clone()
                scores[:, :, rows, LINE * line : LINE * (line + 1)] = -torch.inf
                return scores

            with model.hooks(fwd_hooks=[(f"blocks.{layer}.attn.hook_attn_scores", hide) for layer in range(LAYERS)]):
                found[:, node, line] = (whole - answer(model, programs)[n, programs.answers]).numpy()
    return found


@torch.no_grad()
def intervened(model: Any, programs: Programs) -> Bool[np.ndarray, "program node line"]:
    """The edges on the way to the answer by interventions alone: what a line assigns is overwritten by a constant that the program does not have, and the answer either becomes
    that constant or does not. A line matters if it does. Line p acts through line c if both matter and p no longer does once c is overwritten, too. A line that matters
    and acts through none is the query's parent; of the lines through which p acts, the earliest is p's child.
    """
    right = programs.tokens[:, 2:-2:LINE]
    task = task_of()
    free = [[c for c in range(task.n_constants) if c not in its][:2] for its in right.tolist()]
    first, second = torch.tensor(free).T

    def becomes(*overwritten: tuple[int, Tensor]) -> Int[Tensor, " program"]:
        tokens = programs.tokens.clone()
        for line, constant in overwritten:
            tokens[:, LINE * line + 2] = constant
        return answer(model, replace(programs, tokens=tokens)).argmax(-1)

    matters = np.stack([(becomes((p, first)) == first).numpy() for p in range(LINES)], 1)
    found = np.zeros((len(programs), LINES + 1, LINES), bool)
    for p in range(LINES):
        through = np.zeros((len(programs), LINES), bool)
        for c in range(p + 1, LINES):
            through[:, c] = matters[:, p] & matters[:, c] & (becomes((p, first), (c, second)) != first).numpy()
        some = through.any(1)
        found[np.flatnonzero(some), through.argmax(1)[some], p] = True
        found[:, LINES, p] = matters[:, p] & ~some
    return found


def on_path(parents: Int[np.ndarray, "program node"]) -> Bool[np.ndarray, "program node line"]:
    """The edges on the way from the query to its constant, along the given parents."""
    found = np.zeros((len(parents), LINES + 1, LINES), bool)
    at, row = np.full(len(parents), LINES), np.arange(len(parents))
    for _ in range(LINES):
        parent = parents[row, at]
        goes = parent >= 0
        found[row[goes], at[goes], parent[goes]] = True
        at = np.where(goes, parent, at)
    return found


def precision_recall(found: Bool[np.ndarray, "*_any"], truth: Bool[np.ndarray, "*_any"]) -> tuple[float, float]:
    """Of found edges the share that is true, and of true edges the share that is found; 0 where there are none."""
    both = float((found & truth).sum())
    return both / max(1.0, float(found.sum())), both / max(1.0, float(truth.sum()))


def probe(model: Any, n: int, seed: int) -> dict[str, Any]:
    """The model on new programs. Heads, and the token of a line that they look at, are chosen on some; all figures are of others."""
    task = task_of()
    half, other = (task.sample(n, generator(seed, f"binding {name}")) for name in ("choosing", "held out"))
    chosen = choose(looked(model, half), half)
    has, parents = wanted(other), other.parents.numpy()
    its = read(looked(model, other), chosen, has)
    truth, followed, acts = on_path(parents), on_path(its), intervened(model, other)
    right = (its == parents) & has
    guess = np.where(has[:, 1:LINES], 1 / np.arange(1, LINES), 0).sum() / has[:, :LINES].sum()
    return {
        "accuracy": accuracy(model, other),
        "heads": [ways()[way] for way in chosen],
        "lines": float(right[:, :LINES].sum() / has[:, :LINES].sum()),
        "query": float(right[:, LINES].mean()),
        "chance": float(guess),
        "read": precision_recall(followed, truth),
        "intervened": precision_recall(acts, truth),
        "confirmed": precision_recall(followed & acts, truth),
        "cut": precision_recall(cut(model, other) > DROP, truth),
    }


def binomial(share: float, n: int) -> float:
    """The standard error of a share of n."""
    return math.sqrt(share * (1 - share) / n)


@reproduction(
    "variable-binding",
    "A transformer learns to follow variables through programs; each program's graph is read from its heads",
    minutes=(5, 20),
)
def binding(run: Run) -> Reproduction:
    """Three layers trained on programs of six lines; their stages, and each program's graph from attention and from interventions."""
    n, steps = PROGRAMS[run.quick], STEPS[run.quick]
    trained: list[dict[str, Any]] = []
    probed: list[dict[str, Any]] = []
    for seed in range(run.seed, run.seed + SEEDS[run.quick]):
        trained.append(run.part(f"seed-{seed}", partial(train, run, seed)))
        model = set_weights(build(seed), trained[-1])
        probed.append(run.part(f"seed-{seed}-probed", partial(probe, model, n, seed)))
    best = max(range(len(probed)), key=lambda i: min(probed[i]["accuracy"]))
    kept, its = trained[best], probed[best]
    seeds = f"the seed of the highest accuracy of {len(probed)}" if len(probed) > 1 else "one seed"
    lines = [
        Line(f"accuracy, {hops} hop{'s' * (hops > 1)}", share, binomial(share, n // len(HOPS)), "above 0.99, up to four hops", "new programs", share >= 0.95, f"at least 0.95; {seeds}")
        for hops, share in zip(HOPS, its["accuracy"], strict=True)
    ]  # fmt: skip
    learnt = sum(min(each["accuracy"]) >= 0.95 for each in probed)
    lines += [
        Line("seeds with accuracy of 0.95 or more at every number of hops", f"{learnt} of {len(probed)}", None, None, "", None, f"{steps} steps each"),
        Line("lines: parents read from a head", its["lines"], None, None, its["heads"][0], its["lines"] >= 0.9, f"at least 0.9; an even guess among earlier lines: {its['chance']:.2f}"),
        Line("query: parent read from a head", its["query"], binomial(its["query"], n), None, its["heads"][1], its["query"] >= 0.9, f"at least 0.9; an even guess: {1 / LINES:.2f}"),
        *_shares("the way to the answer, read from heads", its["read"], None, "chosen on other programs"),
        *_shares("the way to the answer, by overwriting lines", its["intervened"], None, "no head is looked at"),
        *_shares("read from heads and confirmed by overwriting lines", its["confirmed"], 0.9, "at least 0.9"),
        *_shares("the way to the answer, by hiding a line from a node", its["cut"], None, f"the answer's log-probability falls by {DROP:g} nat; tokens between hand values on, so that few single paths are needed"),
        Line("phases", "; ".join(f"{name} {first}-{last}" for name, first, last in kept["leading"]), None, "a constant at random; the first lines; exact", "the largest weight in the mixture, by step", None, "the paper's stages are of a model of twelve layers"),
        Line("largest weight of the first line's constant", float(kept["mixture"][:, list(task_of().references()).index("the first line's")].max()), None, "a stage of its own", "mixture of least KL", None, ""),
    ]  # fmt: skip
    for place, hops in enumerate(HOPS):
        found = change_point(kept["moments"], kept["right"][:, place].tolist())
        said = "never" if found is None else f"step {found.step} ({found.low} to {found.high}), from {found.before:.2f} to {found.after:.2f}"  # fmt: skip
        lines.append(Line(f"{hops} hop{'s' * (hops > 1)}: accuracy changes at", said, None, None, "change-point, 95% interval", None, ""))  # fmt: skip
    for seed, each in enumerate(probed, run.seed):
        lines.append(Line(f"seed {seed}: confirmed edges, recall", each["confirmed"][1], None, None, f"{each['heads'][0]}; {each['heads'][1]}", None, f"accuracy {min(each['accuracy']):.3f}"))  # fmt: skip
    names = list(task_of().references())
    most = sorted(np.argsort(-kept["mixture"].max(0))[:5])
    mixture = {names[i]: viz.Curve(kept["moments"], kept["mixture"][:, i], kept["mixture-errors"][:, i].tolist()) for i in most}  # fmt: skip
    right = {f"{hops} hop{'s' * (hops > 1)}": viz.Curve(kept["moments"], kept["right"][:, i]) for i, hops in enumerate(HOPS)}  # fmt: skip
    return Reproduction(
        name="variable-binding",
        title="Variables followed through programs, and each program's graph",
        paper=("wu2025", "park2025"),
        summary=f"Accuracy {its['accuracy'][0]:.3f} at one hop and {its['accuracy'][1]:.3f} at two; of the edges from the query to its constant {its['confirmed'][1]:.0%} are read from {its['heads'][0]} and confirmed by interventions.",
        lines=tuple(lines),
        figures={
            "stages": viz.curves({"accuracy": right, "mixture": mixture}, x_name="training step", y_name=["share of right answers", "weight in the mixture"]),
            "training": viz.curves({"": {"loss": loss_curve(kept["losses"], steps)}}, x_name="training step", y_name="loss, nats"),
        },
        captions={
            "stages": f"On {WATCHED} programs that were not trained on: accuracy by hops, and the weights of the predictors in the mixture closest to the model.",
            "training": "Losses of consecutive steps.",
        },
        notes=(
            f"The paper has programs of seventeen lines with up to four hops and a transformer of twelve layers; here there are {LINES} lines, one or two hops (lines from the query to its constant), {LAYERS} layers of {HEADS} heads without MLPs, and {steps} steps of {BATCH} programs. Lines off the query's way are distractors.",
            "A line whose right-hand side is a constant has no parent; that is seen in its token, and no head is asked. Of the others every earlier line is a candidate.",
            "Overwriting a line asks the model alone, not a head: which lines does its answer depend on, and through which others? Hiding a line from a node, in all heads, is the stricter test of a path, and most paths pass it: other tokens have read the line, too. What carries a value from line to line is more than the head that looks at the parent.",
            *quick_note(run, f"{STEPS[True]} steps instead of {STEPS[False]}, one seed, {PROGRAMS[True]} programs."),
        ),
        method="Transformers were trained on programs of assignments, each program's graph was read from the heads' attention and tested by overwriting lines, and each moment of the training fitted by a mixture of reference predictors.",
        settings={**run.settings, "lines": LINES, "hops": list(HOPS), "training": {"steps": steps, "batch_size": BATCH, "learning_rate": RATE}, "n_programs": n},
    )  # fmt: skip


def _shares(name: str, found: tuple[float, float] | list[float], least: float | None, note: str) -> list[Line]:
    """Two lines: precision and recall."""
    return [
        Line(f"{name}: {kind}", share, None, None, "edges of all programs", None if least is None else share >= least, note)
        for kind, share in zip(("precision", "recall"), found, strict=True)
    ]  # fmt: skip
