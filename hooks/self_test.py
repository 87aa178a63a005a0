"""Questions about a model's hooks whose answers are known beforehand, put before anything else is asked of it."""

from __future__ import annotations

import math
import warnings
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, ClassVar

import torch
from jaxtyping import Float, Int
from torch import Tensor

from causal_probe.hooks.batches import probe
from causal_probe.hooks.check import (
    HookedModel,
    attention_hook,
    attention_hooks,
    keep,
    logits_of,
    require_hooks,
    undisturbed,
)
from causal_probe.hooks.means import mean_patterns
from causal_probe.hooks.record import token_batches

__all__ = ["Answer", "self_test"]


@dataclass(frozen=True)
class Answer:
    """The outcome of a self-test with a known answer.

    Attributes
    ----------
    question
        ``pattern-moves-values``, ``pattern-is-read-back``, ``softmax-of-scores``, ``same-as-original`` or ``nothing-stays``.
    statement
        The expected outcome.
    error
        Largest deviation from it: of a probability, or relative to the largest entry of what is compared. None where it is not finite,
        because a hook answered nothing, say.
    tolerance
        The largest that passes.
    """

    DERIVED: ClassVar[tuple[str, ...]] = ("passed",)

    question: str
    statement: str
    error: float | None
    tolerance: float

    def __post_init__(self) -> None:
        if self.error is not None and not math.isfinite(self.error):
            object.__setattr__(self, "error", None)

    @property
    def passed(self) -> bool:
        """Whether the known answer came out."""
        return self.error is not None and self.error <= self.tolerance


@probe
def self_test(model: HookedModel, tokens: Any, *, original: Callable[..., Any] | None = None) -> tuple[Answer, ...]:
    """Ask a model what is known beforehand about its hooks.

    - *pattern-moves-values*: every head is made to attend to one token alone, 1, 2 or 3 before, by an edit of its pattern. What
      it reads (``hook_z``) must then be the value (``hook_v``) at that token, of the key/value head that it belongs to. Swapped
      axes, a shifted index, wrongly grouped heads and dead hooks show here.
    - *pattern-is-read-back*: the recorder must see each head attend to that token, with all its attention.
    - *softmax-of-scores*: ``hook_pattern`` must be the softmax of ``hook_attn_scores``.
    - *same-as-original*: without hooks, the model must compute what the original one does.
    - *nothing-stays*: after all that, the model must compute what it computed before, to the last bit.

    Parameters
    ----------
    model
        With live ``hook_v``, ``hook_pattern`` and ``hook_z``; the scores are asked about where there are such hooks. It is left
        as it was.
    tokens
        [batch, pos]. What they are doesn't matter. With fewer than four positions, less can show.
    original
        The Hugging Face model that ``model`` was made of, in evaluation mode, if any.

    Raises
    ------
    CausalProbeError
        If one of those hook points is missing.

    Examples
    --------
    >>> import torch
    >>> from causal_probe.models import DisentangledTransformer
    >>> answers = self_test(DisentangledTransformer(d_vocab=3, n_positions=4), torch.tensor([[0, 1, 2, 0]]))
    >>> all(answer.passed for answer in answers)
    True
    """
    tokens = torch.cat(list(token_batches(tokens)))
    layers = [layer for layer, _ in attention_hooks(model, ["z"])]
    require_hooks(model, [attention_hook(layer, what) for what in ("v", "pattern", "z") for layer in layers])
    has_scores = all(attention_hook(layer, "attn_scores") in model.hook_dict for layer in layers)
    with undisturbed(model):
        before = logits_of(model(tokens), tokens)
        eps = torch.finfo(before.dtype).eps
        loose = max(1e-4, 8 * eps)  # the models themselves compute in another order
        moved, read_back = _plant(model, tokens)
        answers = [
            Answer(
                "pattern-moves-values", "a head reads the value at the position that its pattern names", moved, 8 * eps
            ),
            Answer("pattern-is-read-back", "a planted pattern is recorded as it was planted", read_back, 8 * eps),
        ]
        if has_scores:
            error = _softmax_error(model, tokens)
            answers.append(Answer("softmax-of-scores", "the pattern is the softmax of the scores", error, loose))
        if original is not None:
            error = _relative_error(before, original(tokens).logits)
            answers.append(Answer("same-as-original", "the hooks change nothing by being there", error, loose))
        stays = 0.0 if torch.equal(model(tokens), before) else float("inf")
        answers.append(Answer("nothing-stays", "the model is the same afterwards", stays, 0.0))
    return tuple(answers)


