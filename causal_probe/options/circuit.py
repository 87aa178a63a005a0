"""Finding the circuit of a behaviour in a model."""

from __future__ import annotations

import os
from dataclasses import dataclass
from typing import Annotated, ClassVar, Literal

from causal_probe.arguments import Help
from causal_probe.errors import CausalProbeError
from causal_probe.options.base import Subject
from causal_probe.options.common import MODEL, Bos, LoadingOptions, ProgressOption, SavingOptions, SeedOption

__all__ = ["NODE_CONTRASTS", "PROMPT_TASKS", "CircuitOptions"]

#: The tasks that :func:`causal_probe.circuits.task_prompts` makes.
PROMPT_TASKS = (
    *("induction", "ioi", "greater-than", "successor", "docstring"),
    *("numerals", "weekdays", "months", "number-words", "letters"),
)


#: By what nodes are replaced.
NODE_CONTRASTS = ("corrupted-mean", "mean-by-position", "zero")


@dataclass(frozen=True, kw_only=True)
class CircuitOptions(SeedOption, LoadingOptions, SavingOptions, ProgressOption):
    """Options of :func:`causal_probe.experiments.model_circuit`."""

    subject: ClassVar[Subject | None] = MODEL

    task: Annotated[
        str,
        Help(
            "What the model is asked: induction (repeated random tokens), or ioi, greater-than, successor, docstring, numerals, number-words, months, weekdays, letters, made of "
            "words that are one token of the model; or "
            'FILE.jsonl with prompts of your own, a line each: {"clean": "When Mary and John went home, John gave a key to", "answer": " Mary", "wrong": " John"}, and if '
            'wanted "corrupted", a prompt of the same length.'
        ),
    ] = "induction"
    text: Annotated[
        str | None,
        Help(
            "One prompt instead of a task: what carries its answer, position by position? Without a space at its end.",
            none="the task's prompts",
        ),
    ] = None
    answer: Annotated[
        str | None, Help("The answer to the text, one token with its space: ' Mary'.", none="there is no text")
    ] = None
    wrong: Annotated[str | None, Help("A wrong answer to the text, one token.", none="no wrong answer")] = None
    baselines: Annotated[
        str | None,
        Help(
            "FILE.txt with other prompts, a line each, at least as long as the text: parts are replaced by theirs.",
            none="n-prompts times random tokens that stand for text",
        ),
    ] = None
    metric: Annotated[
        Literal["logit-difference", "log-probability", "probability-difference"] | None,
        Help(
            "What the edges are asked to carry; higher is better.",
            none="logit-difference, without wrong answers log-probability",
        ),
    ] = None
    strategy: Annotated[
        Literal["edges", "nodes"],
        Help(
            "edges: each edge with a test. nodes: heads and MLPs are taken away one after another while a share of the metric (keep) is left, without a test of each (Lan et al. 2024)."
        ),
    ] = "edges"
    keep: Annotated[
        float | None,
        Help(
            "With the strategy nodes: the share of the clean metric that is to be left.", none="0.8", above=0, below=1
        ),
    ] = None
    contrast: Annotated[
        Literal["resample", "mean", "mean-by-position", "corrupted", "corrupted-mean", "zero"] | None,
        Help(
            "By what the ablated part of a receiver's input is replaced, or a node's output; what both have in common is in no circuit.",
            none="resample; of nodes, corrupted-mean",
        ),
    ] = None
    level: Annotated[float, Help("Level of the tests of edges.", above=0, below=0.5)] = 0.05
    delta: Annotated[
        float | None,
        Help(
            "The smallest effect of an edge that counts, in units of the metric.",
            none="a hundredth of the metric's fall when every edge is ablated",
            least=0,
        ),
    ] = None
    correction: Annotated[
        Literal["fdr", "family-wise"],
        Help(
            "Over the tested edges: fdr, the share of false ones among the confirmed; family-wise, the probability of any."
        ),
    ] = "fdr"
    n_prompts: Annotated[
        int,
        Help("How many prompts of a task are made: a third each to screen, to test, to report.", least=24, most=10**6),
    ] = 96
    most: Annotated[int, Help("How many edges are tested at most.", least=2)] = 200
    sampled: Annotated[
        int, Help("How many of these are drawn at random from those that the screen left out.", least=1)
    ] = 40
    bos: Bos = "auto"

    @property
    def replaced_by(self) -> str:
        """The contrast."""
        return self.contrast or ("corrupted-mean" if self.strategy == "nodes" else "resample")

    def check(self) -> None:
        """A task that there is, or a file; fewer drawn than tested; nothing that the strategy doesn't know."""
        if self.strategy == "nodes":
            self._check_nodes()
        elif self.keep is not None:
            raise CausalProbeError("`keep` is for the strategy nodes: give `strategy`, or leave it out.")
        if self.text is None:
            for name in ("answer", "wrong", "baselines"):
                if getattr(self, name) is not None:
                    raise CausalProbeError(f"`{name}` is for one prompt: give it as `text`.")
        elif self.answer is None:
            raise CausalProbeError("`text` has no `answer`: what should follow it? Give one token, such as ' Mary'.")
        elif self.replaced_by not in ("resample", "corrupted"):
            raise CausalProbeError(
                f"`contrast` is {self.contrast!r}; one prompt is compared with others by resample or corrupted."
            )
        if self.baselines is not None and not os.path.isfile(self.baselines):
            raise CausalProbeError(f"`baselines` is {self.baselines!r}, and there is no such file.")
        if self.task not in PROMPT_TASKS:
            if not self.task.endswith(".jsonl"):
                raise CausalProbeError(
                    f"`task` is {self.task!r}; it is {', '.join(PROMPT_TASKS)}, or a file of prompts that ends in .jsonl."
                )
            if not os.path.isfile(self.task):
                raise CausalProbeError(f"`task` is {self.task!r}, and there is no such file.")
        if self.sampled > self.most:
            raise CausalProbeError(
                f"`sampled` is {self.sampled}, and `most` is {self.most}: no more can be drawn than are tested."
            )

    def _check_nodes(self) -> None:
        for name in ("text", "level", "delta", "correction", "most", "sampled"):
            if getattr(self, name) != self.described()[name].default:
                raise CausalProbeError(
                    f"`{name}` means nothing to the strategy nodes, which tests no edges. Leave it out."
                )
        if self.replaced_by not in NODE_CONTRASTS:
            raise CausalProbeError(
                f"`contrast` is {self.contrast!r}; nodes are replaced by {', '.join(NODE_CONTRASTS)}."
            )
        if self.metric == "log-probability":
            raise CausalProbeError(
                "`metric` is 'log-probability', and a share of what is below 0 means nothing. Choose logit-difference or probability-difference."
            )
