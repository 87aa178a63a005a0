"""The report on what structure a model has: each question with what stands beside its answer."""

from __future__ import annotations

from collections.abc import Iterator

import numpy as np

from causal_probe import viz
from causal_probe.circuits.next_scores import NextScores
from causal_probe.experiments.model_structure import ModelStructure
from causal_probe.probes.permutation_sensitivity import PermutationSensitivity
from causal_probe.probes.score_pca import ScorePCA
from causal_probe.reports.pages import made, plus_minus, report
from causal_probe.syntax.attachment import DependencyHeads
from causal_probe.syntax.projection import TreeProjection
from causal_probe.viz import report as page

__all__ = ["structure_page"]

#: Heads that are listed.
LISTED = 12
DEPENDENCIES = (
    "Each word is attached to the word that it attends to most, or to the one that attends to it most. Heads were chosen on half of the sentences and are reported on the other half, beside the "
    'best fixed offset ("the governor is the next word"), which was chosen and reported in the same way. H0: the head attaches no more words rightly than the offset; one-sided t-tests over '
    "sentences, Holm's correction over relations."
)
ORDER = (
    "How much the last prediction changes (KL, nats) when what stands before the last position is put in another order: the tokens, or the vectors that enter a layer. What the layers below have "
    "written moves with its vector, so what is left at a layer is what the layers from there on still take from the order."
)
SCORES = (
    "Attention scores over inputs, taken apart into principal components. Shares of the variance; held out: components of one half, variance of the other. Beside the overlap of two heads' "
    "components stands what random directions overlap."
)
CONTINUATION = (
    "A word's vector behind the first layer goes through a head's values and output to the logits. Next: the share of words whose successor is among the largest; copy: which are there themselves; "
    "other: how often another word of the order is there. A head whose next is no larger than its other writes words of the kind, not successors."
)
TREES = (
    "A span's vector with everything visible is compared with its vector when the later layers see the span alone; the tree whose spans agree best is the encoder's. F1: brackets shared with the sentences' "
    "own trees. H0: the encoder's trees have no larger F1 than trees that look at nothing; one-sided t-tests over sentences, Holm's correction. Centred: cosines less the mean of all spans of that length."
)
NOT_SHOWN = (
    "Where a head attends is not what the model uses: see `causal-probe scan --verify`. What a head would write is not what it attends to. Generated sentences have few words and "
    "one grammar; give a treebank (`--conllu`) for more."
)


@report.register
def structure_page(result: ModelStructure) -> viz.Report:
    """The report that ``causal-probe structure`` writes."""
    sections = [page.Section("Result", [page.Headline(_headline(result))])]
    if result.dependencies is not None:
        sections.append(page.Section("Does a head follow syntax?", list(_dependencies(result.dependencies))))
    if result.order is not None:
        sections.append(page.Section("Does the order of the context matter?", list(_order(result.order))))
    if result.scores is not None:
        sections.append(page.Section("In how few directions do scores vary?", list(_scores(result.scores))))
    if result.trees is not None:
        sections.append(page.Section("Does it compute along trees?", list(_trees(result.trees))))
    if result.continuation:
        sections.append(page.Section("Does a head go on with sequences?", list(_continuation(result.continuation))))
    said = [NOT_SHOWN, *(f"Not asked, {part}: {why}" for part, why in result.left_out.items())]
    sections.append(page.Section("What it does not show", [page.Paragraph(each) for each in said]))
    return made(
        result,
        f"What structure has {result.provenance['model']}?",
        "Dependencies, order, scores and continuations, each beside its baseline.",
        sections,
    )


def _headline(result: ModelStructure) -> list[tuple[str, object, str]]:
    rows: list[tuple[str, str, float, str, float]] = [row for row in result.questions if row[0]]
    return [
        (question, float(f"{value:.3g}"), f"{where}; {beside} {other:.3g}")
        for question, where, value, beside, other in rows
    ]


