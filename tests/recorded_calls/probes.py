"""Calls: every probe."""

from __future__ import annotations

import tempfile
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import torch

from causal_probe import graphs, hooks, models, probes, training
from causal_probe.discovery import DSeparation, FisherZ, fci, icd, ordered_icd, pc
from causal_probe.discovery.fci import data_with_correlation
from causal_probe.hooks.continuous import OnSequences
from causal_probe.probes.attention_correlation import attention_correlation, output_correlation
from causal_probe.probes.bootstrap import bootstrap_intervals
from causal_probe.probes.evidence import Evidence
from causal_probe.probes.explain import summarise
from causal_probe.probes.head_scores import HeadScores
from causal_probe.probes.p_values import holm, t_interval, t_p_value
from causal_probe.probes.sequences import ngram_tokens
from causal_probe.tasks import generator
from tests import tiny_huggingface, tiny_models
from tests.recorded_calls.calls import Numbers, call
from tests.recorded_calls.fields import (
    of_attention_graph,
    of_comparison,
    of_correlation,
    of_edge_effects,
    of_explanation,
    of_graph,
    of_head_graphs,
    of_intervals,
    of_learned,
    of_match,
    of_moments,
    of_qk_attributions,
    of_scores,
    of_sequence_comparison,
    of_sequence_graphs,
    of_upstream,
    of_verification,
)
from tests.recorded_calls.made import (
    FOREST,
    TWO_PARENTS,
    forest_task,
    hugging_face,
    induction_model,
    next_token_loss,
    reader,
    texts,
    two_parent_task,
)


@call
def made_sequences() -> Numbers:
    for model in (induction_model(), reader()):
        yield probes.repeated_tokens(model, n_sequences=5, seed=3).tokens
        yield ngram_tokens(model, n=2, n_sequences=5, seed=3, period=7).tokens


@call
def scan_disentangled() -> Numbers:
    found = probes.scan(induction_model(), n_sequences=12)
    yield from of_scores(found)
    yield found.heatmap("induction")
    yield [(its.layer, its.head, its.score) for its in found.top("previous-token", 2)]
    yield [(its.layer, its.head, its.excess) for its in found.called(minimum=0.2)]
    yield [found.overlap(one, other) for one in found.names for other in found.names]
    yield len(found.coinciding), len(found.undefined)


@call
def scan_given_tokens() -> Numbers:
    own = probes.Template("two-back-or-first", _two_back_or_first)
    templates = [
        probes.offset(2),
        probes.induction(2),
        probes.from_graph(FOREST),
        probes.successor_of_parent(FOREST),
        probes.template("duplicate-token"),
        own,
    ]
    for build in tiny_models.MODELS.values():
        tokens = tiny_models.random_tokens(9)
        yield from of_scores(probes.scan(build(), torch.split(tokens, 4), templates=templates))
        found = probes.scan(build(), tokens, templates=templates, queries=[2, -1], batch_size=2)
        yield from of_scores(found)
        yield from of_intervals(bootstrap_intervals(found, resamples=200))


def _two_back_or_first(tokens: torch.Tensor) -> torch.Tensor:
    n = tokens.shape[1]
    targets = torch.eye(n, dtype=torch.bool).roll(-2, 1).tril()
    targets[:, 0] = True
    return targets.expand(len(tokens), -1, -1)


@call
def scan_transformer_lens() -> Numbers:
    """A HookedTransformer on TransformerLens 3.9, a native bridge on 4.3."""
    yield from of_scores(
        probes.scan(tiny_models.transformer_lens(), templates=["previous-token"], n_sequences=7, period=3)
    )


@call
def scan_hugging_face() -> Numbers:
    for kind in tiny_huggingface.CAUSAL:
        yield from of_scores(probes.scan(hugging_face(kind), n_sequences=6, seed=1))


@call
def scan_by_parts() -> Numbers:
    """Merged, saved and loaded."""
    model = reader()
    parts = [probes.scan(model, hooks.corpus(model, texts(), length=9, shard=(i, 3))) for i in range(3)]
    whole = parts[0].merge(*parts[1:])
    yield from of_scores(whole)
    yield from of_intervals(bootstrap_intervals(whole, resamples=300, seed=4))
    with tempfile.TemporaryDirectory() as folder:
        whole.save(Path(folder) / "scores.safetensors")
        yield from of_scores(HeadScores.load(Path(folder) / "scores.safetensors"))


