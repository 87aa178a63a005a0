"""The raw numbers of each kind of result, field by field: a function for each class."""

from __future__ import annotations

from typing import Any

import networkx as nx
import torch

from tests.recorded_calls.calls import Numbers


def of_graph(graph: nx.DiGraph) -> Numbers:
    """The edges of a graph over integers, sorted."""
    yield sorted(graph.edges)


def of_mixed(graph: nx.DiGraph) -> Numbers:
    """The pairs of a mixed graph, and the mark at either end."""
    marks = ("tail", "arrow", "circle")
    yield [
        (u, v, marks.index(data["mark"])) for u, v, data in sorted(graph.edges(data=True), key=lambda edge: edge[:2])
    ]


def of_comparison(found: Any) -> Numbers:
    """A comparison of graphs over integers."""
    yield found.children
    yield found.true_positives, found.precision, found.recall, found.f1, found.shd
    yield found.missing
    yield found.extra
    yield found.reversed
    yield (
        found.parent_accuracy,
        found.root_accuracy,
        found.auroc,
        found.average_precision,
        found.average_precision_chance,
    )


def of_moments(found: Any) -> Numbers:
    """Mean and standard error."""
    yield found.count
    yield found.mean
    yield found.stderr


def of_scores(found: Any) -> Numbers:
    """Head scores: the sums of each sequence, what follows from them, and how many targets templates share."""
    for name in found.names:
        sums = found.sums[name]
        yield sums.attention
        yield sums.sink
        yield sums.rows[:, 0] if sums.rows.shape[1] == 1 else sums.rows
        yield sums.chance[:, 0] if sums.chance.shape[1] == 1 else sums.chance
    for head in found:
        yield (
            head.score,
            head.chance,
            head.excess,
            head.stderr,
            head.excess_stderr,
            head.sink,
            head.rows,
            head.n_sequences,
        )
    yield [found.shared[pair] for pair in sorted(found.shared)]


def by_layer(found: Any) -> Numbers:
    """The means of all layers, and their errors."""
    yield [found.values[layer] for layer in sorted(found.values)]
    yield None if found.stderr is None else [found.stderr[layer] for layer in sorted(found.stderr)]


def of_head_graphs(found: Any) -> Numbers:
    """Mean patterns of all layers, their errors, and what is read out of them."""
    yield from by_layer(found)
    yield found.n_sequences
    for layer, its in sorted(found.values.items()):
        for head in range(len(its)):
            yield [(c.child, c.parent, c.value, c.margin) for c in found.parents(layer, head)]
            yield found.decisive(layer, head)
            yield found.by_offset(layer, head)
            yield from of_graph(found.graph(layer, head, claim=0.2))


def of_sequence_graphs(found: Any) -> Numbers:
    """The candidates of each sequence, in each head."""
    yield found.candidates
    yield found.weights
    yield found.sinks
    yield found.tokens


def of_sequence_comparison(found: Any) -> Numbers:
    """Graphs of sequences beside the truth."""
    for each in found.each:
        yield from of_comparison(each)
    yield found.true_positives, found.precision, found.recall, found.f1, found.shd


def of_edge_effects(found: Any) -> Numbers:
    """What cutting and routing each edge does to the loss."""
    yield found.edges
    yield found.n_sequences, found.loss, found.resolution, found.epsilon, found.level
    yield found.gain
    yield found.stderr
    yield found.cut
    yield found.cut_stderr
    yield found.p_value
    yield found.margin
    yield found.margin_stderr
    yield found.margin_p_value
    yield found.adjusted_p_value
    yield found.confirmed


def of_match(found: Any) -> Numbers:
    """Heads assigned to parent slots."""
    yield found.scores
    yield found.heads
    yield found.unmatched_heads
    yield found.attention
    yield found.swapped
    yield found.mean_parent_attention


