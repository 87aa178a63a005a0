"""The result of :func:`causal_probe.mechanisms.weight_graphs`."""

from __future__ import annotations

import dataclasses

import networkx as nx
import numpy as np
import pandas as pd
from jaxtyping import Float

from causal_probe.errors import CausalProbeError
from causal_probe.results import BINARY, Result, Table

__all__ = ["BlockGraph", "Circuit", "Direction", "WeightGraphs"]

#: A block takes part in a circuit if its ablation costs at least this share of the skill; and a token block compares states if its
#: correlation with the identity (up to its sign) is at least this.
TAKES_PART = 0.05
COMPARES = 0.8


@dataclasses.dataclass(frozen=True)
class Direction:
    """A block read as a graph, in one direction.

    Attributes
    ----------
    parents
        By child: the earlier position that leads; None for node 0 and in a tie. A block can't tell a root from a child.
    right, edges
        By parent slot: how many of the true edges have the leading position as their parent, and how many there are.
    children
        Number of nodes that have a parent.
    chance
        Expected number of right ones if each child's leading position were uniform over the earlier ones.
    p_value
        Probability of at least as many right ones then: the exact Poisson-binomial law.
    """

    parents: tuple[int | None, ...]
    right: tuple[int, ...]
    edges: tuple[int, ...]
    children: int
    chance: float
    p_value: float

    def __str__(self) -> str:
        if len(self.right) < 2:
            return f"{sum(self.right)}/{self.children}"
        return " + ".join(f"{right}/{edges}" for right, edges in zip(self.right, self.edges, strict=True))


@dataclasses.dataclass(frozen=True, eq=False)
class BlockGraph:
    """One block of a query-key matrix A.

    Attributes
    ----------
    layer, head, query, key
        Which one.
    matrix
        The block, [query part, key part].
    as_it_stands, transposed
        Read as a graph, A[child, parent] and A[parent, child]; None where it is none: a part holds tokens, the entries are masked
        (transposed, where the query part is ``position``), or no entry differs from another.
    identity
        Blocks of token by token: correlation with the identity, rows about their mean, in [-1, 1]. 1: attends to equal states;
        -1: to different ones. Chance is about 0. None for other blocks, and without spread.
    cost, stderr
        The rise of the loss when the block is set to zero, in nats, and its standard error over sequences, paired.
    share, share_stderr
        The cost over the in-context skill, and its standard error to first order. None without skill.
    scrambled, scrambled_stderr
        The same share, but of what the loss rises by when the block's rows are scrambled (:mod:`causal_probe.mechanisms.weight_graphs`), on
        average over 128 scrambles; the standard error is over these, each with sequences of its own. Above 1 where a wrong block
        is worse than in-context unigram. None without skill.
    alone, alone_stderr
        The share of the skill that is left when all other blocks of the layer, in all its heads, are set to zero. Chance level is
        that of a layer that is all zero: see the rows of blocks that are zero. None without skill.
    """

    #: Stated in JSON beside the fields.
    DERIVED = ("name", "norm")

    layer: int
    head: int
    query: str
    key: str
    matrix: Float[np.ndarray, "_query _key"] = dataclasses.field(metadata=BINARY)
    as_it_stands: Direction | None
    transposed: Direction | None
    identity: float | None
    cost: float
    stderr: float
    share: float | None
    share_stderr: float | None
    scrambled: float | None
    scrambled_stderr: float | None
    alone: float | None
    alone_stderr: float | None

    @property
    def name(self) -> str:
        """As in ``"L1H0 token x L0H0.token"``."""
        return f"L{self.layer}H{self.head} {self.query} x {self.key}"

    @property
    def norm(self) -> float:
        """Frobenius norm."""
        return float(np.linalg.norm(self.matrix))


@dataclasses.dataclass(frozen=True)
class Circuit:
    """A way of solving the task that the blocks show.

    Attributes
    ----------
    name
        ``"copy parents"`` (layer 0 holds the graph; layer 1 compares what it copied), ``"step to children"`` (layer 0 finds
        equal states; layer 1 holds the transposed graph), or ``"read other states"`` (layer 0 attends to states that differ
        from the query's; needs no graph).
    blocks
        The names of the blocks that it is made of.
    """

    name: str
    blocks: tuple[str, ...]

    def __str__(self) -> str:
        return f"{self.name} ({'; '.join(self.blocks)})"


