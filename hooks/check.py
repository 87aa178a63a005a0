"""The surface that a model must offer for hooks, and restoring the model after use.

A probe depends on the smallest structural surface, :class:`HookedModel`, never on a class: HookedTransformer and the bridges
of TransformerLens, and every user-written ``HookedRootModule``, offer it.
"""

from __future__ import annotations

import difflib
import math
import re
import warnings
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import contextmanager
from typing import Any, Protocol, runtime_checkable

import torch
from torch import Tensor

from causal_probe.arguments import Natural, checked
from causal_probe.errors import CausalProbeError

__all__ = [
    "HookedModel",
    "attention_hook",
    "attention_hooks",
    "describe",
    "is_live",
    "keep",
    "live_hooks",
    "logits_of",
    "require_hooks",
    "row_shift",
    "undisturbed",
]

#: A hook point of a layer's attention.
ATTENTION = re.compile(r"blocks\.\d+\.attn\.")
#: The parts of the surface below.
SURFACE = ("cfg", "hook_dict", "hooks", "run_with_hooks", "__call__")
#: Beginnings of the names of Hugging Face configurations of encoders.
ENCODERS = (
    "Bert",
    "Roberta",
    "Distil",
    "Albert",
    "Electra",
    "Deberta",
    "MPNet",
    "Hubert",
    "Wav2Vec2",
    "ModernBert",
    "Esm",
    "T5Encoder",
)
#: The attribute in which a hooked model keeps how far its log-probabilities are from those of the model that it was made of.
DIFFERENCE = "hooked_difference"


@runtime_checkable
class HookedModel(Protocol):
    """The part of TransformerLens' surface that hooks and probes use."""

    @property
    def cfg(self) -> Any:
        """The model's configuration: at least ``n_layers``."""

    @property
    def hook_dict(self) -> Mapping[str, Any]:
        """Every hook point by its name."""

    def hooks(self, fwd_hooks: Any = ..., bwd_hooks: Any = ...) -> Any:
        """A context manager that adds hooks and takes away those alone."""

    def run_with_hooks(self, *args: Any, **kwargs: Any) -> Any:
        """Run once with hooks."""

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        """Run."""


@checked
def attention_hook(layer: Natural, what: str) -> str:
    """The name of a layer's attention hook point; layers are counted from 0. Whether the model has it, :func:`require_hooks` says.

    >>> attention_hook(0, "pattern")
    'blocks.0.attn.hook_pattern'
    """
    return f"blocks.{layer}.attn.hook_{what}"


def attention_hooks(
    model: HookedModel, points: Iterable[str], layers: Iterable[int] | None = None
) -> dict[tuple[int, str], str]:
    """The names of attention hook points, by layer (by default all that have attention) and point, layer by layer.

    >>> from causal_probe.models import DisentangledTransformer
    >>> attention_hooks(DisentangledTransformer(d_vocab=3, n_positions=4), ["z"])
    {(0, 'z'): 'blocks.0.attn.hook_z', (1, 'z'): 'blocks.1.attn.hook_z'}
    """
    points = tuple(points)
    if layers is None:  # in a hybrid model, some layers are of another kind; where all seem to be, all are asked
        every = range(int(model.cfg.n_layers))
        having = {int(name.split(".")[1]) for name in model.hook_dict if ATTENTION.match(name)}
        layers = [layer for layer in every if layer in having] or every
    each = list(layers)
    if not each:
        raise CausalProbeError("No layer was named. Name one or more, or give None for all.")
    return {(layer, point): attention_hook(layer, point) for layer in each for point in points}


def require_hooks(model: object, names: Iterable[str]) -> None:
    """Raise unless ``model`` is a :class:`HookedModel` with a hook point of each name; all that is missing is said at once.

    Bridges of TransformerLens 3.9 ignore a hook whose name they don't know, without a word: what it was to record is then
    missing, and what it was to change stays.

    Raises
    ------
    CausalProbeError
        Naming the missing parts of the surface, or the missing hook points with the nearest names that there are.

    Examples
    --------
    >>> from causal_probe.models import DisentangledTransformer
    >>> require_hooks(DisentangledTransformer(d_vocab=3, n_positions=4), ["blocks.0.attn.hook_pattern"])
    """
    if not all(hasattr(model, part) for part in SURFACE):
        raise CausalProbeError(no_surface(model))
    known = getattr(model, "hook_dict")  # noqa: B009 - the type of model is object here
    if unknown := [name for name in names if name not in known]:
        nearest = sorted({near for name in unknown for near in difflib.get_close_matches(name, known, n=2)})
        hint = f"The nearest that it has: {', '.join(nearest[:6])}." if nearest else f"It has {len(known)} others."
        raise CausalProbeError(f"{type(model).__name__} has no hook point {', '.join(unknown)}. {hint}")


