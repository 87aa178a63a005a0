"""What structure has this model? Dependencies, the order of the context, the directions of its scores and continuations, asked of one model on the same sentences."""

from __future__ import annotations

import os
import warnings
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from functools import partial
from typing import Any, ClassVar, TypeVar

import torch
from jaxtyping import Int
from torch import Tensor

from causal_probe.circuits.next_scores import NextScores, next_scores
from causal_probe.circuits.prompt_tasks import NAMED_ORDERS
from causal_probe.errors import CausalProbeError, CausalProbeWarning
from causal_probe.experiments.opening import model_settings, open_model
from causal_probe.experiments.saving import kept
from causal_probe.hooks.tokens import text_start
from causal_probe.models import choose_device, load_model
from causal_probe.options import takes
from causal_probe.options.structure import StructureOptions
from causal_probe.probes.permutation_sensitivity import PermutationSensitivity, permutation_sensitivity
from causal_probe.probes.score_pca import ScorePCA, score_pca
from causal_probe.results import BINARY, Result, Table
from causal_probe.syntax import dependency_heads, generated_sentences, read_conllu, tree_projection
from causal_probe.syntax.attachment import DependencyHeads
from causal_probe.syntax.projection import TreeProjection
from causal_probe.syntax.treebank import Sentence

__all__ = ["ModelStructure", "model_structure"]

PERMUTATIONS = 2
#: Sentences that trees are projected from: each takes as many forward passes as it has spans.
TREES = 60
#: All questions but trees are asked of a model with hooks.
NO_HOOKS = "all else"
R = TypeVar("R")


@dataclass(frozen=True, eq=False, repr=False)
class ModelStructure(Result):
    """The result of :func:`model_structure`; a part is None where it could not be asked.

    Attributes
    ----------
    dependencies
        Which heads attach words to their governors.
    order
        How much the order of the context matters, by layer.
    scores
        In how few directions scores vary.
    continuation
        Next and copy scores, for each order whose members are single tokens.
    trees
        Along which trees an encoder computes; None of a causal model, which is not asked.
    left_out
        By part, why it could not be asked.
    """

    KIND = "structure"
    RESULT: ClassVar[str] = "structure.json"
    WORKS = ("clark2019", "htut2019", "zuo2024", "bhojanapalli2021", "lan2024", "gould2024", "murty2023")

    dependencies: DependencyHeads | None
    order: PermutationSensitivity | None
    scores: ScorePCA | None = field(metadata=BINARY)
    continuation: tuple[NextScores, ...] = field(metadata=BINARY)
    trees: TreeProjection | None = field(metadata=BINARY)
    left_out: Mapping[str, str]

    @property
    def parts(self) -> list[Result]:
        """The results that there are."""
        return [
            each
            for each in (self.dependencies, self.order, self.scores, *self.continuation, self.trees)
            if each is not None
        ]

    @property
    def undefined(self) -> dict[str, str]:
        """Why there is no value."""
        whys = {"trees": "only models that see both sides are asked for trees", **self.left_out}
        missing = [name for name in ("dependencies", "order", "scores", "trees") if getattr(self, name) is None]
        return {name: whys.get(name, self.left_out.get(NO_HOOKS, "not asked")) for name in missing}

    @property
    def call(self) -> str:
        """The Python that gives this result."""
        named = self.settings.get("model", self.provenance["model"])
        return StructureOptions.call("model_structure", self.settings, repr(str(named)))

    @property
    def methods(self) -> str:
        """The parts' own sentences, one after another."""
        return " ".join(each.methods for each in self.parts)

    @property
    def questions(self) -> list[tuple[str, str, float, str, float]]:
        """Each question, where its answer was found, the answer, what stands beside it, and that one's value."""
        rows: list[tuple[str, str, float, str, float]] = []
        if self.dependencies is not None:
            best = self.dependencies.attachments[0]
            rows.append(
                ("words attached to their governors", best.name, best.uas, f"offset {best.offset:+d}", best.offset_uas)
            )
        if self.order is not None:
            rows.append(
                (
                    "KL when the context is permuted",
                    "tokens",
                    self.order.tokens,
                    "nothing permuted",
                    self.order.rounding,
                )
            )
            layer = len(self.order.layers) - 1
            rows.append(("", f"input of layer {layer}", self.order.layers[layer], "", self.order.rounding))
        if self.scores is not None:
            k = self.scores.explained.shape[1]
            rows.append(
                (
                    f"score variance in {k} components, held out",
                    "mean head",
                    float(self.scores.held_out[:, -1].mean()),
                    "in sample",
                    float(self.scores.explained[:, -1].mean()),
                )
            )
        if self.trees is not None:
            own, *others = (each for each in self.trees.trees if each.tree == "encoder" or each.ahead is not None)
            best_other = max(others, key=lambda each: each.f1 or 0.0, default=own)
            rows.append(
                (
                    "brackets of the encoder's trees",
                    "F1",
                    own.f1 or 0.0,
                    f"{best_other.tree} trees",
                    best_other.f1 or 0.0,
                )
            )
        for each in self.continuation:
            best_head = int(each.next.argmax())
            layer, head = each.heads[best_head]
            rows.append(
                (
                    f"next of {each.settings['words']}",
                    f"L{layer}H{head}",
                    float(each.next[best_head]),
                    "another word",
                    float(each.other[best_head]),
                )
            )
        return rows

    def table(self) -> Table:
        """One row for each question, with what stands beside its answer."""
        notes = [f"{part}: {why}" for part, why in self.left_out.items()]
        return Table(
            f"ModelStructure of {self.provenance['model']}",
            ("question", "where", "value", "beside", "its value"),
            self.questions,
            notes,
        )


