"""A program written into the residual stream of a standard transformer, and the truth about its edges.

Every source has a subspace of its own, in which it writes its variable one-hot: a vector of length 1 whatever the symbol. So the length of the stream
depends on the layer alone, and RMSNorm multiplies by a known number, which the reading weights take back: with norms the model computes the same.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Mapping
from functools import partial

import networkx as nx
import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor

from causal_probe.circuits.known import CONTRASTS, MOST_SEQUENCES, Edge, KnownCircuit
from causal_probe.circuits.program import Component, Gate, Match, Offset, Pointer, Program, Table
from causal_probe.circuits.turning import random_rotation, turn
from causal_probe.errors import CausalProbeError
from causal_probe.models.standard import EPS, MLP, Attention, RMSNorm, StandardTransformer

__all__ = ["plant"]

#: The difference of two scores that decides: e^-60 is nothing beside 1 in both precisions.
DECIDES = 60.0
#: How many sequences say whether a variable depends on the tokens.
LOOKED_AT = 64

Scored = Callable[[Mapping[str, Tensor]], Bool[Tensor, "n pos"]]


def plant(
    name: str,
    program: Program,
    *,
    description: str,
    norm: bool = False,
    rotation: torch.Generator | None = None,
    scored: Scored | None = None,
    redundant: Mapping[Edge, tuple[Edge, ...]] | None = None,
    dtype: torch.dtype = torch.float32,
) -> KnownCircuit:
    """Write a program into a transformer.

    Parameters
    ----------
    name, description
        Of the circuit.
    program
        What is computed.
    norm
        Whether the model has RMSNorm, with random gains where it is rotated.
    rotation
        Turns the stream by a random rotation drawn from this generator; None leaves the variables on its axes.
    scored
        From all variables to the positions whose answers count; None: from position 2 on. A sequence is drawn again until one counts.
    redundant
        By edge, those without which its effect is seen (:class:`~causal_probe.circuits.KnownCircuit`).

    Returns
    -------
    circuit
        Its metric is, on the mean over the scored positions, the right answer's logit minus the mean of the others'.

    Examples
    --------
    >>> program = Program(4, 6, {"L0H0": Offset(2, "embed")}, "L0H0")
    >>> circuit = plant("two-back", program, description="The token two back.")
    >>> sorted(circuit.truth.edges)
    [('L0H0', 'logits'), ('embed', 'L0H0.v'), ('pos_embed', 'L0H0.k'), ('pos_embed', 'L0H0.q')]
    >>> circuit.model(torch.tensor([[3, 1, 2, 0]])).argmax(-1)
    tensor([[3, 3, 3, 1]])
    """
    model = _model(name, program, norm=norm, rotation=rotation, dtype=dtype)
    tokens = torch.randint(
        program.d_vocab, (LOOKED_AT, program.n_positions), generator=torch.Generator().manual_seed(0)
    )
    held = program.run(tokens)
    truth = nx.DiGraph(name=name, gates=_gates(program), exact=("resample",) if norm else CONTRASTS)
    for source, receiver in program.edges():
        positional = bool((held[source] == held[source][:1]).all())
        truth.add_edge(
            source,
            receiver,
            kind="positional" if positional else "token",
            contrast=tuple(each for each in CONTRASTS if not positional or each != "mean-by-position"),
            redundant_with=(redundant or {}).get((source, receiver), ()),
        )
    scored = _from_two if scored is None else scored
    return KnownCircuit(
        name,
        model,
        truth,
        (),
        partial(_sample, program, scored),
        partial(_metric, program, scored),
        description,
        partial(_every, program, scored) if program.d_vocab**program.n_positions <= MOST_SEQUENCES else None,
    )


def _from_two(held: Mapping[str, Tensor]) -> Bool[Tensor, "n pos"]:
    return held["pos_embed"] >= 2


def _sample(program: Program, scored: Scored, n: int, generator: torch.Generator) -> Int[Tensor, "n pos"]:
    """Tokens drawn evenly, each sequence with a position that counts."""
    found: list[Tensor] = []
    missing = n
    for _ in range(100):
        tokens = torch.randint(program.d_vocab, (max(4 * missing, 16), program.n_positions), generator=generator)
        kept = tokens[scored(program.run(tokens)).any(-1)][:missing]
        found.append(kept)
        missing -= len(kept)
        if not missing:
            return torch.cat(found)
    raise CausalProbeError(
        f"Of {100 * 16} sequences or more, fewer than {n} have a position that counts: `scored` is too strict."
    )


def _every(program: Program, scored: Scored) -> Int[Tensor, "n pos"]:
    """All sequences with a position that counts."""
    tokens = torch.cartesian_prod(*[torch.arange(program.d_vocab)] * program.n_positions)
    tokens = tokens.reshape(-1, program.n_positions)
    return tokens[scored(program.run(tokens)).any(-1)]


def _metric(
    program: Program, scored: Scored, logits: Float[Tensor, "n pos d_out"], tokens: Int[Tensor, "n pos"]
) -> Float[Tensor, " n"]:
    held = program.run(tokens.cpu())
    right = held[program.output].to(logits.device)[..., None]
    mask = scored(held).to(logits)
    own = logits.gather(-1, right)[..., 0]
    others = (logits.sum(-1) - own) / (logits.shape[-1] - 1)
    return ((own - others) * mask).sum(-1) / mask.sum(-1).clamp(min=1)


def _gates(program: Program) -> dict[str, list[tuple[str, tuple[str, ...]]]]:
    found: dict[str, list[tuple[str, tuple[str, ...]]]] = {"or": [], "and": []}
    for name, component in program.components.items():
        if isinstance(component, Gate):
            found[component.kind].append((name, component.inputs))
    return found


# --------------------------------------------------------------------------------------------------------------- weights


def _place(name: str) -> tuple[int, int | None]:
    """Layer and head of a component; no head of an MLP."""
    match = re.fullmatch(r"L(\d+)(?:H(\d+)|\.mlp)", name)
    if match is None:
        raise CausalProbeError(f"A component is named 'L0H1' or 'L0.mlp'; found {name!r}.")
    return int(match[1]), None if match[2] is None else int(match[2])


def _model(
    name: str, program: Program, *, norm: bool, rotation: torch.Generator | None, dtype: torch.dtype
) -> StandardTransformer:
    sizes = program.sizes()
    ends = torch.tensor(list(sizes.values())).cumsum(0).tolist()
    at = {source: slice(end - size, end) for (source, size), end in zip(sizes.items(), ends, strict=True)}
    d_model = ends[-1]
    places = {each: _place(each) for each in program.components}
    heads = [head for _, head in places.values() if head is not None]
    hidden = {each: _hidden(c, sizes) for each, c in program.components.items() if isinstance(c, (Table, Gate))}
    widest = max([*(sizes[s] for c in program.components.values() for its in c.reads().values() for s in its), 1])
    model = StandardTransformer(
        program.d_vocab,
        program.n_positions,
        d_model=d_model,
        n_layers=1 + max(layer for layer, _ in places.values()),
        n_heads=1 + max(heads, default=0),
        d_head=widest + program.n_positions + 1,
        d_mlp=max(len(each[1]) for each in hidden.values()) if hidden else None,
        norm=norm,
        d_out=sizes[program.output],
        name=name,
        dtype=dtype,
    )
    with torch.no_grad():
        model.W_E[:, at["embed"]].fill_diagonal_(1)
        model.W_pos[:, at["pos_embed"]].fill_diagonal_(1)
        for each, component in program.components.items():
            layer, head = places[each]
            block = model.blocks[layer]
            if isinstance(component, (Table, Gate)):
                inputs, biases, outputs, constant = hidden[each]
                mlp: MLP | None = block.mlp
                assert mlp is not None
                for source, rows in inputs.items():
                    mlp.W_in[at[source], : len(biases)] += rows.to(dtype)
                mlp.b_in[: len(biases)] = biases
                mlp.W_out[: len(biases), at[each]] = outputs.to(dtype)
                mlp.b_out[at[each]] = constant.to(dtype)
            elif head is not None:
                _set_head(block.attn, head, component, at, program.n_positions)
                # z W_O: the copied symbol, in the head's own subspace.
                block.attn.W_V[head, at[component.value], : sizes[each]].fill_diagonal_(1)
                block.attn.W_O[head, : sizes[each], at[each]].fill_diagonal_(1)
        model.W_U[at[program.output]].fill_diagonal_(1)
        if rotation is not None:
            turn(model, random_rotation(model.cfg.d_model, rotation))
        if norm:
            _take_norms_back(model, places, rotation)
    return model


def _set_head(attn: Attention, head: int, component: Component, at: Mapping[str, slice], n: int) -> None:
    """Queries and keys; ``n`` is the number of positions."""
    W_Q, W_K = attn.W_Q[head], attn.W_K[head]
    position = at["pos_embed"]
    if isinstance(component, Offset):
        # score(i, j) = DECIDES [j = max(i - back, 0)]
        for i in range(n):
            W_Q[position.start + i, max(i - component.back, 0)] = 1
        W_K[position, :n].fill_diagonal_(DECIDES)
    elif isinstance(component, Pointer):
        # score(i, j) = DECIDES [j = A_i + shift]
        for i in range(n):
            if 0 <= i + component.shift < n:
                W_Q[at[component.query].start + i, i + component.shift] = 1
        W_K[position, :n].fill_diagonal_(DECIDES)
    elif isinstance(component, Match):
        # score(i, j) = M [A_i = B_j] - X [i = j] + DECIDES j, where a match counts for more than all positions, and itself for less than any.
        # The last term's query is sum_a [A_i = a] = 1.
        match, itself = DECIDES * (n + 1), 3 * DECIDES * (n + 1)
        query, key = at[component.query], at[component.key]
        size = min(query.stop - query.start, key.stop - key.start)
        W_Q[query, :size].fill_diagonal_(1)
        W_K[key, :size].fill_diagonal_(match)
        W_Q[position, size : size + n] += torch.eye(n).to(W_Q)
        W_K[position, size : size + n] += -itself * torch.eye(n).to(W_K)
        W_Q[query, size + n] = 1
        W_K[position, size + n] = DECIDES * torch.arange(n).to(W_K)


def _hidden(component: Table | Gate, sizes: Mapping[str, int]) -> tuple[dict[str, Tensor], Tensor, Tensor, Tensor]:
    """Of an MLP: by source, [symbol, unit]; the units' biases; [unit, output]; the output's bias.

    Each condition has a number u, and clip(u) = relu(u) - relu(u - 1) is 0 or 1, far from both kinks: what is written has the length 1 also where
    a norm is a little off.
    """
    if isinstance(component, Gate):
        n = len(component.inputs)
        # or: u = 2.5 n_holding - 1; and: u = 4 n_holding - (4 n - 2)
        slope, threshold = (2.5, -1.0) if component.kind == "or" else (4.0, 2.0 - 4 * n)
        inputs = {}
        for source in component.inputs:
            inputs[source] = torch.zeros(sizes[source], 2)
            inputs[source][component.symbol] = slope
        outputs = torch.tensor([[-1.0, 1.0], [1.0, -1.0]])
        return inputs, torch.tensor([threshold, threshold - 1]), outputs, torch.tensor([1.0, 0.0])
    table = torch.tensor(component.table)
    # u = 4 n_right - (4 n_inputs - 2), one for each entry of the table.
    entries = torch.cartesian_prod(*(torch.arange(size) for size in table.shape)).reshape(table.numel(), -1)
    n = len(entries)
    inputs = {}
    for number, source in enumerate(component.inputs):
        rows = 4.0 * torch.nn.functional.one_hot(entries[:, number], sizes[source]).T
        inputs[source] = rows.repeat(1, 2)
    bias = torch.full((n,), 2.0 - 4 * len(component.inputs))
    outputs = torch.nn.functional.one_hot(table.flatten(), component.n_out).float()
    return inputs, torch.cat([bias, bias - 1]), torch.cat([outputs, -outputs]), torch.zeros(component.n_out)


def _take_norms_back(
    model: StandardTransformer, places: Mapping[str, tuple[int, int | None]], rotation: torch.Generator | None
) -> None:
    """The reading weights over what the norm before them multiplies by: its gain, and the inverse root mean square of so many vectors of length 1."""
    d = model.cfg.d_model

    def undo(norm: RMSNorm | None, n_written: int, weights: list[Tensor]) -> None:
        if norm is None:
            return
        if rotation is not None:
            norm.w.copy_(0.5 + torch.rand(d, generator=rotation))
        factor = norm.w / (n_written / d + EPS) ** 0.5
        for weight in weights:
            weight.div_(factor[:, None])

    for layer, block in enumerate(model.blocks):
        before = 2 + sum(its < layer for its, _ in places.values())
        undo(block.ln1, before, [block.attn.W_Q, block.attn.W_K, block.attn.W_V])
        if block.mlp is not None:
            within = before + sum(its == layer and head is not None for its, head in places.values())
            undo(block.ln2, within, [block.mlp.W_in])
    undo(model.ln_final, 2 + len(places), [model.W_U])
