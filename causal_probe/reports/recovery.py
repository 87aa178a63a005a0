"""The report on a recovery: what was found, beside what is true, and the evidence for it."""

from __future__ import annotations

from collections.abc import Iterator

from causal_probe import viz
from causal_probe.experiments.recovery import Recovery
from causal_probe.first_gradient.start import GRAPH_OF_GRADIENTS
from causal_probe.models import DisentangledTransformer
from causal_probe.reports.pages import made, plus_minus, report
from causal_probe.reports.pictures import plot
from causal_probe.tasks import Task, generator
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
        "mean over true children of layer 0's mean on the parent",
    ),
    (
        "parents that lead",
        "argmax_parent_accuracy",
        "share of true edges whose parent leads in the child's mean attention",
    ),
    ("AUROC", "auroc", "of the deciding statistic, over all pairs of a node and an earlier one; chance is 0.5"),
    ("average precision", "average_precision", "of the same statistic and pairs; chance is the share of true edges"),
)


EVIDENCE = (
    "Attention alone does not tell a root from a child: the row of a trained root may saturate on some node. So each node's candidate "
    "parent, the earlier node it attends to most, is tested by what it does to the loss: the gain is the loss with the node's attention "
    "spread evenly over its past, minus the loss with all of it on the candidate. It is positive for an edge that the model uses. Whether the "
    "candidate is the parent is asked against every rival, which is any other earlier node, or none: with all attention on the candidate, the margin is "
    "the mean loss over the tokens that the node would have from that rival, minus the loss with the token that it has. Where data can't be redrawn, it "
    "is the loss with all attention on the rival minus that with it on the candidate. An edge needs the gain and every margin to be positive; shown is "
    "the rival that is told apart least surely. Where siblings can stand in for a node, the edge is tested again with their attention spread evenly: "
    "what is confirmed only so is redundant alone. A node without a confirmed edge is not shown to be a root. "
    "The plain cut (evenly spread minus unedited) is shown beside them and decides nothing."
)
FLAT = (
    " In the first stage the loss hardly falls, though the graph is learnt then: only the position block of layer 0 moves, and the comparison "
    "in layer 1 is still weak, so that layer 1 attends nearly evenly whatever was copied. The next stage sharpens the comparison."
)
#: Of a result that was read from a file.
GONE = page.Paragraph(
    "A file of results holds no model, which lies in its folder's model/, and nothing is drawn from it."
)


@report.register
def recovery_page(result: Recovery) -> viz.Report:
    """The report that ``causal-probe recover`` writes."""
    began = "Its first layer began with the graph that gradients showed before training, and kept it. "
    given = result.given and result.given[0].startswith(GRAPH_OF_GRADIENTS)
    verdict = "exactly" if result.exact else f"with {result.comparison.shd} wrong edges (structural Hamming distance)"
    model, task = result.model, result.task
    return made(
        result,
        "A causal graph, recovered from a transformer",
        "A disentangled transformer was trained on sequences drawn along a causal graph that it was never shown. "
        f"{began if given else ''}Its first layer was then probed through hooks, and the graph was recovered {verdict}.",
        [
            page.Section("Result", list(_found(result))),
            page.Section("What was given, what was learnt", list(_training(result))),
            page.Section(
                "Evidence",
                [page.Paragraph(EVIDENCE), *(_evidence_table(result, head) for head in range(len(result.effects)))],
            ),
            page.Section("Weights", [GONE] if model is None else list(_weights(result, model))),
            page.Section("Training", [_losses(result)]),
            page.Section(
                "Attention on a few sequences",
                [GONE] if model is None or task is None else _attention(result, model, task),
            ),
        ],
    )


def _found(result: Recovery) -> Iterator[page.Block]:
    found = result.comparison
    asked = range(found.children[-1] + 1)
    shown = {str(name): value for name, value in result.table().rows}
    *_, (name, best) = result.reference_losses.items()
    right_roots = "undefined" if found.root_accuracy is None else shown["roots without a confirmed parent"]
    of_best = f"nats; {best:.4f} {'if the graph is known (no bound)' if name == 'known-graph' else f'of {name}'}"
    yield page.Headline(
        [
            ("edges right", shown["edges right"], "true edges that were found"),
            ("roots", right_roots, "true roots for which no parent was confirmed"),
            ("attention", result.mean_parent_attention, "mean attention of layer 0 on the true parent"),
            ("loss", result.loss, of_best),
        ]
    )
    left_out = f" Nodes after {asked[-1]} are left out: no row of layer 0 is only about their parents."
    yield page.Picture(
        plot(result),
        "The true graph above the line, the found one below it. An arc runs from parent to child."
        f"{left_out if len(asked) < len(result.truth) else ''}",
    )
    reasons = result.undefined
    yield page.Table(
        ["metric", "value", "what it is"],
        [
            (
                name,
                getattr(found if hasattr(found, key) else result, key),
                f"{text}; undefined: {reasons[key]}" if key in reasons else text,
            )
            for name, key, text in METRICS
        ],
        f"Nodes are aligned by name; the rows compared are those of the children {found.children[0]} to {found.children[-1]}.",
    )
    yield from _head_tables(result)


