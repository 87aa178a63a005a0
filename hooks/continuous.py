"""Continuous inputs: any hooked model read as a function of vectors, and a model of vectors run on token ids.

A model that was made for token ids is given vectors by replacing its embedding with them, at the hook point
``hook_embed``, and is read at the residual stream behind its last layer (:func:`on_residual_stream`). The other way
round, a probe that wants token ids is given a model of vectors together with the sequences that the ids name
(:class:`OnSequences`).
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from types import SimpleNamespace
from typing import Any

import torch
from jaxtyping import Float, Int
from torch import Tensor

from causal_probe.errors import CausalProbeError
from causal_probe.hooks.batches import probe
from causal_probe.hooks.check import HookedModel, keep, require_hooks

__all__ = ["OnSequences", "on_residual_stream"]


@probe
def on_residual_stream(
    model: HookedModel,
    *,
    read_in: Float[Tensor, "d_token d_model"],
    read_out: Float[Tensor, "d_model d_out"],
    at: str = "hook_embed",
) -> Callable[[Tensor], Tensor]:
    """A TransformerLens model as a function from vectors [batch, pos, d_token] to an answer [batch, d_out], differentiable.

    ``tokens @ read_in`` takes the place of the value at ``at``; the residual stream of the last position behind the last
    layer is multiplied by ``read_out``. With ``hook_embed`` the model adds its own positions.

    Raises
    ------
    CausalProbeError
        If a hook point is missing or does not fire.
    """
    last = f"blocks.{int(model.cfg.n_layers) - 1}.hook_resid_post"
    require_hooks(model, [at, last])

    def predict(tokens: Tensor) -> Tensor:
        seen: dict[str, Tensor] = {}

        def put(value: Tensor, hook: Any) -> Tensor:
            return tokens @ read_in

        ids = torch.zeros(tokens.shape[:2], dtype=torch.long, device=tokens.device)
        with model.hooks(fwd_hooks=[(at, put), (last, keep(seen, last))]):
            model(ids)
        if not seen:
            raise CausalProbeError(f"{last} did not fire, so there is nothing to read an answer from.")
        return seen[last][:, -1] @ read_out

    return predict


class OnSequences:
    """A model of vectors, run on token ids that name the vectors of given sequences.

    Everything that takes ``(model, token ids)`` then takes ``(held, held.tokens)``. Fewer layers, from 0 on, may be shown:
    :func:`~causal_probe.probes.scan` reads every layer that there is, and refuses patterns that are not probabilities.

    Parameters
    ----------
    model
        A hooked model whose forward reads vectors [batch, pos, d_token].
    sequences
        The vectors.
    layers
        How many of the model's layers to show; None: all.

    Attributes
    ----------
    tokens
        The ids [batch, pos]: 0, 1, 2, ... through all sequences.
    """

    def __init__(self, model: Any, sequences: Float[Tensor, "batch pos d_token"], *, layers: int | None = None) -> None:
        require_hooks(model, ())
        n_layers = int(model.cfg.n_layers) if layers is None else layers
        if not 1 <= n_layers <= int(model.cfg.n_layers):
            raise CausalProbeError(f"Between 1 and {model.cfg.n_layers} layers can be shown, not {layers}.")
        self.model = model
        self._table = sequences.flatten(0, 1)
        self.tokens = torch.arange(len(self._table), device=sequences.device).view(sequences.shape[:2])
        self.cfg = SimpleNamespace(
            **{
                **{name: getattr(model.cfg, name, None) for name in ("d_model", "d_head", "n_heads", "model_name")},
                "n_layers": n_layers,
                "n_ctx": sequences.shape[1] + 1,
                "d_vocab": len(self._table),
            }
        )

    @property
    def hook_dict(self) -> Mapping[str, Any]:
        """The model's hook points."""
        points: Mapping[str, Any] = self.model.hook_dict
        return points

    def hooks(self, fwd_hooks: Any = (), bwd_hooks: Any = ()) -> Any:
        """The model's own context manager."""
        return self.model.hooks(fwd_hooks=fwd_hooks, bwd_hooks=bwd_hooks)

    def run_with_hooks(self, tokens: Int[Tensor, "batch pos"], **kwargs: Any) -> Any:
        """Run on the sequences that the ids name."""
        return self.model.run_with_hooks(self._table[tokens], **kwargs)

    def parameters(self) -> Any:
        """The model's parameters."""
        return self.model.parameters()

    def __call__(self, tokens: Int[Tensor, "batch pos"], **kwargs: Any) -> Any:
        """Run on the sequences that the ids name."""
        return self.model(self._table[tokens], **kwargs)
