"""The keys that each query of a layer can attend to: those that its mask shows, and nothing (sinks) where the model has that."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from jaxtyping import Bool, Float
from torch import Tensor

from causal_probe.hooks.check import HookedModel, attention_hook, attention_hooks

__all__ = ["MASKED", "Masks", "has_sinks", "heads_by_layer", "seen_in", "sink_of", "window_of"]

#: What TransformerLens and Hugging Face write instead of a masked score is below this; -inf is too.
MASKED = -1e30


def heads_by_layer(model: HookedModel) -> dict[int, int]:
    """By layer that has attention, the number of its heads; layers of other kinds are left out.

    >>> from causal_probe.models import ReducedTransformer
    >>> heads_by_layer(ReducedTransformer(d_vocab=3, n_positions=4))
    {0: 1, 1: 1}
    """
    names, there = attention_hooks(model, ["pattern"]), model.hook_dict
    return {layer: int(model.cfg.n_heads) for (layer, _), name in names.items() if name in there}


def seen_in(
    scores: Float[Tensor, "batch head query key"] | None, pattern: Float[Tensor, "batch head query key"]
) -> Bool[Tensor, "batch query key"]:
    """Which keys each query sees, by the masked scores of a layer; where these don't pass as scores, by the window of its pattern.

    A window and a sparse index leave keys out. Heads of a layer share their mask.

    >>> scores = torch.tensor([[[[0.0, -torch.inf, -torch.inf], [1.0, 2.0, -3.4e38], [-3.4e38, 0.0, 0.0]]]])
    >>> seen_in(scores, scores.softmax(-1))[0].int().tolist()
    [[1, 0, 0], [1, 1, 0], [0, 1, 1]]
    """
    if scores is None or scores.shape != pattern.shape or torch.equal(scores, pattern):
        return window_of(pattern).expand(len(pattern), -1, -1)
    return torch.ones_like(scores[:, 0], dtype=torch.bool).tril() & (scores[:, 0] > MASKED)


def window_of(pattern: Float[Tensor, "batch head query key"]) -> Bool[Tensor, "query key"]:
    """The keys that get any attention in some sequence and head, if they are a window of two or more; all of the past if not.

    Attention that is 0 says little by itself: that of very small scores is, too, and leaves no window.

    >>> window_of(torch.eye(3).expand(1, 2, 3, 3) / 2 + torch.eye(3).roll(1, 0).tril() / 2).int().tolist()
    [[1, 0, 0], [1, 1, 0], [0, 1, 1]]
    """
    some = (pattern > 0).flatten(0, 1).any(0)
    past = torch.ones_like(some).tril()
    width = int(some[-1].sum())
    window = past & ~torch.ones_like(some).tril(-width)
    return window if width > 1 and torch.equal(some, window) else past


class Masks:
    """Which keys each query sees, by layer, as the forward that is running shows it; :attr:`hooks` look at the masked scores.

    A layer's scores pass before its pattern, so that a reader of the pattern can ask. Where they pass behind it (in models whose
    patterns can't be edited), the pattern's own window is taken.
    """

    def __init__(self, model: HookedModel) -> None:
        self._of: dict[int, Tensor | None] = {}
        names, there = {n: attention_hook(n, "attn_scores") for n in heads_by_layer(model)}, model.hook_dict
        self._layers = {n for n, name in names.items() if name in there}
        self.hooks = [(names[n], self._look(n)) for n in sorted(self._layers)]

    def start(self) -> None:
        """A forward is about to run."""
        self._of.clear()

    def of(self, layer: int, pattern: Float[Tensor, "batch head query key"]) -> Bool[Tensor, "batch query key"] | None:
        """The visible keys of the layer that runs; None for all of the past."""
        if layer in self._of or layer not in self._layers:
            return self._of.get(layer)
        return self._unless_all(window_of(pattern).expand(len(pattern), -1, -1))

    @staticmethod
    def _unless_all(seen: Bool[Tensor, "batch query key"]) -> Bool[Tensor, "batch query key"] | None:
        past = torch.ones_like(seen[0]).tril()
        return None if bool((seen | ~past).all()) else seen & past

    def _look(self, layer: int) -> Callable[[Tensor, Any], None]:
        def look(scores: Tensor, hook: Any) -> None:
            if scores.ndim == 4 and scores.shape[2] == scores.shape[3]:
                self._of[layer] = self._unless_all(scores[:, 0] > MASKED)

        return look


def sink_of(model: Any, layer: int, head: int) -> float | None:
    """The learnt logit by which a head attends to nothing; None where it has none."""
    sinks = _sinks(model, layer)
    return None if sinks is None else float(sinks[head].detach())


def has_sinks(model: Any, layer: int) -> bool:
    """Whether the layer's heads can attend to nothing, so that rows of their attention sum to less than one by design."""
    return _sinks(model, layer) is not None


def _sinks(model: Any, layer: int) -> Tensor | None:
    blocks = getattr(model, "blocks", None)
    attention = None if blocks is None or layer >= len(blocks) else getattr(blocks[layer], "attn", None)
    sinks = getattr(getattr(attention, "original_component", None), "sinks", None)
    return sinks if isinstance(sinks, Tensor) else None