def of_recovery(found: Any) -> Numbers:
    """All of a recovery by training: the comparison, attention, effects, losses, weights."""
    yield from of_graph(found.truth)
    yield from of_graph(found.recovered)
    yield from of_comparison(found.comparison)
    yield found.mean_parent_attention, found.argmax_parent_accuracy, found.steps_to_all_parents, found.loss
    yield [found.reference_losses[name] for name in sorted(found.reference_losses)]
    yield from by_layer(found.head_graphs)
    for its in found.effects:
        yield from of_edge_effects(its)
    if found.match is not None:
        yield from of_match(found.match)
    for row in found.last_row or ():
        yield row["as_node"]["parents"], row["as_node"]["attention"]
        yield row["as_query"]["parents"], row["as_query"]["attention"]
    yield from of_history(found.history)
    yield from of_weights(found.model)


def of_history(found: Any) -> Numbers:
    """Steps and losses of a training."""
    yield found.step
    yield found.loss
    yield found.n_sequences


def of_weights(model: Any) -> Numbers:
    """The parameters, in the order of their names."""
    for _, parameter in sorted(model.named_parameters()):
        yield parameter


def of_gradient_graph(found: Any) -> Numbers:
    """What one gradient shows of a tree."""
    yield found.evidence
    yield found.stderr
    yield found.candidates
    yield found.margin
    yield found.margin_stderr
    yield found.log_e_values
    yield found.log_e_rivals
    yield found.edge_value, found.edge_evidence, found.root_evidence, found.limit
    yield found.gradient_limits
    yield found.detection_limits
    yield found.n_sequences, found.stable_after
    yield found.parents
    yield found.left
    yield found.undecided


def of_gradient_slots(found: Any) -> Numbers:
    """What first gradients show of a graph of several parents."""
    yield found.evidence
    yield found.stderr
    yield found.queries
    yield found.gains
    yield found.joint
    yield found.leading
    yield found.first
    yield found.parents
    yield found.log_e_values
    yield found.n_sequences, found.held_out, found.cut_off
    yield from of_graph(found.graph)


def of_gradient_recovery(found: Any) -> Numbers:
    """A recovery from gradients; its evidence apart."""
    yield from of_graph(found.recovered)
    if found.comparison is not None:
        yield from of_comparison(found.comparison)
    yield found.loss
    if found.reference_losses is not None:
        yield [found.reference_losses[name] for name in sorted(found.reference_losses)]
    yield from of_weights(found.model)


def of_verification(found: Any) -> Numbers:
    """Verdicts, joint effects, and who depends on whom."""
    kinds = ("causal", "redundant", "negative", "no effect above delta", "undecided")
    yield found.loss
    for verdict in found.verdicts:
        yield verdict.layer, verdict.head, kinds.index(verdict.verdict), verdict.exceeds
        yield verdict.interval
        for estimate in (
            verdict.excess,
            verdict.effect,
            verdict.zero_effect,
            verdict.pooled_effect,
            verdict.restored,
            verdict.pooled_restored,
        ):
            if estimate is not None:
                yield from of_estimate(estimate)
        if verdict.direct_effect is not None:
            yield from of_estimate(verdict.direct_effect)
    for name in sorted(found.joint):
        its = found.joint[name]
        yield its.heads
        yield from of_estimate(its.effect)
        yield its.random
        yield its.exceeds
    yield [(*head, found.unflagged[head]) for head in sorted(found.unflagged)]
    for _, _, data in sorted(found.dependence.edges(data=True), key=lambda edge: edge[:2]):
        yield data["fall"], data["stderr"], data["p_value"]


def of_estimate(found: Any) -> Numbers:
    """A value, its error, and its p-value."""
    yield found.value, found.stderr, found.p_value


def of_qk_attributions(found: Any) -> Numbers:
    """The sources of a head's scores."""
    yield found.contribution
    yield found.stderr
    yield found.total, found.total_stderr, found.score, found.chance, found.rows, found.n_sequences, found.error
    for side in (found.by_query, found.by_key):
        yield torch.stack(
            [side.mean, torch.full_like(side.mean, torch.nan) if side.stderr is None else side.stderr], -1
        )
    for pair in found.pairs:
        yield pair.hits, pair.stderr
        yield pair.scores
        yield pair.queries


