"""The report on a circuit of nodes: which heads and MLPs are left, what they keep, and what that doesn't show."""

from __future__ import annotations

from causal_probe import viz
from causal_probe.circuits.nodes import NodeCircuit
from causal_probe.reports.pages import made, plus_minus, report
from causal_probe.viz import report as page

__all__ = ["node_circuit_page"]

HOW_TO_READ = (
    "Heads and MLPs were taken away one after another, from the last layer to the first and back: each for good if enough of the metric was left without it and all that went before, until "
    "a pass took nothing away. What is taken away is replaced by the same everywhere (the contrast). Half of the prompts served the search; the share that the circuit keeps is measured on the other half."
)
NOT_SHOWN = (
    "No node has a test of its own. Of two nodes that stand in for each other one is left, and which depends on the order. A node may be left because the share fell just below the limit. "
    "The circuit holds on these prompts, under this contrast: {contrast}."
)


@report.register
def node_circuit_page(result: NodeCircuit) -> viz.Report:
    """The report that ``causal-probe circuit --strategy nodes`` writes."""
    settings = result.settings
    heads = len(result.heads)
    return made(
        result,
        f"A circuit of nodes of {result.provenance['model']}",
        f"{settings['prompts']}, {settings['metric']}, contrast {settings['contrast']}: {heads} heads and {len(result.nodes) - heads} MLPs keep {result.kept:.0%} of it.",
        [
            page.Section("Result", [page.Headline(_headline(result)), page.Paragraph(HOW_TO_READ)]),
            page.Section("What is left", [_left(result)]),
            page.Section("The search", [_sweeps(result)]),
            page.Section("What it does not show", [page.Paragraph(NOT_SHOWN.format(contrast=settings["contrast_is"]))]),
        ],
    )


def _headline(result: NodeCircuit) -> list[tuple[str, object, str]]:
    random = None if result.random_mean is None else round(result.random_mean, 3)
    found: list[tuple[str, object, str]] = [
        ("nodes left", len(result.nodes), f"of {result.candidates}"),
        (
            "kept by them alone",
            plus_minus(result.kept, result.kept_stderr),
            "share of the clean metric, on other prompts",
        ),
        (
            "random circuits keep",
            random,
            f"mean over {len(result.random_kept)} with as many heads in each layer and as many MLPs",
        ),
        ("metric", round(result.clean, 3), f"{round(result.baseline, 3)} with every node ablated"),
    ]
    if result.edges is not None:
        found.append(
            ("edges between them", len(result.edges), f"keep {plus_minus(result.edges_kept, result.edges_kept_stderr)}")
        )
    return found


def _left(result: NodeCircuit) -> page.Table:
    return page.Table(
        ["layer", "heads", "MLP"],
        [(layer, heads, "left" if mlp else "") for layer, heads, mlp in result.table().rows],
        "By layer; layers of which nothing is left are not shown.",
    )


def _sweeps(result: NodeCircuit) -> page.Table:
    return page.Table(
        ["pass", "nodes left", "share kept"],
        [(each.direction, each.nodes, round(each.kept, 3)) for each in result.sweeps],
        "On the prompts of the search.",
    )