def no_surface(model: object) -> str:
    """The missing parts of the surface."""
    missing = [part for part in SURFACE if not hasattr(model, part)]
    return (
        f"A {type(model).__name__} can't be probed: it has no {', '.join(missing)}. Give what hooks.to_hooked(model, tokenizer) makes of a "
        "Hugging Face model, hooks.to_hooked(*models.load_model(source)) of a folder or a name, a TransformerLens model "
        "(HookedTransformer, TransformerBridge), or a HookedRootModule whose setup() has run."
    )


def logits_of(found: Any, tokens: Tensor, *, shape: tuple[int, int] | None = None, d_out: int | None = None) -> Tensor:
    """What a model has returned for tokens, if it is logits [batch, pos, d_vocab] of which each token has one.

    Parameters
    ----------
    shape
        Their first two axes, where they are not those of the tokens.
    d_out
        How many outputs the model has at each position, where they may be others than logits of its tokens.

    Raises
    ------
    CausalProbeError
        If it is a dict, a tuple or nothing, or a tensor of another shape: read as logits, that would give wrong numbers.

    Examples
    --------
    >>> logits_of((torch.zeros(1, 2, 3), None), torch.tensor([[0, 1]]))
    Traceback (most recent call last):
    causal_probe.errors.CausalProbeError: The model returned a tuple for tokens [1, 2]. Its forward must return logits [batch, pos, d_vocab], one tensor.
    """
    some = isinstance(found, Tensor) and found.is_floating_point() and found.ndim == 3
    if some and tuple(found.shape[:2]) == (shape or tuple(tokens.shape)):
        its: Tensor = found
        if its.shape[2] == d_out or its.shape[2] > int(tokens.max()):
            return its
    what = f"{found.dtype} {list(found.shape)}" if isinstance(found, Tensor) else f"a {type(found).__name__}"
    raise CausalProbeError(
        f"The model returned {what} for tokens {list(tokens.shape)}. Its forward must return logits [batch, pos, d_vocab], one tensor."
    )


def keep(found: dict[Any, Any], key: Any) -> Callable[[Any, Any], None]:
    """What a hook does that puts the value there into ``found``, and leaves it as it is.

    >>> found = {}
    >>> keep(found, "z")(3, None), found
    (None, {'z': 3})
    """

    def look(value: Any, hook: Any) -> None:
        found[key] = value

    return look


def is_live(model: HookedModel, name: str, run: Callable[[], Tensor]) -> bool:
    """Whether what ``run`` computes depends on the value at a hook point.

    Some hook points are decorative: they show a value that nothing reads any more, as the patterns of BERT bridges do. An edit
    there changes nothing, and its effect would be reported as zero. A hook is *live* if its value, replaced by a detached leaf
    that requires grad, makes the output depend on that leaf. So a zero weight behind a hook does not make it dead.

    Parameters
    ----------
    name
        A hook point of ``model``.
    run
        Runs ``model`` once and returns what is measured. If it switches gradients off, the value is replaced by NaN instead,
        which spreads through whatever reads it.
    """
    return name in live_hooks(model, [name], run)


def live_hooks(model: HookedModel, names: Iterable[str], run: Callable[[], Tensor]) -> set[str]:
    """Which of several hook points are live: see :func:`is_live`. One run, where all of them are.

    A leaf cuts off what lies before it, unless there is a way around, as the residual stream is around every layer. So a point that
    seems dead beside others is asked again by itself: models without a residual stream (the reduced transformer) have none.
    """
    names = tuple(names)
    require_hooks(model, names)
    leaves: dict[str, list[Tensor]] = {name: [] for name in names}

    def to_leaf(name: str) -> Callable[[Tensor, Any], Tensor]:
        def replace(value: Tensor, hook: Any) -> Tensor:
            leaves[name].append(value.detach().clone().requires_grad_())
            return leaves[name][-1]

        return replace

    def to_nan(value: Tensor, hook: Any) -> Tensor:
        return torch.full_like(value, math.nan)

    with undisturbed(model), warnings.catch_warnings():
        warnings.simplefilter("ignore", UserWarning)  # some bridges warn of a discarded edit: that is the answer here
        for parameter in _parameters(model):  # so that the gradient's graph starts at the leaf, and costs no more
            parameter.requires_grad_(False)
        with torch.enable_grad(), model.hooks(fwd_hooks=[(name, to_leaf(name)) for name in names]):
            output = run().sum()
        fired = [(name, leaf) for name in names for leaf in leaves[name]]
        if not fired:
            return set()
        if output.requires_grad:
            gradients = torch.autograd.grad(output, [leaf for _, leaf in fired], allow_unused=True)
            live = {name for (name, _), gradient in zip(fired, gradients, strict=True) if gradient is not None}
            alone = {name for name, _ in fired} - live if len(names) > 1 else set()
            return live | {name for name in alone if is_live(model, name, run)}
        live = set()
        for name in {name for name, _ in fired}:
            with model.hooks(fwd_hooks=[(name, to_nan)]):
                if run().isnan().any():
                    live.add(name)
        return live


