"""Which heads attend from a word to its governor, or from a governor to its word?

Every head is asked for the tree that it draws: each word is attached to the word that it attends to most, or to the one that attends to it most.
Of many heads the best looks good by chance, and adjacent words are often governor and dependent. So the head is chosen on half of the sentences (the
first, third, ...) and reported on the other half, beside the best fixed offset, which is chosen and reported on the same halves.
"""

from __future__ import annotations

import itertools
from collections import defaultdict
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

import networkx as nx
import numpy as np
import torch
from jaxtyping import Float, Int
from torch import Tensor

from causal_probe.arguments import BatchSize, Count
from causal_probe.errors import CausalProbeError
from causal_probe.hooks.batches import context_length, probe
from causal_probe.hooks.check import HookedModel, describe
from causal_probe.hooks.record import record
from causal_probe.probes.p_values import corrected, least_p_value
from causal_probe.results import Result, Rows, Table
from causal_probe.syntax.treebank import Sentence, check_sentence, read_conllu
from causal_probe.syntax.words import Tokenized, between_words, tokenize

__all__ = ["Attachment", "DependencyHeads", "as_sentences", "dependency_heads"]

#: What a word is attached by: the word that it attends to most is its governor, or the word that attends to it most is.
DIRECTIONS = ("to governor", "from governor")
#: Fixed offsets that are tried, in words: the governor stands so far behind.
OFFSETS = tuple(offset for offset in range(-8, 9) if offset)
#: All relations together.
ALL = "all"
#: Maxima within this share of each other are ties, which share the credit.
TIE = 1e-6
ByHead = tuple[tuple[float, ...], ...]


class Attachment(NamedTuple):
    """A relation, the head that was chosen for it on one half of the sentences, and what both are on the other half.

    Attributes
    ----------
    relation, words
        The relation (``"all"``: every one), and how many words with it the reported half holds.
    layer, head, direction
        The head, and whether a word's governor is the word that it attends to most (``"to governor"``) or that attends to it most (``"from governor"``).
    uas, stderr
        Share of the words that are attached to their governor; its standard error over sentences.
    offset, offset_uas
        The best fixed offset (the governor stands so many words behind; negative: before), and its share.
    p_value
        One-sided, of H0 "the head attaches no more words rightly than the offset", paired by sentence; Holm's correction over all relations;
        no smaller than n equal signs show, 1 / 2^n for n sentences.
    """

    relation: str
    words: int
    layer: int
    head: int
    direction: str
    uas: float
    stderr: float
    offset: int
    offset_uas: float
    p_value: float

    @property
    def name(self) -> str:
        """Such as ``"L1H0"``."""
        return f"L{self.layer}H{self.head}"


@dataclass(frozen=True, eq=False, repr=False)
class DependencyHeads(Result):
    """The result of :func:`dependency_heads`; numbers by head run over [layer][head] and are those of the reported half.

    Attributes
    ----------
    attachments
        One for each relation that is frequent enough, and for all together, which stands first.
    to_governor, from_governor
        Unlabelled attachment score (UAS): share of the words, roots left out, that are attached to their governor; in [0, 1].
    undirected
        Share of the words whose most attended word is their governor or has them for its own: either direction counts.
    chance
        What a word attached to another at random has on average: the mean of 1 / (number of other words).
    layers
        The layers' numbers.
    tree, tree_stderr, adjacent
        Share of the trees' edges, without direction, in the maximum spanning tree of the attention (both directions added) of the first attachment's
        head; its standard error over sentences; and the share of edges between neighbours, which is what a chain of all words holds.
    """

    KIND = "dependency heads"
    WORKS = ("clark2019", "htut2019")

    attachments: tuple[Attachment, ...]
    layers: tuple[int, ...]
    to_governor: ByHead
    from_governor: ByHead
    undirected: ByHead
    chance: float
    tree: float
    tree_stderr: float
    adjacent: float

    def of(self, relation: str = ALL) -> Attachment:
        """The attachment of a relation.

        Raises
        ------
        CausalProbeError
            If the relation is not there.
        """
        found = next((each for each in self.attachments if each.relation == relation), None)
        if found is None:
            known = ", ".join(each.relation for each in self.attachments)
            raise CausalProbeError(f"There is no relation {relation!r} with enough words; there is {known}.")
        return found

    @property
    def methods(self) -> str:
        """One sentence for a methods section."""
        best = self.attachments[0]
        return (
            f"Each word was attached to the word that it attends to most, or that attends to it most, by every head of {self.provenance['model']}; the "
            f"head was chosen on half of {self.settings['n_sentences']} sentences and reported on the other half ({best.name}, UAS {best.uas:.3f}), "
            f"beside the best fixed offset ({best.offset:+d}, {best.offset_uas:.3f}), one-sided t-tests over sentences, Holm-corrected "
            f"({self.measured_with})."
        )

    def table(self) -> Table:
        """One row per relation, the most frequent first."""
        best = self.attachments[0]
        return Table(
            f"DependencyHeads of {self.provenance['model']}: {self.settings['n_sentences']} sentences, half of them reported",
            ("relation", "words", "head", "direction", "uas", "stderr", "offset", "offset uas", "p_value"),
            [(each.relation, each.words, each.name, *each[4:]) for each in self.attachments],
            (
                f"a word attached at random: {self.chance:.3f}",
                f"maximum spanning tree of {best.name}: {self.tree:.3f} ± {self.tree_stderr:.3f} of the edges, without direction; a chain of all words {self.adjacent:.3f}",
            ),
        )


