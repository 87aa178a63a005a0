"""Does a head's attention over graphs weigh them as the exact posterior does, or choose, or neither?

Where a sequence's graph is new and must be inferred, the best predictor weighs each graph's prediction by the graph's posterior probability. A head that
does so divides its attention among the parents that the graphs give a token as the posterior divides belief among the graphs.
"""

from __future__ import annotations

import operator
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Annotated, Any, TypeAlias

import networkx as nx
import numpy as np
import torch
from jaxtyping import Float, Int
from torch import Tensor

from causal_probe.arguments import BatchSize, Help, Position
from causal_probe.errors import CausalProbeError
from causal_probe.graphs import check_graph
from causal_probe.hooks.batches import probe
from causal_probe.hooks.check import HookedModel, describe
from causal_probe.hooks.record import Rows, record
from causal_probe.results import Result, Table

__all__ = ["PosteriorAlignment", "posterior_alignment"]

Entropy: TypeAlias = Annotated[float, Help("Least entropy of the posterior, in nats.", least=0.0)]
#: A head's number by layer.
ByHead = tuple[tuple[float, ...], ...]
#: Each graph's share of the attention is at least about this, so that the divergence is finite (at most 13.8 nats).
FLOOR = 1e-6


@dataclass(frozen=True, eq=False, repr=False)
class PosteriorAlignment(Result):
    """The result of :func:`posterior_alignment`; numbers run over [layer][head].

    Attributes
    ----------
    layers
        The layers' numbers.
    divergence, stderr
        Mean KL(posterior || shares of attention) in nats, and its standard error over sequences. 0: the head weighs the graphs as the posterior does.
    uniform
        The divergence of equal shares, in nats: the chance level.
    slope, slope_stderr
        Of the shares on the posterior, regressed through equal shares: 1 for the posterior itself, 0 for shares that don't depend on it, above 1 for a
        head that leans to the likeliest graph.
    mass
        Mean attention on the graphs' parents together, in [0, 1]. The shares of a head that hardly looks at any parent mean little.
    n_rows
        How many (sequence, row) pairs counted.
    """

    KIND = "posterior alignment"
    WORKS = ("dangelo2025",)

    layers: tuple[int, ...]
    divergence: ByHead
    stderr: ByHead
    uniform: float
    slope: ByHead
    slope_stderr: ByHead
    mass: ByHead
    n_rows: int

    @property
    def methods(self) -> str:
        """One sentence for a methods section."""
        return (
            f"The attention of each head of {self.provenance['model']} on the parents under {self.settings['graphs']} graphs, as shares, was compared "
            f"with the exact posterior of the graphs by KL divergence and by a regression slope, on {self.n_rows} rows where the posterior's entropy is "
            f"above {self.settings['least_entropy']:g} nats (row i read for node i + {self.settings['shift']}; {self.measured_with})."
        )

    def table(self) -> Table:
        """One row per head, the closest to the posterior first."""
        columns = (self.divergence, self.stderr, self.slope, self.slope_stderr, self.mass)
        rows: list[tuple[Any, ...]] = [
            (f"L{layer}H{head}", *numbers)
            for layer, *of_layer in zip(self.layers, *columns, strict=True)
            for head, numbers in enumerate(zip(*of_layer, strict=True))
        ]
        return Table(
            f"PosteriorAlignment of {self.provenance['model']}: {self.n_rows} rows, entropy above {self.settings['least_entropy']:g} nats",
            ("head", "divergence", "stderr", "slope", "slope_stderr", "mass"),
            sorted(rows, key=operator.itemgetter(1)),
            (f"equal shares: divergence {self.uniform:.4g}; row i is read for node i + {self.settings['shift']}",),
        )