def _training(result: Recovery) -> Iterator[page.Block]:
    yield page.Table(
        ["given"],
        [(what,) for what in result.given or ("nothing",)],
        "What was set before training; all else is zero or small noise.",
    )
    told = ("steps", "batch_size", "optimizer", "learning_rate", "schedule")
    yield page.Table(
        ["stage", "moves", "steps", "sequences per step", "optimiser", "learning rate", "schedule"],
        [
            (stage["name"], ", ".join(stage["moves"]), *(stage[name] for name in told))
            for stage in result.settings["stages"]
        ],
        f"{result.history.n_sequences:,} fresh sequences in all; no sequence was seen twice. A0 is the query-key matrix of layer 0, "
        "A0.position its position x position block, A0.tokens its other blocks, A1 that of layer 1, W_U the output.",
    )


def _weights(result: Recovery, model: DisentangledTransformer) -> Iterator[page.Block]:
    inside = [(child, parent) for parent, child in result.truth.edges if child in result.comparison.children]
    for layer in range(min(2, len(model.heads))):
        blocks = {name: block for name, block in model.named_blocks().items() if name[0] == layer}
        marks = {(0, head, "position", "position"): inside for head in range(model.heads[0]) if not layer}
        yield page.Picture(
            viz.blocks(blocks, marks=marks, title=f"Layer {layer}"),
            f"The blocks of layer {layer}'s query-key matrices: rows are what the query holds, columns what the key holds."
            f"{'' if layer else ' True edges are outlined.'}",
        )


def _losses(result: Recovery) -> page.Block:
    if not result.history.step:
        return page.Paragraph("No step was made.")
    return page.Picture(
        plot(result, "training"),
        "Loss on each step's fresh batch. The lines are reference predictors, on the sequences on which the trained model's loss is measured; none is a bound."
        f"{FLAT if any(list(stage['moves']) == ['A0.position'] for stage in result.settings['stages']) else ''}",
    )


def _head_tables(result: Recovery) -> Iterator[page.Table]:
    match = result.match
    if match is None or len(match.heads) + len(match.unmatched_heads) == 1:
        return
    yield page.Table(
        ["parent slot", "head", "attention on that parent", "children whose slots are swapped"],
        match.table().rows,
        "Heads of layer 0, assigned to parent slots (slot 0: the smaller parent).",
    )
    if result.last_row is None:
        return
    last = result.settings["n_positions"] - 1
    yield page.Table(
        ["head", f"attention on node {last}'s parents", f"attention on node {last + 1}'s parents"],
        [
            (
                row["head"],
                *(
                    ", ".join(f"{p}: {a:.3f}" for p, a in zip(its["parents"], its["attention"], strict=True))
                    for its in (row["as_node"], row["as_query"])
                ),
            )
            for row in result.last_row
        ],
        f"Row {last} stands apart: as a key it is node {last}, as a query it asks for node {last + 1}.",
    )


def _evidence_table(result: Recovery, head: int) -> page.Table:
    effects = result.effects[head]
    weights = result.head_graphs.values[0][head]
    rows = [
        (
            row.child,
            row.parent,
            float(weights[row.child, row.parent]),
            plus_minus(row.gain, row.stderr, digits=2, times=1e3),
            "" if stderr is None else plus_minus(margin, stderr, digits=2, times=1e3) or "",
            "" if rival is None else str(rival),
            row.adjusted_p_value,
            "not confirmed" if not row.confirmed else "edge, redundant alone" if row.redundant else "edge",
            _truth_of(result, row.parent, row.child),
            plus_minus(row.cut, row.cut_stderr, digits=2, times=1e3),
        )
        for row, margin, stderr, rival in zip(
            effects.to_pandas().itertuples(), effects.margin, effects.margin_stderr, effects.rival, strict=True
        )
    ]
    return page.Table(
        ["child", "candidate", "attention", "gain", "margin", "rival", "p", "decision", "truth", "cut"],
        rows,
        f"L0H{head}: {effects.n_sequences:,} sequences, paired one-sided tests, family-wise level {effects.level:g} "
        "(p is corrected for the number of pairs). Gain, margin and cut are in thousandths of a nat, ± one standard error; the "
        "margin, over the nearest rival, is measured where the gain is positive at the level.",
    )


def _truth_of(result: Recovery, parent: int, child: int) -> str:
    if result.truth.has_edge(parent, child):
        return "edge"
    return "other parent" if result.truth.in_degree(child) else "root"


def _attention(result: Recovery, model: DisentangledTransformer, task: Task) -> list[page.Attention]:
    settings = result.settings
    batch = task.sample(SHOWN_SEQUENCES, generator(settings["seed"], "shown", device=settings["device"]))
    _, cache = model.run_with_cache(batch.tokens, return_type=None)
    heads = [(layer, head) for layer, n in enumerate(model.heads) for head in range(n)]
    read = [result.head_graphs.graph(*place) for place in heads]
    return [
        page.Attention(
            viz.attention(
                tokens,
                [cache["pattern", layer][i, head].tolist() for layer, head in heads],
                head_names=[f"L{layer}H{head}" for layer, head in heads],
                graphs=read,
            ),
            f"Sequence {i + 1}: rows are queries, columns keys. Beside it the graph of each head's attention, averaged over "
            f"{result.head_graphs.n_sequences:,} sequences.",
        )
        for i, tokens in enumerate(model.to_str_tokens(batch.tokens))
    ]
