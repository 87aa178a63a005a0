"""Does the model use what a head attends to? A causal check of the heads that a scan has flagged.

Attention is no evidence of use, and one ablation is none either: later layers repair, and heads stand in for one another. So
each flagged head is asked four questions, and what it is called follows from the answers (:class:`Rule`):

(a) Does it attend where the template says, surely, by more than chance?
(b) Does ablating it alone hurt by more than delta, and more than ablating nearly all heads that were not flagged, in all layers?
(c) Does its own output raise the target's logit, when nothing after it may react? (This decides nothing: a head may act through others.)
(d) Does ablating all flagged heads together hurt by more than delta, and more than ablating random sets of as many unflagged heads; and does
    putting this one head back, while the others stay ablated, help by more than delta?

=========================  ===========================================================================================
verdict                    what was shown, on these sequences and this loss
=========================  ===========================================================================================
**causal**                 (b): null hypothesis "the loss rises by at most delta" rejected, and the rank holds
**negative**               "the loss falls by at most delta" rejected: ablating the head helps
**redundant**              alone the effect lies within +-delta, and (d): with the other flagged heads ablated it does not
**no effect above delta**  alone the effect lies within +-delta (equivalence: two one-sided tests), with either baseline
**undecided**              none of these
=========================  ===========================================================================================

The *estimand* is the mean rise of the loss over sequences, in nats, against one of two *baselines* (:mod:`causal_probe.probes.baselines`):
the head's mean at each position, and its mean over positions, in other sequences. The first can't see what is the same in all sequences
at a position. An effect counts with either of them; none counts as shown only if both show none. The *unit of replication* is a sequence with
references of its own, so the references' noise is part of the standard error. The *family* of each question is in :class:`Rule`.

The effects are measured on sequences of their own, not on those on which the heads were flagged; and a model whose loss on them is not surely
below that of predictors that don't do the task gets no verdicts: what a head does for a task that the model doesn't do can't be told.
"""

from __future__ import annotations

import dataclasses
from collections import defaultdict
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

import networkx as nx
import numpy as np
import torch
from jaxtyping import Float
from torch import Tensor

from causal_probe.arguments import BatchSize, Seed
from causal_probe.errors import CausalProbeError
from causal_probe.hooks.batches import probe
from causal_probe.hooks.check import HookedModel, describe, undisturbed
from causal_probe.hooks.record import each_batch, micro_batches
from causal_probe.probes.ablation import Head, Laboratory
from causal_probe.probes.ablation_runs import AblationRuns, Plan, run_ablations, size
from causal_probe.probes.baselines import reference_tokens, split_off_references
from causal_probe.probes.head_scores import HeadScores
from causal_probe.probes.measures import Measure, next_token, repeated_token
from causal_probe.probes.p_values import Estimate, corrected, estimates, t_interval
from causal_probe.probes.sequences import varied_repeats
from causal_probe.probes.verdicts import Answers
from causal_probe.probes.verification import HeadVerdict, Rule, Verification

__all__ = ["verify"]

#: Other sequences for each measured one, over which the heads' means are taken: where they are made, and at least.
REFERENCES = 8