@takes(StructureOptions)
def model_structure(model: Any, o: StructureOptions) -> ModelStructure:
    """Ask one model about structure, always on the same sentences: four questions to a language model, trees to an encoder; what can't be asked is said.

    Raises
    ------
    CausalProbeError
        If the model has no tokenizer, the treebank can't be read, or no question can be asked of the model.
    """
    hooked, about = model_settings(model, o)
    settings = o.settings(**about)
    with kept(o, settings, ModelStructure) as saved:
        sentences = (
            generated_sentences(o.n_sentences, seed=o.seed)
            if o.conllu is None
            else read_conllu(os.fspath(o.conllu))[: o.n_sentences]
        )
        left_out: dict[str, str] = {}

        def ask(part: str, question: Callable[[], R]) -> R | None:
            try:
                return question()
            except CausalProbeError as error:
                left_out[part] = str(error)
                return None

        its: Any = hooked
        encoder, tokenizer = None, None
        if its is None:
            its, encoder, tokenizer, why = _opened(model, o)
            left_out |= {NO_HOOKS: why} if its is None else {}
        elif getattr(its.cfg, "attention_dir", "causal") != "causal":
            encoder, tokenizer = its, getattr(its, "tokenizer", None)
        if tokenizer is None and getattr(its, "tokenizer", None) is None:
            raise CausalProbeError("Questions about sentences need the model's tokenizer, and it has none.")
        trees = None
        if encoder is not None:
            few = sentences[:TREES]
            trees = ask("trees", lambda: tree_projection(encoder, few, tokenizer=tokenizer, seed=o.seed))
        dependencies = order = scores = None
        continuation: list[NextScores | None] = []
        if its is not None:
            stretches = ask("order", lambda: _stretches(its, sentences, o))
            dependencies = ask("dependencies", lambda: dependency_heads(its, sentences))
            if stretches is None:
                left_out["scores"] = left_out["order"]
            else:
                rows, start = stretches
                order = ask(
                    "order",
                    lambda: permutation_sensitivity(its, rows, n_permutations=PERMUTATIONS, start=start, seed=o.seed),
                )
                scores = ask("scores", lambda: score_pca(its, rows, n_components=o.n_components))
            continuation = [ask(name, partial(next_scores, its, name, bos=o.bos)) for name in NAMED_ORDERS]
        found = ModelStructure(
            dependencies=dependencies,
            order=order,
            scores=scores,
            continuation=tuple(each for each in continuation if each is not None),
            trees=trees,
            left_out=left_out,
            settings=settings,
            provenance={},
        )
        if not found.parts:
            raise CausalProbeError(
                f"None of the questions can be asked of this model. The first: {next(iter(left_out.values()))}"
            )
        about_model = found.parts[0].provenance
        return saved(replace(found, settings={**found.settings, "sentences": len(sentences)}, provenance=about_model))


def _opened(model: Any, o: StructureOptions) -> tuple[Any, Any, Any, str]:
    """A named model with hooks; or an encoder without, its tokenizer, and why it has no hooks. A model that sees both sides is both."""
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", CausalProbeWarning)  # of a head that an encoder has no weights for
            hooked, _ = open_model(model, dtype=o.dtype, device=o.device)
    except CausalProbeError as error:
        try:
            loaded = load_model(model, dtype=o.dtype, device=str(choose_device(o.device)), any_kind=True)
        except CausalProbeError:
            raise error from None
        return None, loaded.model, loaded.tokenizer, f"that is asked of language models, with hooks. {error}"
    both = getattr(hooked.cfg, "attention_dir", "causal") != "causal"
    tokenizer = getattr(hooked, "tokenizer", None)
    return (hooked, hooked, tokenizer, "") if both else (hooked, None, None, "")


def _stretches(model: Any, sentences: Sequence[Sentence], o: StructureOptions) -> tuple[Int[Tensor, "row pos"], int]:
    """The sentences' tokens, one behind the other, cut into stretches behind what texts start with; and how long that is."""
    start = text_start(model, o.bos)
    text = " ".join(word for each in sentences for word in (*each.words, "."))
    ids = model.tokenizer(text, add_special_tokens=False)["input_ids"]
    n = min(o.n_sequences, len(ids) // o.length)
    if n < 4:
        raise CausalProbeError(
            f"{len(sentences)} sentences have {len(ids)} tokens, which are {n} stretches of {o.length}; 4 are needed. Give more sentences, or a smaller `length`."
        )
    return torch.tensor([[*start, *ids[i * o.length : (i + 1) * o.length]] for i in range(n)]), len(start)
