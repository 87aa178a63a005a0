"""Does an encoder build a sentence's meaning along a tree? Tree projection (Murty et al. 2023).

The vector of a span is the sum over its words of the encoder's last vectors. It is taken twice: with everything visible, and with nothing visible but
the span, a start and an end, in the layers from ``first_layer`` on. If the encoder computes a span without looking beyond it, the two agree: the chart holds
their cosine. The tree whose spans agree best is the encoder's; its *agreement* is the mean cosine of its spans. Bracket F1 says how near it is to the
sentence's own tree.

Cosines of long spans are larger whatever the encoder, and the best of many trees is good by chance. So the agreement stands beside a *control*: that of the best
trees of charts in which the spans of one length have exchanged their cosines. The first layer is chosen by the agreement less its control on half of the sentences
(the first, third, ...); everything else is of the other half. There is no test of the agreement: random weights already make the two differ, for a span's
place in the sentence matters. What is tested is the sentences' own trees: H0 "the encoder's trees share no more brackets with them than trees that look at nothing",
one-sided t-tests of F1 paired by sentence, Holm's correction over those kinds. The paper's *t-score* (:func:`.chart.t_score`) compares splits of one node whatever the lengths of
their parts, so a tree that splits off single words, whose cosines are low, can have a t-score below 0 and be right.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import PurePath
from typing import Any

import numpy as np
import torch
from jaxtyping import Float

from causal_probe.arguments import Count, Seed, checked
from causal_probe.errors import CausalProbeError
from causal_probe.hooks.check import describe
from causal_probe.probes.p_values import estimates, least_p_value
from causal_probe.results import Result, Table
from causal_probe.syntax.attachment import as_sentences
from causal_probe.syntax.chart import (
    Brackets,
    TreeF1,
    agreement,
    balanced_tree,
    best_tree,
    bracket_f1,
    brackets_of,
    branching_tree,
    centred,
    greedy_tree,
    micro_f1,
    random_tree,
    redrawn_chart,
    t_score,
    without_trivial,
)
from causal_probe.syntax.masked import Vectors, check_masks, masked_encoder
from causal_probe.syntax.treebank import Sentence
from causal_probe.syntax.words import Tokenized, tokenize

__all__ = ["TreeProjection", "tree_projection"]

#: The encoder's best trees.
OWN = "encoder"
#: Sequences in a forward pass.
TOGETHER = 64
#: Random trees and redrawn charts for each sentence.
DRAWS = 20


@dataclass(frozen=True, eq=False, repr=False)
class TreeProjection(Result):
    """The result of :func:`tree_projection`, on the sentences that did not choose the layer.

    Attributes
    ----------
    first_layer
        From which layer on only the span was visible: that of the largest agreement, less its control, on the other sentences.
    agreement, control
        Mean cosine of the best trees' spans, in [-1, 1]; the same where spans of one length have exchanged their cosines.
    agreement_stderr
        Standard error over sentences of the difference of the two.
    t_score, t_stderr
        The paper's t-score of the best trees, mean over sentences, and its standard error.
    by_layer
        The agreement less its control by first layer, from 0, on all sentences.
    trees
        Bracket F1 of the encoder's trees and of trees that look at nothing; a p-value takes two sentences with a bracket besides the whole.
    charts
        [sentence][first word, last word]: cosines; 0 below the diagonal.
    """

    KIND = "tree projection"
    WORKS = ("murty2023",)

    first_layer: int
    agreement: float
    control: float
    agreement_stderr: float
    t_score: float
    t_stderr: float
    by_layer: tuple[float, ...]
    trees: tuple[TreeF1, ...]
    charts: tuple[np.ndarray, ...]

    @property
    def methods(self) -> str:
        """One sentence for a methods section."""
        return (
            f"Binary trees were projected from {self.provenance['model']} ({self.settings['n_sentences']} sentences; the layer from which a span's words alone are "
            "visible chosen on half of them, the rest reported): best trees by dynamic programming, bracket F1 beside trees that look at nothing (one-sided paired "
            f"t-tests over sentences, Holm-corrected; {self.measured_with})."
        )

    def table(self) -> Table:
        """One row for each kind of tree."""
        return Table(
            f"TreeProjection of {self.provenance['model']}: {self.settings['n_sentences']} sentences, only a span visible from layer {self.first_layer} on",
            ("tree", "F1", "F1 as in the paper", "encoder ahead by", "stderr", "p_value"),
            [tuple(each) for each in self.trees],
            (
                f"agreement {self.agreement:.4f}, control {self.control:.4f}, difference {self.agreement - self.control:.4f} ± {self.agreement_stderr:.4f}",
                f"agreement less its control by first layer: {', '.join(f'{value:.4f}' for value in self.by_layer)}",
                f"t-score {self.t_score:.3f} ± {self.t_stderr:.3f}",
            ),
        )


@checked
def tree_projection(
    model: Any, sentences: Any, *, tokenizer: Any = None, most_words: Count = 24, seed: Seed = 0
) -> TreeProjection:
    """The binary trees along which an encoder computes its sentences, and how near they are to the sentences' own.

    Parameters
    ----------
    model
        A Hugging Face encoder (BERT and its like), hooked or not; or a function ``vectors(tokens, visible, first_layer)`` with ``n_layers``
        (:mod:`causal_probe.syntax.masked`).
    sentences
        A CoNLL-U file, or sentences ``(words, governors, relations)``. Constituents are the words below each word; they are only compared with.
    tokenizer
        A fast tokenizer, where the model carries none.
    most_words
        Longer sentences are left out: n words take n (n + 1) / 2 sequences for each first layer.
    seed
        Of random trees and redrawn charts.

    Raises
    ------
    CausalProbeError
        If the model is causal, or masks have no effect on it, its vectors are NaN, or there are fewer than four sentences of two words or more.

    References
    ----------
    Murty, Sharma, Andreas & Manning, "Characterizing intrinsic compositionality in transformers with tree projections", ICLR 2023.

    Examples
    --------
    >>> from tokenizers import Tokenizer, models, pre_tokenizers
    >>> from transformers import BertConfig, BertModel, PreTrainedTokenizerFast
    >>> words = ["the", "a", "dog", "cat", "saw", "heard"]
    >>> fast = Tokenizer(models.WordLevel({word: i for i, word in enumerate(words)}, unk_token="a"))
    >>> fast.pre_tokenizer = pre_tokenizers.Whitespace()
    >>> shape = {"hidden_size": 8, "num_hidden_layers": 2, "num_attention_heads": 2, "intermediate_size": 8}
    >>> import torch
    >>> _ = torch.manual_seed(0)
    >>> encoder = BertModel(BertConfig(vocab_size=6, initializer_range=0.5, **shape)).eval()     # random weights
    >>> tree = (1, 2, -1, 4, 2), ("det", "nsubj", "root", "det", "obj")
    >>> sentences = [((a, noun, verb, "the", "cat"), *tree) for a in words[:2] for noun in words[2:4] for verb in words[4:]]
    >>> found = tree_projection(encoder, sentences, tokenizer=PreTrainedTokenizerFast(tokenizer_object=fast))
    >>> [kind.tree for kind in found.trees], len(found.charts)
    (['encoder', 'encoder, centred', 'encoder, greedy', 'right-branching', 'left-branching', 'balanced', 'random'], 4)
    """
    its = tuple(each for each in as_sentences(sentences) if len(each.words) <= most_words)
    if len(its) < 4:
        raise CausalProbeError(f"Four sentences of 2 to {most_words} words are needed; there are {len(its)}.")
    if callable(model) and not isinstance(model, torch.nn.Module) and hasattr(model, "n_layers"):
        vectors, n_layers = model, int(model.n_layers)
    else:
        vectors, n_layers = masked_encoder(model)
    tokenizer = getattr(model, "tokenizer", None) if tokenizer is None else tokenizer
    config: Any = getattr(model, "config", None)
    tokenized = tokenize(tokenizer, its, longest=getattr(config, "max_position_embeddings", None))
    longest = max(tokenized, key=lambda each: len(each.tokens))
    check_masks(vectors, torch.tensor(longest.tokens), first_word=longest.word_of.index(0) + 1)
    firsts = range(n_layers // 2 + 1)
    charts = [[_chart(vectors, each, first) for first in firsts] for each in tokenized]
    rng = np.random.default_rng(seed)
    scores = np.array(
        [[_scores(chart, rng) for chart in of_sentence] for of_sentence in charts]
    )  # [sentence, first layer, 3]
    beyond = scores[:, :, 0] - scores[:, :, 1]
    first = int(beyond[::2].mean(0).argmax())
    reported, difference = scores[1::2, first], beyond[1::2, first]
    n = len(reported)
    return TreeProjection(
        first_layer=first,
        agreement=float(reported[:, 0].mean()),
        control=float(reported[:, 1].mean()),
        agreement_stderr=float(difference.std(ddof=1) / n**0.5),
        t_score=float(reported[:, 2].mean()),
        t_stderr=float(reported[:, 2].std(ddof=1) / n**0.5),
        by_layer=tuple(beyond.mean(0).tolist()),
        trees=_compared([each[first] for each in charts[1::2]], its[1::2], rng),
        charts=tuple(each[first] for each in charts[1::2]),
        settings={"n_sentences": len(its), "most_words": most_words, "seed": seed},
        provenance=_described(model),
    )


def _described(model: Any) -> dict[str, Any]:
    """What :func:`.describe` says, also of a model without hooks."""
    if getattr(model, "cfg", None) is not None:
        return describe(model)
    config, parameter = getattr(model, "config", None), next(iter(getattr(model, "parameters", list)()), None)
    name = PurePath(str(getattr(config, "name_or_path", "") or "")).name or type(model).__name__
    dtype = None if parameter is None else str(parameter.dtype).removeprefix("torch.")
    return {"model": name, "dtype": dtype, "device": None if parameter is None else str(parameter.device)}


def _chart(vectors: Vectors, sentence: Tokenized, first_layer: int) -> Float[np.ndarray, "word word"]:
    """Cosines of each span's vector with everything visible, and with nothing but the span."""
    tokens, word_of = torch.tensor(sentence.tokens), torch.tensor(sentence.word_of)
    n = int(word_of.max()) + 1
    spans = [(i, j) for i in range(n) for j in range(i, n)]
    inside = torch.stack([(word_of >= i) & (word_of <= j) for i, j in spans])
    visible = inside | (word_of < 0)
    whole = vectors(tokens[None], torch.ones(1, len(tokens), dtype=torch.bool), 0)[0].double()
    parts = [
        vectors(tokens.expand(len(some), -1), some, first_layer).double() for some in torch.split(visible, TOGETHER)
    ]
    masked = torch.cat(
        [(part * its[..., None]).sum(1) for part, its in zip(parts, torch.split(inside, TOGETHER), strict=True)]
    )
    cosines = torch.nn.functional.cosine_similarity(masked, inside.double() @ whole, dim=1)
    if cosines.isnan().any():
        raise CausalProbeError("A span's vector is no number. Check the encoder's weights for NaN.")
    chart = np.zeros((n, n))
    chart[tuple(np.array(spans).T)] = cosines.numpy()
    return chart