def _dependencies(found: DependencyHeads) -> Iterator[page.Block]:
    yield page.Paragraph(DEPENDENCIES)
    yield page.Table(
        ["relation", "words", "head", "direction", "UAS", "best offset", "its UAS", "p, corrected"],
        [
            (
                each.relation,
                each.words,
                each.name,
                each.direction,
                plus_minus(each.uas, each.stderr),
                f"{each.offset:+d}",
                round(each.offset_uas, 3),
                float(f"{each.p_value:.2g}"),
            )
            for each in found.attachments
        ],
        f"On half of {found.settings['n_sentences']} sentences; a word attached at random: {found.chance:.3f}. The maximum spanning tree of the first head holds {found.tree:.2f} of the edges, a chain of all words {found.adjacent:.2f}.",
    )


def _order(found: PermutationSensitivity) -> Iterator[page.Block]:
    yield page.Paragraph(ORDER)
    rows = [("tokens", found.tokens, found.tokens_stderr, found.tokens_largest)]
    rows += [
        (f"input of layer {n}", *its)
        for n, its in enumerate(zip(found.layers, found.stderr, found.largest, strict=True))
    ]
    yield page.Table(
        ["permuted", "mean KL", "largest"],
        [(what, plus_minus(mean, stderr), round(largest, 3)) for what, mean, stderr, largest in rows],
        f"Means over {found.n_sequences} sequences and {found.settings['n_permutations']} permutations, with standard errors over sequences. With nothing permuted: at most {found.rounding:.1e}.",
    )


def _scores(found: ScorePCA) -> Iterator[page.Block]:
    yield page.Paragraph(SCORES)
    k, n = found.explained.shape[1], len(found.heads)
    others = found.overlap[~np.eye(n, dtype=bool)]
    overlap = f"{others.mean():.3f} on the average" if len(others) else "there is one head"
    yield page.Table(
        ["head", "1 component", f"{k} components", f"{k}, held out", f"last row, {k}"],
        [
            (
                f"L{found.heads[i][0]}H{found.heads[i][1]}",
                *(
                    round(float(each[i, at]), 3)
                    for each, at in (
                        (found.explained, 0),
                        (found.explained, -1),
                        (found.held_out, -1),
                        (found.row_explained, -1),
                    )
                ),
            )
            for i in np.argsort(-found.held_out[:, -1], kind="stable")[:LISTED]
        ],
        f"The heads whose components hold most, of {n}; {found.n_inputs} inputs of {found.settings['n_positions']} tokens. Means over all heads: {found.explained[:, -1].mean():.3f}, held out {found.held_out[:, -1].mean():.3f}. Overlap of two heads: {overlap}, random directions {found.chance:.3f}.",
    )


def _trees(found: TreeProjection) -> Iterator[page.Block]:
    yield page.Paragraph(TREES)
    yield page.Table(
        ["trees", "F1", "F1 as in the paper", "encoder ahead by", "p, corrected"],
        [
            (
                each.tree,
                None if each.f1 is None else round(each.f1, 3),
                round(each.f1_paper, 3),
                plus_minus(each.ahead, each.stderr),
                None if each.p_value is None else float(f"{each.p_value:.2g}"),
            )
            for each in found.trees
        ],
        f"On half of {found.settings['n_sentences']} sentences; only a span visible from layer {found.first_layer} on. t-score {plus_minus(found.t_score, found.t_stderr)}; mean agreement of the best trees' spans {found.agreement:.3f}, "
        f"where spans of one length have exchanged theirs {found.control:.3f}.",
    )


def _continuation(found: tuple[NextScores, ...]) -> Iterator[page.Block]:
    yield page.Paragraph(CONTINUATION)
    for each in found:
        yield page.Table(
            ["head", "next", "copy", "other"],
            [(name, *(round(value, 3) for value in its)) for name, *its in each.listed(LISTED)],
            f"{each.settings['words']}: {len(each.words)} words, the {each.settings['top']} largest logits; heads of the largest next score, of {len(each.heads)}.",
        )
