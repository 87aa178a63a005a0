"""The whole causal graph from one gradient.

At A1 = 0, A2 = beta I the reduced transformer has learnt nothing, and the gradient of its loss with respect to layer 0's pattern is
already the graph: to first order in beta, and for long sequences, entry (i, j) is beta / (S T) times

    g_ij = E_pi [ sum_{s', s} pi(s' | s) / mu(s') P(s_i = s', s_j = s) ] - 1,

which at the parent of i is the chi-square information, elsewhere no larger, and 0 for a root (Nichani, Damian & Lee 2024, arXiv
2402.14735, section 4; :mod:`causal_probe.tasks.information`). So the parent of i is the earlier j with the largest
entry. In short sequences a root's entries are not 0 (the loss divides by how often a state occurred, not by mu), and no
threshold on the gradient is derived from anything; whether i has a parent at all is therefore asked of the data, where the
transitions are known: an exact, anytime-valid test (:mod:`causal_probe.tasks.root_test`), in which every sequence is a bet on the
parent that led in the sequences before it. By the same bets, or by bets that the node is a root where it seems to be one, every node that could be
the parent is given up or not: an edge is claimed where nothing but the leading candidate is left, a root where nothing but "root" is. Where transitions are not known, nothing is decided.

Everything streams: one pass, and memory of 34 T^2 numbers.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from jaxtyping import Float, Int
from scipy import stats
from torch import Tensor
from torch.nn.functional import one_hot

from causal_probe.arguments import Count, checked
from causal_probe.errors import CausalProbeError
from causal_probe.first_gradient.result import GradientGraph
from causal_probe.first_gradient.stream import FIRST_BLOCK, GradientStream, blocks_stderr
from causal_probe.hooks.batches import apart, as_tensor
from causal_probe.models.reduced import first_gradient
from causal_probe.tasks import Batch, InContextMarkov
from causal_probe.tasks.markov import Targets
from causal_probe.tasks.root_test import (
    evidence_per_edge,
    evidence_per_root,
    log_bets,
    log_bets_against_rivals,
    surprise,
)
from causal_probe.tasks.stationary import stationary_distribution

__all__ = ["LEVEL", "gradient_graph", "gradient_graphs"]

#: Family-wise level at which a node is said to be no root.
LEVEL = 1e-3
#: Graphs that :func:`gradient_graphs` works on side by side, and sequences that it draws at once: about 64 MB.
SIDE_BY_SIDE = 64
DRAWN_AT_ONCE = 2**16
#: Most entries of the targets of one batch of given tokens, [batch, d_vocab]: 1 GiB, of which the gradient needs a few copies.
MAX_TARGETS = 2**28


@checked
def gradient_graph(
    batches: Any, *, d_vocab: Count | None = None, beta: float = 1.0, level: float = LEVEL
) -> GradientGraph:
    """Read the causal graph from one gradient of an untrained model.

    Parameters
    ----------
    batches
        One batch or an iterable of batches, all of one length. Either what :meth:`InContextMarkov.sample` of a tree task gives, whose
        transitions are known; or token sequences [batch, T + 1] of your own, whose last token is what came after the others:
        then parents are found, and whether a node has one is not decided.
    d_vocab
        Number of states; for your own tokens only. By default the largest of the first batch, plus one.
    beta
        Scale of A2.
    level
        Probability that any root is taken for a child, any child for a root, or any node for the parent of a child that has another.

    Raises
    ------
    CausalProbeError
        If there are no sequences, they differ in length or vocabulary or are too short (T < 3: no node has a node before it), tokens are not states,
        a batch has too many states for its size, a task has several parents (see :func:`gradient_slots`), or an argument is out of range.

    Examples
    --------
    >>> import torch
    >>> from causal_probe import graphs
    >>> task = InContextMarkov(graphs.from_parents([None, 0, 0, None, 2, 2, None, 4]), d_vocab=3)
    >>> found = gradient_graph(task.sample(4096, torch.Generator().manual_seed(0)))
    >>> sorted(found.graph.edges), found.status
    ([(0, 1), (0, 2), (2, 4), (2, 5), (4, 7)], 'edges')
    """
    study: _Study | None = None
    for given in apart(batches):
        tokens, target, pi = _unpack(given, d_vocab if study is None else study.d_vocab)
        if study is None:
            study = _Study(1, tokens.shape[1], target.shape[1], known=pi is not None, beta=beta, level=level)
        check_alike(
            tokens, target, pi is not None, n_positions=study.n_positions, d_vocab=study.d_vocab, known=study.known
        )
        study.add(tokens[None], target[None], None if pi is None else pi[None])
    if study is None or not study.stream.seen:
        raise CausalProbeError("There are no sequences. Give a batch of a task, or tokens [batch, T + 1].")
    return study.results()[0]


@checked
def gradient_graphs(
    tasks: Sequence[InContextMarkov],
    generators: Sequence[torch.Generator],
    *,
    n_sequences: int = 1024,
    targets: Targets = "soft",
    beta: float = 1.0,
    level: float = LEVEL,
) -> list[GradientGraph]:
    """:func:`gradient_graph` of many tasks of one shape, side by side: each result is that of its task alone, to rounding.

    Parameters
    ----------
    tasks
        Tree tasks that share T and d_vocab.
    generators
        The source of each task's sequences.
    n_sequences
        How many sequences each task gives.
    targets
        ``"soft"`` or ``"hard"``: see :meth:`InContextMarkov.sample`. The transitions are known either way.

    Raises
    ------
    CausalProbeError
        As :func:`gradient_graph`; or if the tasks differ in shape, or there are not as many generators.

    Examples
    --------
    >>> from causal_probe import graphs, tasks
    >>> task = tasks.InContextMarkov(graphs.chain(7), d_vocab=3, concentration=0.1)
    >>> [found] = gradient_graphs([task], [tasks.generator(0, "sequences")], n_sequences=1024)
    >>> sorted(found.graph.edges) == sorted(graphs.chain(7).edges)
    True
    """
    if len(tasks) != len(generators):
        raise CausalProbeError(f"{len(tasks)} tasks need as many generators; there are {len(generators)}.")
    if n_sequences < 1:
        raise CausalProbeError(f"At least one sequence is needed; n_sequences is {n_sequences}.")
    shapes = {(task.n_positions, task.d_vocab) for task in tasks}
    if len(shapes) > 1:
        raise CausalProbeError(f"The tasks must share T and d_vocab; theirs are {sorted(shapes)}.")
    found: list[GradientGraph] = []
    for start in range(0, len(tasks), SIDE_BY_SIDE):
        chunk = list(zip(tasks, generators, strict=True))[start : start + SIDE_BY_SIDE]
        for task, _ in chunk:
            _require_tree(task.is_tree)
        study = _Study(len(chunk), *shapes.copy().pop(), known=True, beta=beta, level=level)
        at_once = max(1, DRAWN_AT_ONCE // len(chunk))
        for drawn in range(0, n_sequences, at_once):
            n = min(at_once, n_sequences - drawn)
            batch = [task.sample(n, source, targets=targets) for task, source in chunk]
            tokens = torch.stack([its.tokens for its in batch])
            target = torch.stack([its.target for its in batch])
            study.add(tokens, target, torch.stack([its.tables[1] for its in batch]))
        found += study.results()
    return found


class _Study:
    """Sums over the batches, for several graphs side by side."""

    def __init__(self, graphs: int, n_positions: int, d_vocab: int, *, known: bool, beta: float, level: float) -> None:
        if n_positions < 3:
            raise CausalProbeError(
                f"Sequences of {n_positions} positions hold no pair of nodes: T must be at least 3, two nodes and the query."
            )
        check_scale_and_level(beta, level)
        self.n_positions, self.d_vocab, self.beta, self.level = n_positions, d_vocab, beta, level
        self.known = known
        self.stream = GradientStream(graphs, n_positions, scale=d_vocab * n_positions / beta)
        #: Only nodes after node 0 are asked about, and the query is no node.
        self.limit = surprise(level, n_positions - 2)
        self.log_e = torch.zeros(graphs, n_positions, dtype=torch.float64)
        #: [graph, child, rival]
        self.log_e_rivals = torch.zeros(graphs, n_positions, n_positions, dtype=torch.float64)
        self._earlier = torch.ones(n_positions, n_positions, dtype=torch.bool).tril(-1)
        self.edge_evidence = torch.zeros(graphs, dtype=torch.float64)
        self.root_evidence = torch.zeros(graphs, dtype=torch.float64)
        self.edge_chi2 = torch.zeros(graphs, dtype=torch.float64)
        self.candidates = self.stream.leading()
        self.parents = torch.full_like(self.candidates, -1)
        self.stable_after = torch.zeros(graphs, dtype=torch.long)

    def add(self, tokens: Tensor, target: Tensor, pi: Tensor | None) -> None:
        u, m = first_gradient(tokens, target, beta=self.beta)
        if pi is not None:
            flat = pi.flatten(0, 1)
            self.edge_evidence += evidence_per_edge(flat).reshape(pi.shape[:2]).sum(1)
            self.root_evidence += evidence_per_root(flat).reshape(pi.shape[:2]).sum(1)
            self.edge_chi2 += _edge_chi2(flat).reshape(pi.shape[:2]).sum(1)
        for piece in self.stream.pieces(tokens.shape[1]):
            if pi is not None:
                # The bet on these sequences is the parent that led in those before.
                bet = self.candidates[:, None].expand(-1, piece.stop - piece.start, -1)
                # Bets on a candidate lose where the node is a root: there the rivals are bet against as a root.
                roots = (self.log_e < 0)[:, None].expand_as(bet)
                self.log_e += log_bets(tokens[:, piece], pi[:, piece], bet).sum(1)
                against = log_bets_against_rivals(tokens[:, piece], pi[:, piece], bet, roots)
                states = one_hot(tokens[:, piece], self.d_vocab).to(against.dtype)
                for state in range(self.d_vocab):
                    self.log_e_rivals += against[..., state].mT @ states[..., state]
            self.stream.add(u[:, piece], m[:, piece])
            self.candidates = self.stream.leading()
            parents = self.candidates.masked_fill(~self._shown(), -1) if self.known else self.candidates
            changed = (parents != self.parents)[:, :-1].any(1)
            self.stable_after[changed] = self.stream.seen
            self.parents = parents

    def _shown(self) -> Tensor:
        """[graph, child]: nothing but the candidate is left, neither "it is a root" nor another earlier node."""
        left = (self.log_e_rivals <= self.limit) & self._earlier
        candidate = torch.arange(self.n_positions) == self.candidates[..., None]
        return (self.log_e > self.limit) & (left == candidate).all(-1)

    def results(self) -> list[GradientGraph]:
        n = self.n_positions - 1
        evidence, stderr = self.stream.mean[:, :n, :n], self.stream.stderr()
        margin, margin_stderr = self._margins(evidence)
        # What none of as many entries that are 0 would exceed.
        blocks = len(self.stream.block_means()[1])
        quantile = float(stats.t.isf(self.level / (n * (n - 1) / 2), df=max(1, blocks - 1)))
        bet_on = max(0.0, 1 - FIRST_BLOCK / self.stream.seen)  # there is no candidate yet in the first block
        return [
            GradientGraph(
                evidence=evidence[i].numpy(),
                stderr=None if stderr is None else stderr[i, :n, :n].numpy(),
                candidates=tuple(int(j) if j >= 0 else None for j in self.candidates[i, :n]),
                margin=margin[i],
                margin_stderr=margin_stderr[i],
                log_e_values=self.log_e[i, :n].numpy() if self.known else None,
                log_e_rivals=(self.log_e_rivals[i] * self._earlier)[:n, :n].numpy() if self.known else None,
                edge_value=float(self.edge_chi2[i] / self.stream.seen) if self.known else None,
                edge_evidence=bet_on * float(self.edge_evidence[i]) if self.known else None,
                root_evidence=bet_on * float(self.root_evidence[i]) if self.known else None,
                gradient_limits=None
                if stderr is None
                else quantile * (stderr[i] * self._earlier)[:n, :n].amax(1).numpy(),
                n_sequences=self.stream.seen,
                stable_after=int(self.stable_after[i]),
                settings={
                    "n_positions": self.n_positions,
                    "d_vocab": self.d_vocab,
                    "beta": self.beta,
                    "level": self.level,
                    "transitions": "known" if self.known else "unknown",
                },
            )
            for i in range(len(evidence))
        ]

    def _margins(self, evidence: Tensor) -> tuple[list[tuple[float | None, ...]], list[tuple[float | None, ...]]]:
        """Best minus second-best earlier position, by child, with the standard error of that difference."""
        n = evidence.shape[1]
        earlier = torch.ones(n, n, dtype=torch.bool).tril(-1)
        two = evidence.masked_fill(~earlier, float("-inf")).topk(2, dim=-1)
        means, sizes = self.stream.block_means()
        index = two.indices[:, None].expand(-1, means.shape[1], -1, -1)
        led = means[:, :, :n, :n].gather(-1, index)
        error = blocks_stderr(led[..., 0] - led[..., 1], sizes)
        margin = (two.values[..., 0] - two.values[..., 1]).tolist()
        errors = [[None] * n] * len(margin) if error is None else error.tolist()
        # Nodes 0 and 1 have no two earlier positions.
        return [(None, None, *row[2:]) for row in margin], [(None, None, *row[2:]) for row in errors]


def _edge_chi2(transition: Tensor) -> Tensor:
    """I_chi2 of an edge, for each transition matrix."""
    pi = transition.double()
    mu = stationary_distribution(pi)
    quotient = torch.where(mu[:, None] > 0, pi.square() / mu[:, None], 0)
    return ((mu[:, :, None] * quotient).sum((1, 2)) - 1).clamp(min=0)


def check_scale_and_level(beta: float, level: float) -> None:
    """Of a study of first gradients.

    Raises
    ------
    CausalProbeError
        If ``beta`` is not positive and finite, or ``level`` not between 0 and 1.
    """
    if not 0 < beta < float("inf"):
        raise CausalProbeError(f"beta must be positive and finite; it is {beta!r}.")
    if not 0 < level < 1:
        raise CausalProbeError(f"level must be between 0 and 1; it is {level!r}.")


def check_alike(
    tokens: Int[Tensor, "batch pos"],
    target: Float[Tensor, "batch d_vocab"],
    transitions: bool,
    *,
    n_positions: int,
    d_vocab: int,
    known: bool,
) -> None:
    """Whether a batch is like the first one, of ``n_positions`` tokens over ``d_vocab`` states, its transitions ``known`` or not.

    Raises
    ------
    CausalProbeError
        If it is not.
    """
    if tokens.shape[1] != n_positions:
        raise CausalProbeError(
            f"All sequences must be of one length; there are lengths {n_positions} and {tokens.shape[1]}."
        )
    if transitions != known:
        raise CausalProbeError("Batches with known transitions and without can't be mixed.")
    if target.shape[1] != d_vocab:
        raise CausalProbeError(
            f"All batches must have one vocabulary; there are batches over {d_vocab} and over {target.shape[1]} states."
        )


def _unpack(given: Any, d_vocab: int | None) -> tuple[Int[Tensor, "batch pos"], Tensor, Tensor | None]:
    """Tokens, target and transitions (None: not known) of a batch, on the CPU."""
    if isinstance(given, Batch):
        _require_tree(set(given.tables) == {1})
        return given.tokens.cpu(), given.target.cpu().float(), given.tables[1].cpu()
    return (*own_tokens(given, d_vocab), None)


def own_tokens(given: Any, d_vocab: int | None) -> tuple[Int[Tensor, "batch pos"], Tensor]:
    """A user's sequences [batch, T + 1] as checked tokens [batch, T] and one-hot targets [batch, d_vocab], on the CPU.

    Raises
    ------
    CausalProbeError
        If these are no whole numbers of that shape, there are none, a token is outside the vocabulary, or the targets would not fit
        into memory.
    """
    found = as_tensor(getattr(given, "tokens", given))
    if found is None:
        raise CausalProbeError(
            f"A {type(given).__name__} is no batch of sequences. Give a batch of a task, or whole numbers [batch, T + 1]."
        )
    tokens = found.cpu()
    if tokens.ndim != 2 or tokens.is_floating_point() or tokens.dtype == torch.bool:
        raise CausalProbeError(
            f"Tokens must be whole numbers of the shape [batch, T + 1]; these are {tokens.dtype} of the shape {list(tokens.shape)}."
        )
    if tokens.numel() == 0:
        raise CausalProbeError("There are no sequences. Give a batch of a task, or tokens [batch, T + 1].")
    tokens = tokens.long()
    low, high = (int(bound) for bound in torch.aminmax(tokens))
    states = max(2, high + 1) if d_vocab is None else d_vocab
    if low < 0 or high >= states:
        raise CausalProbeError(
            f"Token {low if low < 0 else high} is outside the vocabulary; states are 0 to {states - 1} "
            f"({'d_vocab' if low >= 0 else 'negative numbers are none'})."
        )
    if len(tokens) * states > MAX_TARGETS:
        raise CausalProbeError(
            f"A batch of {len(tokens):,} sequences over {states:,} states needs targets of {len(tokens) * states:,} entries; {MAX_TARGETS:,} are "
            "the most. Number the states that occur from 0 on"
            + (f", or give batches of at most {MAX_TARGETS // states:,} sequences." if states <= MAX_TARGETS else ".")
        )
    return tokens[:, :-1], torch.zeros(len(tokens), states).scatter_(1, tokens[:, -1:], 1.0)


def _require_tree(is_tree: bool) -> None:
    if not is_tree:
        raise CausalProbeError(
            "Some node has several parents: with the last token as the only query, one gradient shows the parents of one slot. "
            "Use gradient_slots, which asks at every position."
        )
