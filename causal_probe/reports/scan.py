"""The report on a scan: what each head attends to, what it was measured on, and whether the model uses it."""

from __future__ import annotations

import operator
from collections.abc import Iterator

from causal_probe import viz
from causal_probe.experiments.model_scan import HeadGraph, ModelScan
from causal_probe.experiments.show_called import attention_beside_scores
from causal_probe.probes.sequences import longest_ngram
from causal_probe.probes.verification import Verification
from causal_probe.reports.pages import made, plus_minus, report, signed
from causal_probe.reports.pictures import plot
from causal_probe.viz import report as page
from causal_probe.viz.report import Block

__all__ = ["scan_page"]

KINDS = {"repeated": "random tokens, none twice in a period"}
HOW_TO_READ = (
    "A template says which keys a head of some type attends to, given the tokens. The score is the attention on those keys, "
    "averaged over the queries that have one and then over sequences; chance is the score of a head that spreads its attention "
    "evenly over all it sees; the excess is (score \N{MINUS SIGN} chance) / (1 \N{MINUS SIGN} chance): 1 for a perfect head, 0 at "
    "chance. The sink is the attention on position 0 in the same rows. A head is called what a template says if its excess is above "
    "0.5 by three standard errors."
    "\n\n"
    "Attention is no evidence of use: a call says where a head looks, and not that the model needs it."
)

VERDICTS = (
    "Each flagged head was ablated: its output replaced by its mean at each position, and by its mean over all positions, in other sequences. The "
    "null hypothesis of every effect is that it is at most delta. A head is causal if ablating it raises the loss by more than delta, and by "
    "more than for nearly all heads that were not flagged; negative if that lowers the loss by more than delta; redundant if alone it has no effect "
    "above delta, but one where all other flagged heads are ablated, which together hurt more than random sets of as many; of no effect above delta "
    "if both effects surely lie within delta; undecided otherwise. All this is said of these sequences and this loss; later layers may repair "
    "what one ablation takes away."
)

CIRCUITS = (
    "A head's attention score is a sum over pairs of sources: what the query holds and what the key holds were written by "
    "embeddings, earlier heads and MLPs (the scales of the normalizations are those of the forward pass). A pair's contribution "
    "is its part of the score on the template's targets, less its mean part on the other visible keys."
)


@report.register
def scan_page(result: ModelScan) -> viz.Report:
    """The report that ``causal-probe scan`` writes."""
    scores = result.scores
    n_called = len({found[:2] for found in scores.called()})
    n_heads = sum(scores.heads)
    found = f"{n_called} of {n_heads} heads are" if n_called else f"None of its {n_heads} heads is"
    verification = result.verification
    causal = "" if verification is None else f" {_count_causal(verification)}"
    checked = [] if verification is None else [page.Section("Does the model use it?", list(_checks(verification)))]
    blocks = [page.Section("What makes them attend there", list(_circuits(result)))] * result.settings["attributions"]
    # Parts that need the model: merged results of several processes have none.
    shown = [
        page.Section("Graphs of the leading heads", list(_graphs(result))),
        page.Section("Attention of the leading heads", list(_patterns(result))),
    ] * (result.settings["source"] != "merged")
    return made(
        result,
        f"What the attention heads of {scores.provenance['model']} do",
        f"Every head was scored against {len(scores.names)} head types in one pass. {found} described by one of them.{causal}",
        [
            page.Section("Result", [page.Headline(_headline(result)), *_heat_maps(result), *_tables(result)]),
            *checked,
            *blocks,
            *shown,
            page.Section("What it was measured on", [_sequences(result)]),
        ],
    )


def _count_causal(verification: Verification) -> str:
    flagged = {found[:2] for found in verification.verdicts}
    if not flagged:
        if "verdicts" in verification.undefined:
            return "It does not surely do the task on which heads are verified, so there are no verdicts."
        return "None stood out enough to be verified."
    causal = {found[:2] for found in verification.called("causal")}
    return f"Of {len(flagged)} that were verified, {len(causal)} {'is' if len(causal) == 1 else 'are'} causal."


def _headline(result: ModelScan) -> list[tuple[str, object, str]]:
    """The best head of the types that a reader looks for first, of those that were scored."""
    figures: list[tuple[str, object, str]] = []
    for template in result.scores.templates:
        rows = result.rows(template.name)
        if rows and template.looks_back:
            score = rows[0].score
            excess = f"excess {signed(f'{score.excess:.2f}')}"
            meaning = excess if rows[0].called else f"{excess}, not enough to be called that"
            figures.append((template.name, rows[0].name, meaning))
    return figures[:4]