@contextmanager
def undisturbed(model: HookedModel) -> Iterator[None]:
    """Measure a model and leave it as it was, also after an exception.

    Inside, the model is in evaluation mode (no dropout) and no gradients are recorded. Afterwards every module's training flag
    and every parameter's gradient flag is as before, and hooks that were added inside are gone. The caller's own hooks are
    active inside: a model that the caller has edited is measured as edited.

    Examples
    --------
    >>> from causal_probe.models import DisentangledTransformer
    >>> model = DisentangledTransformer(d_vocab=3, n_positions=4).train()
    >>> with undisturbed(model):
    ...     model.training
    False
    >>> model.training
    True
    """
    modules = _modules(model)
    training = [(module, module.training) for module in modules]
    gradients = [(parameter, parameter.requires_grad) for parameter in _parameters(model)]
    points = {
        id(point): point for point in model.hook_dict.values()
    }.values()  # a bridge lists a point under several names
    hooks = [(point, {id(handle) for handle in (*point.fwd_hooks, *point.bwd_hooks)}) for point in points]
    try:
        for module in modules:
            module.training = False
        with torch.no_grad():
            yield
    finally:
        for module, mode in training:
            module.training = mode
        for parameter, flag in gradients:
            parameter.requires_grad_(flag)
        for point, known in hooks:
            for handles in (point.fwd_hooks, point.bwd_hooks):
                for handle in [handle for handle in handles if id(handle) not in known]:
                    handle.hook.remove()
                    handles.remove(handle)


def describe(model: object) -> dict[str, Any]:
    """A model's name, dtype and device, for the provenance of a result; None where the model doesn't say.

    ``shift`` is :func:`row_shift`. Of what :func:`~causal_probe.hooks.to_hooked` made, also ``hooked_difference``: by how many nats the hooks changed log-probabilities.

    Raises
    ------
    CausalProbeError
        If it is no model with hooks.

    Examples
    --------
    >>> from causal_probe.models import DisentangledTransformer
    >>> describe(DisentangledTransformer(d_vocab=3, n_positions=4))["model"]
    'disentangled-transformer'
    """
    cfg = getattr(model, "cfg", None)
    if cfg is None:
        raise CausalProbeError(no_surface(model))
    parameter = next(iter(_parameters(model)), None)
    difference = getattr(model, DIFFERENCE, None)
    return {
        "model": getattr(cfg, "model_name", None) or type(model).__name__,
        "dtype": None if parameter is None else str(parameter.dtype).removeprefix("torch."),
        "device": None if parameter is None else str(parameter.device),
        "shift": row_shift(model),
        **({} if difference is None else {DIFFERENCE: difference}),
    }


def row_shift(model: object) -> int:
    """Of which position a row of attention speaks: 1, the next one, in a model that predicts the next token at each position; else 0, its own.

    A model may say so itself by an attribute ``row_shift``, as those of this package do, whose task asks at the last position alone. Of
    others, those with attention in one direction predict next tokens, and encoders don't.

    >>> from causal_probe.models import DisentangledTransformer
    >>> row_shift(DisentangledTransformer(d_vocab=3, n_positions=4))
    0
    """
    said = getattr(model, "row_shift", None)
    if said is not None:
        return int(said)
    cfg = getattr(model, "cfg", None)
    config = getattr(getattr(model, "original_model", None), "config", None)
    both_ways = getattr(cfg, "attention_dir", "causal") != "causal" or type(config).__name__.startswith(ENCODERS)
    return 0 if both_ways else 1


def _modules(model: HookedModel) -> list[torch.nn.Module]:
    # A bridge runs a Hugging Face model that it keeps outside its own modules; what stands between the parts that it wraps, such
    # as GPT-2's dropout of the embeddings, is found there alone.
    owners = [model, getattr(model, "original_model", None)]
    found = [module for owner in owners if isinstance(owner, torch.nn.Module) for module in owner.modules()]
    return list({id(module): module for module in found}.values())


def _parameters(model: object) -> list[torch.nn.Parameter]:
    return list(getattr(model, "parameters", tuple)())
