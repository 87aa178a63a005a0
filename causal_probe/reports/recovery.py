"""The report on a recovery: what was found, beside what is true, and the evidence for it."""

from __future__ import annotations

from causal_probe import viz
from causal_probe.experiments.recover import Recovery
from causal_probe.first_gradient.start import GRAPH_OF_GRADIENTS
from causal_probe.reports.pages import report
from causal_probe.results import versions
from causal_probe.tasks import generator
from causal_probe.viz import report as page

__all__ = ["recovery_page"]

#: Sequences whose attention patterns are shown.
SHOWN_SEQUENCES = 3

#: One line on every metric, in the order of the table: (name, where in the metrics, what it says).
METRICS = (
    ("SHD", "shd", "structural Hamming distance: missing + extra + reversed edges; 0 is exact"),
    ("precision", "precision", "share of the found edges that are true"),
    ("recall", "recall", "share of the true edges that were found"),
    ("F1", "f1", "harmonic mean of precision and recall"),
    ("parent accuracy", "parent_accuracy", "share of the true children whose found parents are exactly the true ones"),
    ("root accuracy", "root_accuracy", "share of the true roots, node 0 among them, for which no parent was found"),
    (
        "attention on the true parent",
        "mean_parent_attention",
        "mean over true children of the mean attention from child to parent in layer 1",
    ),
    (
        "parents that lead",
        "argmax_parent_accuracy",
        "share of the true edges whose parent has the largest mean attention in the child's past",
    ),
    ("AUROC", "auroc", "of the deciding statistic, over all pairs of a node and an earlier one; chance is 0.5"),
    (
        "average precision",
        "average_precision",
        "of the same statistic over the same pairs; chance is the share of true edges",
    ),
)


@report.register
def recovery_page(result: Recovery) -> viz.Report:
    """The report that ``causal-probe recover`` writes."""
    found = result.comparison
    asked = range(found.children[-1] + 1)
    true_edges = sum(result.truth.in_degree(child) for child in found.children)
    roots = sum(not result.truth.in_degree(child) for child in found.children)
    right_roots = "undefined" if found.root_accuracy is None else f"{round(found.root_accuracy * roots)} of {roots}"
    verdict = "exactly" if result.exact else f"with {found.shd} wrong edges (structural Hamming distance)"
    attention = result.mean_parent_attention
    *_, (name, best) = result.reference_losses.items()
    return viz.Report(
        title="A causal graph, recovered from a transformer",
        summary=(
            "A disentangled transformer was trained on sequences drawn along a causal graph that it was never shown. "
            + (
                "Its first layer began with the graph that gradients showed before training, and kept it. "
                if result.given and result.given[0].startswith(GRAPH_OF_GRADIENTS)
                else ""
            )
            + f"Its first layer was then probed through hooks, and the graph was recovered {verdict}."
        ),
        sections=[
            page.Section(
                "Result",
                [
                    page.Headline(
                        [
                            ("edges right", f"{found.true_positives} of {true_edges}", "true edges that were found"),
                            ("roots right", right_roots, "nodes without a parent, found to have none"),
                            ("attention", attention, "mean attention of layer 1 on the true parent"),
                            (
                                "loss",
                                result.loss,
                                f"nats; {best:.4f} {'if the graph is known' if name == 'known-graph' else f'of {name}'}",
                            ),
                        ]
                    ),
                    page.Picture(
                        viz.graph(*(graph.subgraph(asked) for graph in (result.truth, result.recovered))),
                        "The true graph above the line, the found one below it. An arc runs from parent to child."
                        + (
                            f" Nodes after {asked[-1]} are left out: no row of layer 1 is only about their parents."
                            if len(asked) < len(result.truth)
                            else ""
                        ),
                    ),
                    page.Table(
                        ["metric", "value", "what it is"],
                        [(name, result.metrics[key], _explained(result, key, text)) for name, key, text in METRICS],
                        "Nodes are aligned by name; the rows compared are those of the children "
                        f"{found.children[0]} to {found.children[-1]}.",
                    ),
                    *_head_table(result),
                ],
            ),
            page.Section(
                "What was given, what was learnt",
                [
                    page.Table(
                        ["given"],
                        [(what,) for what in result.given or ("nothing",)],
                        "What was set before training; all else is zero or small noise.",
                    ),
                    page.Table(
                        ["stage", "moves", "steps", "sequences per step", "optimiser", "learning rate", "schedule"],
                        [
                            (
                                stage["name"],
                                ", ".join(stage["moves"]),
                                stage["steps"],
                                stage["batch_size"],
                                stage["optimizer"],
                                stage["learning_rate"],
                                stage["schedule"],
                            )
                            for stage in result.settings["stages"]
                        ],
                        f"{result.history.n_sequences:,} fresh sequences in all; no sequence was seen twice. A0 is the query-key "
                        "matrix of layer 1, A0.position its position x position block, A0.tokens its other blocks, A1 that of layer 2, W_U the output.",
                    ),
                ],
            ),
            page.Section(
                "Evidence",
                [
                    page.Paragraph(
                        "Attention alone does not tell a root from a child: the row of a trained root may saturate on some "
                        "node. So each node's candidate parent, the earlier node it attends to most, is tested by what it does "
                        "to the loss: the gain is the loss with the node's attention spread evenly over its past, minus the loss "
                        "with all of it on the candidate. It is positive for an edge that the model uses, and for a root no "
                        "candidate gains, or no more than with the node redrawn as a root: the margin is the gain minus that. An edge needs "
                        "both to be positive. The plain cut (evenly spread minus unedited) is shown beside them and decides nothing."
                    ),
                    *(_evidence_table(result, head) for head in range(len(result.effects))),
                ],
            ),
            page.Section(
                "Weights",
                [
                    page.Picture(
                        viz.blocks(
                            _layer_blocks(result, layer), marks=_marks(result, layer), title=f"Layer {layer + 1}"
                        ),
                        f"The blocks of layer {layer + 1}'s query-key matrices: rows are what the query holds, columns what the "
                        "key holds." + (" True edges are outlined." if layer == 0 else ""),
                    )
                    for layer in range(min(2, len(result.model.heads)))
                ],
            ),
            page.Section(
                "Training",
                [
                    page.Picture(
                        viz.training(
                            {"step": result.history.step, "loss": result.history.loss, "stage": result.history.stage},
                            result.reference_losses,
                        ),
                        "Loss on each step's fresh batch. The lines are exact predictors, on the sequences on which the trained "
                        "model's loss is measured.",
                    )
                ]
                if result.history.step
                else [page.Paragraph("No step was made.")],
            ),
            page.Section("Attention on a few sequences", _attention(result)),
        ],
        settings=result.settings,
        versions=versions(),
        call=result.call,
        citation=result.cite(),
    )