@probe
def posterior_alignment(
    model: HookedModel,
    tokens: Any,
    graphs: Sequence[nx.DiGraph],
    posterior: Any,
    *,
    shift: Position = 0,
    burn_in: Position = 0,
    least_entropy: Entropy = 0.2,
    batch_size: BatchSize = None,
) -> PosteriorAlignment:
    """Compare each head's shares of attention on the graphs' parents with the posterior of the graphs.

    Row i counts where every graph gives node i + ``shift`` a parent, no two the same, and the posterior's entropy is above ``least_entropy``: where
    belief is settled, every head that looks at the right parent agrees.

    Parameters
    ----------
    model
        Any model with TransformerLens' hook points.
    tokens
        [sequence, pos].
    graphs
        Two graphs or more, edges parent -> child over positions.
    posterior
        [sequence, graph, node]: the probability of each graph given the tokens before each node, such as
        :meth:`causal_probe.tasks.GraphMixture.posterior` gives. Sums over graphs are 1.
    shift
        Row i is read for node i + ``shift``: 1 in a next-token model that looks up the parent of the token that it predicts.
    burn_in
        The first row that counts.
    least_entropy
        In nats.
    batch_size
        Sequences in a forward pass.

    Raises
    ------
    CausalProbeError
        If the shapes don't fit together, the posterior is none, fewer than two sequences have a row that counts, or an argument is out of range.

    References
    ----------
    D'Angelo, Croce & Flammarion, "Selective induction heads: how transformers select causal structures in context", ICLR 2025.

    Examples
    --------
    >>> from causal_probe import models, tasks
    >>> from causal_probe.probes.posterior_alignment import posterior_alignment
    >>> task = tasks.GraphMixture.of_lags((1, 2), n_positions=24, d_vocab=4)
    >>> batch = task.sample(32, tasks.generator(0, "alignment"))
    >>> model = models.selective_induction((1, 2), task.matrix, n_positions=24)
    >>> found = posterior_alignment(model, batch.tokens, task.graphs, task.posterior(batch.tokens), shift=1)
    >>> found.divergence[2][0] > found.uniform  # it bets everything on one lag, where the posterior hedges
    True
    """
    its = list(graphs)
    tokens = torch.cat([getattr(batch, "tokens", batch) for batch in tokens])
    belief = _checked(posterior, len(tokens), tokens.shape[1], len(its))
    rows, parents = _rows(its, tokens.shape[1], belief.shape[2], shift=shift, burn_in=burn_in)
    at_rows = belief[:, :, rows + shift]
    entropy = -(at_rows * np.log(np.maximum(at_rows, 1e-300))).sum(1)
    counts = entropy > least_entropy  # [sequence, row]
    if (there := int(counts.any(1).sum())) < 2:
        raise CausalProbeError(
            f"The posterior's entropy is above {least_entropy:g} nats in {'no sequence' if there == 0 else 'one sequence'} at a row that counts; "
            "two sequences are needed. Take an earlier `burn_in`, a smaller `least_entropy`, or more sequences."
        )
    arrays = record(model, tokens, _Shares(rows, parents, at_rows, counts), batch_size=batch_size).arrays()
    layers = tuple(sorted(layer for _, layer in arrays))
    n = counts.sum(1).astype(float)
    even = 1 / len(its)
    spread = (((at_rows - even) ** 2).sum(1) * counts).sum(1)
    if not spread.sum() > 1e-9 * n.sum():
        raise CausalProbeError(
            "The posterior gives all graphs the same probability at every row that counts; there is no slope."
        )
    kl, kl_error, slope, slope_error, mass = (list[tuple[float, ...]]() for _ in range(5))
    for layer in layers:
        divergence, product, looked = np.moveaxis(arrays["sums", layer], 2, 0)  # [sequence, head] each
        for values, errors, numbers, weights in ((kl, kl_error, divergence, n), (slope, slope_error, product, spread)):
            value, error = _ratio(numbers, weights)
            values.append(tuple(value.tolist()))
            errors.append(tuple(error.tolist()))
        mass.append(tuple((looked.sum(0) / n.sum()).tolist()))
    return PosteriorAlignment(
        layers=layers,
        divergence=tuple(kl),
        stderr=tuple(kl_error),
        uniform=float(((np.log(len(its)) - entropy) * counts).sum() / n.sum()),
        slope=tuple(slope),
        slope_stderr=tuple(slope_error),
        mass=tuple(mass),
        n_rows=int(n.sum()),
        settings={"graphs": len(its), "shift": shift, "burn_in": burn_in, "least_entropy": least_entropy},
        provenance=describe(model),
    )


