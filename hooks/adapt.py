"""From a Hugging Face model to one with TransformerLens' hook points, on every line of TransformerLens that is supported."""

from __future__ import annotations

import copy
import importlib
import importlib.metadata
import re
import warnings
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any, Literal, cast

import torch
from jaxtyping import Float, Int
from torch import Tensor

from causal_probe.arguments import checked
from causal_probe.errors import CausalProbeError, CausalProbeWarning
from causal_probe.hooks.check import DIFFERENCE, HookedModel, undisturbed
from causal_probe.hooks.tokens import added_by_itself

__all__ = ["to_hooked"]

#: How far log-probabilities may be apart by rounding, in standard deviations of the model's own: bridges compute in another order.
ROUNDING = {torch.float64: 1e-6, torch.float32: 1e-3, torch.float16: 2e-2, torch.bfloat16: 1e-1}

#: Tokens of the forward in which a hooked model is compared with the one that it was made of.
COMPARED_TOKENS = 8

#: Parts of the names of parameters that the package peft adds to a model, or beside which it moves the model's own.
ADAPTER = re.compile(
    r"(^|\.)(base_layer|modules_to_save|prompt_encoder|adapters|(lora|ia3|hada|lokr|oft|boft|vera|adaption)_\w+)(\.|$)"
)


@checked
def to_hooked(
    model: object,
    tokenizer: Any = None,
    name: str | None = None,
    *,
    check: Literal["raise", "warn", "off"] = "raise",
) -> HookedModel:
    """Give a model TransformerLens' hook points, if it has none, and see that it is still the same model.

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
    check
        Eight tokens are run before and after the hooks are put on, with eager attention, and their log-probabilities compared. What to
        do where they differ by more than rounding in the model's dtype: ``"raise"``, ``"warn"``; or ``"off"``, not to compare. The
        largest difference, in nats, is kept in the hooked model's ``hooked_difference`` and goes into the provenance of results.

    Raises
    ------
    CausalProbeError
        If ``model`` is neither hooked nor a Hugging Face model, holds adapters, TransformerLens has no bridge for its architecture, or
        its bridge computes something else.

    Warns
    -----
    CausalProbeWarning
        If the bridge computes something else and ``check`` is ``"warn"``.

    Examples
    --------
    >>> from transformers import GPT2Config, GPT2LMHeadModel
    >>> gpt2 = GPT2LMHeadModel(GPT2Config(n_layer=1, n_head=2, n_embd=8, vocab_size=11, n_positions=16))
    >>> model = to_hooked(gpt2, name="tiny")
    >>> model.cfg.model_name, model.cfg.n_layers, "blocks.0.attn.hook_pattern" in model.hook_dict
    ('tiny', 1, True)
    >>> model.hooked_difference < 1e-5
    True
    """
    if isinstance(model, HookedModel):
        return model
    from transformers import PreTrainedModel

    architecture = type(model).__name__
    if adapters := _adapters(model):
        raise CausalProbeError(
            f"This {architecture} holds adapters ({', '.join(adapters[:2])}), which TransformerLens leaves out. Give what "
            "merge_and_unload() of the package peft returns: the same model with the adapters in its weights."
        )
    if not isinstance(model, PreTrainedModel):
        raise CausalProbeError(
            f"A {architecture} can't be given hooks: give a TransformerLens model, a HookedRootModule, or a Hugging Face "
            "causal language model (of what load_model returns, to_hooked(*load_model(source)))."
        )
    from transformer_lens.model_bridge.sources import build_bridge_from_module

    twin = _copy_around_weights(model)
    tokens = None if check == "off" else _few_tokens(twin)
    before = None if tokens is None else _log_probabilities(twin, tokens)
    try:
        with _attention_functions_kept():
            hooked = build_bridge_from_module(
                twin,
                architecture=_known_name(architecture),
                hf_config=copy.deepcopy(model.config),
                model_name=name or model.config.name_or_path or architecture,
            )
    except Exception as error:  # TransformerLens raises many kinds for what it does not know
        raise CausalProbeError(
            f"TransformerLens can't put hooks on a {architecture}: {str(error).strip() or type(error).__name__} Give a causal "
            "language model of an architecture that it has a bridge for."
        ) from error
    _cut_heads(hooked)
    if tokens is not None and before is not None:
        _compare(hooked, architecture, tokens, before, check)
    if tokenizer is not None:
        _give_tokenizer(hooked, tokenizer)
    return cast(HookedModel, hooked)


def _known_name(architecture: str) -> str:
    """The name under which TransformerLens knows an architecture: some differ from transformers' in their capitals."""
    from transformer_lens.factories.architecture_adapter_factory import SUPPORTED_ARCHITECTURES

    return next((known for known in SUPPORTED_ARCHITECTURES if known.lower() == architecture.lower()), architecture)


def _adapters(model: object) -> list[str]:
    """The names of the parameters that adapters brought."""
    named = model.named_parameters() if isinstance(model, torch.nn.Module) else ()
    return [name for name, _ in named if ADAPTER.search(name)]


