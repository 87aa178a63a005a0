"""The report on causal discovery from the attention to one text."""

from __future__ import annotations

import itertools
from collections import Counter
from collections.abc import Iterator

from causal_probe import viz
from causal_probe.experiments.discover_in_text import TextDiscovery
from causal_probe.graphs.mixed import mixed_edges, show_mixed_edge
from causal_probe.reports.pages import made, report
from causal_probe.viz import report as page
from causal_probe.viz.report import Block

__all__ = ["discovery_page"]

#: Heads drawn at most, edges drawn in total (an edge takes a kilobyte, and a page must stay under three megabytes), ...
DRAWN = 12
DRAWN_EDGES = 2000
#: ... and edges listed for each head.
LISTED = 60

HOW_TO_READ = (
    "Each head's attention A is read as a linear structural equation model over the tokens, in which causes may be latent: A A^T are "
    "the covariances of what the tokens receive. A constraint-based learner then removes every edge whose two tokens are independent "
    "given some others. An arrow at a token says: it is no cause of the other. A tail: it is one. A circle: the covariances don't say. Two "
    "arrows: a common cause that is no token."
    "\n\n"
    "This reads where a head looks in one layer on one text. It is no proof that the model uses an edge; what replacing tokens does to "
    "the decision is."
)


@report.register
def discovery_page(result: TextDiscovery) -> viz.Report:
    """The report that ``causal-probe discover`` writes."""
    found = result.discovery
    edges = Counter[tuple[int, int]](edge for each in found.graphs for edge in mixed_edges(each.graph))
    n = len(found.graphs)
    cleann = result.explanations.get("cleann")
    return made(
        result,
        f"A causal graph of {found.provenance['model']}'s attention to a text",
        f"“{result.settings['text']}” Layer {found.settings['layer']}, {n} graph{'s' if n != 1 else ''} over {len(found.nodes)} nodes.",
        [
            page.Section("Result", [page.Headline(_headline(result)), page.Paragraph(HOW_TO_READ), _overview(result)]),
            *([] if cleann is None else [page.Section("Why this decision?", list(_decision(result)))]),
            page.Section("The graphs", list(_graphs(result))),
            page.Section("Edges that heads share", [_shared(result, edges)]),
            page.Section("Tests", list(_tests(result))),
        ],
        settings={**result.settings, "algorithm": found.settings["algorithm"], "samples": found.settings["samples"]},
    )


