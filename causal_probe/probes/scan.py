"""Score every head of a model against many templates in one streaming pass."""

from __future__ import annotations

import itertools
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import replace
from functools import partial
from types import MappingProxyType
from typing import Any, TypeAlias

from jaxtyping import Int
from torch import Tensor
from tqdm.auto import tqdm

from causal_probe.arguments import BatchSize, Count, Seed
from causal_probe.errors import CausalProbeError
from causal_probe.hooks.batches import probe
from causal_probe.hooks.check import HookedModel, describe, require_hooks
from causal_probe.hooks.corpus import Corpus, CorpusPass
from causal_probe.hooks.preflight import require_measurable
from causal_probe.hooks.record import Beside, Reduction, each_batch, layer_batches, record
from causal_probe.hooks.tokens import content_tokens
from causal_probe.hooks.visible import Masks, has_sinks
from causal_probe.probes.head_scores import HeadScores
from causal_probe.probes.scoring import Scores, settings_of
from causal_probe.probes.sequences import longest_ngram, make_sequences
from causal_probe.probes.template_sums import TemplateSums
from causal_probe.probes.templates import TEMPLATES, Template, find_templates

__all__ = ["BESIDE", "Part", "made_parts", "read_corpus", "scan", "scored"]

#: Templates, the sequences that they are scored on, and what is told of these.
Part: TypeAlias = tuple[tuple[Template, ...], Any, Mapping[str, Any]]
#: Of how many sequences of a kind something else may read the patterns in the same pass.
BESIDE = 8
#: Tokens of the preflight's sequence.
CHECKED = 8


@probe
def scan(
    model: HookedModel,
    tokens: Any = None,
    *,
    templates: str | Template | Iterable[str | Template] | None = None,
    queries: Sequence[int] | None = None,
    n_sequences: Count | None = None,
    period: int | None = None,
    bos: str = "auto",
    seed: Seed = 0,
    batch_size: BatchSize = None,
) -> HeadScores:
    """Score every attention head of any TransformerLens model against head types, all in one pass.

    The score of a head is the attention that it puts on a template's targets, averaged over the rows that have one, and then
    over sequences; rows whose targets are all visible keys say nothing and are left out. See
    :class:`~causal_probe.probes.head_scores.HeadScore` for chance, excess, and standard error. A high score says where a head looks, not
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
        they are taken as they are. Text, as a :func:`~causal_probe.hooks.corpus`: what was read of it is in ``settings``. By default, for each template those that show it (:attr:`Template.shown_by <causal_probe.probes.Template>`).
    templates
        Templates or their names. By default those of ``TEMPLATES``, without those whose sequences the context is too short for.
    queries
        Score only these rows, negative ones counted from the end; all by default.
    n_sequences, period, bos, seed
        Of the sequences that are made; see :func:`~causal_probe.probes.repeated_tokens`.
    batch_size
        Sequences in a forward pass. By default as many as keep the patterns of all layers, and the logits, within 256 MiB.

    Raises
    ------
    CausalProbeError
        If an argument is out of range or does not go with the others, a template is unknown or returns something else, a hook
        point is missing or never fires, a pattern is not made of probabilities, or the model doesn't use the patterns that it
        shows (:func:`~causal_probe.hooks.preflight`).

    References
    ----------
    Olsson et al., "In-context Learning and Induction Heads", Transformer Circuits Thread, 2022.

    Examples
    --------
    >>> from causal_probe.models import DisentangledTransformer
    >>> model = DisentangledTransformer(d_vocab=6, n_positions=12)
    >>> _ = model.block(0, 0, query="position", key="position").diagonal(-1).fill_(30)
    >>> _ = model.block(1, 0, query="token", key="L0H0.token").diagonal().fill_(30)
    >>> found = scan(model, templates=["previous-token", "duplicate-token", "induction"])
    >>> found
    HeadScores of disentangled-transformer: 2 heads in 2 layers, 3 templates, 267 sequences
      template         best head    score  chance    excess     sink
      previous-token   L0H0             1  0.1912         1  0.09091
      duplicate-token  L1H0       0.08333  0.1089  -0.02865  0.08333
      induction        L1H0        0.9167  0.1089    0.9065  0.08333
    >>> [(head.layer, head.head, head.template) for head in found.called()]
    [(0, 0, 'previous-token'), (1, 0, 'induction')]

    One in twelve of the second head's attention is on position 0: the first head has nothing before it to copy there, and copies
    the token itself.
    """
    wanted = find_templates(TEMPLATES if templates is None else templates)
    made = {"n_sequences": n_sequences, "period": period, "bos": bos, "seed": seed}
    if tokens is None:
        require_hooks(model, ())
        parts = made_parts(model, wanted, made, optional=templates is None)
        _check(model, parts[0][1])
        return scored(model, wanted, parts, queries, batch_size)
    _refuse(made)
    if isinstance(tokens, Corpus):
        if len(first := tokens.first(1)):
            _check(model, first)
        return read_corpus(model, wanted, tokens, queries, batch_size)
    first, batches = _peek(tokens)
    _check(model, first)
    return scored(model, wanted, [(wanted, batches, {"kind": "given"})], queries, batch_size)


def _check(model: HookedModel, first: Int[Tensor, "batch pos"]) -> None:
    """A few tokens tell whether the model uses the patterns that it shows."""
    require_measurable(model, first[:1, :CHECKED].to(describe(model)["device"] or "cpu"), edits=False)


