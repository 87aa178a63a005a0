"""The preflight: everything that would make a measurement wrong, found before it is made and said all at once."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from jaxtyping import Float, Int
from torch import Tensor

from causal_probe.arguments import checked
from causal_probe.errors import CausalProbeError
from causal_probe.hooks.batches import context_length, shape_fault, token_faults
from causal_probe.hooks.caught import catch, is_catchable
from causal_probe.hooks.check import (
    HookedModel,
    attention_hooks,
    describe,
    live_hooks,
    no_surface,
    require_hooks,
    undisturbed,
)
from causal_probe.hooks.record import row_slack, run_layers
from causal_probe.hooks.values import read_values
from causal_probe.hooks.visible import has_sinks

__all__ = ["Finding", "context_length", "find_faults", "preflight"]

#: The patterns of this many sequences are looked at; tokens, lengths and padding are checked in all of them.
SEQUENCES = 2

#: Whether a hook is live does not depend on the tokens: a few of them keep the gradient's graph small.
LIVENESS_TOKENS = 8

#: By how much what a head reads may miss its pattern times the values, of the largest number.
READ = {torch.float64: 1e-5, torch.float32: 1e-4, torch.float16: 1e-2, torch.bfloat16: 5e-2}


@dataclass(frozen=True)
class Finding:
    """One thing that is wrong.

    Attributes
    ----------
    kind
        ``no-surface``, ``missing-hooks``, ``tokens``, ``too-long``, ``vocabulary``, ``padding``, ``fails``, ``not-eager``,
        ``silent-hooks``, ``shape``, ``nan``, ``row-sums``, ``not-causal`` or ``dead-hooks``.
    message
        The finding, and what to do about it.
    """

    kind: str
    message: str

    def __str__(self) -> str:
        return self.message


@checked
def preflight(
    model: object,
    tokens: Any,
    *,
    attention_mask: Any = None,
    hooks: Sequence[str] = ("pattern",),
    edits: bool = True,
) -> None:
    """Raise unless attention can be measured, and the hooks used, on these tokens.

    Arguments are those of :func:`find_faults`.

    Raises
    ------
    CausalProbeError
        With every finding.

    Examples
    --------
    >>> import torch
    >>> from causal_probe.models import DisentangledTransformer
    >>> preflight(DisentangledTransformer(d_vocab=3, n_positions=4), torch.tensor([[0, 1, 2, 0]]))  # nothing is wrong
    """
    _refuse(model, find_faults(model, tokens, attention_mask=attention_mask, hooks=hooks, edits=edits))


def require_measurable(
    model: HookedModel, tokens: Int[Tensor, "batch pos"], hooks: Sequence[str] = ("pattern",), *, edits: bool = True
) -> None:
    """Raise as :func:`preflight` does, for what is wrong with the model alone: the tokens were read by a probe, or cut from text."""
    missing, points = _points(model, hooks)
    _refuse(model, (*missing, *_run_faults(model, tokens[:SEQUENCES], None, points, edits=edits)))


def _refuse(model: object, findings: Sequence[Finding]) -> None:
    if not findings:
        return
    name = describe(model)["model"] if isinstance(model, HookedModel) else type(model).__name__
    if len(findings) == 1:
        raise CausalProbeError(f"{name} can't be measured on these tokens: {findings[0]}")
    reasons = " ".join(f"({number}) {finding}" for number, finding in enumerate(findings, 1))
    raise CausalProbeError(f"{name} can't be measured on these tokens, for {len(findings)} reasons: {reasons}")


@checked
def find_faults(
    model: object,
    tokens: Any,
    *,
    attention_mask: Any = None,
    hooks: Sequence[str] = ("pattern",),
    edits: bool = True,
) -> tuple[Finding, ...]:
    """Everything that would make a measurement wrong; empty if nothing is.

    The model is run twice, on a few sequences. What is wrong with the tokens doesn't hide what is wrong with the model: where
    they can't be run, others are run in their place.

    Parameters
    ----------
    model
        Anything; what is no :class:`HookedModel` is told what it lacks. It is left as it was: the caller's hooks, training
        mode, dtype, device and gradient flags, also after an exception. The caller's hooks are active.
    tokens
        The tokens to measure on, [batch, pos].
    attention_mask
        [batch, pos], 1 at tokens and 0 at padding. It is given to the model, and rows of padding are not looked at.
    hooks
        Which hook points of the attention of every layer must be there and live: ``"pattern"`` to read and replace patterns,
        ``"z"`` to ablate heads, ``"attn_scores"`` for gradients.
    edits
        Whether patterns will be replaced, too. If not, one that is not live will do where it is seen to be the model's: where what
        each head reads is the pattern times the values.

    Returns
    -------
    tuple of Finding

    Examples
    --------
    >>> import torch
    >>> from causal_probe.models import DisentangledTransformer
    >>> find_faults(DisentangledTransformer(d_vocab=3, n_positions=4), torch.tensor([[0, 1, 2, 0]]))
    ()
    """
    if not isinstance(model, HookedModel):
        return (Finding("no-surface", no_surface(model)),)
    findings, by_point = _points(model, hooks)
    if fault := _shape_fault(tokens, attention_mask):
        findings.append(fault)
        tokens, attention_mask = torch.zeros(1, 2, dtype=torch.long), None
    else:
        faults = (Finding(kind, fault) for kind, fault in token_faults(model, tokens))
        findings += [fault for fault in faults if attention_mask is None or fault.kind != "padding"]
    tokens = _runnable(model, tokens[:SEQUENCES])
    attention_mask = None if attention_mask is None else attention_mask[:SEQUENCES, : tokens.shape[1]].to(tokens.device)

    return (*findings, *_run_faults(model, tokens, attention_mask, by_point, edits=edits))


def _points(model: HookedModel, hooks: Sequence[str]) -> tuple[list[Finding], dict[str, list[str]]]:
    """The missing parts, and the hook points of each kind."""
    by_point: dict[str, list[str]] = {}
    for (_, point), name in attention_hooks(model, hooks).items():
        by_point.setdefault(point, []).append(name)
    try:
        require_hooks(model, [name for names in by_point.values() for name in names])
    except CausalProbeError as error:
        return [Finding("missing-hooks", str(error))], by_point
    return [], by_point


def _run_faults(
    model: HookedModel,
    tokens: Int[Tensor, "batch pos"],
    mask: Tensor | None,
    by_point: dict[str, list[str]],
    *,
    edits: bool,
) -> tuple[Finding, ...]:
    """Faults of the values at the hook points, on tokens that can be run."""
    with undisturbed(model):
        known = [names for names in by_point.values() if all(name in model.hook_dict for name in names)]
        findings, silent = _run(model, tokens, mask, [name for names in known for name in names])
        if "fails" not in {finding.kind for finding in findings}:
            try:  # the first run ends before the logits, this one doesn't
                findings += _dead(model, tokens, [names for names in known if names[0] not in silent], edits=edits)
            except Exception as error:  # whatever a model raises is the finding
                findings.append(_failure(error))
    return tuple(findings)


# ------------------------------------------------------------------------------------------------------------- the tokens


def _shape_fault(tokens: Any, mask: Any) -> Finding | None:
    if fault := shape_fault(tokens) or (
        None if len(tokens) else f"There are no tokens: their shape is {list(tokens.shape)}."
    ):
        return Finding("tokens", fault)
    if mask is not None and (not isinstance(mask, Tensor) or mask.shape != tokens.shape):
        found = str(list(mask.shape)) if isinstance(mask, Tensor) else f"a {type(mask).__name__}"
        return Finding(
            "tokens", f"The attention mask must have the tokens' shape, {list(tokens.shape)}; it is {found}."
        )
    return None


def _runnable(model: HookedModel, tokens: Int[Tensor, "batch pos"]) -> Int[Tensor, "batch runnable"]:
    """Tokens that the model can run, the same where they can be."""
    return (
        tokens[:, : context_length(model)].clamp(0, int(model.cfg.d_vocab) - 1).to(describe(model)["device"] or "cpu")
    )


# ------------------------------------------------------------------------------------------------------------- the patterns


@dataclass(frozen=True)
class _Pattern:
    """A summary of one layer's patterns."""

    shape: tuple[int, ...]
    nan: Sequence[int] = ()
    wrong: Sequence[int] = ()
    ahead: Sequence[int] = ()
    low: float = 1.0
    high: float = 1.0