@probe
def verify(
    scores: HeadScores,
    model: HookedModel,
    tokens: Any = None,
    *,
    templates: Iterable[str] | None = None,
    measure: Measure | None = None,
    reference: Any = None,
    rule: Rule = Rule(),  # noqa: B008 - it is frozen
    n_sequences: int = 8,
    period: int | None = None,
    ranked_on: int = 2,
    random_sets: int = 100,
    exhaustive: bool = False,
    seed: Seed | None = None,
    batch_size: BatchSize = None,
    progress: bool = False,
) -> Verification:
    """Ask of each head that a scan has flagged whether the model uses it: causal, redundant, negative, no effect, or undecided.

    The questions, and how the verdict follows from them, are at the head of this module; the constants are those of
    :class:`Rule`.

    *Mean ablation* replaces what a head reads out of the stream (``hook_z``) at each position by its mean over other sequences *at that
    position*. So what is taken away is what depends on the tokens; what the head writes there anyway stays. The second baseline, its
    mean over positions as well, takes that away.

    The cost: each flagged head is run three times on all sequences, and the heads of each template twice, together; twice more for each head and
    template that may be redundant. Unflagged heads and random sets are run on
    ``ranked_on`` sequences, and only where a verdict hangs on them: heads that the gradient predicts to come near, and so many drawn at random that
    the rank is misjudged with probability ``rule.rank_error`` at most; random sets until it is known whether the joint effect stands out
    (:mod:`causal_probe.probes.ranking`). ``exhaustive`` runs them all. Layers below the first ablated head are not run again, nor those behind a
    direct effect, and logits are computed at the rows of the loss alone. If nothing is flagged, or the model does not do the task, no head is ablated.

    Parameters
    ----------
    scores
        The result of :func:`~causal_probe.probes.scan` on this model.
    model
        The model. It is run in evaluation mode without gradients, with the caller's own hooks, and is left as it was.
    tokens
        Sequences to measure on, other than those of the scan: tokens [batch, pos], or an iterable of such tensors (or of
        anything with ``.tokens`` that ``measure`` understands), all of one length. By default repeated random tokens that are
        drawn anew, with a BOS token if the scan had one.
    templates
        Names of the templates whose heads are verified, of those that were scanned; by default all but ``current-token``,
        ``first-token`` and those of n-grams.
    measure
        The measure of the model's performance, ``measure(logits, batch) -> Measured``, with the loss of each sequence, the logit of its target, and the
        losses of predictors that don't do the task (without any, that is not tested). By default the loss of the next token: on the tokens
        made here where the current token has occurred before, otherwise at all positions; :func:`next_token` makes others.
    reference
        Tokens of other sequences, of the same length: each measured sequence gets as many of them for its own, over which the heads' means are
        taken. By default three quarters of ``tokens``, of which the rest is then measured; 8 a sequence where they are made here.
    rule
        The constants of the verdicts.
    n_sequences, period, seed
        Of the tokens that are made: repeated random tokens, of periods from three quarters of ``period`` to that, after offsets of a few tokens.
        By default the period is 50, or what the model holds, and the seed one more than the scan's.
    ranked_on
        On how many sequences, at least, unflagged heads and random sets are ablated.
    random_sets
        How many random sets of unflagged heads there are for each number of flagged ones.
    exhaustive
        Ablate all unflagged heads and random sets, with both baselines, put each flagged head back, and replace it by zero, whether or not a
        verdict hangs on that.
    batch_size
        Sequences in a forward pass, >= 2; by default as many as keep patterns and logits within 256 MiB.
    progress
        Show a bar.

    Raises
    ------
    CausalProbeError
        If the scores are of other heads or had one sequence only, a template was not scanned, an argument is out of range, the
        heads of the model can't be ablated, or a loss is not finite.

    References
    ----------
    Olsson et al., "In-context Learning and Induction Heads", Transformer Circuits Thread, 2022. The correction: S. Holm, Scandinavian
    Journal of Statistics 6, 1979.

    Examples
    --------
    >>> from causal_probe.models import DisentangledTransformer
    >>> from causal_probe.probes import scan
    >>> model = DisentangledTransformer(d_vocab=12, n_positions=24)                        # an ideal induction circuit:
    >>> _ = model.block(0, 0, query="position", key="position").diagonal(-1).fill_(30)     # each token looks one back,
    >>> _ = model.block(1, 0, query="token", key="L0H0.token").diagonal().fill_(30)        # then for itself before a token,
    >>> _ = model.output_block("L1H0.token").diagonal().fill_(9)                           # and says that token
    >>> scores = scan(model, templates=["previous-token", "induction"], period=10)
    >>> verify(scores, model, period=10).called("causal")[1].name
    'L1H0'
    """
    names = _check(scores, model, templates, n_sequences, ranked_on, random_sets, batch_size)
    every, n_heads = {n for n in scores.heads if n}, getattr(model, "heads", getattr(model.cfg, "n_heads", None))
    if len(every) == 1 and set(n_heads if isinstance(n_heads, tuple) else [n_heads]) not in (every, {None}):
        raise CausalProbeError(
            f"The scores are of a model of {every.pop()} heads a layer, and this one has others. Give the model that was scanned."
        )
    excesses, intervals, flagged = _flag(scores, names, rule)
    settings: dict[str, Any] = {"templates": names, "forwards": 0}
    nothing = Verification(
        (), {}, {}, nx.DiGraph(), np.zeros(0), {}, rule, {}, settings=settings, provenance=describe(model)
    )
    if not flagged:
        return nothing
    if tokens is None:
        made = varied_repeats(model, n_sequences=n_sequences * (1 + REFERENCES), period=period, **_like(scores, seed))
        tokens, spare = made.tokens[:n_sequences], made.tokens[n_sequences:]
        settings["tokens"] = {**made.settings, "n_sequences": n_sequences, "references": len(spare)}
        reference = spare if reference is None else reference
        measure = repeated_token if measure is None else measure
    elif reference is None:
        tokens, reference = split_off_references(tokens)
    batches = _batches(model, tokens, batch_size, ranked_on)
    references = reference_tokens(reference, batches)
    seed = settings.get("tokens", {}).get("seed", seed or 0)
    with undisturbed(model):
        laboratory = Laboratory(
            model,
            next_token() if measure is None else measure,
            reference=references,
            n_sequences=sum(map(size, batches)),
            example=batches[0][:1] if isinstance(batches[0], Tensor) else batches[0],
        )
        if [*laboratory.baselines.heads.values()] != [n for n in scores.heads if n]:
            raise CausalProbeError("The scores are of a model with other heads than this one's.")
        loss, without, missed = _task(laboratory, batches, rule)
        settings |= {"n_sequences": len(loss), "references": len(references), "forwards": laboratory.forwards}
        if missed:
            called = sorted({"L{}H{}".format(*head) for heads in flagged.values() for head in heads})
            reason = f"{missed}; not ablated: {', '.join(called)}"
            return dataclasses.replace(
                nothing, loss=loss, without=without, undefined={"verdicts": reason}, settings=settings
            )
        plan = Plan.make(laboratory.heads, flagged, random_sets, seed=seed)
        verified = [template for template in scores.templates if template.name in names]
        runs = run_ablations(
            laboratory, batches, plan, verified, ranked_on=ranked_on, zero=exhaustive, progress=progress
        )
        answers = Answers.of(runs, plan, rule, exhaustive=exhaustive, seed=seed, progress=progress)
        compared = {head: runs.rise("mean", [head]) for head in plan.unflagged if runs.knows("mean", [head])}
    settings |= {
        "ranked_on": runs.ranked,
        "random_sets": random_sets,
        "exhaustive": exhaustive,
        "unflagged": len(plan.unflagged),
        "heads": [list(each) for each in laboratory.baselines.heads.items()],  # by layer, how many there are
        "forwards": laboratory.forwards,
        "replays": laboratory.replays,
    }
    undefined = {}
    if laboratory.no_direct is not None:
        undefined["direct_effect"] = laboratory.no_direct
    if not plan.unflagged:
        undefined["exceeds"] = "there are no unflagged heads to compare with"
    for template, heads in flagged.items():
        if not plan.random[len(heads)]:
            undefined[f"{template}: random sets"] = f"there are only {len(plan.unflagged)} unflagged heads"
    if not without:
        undefined["task"] = (
            "what is measured names no predictor that does not do the task, so that the model does it was not tested"
        )
    verdicts = tuple(answers.verdicts(excesses, intervals))
    return Verification(
        verdicts=verdicts,
        joint=answers.joint(),
        unflagged={head: float(rise.mean()) for head, rise in compared.items()},
        dependence=_dependence(runs, verdicts, rule),
        loss=runs.clean,
        without=without,
        rule=rule,
        undefined=undefined,
        settings=settings,
        provenance=describe(model),
    )


