"""Calls: graphs, tasks, models, training, and what is done at a hook point."""

from __future__ import annotations

import tempfile
from functools import partial
from pathlib import Path
from typing import Any

import networkx as nx
import numpy as np
import torch

from causal_probe import graphs, hooks, models, tasks, training
from causal_probe.graphs.randomness import numpy_generator
from causal_probe.hooks.continuous import OnSequences
from causal_probe.hooks.preflight import context_length
from causal_probe.hooks.tokens import content_tokens, special_tokens, text_start
from causal_probe.models.constructions import Circuit
from causal_probe.models.export import real_heads
from causal_probe.models.fast import last_logits
from causal_probe.models.reduced import first_gradient
from causal_probe.tasks import generator
from causal_probe.tasks.dirichlet import dirichlet
from causal_probe.tasks.information import information as exact_information
from causal_probe.tasks.information import joint_law, predicted_information
from causal_probe.tasks.least_squares import expected_loss, fit_descent, ridge
from causal_probe.tasks.least_squares import least_squares as solve
from causal_probe.tasks.predictors import fit_one_parent, in_context_unigram, known_graph, one_parent, uniform
from causal_probe.tasks.root_test import (
    evidence_per_edge,
    evidence_per_root,
    log_bets,
    log_bets_against_rivals,
    surprise,
)
from causal_probe.tasks.stationary import stationary_distribution
from causal_probe.training.algorithm_1 import algorithm_1 as run_algorithm_1
from causal_probe.training.algorithm_1 import algorithm_1_stages
from causal_probe.training.checkpoint import Checkpoint
from causal_probe.training.slots import give_slots, staged_slots
from tests import tiny_huggingface, tiny_models
from tests.recorded_calls.calls import Numbers, call
from tests.recorded_calls.fields import of_comparison, of_graph, of_history, of_moments, of_weights
from tests.recorded_calls.made import FOREST, TWO_PARENTS, forest_task, hugging_face, reader, texts, two_parent_task


@call
def graph_families() -> Numbers:
    yield from of_graph(graphs.chain(6))
    yield from of_graph(graphs.lag(7, k=3))
    yield from of_graph(graphs.pairs(6))
    yield from of_graph(graphs.two_parent_tree(11))
    for seed in range(3):
        yield from of_graph(graphs.random_forest(12, root_probability=0.3, seed=seed))
        yield from of_graph(graphs.random_dag(9, parents=3, seed=seed))
    yield from of_graph(graphs.choose_graph("forest", n_positions=15, root_probability=0.4, seed=2))


@call
def graph_comparisons() -> Numbers:
    truth = graphs.random_dag(9, parents=2, seed=0)
    weights = np.random.default_rng(0).random((9, 9))
    for seed in range(1, 4):
        found = graphs.random_dag(9, parents=2, seed=seed)
        yield from of_comparison(graphs.compare(found, truth, weights=weights))
        for mode in ("skeleton", "arrowheads"):
            yield from of_comparison(graphs.compare(found, truth, mode=mode))
    yield from of_comparison(graphs.compare(graphs.chain(9), truth, children=range(2, 7), reversal_cost=2))


@call
def graph_files() -> Numbers:
    with tempfile.TemporaryDirectory() as folder:
        graph = graphs.random_dag(9, parents=2, seed=4)
        for name, write in (
            ("a.json", graphs.write_graph),
            ("a.graphml", nx.write_graphml),
            ("a.txt", partial(nx.write_edgelist, data=False)),
        ):
            write(graph, Path(folder) / name)
            yield from of_graph(graphs.read_graph(Path(folder) / name, nodes=9))


@call
def markov_samples() -> Numbers:
    for task in (forest_task(), two_parent_task()):
        for targets in ("soft", "hard"):
            batch = task.sample(40, generator(0, "sample"), targets=targets)
            yield batch.tokens
            yield batch.target
            yield [batch.tables[order] for order in sorted(batch.tables)]
    task = forest_task()
    batch = task.sample(40, generator(1, "sample"), dtype=torch.float64)
    for node, edges in ((4, graphs.from_parents([None, 0, 0, None, 2])), (2, FOREST)):
        drawn = task.redraw(batch, node, edges, generator(2, "redraw"))
        yield [each.tokens for each in drawn.batches]
        yield drawn.laws


@call
def randomness() -> Numbers:
    yield torch.rand(8, generator=generator(3, "a purpose"))
    yield numpy_generator(3, "a purpose").random(8)
    for concentration in (0.01, 0.1, 2.0):
        yield dirichlet(concentration, (4, 5), generator=generator(0, "rows"))
        yield dirichlet(concentration, (4, 5), generator=generator(0, "rows"), dtype=torch.float64)


