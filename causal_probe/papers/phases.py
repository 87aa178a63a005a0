"""Park et al. 2025, and mixtures of graphs: through which reference predictors does a training pass, and where does it end?"""

from __future__ import annotations

import math
from functools import partial
from typing import Any

import numpy as np
import torch
from jaxtyping import Float
from torch import Tensor
from torch.nn import functional

from causal_probe import graphs, probes, viz
from causal_probe.mechanisms import WatchPhases
from causal_probe.mechanisms.dynamics import change_point
from causal_probe.models.standard import StandardTransformer
from causal_probe.papers.base import Line, Reproduction, Run, reproduction
from causal_probe.papers.shared import quick_note, random_weights, set_weights, stretches, weights_of
from causal_probe.probes.posterior_alignment import posterior_alignment
from causal_probe.tasks import GraphMixture, MarkovMixture, generator
from causal_probe.tasks.graph_mixture import LabelledBatch, next_token_losses
from causal_probe.training import adam, minimise

__all__ = ["chains", "mixture"]

WIDTH, HEADS, D_HEAD, D_MLP = 64, 3, 16, 128
BATCH, RATE, CLIP = 64, 2e-3, 1.0
#: Moments of a training that are watched, and the sequences on which they are.
MOMENTS, WATCHED = 60, 128
SEQUENCES = {True: 512, False: 2_048}

CHAINS, CHAIN_STATES, CHAIN_LENGTH = (2, 8, 64), 5, 48
CHAIN_STEPS = {True: 1_500, False: 4_000}

GRAPHS, GRAPH_STATES, GRAPH_LENGTH, CONCENTRATION = 3, 5, 32, 0.3
GRAPH_STEPS = {True: 4_000, False: 8_000}
GRAPH_SEEDS = {True: 1, False: 2}
#: Rows before these have seen too little to know the graph.
BURN_IN = 16
#: The references of a mixture of graphs that are told apart: single graphs average to even averaging, and maximum likelihood is all but model averaging.
TOLD_APART = ("uniform", "in-context unigram", "in-context bigram", "even averaging", "model averaging")


def train(
    run: Run,
    task: GraphMixture | MarkovMixture,
    name: str,
    seed: int,
    *,
    layers: int,
    steps: int,
    first: int,
    names: tuple[str, ...] | None = None,
) -> dict[str, Any]:
    """The loss of every token from ``first`` on, by Adam on fresh sequences; at each moment the mixture of reference predictors."""
    model, source = build(task, name, seed, layers), generator(seed, f"{name} training")
    watch = WatchPhases.of_task(
        task, task.sample(WATCHED, generator(seed, f"{name} watched")), names=names, first=first
    )
    moments = set(np.linspace(0, steps, min(MOMENTS, steps + 1)).round().astype(int).tolist())

    def look(step: int) -> None:
        if step in moments:
            watch(step, model)

    def loss(batch_size: int) -> Float[Tensor, ""]:
        tokens = task.sample(batch_size, source).tokens
        return functional.cross_entropy(model(tokens)[:, first - 1 : -1].flatten(0, 1), tokens[:, first:].flatten())

    history = minimise(model, loss, adam(steps, batch_size=BATCH, learning_rate=RATE, warm=0.5), clip=CLIP, callback=look, progress=run.progress)  # fmt: skip
    found = watch.phases()
    return {
        "losses": stretches(history.loss),
        "names": list(found.names),
        "moments": list(found.steps),
        "mixture": found.weights,
        "errors": found.stderr,
        "residual": found.residual,
        "residual-errors": found.residual_stderr,
        "leading": [list(each) for each in found.leading],
        **weights_of(model),
    }


def build(task: GraphMixture | MarkovMixture, name: str, seed: int, layers: int) -> StandardTransformer:
    """Attention, and MLPs where chains may be memorised; norms, learnt absolute positions; weights drawn."""
    model = StandardTransformer(
        task.d_vocab, task.n_positions, d_model=WIDTH, n_layers=layers, n_heads=HEADS, d_head=D_HEAD,
        d_mlp=D_MLP if isinstance(task, MarkovMixture) else None, norm=True,
    )  # fmt: skip
    return random_weights(model, generator(seed, f"{name} {layers} layers"))


