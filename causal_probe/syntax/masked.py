"""An encoder whose upper layers see some of the words only.

Layers from ``first_layer`` on attend to the visible keys alone, layers below to all. Of Hugging Face encoders the mask is put into what each layer is
given, and what comes out is tried: with nothing but some keys visible in all layers, the other tokens may be any, and nothing changes.
"""

from __future__ import annotations

import inspect
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from typing import Any, TypeAlias

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor, nn

from causal_probe.errors import CausalProbeError

__all__ = ["Vectors", "check_masks", "masked_encoder"]

#: ``vectors(tokens [batch, pos], visible [batch, pos], first_layer) -> [batch, pos, d]``.
Vectors: TypeAlias = Callable[[Tensor, Tensor, int], Tensor]
#: Vectors that should be equal differ by no more than this share of their size.
EQUAL = 1e-4


def masked_encoder(model: Any) -> tuple[Vectors, int]:
    """A Hugging Face encoder's last vectors under a mask, and its number of layers.

    Raises
    ------
    CausalProbeError
        If the model is no Hugging Face encoder whose layers take an ``attention_mask``.
    """
    model = getattr(model, "original_model", model)
    base = getattr(model, "base_model", model)
    config: Any = getattr(base, "config", None)
    attends = getattr(config, "num_attention_heads", None)
    n_layers = int(getattr(config, "num_hidden_layers", 0) or 0) if attends else 0
    lists = (
        [each for each in base.modules() if isinstance(each, nn.ModuleList) and len(each) == n_layers]
        if n_layers
        else []
    )
    layers = next((its for its in lists if "attention_mask" in inspect.signature(its[0].forward).parameters), None)
    if layers is None or getattr(config, "is_decoder", False):
        raise CausalProbeError(
            f"Trees are projected from encoders of Hugging Face whose layers take an attention mask (BERT and its like); this is a {type(model).__name__}. "
            "In a causal model a span from the first word has nothing to mask, so its chart says nothing."
        )

    def vectors(
        tokens: Int[Tensor, "batch pos"], visible: Bool[Tensor, "batch pos"], first_layer: int
    ) -> Float[Tensor, "batch pos d"]:
        device, dtype = base.device, base.dtype
        # The model's own mask where nothing is hidden: it may be causal.
        masked: Any = [] if visible.all() else layers[first_layer:]
        mask = torch.zeros(visible.shape, dtype=dtype).masked_fill(~visible, torch.finfo(dtype).min)[:, None, None, :]
        with torch.no_grad(), _given(masked, mask.to(device)):
            found: Tensor = base(input_ids=tokens.to(device)).last_hidden_state
        return found.float().cpu()

    return vectors, n_layers


@contextmanager
def _given(layers: Any, mask: Tensor) -> Iterator[None]:
    """Let layers be given a mask."""
    with ExitStack() as stack:
        for layer in layers:
            signature = inspect.signature(layer.forward)

            def put(module: nn.Module, args: Any, kwargs: Any, signature: inspect.Signature = signature) -> Any:
                bound = signature.bind(*args, **kwargs)
                bound.arguments["attention_mask"] = mask
                return bound.args, bound.kwargs

            stack.callback(layer.register_forward_pre_hook(put, with_kwargs=True).remove)
        yield


def check_masks(vectors: Vectors, tokens: Int[Tensor, " pos"], *, first_word: int) -> None:
    """Refuse an encoder whose masks have no effect, or that is causal.

    Parameters
    ----------
    tokens
        One sentence.
    first_word
        The place of a token that is hidden, others behind it.

    Raises
    ------
    CausalProbeError
        If a hidden token is seen, or a visible one behind is not.
    """
    pos = len(tokens)
    other = tokens.clone()
    behind = tokens[first_word:]
    other[first_word:] = behind.roll(1) if len(set(behind.tolist())) > 1 else tokens[0]
    both = torch.stack([tokens, other])
    seen = torch.ones(2, pos, dtype=torch.bool)
    hidden = seen.clone()
    hidden[:, first_word:] = False
    size = vectors(both, seen, 0)[:, 0].abs().max() * EQUAL
    moved = (vectors(both, seen, 0)[0, 0] - vectors(both, seen, 0)[1, 0]).abs().max()
    kept = (vectors(both, hidden, 0)[0, 0] - vectors(both, hidden, 0)[1, 0]).abs().max()
    if kept > size:
        raise CausalProbeError(
            "A mask has no effect on this encoder: a token that is hidden from all layers changes what comes out."
        )
    if moved <= size:
        raise CausalProbeError(
            "The first position does not see the words behind it: a causal model. A span from the first word has nothing to mask there, so its chart says "
            "nothing."
        )