# -------------------------------------------------------------------------------------------------------------- the answers


def _flag(
    scores: HeadScores, names: Sequence[str], rule: Rule
) -> tuple[dict[tuple[Head, str], Estimate], dict[tuple[Head, str], tuple[float, float]], dict[str, list[Head]]]:
    """(a) By head and template, the excess with its corrected p-value, and its interval; by template the heads that are flagged."""
    found = [score for score in scores if score.template in names and score.excess is not None]
    if any(score.excess_stderr is None for score in found):
        raise CausalProbeError("An excess on one sequence has no standard error; scan two sequences or more.")
    # Both are numbers: what is None has been left out, or raised.
    means = {(s[:2], s.template): (s.excess or 0.0, s.excess_stderr or 0.0, s.n_sequences) for s in found}
    excesses = corrected(means, above=rule.minimum_excess)
    flagged = defaultdict(list)
    for (head, template), excess in excesses.items():
        if excess.p_value <= rule.level:
            flagged[template].append(head)
    intervals = {key: t_interval(*mean) for key, mean in means.items()}
    return excesses, intervals, {name: flagged[name] for name in names if name in flagged}


def _task(
    laboratory: Laboratory, batches: Sequence[Any], rule: Rule
) -> tuple[Float[np.ndarray, " sequence"], dict[str, float], str | None]:
    """The loss by sequence, the mean losses of predictors that don't do the task, and why the model does not do it either."""
    found = [laboratory.run_whole(batch) for batch in batches]
    loss = torch.cat([each.loss for each in found]).cpu().double().numpy()
    without = {
        name: torch.cat([each.without[name] for each in found]).cpu().double().numpy() for name in found[0].without
    }
    # The model must beat each of them, so each is tested at the level itself.
    missed = [
        f"that of {name} is {its.mean():.2f}"
        for name, its in without.items()
        if estimates({name: its - loss}, above=rule.delta)[name].p_value > rule.level
    ]
    reason = f"the model does not surely do the task: its loss on the targets is {loss.mean():.2f} nats, {' and '.join(missed)}"
    return loss, {name: float(its.mean()) for name, its in without.items()}, reason if missed else None


