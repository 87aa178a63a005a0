"""Which earlier position would a head do better to attend to? Minus the gradient of a loss with respect to attention scores.

The first gradient step of an untrained two-layer model already points at the causal graph (Nichani, Damian & Lee 2024, arXiv
2402.14735). The same quantity exists for every head of every model, trained or not: entry (query, key) is how fast the loss falls
when the score grows. Rows sum to zero, because a softmax does not see a shift of its scores.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable
from typing import Any

from torch import Tensor

from causal_probe.arguments import BatchSize
from causal_probe.hooks.batches import probe
from causal_probe.hooks.check import HookedModel, describe
from causal_probe.hooks.gradients import record_score_gradients
from causal_probe.probes.evidence import Evidence, Quantity
from causal_probe.probes.measures import next_token

__all__ = ["GRADIENT", "score_gradients"]

GRADIENT = Quantity(
    name="gradient",
    unit="units of the loss per unit of score",
    chance="0",
    works=("nichani2024",),
    sentence="minus the gradient of the loss with respect to the attention score from child to parent",
    level=1e-3,
)


@probe
def score_gradients(
    model: HookedModel,
    tokens: Any,
    loss: Callable[[Any, Any], Tensor] | None = None,
    *,
    layers: Iterable[int] | None = None,
    batch_size: BatchSize = None,
) -> Evidence:
    """Minus the mean gradient of a loss with respect to the attention scores of every head, in one streaming pass.

    Parameters
    ----------
    model
        Any model with TransformerLens' hook points. It is run in evaluation mode, with the caller's own hooks, and is left as it
        was, its parameters' gradients included.
    tokens
        Tokens [batch, pos], or an iterable of batches that ``loss`` understands, all of one length.
    loss
        ``loss(model, batch)`` runs the model and returns one loss per sequence, [batch]. By default the mean cross-entropy of the next
        token over all positions, in nats.
    layers
        Which layers; all by default.
    batch_size
        Run larger tensors in pieces of this size. A backward pass keeps what the forward pass computed: take small ones.

    Returns
    -------
    Evidence
        By layer, minus the mean over sequences of d loss / d score, in units of the loss per unit of score: positive where more
        attention lowers the loss, 0 by chance. Rows sum to zero; masked entries are exactly 0. ``settings["routes"]`` says by layer where it was taken:
        ``"scores"``, at a live score hook; ``"pattern"``: there is none, and it is (diag p - p p^T) dL/dp from the gradient at the
        pattern; or ``"mask"``: that is not live either, and it is taken at the mask that is added to the scores. An edge is claimed where it is above zero (:class:`~causal_probe.probes.evidence.AboveZero`).

    Raises
    ------
    CausalProbeError
        If a hook point is missing, neither the scores nor the pattern of a layer are live, the loss is not one number per
        sequence, there are no sequences or their lengths differ, or a gradient is not finite.

    References
    ----------
    Nichani, Damian & Lee, "How Transformers Learn Causal Structure with Gradient Descent", ICML 2024 (arXiv 2402.14735).

    Examples
    --------
    >>> import torch
    >>> from causal_probe.models import ReducedTransformer
    >>> found = score_gradients(ReducedTransformer(d_vocab=3, n_positions=4), torch.tensor([[0, 1, 0, 1], [2, 0, 2, 0]]))
    >>> found.values[0].shape, found.settings["routes"], bool((abs(found.of("L0H0").sum(-1)) < 1e-6).all())
    ((1, 4, 4), {'L0': 'scores', 'L1': 'scores'}, True)
    """
    found = record_score_gradients(model, tokens, loss or _next_token, layers=layers, batch_size=batch_size)
    settings = {"routes": {f"L{layer}": route for layer, route in found.routes.items()}}
    return Evidence.of_moments(found.moments, GRADIENT, settings, describe(model))


def _next_token(model: Any, batch: Any) -> Tensor:
    measured: Tensor = next_token()(model(getattr(batch, "tokens", batch)), batch).loss
    return measured
