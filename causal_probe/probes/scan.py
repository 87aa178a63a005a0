"""Score every head of a model against many templates in one streaming pass."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping, Sequence
from typing import Any, NamedTuple

import numpy as np
import torch
from jaxtyping import Float, Int
from torch import Tensor

from causal_probe.errors import CausalProbeError
from causal_probe.hooks import HookedModel, attention_hook, describe, require_hooks
from causal_probe.hooks.stream import Reduce, reduce_patterns
from causal_probe.probes.head_scores import Evidence, HeadScores
from causal_probe.probes.sequences import Sequences, ngram_tokens, repeated_tokens
from causal_probe.probes.targets import Targets, compile_targets
from causal_probe.probes.templates import SHIPPED, Template, find_templates
from causal_probe.results import versions

__all__ = ["micro_batch_size", "scan", "score_patterns"]

#: Without a batch size, what a micro-batch's patterns of all layers, or its logits, take up at most, in bytes: some models keep
#: all patterns for the length of a forward.
MICRO_BATCH = 2**28


def scan(
    model: HookedModel,
    tokens: Any = None,
    *,
    templates: Iterable[str | Template] | None = None,
    queries: Sequence[int] | None = None,
    sequences: int | None = None,
    period: int | None = None,
    bos: str = "auto",
    seed: int = 0,
    batch_size: int | None = None,
) -> HeadScores:
    """Score every attention head of any TransformerLens model against head types, all in one pass.

    The score of a head is the attention that it puts on a template's targets, averaged over the rows that have one, and then
    over sequences; rows whose targets are all visible keys say nothing and are left out. See
    :class:`~causal_probe.probes.HeadScore` for chance, excess, and standard error. A high score says where a head looks, not
    that the model uses it.

    Patterns are reduced at the hook: memory grows neither with the number of sequences nor, to speak of, with that of
    templates.

    Parameters
    ----------
    model
        A TransformerLens model, or any HookedRootModule with hook points ``blocks.{layer}.attn.hook_pattern``. It is run in
        evaluation mode without gradients, with the caller's own hooks, and is left as it was.
    tokens
        Tokens [batch, pos] without padding, or an iterable of such tensors (or of anything with ``.tokens``), all of one length;
        they are taken as they are. By default :func:`~causal_probe.probes.repeated_tokens`, and for n-gram templates
        :func:`~causal_probe.probes.ngram_tokens`, on which they differ from plain induction.
    templates
        Templates or their names. By default those of :data:`~causal_probe.probes.SHIPPED`, without the n-gram templates where
        the context is too short for their sequences.
    queries
        Score only these rows, negative ones counted from the end; all by default.
    sequences, period, bos, seed
        Of the sequences that are made; see :func:`~causal_probe.probes.repeated_tokens`.
    batch_size
        Sequences in a forward pass. By default as many as keep the patterns of all layers, and the logits, within 256 MiB.

    Raises
    ------
    CausalProbeError
        If an argument is out of range or does not go with the others, a template is unknown or returns something else, a hook
        point is missing or never fires, or a pattern is not made of probabilities.

    Examples
    --------
    >>> from causal_probe.models import DisentangledTransformer
    >>> model = DisentangledTransformer(d_vocab=6, n_positions=12)
    >>> _ = model.block(0, 0, query="position", key="position").diagonal(-1).fill_(30)
    >>> _ = model.block(1, 0, query="token", key="L0H0.token").diagonal().fill_(30)
    >>> found = scan(model, templates=["previous-token", "duplicate-token", "induction"])
    >>> found
    HeadScores of disentangled-transformer: 2 heads in 2 layers, 3 templates, 267 sequences
      template         best head  score   chance  excess  sink
      previous-token   L0H0        1.000   0.191   1.000   0.091
      duplicate-token  L0H0        0.000   0.108  -0.121   0.000
      induction        L1H0        1.000   0.108   1.000   0.000
    >>> [(head.layer, head.head, head.template) for head in found.called()]
    [(0, 0, 'previous-token'), (1, 0, 'induction')]
    """
    wanted = find_templates(SHIPPED if templates is None else templates)
    made = {"sequences": sequences, "period": period, "bos": bos, "seed": seed}
    if tokens is None:
        parts = _make(model, wanted, made, optional=templates is None)
    else:
        _refuse(made)
        parts = [_Part(wanted, tokens, {"kind": "given"})]
    evidence: dict[str, Evidence] = {}
    shared: dict[tuple[str, str], int] = {}
    for part in parts:
        found, together = _score(model, part.templates, part.tokens, queries, batch_size)
        evidence |= found
        shared |= together
    kept = tuple(template for template in wanted if template.name in evidence)
    return HeadScores(
        templates=kept,
        evidence={template.name: evidence[template.name] for template in kept},
        shared=shared,
        settings={
            "templates": [template.name for template in kept],
            "queries": None if queries is None else list(queries),
            "batch_size": batch_size,
            "tokens": {template.name: part.settings for part in parts for template in part.templates},
        },
        provenance={**describe(model), "versions": versions()},
    )


def score_patterns(
    patterns: Sequence[Float[Tensor, "batch _head query key"]],
    tokens: Int[Tensor, "batch pos"],
    *,
    templates: Iterable[str | Template] = SHIPPED,
    queries: Sequence[int] | None = None,
) -> HeadScores:
    """Score attention patterns that are already there, one tensor for each layer, as :func:`scan` does.

    Raises
    ------
    CausalProbeError
        If a template is unknown or returns something else, or the patterns don't fit the tokens.
    """
    wanted = find_templates(templates)
    n_pos = tokens.shape[1]
    if wrong := [list(each.shape) for each in patterns if (*each.shape[:1], *each.shape[2:]) != (len(tokens), n_pos, n_pos)]:
        raise CausalProbeError(
            f"Patterns of {len(tokens)} sequences of {n_pos} tokens are [{len(tokens)}, head, {n_pos}, {n_pos}]; there are {wrong}."
        )
    targets = compile_targets(wanted, tokens, queries=queries)
    reduced = {layer: _reduce(targets, pattern) for layer, pattern in enumerate(patterns)}
    evidence, shared = _gather(wanted, [targets], [reduced])
    return HeadScores(
        templates=wanted,
        evidence=evidence,
        shared=shared,
        settings={
            "templates": [template.name for template in wanted],
            "queries": None if queries is None else list(queries),
            "batch_size": None,
            "tokens": {template.name: {"kind": "given"} for template in wanted},
        },
        provenance={
            "model": "patterns",
            "dtype": str(patterns[0].dtype).removeprefix("torch."),
            "device": str(patterns[0].device),
            "versions": versions(),
        },
    )


def micro_batch_size(model: HookedModel, pos: int) -> int:
    """How many sequences of ``pos`` tokens a forward pass takes by default, at least 1."""
    cfg = model.cfg
    per_layer = int(getattr(cfg, "n_heads", 1)) * pos * pos
    numbers = max(int(cfg.n_layers) * per_layer, pos * int(getattr(cfg, "d_vocab", 1)))
    return max(1, MICRO_BATCH // (4 * numbers))


# ------------------------------------------------------------------------------------------------------------------ parts


class _Part(NamedTuple):
    """Templates that are scored on the same sequences."""

    templates: tuple[Template, ...]
    tokens: Any
    settings: Mapping[str, Any]


def _make(
    model: HookedModel, templates: tuple[Template, ...], made: Mapping[str, Any], *, optional: bool
) -> list[_Part]:
    require_hooks(model, [attention_hook(layer, "pattern") for layer in range(model.cfg.n_layers)])
    parts = []
    if plain := tuple(template for template in templates if template.ngram == 1):
        parts.append(_part(plain, repeated_tokens(model, **made)))
    if ngrams := tuple(template for template in templates if template.ngram > 1):
        try:
            parts.append(_part(ngrams, ngram_tokens(model, n=max(template.ngram for template in ngrams), **made)))
        except CausalProbeError:
            if not optional:
                raise
    return parts


def _part(templates: tuple[Template, ...], made: Sequences) -> _Part:
    return _Part(templates, made.tokens, made.settings)


def _refuse(made: Mapping[str, Any]) -> None:
    default = {"sequences": None, "period": None, "bos": "auto", "seed": 0}
    if given := [f"{name}={value!r}" for name, value in made.items() if value != default[name]]:
        raise CausalProbeError(
            f"{', '.join(given)} is about sequences that are made, and tokens were given, which are taken as they are. Leave out "
            "one of the two."
        )


# ---------------------------------------------------------------------------------------------------------------- scoring


class _Sums(NamedTuple):
    """What is left of a pattern [batch, head, query, key]."""

    attention: Float[Tensor, "batch _head template"]
    sink: Float[Tensor, "batch _head template"]


def _score(
    model: HookedModel,
    templates: tuple[Template, ...],
    tokens: Any,
    queries: Sequence[int] | None,
    batch_size: int | None,
) -> tuple[dict[str, Evidence], dict[tuple[str, str], int]]:
    compiled: list[list[Targets]] = []

    def reducer(batch: Tensor) -> Reduce[_Sums]:
        targets = [target.slim() for target in compile_targets(templates, batch, queries=queries)]
        compiled.append(targets)
        return lambda layer, pattern: _reduce(targets, pattern)

    reduced = reduce_patterns(model, _micro_batches(model, tokens, batch_size), reducer)
    return _gather(templates, compiled, reduced)


def _micro_batches(model: HookedModel, batches: Any, batch_size: int | None) -> Iterator[Any]:
    raise NotImplementedError


def _reduce(targets: Sequence[Targets], pattern: Tensor) -> _Sums:
    parts = pattern.split([len(target.pairs) for target in targets])
    return _Sums(
        torch.cat([target.attention(part) for target, part in zip(targets, parts, strict=True)]),
        torch.cat([target.sink(part) for target, part in zip(targets, parts, strict=True)]),
    )