def read_corpus(
    model: HookedModel,
    templates: tuple[Template, ...],
    text: Corpus,
    queries: Sequence[int] | None = None,
    batch_size: int | None = None,
    progress: bool = False,
    beside: Mapping[str, Reduction] = MappingProxyType({}),
) -> HeadScores:
    """The scores on a corpus of a model that was looked at; where it has no sequences, those that can be merged with others."""
    reading = CorpusPass(text)
    first, batches = _peek(reading)
    if first is None:  # a shard in which no document fills a sequence
        return _nothing(model, templates, queries, reading)
    parts = [(templates, batches, {"kind": "corpus"})]
    found = scored(model, templates, parts, queries, batch_size, progress, beside)
    return replace(found, settings=settings_of([(templates, reading.reading)], queries))


def scored(
    model: HookedModel,
    templates: tuple[Template, ...],
    parts: Sequence[Part],
    queries: Sequence[int] | None = None,
    batch_size: int | None = None,
    progress: bool = False,
    beside: Mapping[str, Reduction] = MappingProxyType({}),
) -> HeadScores:
    """The scores on these sequences of a model that was looked at; ``progress`` shows a bar, with an estimate where their number is known.

    ``beside`` holds, by kind of sequences, what else reads the patterns of the first :data:`BESIDE` of them in the same pass.
    """
    sums: dict[str, TemplateSums] = {}
    shared: dict[tuple[str, str], int] = {}
    known = all(isinstance(batches, Tensor) for _, batches, _ in parts)
    total = sum(len(batches) for _, batches, _ in parts) if known else None
    with tqdm(total=total, disable=not progress, desc="scanning", unit=" sequences") as bar:
        for its, batches, about in parts:
            pieces = _counted(layer_batches(model, batches, batch_size), bar)
            more = beside.get(about["kind"])
            of_its, shared_by_its = _recorded(model, pieces, its, queries, batch_size, more).scored()
            sums |= of_its
            shared |= shared_by_its
    kept = tuple(template for template in templates if template.name in sums)
    return HeadScores(
        kept,
        {template.name: sums[template.name] for template in kept},
        shared,
        settings=settings_of([(its, about) for its, _, about in parts], queries),
        provenance=describe(model),
    )


def _recorded(
    model: HookedModel,
    batches: Any,
    templates: tuple[Template, ...],
    queries: Sequence[int] | None,
    batch_size: int | None,
    beside: Reduction | None = None,
) -> Scores:
    masks = Masks(model)
    found = Scores(templates, queries, masks, partial(has_sinks, model))
    with model.hooks(fwd_hooks=masks.hooks):
        record(model, batches, found if beside is None else Beside(found, beside, BESIDE), batch_size=batch_size)
    return found


def _counted(batches: Iterable[Tensor], bar: Any) -> Iterator[Tensor]:
    for batch in batches:
        yield batch
        bar.update(len(batch))


def made_parts(
    model: HookedModel, templates: tuple[Template, ...], made: Mapping[str, Any], *, optional: bool
) -> list[Part]:
    """The templates, with the sequences that show them and what is told of these. Where they are optional, those whose sequences can't be made are left out."""
    parts: list[Part] = []
    rest = sorted(templates, key=lambda template: template.kind != "repeated")
    while rest:
        n = longest_ngram(template.kind for template in rest)
        first = rest[0]
        if longest_ngram([first.kind]):  # the sequences for the longest n-grams serve the others as well
            first = next(template for template in rest if template.kind == f"{n}-gram")
            its = tuple(template for template in rest if longest_ngram([template.kind]))
        else:
            its = tuple(template for template in rest if template.kind == first.kind)
        try:
            sequences = make_sequences(model, first.shown_by, **made)
        except CausalProbeError:
            if not optional or first.kind == "repeated":
                raise
            its = tuple(template for template in its if template.kind == first.kind)  # left out; smaller ones may fit
        else:
            parts.append((its, sequences.tokens, {**sequences.settings, "kind": first.kind}))
        rest = [template for template in rest if template not in its]
    return parts


def _peek(batches: Any) -> tuple[Any, Iterator[Any]]:
    """The tokens of the first batch, and all batches."""
    rest = each_batch(batches)
    first = next(rest, None)
    if first is None and not isinstance(batches, CorpusPass):
        raise CausalProbeError("There are no sequences to scan. Give tokens [batch, pos], or batches of them.")
    return getattr(first, "tokens", first), itertools.chain([first], rest)


def _nothing(
    model: HookedModel, templates: tuple[Template, ...], queries: Sequence[int] | None, reading: CorpusPass
) -> HeadScores:
    """The scores on no sequences, which can be merged with those of other shards."""
    one = content_tokens(model)[:1].expand(1, reading.corpus.length).to(reading.corpus.device)
    sums, shared = _recorded(model, one, templates, queries, 1).scored()
    return HeadScores(
        templates,
        {name: found.first(0) for name, found in sums.items()},
        dict.fromkeys(shared, 0),
        settings=settings_of([(templates, reading.reading)], queries),
        provenance=describe(model),
    )


def _refuse(made: Mapping[str, Any]) -> None:
    default = {"n_sequences": None, "period": None, "bos": "auto", "seed": 0}
    if given := [f"{name}={value!r}" for name, value in made.items() if value != default[name]]:
        raise CausalProbeError(
            f"{', '.join(given)} is about sequences that are made, and tokens were given, which are taken as they are. Leave out "
            "one of the two."
        )