@call
def information() -> Numbers:
    transition = dirichlet(0.1, (20, 3, 3), generator=generator(0, "rows"), dtype=torch.float64)
    exact = exact_information(FOREST, transition)
    predicted = predicted_information(forest_task(), draws=128, generator=generator(0, "draws"))
    for found in (exact, predicted):
        yield found.g
        yield found.chi2
        yield found.shannon
        yield found.bound
        yield [found.stderr[name] for name in sorted(found.stderr)] if found.stderr is not None else None
        yield found.draws, found.edge_chi2
    yield joint_law(FOREST, transition, 6, 1)
    yield stationary_distribution(transition)


@call
def root_test() -> Numbers:
    task = forest_task()
    batch = task.sample(64, generator(0, "sample"))
    # the last position is the query, and no node
    parents = torch.tensor([*(its[0] if its else -1 for its in task.parents), -1]).expand(64, -1)
    transition = batch.tables[1]
    yield surprise(1e-3, 6)
    yield log_bets(batch.tokens, transition, parents)
    yield log_bets_against_rivals(batch.tokens, transition, parents)
    yield log_bets_against_rivals(batch.tokens, transition, parents, parents < 0)
    yield evidence_per_edge(transition)
    yield evidence_per_root(transition)


@call
def predictors() -> Numbers:
    for task in (forest_task(), two_parent_task()):
        batch = task.sample(256, generator(0, "sample"))
        losses = tasks.reference_losses(task, batch)
        yield [losses[name] for name in sorted(losses)]
        for predict in (uniform, in_context_unigram, known_graph):
            prediction = predict(task, batch.tokens)
            yield prediction
            yield tasks.cross_entropy(prediction, batch.target)
    for slot in range(2):
        weights = fit_one_parent(task, batch, slot=slot)
        yield weights
        yield one_parent(task, batch.tokens, slot=slot)
        yield one_parent(task, batch.tokens, slot=slot, weights=weights)


@call
def regression_tasks() -> Numbers:
    for task in (
        tasks.LinearRegression(3, 4, d_out=2, noise=0.1),
        tasks.LinearRegression(3, 4, input_law="normal", form="separate"),
        tasks.SineRegression(5),
    ):
        batch = task.sample(16, generator(0, "sample"))
        yield batch.tokens
        yield batch.target
        yield batch.x
        yield batch.y
        yield batch.x_query


@call
def least_squares() -> Numbers:
    task = tasks.LinearRegression(3, 5)
    batch = task.sample(32, generator(0, "sample"), dtype=torch.float64)
    data = (batch.x, batch.y, batch.x_query)
    yield tasks.predict_descent(*data, eta=(0.5, 0.3), gamma=(0.1, 0.0))
    yield ridge(*data, penalty=0.1)
    yield solve(*data)
    for found in (
        tasks.one_step_optimum(task),
        fit_descent(task, 2, curvature=True, generator=generator(0, "draws"), draws=512),
        fit_descent(task, 3, shared=True, generator=generator(0, "draws"), draws=512),
        expected_loss(task, (0.4, 0.2), generator=generator(0, "draws"), draws=512),
    ):
        yield found.eta
        yield found.gamma
        yield found.loss, found.standard_error


@call
def autoregressive() -> Numbers:
    options: Any
    for options in ({}, {"start": "sparse", "scale": 0.5}, {"start": "ones", "real": True}):
        process = tasks.AutoregressiveProcess(4 if "real" in options else 3, 10, **options)
        batch = process.sample(8, generator(0, "sample"))
        yield batch.tokens
        yield batch.target
        yield batch.x
        yield batch.eigenvalues
    process = tasks.AutoregressiveProcess(3, 10)
    yield process.moments
    yield process.limit
    flow = process.flow(0.2, 0.1, points=40)
    yield flow.time
    yield flow.a
    yield flow.b
    yield flow.product


@call
def disentangled_models() -> Numbers:
    model, tokens = tiny_models.disentangled(), tiny_models.random_tokens(6)
    yield model(tokens)
    yield model(tokens, return_type="loss")
    yield model.predict(tokens)
    _, cache = model.run_with_cache(tokens)
    yield cache["pattern", 1]
    yield cache["attn_scores", 0]
    yield cache["resid_post", 1]
    yield [model.named_blocks()[key] for key in sorted(model.named_blocks())]
    yield last_logits(tokens, list(model.A), model.W_U)
    standard = model.to_transformer_lens()
    yield standard(tokens)
    yield real_heads(standard)
    with tempfile.TemporaryDirectory() as folder:
        models.save(model, Path(folder) / "model")
        yield from of_weights(models.load(Path(folder) / "model"))


