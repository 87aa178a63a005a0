"""RASP programs compiled by tracr into a standard transformer, and the truth about their edges from tracr's own spaces.

tracr gives every variable directions of its own in the stream, and says of each head and MLP which directions it reads and writes. Its weights are taken
over one to one, without norms; the truth follows by one rule, that of InterpBench: an edge is true if the source writes a direction that the receiver
reads, ``one`` (1 at every position) and BOS left out. Edges by way of these two alone are constant.

References
----------
Lindner et al., "Tracr: compiled transformers as a laboratory for interpretability", NeurIPS 2023.
Gupta et al., "InterpBench: semi-synthetic transformers for evaluating mechanistic interpretability techniques", NeurIPS 2024.
"""

from __future__ import annotations

import importlib.util
import itertools
import math
import warnings
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import networkx as nx
import torch
from jaxtyping import Float, Int
from torch import Tensor

from causal_probe.arguments import checked
from causal_probe.circuits.check_truth import parts_of
from causal_probe.circuits.known import CONTRASTS, MOST_SEQUENCES, KnownCircuit, order_of
from causal_probe.circuits.rasp_programs import PROGRAMS, RaspProgram
from causal_probe.errors import CausalProbeError
from causal_probe.models.standard import MLP, Attention, StandardTransformer

__all__ = ["compiled_circuit", "has_tracr"]

BOS, PAD = "BOS", "PAD"
#: Sequences that say whether a variable depends on the tokens.
LOOKED_AT = 64
#: A variable that varies by less is the same: rounding.
SAME = 1e-4


def has_tracr() -> bool:
    """Whether tracr is installed."""
    return importlib.util.find_spec("tracr") is not None


@checked
def compiled_circuit(
    name: str, program: RaspProgram | None = None, *, dtype: torch.dtype = torch.float32
) -> KnownCircuit:
    """Compile a program.

    Parameters
    ----------
    name
        One of ``PROGRAMS``; or the circuit's name, where ``program`` is given.
    program
        A program of one's own.
    dtype
        Of the weights.

    Returns
    -------
    circuit
        Its logits are the output's directions. Its metric, on the mean over the positions where RASP says what is right: of a categorical output, the right value's
        logit minus the mean of the others'; of a numerical one, minus the squared error.

    Raises
    ------
    CausalProbeError
        If tracr is not installed, or there is no such program.

    Examples
    --------
    >>> circuit = compiled_circuit("token-one-back")          # doctest: +SKIP
    >>> sorted(circuit.truth.edges)                           # doctest: +SKIP
    [('L0.mlp', 'L1H0.q'), ('L1H0', 'logits'), ('embed', 'L1H0.v'), ('pos_embed', 'L0.mlp'), ('pos_embed', 'L1H0.k')]
    """
    if program is None and name not in PROGRAMS:
        raise CausalProbeError(f"Unknown program {name!r}; choose from {', '.join(PROGRAMS)}.")
    if not has_tracr():
        raise CausalProbeError(
            "Programs are compiled by tracr, which is not installed: pip install 'causal-probe[tracr]'."
        )
    its = PROGRAMS[name] if program is None else program
    crafted = _craft(its)
    full = f"tracr-{name}"
    model = crafted.model(full, dtype)
    behaviour = _Behaviour(its, crafted)
    truth = nx.DiGraph(name=full, gates={"or": [], "and": []}, exact=CONTRASTS)
    constant = []
    with torch.no_grad():
        parts = parts_of(model, behaviour.sample(LOOKED_AT, torch.Generator().manual_seed(0)))
    for source, receiver, shared in crafted.edges():
        variables = sorted(shared - crafted.aside)
        if not variables:
            constant.append((source, receiver))
            continue
        kind = _kind(parts[source][:, 1:] @ crafted.onto(model, variables))
        reason = its.without_effect.get((source, receiver))
        contrasts: tuple[str, ...] = {
            "token": CONTRASTS,
            "positional": tuple(each for each in CONTRASTS if each != "mean-by-position"),
            "constant": ("zero",),
        }[kind]
        truth.add_edge(
            source,
            receiver,
            kind=kind,
            contrast=("zero",) if reason else contrasts,
            redundant_with=(),
            **({"without_effect": reason} if reason else {}),
        )
    return KnownCircuit(
        full,
        model,
        truth,
        tuple(constant),
        behaviour.sample,
        behaviour.metric,
        its.description,
        behaviour.every if behaviour.n_sequences <= MOST_SEQUENCES else None,
    )


def _kind(part: Float[Tensor, "batch pos d"]) -> str:
    """On what a variable depends: the tokens, the position alone, or nothing."""
    if float((part - part[:1]).abs().max()) > SAME:
        return "token"
    return "positional" if float((part - part[:, :1]).abs().max()) > SAME else "constant"


# ---------------------------------------------------------------------------------------------------------------- from tracr