def _explained(result: Recovery, key: str, text: str) -> str:
    reason = result.metrics["undefined"].get(key)
    return f"{text}; undefined: {reason}" if reason else text


def _head_table(result: Recovery) -> list[page.Table]:
    if result.match is None or len(result.match.heads) + len(result.match.unmatched_heads) == 1:
        return []
    rows = [
        (slot, None if head is None else f"L0H{head}", attention, len(swapped))
        for slot, (head, attention, swapped) in enumerate(
            zip(result.match.heads, result.match.attention, result.match.swapped, strict=True)
        )
    ]
    tables = [
        page.Table(
            ["parent slot", "head", "attention on that parent", "children whose slots are swapped"],
            rows,
            "Heads of layer 1, assigned to parent slots (slot 0: the smaller parent).",
        )
    ]
    if result.last_row is not None:
        last = result.task.n_positions - 1
        tables.append(
            page.Table(
                ["head", f"attention on node {last}'s parents", f"attention on node {last + 1}'s parents"],
                [
                    (
                        row["head"],
                        *(
                            ", ".join(
                                f"{p}: {a:.3f}"
                                for p, a in zip(row[role]["parents"], row[role]["attention"], strict=True)
                            )
                            for role in ("as_node", "as_query")
                        ),
                    )
                    for row in result.last_row
                ],
                f"Row {last} stands apart: as a key it is node {last}, as a query it asks for node {last + 1}.",
            )
        )
    return tables


def _evidence_table(result: Recovery, head: int) -> page.Table:
    effects = result.effects[head]
    table = effects.to_pandas()
    weights = result.head_graphs.values[0][head]
    rows = [
        (
            row.child,
            row.parent,
            float(weights[row.child, row.parent]),
            f"{1e3 * row.gain:.2f}\u00a0±\u00a0{1e3 * row.stderr:.2f}",
            "" if margin is None or stderr is None else f"{1e3 * margin:.2f}\u00a0±\u00a0{1e3 * stderr:.2f}",
            row.adjusted_p_value,
            "edge" if row.confirmed else "no edge",
            _truth_of(result, row.parent, row.child),
            f"{1e3 * row.cut:.2f}\u00a0±\u00a0{1e3 * row.cut_stderr:.2f}",
        )
        for row, margin, stderr in zip(table.itertuples(), effects.margin, effects.margin_stderr, strict=True)
    ]
    return page.Table(
        ["child", "candidate", "attention", "gain", "margin", "p", "decision", "truth", "cut"],
        rows,
        f"L0H{head}: {effects.n_sequences:,} sequences, paired one-sided tests, family-wise level {effects.level:g} "
        "(p is corrected for the number of pairs). Gain, margin and cut are in thousandths of a nat, ± one standard error; the "
        "margin is measured where the gain is positive at the level.",
    )


def _truth_of(result: Recovery, parent: int, child: int) -> str:
    if result.truth.has_edge(parent, child):
        return "edge"
    return "other parent" if result.truth.in_degree(child) else "root"


def _layer_blocks(result: Recovery, layer: int) -> dict[tuple[int, int, str, str], object]:
    return {name: block for name, block in result.model.named_blocks().items() if name[0] == layer}


def _marks(result: Recovery, layer: int) -> dict[tuple[int, int, str, str], list[tuple[int, int]]]:
    if layer:
        return {}
    inside = [(child, parent) for parent, child in result.truth.edges if child in result.task.children]
    return {(0, head, "position", "position"): inside for head in range(result.model.heads[0])}


def _attention(result: Recovery) -> list[page.Attention]:
    batch = result.task.sample(
        SHOWN_SEQUENCES, generator(result.settings["seed"], "shown", device=result.settings["device"])
    )
    _, cache = result.model.run_with_cache(batch.tokens, return_type=None)
    names = [f"L{layer}H{head}" for layer, n in enumerate(result.model.heads) for head in range(n)]
    read = [result.head_graphs.graph(layer, head) for layer, n in enumerate(result.model.heads) for head in range(n)]
    shown = []
    for i, tokens in enumerate(result.model.to_str_tokens(batch.tokens)):
        patterns = [cache["pattern", layer][i] for layer in range(len(result.model.heads))]
        stacked = [head for pattern in patterns for head in pattern.tolist()]
        shown.append(
            page.Attention(
                viz.attention(tokens, stacked, head_names=names, graphs=read),
                f"Sequence {i + 1}: rows are queries, columns keys. Beside it the graph of each head's attention, averaged over "
                f"{result.head_graphs.n_sequences:,} sequences.",
            )
        )
    return shown