def _dependence(runs: AblationRuns, verdicts: Sequence[HeadVerdict], rule: Rule) -> nx.DiGraph:
    graph = nx.DiGraph()
    for found in verdicts:
        if found.name not in graph:
            graph.add_node(found.name, layer=found.layer, head=found.head, verdicts={})
        graph.nodes[found.name]["verdicts"][found.template] = found.verdict
    falls = estimates(runs.falls, above=rule.minimum_fall)
    for (_, source, target, template), fall in sorted(falls.items(), key=lambda item: item[1].value):
        if fall.p_value <= rule.level:  # of several templates and baselines the largest fall comes last, and stays
            ends = ("L{}H{}".format(*head) for head in (source, target))
            graph.add_edge(*ends, template=template, fall=fall.value, stderr=fall.stderr, p_value=fall.p_value)
    return graph


# ---------------------------------------------------------------------------------------------------------------- the data


def _like(scores: HeadScores, seed: int | None) -> dict[str, Any]:
    """The settings of sequences made after a scan: its BOS, and another seed."""
    scanned: Mapping[str, Any] = next(
        (made for made in scores.settings.get("tokens", []) if made.get("kind") in ("repeated", "corpus")), {}
    )
    return {"bos": scanned.get("bos", "auto"), "seed": int(scanned.get("seed", 0)) + 1 if seed is None else seed}


def _batches(model: HookedModel, tokens: Any, batch_size: int | None, ranked_on: int) -> list[Any]:
    """Micro-batches; the first ``ranked_on`` sequences are in batches of their own, where batches can be split."""
    found: list[Any] = []
    for batch in each_batch(tokens):
        if not isinstance(batch, Tensor):
            found.append(batch)
            continue
        first = max(0, min(ranked_on - sum(map(size, found)), len(batch)))
        if len(batch) - first == 1:  # a batch of one has no other sequence to take a head's output from
            first = len(batch)
        for part in filter(len, (batch[:first], batch[first:])):
            pieces = list(micro_batches(model, part, batch_size))
            if len(pieces) > 1 and len(pieces[-1]) == 1:
                pieces[-2:] = [torch.cat(pieces[-2:])]
            found += pieces
    if small := [size(batch) for batch in found if size(batch) < 2]:
        raise CausalProbeError(
            f"{len(small)} batches hold fewer than two sequences: a standard error needs two, and so does giving a head another "
            "sequence's output."
        )
    if not found:
        raise CausalProbeError("There are no sequences to measure on.")
    return found


def _check(
    scores: HeadScores,
    model: HookedModel,
    templates: Iterable[str] | None,
    n_sequences: int,
    ranked_on: int,
    random_sets: int,
    batch_size: int | None,
) -> list[str]:
    """The names of the templates that are verified; all that is wrong with the arguments is said at once."""
    # Not what doesn't look back: what repeats is not what it looks at. Nor n-grams, which coincide with induction where tokens don't
    # recur within a period.
    by_default = [each.name for each in scores.templates if each.kind == "repeated" and each.looks_back]
    names = by_default if templates is None else list(templates)
    problems = []
    if unknown := [name for name in names if name not in scores.names]:
        problems.append(f"{', '.join(unknown)} was not scanned (but {', '.join(scores.names)})")
    for what, value, least in (
        ("n_sequences", n_sequences, 2),
        ("ranked_on", ranked_on, 2),
        ("random_sets", random_sets, 0),
        ("batch_size", 2 if batch_size is None else batch_size, 2),
    ):
        if value < least:
            problems.append(f"{what} must be at least {least} and is {value}")
    if not names:
        problems.append("there is no template whose heads could be verified")
    if len(scores.heads) != int(model.cfg.n_layers):
        problems.append(f"the scores are of {len(scores.heads)} layers, the model has {model.cfg.n_layers}")
    if problems:
        raise CausalProbeError(f"The heads can't be verified: {'; '.join(problems)}.")
    return names
