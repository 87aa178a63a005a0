"""The report on a circuit: which edges carry the behaviour, by how much, and what is not known."""

from __future__ import annotations

from causal_probe import viz
from causal_probe.circuits import Circuit
from causal_probe.reports.pages import made, plus_minus, report
from causal_probe.reports.pictures import plot
from causal_probe.viz import report as page
from causal_probe.viz.text import show_token

__all__ = ["circuit_page"]

#: Rows of the table of edges.
LISTED = 80

HOW_TO_READ = (
    "An edge goes from what writes into the residual stream to what reads it: a head's queries (q), keys (k) or values (v), an MLP, or the logits. It was ablated alone: "
    "what the source had written was replaced in that one input, and everything behind computed anew. Its effect is the mean fall of the metric. Confirmed: the "
    "effect is above delta, the smallest that counts. Negligible: its interval lies within plus and minus delta. Undecided: neither; more prompts may tell."
    "\n\n"
    "A circuit depends on the contrast, by what the parts were replaced: what both have in common is in no circuit."
)


@report.register
def circuit_page(result: Circuit) -> viz.Report:
    """The report that ``causal-probe circuit`` writes."""
    model = result.provenance["model"]
    return made(
        result,
        f"A circuit of {model}",
        f"{result.settings['prompts']}, {result.metric}, contrast {result.contrast}: {_conclusion(result)}",
        [
            page.Section(
                "Result",
                [page.Headline(_headline(result)), *map(page.Paragraph, _how_to_read(result)), *_picture(result)],
            ),
            page.Section("The edges", [_edges(result)]),
            page.Section("What the circuit is worth", list(_worth(result))),
            page.Section("What is not known", [page.Paragraph(_unknown(result))]),
        ],
    )


def _how_to_read(result: Circuit) -> list[str]:
    if not result.text:
        return [HOW_TO_READ]
    tokens = ", ".join(f"{show_token(token)} ({position})" for position, token in enumerate(result.text))
    return [
        f"One prompt; its tokens are, with their positions: {tokens}. L0H1@5 is what head 1 of layer 0 writes at position 5. Parts were replaced by those in "
        f"{result.settings['n_baselines']} other prompts ({result.settings['replaced_by']}); effects are means over these baselines, and say nothing of other prompts.",
        HOW_TO_READ,
    ]


def _conclusion(result: Circuit) -> str:
    n = len(result.members)
    if not n:
        return f"no edge of {len(result.edges)} was confirmed."
    return f"{n} of {len(result.edges)} tested edges are its circuit, which alone keeps {result.kept:.0%} of the behaviour."


def _headline(result: Circuit) -> list[tuple[str, object, str]]:
    first = result.sizes[-1] if result.sizes else None
    return [
        (
            "edges in the circuit",
            len(result.members),
            f"of {len(result.edges)} tested, {result.candidates} in the model",
        ),
        (
            "kept by the circuit alone",
            None if first is None else round(first.kept, 3),
            "share of the metric's fall when every edge is ablated",
        ),
        ("lost without it", None if first is None else round(first.lost, 3), "the same"),
        ("metric", round(result.clean, 3), f"{round(result.baseline, 3)} with every edge ablated"),
    ]


def _picture(result: Circuit) -> list[page.Picture]:
    if not result.members:
        return []
    return [
        page.Picture(
            plot(result),
            "The circuit over the prompt's tokens."
            if result.text
            else "The circuit between components, by layer; a head's queries, keys and values are one node with its output.",
        )
    ]


def _edges(result: Circuit) -> page.Table:
    rows = [
        (
            edge.source,
            edge.receiver,
            edge.status,
            plus_minus(edge.effect, edge.stderr),
            float(f"{edge.p:.2g}"),
            plus_minus(edge.again, edge.again_stderr),
        )
        for edge in result.edges[:LISTED]
    ]
    more = f" {len(result.edges) - LISTED} more are in circuit.json." if len(result.edges) > LISTED else ""
    return page.Table(
        ["source", "receiver", "status", "effect", "p, corrected", "again, on other prompts"],
        rows,
        f"Effects in units of the metric, with standard errors over {'baselines' if result.text else 'prompts'}; delta is {result.delta:.3g}.{more}",
    )


def _worth(result: Circuit) -> list[page.Table | page.Paragraph]:
    if not result.sizes:
        return [page.Paragraph("No edge was confirmed, so there is no circuit to keep.")]
    rows = [
        (
            size.edges,
            plus_minus(size.kept, size.kept_stderr),
            round(size.random_kept, 3),
            plus_minus(size.lost, size.lost_stderr),
            round(size.random_lost, 3),
        )
        for size in result.sizes
    ]
    found: list[page.Table | page.Paragraph] = [
        page.Table(
            ["edges", "kept alone", "random edges", "lost without", "random edges"],
            rows,
            "Shares of the metric's fall when every edge is ablated; the edges of the largest effects first; random edges are means over three draws.",
        )
    ]
    if result.gates:
        found.append(
            page.Table(
                ["gate", "first", "second", "together", "p, corrected"],
                [
                    (gate.kind, gate.first, gate.second, plus_minus(gate.effect, gate.stderr), float(f"{gate.p:.2g}"))
                    for gate in result.gates[:LISTED]
                ],
                "Or: neither has an effect alone, both together have. And: taking away one takes away what the other does.",
            )
        )
    return found


def _unknown(result: Circuit) -> str:
    said = [f"The contrast is {result.contrast}: {result.settings['contrast_is']}."]
    if result.missed is not None:
        tested, confirmed, low, high = result.missed
        said.append(
            f"{result.candidates - len(result.edges)} edges were not tested. Of {tested} drawn at random from what the screen left out, {confirmed} were confirmed: "
            f"{low:.1%} to {high:.1%} of those would be (95%)."
        )
    said.append(f"An effect of {result.detectable:.3g} is found with probability 0.8; smaller ones may be undecided.")
    if unread := result.settings["attention_not_read"]:
        said.append(
            f"Queries, keys and values of layers {', '.join(unread)} can't all be put in, so they are no receivers."
        )
    if unread := result.settings["mlps_not_read"]:
        said.append(f"The inputs of {', '.join(unread)} can't be edited alone, so they are no receivers.")
    return "\n\n".join(said)