@call
def scored_patterns() -> Numbers:
    """Without a model."""
    patterns = [torch.rand(3, 2, 8, 8, generator=generator(0, "patterns")).tril() for _ in range(2)]
    yield from of_scores(
        probes.score_patterns([its / its.sum(-1, keepdim=True) for its in patterns], tiny_models.random_tokens(3, n=8))
    )


@call
def verify() -> Numbers:
    model = induction_model()
    scores = probes.scan(model, n_sequences=6)
    yield from of_verification(probes.verify(scores, model, n_sequences=4, random_sets=10))
    yield from of_verification(
        probes.verify(
            scores, model, templates=["induction"], measure=probes.next_token([20, 22]), n_sequences=4, random_sets=5
        )
    )


@call
def verify_hugging_face() -> Numbers:
    def untested(logits: Any, batch: Any) -> Any:
        """A random model does no task."""
        return replace(probes.next_token()(logits, batch), without={})

    model = hugging_face("gpt2")
    scores = probes.scan(model, n_sequences=6)
    rule = probes.Rule(level=0.5, minimum_excess=-1.0, delta=0.001)
    yield from of_verification(
        probes.verify(
            scores, model, templates=["previous-token"], measure=untested, rule=rule, n_sequences=4, random_sets=4
        )
    )


@call
def head_graphs_per_mean() -> Numbers:
    builders: list[Any] = [*tiny_models.MODELS.values(), partial(hugging_face, "llama")]
    for build in builders:
        found = probes.head_graphs(build(), torch.split(tiny_models.random_tokens(8), 3))
        yield from of_head_graphs(found)
        yield from of_head_graphs(found.merge(probes.head_graphs(build(), tiny_models.random_tokens(5, seed=1))))
        yield from of_comparison(found.compare(FOREST, 0, 0, claim=0.0))
        yield from of_graph(found.offset_graph(0, 0, claim=0.2))
        with tempfile.TemporaryDirectory() as folder:
            found.save(Path(folder) / "graphs.safetensors")
            yield [its for _, its in sorted(Evidence.load(Path(folder) / "graphs.safetensors").values.items())]


@call
def head_graphs_without_sink() -> Numbers:
    model, tokens = reader(), tiny_huggingface.tokens(6)
    for sink in ("exclude", "root", "keep"):
        yield from of_head_graphs(probes.head_graphs(model, tokens, sink=sink))
        yield from of_sequence_graphs(probes.head_graphs(model, tokens, per="sequence", sink=sink))


@call
def head_graphs_per_sequence() -> Numbers:
    for build in (*tiny_models.MODELS.values(), induction_model):
        model = build()
        tokens = tiny_models.random_tokens(6)
        found = probes.head_graphs(model, torch.split(tokens, 4), per="sequence")
        yield from of_sequence_graphs(found)
        for truth in (FOREST, probes.template("previous-token")):
            yield from of_sequence_comparison(found.compare(truth, 0, 0, threshold=0.2))
        yield found.parents(1, 0, threshold=0.2)
        yield found.by_offset(0, 1, threshold=0.2)


@call
def score_gradients() -> Numbers:
    for model in (tiny_models.disentangled(scale=0.3), hooks.to_hooked(tiny_huggingface.gpt2().double())):
        tokens = tiny_models.random_tokens(8)
        for loss in (None, next_token_loss):
            found = probes.score_gradients(model, tokens, loss, batch_size=3)
            for layer in sorted(found.values):
                yield found.values[layer]
                yield None if found.stderr is None else found.stderr[layer]
                yield None, [its.parent for its in found.parents(layer, 0)]
                yield found.z_values(layer, 0)


@call
def score_gradients_of_a_native_model() -> Numbers:
    """HookedTransformer on TransformerLens 3.9; on 4.3 a native bridge, whose score hook carries the pattern."""
    model = tiny_models.disentangled(scale=0.3).to_transformer_lens()
    found = probes.score_gradients(model, tiny_models.random_tokens(8))
    yield [found.values[layer] for layer in sorted(found.values)]


@call
def edge_effects() -> Numbers:
    pairs = [(0, 1), (1, 3), (2, 3), (0, 4)]
    for build in tiny_models.MODELS.values():
        tokens = torch.split(tiny_models.random_tokens(40), 15)
        found = probes.edge_effects(build(), tokens, next_token_loss, layer=0, head=1, candidates=pairs)
        yield from of_edge_effects(found)
        yield found.weights(7)
        yield from of_edge_effects(found.merge(found))
    task = forest_task()
    batches = [task.sample(64, generator(seed, "sample")) for seed in range(3)]
    source = generator(0, "redrawing")
    found = probes.edge_effects(
        models.hand_set(FOREST, 3, match_scale=5.0, output_scale=2.8, graph_scale=10.0),
        batches,
        lambda model, batch: training.task_loss(model.predict(batch.tokens), batch.target),
        layer=0,
        head=0,
        candidates=FOREST,
        redraw=lambda batch, child, edges: task.redraw(batch, child, edges, source),
    )
    yield from of_edge_effects(found)
    yield from of_graph(found.graph(7))