def _run(
    model: HookedModel, tokens: Int[Tensor, "batch pos"], mask: Tensor | None, names: Sequence[str]
) -> tuple[list[Finding], set[str]]:
    """Faults of the patterns, and the hook points that did not fire."""
    fired: set[str] = set()
    patterns: dict[int, _Pattern] = {}

    def look(name: str) -> Callable[..., None]:
        def record(value: Any, hook: Any) -> None:
            if isinstance(value, Tensor):
                fired.add(name)
                if name.endswith("hook_pattern"):
                    layer = int(name.split(".")[1])
                    patterns[layer] = _look_at(value, mask, nothing=has_sinks(model, layer))

        return record

    options = {} if mask is None else {"attention_mask": mask}
    try:
        with model.hooks(fwd_hooks=[(name, look(name)) for name in names]):
            run_layers(model, tokens, int(model.cfg.n_layers), **options)
    except Exception as error:  # whatever a model raises is the finding
        return [_failure(error)], set()
    silent = [name for name in names if name not in fired]
    return [*_silence(model, silent), *_pattern_faults(patterns)], set(silent)


def _failure(error: Exception) -> Finding:
    reason = next(iter(str(error).strip().splitlines()), "")
    return Finding("fails", f"The model fails on them with {type(error).__name__}: {reason}")


