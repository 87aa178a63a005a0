"""The reports on reading graphs in context: of one model and graph, and of several."""

from __future__ import annotations

from collections.abc import Iterator

from causal_probe import viz
from causal_probe.experiments.in_context_graph import InContextGraph
from causal_probe.experiments.leaderboard import Leaderboard
from causal_probe.reports.pages import made, plus_minus, report, signed
from causal_probe.viz import report as page
from causal_probe.viz.report import Block

__all__ = ["in_context_page", "leaderboard_page"]

WHAT_IS_ASKED = (
    "The model read sequences whose words are drawn along a causal graph: each word's distribution depends on its parent's word, by "
    "a table that is drawn anew for every sequence. The last word is any; the next one follows it by the same table. A predictor "
    "that knows the graph counts, in the context, what followed the last word along the graph's edges."
    "\n\n"
    "A head sees the graph if the last word attends to the nodes whose parent carries the same word (successor-of-parent), with an "
    "excess above 0.5 by three standard errors. Where a head looks is no evidence that the answer uses it: the answer does if its loss "
    "is below that of the words' frequencies in the context."
)

#: Heat maps of larger models are unreadable.
SHOWN_GRAPH = 40


@report.register
def in_context_page(result: InContextGraph) -> viz.Report:
    """The report that ``causal-probe recover --model`` writes."""
    return made(
        result,
        f"Does {result.provenance['model']} read the graph in its context?",
        f"{result.settings['graph']}, {result.settings['states']} states: {result.verdict}.",
        [
            page.Section("Result", list(_answer(result))),
            page.Section("Which heads see the graph", list(_heads(result))),
            page.Section("The graph", list(_graph(result))),
        ],
    )


@report.register
def leaderboard_page(result: Leaderboard) -> viz.Report:
    """The report that ``causal-probe leaderboard`` writes."""
    return made(
        result,
        "Which causal structures can these models read in context?",
        _summary(result),
        [page.Section("Result", [page.Paragraph(WHAT_IS_ASKED), *_maps(result), *_tables(result)])],
    )


def _answer(result: InContextGraph) -> Iterator[Block]:
    best, losses = result.best, result.losses
    skill = "undefined" if result.skill is None else signed(f"{result.skill:.2f}")
    frequencies = f"in-context unigram {losses['in-context unigram'].value:.2f}"
    yield page.Headline(
        [
            ("heads that see the graph", len(result.carriers), "excess above 0.5"),
            ("best head", f"L{best.layer}H{best.head}", f"score {best.score or 0:.2f}, chance {best.chance or 0:.2f}"),
            ("loss", f"{losses['model'].value:.2f}", frequencies),
            ("skill", skill, "0: frequencies; 1: knows the graph"),
        ]
    )
    yield page.Paragraph(WHAT_IS_ASKED)
    yield page.Table(
        ["predictor", "loss (nats)", "standard error"],
        [(name, each.value, round(each.stderr, 6)) for name, each in result.losses.items()],
        f"Cross-entropy with the true distribution of the next word, mean over {result.settings['n_sequences']} sequences. model: over the "
        "states' words alone, renormalized.",
    )


def _heads(result: InContextGraph) -> Iterator[Block]:
    name = result.scores.names[0]
    if max(result.scores.heads) * len(result.scores.heads) > 1:
        excess = [list(layer) for layer in result.scores.heatmap(name)]
        yield page.Picture(
            viz.heads(excess, score_name="excess attention on the successors of the last word", limit=1.0),
            "Every head, in the last row.",
        )
    rows = []
    for head in result.scores.top(name, 10):
        found = None if result.verification is None else result.verification.of(head.layer, head.head)
        verdict = ("", "") if found is None else (found.verdict, plus_minus(found.shown.value, found.shown.stderr))
        place = f"L{head.layer}H{head.head}"
        rows.append((place, head.score, head.stderr, head.chance, head.excess, head.sink, *verdict))
    yield page.Table(
        ["head", "score", "standard error", "chance", "excess", "sink", "verdict", "effect (nats)"],
        rows,
        "The ten heads with the largest score. Verdicts are given, where they were asked for, to those whose excess is surely above 0.25, if the "
        "answer is surely better than that of the words' frequencies.",
    )
    if result.verification is not None:
        if "verdicts" in result.verification.undefined:
            yield page.Paragraph(f"No verdicts: {result.verification.undefined['verdicts']}.")
        elif result.verification.verdicts:
            yield page.Paragraph(result.verification.legend)
        for joint in result.verification.joint.values():
            yield page.Paragraph(
                f"Ablating the {len(joint.heads)} heads that see the graph together raises the loss by {joint.effect.value:.3f} ± "
                f"{joint.effect.stderr:.3f} nats."
            )


def _graph(result: InContextGraph) -> Iterator[Block]:
    if len(result.graph) <= SHOWN_GRAPH:
        yield page.Picture(viz.graph(result.graph), "Edges go from parent to child.")
    else:
        yield page.Paragraph(f"{len(result.graph)} nodes and {result.graph.number_of_edges()} edges; not drawn.")


def _maps(result: Leaderboard) -> Iterator[Block]:
    for value, name, caption in (
        (
            "excess",
            "excess of the best head",
            "Does a head see the graph? 1: all of the last word's attention is on the right nodes; 0: chance.",
        ),
        (
            "skill",
            "skill of the answer",
            "Does the answer use it? 0: no better than the words' frequencies; 1: as good as knowing the graph. Values below "
            "\N{MINUS SIGN}1 are drawn as \N{MINUS SIGN}1.",
        ),
    ):
        shown = result.by_graph(value).clip(lower=-1)
        drawn = viz.table_map(shown, value_name=name, row_name="model", column_name="graph", limit=1.0)
        yield page.Picture(drawn, caption)


def _tables(result: Leaderboard) -> Iterator[page.Table]:
    frame = result.to_pandas()
    rows = list(zip(frame.to_dict("records"), result.readings, strict=True))
    yield page.Table(
        ["model", "graph", "best head", "chance", "excess", "heads"],
        [
            (
                *map(row.get, ("model", "graph", "best head")),
                each.best.chance,
                plus_minus(row["excess"], row["excess_stderr"]),
                row["heads"],
            )
            for row, each in rows
        ],
        "What the heads see: attention of the last word on the successors of nodes that carry it, above chance ± one standard error; heads: "
        "how many see the graph.",
    )
    others = ("in-context unigram", "known-graph")
    yield page.Table(
        ["model", "graph", "loss", "frequencies", "known graph", "skill"],
        [
            (row["model"], row["graph"], plus_minus(*each.losses["model"][:2]), *map(row.get, others), each.skill)
            for row, each in rows
        ],
        "What the answer uses: losses in nats, beside those of the words' frequencies in the context and of a predictor that knows the graph.",
    )
    said = frame[["model", "graph", "verdict"]]
    yield page.Table(list(said.columns), said.to_numpy().tolist(), "In words.")


def _summary(result: Leaderboard) -> str:
    seen = [each for each in result.readings if each.carriers]
    used = [each for each in seen if each.answers]
    n = len(result.readings)
    return (
        f"In {len(seen)} of {n} readings some head attends along the graph; in {len(used)} of these the answer is better than the words' "
        "frequencies give."
    )