def of_upstream(found: Any) -> Numbers:
    """The earlier heads that a head needs."""
    for its in found.arrows:
        yield its.contribution, its.drop, its.stderr, its.largest_control, its.controls, its.p_value, its.confirmed
    yield [found.roles[name][1] for name in sorted(found.roles)]


def of_model_scan(found: Any) -> Numbers:
    """A whole scan of a model."""
    yield from of_scores(found.scores)
    if found.verification is not None:
        yield from of_verification(found.verification)
    yield found.leading
    for example in found.examples:
        yield example.patterns
    for its in found.graphs:
        yield its.layer, its.head
        yield from of_sequence_comparison(its.comparison)
        yield from of_sequence_graphs(its.shown)
    for circuit in found.circuits:
        yield from of_qk_attributions(circuit.attributions)
        yield from of_upstream(circuit.upstream)
    if found.intervals is not None:
        yield from of_intervals(found.intervals)


def of_intervals(table: Any) -> Numbers:
    """Bootstrap intervals of scores and excesses."""
    for name in ("score_low", "score_high", "excess_low", "excess_high"):
        yield table[name].to_numpy(dtype=float)


def of_attention_graph(found: Any) -> Numbers:
    """A graph discovered from one head's attention, and the tests behind it."""
    yield from of_mixed(found.graph)
    yield [(*pair, len(found.separating[pair]), *found.separating[pair]) for pair in sorted(found.separating)]
    yield [(*pair, found.evidence[pair].p, *found.evidence[pair].given) for pair in sorted(found.evidence)]
    yield [(its.order, its.tests, its.undefined, its.detectable, its.least_variance) for its in found.by_order]
    yield found.stopped
    yield from of_correlation(found.correlation)


def of_correlation(found: Any) -> Numbers:
    """A correlation matrix."""
    yield found.matrix
    yield found.groups
    yield found.tolerance, found.condition, found.rank


def of_learned(found: Any) -> Numbers:
    """What a learner made of a test."""
    yield from of_mixed(found.marks.to_networkx())
    yield [(*pair, *found.separating[pair]) for pair in sorted(found.separating)]
    yield [(*pair, found.evidence[pair].p, *found.evidence[pair].given) for pair in sorted(found.evidence)]
    yield [(its.order, its.tests, its.undefined, its.detectable, its.least_variance) for its in found.by_order]


def of_explanation(found: Any) -> Numbers:
    """Sets of tokens that change a decision."""
    yield found.target, found.decision, found.tested
    yield found.sets
    yield found.changed_to
    yield found.ranks


def of_dynamics(found: Any) -> Numbers:
    """Series along a training, and when each changed."""
    yield found.steps
    for name in sorted(found.series):
        yield found.series[name]
        change = found.changes[name]
        if change is not None:
            yield change.step, change.low, change.high, change.before, change.after, change.explained


def of_alignment(found: Any) -> Numbers:
    """A model beside algorithms, sequence by sequence and on average."""
    yield found.cosine
    yield found.sensitivity_distance
    yield found.prediction_distance
    yield found.model_loss
    yield found.algorithm_loss
    for line in found:
        yield line.cosine, line.cosine_error, line.excess, line.excess_error
        yield line.sensitivity_distance_error, line.prediction_distance_error


def of_evidence_row(found: Any) -> Numbers:
    """One kind of evidence beside the truth."""
    yield found.layer, found.readings, found.sequences
    for its in (found.skeleton, found.arrowheads):
        yield its.f1, its.f1_stderr, its.precision, its.recall, its.shd, its.exact


def of_reading(found: Any) -> Numbers:
    """A graph that a model was asked to read in its context."""
    for name in sorted(found.losses):
        yield from of_estimate(found.losses[name])
    yield from of_estimate(found.gain)
    yield found.skill
    yield from of_scores(found.scores)
    if found.verification is not None:
        yield from of_verification(found.verification)