@call
def hand_set_models() -> Numbers:
    batch = forest_task().sample(256, generator(0, "sample"))
    circuits: tuple[Circuit, ...] = ("copy parents", "step to children", "read other states")
    for circuit in circuits:
        yield models.fit_scales(FOREST, batch.tokens, batch.target, circuit=circuit)
        model = models.hand_set(FOREST, 3, circuit=circuit, match_scale=5.0, output_scale=2.8, graph_scale=10.0)
        yield model.predict(batch.tokens)
    yield models.hand_set(TWO_PARENTS, 3, match_scale=5.0).predict(
        two_parent_task().sample(32, generator(0, "s")).tokens
    )


@call
def reduced_models() -> Numbers:
    task = forest_task()
    batch = task.sample(64, generator(0, "sample"), dtype=torch.float64)
    yield first_gradient(batch.tokens, batch.target)
    yield first_gradient(batch.tokens, batch.target, beta=0.1, query=4)
    model = models.ReducedTransformer(3, 8, dtype=torch.float64)
    yield model.predict(batch.tokens)
    yield model.loss(batch.tokens, batch.target)
    yield model(batch.tokens)
    yield model.to_disentangled().predict(batch.tokens)
    yield models.ReducedTransformer.from_disentangled(model.to_disentangled()).predict(batch.tokens)


@call
def linear_models() -> Numbers:
    task = tasks.LinearRegression(3, 5)
    batch = task.sample(16, generator(0, "sample"))
    for options in (
        {"n_layers": 2, "n_heads": 2},
        {"softmax": True, "mask": "causal", "d_positions": 6},
        {"d_hidden": 5, "d_features": 4},
        {"per_pair": True},
    ):
        model = models.LinearTransformer(4, 6, **options).initialise(generator(0, "weights"), scale=0.5)
        yield model.predict(batch.tokens)
        yield from of_weights(model)
    yield models.gradient_steps(3, 5, eta=(0.4, 0.6), gamma=(0.1, 0.0)).predict(batch.tokens)
    process = tasks.AutoregressiveProcess(3, 8)
    yield models.mesa_step(3, 7, a=1.5, b=0.5).predict(process.sample(8, generator(0, "sample")).tokens)


# --- training


@call
def fit() -> Numbers:
    task = forest_task()
    for stages in (
        training.staged(n_positions=8, graph_steps=4, graph_batch_size=64, steps=6, batch_size=32),
        training.joint(steps=6, batch_size=32),
        training.joint(
            steps=6, batch_size=32, optimizer="adamw", learning_rate=0.01, schedule="cosine", weight_decay=0.1
        ),
    ):
        model = models.DisentangledTransformer(3, 8)
        training.give_matcher(model)
        yield from of_history(training.fit(model, task, stages, generator=generator(0, "training")))
        yield from of_weights(model)
        yield training.evaluate(model, [task.sample(128, generator(0, "evaluation"))])


@call
def fit_after_an_interruption() -> Numbers:
    """A run that is broken off and goes on from its checkpoint."""
    task, stages = forest_task(), training.joint(steps=8, batch_size=32, optimizer="adamw")

    def stop(step: int, model: Any) -> None:
        if step == 5:
            raise KeyboardInterrupt

    with tempfile.TemporaryDirectory() as folder:
        for callback in (stop, None):
            model = models.DisentangledTransformer(3, 8)
            kept = Checkpoint(Path(folder) / "training.safetensors", {}, every=2)
            source = generator(0, "training")
            try:
                history = training.fit(model, task, stages, generator=source, callback=callback, checkpoint=kept)
            except KeyboardInterrupt:
                yield from of_weights(model)
    yield from of_history(history)
    yield from of_weights(model)


@call
def fit_many() -> Numbers:
    several = [tasks.InContextMarkov(graphs.random_forest(5, seed=seed), 3, 0.3) for seed in range(3)]
    together = [models.DisentangledTransformer(3, 6) for _ in several]
    for model in together:
        training.give_matcher(model)
    stages = training.staged(n_positions=6, graph_steps=3, graph_batch_size=32, steps=4, batch_size=16)
    sources = [generator(seed, "training") for seed in range(3)]
    for history, model in zip(training.fit_many(together, several, stages, generators=sources), together, strict=True):
        yield from of_history(history)
        yield from of_weights(model)