def _headline(result: TextDiscovery) -> list[tuple[str, object, str]]:
    found = result.discovery
    counts = [each.graph.number_of_edges() // 2 for each in found.graphs]
    n = len(found.nodes)
    undefined = sum(count.undefined for each in found.graphs for count in each.by_order)
    number = f"{min(counts)}–{max(counts)}" if len(set(counts)) > 1 else counts[0]
    shown: list[tuple[str, object, str]] = [
        ("edges", number, f"of {n * (n - 1) // 2} pairs, by head"),
        ("tests", sum(each.tests for each in found.graphs), "of conditional independence"),
        ("undefined", undefined, "tests that decide nothing"),
    ]
    if result.decision is not None:
        size = result.explanations["cleann"].size
        meaning = "no small set changes it" if size is None else f"changed by replacing {size} node{'s' * (size != 1)}"
        shown.append(("decision", repr(result.decision), meaning))
    return shown


def _overview(result: TextDiscovery) -> page.Table:
    rows = []
    for each in result.discovery.graphs:
        kinds, condition = each.kinds(), each.correlation.condition
        counts = (sum(kinds.values()), *(kinds[kind] for kind in ("-->", "<->", "o->", "o-o")))
        shown = "singular" if condition is None else f"{condition:.1e}"
        rows.append((each.name, *counts, each.tests, each.correlation.rank, shown))
    return page.Table(
        ["graph", "edges", "-->", "<->", "o->", "o-o", "tests", "rank", "condition"],
        rows,
        f"The graph of each head. Rank: of the correlation matrix over {len(result.discovery.nodes)} nodes to working precision; "
        "condition: its condition number.",
    )


def _decision(result: TextDiscovery) -> Iterator[Block]:
    found, nodes = result.explanations["cleann"], result.discovery.nodes
    yield page.Paragraph(
        f"At “{nodes[found.target]}” the model decides {result.decision!r}. A set of nodes explains that if replacing them changes it. "
        "CLEANN tries sets that the graphs join to that node, smallest first; leave-one-out replaces the nodes in the order of what each "
        "alone does to the decision's output."
    )
    after = {"cleann": result.changed_to}
    rows = [
        (method, ", ".join(nodes[node] for node in each), len(each), then, rank)
        for method, its in result.explanations.items()
        for each, then, rank in zip(its.sets, after.get(method, [""] * len(its.sets)), its.ranks, strict=True)
    ]
    yield page.Table(
        ["method", "set", "size", "decision then", "its rank before"],
        rows[:30],
        f"Sets of the smallest size that change the decision{'' if len(rows) <= 30 else f' (30 of {len(rows)})'}; {found.tested} were tried. A rank of 2 is the most specific change.",
    )


def _graphs(result: TextDiscovery) -> Iterator[Block]:
    found = result.discovery
    cleann = result.explanations.get("cleann")
    highlight = cleann.sets[0] if cleann is not None and cleann.sets else ()
    target = None if cleann is None else cleann.target
    together = itertools.accumulate(each.graph.number_of_edges() // 2 for each in found.graphs)
    drawn = max(1, sum(edges <= DRAWN_EDGES for edges in itertools.islice(together, DRAWN)))
    for each in found.graphs[:drawn]:
        edges = [show_mixed_edge(each.graph, u, v) for u, v in mixed_edges(each.graph)]
        yield page.Picture(
            viz.mixed(each.graph, found.nodes, highlight=highlight, target=target, title=each.name),
            f"{each.name}: {len(edges)} edges."
            + (" Dark: the token that is explained; wine red: the first explaining set." if cleann is not None else ""),
        )
    if len(found.graphs) > drawn:
        yield page.Paragraph(
            f"Not drawn, for the size of the page: {len(found.graphs) - drawn} more heads. They are in discovery.json."
        )


def _shared(result: TextDiscovery, edges: Counter[tuple[int, int]]) -> page.Table:
    found = result.discovery
    rows = []
    for (u, v), count in sorted(edges.items(), key=lambda item: (-item[1], item[0]))[:LISTED]:
        its = [each.graph for each in found.graphs if each.graph.has_edge(u, v)]
        marks = Counter(show_mixed_edge(graph, u, v).split(" ")[1] for graph in its)
        known = [p for graph in its if (p := graph.edges[u, v]["p"]) is not None]
        told = ", ".join(f"{m} {k}" for m, k in marks.most_common())
        largest = f"{max(known):.1e}" if known else None
        rows.append((f"{u} {found.nodes[u]}", f"{v} {found.nodes[v]}", count, told, largest))
    return page.Table(
        ["node", "node", "heads", "marks", "largest p"],
        rows,
        f"The edges that most heads have, at most {LISTED}; the largest p-value of any test of the pair in those heads.",
    )


def _tests(result: TextDiscovery) -> Iterator[Block]:
    rows = [
        (each.name, count.order, count.tests, count.undefined, count.detectable, count.least_variance)
        for each in result.discovery.graphs
        for count in each.by_order
    ]
    yield page.Table(
        ["graph", "order", "tests", "undefined", "detectable", "least variance left"],
        rows,
        "Tests by the size of the conditioning set. Detectable: the smallest partial correlation that can be told from zero. Undefined: given "
        "the set, nothing is left of one of the two tokens that the arithmetic can tell from zero; such a test removes nothing.",
    )
    notes = Counter(note for each in result.discovery.graphs for note in each.notes)
    if notes:
        yield page.Paragraph(
            "\n\n".join(f"{note} ({count} of {len(result.discovery.graphs)} graphs)" for note, count in notes.items())
        )
