"""Can a model read a causal graph in its context, and does its answer use it?

The paper's in-context task (:class:`~causal_probe.tasks.InContextMarkov`), with words of the model's own vocabulary for states. Two
things are asked, and they are not the same. *Does a head see the graph?* Does the last token attend to the nodes whose parent
carries the same word: the graph's own successor-of-parent template? *Does the answer use it?* Is the prediction of the next word
better than what the words' frequencies give?
"""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping, Sequence
from functools import partial
from pathlib import Path
from typing import Any, ClassVar

import networkx as nx
import torch
from jaxtyping import Float, Int
from torch import Tensor

from causal_probe.errors import CausalProbeError
from causal_probe.experiments.opening import model_settings, open_model
from causal_probe.experiments.saving import Clock, kept
from causal_probe.experiments.state_words import StateWords
from causal_probe.graphs import choose_graph
from causal_probe.graphs.choice import check_choice
from causal_probe.hooks import preflight
from causal_probe.hooks.check import HookedModel, describe, undisturbed
from causal_probe.hooks.moments import Moments
from causal_probe.hooks.preflight import context_length
from causal_probe.hooks.tokens import text_start
from causal_probe.options import takes
from causal_probe.options.recover import InContextOptions
from causal_probe.probes import Rule, scan, successor_of_parent, verify
from causal_probe.probes.head_scores import CALLED, HeadScore, HeadScores
from causal_probe.probes.measures import Measured
from causal_probe.probes.p_values import Estimate, t_p_value
from causal_probe.probes.verification import Verification
from causal_probe.results import Result, Table
from causal_probe.tasks import Batch, InContextMarkov, cross_entropy, generator

__all__ = ["InContextGraph", "WordBatch", "in_context_graph", "word_batches"]

#: The answer uses the context if it beats the in-context unigram by a one-sided paired t-test at this level.
LEVEL = 0.001
#: Heads are verified if their excess is surely above this: half of what a head is called by, since one row of a sequence says less
#: than many.
FLAGGED = CALLED / 2
#: Sequences (one batch) on which unflagged heads and random sets are ablated.
RANKED_ON = 4
#: Sequences over which the heads' means are taken, for each that is measured.
REFERENCES = 4
#: Tokens in a forward pass.
TOKENS = 4096


@dataclasses.dataclass(frozen=True, eq=False)
class WordBatch:
    """Sequences of words, and the word that follows each.

    Attributes
    ----------
    tokens
        The model's input.
    states
        The task's states, without the tokens before the text.
    target
        Distribution of the next state.
    words
        The token of each state, by sequence.
    """

    tokens: Int[Tensor, "batch pos"]
    states: Int[Tensor, "batch node"]
    target: Float[Tensor, "batch state"]
    words: Int[Tensor, "batch state"]

    def __len__(self) -> int:
        return len(self.tokens)