@call
def blocks() -> Numbers:
    tokens = probes.repeated_tokens(induction_model(), n_sequences=6).tokens
    yield from of_qk_attributions(probes.qk_attributions(induction_model(), tokens, 1, 0, edges="induction"))
    own = tiny_models.random_tokens(6)
    found = probes.qk_attributions(tiny_models.disentangled(), own, 1, 0, edges=FOREST)
    yield from of_qk_attributions(found)
    for pair in found.pairs:
        yield from of_graph(pair.graph)
        yield from of_comparison(pair.compare(FOREST))
    for kind in ("gpt2", "llama", "neox"):
        tokens = tiny_huggingface.tokens(4, 8).repeat(1, 2)
        yield from of_qk_attributions(
            probes.qk_attributions(hugging_face(kind), tokens, 1, 1, edges="induction", batch_size=3)
        )


@call
def blocks_of_a_native_model() -> Numbers:
    model, tokens = tiny_models.transformer_lens(), tiny_models.random_tokens(6)
    yield from of_qk_attributions(probes.qk_attributions(model, tokens, 1, 1, edges="previous-token"))


@call
def upstream() -> Numbers:
    tokens = probes.repeated_tokens(induction_model(), n_sequences=6).tokens
    yield from of_upstream(probes.upstream(induction_model(), tokens, 1, 0, edges="induction"))
    tokens = tiny_huggingface.tokens(6, 8).repeat(1, 2)
    yield from of_upstream(probes.upstream(hugging_face("gpt2"), tokens, 1, 0, edges="induction"))


@call
def upstream_of_a_native_model() -> Numbers:
    model = induction_model().to_transformer_lens()
    tokens = probes.repeated_tokens(induction_model(), n_sequences=6).tokens
    yield from of_upstream(probes.upstream(model, tokens, 1, 0, edges="induction"))


def _weights_of_heads(model: Any) -> Numbers:
    found = probes.head_weights(model)
    yield found.copying
    yield found.previous_token
    yield found.previous_token_chance
    made = probes.composition(model)
    for kind in sorted(made.score):
        yield made.score[kind]
        yield made.z[kind]
    yield made.baseline


@call
def head_weights() -> Numbers:
    yield from _weights_of_heads(tiny_models.disentangled())
    yield from _weights_of_heads(tiny_models.transformer_lens())


@call
def head_weights_hugging_face() -> Numbers:
    for kind in ("gpt2", "llama"):
        yield from _weights_of_heads(hugging_face(kind))


@call
def in_context_score() -> Numbers:
    for build in tiny_models.MODELS.values():
        found = probes.in_context_score(build(), tiny_models.random_tokens(9), early=2, late=5, batch_size=4)
        yield found.score, found.stderr, found.n_sequences
        for its in (found, found.merge(found)):
            yield from of_moments(its.losses)
            yield from of_moments(its.difference)


@call
def copy_losses() -> Numbers:
    half = tiny_models.random_tokens(9, n=3)
    for build in tiny_models.MODELS.values():
        found = probes.copy_losses(build(), torch.cat([half, half], 1), period=3, batch_size=4)
        yield found.first, found.second, found.gain, found.first_stderr, found.second_stderr, found.gain_stderr
        for its in (found, found.merge(found)):
            yield from of_moments(its.first_by_token)
            yield from of_moments(its.second_by_token)


@call
def copy_sensitivity() -> Numbers:
    model = models.LinearTransformer(3, 6, 2, softmax=(True, False), mask="causal", d_positions=8)
    model.initialise(generator(0, "weights"), scale=0.7)
    inputs = torch.randn(8, 6, 3, generator=generator(0, "inputs"))
    found = probes.copy_sensitivity(model, inputs)
    yield found.sensitivity
    yield found.shares
    yield found.share(-1)
    yield found.share(-1, [1, 3, 5])
    held = OnSequences(model, inputs, layers=1)
    yield from of_scores(probes.scan(held, held.tokens, templates=["previous-token"], queries=[1, 3, 5]))