@probe
def dependency_heads(
    model: HookedModel, treebank: Any, *, least_words: Count = 20, batch_size: BatchSize = None
) -> DependencyHeads:
    """Which heads attach words to their governors, by relation, beside the best fixed offset.

    Attention between words is that of :mod:`causal_probe.syntax.words`; a word's attention on itself is left out. Ties share the credit; a word that
    attends to no other gets none. In a causal model a word sees only words before it: a governor behind is found from the governor alone.
    Roots have no governor and are not counted.

    Parameters
    ----------
    model
        A model with a fast tokenizer and TransformerLens' hook points, encoder or decoder.
    treebank
        A CoNLL-U file (:func:`read_conllu`), or sentences ``(words, governors, relations)``, governors numbered from 0, -1 for the root.
    least_words
        Relations with fewer words in either half, or in one sentence only, are not reported.
    batch_size
        Sentences in a forward pass, all of one length in tokens.

    Raises
    ------
    CausalProbeError
        If the sentences are no trees, there are fewer than four, or the model's tokenizer does not say which characters a token stands for.

    References
    ----------
    Clark et al., "What does BERT look at?", BlackboxNLP 2019. Htut et al., "Do attention heads in BERT track syntactic dependencies?", 2019.

    Examples
    --------
    >>> from tokenizers import Tokenizer, models, pre_tokenizers
    >>> from transformers import PreTrainedTokenizerFast
    >>> from causal_probe.models import DisentangledTransformer
    >>> fast = Tokenizer(models.WordLevel({"old": 0, "red": 1, "dog": 2, "cat": 3}, unk_token="old"))
    >>> fast.pre_tokenizer = pre_tokenizers.Whitespace()
    >>> model = DisentangledTransformer(d_vocab=4, n_positions=3, heads=(1,))
    >>> model.block(0, 0, query="token", key="token")[2:, :2] = 30      # nouns attend to adjectives
    >>> model.tokenizer = PreTrainedTokenizerFast(tokenizer_object=fast)
    >>> sentences = [((adjective, noun), (1, -1), ("amod", "root")) for adjective in ("old", "red") for noun in ("dog", "cat")]
    >>> best = dependency_heads(model, sentences).of("all")
    >>> best.name, best.direction, best.uas
    ('L0H0', 'from governor', 1.0)
    """
    sentences = as_sentences(treebank)
    tokenized = tokenize(getattr(model, "tokenizer", None), sentences, longest=context_length(model))
    words = _Words(sentences)
    hits = _attach(model, tokenized, sentences, words, batch_size)
    layers = sorted(hits)
    every = np.concatenate([hits[layer] for layer in layers])  # [head of all layers, direction and undirected, word]
    places = [(layer, head) for layer in layers for head in range(len(hits[layer]))]
    chosen = words.sentence % 2 == 0
    relations = [ALL, *sorted(set(words.relation), key=lambda name: (-np.sum(words.relation == name), name))]
    rows, differences = [], {}
    for relation in relations:
        its = np.ones(len(chosen), bool) if relation == ALL else words.relation == relation
        one, other = its & chosen, its & ~chosen
        if relation != ALL and (min(one.sum(), other.sum()) < least_words or len(set(words.sentence[other])) < 2):
            continue
        flat = int(every[:, :2, one].mean(2).argmax())
        index, direction = divmod(flat, 2)
        offset = max(OFFSETS, key=lambda each: float((words.offset[one] == each).mean()))
        head, fixed = every[index, direction, other], (words.offset[other] == offset).astype(float)
        uas, stderr = _share(head, words.sentence[other])
        differences[relation] = (*_share(head - fixed, words.sentence[other]), len(np.unique(words.sentence[other])))
        rows.append(
            (
                relation,
                int(other.sum()),
                *places[index],
                DIRECTIONS[direction],
                uas,
                stderr,
                offset,
                float(fixed.mean()),
            )
        )
    tested = corrected(differences, above=0.0)
    attachments = tuple(
        Attachment(*row, max(tested[row[0]].p_value, least_p_value(differences[row[0]][2]))) for row in rows
    )
    report = every[:, :, ~chosen].mean(2)
    sizes = np.cumsum([len(hits[layer]) for layer in layers])[:-1]
    by_kind = [tuple(tuple(part.tolist()) for part in np.split(report[:, kind], sizes)) for kind in range(3)]
    tree, tree_stderr = _spanning_tree(model, tokenized, sentences, attachments[0], batch_size)
    return DependencyHeads(
        attachments=Rows(attachments),
        layers=tuple(layers),
        to_governor=by_kind[0],
        from_governor=by_kind[1],
        undirected=by_kind[2],
        chance=float((1 / (words.length[~chosen] - 1)).mean()),
        tree=tree,
        tree_stderr=tree_stderr,
        adjacent=float((abs(words.offset[~chosen]) == 1).mean()),
        settings={"n_sentences": len(sentences), "least_words": least_words},
        provenance=describe(model),
    )