@dataclasses.dataclass(frozen=True, eq=False, repr=False)
class InContextGraph(Result):
    """The result of :func:`in_context_graph`. Losses are cross-entropies with the true next-state distribution, in nats.

    Attributes
    ----------
    graph
        The causal graph over the context.
    losses
        Mean over sequences and standard error: ``model`` (its distribution over the states' words, renormalized), ``model, all words``
        (over its whole vocabulary), and the predictors ``uniform``, ``in-context unigram`` and ``known-graph`` (none is a bound).
    gain
        Loss of the in-context unigram less that of ``model``, paired by sequence. Above 0: the answer uses more than frequencies.
    skill
        ``gain`` over what the known graph gains: 0 for the in-context unigram, 1 for the known graph, below 0 for a worse
        answer. None where the known graph gains nothing.
    scores
        Every head against the graph's own successor-of-parent template, in the last row.
    verification
        Whether the model uses the heads that see the graph; None if that was not asked for, or there are none.
    words
        The words that stand for states.
    timings
        Seconds.
    """

    KIND = "in-context graph"
    WORKS = ("nichani2024",)
    DERIVED = ("verdict", "carriers")
    RESULT: ClassVar[str] = "result.json"

    graph: nx.DiGraph
    losses: Mapping[str, Estimate]
    gain: Estimate
    skill: float | None
    scores: HeadScores
    verification: Verification | None
    words: tuple[str, ...]
    timings: Mapping[str, float]

    @property
    def carriers(self) -> tuple[HeadScore, ...]:
        """The heads that see the graph, the largest score first: an excess above 0.5 by three standard errors."""
        return tuple(sorted(self.scores.called(), key=lambda head: -(head.score or 0)))

    @property
    def best(self) -> HeadScore:
        """The head with the largest score."""
        return self.scores.top(self.scores.names[0], 1)[0]

    @property
    def answers(self) -> bool:
        """Whether the answer beats the in-context unigram (one-sided paired t-test at 0.001)."""
        return self.gain.value > 0 and self.gain.p_value <= LEVEL

    @property
    def verdict(self) -> str:
        """In words: what the heads see, and what the answer uses. An answer that doesn't beat frequencies shows no use; it doesn't show that there is none."""
        n = len(self.carriers)
        sees = f"{n} head{'s' * (n != 1)} see{'s' * (n == 1)} the graph" if n else "no head sees the graph"
        more = "it" if n else "more than frequencies"
        if self.answers:
            return f"{sees}; the answer uses {more}"
        worse = self.gain.value < 0 and self.gain.p_value >= 1 - LEVEL
        return f"{sees}; {'the answer is worse than frequencies' if worse else f'no use of {more} is shown'}"

    @property
    def undefined(self) -> dict[str, str]:
        """Why there is no skill."""
        return {} if self.skill is not None else {"skill": "knowing the graph gains nothing here"}

    @property
    def call(self) -> str:
        """The Python that gives this result."""
        model = repr(self.settings["model"]) if self.settings["source"] == "loaded" else "model"
        return InContextOptions.call("in_context_graph", self.settings, model)

    @property
    def methods(self) -> str:
        """One sentence for a methods section."""
        said = how_it_was_read(self.provenance["model"], f"the graph {self.settings['graph']}", self.settings)
        return f"{said} ({self.measured_with})."

    def table(self) -> Table:
        """The heads that see the graph, at most 8, or the best one; the losses below."""
        s = self.settings
        rows = []
        for head in (*self.carriers[:8], *([] if self.carriers else [self.best])):
            found = None if self.verification is None else self.verification.of(head.layer, head.head)
            effect = (
                ""
                if found is None
                else f"{found.verdict} (effect {found.shown.value:.3f} ± {found.shown.stderr:.3f} nats)"
            )
            rows.append((f"L{head.layer}H{head.head}", head.score, head.stderr, head.chance, head.excess, effect))
        more = len(self.carriers) - 8
        skill = "" if self.skill is None else f", skill {self.skill:.2f}"
        return Table(
            f"{self.provenance['model']} on {s['graph']}, {s['states']} states, {len(self.graph) + 1} positions, "
            f"{s['n_sequences']} sequences: {self.verdict}",
            ("head", "score", "stderr", "chance", "excess", "verdict"),
            rows,
            [
                *[f"and {more} heads more"] * (more > 0),
                *(f"loss {each.value:.3f} ± {each.stderr:.3f}  {name}" for name, each in self.losses.items()),
                f"gain over the in-context unigram {self.gain.value:.3f} ± {self.gain.stderr:.3f}{skill}",
                *([] if self.verification is None else self.verification.notes),
                *(
                    [f"no verdicts: {self.verification.undefined['verdicts']}"]
                    if self.verification is not None and "verdicts" in self.verification.undefined
                    else []
                ),
            ],
        )