def _craft(program: RaspProgram) -> _Crafted:
    """Run tracr's passes up to heads and MLPs over named directions."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # those of JAX and of the compiler are not about the program
        from tracr.compiler import (
            basis_inference,
            craft_graph_to_model,
            expr_to_craft_graph,
            nodes,
            rasp_to_graph,
            validating,
        )
        from tracr.craft import bases
        from tracr.rasp import rasp

        sop = program.make(rasp)
        problems = [f"{each.expr.name}: {each.reason}" for each in validating.static_validate(sop)]
        found = rasp_to_graph.extract_rasp_graph(sop)
        bos = bases.BasisDirection(rasp.tokens.label, BOS)
        try:
            basis_inference.infer_bases(found.graph, found.sink, set(program.vocab), program.n)
            expr_to_craft_graph.add_craft_components_to_rasp_graph(found.graph, bos_dir=bos)
            craft = craft_graph_to_model.craft_graph_to_model(found.graph, found.sources)
        except (NotImplementedError, TypeError, ValueError, AssertionError) as error:  # tracr raises each, by program
            reason = "; ".join(problems) or str(error) or type(error).__name__
            raise CausalProbeError(
                f"tracr can't compile this program: {reason}. Selections are of one Select each, of categorical keys and queries."
            ) from error
    # Heads and MLPs in the order attention, MLP, attention, ...; tracr leaves out those that are not needed.
    layers: list[tuple[list[Any], Any]] = []
    half = 0
    for block in craft.blocks:
        is_mlp = hasattr(block, "fst")
        half += half % 2 != is_mlp
        while len(layers) <= half // 2:
            layers.append(([], None))
        heads = layers[half // 2][0]
        layers[half // 2] = (heads, block) if is_mlp else ([*block.as_multi().heads()], None)
        half += 1
    tokens = {value: bases.BasisDirection(rasp.tokens.label, value) for value in (*program.vocab, BOS, PAD)}
    positions = [bases.BasisDirection(rasp.indices.label, i) for i in range(program.n)]
    output = list(found.sink[nodes.OUTPUT_BASIS])
    return _Crafted(sop, layers, tokens, positions, bases.BasisDirection("one"), output, bool(rasp.is_categorical(sop)))


@dataclass(frozen=True)
class _Crafted:
    """What tracr has made of a program: heads and MLPs by layer, and directions by what they hold."""

    sop: Any
    layers: Sequence[tuple[Sequence[Any], Any]]
    tokens: Mapping[Any, Any]
    positions: Sequence[Any]
    one: Any
    output: Sequence[Any]
    categorical: bool

    @property
    def aside(self) -> set[Any]:
        """The directions that are left out of the truth."""
        return {self.one, self.tokens[BOS]}

    def written(self) -> dict[str, set[Any]]:
        """By source, the directions that it writes."""
        found = {"embed": {*self.tokens.values(), self.one}, "pos_embed": set(self.positions)}
        for layer, (heads, mlp) in enumerate(self.layers):
            found |= {f"L{layer}H{h}": set(head.w_ov.output_space.basis) for h, head in enumerate(heads)}
            found |= {} if mlp is None else {f"L{layer}.mlp": set(mlp.snd.output_space.basis)}
        return found

    def read(self) -> dict[str, set[Any]]:
        """By receiver, the directions that it reads."""
        found: dict[str, set[Any]] = {}
        for layer, (heads, mlp) in enumerate(self.layers):
            for h, head in enumerate(heads):
                spaces = {"q": head.w_qk.left_space, "k": head.w_qk.right_space, "v": head.w_ov.input_space}
                found |= {f"L{layer}H{h}.{side}": set(space.basis) for side, space in spaces.items()}
            found |= {} if mlp is None else {f"L{layer}.mlp": set(mlp.fst.input_space.basis)}
        return {**found, "logits": set(self.output)}

    def edges(self) -> list[tuple[str, str, set[Any]]]:
        """Sources, receivers, and the directions that one writes and the other reads."""
        written = self.written()
        return [
            (source, receiver, shared)
            for receiver, reads in self.read().items()
            for source, writes in written.items()
            if order_of(source) < order_of(receiver) and (shared := reads & writes)
        ]

    def directions(self) -> dict[Any, int]:
        """The coordinate of each direction."""
        every = set().union(*self.written().values(), *self.read().values())
        return {direction: number for number, direction in enumerate(sorted(every))}

    def onto(self, model: StandardTransformer, directions: Sequence[Any]) -> Float[Tensor, "d_model n"]:
        """What takes the stream to some of its directions."""
        at = self.directions()
        return torch.eye(model.cfg.d_model, dtype=model.W_E.dtype)[:, [at[each] for each in directions]]

    def model(self, name: str, dtype: torch.dtype) -> StandardTransformer:
        """The transformer of these heads and MLPs."""
        at = self.directions()
        every = [head for heads, _ in self.layers for head in heads]
        mlps = [mlp for _, mlp in self.layers if mlp is not None]
        spaces = [
            len(s.basis)
            for h in every
            for s in (h.w_qk.left_space, h.w_qk.right_space, h.w_ov.input_space, h.w_ov.output_space)
        ]
        model = StandardTransformer(
            len(self.tokens),
            1 + len(self.positions),
            d_model=len(at),
            n_layers=len(self.layers),
            n_heads=max([1, *(len(heads) for heads, _ in self.layers)]),
            d_head=max([1, *spaces]),
            d_mlp=max(len(mlp.fst.output_space.basis) for mlp in mlps) if mlps else None,
            d_out=len(self.output),
            name=name,
            dtype=dtype,
        )

        def rows(space: Any) -> list[int]:
            return [at[direction] for direction in space.basis]

        def put(into: Tensor, here: list[int] | slice, there: list[int] | slice, matrix: Any) -> None:
            values = torch.as_tensor(matrix).to(into)
            if isinstance(here, slice):
                into[: len(values), there] = values
            else:
                into[here, : values.shape[1]] = values

        with torch.no_grad():
            for number, direction in enumerate(self.tokens.values()):
                model.W_E[number, at[direction]] = 1
                model.W_E[number, at[self.one]] = 1 if self.one in at else 0
            for number, direction in enumerate(self.positions):
                model.W_pos[1 + number, at[direction]] = 1
            for layer, (heads, mlp) in enumerate(self.layers):
                attn: Attention = model.blocks[layer].attn
                for h, head in enumerate(heads):
                    qk, ov = head.w_qk, head.w_ov
                    # score = (x onto left) matrix . (x onto right), value = (x onto input) matrix, written to output
                    put(attn.W_Q[h], rows(qk.left_space), slice(None), qk.matrix)
                    put(attn.W_K[h], rows(qk.right_space), slice(None), torch.eye(len(qk.right_space.basis)))
                    put(attn.W_V[h], rows(ov.input_space), slice(None), ov.matrix)
                    put(attn.W_O[h], slice(None), rows(ov.output_space), torch.eye(len(ov.output_space.basis)))
                its: MLP | None = model.blocks[layer].mlp
                if mlp is not None and its is not None:
                    put(its.W_in, rows(mlp.fst.input_space), slice(None), mlp.fst.matrix)
                    put(its.W_out, slice(None), rows(mlp.snd.output_space), mlp.snd.matrix)
            for number, direction in enumerate(self.output):
                model.W_U[at[direction], number] = 1
        model.row_shift = 0
        return model


class _Behaviour:
    """The sequences that a program is run on, and what is right, by RASP itself."""

    def __init__(self, program: RaspProgram, crafted: _Crafted) -> None:
        self.program, self.crafted = program, crafted
        self.values = list(program.vocab)
        self.bos = list(crafted.tokens).index(BOS)
        self.place = {direction.value: number for number, direction in enumerate(crafted.output)}
        self.known: dict[tuple[int, ...], list[Any]] = {}

    @property
    def n_sequences(self) -> int:
        """How many sequences there are."""
        size = len(self.values)
        return math.factorial(size) if self.program.repeated else size**self.program.n

    def every(self) -> Int[Tensor, "n pos"]:
        """All of them."""
        size, length = len(self.values), self.program.n
        if self.program.repeated:
            rows = torch.tensor(list(itertools.permutations(range(size)))).repeat(1, -(-length // size))[:, :length]
        else:
            rows = torch.cartesian_prod(*[torch.arange(size)] * length).reshape(-1, length)
        return torch.cat([torch.full((len(rows), 1), self.bos), rows], 1)

    def sample(self, n: int, generator: torch.Generator) -> Int[Tensor, "n pos"]:
        """BOS, then tokens drawn evenly, or a random order again and again."""
        length, size = self.program.n, len(self.values)
        if self.program.repeated:
            order = torch.rand(n, size, generator=generator).argsort(-1)
            tokens = order.repeat(1, -(-length // size))[:, :length]
        else:
            tokens = torch.randint(size, (n, length), generator=generator)
        return torch.cat([torch.full((n, 1), self.bos), tokens], 1)

    def right(self, tokens: Int[Tensor, "n pos"]) -> list[list[Any]]:
        """What RASP gives at each position behind BOS; None for nothing."""
        from tracr.rasp import causal_eval

        found = []
        for row in tokens[:, 1:].tolist():
            key = tuple(row)
            if key not in self.known:
                given = causal_eval.evaluate(self.crafted.sop, [self.values[each] for each in row])
                self.known[key] = list(given)
            found.append(self.known[key])
        return found

    def metric(self, logits: Float[Tensor, "n pos d_out"], tokens: Int[Tensor, "n pos"]) -> Float[Tensor, " n"]:
        """See :func:`compiled_circuit`."""
        right = self.right(tokens.cpu())
        logits = logits[:, 1:]
        if not self.crafted.categorical:
            wanted = torch.tensor([[0.0 if each is None else float(each) for each in row] for row in right])
            return -(logits[..., 0] - wanted.to(logits)).square().mean(-1)
        at = torch.tensor([[self.place.get(each, -1) for each in row] for row in right], device=logits.device)
        own = logits.gather(-1, at.clamp(min=0)[..., None])[..., 0]
        others = (logits.sum(-1) - own) / max(logits.shape[-1] - 1, 1)
        mask = (at >= 0).to(logits)
        return ((own - others) * mask).sum(-1) / mask.sum(-1).clamp(min=1)
