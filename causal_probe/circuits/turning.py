"""The same circuit in other coordinates of the stream: turned by a rotation, or compressed into fewer dimensions.

Let R be [d_model, new]. What writes to the stream writes W R, and what reads it reads R^T W. If R is a rotation, nothing else changes. If R has fewer columns,
directions overlap, and R is trained so that the model does the same: tracr's compression (one matrix for all layers, the model's own weights kept).
"""

from __future__ import annotations

import copy
from dataclasses import replace

import networkx as nx
import torch
from jaxtyping import Float
from torch import Tensor

from causal_probe.arguments import Count, checked
from causal_probe.circuits.known import KnownCircuit
from causal_probe.errors import CausalProbeError
from causal_probe.models.standard import StandardTransformer

__all__ = ["compressed", "random_rotation", "rotated", "turn"]


def random_rotation(d: int, generator: torch.Generator) -> Float[Tensor, "d d"]:
    """A rotation or reflection, evenly from all, in double precision."""
    q, r = torch.linalg.qr(torch.randn(d, d, generator=generator, dtype=torch.float64))
    rotation: Tensor = q * r.diagonal().sign()
    return rotation


def turn(model: StandardTransformer, R: Float[Tensor, "d_model d_model"]) -> None:
    """Every vector x of the stream becomes x R."""
    with torch.no_grad():
        for name, weight in model.named_parameters():
            if (turned := _turned(name, weight, R.to(weight))) is not None:
                weight.copy_(turned)


def _turned(name: str, weight: Tensor, R: Tensor) -> Tensor | None:
    """A weight that writes to the stream or reads from it, in the new coordinates; None of others."""
    kind = name.rpartition(".")[2]
    if kind in ("W_E", "W_pos", "W_O", "b_O", "W_out", "b_out"):
        return weight @ R
    return R.mT @ weight if kind in ("W_Q", "W_K", "W_V", "W_in", "W_U") else None


def _own(circuit: KnownCircuit) -> StandardTransformer:
    model = circuit.model
    if not isinstance(model, StandardTransformer) or model.ln_final is not None:
        raise CausalProbeError(
            f"{circuit.name} is turned as a StandardTransformer without norms; its model is a {type(model).__name__}"
            f"{' with norms, whose gains lie along the axes' if isinstance(model, StandardTransformer) else ''}."
        )
    return model


@checked
def rotated(circuit: KnownCircuit, seed: int = 0) -> KnownCircuit:
    """The same circuit with its stream turned by a random rotation: no figure of a method may depend on it.

    Raises
    ------
    CausalProbeError
        If its model has norms.

    Examples
    --------
    >>> from causal_probe.circuits import known_circuit
    >>> circuit = known_circuit("and-gate")
    >>> tokens = circuit.sample(4, torch.Generator().manual_seed(0))
    >>> turned = rotated(circuit)
    >>> bool(torch.allclose(turned.model(tokens), circuit.model(tokens), atol=1e-5))
    True
    """
    model = copy.deepcopy(_own(circuit))
    turn(model, random_rotation(model.cfg.d_model, torch.Generator().manual_seed(seed)))
    return replace(circuit, model=model)


@checked
def compressed(
    circuit: KnownCircuit,
    d_model: Count,
    *,
    steps: Count = 1000,
    n_sequences: Count = 64,
    rate: float = 0.01,
    seed: int = 0,
) -> KnownCircuit:
    """The same circuit in a stream of fewer dimensions, its edges no longer clean.

    R starts at the principal components of the streams, scaled to keep lengths, and is trained by Adam on fresh sequences to keep the logits and, at
    every layer, the stream that R^T reads back (mean squared errors, added). The truth keeps its edges and kinds; ``exact`` is empty: what overlaps has effects that
    nobody planted, and a planted edge may lose its own, as the training asks for what is computed and not how. The description says which metric was attained.
    Programs of tracr come out right; hand-set heads that match symbols, with scores in the hundreds, often don't.

    Parameters
    ----------
    d_model
        The new width, less than the old one.
    steps, n_sequences, rate, seed
        Of the training: steps, sequences in each, Adam's rate, and the seed of the sequences.

    Raises
    ------
    CausalProbeError
        If its model has norms, or the width is not smaller.

    Examples
    --------
    >>> from causal_probe.circuits import known_circuit
    >>> circuit = known_circuit("value-composition")
    >>> circuit.model.cfg.d_model, compressed(circuit, 18, steps=5).model.cfg.d_model
    (22, 18)
    """
    model = _own(circuit)
    if d_model >= model.cfg.d_model:
        raise CausalProbeError(f"`d_model` is less than the stream's {model.cfg.d_model}; found {d_model}.")
    cfg = model.cfg
    small = StandardTransformer(
        cfg.d_vocab,
        len(model.W_pos),
        d_model=d_model,
        n_layers=cfg.n_layers,
        n_heads=cfg.n_heads,
        d_head=cfg.d_head,
        d_mlp=cfg.d_mlp,
        d_out=cfg.d_vocab_out,
        name=f"{circuit.name}-in-{d_model}",
        dtype=model.W_E.dtype,
    )
    small.row_shift = model.row_shift
    names = [f"blocks.{layer}.hook_resid_post" for layer in range(cfg.n_layers)]
    generator = torch.Generator().manual_seed(seed)
    weights = {name: weight.detach() for name, weight in model.named_parameters()}

    def run(which: StandardTransformer, tokens: Tensor, using: dict[str, Tensor]) -> tuple[Tensor, list[Tensor]]:
        streams: list[Tensor] = []
        with which.hooks(fwd_hooks=[(name, lambda value, hook: streams.append(value)) for name in names]):
            logits: Tensor = torch.func.functional_call(which, using, (tokens,))
        return logits, streams

    def turned(R: Tensor) -> dict[str, Tensor]:
        return {name: weight if (new := _turned(name, weight, R)) is None else new for name, weight in weights.items()}

    with torch.no_grad():
        every = torch.cat(run(model, circuit.sample(n_sequences, generator), weights)[1]).flatten(0, 1)
        R = torch.linalg.svd(every, full_matrices=False)[2][:d_model].mT.contiguous()
    R.requires_grad_()
    optimizer = torch.optim.Adam([R], lr=rate)
    for _ in range(steps):
        tokens = circuit.sample(n_sequences, generator)
        with torch.no_grad():
            wanted, streams = run(model, tokens, weights)
        logits, small_streams = run(small, tokens, turned(R))
        loss = (logits - wanted).square().mean()
        for old, new in zip(streams, small_streams, strict=True):
            loss = loss + (new @ R.mT - old).square().mean()
        optimizer.zero_grad()
        loss.backward()  # type: ignore[no-untyped-call]  # torch gives it no types
        optimizer.step()
    small.load_state_dict(turned(R.detach()))
    truth: nx.DiGraph = circuit.truth.copy()
    truth.graph["exact"] = ()
    tokens = circuit.sample(n_sequences, generator)
    with torch.no_grad():
        before, after = (float(circuit.metric(each(tokens), tokens).mean()) for each in (model, small))
    said = f"{circuit.description} In {d_model} of {cfg.d_model} dimensions: the metric is {after:.3f}, where it was {before:.3f}."
    return replace(circuit, name=small.cfg.model_name, model=small, truth=truth, description=said)
