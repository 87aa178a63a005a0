"""Reading one layer's attention on one input, from a model with hook points or straight from a Hugging Face model."""

from __future__ import annotations

import copy
from typing import Any, Literal

import torch
from jaxtyping import Float, Int
from torch import Tensor

from causal_probe.errors import CausalProbeError
from causal_probe.hooks.check import HookedModel, attention_hook, describe, require_hooks
from causal_probe.hooks.heads import find_layer
from causal_probe.hooks.record import check_pattern
from causal_probe.hooks.values import read_values
from causal_probe.hooks.visible import has_sinks

__all__ = ["layer_index", "read_layer"]


def layer_index(model: object, layer: int) -> int:
    """A layer counted from 0, of a number that may be negative and then counts from the end.

    Raises
    ------
    CausalProbeError
        If there is no such layer.
    """
    config: Any = getattr(model, "cfg", None) or getattr(model, "config", None)
    n_layers = int(getattr(config, "n_layers", 0) or getattr(config, "num_hidden_layers", 0))
    return find_layer(n_layers, layer)


def read_layer(
    model: object, tokens: Int[Tensor, "one pos"], layer: int, *, what: Literal["pattern", "z"] = "pattern"
) -> Float[Tensor, "_head pos _key_or_dimension"]:
    """A layer's heads on one input: their patterns [head, query, key], or their outputs [head, pos, d_head].

    Nothing is edited, so this also serves models whose hooks only show (as those of TransformerLens' BERT bridges), and Hugging Face
    models without any, classifiers among them: of those, the attentions that they return themselves.

    Raises
    ------
    CausalProbeError
        If the model has neither hook points nor attentions, or a hook never fires.
    """
    layer = layer_index(model, layer)
    if not isinstance(model, HookedModel):
        if what == "z":
            raise CausalProbeError(
                "The heads' outputs are read at hook points, and this model has none: see hooks.to_hooked."
            )
        return _hugging_face_pattern(model, tokens, layer)
    name = attention_hook(layer, what)
    require_hooks(model, [name])
    found = read_values(model, tokens.to(describe(model)["device"] or "cpu"), [name], n_layers=layer + 1).get(name)
    if found is None:
        raise CausalProbeError(
            f'{name} did not fire. A Hugging Face model must be loaded with attn_implementation="eager".'
        )
    outputs = found[0].clone()
    if what == "pattern":
        check_pattern(name, found, nothing=has_sinks(model, layer))
        return outputs
    if outputs.ndim == 2:  # some bridges show all heads side by side
        outputs = outputs.reshape(len(outputs), int(model.cfg.n_heads), -1)
    return outputs.transpose(0, 1)


def _hugging_face_pattern(model: Any, tokens: Tensor, layer: int) -> Tensor:
    from transformers import PreTrainedModel

    if not isinstance(model, PreTrainedModel):
        raise CausalProbeError(
            f"A {type(model).__name__} has no attention that can be read: give a TransformerLens model, a HookedRootModule, or a "
            "Hugging Face model."
        )
    if model.config._attn_implementation != "eager":  # the fused kinds return no attentions
        shared = {id(tensor): tensor for tensor in (*model.parameters(), *model.buffers())}
        model = copy.deepcopy(model, shared)
        model.set_attn_implementation("eager")
    training = model.training
    model.eval()
    try:
        with torch.no_grad():
            attentions = model(input_ids=tokens.to(model.device), output_attentions=True, return_dict=True).attentions
    finally:
        model.train(training)
    if not attentions:
        raise CausalProbeError(
            f"{type(model).__name__} returns no attentions; give it hook points with hooks.to_hooked."
        )
    pattern: Tensor = attentions[layer][0]
    return pattern