def _scores(chart: Float[np.ndarray, "word word"], rng: np.random.Generator) -> tuple[float, float, float]:
    """The best tree's agreement, its control, and its t-score."""
    best = best_tree(chart)
    redrawn = [redrawn_chart(chart, rng) for _ in range(DRAWS)]
    control = np.mean([agreement(each, best_tree(each)) for each in redrawn])
    return agreement(chart, best), float(control), t_score(chart, best)


def _compared(
    charts: Sequence[np.ndarray], sentences: Sequence[Sentence], rng: np.random.Generator
) -> tuple[TreeF1, ...]:
    """Bracket F1 of the encoder's trees, and of those that look at nothing beside it."""
    sizes, level = [len(chart) for chart in charts], centred(charts)
    true = [brackets_of(sentence) for sentence in sentences]
    inner = [without_trivial(each, n) for each, n in zip(true, sizes, strict=True)]
    told = [s for s in range(len(charts)) if inner[s]]  # sentences with a bracket to find
    kinds: dict[str, list[Callable[[int], Any]]] = {
        OWN: [lambda s: best_tree(charts[s])],
        "encoder, centred": [lambda s: best_tree(level[s])],
        "encoder, greedy": [lambda s: greedy_tree(charts[s])],
        "right-branching": [lambda s: branching_tree(sizes[s], right=True)],
        "left-branching": [lambda s: branching_tree(sizes[s], right=False)],
        "balanced": [lambda s: balanced_tree(sizes[s])],
        "random": [lambda s: random_tree(sizes[s], rng)] * DRAWS,
    }
    f1: dict[str, np.ndarray] = {}
    whole: dict[str, float] = {}
    for name, repeats in kinds.items():
        found: list[list[Brackets]] = [[frozenset(build(s)) for s in range(len(charts))] for build in repeats]
        whole[name] = float(np.mean([micro_f1(each, true) for each in found]))
        f1[name] = np.mean(
            [[bracket_f1(without_trivial(each[s], sizes[s]), inner[s]) for s in told] for each in found], 0
        )
    if len(told) < 2:
        return tuple(
            TreeF1(name, float(values.mean()) if len(told) else None, whole[name]) for name, values in f1.items()
        )
    ahead = estimates({name: f1[OWN] - values for name, values in f1.items() if "encoder" not in name}, above=0.0)
    least = least_p_value(len(told))
    ahead = {name: its._replace(p_value=max(its.p_value, least)) for name, its in ahead.items()}
    return tuple(TreeF1(name, float(values.mean()), whole[name], *ahead.get(name, ())) for name, values in f1.items())
