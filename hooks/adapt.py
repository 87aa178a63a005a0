"""From a Hugging Face model to one with TransformerLens' hook points, on every line of TransformerLens that is supported."""

from __future__ import annotations

import copy
from typing import Any, cast

from causal_probe.errors import CausalProbeError
from causal_probe.hooks.check import HookedModel
from causal_probe.hooks.tokens import added_by_itself

__all__ = ["to_hooked"]


def to_hooked(model: object, tokenizer: Any = None, name: str | None = None) -> HookedModel:
    """Give a model TransformerLens' hook points, if it has none.

    Parameters
    ----------
    model
        A Hugging Face causal language model, ``AutoModelForCausalLM`` for instance. What has hook points already is returned as
        it is. The caller's model stays as it was: the hooked one is a copy of its modules, with eager attention, around the
        *same* weights, so it costs no memory.
    tokenizer
        Its Hugging Face tokenizer, used by ``to_tokens`` and to know the special tokens. It is not changed: the hooked model has
        a copy with a padding token, which ``to_tokens`` needs, and puts a BOS token in front only where the tokenizer itself does.
    name
        For ``cfg.model_name``, and so for the provenance of results. By default what the model calls itself.

    Raises
    ------
    CausalProbeError
        If ``model`` is neither hooked nor a Hugging Face model, or TransformerLens has no bridge for its architecture.

    Examples
    --------
    >>> from transformers import GPT2Config, GPT2LMHeadModel
    >>> gpt2 = GPT2LMHeadModel(GPT2Config(n_layer=1, n_head=2, n_embd=8, vocab_size=11, n_positions=16))
    >>> model = to_hooked(gpt2, name="tiny")
    >>> model.cfg.model_name, model.cfg.n_layers, "blocks.0.attn.hook_pattern" in model.hook_dict
    ('tiny', 1, True)
    """
    if isinstance(model, HookedModel):
        return model
    from transformers import PreTrainedModel

    if not isinstance(model, PreTrainedModel):
        raise CausalProbeError(
            f"A {type(model).__name__} can't be given hooks: give a TransformerLens model, a HookedRootModule, or a Hugging Face "
            "causal language model."
        )
    from transformer_lens.model_bridge.sources import build_bridge_from_module

    architecture = type(model).__name__
    try:
        hooked = build_bridge_from_module(
            _copy_around_weights(model),
            architecture=architecture,
            hf_config=copy.deepcopy(model.config),
            model_name=name or model.config.name_or_path or architecture,
        )
    except Exception as error:  # TransformerLens raises many kinds for what it does not know
        raise CausalProbeError(
            f"TransformerLens can't put hooks on a {architecture}: {str(error).strip() or type(error).__name__} Give a causal "
            "language model of an architecture that it has a bridge for."
        ) from error
    if tokenizer is not None:
        _give_tokenizer(hooked, tokenizer)
    return cast(HookedModel, hooked)


def _copy_around_weights(model: Any) -> Any:
    """The same modules anew around the same parameters and buffers, with eager attention: a bridge rebuilds what it is given."""
    shared = {id(tensor): tensor for tensor in (*model.parameters(), *model.buffers())}
    twin = copy.deepcopy(model, shared)
    twin.set_attn_implementation("eager")
    return twin


def _give_tokenizer(hooked: Any, tokenizer: Any) -> None:
    # Not through TransformerLens' own set-up: it loads the tokenizer a second time, from the hub if need be, to make it put a
    # BOS token in front of everything.
    tokenizer = copy.deepcopy(tokenizer)
    if tokenizer.pad_token is None:
        tokenizer.pad_token = tokenizer.eos_token
    hooked.tokenizer = tokenizer
    before, after = added_by_itself(tokenizer)
    hooked.cfg.tokenizer_prepends_bos = hooked.cfg.default_prepend_bos = bool(before)
    hooked.cfg.tokenizer_appends_eos = tokenizer.eos_token_id in after