def as_sentences(treebank: Any) -> tuple[Sentence, ...]:
    """The sentences of two words or more of a treebank in any of the forms of :func:`dependency_heads`."""
    if isinstance(treebank, (str, bytes)) or hasattr(treebank, "__fspath__"):
        found = read_conllu(treebank)
    else:
        try:
            found = tuple(Sentence(*(tuple(part) for part in each)) for each in treebank)
        except TypeError as error:
            raise CausalProbeError(
                "A treebank is a CoNLL-U file, or a list of (words, governors, relations), three lists of one length each."
            ) from error
        for number, sentence in enumerate(found, 1):
            check_sentence(sentence, f"Sentence {number}")
    found = tuple(sentence for sentence in found if len(sentence.words) > 1)
    if len(found) < 4:
        raise CausalProbeError(
            f"A head is chosen on one half of the sentences and reported on the other, which takes four sentences of two words or more; there are {len(found)}."
        )
    return found


class _Words:
    """Of every word that has a governor: its sentence, relation, distance to the governor, and the sentence's number of words."""

    def __init__(self, sentences: Sequence[Sentence]) -> None:
        rows = [
            (number, relation, governor - word, len(words))
            for number, (words, governors, relations) in enumerate(sentences)
            for word, (governor, relation) in enumerate(zip(governors, relations, strict=True))
            if governor >= 0
        ]
        sentence, relation, offset, length = zip(*rows, strict=True)
        self.sentence, self.relation = np.array(sentence), np.array(relation)
        self.offset, self.length = np.array(offset), np.array(length)
        self.first = np.searchsorted(self.sentence, np.arange(len(sentences) + 1))


class _BetweenWords:
    """By layer and sentence, what :func:`between_words` gives is turned into something small while a group of sentences passes."""

    def __init__(self, group: Sequence[int], tokenized: Sequence[Tokenized], small: Any) -> None:
        self.group, self.tokenized, self.small = group, tokenized, small
        self.found: dict[int, dict[int, Any]] = defaultdict(dict)
        self._begin = self._size = 0

    def start(self, tokens: Int[Tensor, "batch pos"]) -> None:
        self._size = len(tokens)

    def reduce(self, layer: int, *values: Tensor) -> list[Any]:
        (pattern,) = values
        numbers = self.group[self._begin : self._begin + len(pattern)]
        exact = pattern.to(torch.promote_types(pattern.dtype, torch.float32))
        return [
            self.small(number, between_words(each, self.tokenized[number].word_of).cpu())
            for number, each in zip(numbers, exact, strict=True)
        ]

    def add(self, reduced: Mapping[int, list[Any]]) -> None:
        for layer, new in reduced.items():
            self.found[layer].update(zip(self.group[self._begin : self._begin + len(new)], new, strict=True))
        self._begin += self._size