@torch.no_grad()
def excess(
    model: Any, task: GraphMixture | MarkovMixture, batch: LabelledBatch, first: int
) -> Float[Tensor, "batch pos"]:
    """By sequence and token, from ``first`` on, the model's loss above that of the best possible predictor."""
    best = task.references()["model averaging" if isinstance(task, GraphMixture) else "retrieval, bigram"](batch)
    law = model(batch.tokens).double().softmax(-1)
    law = torch.cat([law[:, :1], law[:, :-1]], 1)
    return (next_token_losses(law, batch.tokens) - next_token_losses(best, batch.tokens))[:, first:]


def weights_over_steps(kept: dict[str, Any]) -> dict[str, viz.Curve]:
    """The mixture's five largest weights along a training."""
    weights, errors = kept["mixture"], kept["errors"]
    most = sorted(np.argsort(-weights.max(0))[:5])
    return {kept["names"][i]: viz.Curve(kept["moments"], weights[:, i], errors[:, i].tolist()) for i in most}


def change(kept: dict[str, Any], name: str) -> str:
    """The change-point of one weight, in words."""
    found = change_point(kept["moments"], kept["mixture"][:, kept["names"].index(name)].tolist())
    return "never" if found is None else f"step {found.step} ({found.low} to {found.high}), from {found.before:.2f} to {found.after:.2f}"  # fmt: skip


# ------------------------------------------------------------------------------------------------------------------ chains


