"""The report on comparing kinds of evidence: which finds the graph, and at what cost?"""

from __future__ import annotations

import pandas as pd

from causal_probe import viz
from causal_probe.experiments.compared_evidence import EvidenceTable
from causal_probe.reports.pages import made, report
from causal_probe.reports.pictures import plot
from causal_probe.viz import report as page

__all__ = ["evidence_page"]

HOW_TO_READ = (
    "The tasks' causal graphs are known. Each kind of evidence answers with a graph over the tokens, read from one layer, of all heads "
    "together. The skeleton says which tokens are joined; an arrowhead, that a token is no cause of the other. F1 is the harmonic mean of "
    "precision and recall, 1 if all is right. Beside it stands the F1 of joining every pair, earlier to later: so much takes no evidence. "
    "A perfect test is d-separation in the true graph, instead of the correlations: what the learners can know at most."
)


@report.register
def evidence_page(result: EvidenceTable) -> viz.Report:
    """The report, to be written as one offline HTML file."""
    return made(
        result,
        "Which evidence finds the causal graph, and at what cost?",
        f"{', '.join(result.settings['graphs'])}; {result.settings['n_positions']} tokens of {result.settings['d_vocab']} states.",
        [
            page.Section("Result", [page.Paragraph(HOW_TO_READ), _picture(result), *_tables(result)]),
            page.Section("Is the deepest layer best?", [_layers(result)]),
        ],
    )


def _picture(result: EvidenceTable) -> page.Picture:
    return page.Picture(
        plot(result),
        "F1 of the skeleton by evidence and graph. Of discovery, in each row, the options with the best mean.",
    )


def _tables(result: EvidenceTable) -> list[page.Table]:
    best, names = result.summary(), result.by_graph().index
    rows = list(zip(names, best.itertuples(), strict=True))
    agreement = [
        (
            name, row.how, round(row.skeleton_f1, 3), None if pd.isna(row.skeleton_precision) else round(row.skeleton_precision, 3),
            round(row.skeleton_recall, 3), round(row.arrowheads_f1, 3), round(row.skeleton_exact, 3),
        )
        for name, row in rows
    ]  # fmt: skip
    return [
        page.Table(
            ["evidence", "options", "skeleton F1", "precision", "recall", "arrowhead F1", "exact"],
            agreement,
            "Means over the graphs. Discovery with the options that agree best with the truth; exact: the share of skeletons without a fault.",
        ),
        page.Table(
            ["evidence", "sequences", "seconds"],
            [(name, round(row.sequences), round(row.seconds, 3)) for name, row in rows],
            "What it costs, means over the graphs. Sequences: through the model, for all readings together; seconds: of one reading, on "
            "whatever machine this ran.",
        ),
    ]


def _layers(result: EvidenceTable) -> page.Table:
    table = result.deepest()
    shown = table.astype(object).where(table.notna(), None)
    return page.Table(
        ["graph", "model", *(f"layer {layer}" for layer in table.columns)],
        [(*index, *row) for index, row in zip(shown.index, shown.to_numpy().tolist(), strict=True)],
        "F1 of the skeleton that discovery finds in each layer, with the options that agree best there.",
    )