def _look_at(pattern: Float[Tensor, "*shape"], mask: Tensor | None, *, nothing: bool) -> _Pattern:
    if pattern.ndim != 4 or pattern.shape[2] != pattern.shape[3]:
        return _Pattern(tuple(pattern.shape))
    totals = pattern.sum(-1, dtype=torch.promote_types(pattern.dtype, torch.float32))
    rows = torch.ones_like(totals, dtype=torch.bool)
    if mask is not None:
        rows &= mask.bool()[:, None, :]
    nan = totals.isnan() & rows
    apart = totals - 1 if nothing else (totals - 1).abs()  # where heads can attend to nothing, rows sum to one or less
    wrong = (apart > row_slack(pattern.dtype)) & rows
    ahead = (pattern.triu(1) > 1e-6).any(-1) & rows
    found = totals[wrong] if wrong.any() else totals.new_ones(1)
    nans, wrongs, aheads = (what.any(-1).any(0).nonzero().flatten().tolist() for what in (nan, wrong, ahead))
    return _Pattern(tuple(pattern.shape), nans, wrongs, aheads, low=float(found.min()), high=float(found.max()))


def _pattern_faults(patterns: dict[int, _Pattern]) -> Iterator[Finding]:
    if shapes := {
        pattern.shape
        for pattern in patterns.values()
        if len(pattern.shape) != 4 or pattern.shape[2] != pattern.shape[3]
    }:
        yield Finding(
            "shape",
            f"The pattern hooks should carry [batch, head, query, key]; they carry {', '.join(str(list(s)) for s in shapes)}.",
        )
    if nan := _heads({layer: pattern.nan for layer, pattern in patterns.items()}):
        yield Finding(
            "nan",
            f"There is NaN in the patterns of {nan}: check the weights for NaN, and the tokens for rows that are all masked.",
        )
    if wrong := _heads({layer: pattern.wrong for layer, pattern in patterns.items()}):
        low = min(pattern.low for pattern in patterns.values())
        high = max(pattern.high for pattern in patterns.values())
        yield Finding(
            "row-sums",
            f"Rows of the patterns of {wrong} don't sum to one but to {low:.4g} ... {high:.4g}: attention is not normalised there, "
            "or a hook of yours changes it.",
        )
    if ahead := _heads({layer: pattern.ahead for layer, pattern in patterns.items()}):
        yield Finding(
            "not-causal",
            f"{ahead} attend to later positions: the model is not causal, and a parent must come before its child.",
        )