@dataclasses.dataclass(frozen=True, eq=False, repr=False)
class WeightGraphs(Result):
    """Every block of every A, by falling ablation cost.

    Attributes
    ----------
    blocks
        See :class:`BlockGraph`.
    loss
        Of the model as it is, in nats.
    skill, skill_stderr
        The in-context skill: the loss of the in-context unigram predictor minus the model's, in nats, and its standard error,
        paired. At most the former.
    truth, children
        The true graph and the nodes over which blocks were compared with it.
    """

    KIND = "weight graphs"
    WORKS = ("nichani2024",)
    DERIVED = ("holders_by_name", "circuits")

    blocks: tuple[BlockGraph, ...]
    loss: float
    skill: float
    skill_stderr: float
    truth: nx.DiGraph
    children: tuple[int, ...]

    def block(self, layer: int, head: int, query: str, key: str) -> BlockGraph:
        """One block.

        Raises
        ------
        CausalProbeError
            If there is no such block.
        """
        for block in self.blocks:
            if (block.layer, block.head, block.query, block.key) == (layer, head, query, key):
                return block
        raise CausalProbeError(f"There is no block L{layer}H{head} {query} x {key}.")

    @property
    def holders(self) -> tuple[tuple[BlockGraph, bool], ...]:
        """The blocks that hold the graph, each with whether it is transposed; the smallest p-value first.

        A block holds it if more leading positions are true parents than chance gives, at the family-wise level (Holm, over all
        blocks and directions that are graphs). It need not be used: see ``cost``.
        """
        tested = [
            (direction.p_value, block, transposed)
            for block in self.blocks
            for transposed, direction in ((False, block.as_it_stands), (True, block.transposed))
            if direction is not None
        ]
        found = []
        for index, (p_value, block, transposed) in enumerate(sorted(tested, key=lambda row: row[0])):
            if p_value * (len(tested) - index) > self.settings["level"]:
                break
            found.append((block, transposed))
        return tuple(found)

    @property
    def holders_by_name(self) -> tuple[dict[str, str | bool], ...]:
        """:attr:`holders` as JSON states them."""
        return tuple({"block": block.name, "transposed": transposed} for block, transposed in self.holders)

    @property
    def circuits(self) -> tuple[Circuit, ...]:
        """The circuits that are known by name and shown by blocks of which each costs at least 5% of the skill when ablated.

        The rule is a description, no proof: that a circuit does what its name says is shown by editing it. None: either
        there is no skill, or it comes from something that has no name here.
        """
        at_work = [block for block in self.blocks if block.share is not None and block.share >= TAKES_PART]
        holding = {(block.name, transposed) for block, transposed in self.holders}

        def alike(block: BlockGraph, sign: int) -> bool:
            return block.identity is not None and sign * block.identity >= COMPARES

        copies = [b for b in at_work if b.layer == 0 and (b.name, False) in holding]
        compares = [
            b for b in at_work if b.layer == 1 and b.key.startswith("L0H") and b.key.count(".") == 1 and alike(b, 1)
        ]
        steps = [b for b in at_work if b.layer == 1 and b.query.startswith("L0H") and (b.name, True) in holding]
        finds, avoids = (
            [b for b in at_work if b.layer == 0 and b.query == b.key == "token" and alike(b, sign)] for sign in (1, -1)
        )
        found = [
            ("copy parents", [*copies, *compares] if copies and compares else []),
            ("step to children", [*finds, *steps] if finds and steps else []),
            ("read other states", avoids),
        ]
        return tuple(Circuit(name, tuple(b.name for b in blocks)) for name, blocks in found if blocks)

    def to_pandas(self) -> pd.DataFrame:
        """One row per block; undefined values are NaN."""
        names = ("share", "share_stderr", "scrambled", "scrambled_stderr", "alone", "alone_stderr", "cost", "stderr")

        def read(name: str, its: Direction | None) -> dict[str, object]:
            p_name = "p_value" if name == "edges" else f"{name}_p_value"
            return {name: None if its is None else str(its), p_name: None if its is None else its.p_value}

        return pd.DataFrame(
            [
                {"block": b.name}
                | {name: getattr(b, name) for name in names}
                | read("edges", b.as_it_stands)
                | read("transposed", b.transposed)
                | {"identity": b.identity, "norm": b.norm}
                for b in self.blocks
            ]
        )

    @property
    def undefined(self) -> dict[str, str]:
        """Why there is no share of the skill."""
        if all(b.share is not None for b in self.blocks):
            return {}
        return dict.fromkeys(
            ("share", "share_stderr", "scrambled", "scrambled_stderr", "alone", "alone_stderr"),
            "the model's loss is not surely below that of the in-context unigram",
        )

    @property
    def methods(self) -> str:
        """One sentence for a methods section."""
        s = self.settings
        return (
            "Every block of the query-key matrices of a disentangled transformer (Nichani et al., 2024) was read as a graph over "
            "positions (the earlier position with the largest entry, rows about their mean, in both directions), tested against "
            f"chance (Poisson-binomial, Holm, family-wise level {s['level']:g}), and set to zero; the rise of the loss is given as a "
            "share of the in-context skill, the loss of the in-context unigram predictor minus the model's (paired over "
            f"{s['n_sequences']:,} sequences; {self.measured_with})."
        )

    def table(self) -> Table:
        """The blocks, by falling cost, and where the graph lives."""
        rows = [
            (
                b.name,
                None if b.share is None else f"{b.share:.1%} ± {b.share_stderr:.1%}",
                None if b.scrambled is None else f"{b.scrambled:.1%} ± {b.scrambled_stderr:.1%}",
                None if b.alone is None else f"{b.alone:.1%}",
                f"{b.cost:.4f} ± {b.stderr:.4f}",
                b.as_it_stands,
                b.transposed,
                b.identity,
            )
            for b in self.blocks
        ]
        holders = [
            f"{b.name}: {'transposed graph ' if t else ''}{b.transposed if t else b.as_it_stands}{'' if t else ' edges'}"
            + ("" if b.share is None else f", {b.share:.1%} of the skill")
            for b, t in self.holders
        ]
        return Table(
            f"Blocks of the weights by the loss that their ablation costs: loss {self.loss:.4f}, in-context skill {self.skill:.4f} nats "
            f"({self.settings['n_sequences']:,} sequences)",
            ("block", "share of skill", "scrambled", "alone", "cost", "edges", "transposed", "identity"),
            rows,
            (
                f"the graph is written in: {'; '.join(holders) or 'no block'}",
                f"circuits by name: {'; '.join(map(str, self.circuits)) or 'none'}",
            ),
        )