@reproduction(
    "markov-phases",
    "With few chains a training ends in retrieval, with many in inference, and passes through unigrams before",
    minutes=(3, 7),
)
def chains(run: Run) -> Reproduction:
    """Two layers trained on a finite set of Markov chains, each moment fitted by a mixture of four predictors."""
    steps, kept, above = CHAIN_STEPS[run.quick], {}, {}
    for n in CHAINS:
        task = MarkovMixture(n, n_positions=CHAIN_LENGTH, d_vocab=CHAIN_STATES, seed=run.seed)
        name = f"{n} chains"
        kept[n] = run.part(f"chains-{n}", partial(train, run, task, name, run.seed, layers=2, steps=steps, first=1))
        model = set_weights(build(task, name, run.seed, 2), kept[n])
        above[n] = excess(model, task, task.sample(SEQUENCES[run.quick], generator(run.seed, f"{name} held out")), 1)
    lines = []
    for n, its in kept.items():
        end = dict(zip(its["names"], its["mixture"][-1].tolist(), strict=True))
        errors = dict(zip(its["names"], its["errors"][-1].tolist(), strict=True))
        retrieved, inferred = (sum(value for name, value in end.items() if name.startswith(kind)) for kind in ("retrieval", "inference"))  # fmt: skip
        right = retrieved > inferred if n == min(CHAINS) else inferred > retrieved if n == max(CHAINS) else None
        pairs = [name for name in end if name.endswith("bigram")]
        lines += [
            Line(f"{n} chains: weight of retrieval at the end", retrieved, max(errors[name] for name in errors if name.startswith("retrieval")), "few: retrieval, many: inference", "mixture of least KL", right, "above that of inference for the fewest, below for the most"),
            Line(f"{n} chains: weight of bigrams at the end", sum(end[name] for name in pairs), max(errors[name] for name in pairs), "bigrams in the end", "", sum(end[name] for name in pairs) > 0.5, "above one half"),
            Line(f"{n} chains: residual at the end, nats per token", float(its["residual"][-1]), float(its["residual-errors"][-1]), None, "KL(model || mixture)", None, ""),
            Line(f"{n} chains: largest residual after the first tenth, nats per token", float(its["residual"][len(its["moments"]) // 10 :].max()), None, None, "", None, ""),
            Line(f"{n} chains: loss above exact retrieval, nats per token", float(above[n].mean()), float(above[n].mean(1).std() / math.sqrt(len(above[n]))), None, "new sequences of the same chains", None, ""),
            Line(f"{n} chains: phases", "; ".join(f"{name} {first}-{last}" for name, first, last in its["leading"]), None, "unigrams before bigrams", "the largest weight, by step", _unigrams_first(its), "some unigram predictor leads before the first bigram one"),
        ]  # fmt: skip
        best = max(pairs, key=lambda name: end[name])
        lines.append(Line(f"{n} chains: {best} takes over at", change(its, best), None, None, "change-point, 95% interval", None, ""))  # fmt: skip
    panels = {f"{n} chains": weights_over_steps(its) for n, its in kept.items()}
    few, many = (dict(zip(kept[n]["names"], kept[n]["mixture"][-1], strict=True)) for n in (min(CHAINS), max(CHAINS)))
    return Reproduction(
        name="markov-phases",
        title="Phases of a training on a finite set of chains",
        paper=("park2025",),
        summary=f"With {min(CHAINS)} chains the model ends as {max(few, key=few.__getitem__)} (weight {max(few.values()):.2f}), with {max(CHAINS)} as {max(many, key=many.__getitem__)} ({max(many.values()):.2f}).",
        lines=tuple(lines),
        figures={"phases": viz.curves(panels, x_name="training step", y_name="weight in the mixture")},
        captions={"phases": "The weights of the reference predictors in the mixture closest to the model, at each moment, with two standard errors."},
        notes=(
            f"The paper has more states, longer sequences and up to some thousand chains; here there are {CHAIN_STATES} states, {CHAIN_LENGTH} tokens, {', '.join(map(str, CHAINS))} chains, "
            f"two layers with MLPs of width {D_MLP}, and {steps} steps of {BATCH} sequences. It labels a model by its four predictors on sequences of the chains; here the even predictor is a fifth.",
            "With one training for each number of chains no spread over seeds is known; standard errors are over sequences. Where two predictors say nearly the same (retrieval and inference with very many chains), their weights are not determined, and the errors say so.",
            *quick_note(run, f"{CHAIN_STEPS[True]} steps instead of {CHAIN_STEPS[False]}."),
        ),
        method="Transformers were trained on sequences of a finite set of Markov chains, and their predictions fitted by mixtures of reference predictors along the training.",
        settings={**run.settings, "chains": list(CHAINS), "training": {"steps": steps, "batch_size": BATCH, "learning_rate": RATE}, "n_sequences": SEQUENCES[run.quick]},
    )  # fmt: skip


def _unigrams_first(kept: dict[str, Any]) -> bool:
    leads = [name for name, _, _ in kept["leading"]]
    bigram = next((i for i, name in enumerate(leads) if name.endswith("bigram")), len(leads))
    return any(name.endswith("unigram") for name in leads[:bigram])


# ------------------------------------------------------------------------------------------------------------------ graphs


def graphs_of(seed: int) -> GraphMixture:
    """Three random forests over the same positions, one transition matrix; the graph is drawn for each sequence."""
    forests = [graphs.random_forest(GRAPH_LENGTH, root_probability=0.1, seed=generator_seed) for generator_seed in range(3 * seed, 3 * seed + GRAPHS)]  # fmt: skip
    return GraphMixture(forests, GRAPH_STATES, concentration=CONCENTRATION, seed=seed)


@torch.no_grad()
def probe(model: Any, task: GraphMixture, sequences: int, seed: int) -> dict[str, Any]:
    """The model on new sequences: its loss, its most selective head, that head's graph for each graph and over all, and whether it hedges."""
    batch = task.sample(sequences, generator(seed, "graph mixture held out"))
    above = excess(model, task, batch, 1)
    found = probes.graph_selectivity(model, batch.tokens, batch.labels, task.graphs, shift=1, burn_in=BURN_IN, permutations=199, seed=seed)  # fmt: skip
    head = found.best
    aligned = posterior_alignment(model, batch.tokens, task.graphs, task.posterior(batch.tokens), shift=1, burn_in=4)
    layer, number = (int(part) for part in head[1:].split("H"))
    by_graph = [right(model, batch.tokens[batch.labels == label], task, head)[label] for label in range(GRAPHS)]
    return {
        "excess": float(above.mean()),
        "excess-error": float(above.mean(1).std() / math.sqrt(len(above))),
        "head": head,
        "selectivity": found.selectivity[layer][number],
        "selectivity-error": found.stderr[layer][number],
        "p": found.p_value[layer][number],
        "own": found.own[layer][number],
        "by-graph": by_graph,
        "over-all": right(model, batch.tokens, task, head),
        "slope": aligned.slope[layer][number],
        "slope-error": aligned.slope_stderr[layer][number],
        "divergence": aligned.divergence[layer][number],
        "divergence-error": aligned.stderr[layer][number],
        "uniform": aligned.uniform,
        "mass": aligned.mass[layer][number],
        "largest-mass": max(max(its) for its in aligned.mass),
        "followed": found.of(head),
        "rows": list(found.rows),
    }


def right(model: Any, tokens: Tensor, task: GraphMixture, head: str) -> list[float]:
    """By graph, the share of rows, past the burn-in and of those where graphs differ, in which a head's mean attention on the candidates is largest on that graph's parent."""
    evidence = np.asarray(probes.head_graphs(model, tokens).of(head))
    parents = task.parents.numpy()
    rows = [row for row in range(BURN_IN, GRAPH_LENGTH - 1) if len(set(parents[:, row + 1].tolist()) - {-1}) == len(parents)]  # fmt: skip
    chosen = np.array([[evidence[row, parent] for parent in parents[:, row + 1]] for row in rows]).argmax(1)
    return [float((chosen == graph).mean()) for graph in range(len(parents))]


@reproduction(
    "graph-mixture",
    "Trained on sequences that each have one of three graphs: does a model average over them, and does a head follow its sequence's?",
    minutes=(3, 10),
)
def mixture(run: Run) -> Reproduction:
    """Two and three layers of the same width and budget on sequences of three random forests, beside exact model averaging."""
    task, steps = graphs_of(run.seed), GRAPH_STEPS[run.quick]
    kept: dict[int, list[dict[str, Any]]] = {2: [], 3: []}
    rows: dict[int, list[dict[str, Any]]] = {2: [], 3: []}
    for layers in kept:
        for seed in range(run.seed, run.seed + GRAPH_SEEDS[run.quick]):
            its = run.part(f"graphs-{layers}-{seed}", partial(train, run, task, "graph mixture", seed, layers=layers, steps=steps, first=1, names=TOLD_APART))  # fmt: skip
            model = set_weights(build(task, "graph mixture", seed, layers), its)
            kept[layers].append(its)
            rows[layers].append(run.part(f"graphs-{layers}-{seed}-probed", partial(probe, model, task, SEQUENCES[run.quick], seed)))  # fmt: skip
    batch = task.sample(SEQUENCES[run.quick], generator(run.seed, "graph mixture held out"))
    best = {layers: min(range(len(its)), key=lambda i: its[i]["excess"]) for layers, its in rows.items()}
    references = task.references()
    floor = next_token_losses(references["model averaging"](batch), batch.tokens)[:, 1:]
    likeliest = next_token_losses(references["maximum likelihood"](batch), batch.tokens)[:, 1:] - floor
    n = len(rows[3])
    lines = [Line("maximum likelihood: loss above model averaging, nats per token", float(likeliest.mean()), float(likeliest.mean(1).std() / math.sqrt(len(likeliest))), None, "follows the likeliest graph", None, "")]  # fmt: skip
    for layers in (3, 2):
        its, trained = rows[layers][best[layers]], kept[layers][best[layers]]
        end = dict(zip(trained["names"], trained["mixture"][-1].tolist(), strict=True))
        lines += [
            Line(f"{layers} layers: loss above model averaging, nats per token", its["excess"], its["excess-error"], None, "exact averaging over the graphs", None, f"the best of {n}" if n > 1 else "one seed"),
            Line(f"{layers} layers: weight of model averaging in the mixture at the end", end["model averaging"], float(trained["errors"][-1, trained["names"].index("model averaging")]), None, "mixture of least KL", None, ""),
            Line(f"{layers} layers: weight of even averaging in the mixture at the end", end["even averaging"], float(trained["errors"][-1, trained["names"].index("even averaging")]), None, "all graphs alike, whatever was seen", None, ""),
            Line(f"{layers} layers: phases", "; ".join(f"{name} {first}-{last}" for name, first, last in trained["leading"]), None, None, "the largest weight, by step", None, ""),
            Line(f"{layers} layers: residual at the end, nats per token", float(trained["residual"][-1]), float(trained["residual-errors"][-1]), None, "KL(model || mixture)", None, ""),
            Line(f"{layers} layers: model averaging takes over at", change(trained, "model averaging"), None, None, "change-point, 95% interval", None, ""),
            Line(f"{layers} layers: selectivity of {its['head']}, the most selective head", its["selectivity"], its["selectivity-error"], None, f"p = {its['p']:.3g}, family-wise", None, f"attention on the own graph's parents: {its['own']:.2f}"),
            Line(f"{layers} layers: rows of {its['head']} right for each graph, the least", min(its["by-graph"]), None, None, "largest of the three candidate parents", None, f"chance {1 / GRAPHS:.2f}"),
            Line(f"{layers} layers: the same, attention averaged over all sequences, the least", min(its["over-all"]), None, None, "", None, "one graph can't be three"),
            Line(f"{layers} layers: slope of {its['head']}'s attention on the posterior", its["slope"], its["slope-error"], None, "1 hedges exactly, above 1 bets", None, f"where the posterior's entropy is above 0.2 nats; attention on the candidates there: {its['mass']:.2f}"),
            Line(f"{layers} layers: KL(posterior || shares of {its['head']}), nats", its["divergence"], its["divergence-error"], None, f"equal shares: {its['uniform']:.3f}", None, ""),
        ]  # fmt: skip
    three = rows[3][best[3]]
    names = [f"graph {i}" for i in range(GRAPHS)]
    followed = np.asarray(three["followed"])
    panels = {
        f"sequences of {name}": {f"parent in {other}": viz.Curve(three["rows"], followed[i, j]) for j, other in enumerate(names)}
        for i, name in enumerate(names)
    }  # fmt: skip
    phases = {f"{layers} layers": weights_over_steps(kept[layers][best[layers]]) for layers in (2, 3)}
    return Reproduction(
        name="graph-mixture",
        title="A graph drawn for each sequence: how far does a model average over the graphs?",
        paper=("dangelo2025", "park2025"),
        summary=f"Three layers end {three['excess']:.3f} nats above exact model averaging, two layers {rows[2][best[2]]['excess']:.3f}; maximum likelihood loses {float(likeliest.mean()):.3f}. "
        f"The most selective head of three layers is {three['head']}, {three['selectivity']:.2f}.",
        lines=tuple(lines),
        figures={
            "phases": viz.curves(phases, x_name="training step", y_name="weight in the mixture"),
            "switch": viz.curves(panels, x_name="row", y_name="mean attention"),
        },
        captions={
            "phases": "The weights of the reference predictors in the mixture closest to the model, at each moment, with two standard errors.",
            "switch": f"Mean attention of {three['head']}, three layers, on the parent that each graph gives the next token, in the sequences of each graph.",
        },
        notes=(
            "The source (model averaging over graphs, OpenReview bpF8zgSt41, of which an excerpt was at hand) draws graphs uniformly for each sequence; the graphs, sizes and training here are our own, and the paper's figures are not at hand, so no line is compared with them.",
            "Roots are uniform: only then is the evidence for a graph the same with fixed and with fresh transitions, and in closed form.",
            *quick_note(run, f"{GRAPH_STEPS[True]} steps instead of {GRAPH_STEPS[False]}, one seed."),
        ),
        method="Transformers were trained on sequences with one of three random forests each, fitted by mixtures of reference predictors along the training, and each head's attention was compared between sequences of different graphs and with the exact posterior.",
        settings={**run.settings, "graphs": GRAPHS, "training": {"steps": steps, "batch_size": BATCH, "learning_rate": RATE}, "n_sequences": SEQUENCES[run.quick], "burn_in": BURN_IN},
    )  # fmt: skip