def _plant(model: HookedModel, tokens: Int[Tensor, "batch pos"]) -> tuple[float, float]:
    """The errors of what the heads read, and of what is recorded, with a pattern of its own planted in every head."""
    layers = [layer for layer, _ in attention_hooks(model, ["z"])]
    values: dict[int, Tensor] = {}
    errors = []

    def plant(pattern: Float[Tensor, "batch head query key"], hook: Any) -> Float[Tensor, "batch head query key"]:
        keys = _keys(pattern.shape[1], pattern.shape[2]).to(pattern.device)
        return torch.zeros_like(pattern).scatter_(3, keys.expand(len(pattern), -1, -1)[..., None], 1)

    def compare(layer: int) -> Callable[..., None]:
        def record(z: Float[Tensor, "batch pos head d_head"], hook: Any) -> None:
            keys = _keys(z.shape[2], z.shape[1]).to(z.device)
            v = values[layer].repeat_interleave(z.shape[2] // values[layer].shape[2], dim=2)
            named = v.gather(1, keys.T[None, :, :, None].expand_as(z))
            errors.append(_relative_error(z, named))

        return record

    edits = [(attention_hook(layer, "pattern"), plant) for layer in layers]
    looks = [
        hook
        for n in layers
        for hook in ((attention_hook(n, "v"), keep(values, n)), (attention_hook(n, "z"), compare(n)))
    ]
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", UserWarning)  # some bridges warn of a discarded edit: that is an answer here
        with model.hooks(fwd_hooks=[*edits, *looks]):
            model(tokens)
        with model.hooks(fwd_hooks=edits):
            means = [its.mean for its in mean_patterns(model, tokens).values()]
    named = [mean.cpu().gather(2, _keys(*mean.shape[:2])[..., None]) for mean in means]
    return _largest(errors), _largest([float((1 - attention).abs().max()) for attention in named])


def _keys(n_heads: int, n_positions: int) -> Int[Tensor, "head query"]:
    """Which token each head is made to attend to: 1, 2 or 3 before, the first one where there is none."""
    offsets = 1 + torch.arange(n_heads) % 3
    return (torch.arange(n_positions) - offsets[:, None]).clamp(min=0)


def _softmax_error(model: HookedModel, tokens: Int[Tensor, "batch pos"]) -> float:
    scores: dict[int, Tensor] = {}
    errors = []

    def compare(layer: int) -> Callable[..., None]:
        def record(pattern: Float[Tensor, "batch head query key"], hook: Any) -> None:
            expected = scores[layer].float().softmax(-1) if layer in scores else torch.inf
            errors.append(float((pattern.float() - expected).abs().max()))

        return record

    layers = [layer for layer, _ in attention_hooks(model, ["z"])]
    looks = [(attention_hook(layer, "attn_scores"), keep(scores, layer)) for layer in layers]
    with model.hooks(fwd_hooks=looks + [(attention_hook(layer, "pattern"), compare(layer)) for layer in layers]):
        model(tokens)
    return _largest(errors)


def _relative_error(found: Tensor, expected: Tensor) -> float:
    return float((found - expected).abs().max() / expected.abs().max().clamp(min=torch.finfo(expected.dtype).tiny))


def _largest(errors: list[float]) -> float:
    # A hook that never fired has answered nothing. max() of a list would pass over NaN.
    return float(torch.tensor(errors).max()) if errors else float("inf")