def _run(
    model: HookedModel, tokenized: Sequence[Tokenized], small: Any, batch_size: int | None, layers: Any = None
) -> dict[int, dict[int, Any]]:
    """By layer and sentence, what ``small(sentence, attention [head, word, word])`` makes of it."""
    groups = defaultdict(list)
    for number, each in enumerate(tokenized):
        groups[len(each.tokens)].append(number)
    found: dict[int, dict[int, Any]] = defaultdict(dict)
    for group in groups.values():
        tokens = torch.tensor([tokenized[number].tokens for number in group])
        for layer, its in record(
            model, tokens, _BetweenWords(group, tokenized, small), layers=layers, batch_size=batch_size
        ).found.items():
            found[layer].update(its)
    return found


def _attach(
    model: HookedModel,
    tokenized: Sequence[Tokenized],
    sentences: Sequence[Sentence],
    words: _Words,
    batch_size: int | None,
) -> dict[int, Float[np.ndarray, "head kind word"]]:
    """By layer, the credit of each head for each word that has a governor: to the governor, from it, undirected."""
    found = _run(
        model, tokenized, lambda number, attention: _credit(attention, sentences[number].governors), batch_size
    )
    return {
        layer: np.concatenate([its[number] for number in range(len(sentences))], axis=2) for layer, its in found.items()
    }


def _credit(
    attention: Float[Tensor, "head word other"], governors: Sequence[int]
) -> Float[np.ndarray, "head kind dependent"]:
    """For each word that has a governor: 1 if the head attaches it rightly, a share where several words tie."""
    children = [word for word, governor in enumerate(governors) if governor >= 0]
    theirs = [governors[word] for word in children]
    attention = attention.double().clone()
    attention.diagonal(dim1=1, dim2=2).fill_(0)
    linked = torch.zeros(attention.shape[1:], dtype=torch.bool)
    linked[children, theirs] = linked[theirs, children] = True
    out, into = _leading(attention), _leading(attention.transpose(1, 2))
    kinds = out[:, children, theirs], into[:, children, theirs], (out * linked).sum(2)[:, children]
    return torch.stack(kinds, 1).numpy()


def _leading(attention: Float[Tensor, "head word other"]) -> Float[Tensor, "head word other"]:
    """1 at each row's maximum, shared by ties; 0 in a row of zeros."""
    largest = attention.amax(2, keepdim=True)
    ties = (attention >= largest * (1 - TIE)) & (largest > 0)
    return ties.double() / ties.sum(2, keepdim=True).clamp(min=1)


def _share(values: Float[np.ndarray, " word"], sentence: Int[np.ndarray, " word"]) -> tuple[float, float]:
    """The mean over words, and its standard error over sentences, which are what is independent."""
    mean = float(values.mean())
    sums = np.bincount(sentence, values - mean)[np.unique(sentence)]
    n = len(sums)
    return mean, float(np.sqrt(n / (n - 1) * np.square(sums).sum()) / len(values)) if n > 1 else float("nan")


def _spanning_tree(
    model: HookedModel,
    tokenized: Sequence[Tokenized],
    sentences: Sequence[Sentence],
    best: Attachment,
    batch_size: int | None,
) -> tuple[float, float]:
    """The share of edges, without direction, that a head's maximum spanning tree holds, on the reported half."""
    reported = range(1, len(sentences), 2)

    def right(number: int, attention: Tensor) -> list[float]:
        both = (attention[best.head] + attention[best.head].T).double()
        graph = nx.Graph()
        for a, b in itertools.combinations(range(len(both)), 2):
            graph.add_edge(a, b, weight=float(both[a, b]))
        tree = nx.maximum_spanning_tree(graph)
        return [float(tree.has_edge(w, g)) for w, g in enumerate(sentences[reported[number]].governors) if g >= 0]

    found = _run(model, [tokenized[number] for number in reported], right, batch_size, [best.layer])[best.layer]
    values = np.concatenate([found[number] for number in range(len(reported))])
    return _share(values, np.repeat(np.arange(len(reported)), [len(found[n]) for n in range(len(reported))]))