@contextmanager
def _attention_functions_kept() -> Iterator[None]:
    """TransformerLens 3.9 replaces Gemma 2's and 3's attention functions for the whole process, whatever the model (TransformerLens#1795).

    Its own mark that this is done keeps it from doing it. Its hooks after the rotation fire all the same.
    """
    owner = importlib.import_module(
        "transformer_lens.model_bridge.generalized_components.position_embeddings_attention"
    )
    done = getattr(owner, "_EAGER_ATTENTION_WRAPPED", None)
    if done is None:
        yield
        return
    setattr(owner, "_EAGER_ATTENTION_WRAPPED", True)  # noqa: B010 - TransformerLens 4 has none
    try:
        yield
    finally:
        setattr(owner, "_EAGER_ATTENTION_WRAPPED", done)  # noqa: B010


def _few_tokens(model: Any) -> Int[Tensor, "1 pos"]:
    """Tokens from all over the vocabulary, none of them special."""
    config = model.config.get_text_config()
    n = min(COMPARED_TOKENS, getattr(config, "max_position_embeddings", None) or COMPARED_TOKENS)
    named = [getattr(config, f"{which}_token_id", None) for which in ("bos", "eos", "pad")]
    special = {token for each in named for token in (each if isinstance(each, list) else [each])}
    known = [token for token in range(config.vocab_size) if token not in special] or [0]
    return torch.tensor([[known[len(known) * i // n] for i in range(n)]], device=next(model.parameters()).device)


def _log_probabilities(run: Callable[..., Any], tokens: Int[Tensor, "1 pos"]) -> Float[Tensor, "*axes"] | None:
    """None where a model can't be run on tokens alone: encoders with a decoder, models without weights."""
    modules = [(module, module.training) for module in run.modules()] if isinstance(run, torch.nn.Module) else []
    try:
        for module, _ in modules:
            module.training = False
        with torch.no_grad():
            output = run(tokens)
        found = getattr(output, "logits", output)
        logits = found[0] if isinstance(found, tuple) else found
        return None if logits.is_meta else logits[0].to("cpu", torch.float64).log_softmax(-1)
    except Exception:  # whatever a model raises; what it is says the preflight
        return None
    finally:
        for module, mode in modules:
            module.training = mode


def _compare(
    hooked: Any, architecture: str, tokens: Int[Tensor, "1 pos"], before: Float[Tensor, "*axes"], check: str
) -> None:
    """Keep how far a hooked model's log-probabilities are from those before; raise or warn where they are another model's."""
    with undisturbed(hooked):
        after = _log_probabilities(hooked, tokens)
    if after is None or after.shape != before.shape:
        said = "it can't be run" if after is None else f"its output has the shape {list(after.shape)}"
        difference, allowed = float("inf"), 0.0
    else:
        same = (after == before) | (after.isnan() & before.isnan())
        apart = torch.where(same, torch.zeros_like(before), (after - before).abs())
        difference = float(apart.max())
        dtype = next((p.dtype for p in hooked.parameters() if p.is_floating_point()), torch.float32)
        finite = before[before.isfinite()]
        allowed = ROUNDING.get(dtype, ROUNDING[torch.bfloat16]) * (float(finite.std()) if len(finite) > 1 else 0.0)
        said = f"its log-probabilities on {tokens.shape[1]} tokens differ by up to {difference:.3g} nats, where rounding makes {allowed:.2g}"
    setattr(hooked, DIFFERENCE, difference)
    if difference <= allowed:
        return
    message = (
        f"With hooks a {architecture} is another model: {said}. Every probe would report on that one. The bridge is that of TransformerLens "
        f"{importlib.metadata.version('transformer-lens')}: use another version, or say check='warn' to go on."
    )
    if check == "raise":
        raise CausalProbeError(message)
    warnings.warn(message, CausalProbeWarning, stacklevel=3)


def _copy_around_weights(model: Any) -> Any:
    """The same modules anew around the same parameters and buffers, with eager attention: a bridge rebuilds what it is given."""
    shared = {id(tensor): tensor for tensor in (*model.parameters(), *model.buffers())}
    twin = copy.deepcopy(model, shared)
    twin.set_attn_implementation("eager")
    return twin


def _cut_heads(hooked: Any) -> None:
    """Latent attention's heads are as wide as their values; bridges cut hook_z by another width, through the middle of heads."""
    for block in getattr(hooked, "blocks", ()):
        attention = getattr(block, "attn", None)
        width = getattr(getattr(attention, "original_component", None), "v_head_dim", None)
        conversion: Any = getattr(getattr(getattr(attention, "o", None), "hook_in", None), "hook_conversion", None)
        if width is not None and hasattr(conversion, "d_head"):
            conversion.n_heads, conversion.d_head = int(hooked.cfg.n_heads), int(width)


def _give_tokenizer(hooked: Any, tokenizer: Any) -> None:
    # Not through TransformerLens' own set-up: it loads the tokenizer a second time, from the hub if need be, to make it put a
    # BOS token in front of everything.
    if not callable(tokenizer) or not hasattr(tokenizer, "pad_token"):
        raise CausalProbeError(
            f"The tokenizer is a {type(tokenizer).__name__}. Give one of transformers', such as AutoTokenizer.from_pretrained(source)."
        )
    tokenizer = copy.deepcopy(tokenizer)
    if tokenizer.pad_token is None:
        tokenizer.pad_token = tokenizer.eos_token
    hooked.tokenizer = tokenizer
    before, after = added_by_itself(tokenizer)
    hooked.cfg.tokenizer_prepends_bos = hooked.cfg.default_prepend_bos = bool(before)
    hooked.cfg.tokenizer_appends_eos = tokenizer.eos_token_id in after