def how_it_was_read(models: str, graphs: str, settings: Mapping[str, Any]) -> str:
    """What a methods section may say of readings of some models on some graphs, without its full stop."""
    return (
        f"{models} read {settings['n_sequences']} sequences of the in-context task of Nichani, Damian & Lee on {graphs} with "
        f"{settings['states']} states (Dirichlet concentration {settings['concentration']:g}) as single-token words; a head sees a graph if the "
        "last token, whose row predicts the next word, attends to the successors of nodes that carry it (excess above 0.5 by three standard errors)"
    )


@takes(InContextOptions)
def in_context_graph(model: Any, o: InContextOptions) -> InContextGraph:
    """Ask a model to read a causal graph in its context.

    No node of the graph may have two parents. Words are drawn by :class:`~causal_probe.experiments.state_words.StateWords`.

    Raises
    ------
    CausalProbeError
        For any argument that can't be worked with (a word of several tokens, a graph longer than the context, a node with two
        parents), and a model whose attention can't be measured. Nothing is written then.

    Examples
    --------
    >>> from causal_probe import graphs, models
    >>> model = models.hand_set(graphs.chain(11), 3, match_scale=12.0, output_scale=4.0)
    >>> in_context_graph(model, "chain", states=3, n_sequences=4, verify=False).carriers[0].layer
    1
    """
    clock = Clock()
    check_choice(o.graph)  # before a model is loaded
    hooked, about = model_settings(model, o)
    settings = o.settings(**about, root_probability=o.root_probability if o.graph == "forest" else None)
    with kept(o, settings, InContextGraph) as saved:
        if hooked is None:
            hooked, _ = open_model(model, dtype=o.dtype, device=o.device)
        start = text_start(hooked, o.bos)
        room = context_length(hooked)
        room = None if room is None else room - len(start)
        n_positions = o.n_positions
        if n_positions is None and isinstance(o.graph, str) and not Path(o.graph).exists():
            n_positions = min(64, room or 64)
        truth = choose_graph(o.graph, n_positions=n_positions, root_probability=o.root_probability, seed=o.seed)
        task = InContextMarkov(truth, o.states, o.concentration)
        if not task.is_tree:
            raise CausalProbeError(
                "A node of the graph has two parents; a graph that is read in context has one parent a node at most."
            )
        if room is not None and task.n_positions > room:
            raise CausalProbeError(
                f"The graph makes {task.n_positions} positions, and the model's context has room for {room}. Take a smaller graph, or fewer "
                "positions."
            )
        chosen = StateWords.choose(hooked, o.states, o.words)
        written = partial(word_batches, hooked, task, chosen, start=start, seed=o.seed)
        batches = written(n_sequences=o.n_sequences)
        preflight(hooked, batches[0].tokens[:1])

        losses, gain, skill = _losses(hooked, task, batches)
        template = successor_of_parent(task.graph, first=len(start))
        scores = scan(hooked, [batch.tokens for batch in batches], templates=[template], queries=[-1])
        if not scores.top(template.name, 1):
            raise CausalProbeError(
                f"In none of the {o.n_sequences} sequences does the last word also stand on an earlier node with a successor, so no head can be "
                "scored. Give more `n_sequences` or `n_positions`, or fewer `states`."
            )
        clock.spent_on("reading")
        verification = None
        if o.verify and scores.called():
            fresh = written(n_sequences=min(o.n_sequences, 16), stream="verify", batch_size=RANKED_ON)
            others = written(n_sequences=REFERENCES * sum(map(len, fresh)), stream="references")
            verification = _verify(scores, hooked, task, fresh, others, o)
        clock.spent_on("verifying")
        return saved(
            InContextGraph(
                graph=task.graph,
                losses=losses,
                gain=gain,
                skill=skill,
                scores=scores,
                verification=verification,
                words=chosen.words,
                timings=clock.timings,
                settings=settings,
                provenance=scores.provenance,
            )
        )