def _tables(result: ModelScan) -> Iterator[Block]:
    yield page.Paragraph(HOW_TO_READ)
    if result.notes:
        yield page.Paragraph("\n\n".join(result.notes).replace(" -", " \N{MINUS SIGN}"))
    table = result.table()
    rows = [
        (template, head, *(signed(cell) if isinstance(cell, str) else "" for cell in cells))
        for template, head, *cells in table.rows
    ]
    by_bootstrap = "" if result.intervals is None else " 95% interval: of the excess, by the bootstrap over sequences."
    left_out = [f"{more} more for {name}" for name in result.scores.names if (more := result.left_out(name))]
    told = (
        f"The heads that a template describes, at most {result.settings['top']}, and the best one that it does not. "
        f"{'Left out: ' + ', '.join(left_out) + '. ' if left_out else ''}Excess ± one standard error over sequences.{by_bootstrap}"
    )
    at_rest = {each.name for each in result.scores.templates if not each.looks_back}
    for caption, part in (
        (told, [row for row in rows if row[0] not in at_rest]),
        (
            "The same for heads that rest on the first token or on their own.",
            [row for row in rows if row[0] in at_rest],
        ),
    ):
        if part:
            yield page.Table(table.columns, part, caption)


# ----------------------------------------------------------------------------------------------------------- causal effects


def _checks(verification: Verification) -> Iterator[Block]:
    yield page.Paragraph(VERDICTS)
    if not verification.verdicts:
        yield page.Paragraph(
            f"No verdicts: {verification.undefined['verdicts']}."
            if "verdicts" in verification.undefined
            else "No head was flagged: there is nothing to verify."
        )
        return
    others = operator.attrgetter("zero_effect", "direct_effect", "restored")
    yield page.Table(
        ["head", "template", "verdict", "why", "effect", "pooled", "exceeds", "zero", "direct", "restored"],
        [
            (
                *(found.name, found.template, signed(found.verdict), signed(found.reason)),
                *(plus_minus(*found.effect[:2]), plus_minus(*found.pooled_effect[:2])),
                *(None if found.exceeds is None else f"{found.exceeds:.1%}",),
                *(each and plus_minus(each.value, None) for each in others(found)),
            )
            for found in verification.verdicts
        ],
        f"Rise of the loss ({verification.loss.mean():.3f} nats on {len(verification.loss)} sequences) when the head's output is "
        f"replaced by its mean at each position (effect), by its mean over all positions (pooled), and by zero; delta is {verification.rule.delta:g}; exceeds: share of the heads that were not "
        "flagged whose effect is smaller; direct: by how much its output raises the target's logit, everything after it held; "
        "restored: fall of the loss when, of all heads flagged for the template, it alone is left in. What no verdict hangs on is empty, unless all was asked for (exhaustive). Effects are given ± one "
        "standard error; scan.json holds the others' too, and the p-values.",
    )
    yield page.Table(
        ["template", "heads", "together", "random sets, mean", "exceeds"],
        [
            (
                joint.template,
                ", ".join(f"L{layer}H{head}" for layer, head in joint.heads),
                plus_minus(*joint.effect[:2]),
                float(joint.random.mean()) if len(joint.random) else None,
                None if joint.exceeds is None else f"{joint.exceeds:.1%}",
            )
            for joint in verification.joint.values()
        ],
        "All heads flagged for a template ablated together, against random sets of as many heads that were not flagged.",
    )
    if verification.notes:
        yield page.Paragraph(". ".join(verification.notes) + ".")
    if verification.undefined:
        yield page.Paragraph(
            "Undefined: " + "; ".join(f"{what}: {why}" for what, why in verification.undefined.items()) + "."
        )
    yield page.Picture(
        plot(verification),
        "The rise of the loss when a head alone is replaced by its mean at each position"
        + (
            "."
            if verification.settings.get("exhaustive", True)
            else "; empty: not ablated, for no verdict hangs on it."
        ),
    )
    if verification.dependence.number_of_edges():
        yield page.Picture(
            plot(verification, "dependence"),
            "Dependence: an arc runs from a head to one whose score falls when the first is ablated.",
        )


# ------------------------------------------------------------------------------------------------------------------ pictures


def _heat_maps(result: ModelScan) -> Iterator[Block]:
    scores = result.scores
    for name in scores.undefined:
        yield page.Paragraph(f"{scores.undefined[name]}: there is nothing to draw.")
    shown = [template for template in scores.templates if template.name not in scores.undefined]
    if shown:
        yield page.Picture(
            plot(scores),
            "Excess attention of every head on the targets of each template. "
            + "; ".join(f"{each.name}: {each.description}" for each in shown)
            + ".",
        )


