"""Does the order of the context matter to a prediction, and in which layers does the order enter?

Without positions, one layer of causal attention predicts the same whatever the order of the tokens before the last; a second layer can tell, for what a
position has gathered depends on what stands before it (Zuo & Guerzhoy 2024). Two questions, each by random permutations of the positions between
a fixed start and the last position:

* **tokens**: the tokens are permuted, and the model runs as it is;
* **layer l**: the model runs on the tokens in their order up to layer l, whose input vectors are then permuted; layers from l on see them in another order. What
  the layers below have written travels with its vector, positions that were added to it included. Past the last layer nothing is left to tell: 0.

The estimand is the mean over sequences and permutations of KL(p, p') in nats, of the prediction after the last position; 0 means that the order doesn't
matter there. There is no test against 0, which a random model misses by rounding alone: ``rounding`` says by how much.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from contextlib import nullcontext
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from jaxtyping import Float, Int
from torch import Tensor

from causal_probe.arguments import BatchSize, Count, Position, Seed
from causal_probe.errors import CausalProbeError
from causal_probe.hooks.batches import probe
from causal_probe.hooks.check import HookedModel, describe, keep, live_hooks, logits_of, require_hooks, undisturbed
from causal_probe.hooks.record import micro_batches
from causal_probe.hooks.skip import Skips
from causal_probe.hooks.tokens import special_tokens
from causal_probe.results import Result, Table

__all__ = ["PermutationSensitivity", "permutation_sensitivity"]

#: Layers are passed over if the last prediction is the same up to this KL, in nats.
SAME = 1e-6


@dataclass(frozen=True, eq=False, repr=False)
class PermutationSensitivity(Result):
    """The result of :func:`permutation_sensitivity`; KL in nats, of the prediction after the last position.

    Attributes
    ----------
    tokens, tokens_stderr, tokens_largest
        Mean over sequences and permutations where the tokens are permuted; its standard error over sequences; the largest.
    layers, stderr, largest
        The same by layer, where the vectors that enter it are permuted.
    rounding
        The largest KL where nothing is permuted (the vectors that enter each layer are put in again): what lies below it is none.
    n_sequences
        Number of sequences.
    """

    KIND = "permutation sensitivity"
    WORKS = ("zuo2024",)

    tokens: float
    tokens_stderr: float
    tokens_largest: float
    layers: tuple[float, ...]
    stderr: tuple[float, ...]
    largest: tuple[float, ...]
    rounding: float
    n_sequences: int

    @property
    def methods(self) -> str:
        """One sentence for a methods section."""
        return (
            f"The order of the context was permuted at random ({self.settings['n_permutations']} permutations of each of {self.n_sequences} sequences, the "
            f"first {self.settings['start']} positions and the last kept), as tokens and as the vectors that enter each layer of "
            f"{self.provenance['model']}; the change is KL in nats of the last prediction ({self.measured_with})."
        )

    def table(self) -> Table:
        """One row for the tokens and one for each layer."""
        return Table(
            f"PermutationSensitivity of {self.provenance['model']}: {self.n_sequences} sequences",
            ("permuted", "mean KL", "stderr", "largest"),
            [
                ("tokens", self.tokens, self.tokens_stderr, self.tokens_largest),
                *(
                    (f"input of layer {layer}", *its)
                    for layer, its in enumerate(zip(self.layers, self.stderr, self.largest, strict=True))
                ),
            ],
            (f"nothing permuted: at most {self.rounding:.1e}",),
        )


@probe
def permutation_sensitivity(
    model: HookedModel,
    tokens: Any,
    *,
    n_permutations: Count = 4,
    start: Position | None = None,
    seed: Seed = 0,
    batch_size: BatchSize = None,
) -> PermutationSensitivity:
    """How much the last prediction changes when the context is put in another order, as tokens and from each layer on.

    Parameters
    ----------
    model
        Any model with logits [batch, pos, d_vocab] and TransformerLens' hook points ``blocks.{layer}.hook_resid_pre``.
    tokens
        Tokens [batch, pos] of one length, or batches of them.
    n_permutations
        Random permutations of each sequence, the same for the tokens and for all layers.
    start
        So many positions at the beginning keep their place; by default 1 where all sequences of the first batch begin with the model's BOS token, else 0.
    seed
        Of the permutations.
    batch_size
        Sequences in a forward pass.

    Raises
    ------
    CausalProbeError
        If there are fewer than two positions to permute or two sequences, the vectors that enter a layer can't be changed, or a prediction is NaN.

    References
    ----------
    Zuo & Guerzhoy, "Breaking symmetry when training transformers", 2024.

    Examples
    --------
    >>> from causal_probe.models import DisentangledTransformer
    >>> model = DisentangledTransformer(d_vocab=3, n_positions=6, heads=(1,))   # one layer; it attends evenly
    >>> _ = model.output_block("L0H0.token").diagonal().fill_(5)                # and predicts what is frequent
    >>> found = permutation_sensitivity(model, torch.tensor([[0, 1, 2, 2, 0, 1], [0, 0, 0, 1, 1, 2]]))
    >>> found.tokens < 1e-9
    True
    """
    names = [f"blocks.{layer}.hook_resid_pre" for layer in range(int(model.cfg.n_layers))]
    require_hooks(model, names)
    generator = torch.Generator().manual_seed(seed)
    found: list[Float[np.ndarray, "place permutation batch"]] = []
    rounding, pos, kept = 0.0, 0, 0
    with undisturbed(model):
        for batch in micro_batches(model, tokens, batch_size):
            if not found:
                bos = special_tokens(model).bos
                begins = bos is not None and bool((batch[:, 0] == bos).all())
                kept = int(begins) if start is None else start
                _check(model, batch, names, kept)
            n, pos = batch.shape
            runs = _Runs(model, batch, names)
            clean, moved = runs.clean, []
            for _ in range(n_permutations):
                order = _orders(n, pos, kept, generator)
                moved.append(
                    [
                        _kl(clean, _last(model, batch.gather(1, order.to(batch.device)))),
                        *(_kl(clean, runs.permuted(layer, order)) for layer in range(len(names))),
                    ]
                )
            same = torch.arange(pos).expand(n, -1)
            rounding = max(
                rounding, *(float(_kl(clean, runs.permuted(layer, same)).max()) for layer in range(len(names)))
            )
            found.append(np.array(moved).transpose(1, 0, 2))
    values = np.concatenate(found, axis=2)
    n = values.shape[2]
    if n < 2:
        raise CausalProbeError("A standard error over sequences takes two sequences or more; one was given.")
    mean, largest = values.mean((1, 2)).tolist(), values.max((1, 2)).tolist()
    stderr = (values.mean(1).std(1, ddof=1) / n**0.5).tolist()
    return PermutationSensitivity(
        tokens=mean[0],
        tokens_stderr=stderr[0],
        tokens_largest=largest[0],
        layers=tuple(mean[1:]),
        stderr=tuple(stderr[1:]),
        largest=tuple(largest[1:]),
        rounding=rounding,
        n_sequences=n,
        settings={"n_permutations": n_permutations, "start": kept, "seed": seed, "n_positions": pos},
        provenance=describe(model),
    )


def _check(model: HookedModel, batch: Tensor, names: list[str], start: int) -> None:
    if batch.shape[1] - start < 3:
        raise CausalProbeError(
            f"Between the first {start} positions and the last of {batch.shape[1]} there are {max(0, batch.shape[1] - start - 1)}: nothing to permute. "
            "Give longer sequences."
        )
    live = live_hooks(model, names, lambda: _last(model, batch[:1]).sum())
    if dead := [name for name in names if name not in live]:
        raise CausalProbeError(f"No prediction depends on the value at {dead[0]}, so its vectors can't be permuted.")


def _orders(n: int, pos: int, start: int, generator: torch.Generator) -> Int[Tensor, "batch pos"]:
    """For each sequence a random order of its positions, in which the first ``start`` and the last stay."""
    inner = torch.rand(n, pos - start - 1, generator=generator).argsort(1) + start
    ends = torch.arange(pos).expand(n, -1)
    return torch.cat([ends[:, :start], inner, ends[:, -1:]], 1)


class _Runs:
    """A batch's own run, and runs in which the vectors that enter a layer are permuted; layers below it are passed over where that changes nothing."""

    def __init__(self, model: HookedModel, tokens: Int[Tensor, "batch pos"], names: list[str]) -> None:
        self.model, self.tokens, self.names = model, tokens, names
        self._streams: dict[str, Tensor] = {}
        self._skips = Skips(model) if hasattr(model, "blocks") else None
        with nullcontext() if self._skips is None else self._skips.learning():
            self.clean = _last(model, tokens, [(name, keep(self._streams, name)) for name in names])
        if self._skips is not None:
            same = torch.arange(tokens.shape[1]).expand(len(tokens), -1)
            try:
                again = self.permuted(len(names) - 1, same)
            except Exception:  # a model of another build: its layers are run
                self._skips = None
            else:
                self._skips = self._skips if float(_kl(self.clean, again).max()) <= SAME else None

    def permuted(self, layer: int, order: Int[Tensor, "batch pos"]) -> Float[Tensor, "batch d_vocab"]:
        """Log-probabilities after the last position, where the vectors that enter a layer stand in another order."""
        name = self.names[layer]
        stream = self._streams[name]
        new = stream.gather(1, order.to(stream.device)[..., None].expand_as(stream))
        with nullcontext() if self._skips is None else self._skips.before(layer):
            return _last(self.model, self.tokens, [(name, lambda value, hook: new)])


def _last(
    model: HookedModel, tokens: Tensor, hooks: Sequence[tuple[str, Callable[..., Any]]] = ()
) -> Float[Tensor, "batch d_vocab"]:
    """Log-probabilities after the last position."""
    with model.hooks(fwd_hooks=list(hooks)):
        logits = logits_of(model(tokens), tokens, d_out=getattr(model.cfg, "d_vocab_out", None))[:, -1]
    found: Tensor = logits.to(torch.promote_types(logits.dtype, torch.float32)).log_softmax(-1).double().cpu()
    if found.isnan().any():
        raise CausalProbeError("The last prediction is no number for some sequence. Check the model's weights for NaN.")
    return found


def _kl(clean: Float[Tensor, "batch d_vocab"], other: Float[Tensor, "batch d_vocab"]) -> Float[np.ndarray, " batch"]:
    """KL(clean, other) in nats, not below 0 by rounding."""
    terms = torch.where(clean > -torch.inf, clean.exp() * (clean - other), 0.0)
    return terms.sum(1).clamp(min=0).numpy()