@call
def implied_step() -> Numbers:
    for model in (
        models.gradient_steps(3, 5, eta=(0.4, 0.6), gamma=(0.1, 0.0), d_out=2),
        models.LinearTransformer(4, 6, 2, 2).initialise(generator(0, "weights"), scale=0.3),
    ):
        for its in probes.implied_step(model).layers:
            yield its.eta, its.gamma
            yield its.preconditioner
            yield its.off_qk, its.off_ov, its.off_ov_read, its.off_form


def _read_by_position() -> Any:
    model = models.DisentangledTransformer(d_vocab=6, n_positions=8, heads=(2, 1))
    source = torch.Generator().manual_seed(0)
    for parameter in model.parameters():
        parameter.data = torch.randn(parameter.shape, generator=source)
    return model


@call
def discover() -> Numbers:
    tokens = torch.tensor([3, 1, 4, 2, 0, 3, 5, 1])
    for options in (
        {"samples": 200},
        {"algorithm": "pc", "samples": 1000, "layer": 0},
        {"algorithm": "ordered-icd", "residual": 0.5, "samples": 500, "layer": 0, "head": 1},
        {"source": "values", "samples": 300, "head": "mean"},
        {"groups": [[0, 1], [2], [3, 4, 5], [6], [7]], "samples": 300},
    ):
        for its in probes.discover_from_attention(_read_by_position(), tokens, **options).graphs:
            yield from of_attention_graph(its)
            for mode in ("skeleton", "arrowheads"):
                yield from of_comparison(its.compare(graphs.chain(len(its.graph)), mode=mode))
    for its in probes.discover_from_attention(
        hugging_face("gpt2"), tiny_huggingface.tokens(1, 8)[0], samples=100
    ).graphs:
        yield from of_attention_graph(its)


@call
def learners() -> Numbers:
    truth = graphs.random_dag(7, parents=2, seed=3)
    for learn in (pc, icd, ordered_icd):
        yield from of_learned(learn(DSeparation(truth)))
        yield from of_learned(learn(DSeparation(truth, observed=[1, 2, 3, 4, 6])))
    pattern = torch.rand(6, 6, generator=generator(0, "pattern"), dtype=torch.float64).tril()
    pattern /= pattern.sum(-1, keepdim=True)
    made = attention_correlation(pattern, residual=0.3)
    yield from of_correlation(made)
    outputs = torch.randn(6, 9, generator=generator(0, "outputs"), dtype=torch.float64)
    yield from of_correlation(output_correlation(outputs))
    yield data_with_correlation(made.matrix, 20)
    for learn in (pc, icd, ordered_icd):
        yield from of_learned(learn(FisherZ(made.matrix, samples=200, level=0.05)))
    yield from of_learned(fci(FisherZ(made.matrix, samples=200, level=0.05)))


@call
def p_values() -> Numbers:
    yield [t_p_value(0.3, 0.1, n, above=0.05) for n in (2, 5, 100)]
    yield [t_interval(0.3, 0.1, n) for n in (2, 5, 100)]
    yield holm(np.array([0.01, 0.04, 0.03, 0.2]))


@call
def explain() -> Numbers:
    model = _read_by_position()
    tokens = torch.tensor([3, 1, 4, 2, 0, 3, 5, 1])
    found = probes.discover_from_attention(model, tokens, samples=200, layer=0, head=0)
    each = []
    for replacement in (0, 5):
        explained = probes.explain(
            found,
            probes.outputs_of(model, "next"),
            target=7,
            replacement=replacement,
            methods=("cleann", "attention", "gradient", "leave-one-out"),
            pattern=hooks.mean_patterns(model, tokens[None])[0].mean[0],
            model=model,
            max_size=3,
        )
        each.append(explained)
        for name in sorted(explained):
            yield from of_explanation(explained[name])
    yield summarise(each).to_pandas().to_numpy(dtype=float)


@call
def match_heads() -> Numbers:
    for heads in ((2, 1), (3, 1)):
        model = models.DisentangledTransformer(3, 10, heads)
        source = torch.Generator().manual_seed(0)
        for parameter in model.parameters():
            parameter.data = torch.randn(parameter.shape, generator=source)
        attention = probes.head_graphs(model, two_parent_task().sample(64, generator(0, "sample")).tokens)
        yield from of_match(probes.match_heads(attention, TWO_PARENTS))
        yield from of_match(probes.match_heads(attention, TWO_PARENTS, children=range(3, 8)))