def _heads(heads: dict[int, Sequence[int]]) -> str:
    names = [f"L{layer}H{head}" for layer in sorted(heads) for head in heads[layer]]
    return ", ".join(names[:4]) + (f" and {len(names) - 4} more heads" if len(names) > 4 else "")


# ---------------------------------------------------------------------------------------------------------------- the hooks


def _silence(model: HookedModel, silent: Sequence[str]) -> Iterator[Finding]:
    if not silent:
        return
    config = getattr(getattr(model, "original_model", None), "config", None)
    attention = getattr(config, "_attn_implementation", None)
    if attention not in (None, "eager"):
        yield Finding(
            "not-eager",
            f"{_names(silent)}: no value passes, because the attention is {attention!r}, which makes no patterns. Load the model "
            'with attn_implementation="eager".',
        )
    else:
        yield Finding("silent-hooks", f"{_names(silent)}: no value passes. The model does not use this attention.")


def _dead(
    model: HookedModel, tokens: Int[Tensor, "batch pos"], points: Sequence[list[str]], *, edits: bool
) -> Iterator[Finding]:
    few = tokens[:1, :LIVENESS_TOKENS]
    live: set[str] = set()
    for names in points:  # those of one kind at a time: a replaced z cuts the pattern behind it off
        live |= live_hooks(model, names, lambda: _logits(model(few)))
    dead = [name for names in points for name in names if name not in live]
    if not edits:
        dead = [name for name in dead if not name.endswith("hook_pattern") or not _is_read(model, few, name)]
    if dead:
        yield Finding(
            "dead-hooks",
            f"{_names(dead)}: decorative, for the model's output does not depend on the values there. What they show may not be "
            "what the model uses, an edit there does nothing, and its effect would be reported as zero.",
        )


def _is_read(model: HookedModel, tokens: Int[Tensor, "batch pos"], name: str) -> bool:
    """Whether what the heads of a layer read is the pattern that is shown, times the values.

    The values are those at the hook point; or, where a norm follows them or a gate what is read, those that transformers' own attention gets.
    """
    names = {what: name.replace("hook_pattern", f"hook_{what}") for what in ("pattern", "v", "z")}
    found = read_values(model, tokens, names.values(), n_layers=int(model.cfg.n_layers))
    pattern, values, read = (found.get(each) for each in names.values())
    if _is_product(pattern, values, read):
        return True
    layer = int(name.split(".")[1])
    if pattern is None or not is_catchable(model, layer):
        return False
    with catch(model, layer) as caught:
        again = read_values(model, tokens, [name], n_layers=int(model.cfg.n_layers)).get(name)
    used = caught.get("pattern")
    same = used is not None and again is not None and used.shape == again.shape and torch.equal(used, again)
    return same and _is_product(used, caught.get("v"), caught.get("z"))


def _is_product(pattern: Tensor | None, values: Tensor | None, read: Tensor | None) -> bool:
    if pattern is None or values is None or read is None or values.ndim != 4 or read.ndim != 4:
        return False
    n_heads = pattern.shape[1]
    if n_heads % values.shape[2] or read.shape[2:] != (n_heads, values.shape[3]):
        return False
    values = values.repeat_interleave(n_heads // values.shape[2], dim=2)
    expected = (pattern.to(values) @ values.transpose(1, 2)).transpose(1, 2)
    return float((expected - read).abs().max()) <= READ.get(read.dtype, max(READ.values())) * float(read.abs().max())


def _logits(output: Any) -> Tensor:
    found = getattr(output, "logits", output)
    logits: Tensor = found if isinstance(found, Tensor) else found[0]
    return logits


def _names(names: Sequence[str]) -> str:
    return ", ".join(names[:2]) + (f" and {len(names) - 2} more hook points" if len(names) > 2 else "")