def word_batches(
    model: HookedModel,
    task: InContextMarkov,
    words: StateWords,
    *,
    n_sequences: int,
    start: Sequence[int] = (),
    seed: int = 0,
    stream: str = "read",
    batch_size: int | None = None,
) -> list[WordBatch]:
    """Sequences of a task in a model's words, in batches that fit into a forward pass, or of ``batch_size``."""
    source = generator(seed, f"{stream} in context")
    drawn = task.sample(n_sequences, source)
    names = words.draw(n_sequences, task.d_vocab, source)
    first = torch.tensor(list(start), dtype=torch.long).expand(n_sequences, -1)
    tokens = torch.cat([first, names.gather(1, drawn.tokens)], 1)
    device = describe(model)["device"] or "cpu"
    size = batch_size or max(2, TOKENS // tokens.shape[1])
    return [
        WordBatch(*(values[at : at + size].to(device) for values in (tokens, drawn.tokens, drawn.target, names)))
        for at in range(0, n_sequences, size)
    ]


def answer(logits: Float[Tensor, "batch pos d_vocab"], batch: WordBatch) -> tuple[Tensor, Tensor]:
    """The loss of each sequence over the states' words alone, and over the whole vocabulary."""
    last = logits[:, -1].double()
    chosen = last.gather(1, batch.words)
    target = batch.target.double()
    own = -(target * chosen.log_softmax(-1)).sum(-1)
    return own, (target * (last.logsumexp(-1, keepdim=True) - chosen)).sum(-1)


def _losses(
    model: HookedModel, task: InContextMarkov, batches: Sequence[WordBatch]
) -> tuple[dict[str, Estimate], Estimate, float | None]:
    found: dict[str, list[Tensor]] = {}
    references = task.references()
    with undisturbed(model):
        for batch in batches:
            own, whole = answer(model(batch.tokens), batch)
            target = batch.target.double()
            each = {"model": own, "model, all words": whole}
            sequences = Batch(batch.states, target, {})
            for name in ("uniform", "in-context unigram", "known-graph"):
                each[name] = cross_entropy(references[name](sequences).double(), target)
            for name, values in each.items():
                found.setdefault(name, []).append(values.cpu())
    whole_of = {name: torch.cat(values) for name, values in found.items()}
    unigram = whole_of["in-context unigram"]
    gain = _estimate(unigram - whole_of["model"])
    possible = float((unigram - whole_of["known-graph"]).mean())
    return (
        {name: _estimate(values) for name, values in whole_of.items()},
        gain,
        gain.value / possible if possible > 0 else None,
    )


def _verify(
    scores: HeadScores,
    model: HookedModel,
    task: InContextMarkov,
    batches: Sequence[WordBatch],
    others: Sequence[WordBatch],
    o: InContextOptions,
) -> Verification:
    predictors = {name: task.references()[name] for name in ("uniform", "in-context unigram")}

    def measure(logits: Tensor, batch: Any) -> Measured:
        own, _ = answer(logits, batch)
        target = batch.target.double()
        without = {
            f"the {name} predictor": cross_entropy(predict(Batch(batch.states, target, {})).double(), target)
            for name, predict in predictors.items()
        }
        chosen = logits[:, -1].gather(1, batch.words).float()
        logit = (batch.target.float() * chosen).sum(-1) - chosen.mean(-1)
        return Measured(own, logit, without)

    rule = Rule(minimum_excess=FLAGGED, delta=o.delta)
    return verify(
        scores,
        model,
        batches,
        templates=scores.names,
        measure=measure,
        reference=others,
        rule=rule,
        seed=o.seed,
        progress=o.progress,
    )


def _estimate(values: Float[Tensor, " sequence"]) -> Estimate:
    moments = Moments.of(values)
    mean, stderr = float(moments.mean), 0.0 if moments.stderr is None else float(moments.stderr)
    return Estimate(mean, stderr, t_p_value(mean, stderr, len(values)))