class _Shares(Rows):
    """Of each sequence and head: the sums over rows of the divergence, of (share - even) (posterior - even), and of the attention on any parent."""

    def __init__(
        self,
        rows: Int[np.ndarray, " row"],
        parents: Int[np.ndarray, "graph row"],
        posterior: Float[np.ndarray, "sequence graph row"],
        counts: np.ndarray,
    ) -> None:
        super().__init__()
        self.rows, self.parents = torch.from_numpy(rows), torch.from_numpy(parents)
        self.posterior, self.counts = posterior, counts

    def reduce(self, layer: int, *values: Tensor) -> Mapping[str, Any]:
        """[sequence, head, 3]."""
        (pattern,) = values
        rows, parents = (each.to(pattern.device) for each in (self.rows, self.parents))
        attention = pattern[:, :, rows, parents].double().cpu().numpy()  # [sequence, head, graph, row]
        here = slice(self._n, self._n + len(attention))
        p, counts = self.posterior[here, None], self.counts[here, None]
        mass, even = attention.sum(2), 1 / p.shape[2]
        share = np.where(mass[:, :, None] > 0, attention / np.maximum(mass, 1e-300)[:, :, None], even)
        share = (share + FLOOR) / (1 + FLOOR / even)
        divergence = (p * (np.log(np.maximum(p, 1e-300)) - np.log(share))).sum(2)
        product = ((share - even) * (p - even)).sum(2)
        return {"sums": np.stack([(each * counts).sum(-1) for each in (divergence, product, mass)], -1)}


def _ratio(numbers: Float[np.ndarray, "sequence head"], weights: Float[np.ndarray, " sequence"]) -> tuple[Any, Any]:
    """The ratio of the sums, and its standard error by sequences (linearised)."""
    ratio = numbers.sum(0) / weights.sum()
    residual = numbers - ratio * weights[:, None]
    n = len(weights)
    return ratio, np.sqrt((residual**2).sum(0) * n / (n - 1)) / weights.sum()


def _checked(posterior: Any, n: int, n_positions: int, n_graphs: int) -> Float[np.ndarray, "sequence graph node"]:
    found = np.asarray(posterior.detach().cpu() if isinstance(posterior, Tensor) else posterior)
    if n_graphs < 2:
        raise CausalProbeError(f"A posterior is over two graphs or more; there {'is one' if n_graphs else 'are none'}.")
    if found.ndim != 3 or found.dtype.kind != "f" or found.shape[:2] != (n, n_graphs):
        raise CausalProbeError(
            f"`posterior` holds a probability for each of {n} sequences, {n_graphs} graphs and the nodes; found {found.dtype} of shape {list(found.shape)}."
        )
    if not (found >= 0).all() or not np.allclose(found.sum(1), 1, atol=1e-4):
        raise CausalProbeError(
            "`posterior` holds probabilities that sum to 1 over the graphs, at each node; these do not."
        )
    return found.astype(float)


def _rows(
    graphs: Sequence[nx.DiGraph], n_positions: int, n_nodes: int, *, shift: int, burn_in: int
) -> tuple[Int[np.ndarray, " row"], Int[np.ndarray, "graph row"]]:
    """The rows at whose node all graphs have a parent, no two the same, which the row can see; and these parents."""
    for graph in graphs:
        check_graph(graph)
    rows, parents = [], []
    for row in range(burn_in, min(n_positions, n_nodes - shift)):
        its = [list(graph.pred[row + shift]) if row + shift in graph else [] for graph in graphs]
        single = [each[0] for each in its if len(each) == 1 and each[0] <= row]
        if len(set(single)) == len(graphs):
            rows.append(row)
            parents.append(single)
    if not rows:
        raise CausalProbeError(
            f"At no row from {burn_in} on do all graphs give node (row + {shift}) one parent each, all different: nothing tells the graphs apart everywhere."
        )
    return np.array(rows), np.array(parents).T