@call
def algorithm_1() -> Numbers:
    model = models.ReducedTransformer(3, 8)
    stages = algorithm_1_stages(8, graph_steps=4, steps=5, batch_size=128)
    yield from of_history(run_algorithm_1(model, forest_task(), stages, generator=generator(0, "training")))
    yield from of_weights(model)


@call
def slots() -> Numbers:
    task = tasks.InContextMarkov(TWO_PARENTS, 3, 0.1)
    model = models.DisentangledTransformer(3, task.n_positions, (2, 1))
    give_slots(model, task, generator=generator(0, "slots"))
    yield from of_weights(model)
    stages = staged_slots(n_positions=10, graph_steps=3, graph_batch_size=64, steps=5, batch_size=32)
    yield from of_history(training.fit(model, task, stages, generator=generator(0, "training")))
    yield from of_weights(model)


@call
def minimise() -> Numbers:
    task = tasks.LinearRegression(3, 5)
    model = models.LinearTransformer(4, 6, 2).initialise(generator(0, "weights"))
    loss = training.regression_loss(model, task, generator(0, "training"))
    yield from of_history(training.minimise(model, loss, training.adam(12, batch_size=64), clip=1.0))
    yield from of_weights(model)


# --- hooks


@call
def recorded_means() -> Numbers:
    for build in tiny_models.MODELS.values():
        model, tokens = build(), tiny_models.random_tokens(10)
        found = hooks.mean_patterns(model, torch.split(tokens, 4), batch_size=3)
        yield [found[layer].mean for layer in sorted(found)]
        yield [found[layer].stderr for layer in sorted(found)]
        more = hooks.mean_patterns(model, tiny_models.random_tokens(4, seed=1))
        yield [found[layer].merge(more[layer]).mean for layer in sorted(found)]
        yield from of_moments(hooks.mean_heads(model, tokens, layer=0, batch_size=4))


@call
def edits() -> Numbers:
    for build in tiny_models.MODELS.values():
        model, tokens = build(), tiny_models.random_tokens(5)
        z = hooks.mean_heads(model, tokens, layer=0).mean[:, 1]
        for edit in (
            hooks.zero_ablate(0, 1),
            hooks.mean_ablate(0, 1, reference=z),
            hooks.resample_ablate(0, 1, donors=z.expand(5, *z.shape) + torch.arange(5)[:, None, None]),
            hooks.replace_row(0, 0, query=4, row=hooks.uniform_row(4)),
            hooks.replace_row(1, 0, query=3, row=hooks.one_hot_row(1)),
        ):
            with hooks.edited(model, edit), torch.no_grad():
                yield model(tokens)


@call
def continuous_inputs() -> Numbers:
    model, source = tiny_models.transformer_lens(), torch.Generator().manual_seed(0)
    read_in = torch.randn(4, model.cfg.d_model, generator=source)
    read_out = torch.randn(model.cfg.d_model, 2, generator=source)
    yield hooks.on_residual_stream(model, read_in=read_in, read_out=read_out)(torch.randn(3, 5, 4, generator=source))
    linear = models.LinearTransformer(3, 5, softmax=True).initialise(source, scale=1.0)
    held = OnSequences(linear, torch.randn(4, 5, 3, generator=source))
    yield [its.mean for its in hooks.mean_patterns(held, held.tokens).values()]


@call
def corpus() -> Numbers:
    model = reader()
    for shard in ((0, 1), (0, 2), (1, 2)):
        made = hooks.corpus(model, texts(), length=9, shard=shard)
        yield list(made.sequences())
        counts = made.counts()
        yield counts.documents, counts.sequences, counts.tokens, counts.left_over
    special = special_tokens(model)
    yield sorted(special.ids), special.bos, special.pad, special.before, special.after
    yield content_tokens(model)
    yield text_start(model, "auto")
    yield context_length(model)


@call
def self_test() -> Numbers:
    for kind in tiny_huggingface.CAUSAL:
        answers = hooks.self_test(hugging_face(kind), tiny_huggingface.tokens())
        yield [(its.error, its.tolerance, its.passed) for its in answers]


@call
def preflight() -> Numbers:
    """What is wrong with models that can't be measured, and with tokens: how much of it."""
    good, tokens = hugging_face("gpt2"), tiny_huggingface.tokens()
    bert = hooks.to_hooked(tiny_huggingface.bert())
    opt = hooks.to_hooked(tiny_huggingface.opt())
    for model, its in (
        (good, tokens),
        (good, tokens + 100),
        (good, tokens.repeat(1, 9)),
        (bert, tokens),
        (opt, tokens),
    ):
        yield len(hooks.find_faults(model, its, hooks=("pattern", "z")))