def _graphs(result: ModelScan) -> Iterator[Block]:
    if not result.graphs:
        yield page.Paragraph("No template that was scored has earlier positions other than the first as its targets.")
        return
    yield page.Paragraph(
        "A position's parent is the earlier position that it attends to most, with at least half of the attention. Attention on "
        "position 0 that exceeds it is read as “no parent”: many heads look there when they have nothing to say. So an edge "
        "from position 0 is never found."
    )
    yield page.Table(
        ["template", "head", "precision", "recall", "sequences"],
        [
            (each.template.name, each.name, *(each.agreement[name] for name in ("precision", "recall", "n_sequences")))
            for each in result.graphs
        ],
        "The graphs of the leading heads, sequence by sequence, against the template's targets as true parents, in the rows that "
        "have one. Precision: share of the found edges that are true; recall: share of the true edges that were found.",
    )
    called = {found[:3] for found in result.scores.called()}
    drawn = [found for found in result.graphs if (found.layer, found.head, found.template.name) in called]
    if not drawn:
        yield page.Paragraph("No template describes any of them, so none is drawn.")
    for found in _first_of_each_template(drawn):
        yield page.Picture(
            viz.graph(found.truth, found.shown.graph(0, found.layer, found.head), labels=found.tokens),
            f"Below the line {found.name} on one sequence, above it the targets of {found.template.name} there.",
        )


def _circuits(result: ModelScan) -> Iterator[Block]:
    if result.no_circuits is not None:
        yield page.Paragraph(f"The scores of this model could not be taken apart. {result.no_circuits}")
        return
    if not result.circuits:
        yield page.Paragraph("No template describes any head, so none is taken apart.")
        return
    yield page.Paragraph(CIRCUITS)
    shown = operator.attrgetter("source", "side", "contribution", "drop", "stderr", "largest_control", "confirmed")
    for found in result.circuits:
        attributed, arrows = found.attributions, found.upstream.arrows
        name = f"L{attributed.layer}H{attributed.head}"
        yield page.Picture(
            plot(attributed, 10),
            f"The sources that matter most for {name} on {attributed.edges}; all pairs together give {attributed.total:.2f}, and miss the scores "
            f"that the model uses by {attributed.error:.0e} at most.",
        )  # fmt: skip
        if arrows:
            yield page.Table(
                ["source", "side", "contribution", "drop", "standard error", "largest control", "confirmed"],
                [shown(arrow) for arrow in arrows],
                f"By how much the attention of {name} on {attributed.edges} falls when what a head wrote into its keys (or queries) alone is "
                f"replaced by its mean, beside {result.circuits[0].upstream.settings['controls']} matched heads at most.",
            )


def _first_of_each_template(graphs: list[HeadGraph]) -> list[HeadGraph]:
    return list({found.template.name: found for found in reversed(graphs)}.values())[::-1]


def _patterns(result: ModelScan) -> Iterator[Block]:
    if not result.examples:
        yield page.Paragraph("No head stands out for any template that looks back.")
        return
    yield page.Paragraph(
        "Rows are queries, columns keys. Hover over a head to see it large, click to keep it. Beside the picture: each head's excess by "
        "template, and its edges in this sequence (the earlier position with at least half of the attention; attention on position 0 "
        "that exceeds it says that there is none)."
    )
    for example in result.examples:
        yield page.Attention(
            attention_beside_scores(result.scores, result.leading, example.tokens, example.patterns),
            f"{example.title}: the leading heads of each template.",
        )


def _sequences(result: ModelScan) -> page.Table:
    if result.readings:
        counted = ("documents", "sequences", "length", "tokens", "left_over", "bos", "separator")
        return page.Table(
            ["text", "documents", "sequences", "tokens in each", "tokens", "left out", "BOS", "separator"],
            [
                (
                    reading["source"] if isinstance(reading["source"], str) else ", ".join(reading["source"]),
                    *(reading[name] if name != "separator" else repr(reading[name]) for name in counted),
                )
                for reading in result.readings
            ],
            "No sequence holds text of two documents. The end of a document that fills no sequence is left out.",
        )
    made = result.tokens
    kinds = [
        f"{each['kind']} walks" if longest_ngram([each["kind"]]) else KINDS.get(each["kind"], each["kind"])
        for each in made
    ]
    told = ("n_sequences", "period", "copies", "bos")
    return page.Table(
        ["templates", "sequences of", "number", "period", "copies", "BOS", "first tokens"],
        [
            (
                ", ".join(each["templates"]),
                kind,
                *map(each.get, told),
                ", ".join(map(str, each.get("start", ()))) or "none",
            )
            for each, kind in zip(made, kinds, strict=True)
        ],
        "A period of tokens is drawn and repeated. In an n-gram walk n tokens determine the next one, and fewer do not.",
    )
