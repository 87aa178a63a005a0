"""Which earlier position would a head do better to attend to? Minus the gradient of a loss with respect to attention scores.

The first gradient step of an untrained two-layer model already points at the causal graph (Nichani, Damian & Lee 2024, arXiv
2402.14735). The same quantity exists for every head of every model, trained or not: entry (query, key) is how fast the loss falls
when the score grows. Rows sum to zero, because a softmax does not see a shift of its scores.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np
import pandas as pd
from jaxtyping import Float
from numpy.typing import NDArray
from torch import Tensor

from causal_probe.errors import CausalProbeError
from causal_probe.hooks import HookedModel, describe
from causal_probe.hooks.gradients import Route, record_score_gradients
from causal_probe.probes.ablation import next_token
from causal_probe.results import Citation, cite, escape, to_jsonable, versions

__all__ = ["ScoreGradients", "score_gradients"]

#: How many heads are printed.
SHOWN = 12


@dataclass(frozen=True, repr=False)
class ScoreGradients:
    """Minus the mean gradient of a loss with respect to every head's attention scores.

    Attributes
    ----------
    gradient : Mapping[int, NDArray], by layer [head, query, key]
        Minus the mean over sequences of d loss / d score, in units of the loss per unit of score: positive where more
        attention lowers the loss. Rows sum to zero; masked entries are exactly 0.
    stderr : Mapping[int, NDArray], or None
        Its standard error over sequences. None for one sequence.
    routes : Mapping[int, str]
        By layer, ``"scores"``: taken at a live score hook; or ``"pattern"``: there is none, and it is
        (diag p - p p^T) dL/dp from the gradient at the pattern.
    sequences
        How many.
    provenance
        Model, dtype, device and versions.
    """

    gradient: Mapping[int, Float[np.ndarray, "_head query key"]]
    stderr: Mapping[int, Float[np.ndarray, "_head query key"]] | None
    routes: Mapping[int, Route]
    sequences: int
    provenance: Mapping[str, Any]

    def leading(self, layer: int, head: int) -> tuple[int | None, ...]:
        """For every query the earlier key with the largest entry, as if it were to be its parent; None for query 0."""
        found = self._of(layer, head)
        return (None, *(int(found[query, :query].argmax()) for query in range(1, len(found))))

    def z_values(self, layer: int, head: int) -> NDArray[np.float64] | None:
        """Entries over their standard errors, 0 where both are 0. None for one sequence."""
        found = self._of(layer, head)
        if self.stderr is None:
            return None
        error = self.stderr[layer][head]
        return np.asarray(np.divide(found, error, out=np.zeros_like(found), where=error > 0))

    def to_pandas(self) -> pd.DataFrame:
        """One row per head: its largest entry, where it is, its standard error, and the route."""
        rows = []
        for layer, gradient in self.gradient.items():
            for head, its in enumerate(gradient):
                query, key = np.unravel_index(int(its.argmax()), its.shape)
                error = None if self.stderr is None else float(self.stderr[layer][head, query, key])
                norm = float(np.linalg.norm(its))
                rows.append(
                    (f"L{layer}H{head}", float(its[query, key]), error, int(query), int(key), norm, self.routes[layer])
                )
        return pd.DataFrame(rows, columns=["head", "largest", "stderr", "query", "key", "norm", "route"])

    def to_dict(self) -> dict[str, Any]:
        """The fields in plain JSON types."""
        return dict(
            to_jsonable(
                {
                    "gradient": self.gradient,
                    "stderr": self.stderr,
                    "routes": self.routes,
                    "sequences": self.sequences,
                    "undefined": {} if self.stderr else {"stderr": "a standard error needs two sequences or more"},
                    "provenance": self.provenance,
                }
            )
        )

    def cite(self) -> Citation:
        """The paper, and one sentence for a methods section."""
        return cite(
            "nichani2024",
            methods=(
                f"Score gradients are minus the mean gradient of the loss of {self.provenance['model']} with respect to its attention scores, "
                f"over {self.sequences} sequences (after Nichani et al., 2024; causal-probe "
                f"{versions().get('causal-probe', 'from source')})."
            ),
        )

    def __repr__(self) -> str:
        return f"{self._title()}\n{self._shown().to_string(index=False, float_format='{:.3g}'.format)}"

    def _repr_html_(self) -> str:
        return f"<p>{escape(self._title())}</p>{self._shown().to_html(index=False, float_format='{:.3g}'.format)}"

    def _shown(self) -> pd.DataFrame:
        return self.to_pandas().sort_values("norm", ascending=False, kind="stable").head(SHOWN)

    def _title(self) -> str:
        heads = sum(map(len, self.gradient.values()))
        rest = f", the {SHOWN} with the largest norm" if heads > SHOWN else ""
        return f"ScoreGradients of {self.provenance['model']}: {heads} heads{rest}, {self.sequences:,} sequences"

    def _of(self, layer: int, head: int) -> NDArray[np.float64]:
        if layer not in self.gradient or not 0 <= head < len(self.gradient[layer]):
            heads = {layer: len(its) for layer, its in self.gradient.items()}
            raise CausalProbeError(f"There is no head L{layer}H{head} here; the heads by layer are {heads}.")
        return np.asarray(self.gradient[layer][head])


def score_gradients(
    model: HookedModel,
    tokens: Any,
    loss: Callable[[Any, Any], Tensor] | None = None,
    *,
    layers: Iterable[int] | None = None,
    batch_size: int | None = None,
) -> ScoreGradients:
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

    Raises
    ------
    CausalProbeError
        If a hook point is missing, neither the scores nor the pattern of a layer are live, the loss is not one number per
        sequence, there are no sequences or their lengths differ, or a gradient is not finite.

    Examples
    --------
    >>> import torch
    >>> from causal_probe.models import ReducedTransformer
    >>> found = score_gradients(ReducedTransformer(d_vocab=3, n_positions=4), torch.tensor([[0, 1, 0, 1], [2, 0, 2, 0]]))
    >>> found.gradient[0].shape, found.routes[0], bool((abs(found.gradient[0].sum(-1)) < 1e-6).all())
    ((1, 4, 4), 'scores', True)
    """
    found = record_score_gradients(model, tokens, loss or _next_token, layers=layers, batch_size=batch_size)
    errors = {layer: moments.stderr for layer, moments in found.moments.items()}
    known = {layer: error.cpu().numpy() for layer, error in errors.items() if error is not None}
    return ScoreGradients(
        gradient={layer: moments.mean.cpu().numpy() for layer, moments in found.moments.items()},
        stderr=known or None,
        routes=found.routes,
        sequences=next(iter(found.moments.values())).count,
        provenance={**describe(model), "versions": versions()},
    )


def _next_token(model: Any, batch: Any) -> Tensor:
    measured: Tensor = next_token()(model(getattr(batch, "tokens", batch)), batch).loss
    return measured
