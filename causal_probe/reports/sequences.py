"""The reports on a graph, or on lags, that were found in token sequences."""

from __future__ import annotations

from collections.abc import Mapping

from causal_probe import viz
from causal_probe.discovery.sequences.lags import SequenceLags
from causal_probe.discovery.sequences.models import Gain
from causal_probe.discovery.sequences.result import READ_AS, SequenceGraph
from causal_probe.reports.pages import made, plus_minus, report
from causal_probe.viz import report as page

__all__ = ["lags_page", "sequences_page"]

MEANING = {
    "in-context": "There is dependence whose transitions are new in each sequence; the edges below are of that kind.",
    "fixed": "There is dependence, and it is the same in all sequences: mutual information and causal-learn's PC ask further. No edge is claimed.",
    "both": "Part of the dependence is new in each sequence, part is the same in all. The edges rest on the part that is new.",
    "none": "No dependence was found beyond how often each token occurs in each sequence and in each column. No edge is claimed.",
}
GAINS = {
    "one_matrix": "one matrix for all sequences, over frequencies alone",
    "one_matrix_a_sequence": "one matrix a sequence, over frequencies alone",
    "new_in_each": "one matrix a sequence, over one matrix for all",
    "fixed_alone": "one matrix for all, beyond what it gains where nothing is fixed",
    "fixed_besides": "the same, beside one matrix a sequence",
}


@report.register
def sequences_page(result: SequenceGraph) -> viz.Report:
    """The report that ``causal-probe recover --data`` writes."""
    drawn = viz.graph(result.graph, faint=result.candidate_graph)
    shown = result.table()
    tests = (
        ("along the candidates, new in each sequence", result.in_context_test),
        ("along the tree, one matrix", result.fixed_test),
    )
    return made(
        result,
        f"Structure of {result.n_sequences:,} sequences: {result.structure}",
        f"{MEANING[result.structure]} Level {result.level:g}: the probability that any claim on this page is wrong, under the assumptions at its end.",
        [
            page.Section(
                "Result",
                [
                    page.Picture(drawn, "Arcs run from parent to child. Solid: claimed. Pale and dashed: the best candidate, of which nothing is claimed."),
                    page.Table(list(shown.columns), shown.rows, "One verdict for each column. Not excluded: what the tests leave, all columns together at the level."),
                    *([page.Paragraph("\n\n".join(result.notes))] if result.notes else []),
                    *_fixed_tree(result),
                    *(
                        page.Picture(
                            viz.graph(result.graph, result.graph_of(each)),
                            f"Above the claimed edges, below where {each.name} attends from their children: {each.agrees} of {each.of} agree.",
                        )
                        for each in result.beside
                    ),
                ],
            ),
            page.Section("Evidence", [
                page.Table(
                    ["dependence", "p-value", "standard deviations", "pairs of sequences"],
                    [(name, test.p_value, test.z, test.n_pairs) for name, test in tests],
                    "Against redraws that keep every sequence's token counts and every column's.",
                ),
                _gains(result.gains),
                page.Table(
                    ["assumption", "verdict", "p-value", "what speaks against it"],
                    [(each.name, "not rejected" if each.holds else "rejected", each.p_value, each.found) for each in result.assumptions],
                    "An assumption that is rejected withholds all claims; one that is not may still be wrong.",
                ),
                page.Paragraph(READ_AS),
            ]),
        ],
    )  # fmt: skip


@report.register
def lags_page(result: SequenceLags) -> viz.Report:
    """The report that ``causal-probe recover --data --max-lag`` writes."""
    shown = result.table()
    return made(
        result,
        f"Lags of a stream: {'none claimed' if result.lag is None else f'lag {result.lag}'}",
        MEANING[result.structure],
        [
            page.Section(
                "Result",
                [page.Table(list(shown.columns), shown.rows, shown.title), page.Paragraph("\n\n".join(result.notes))],
            ),
            page.Section("Evidence", [_gains(result.gains)]),
        ],
    )


def _gains(gains: Mapping[str, Gain]) -> page.Table:
    rows = [(GAINS[name], plus_minus(gain.mean, gain.stderr)) for name, gain in gains.items()]
    return page.Table(
        ["model", "gain, nats per sequence"], rows, "Log-likelihood of held-out sequences, with one standard error."
    )


def _fixed_tree(result: SequenceGraph) -> list[page.Paragraph]:
    if not result.fixed_tree:
        return []
    edges = ", ".join(f"{one}–{two}" for one, two in result.fixed_tree)
    return [
        page.Paragraph(f"Tree of the largest mutual information over all sequences, which has no direction: {edges}.")
    ]
