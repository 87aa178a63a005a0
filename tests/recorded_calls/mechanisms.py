"""Calls: the graph from first gradients, and what a model's mechanism is."""

from __future__ import annotations

import numpy as np
import torch

from causal_probe import first_gradient, graphs, mechanisms, models, tasks, training
from causal_probe.mechanisms.descent import interpolate
from causal_probe.mechanisms.dynamics import change_point, dynamics
from causal_probe.mechanisms.layer_features import function_cosine
from causal_probe.tasks import generator
from tests.recorded_calls.calls import Numbers, call
from tests.recorded_calls.fields import (
    of_alignment,
    of_comparison,
    of_dynamics,
    of_gradient_graph,
    of_gradient_slots,
    of_weights,
)
from tests.recorded_calls.made import FOREST, TWO_PARENTS, forest_task, two_parent_task


@call
def gradient_graph() -> Numbers:
    task = forest_task()
    yield from of_gradient_graph(first_gradient.gradient_graph(task.sample(1024, generator(0, "sample"))))
    batches = [task.sample(200, generator(seed, "sample"), targets="hard") for seed in range(4)]
    found = first_gradient.gradient_graph(batches, beta=0.5, level=0.01)
    yield from of_gradient_graph(found)
    yield from of_comparison(found.compare(FOREST))


@call
def gradient_graph_of_tokens() -> Numbers:
    batch = forest_task().sample(512, generator(0, "sample"), targets="hard")
    tokens = torch.cat([batch.tokens, batch.target.argmax(-1, keepdim=True)], 1)
    yield from of_gradient_graph(first_gradient.gradient_graph(torch.split(tokens, 200)))
    yield from of_gradient_graph(first_gradient.gradient_graph(tokens, d_vocab=5))


@call
def gradient_graphs() -> Numbers:
    several = [tasks.InContextMarkov(graphs.random_forest(7, seed=seed), 3, 0.1) for seed in range(3)]
    for targets in ("soft", "hard"):
        sources = [generator(seed, "sample") for seed in range(3)]
        for found in first_gradient.gradient_graphs(several, sources, n_sequences=300, targets=targets):
            yield from of_gradient_graph(found)


@call
def gradient_slots() -> Numbers:
    task = two_parent_task()
    batches = [task.sample(1024, generator(seed, "sample")) for seed in range(4)]
    found = first_gradient.gradient_slots(batches, held_out=1024, explored=2048)
    yield from of_gradient_slots(found)
    yield found.swaps(TWO_PARENTS)
    batch = task.sample(2048, generator(9, "sample"), targets="hard")
    tokens = torch.cat([batch.tokens, batch.target.argmax(-1, keepdim=True)], 1)
    yield from of_gradient_slots(first_gradient.gradient_slots(tokens, d_vocab=3, held_out=512))


@call
def measure_lemma() -> Numbers:
    table = first_gradient.measure_lemma(forest_task(), n_sequences=512, draws=512)
    for name in (
        "child", "parent", "edge", "measured", "measured_stderr", "predicted", "predicted_stderr", "z", "ratio", "at_this_length",
        "at_this_length_stderr", "z_at_this_length", "chi2", "shannon", "bound", "over_bound",
    ):  # fmt: skip
        yield table[name].to_numpy(dtype=float)


@call
def gradient_sample_complexity() -> Numbers:
    table = first_gradient.gradient_sample_complexity((64, 512), graphs=6, n_positions=8)
    for name in ("exact", "low", "high", "parents"):
        yield table[name].to_numpy(dtype=float)


# --- mechanisms


@call
def weight_graphs() -> Numbers:
    model = models.hand_set(FOREST, 3, match_scale=5.0, output_scale=2.8, graph_scale=10.0)
    source = torch.Generator().manual_seed(0)
    for parameter in model.parameters():
        parameter.data += 0.05 * torch.randn(parameter.shape, generator=source)
    found = mechanisms.weight_graphs(model, forest_task(), n_sequences=512)
    yield found.loss, found.skill, found.skill_stderr
    for its in found.blocks:
        yield its.layer, its.head, its.norm, its.identity
        yield its.matrix
        yield its.cost, its.stderr, its.share, its.share_stderr, its.scrambled, its.scrambled_stderr
        yield its.alone, its.alone_stderr
        for way in (its.as_it_stands, its.transposed):
            if way is not None:
                yield way.parents
                yield way.right, way.edges, way.children, way.chance, way.p_value
    yield [(its.layer, its.head, turned) for its, turned in found.holders]
    yield len(found.circuits)


@call
def training_dynamics() -> Numbers:
    task = forest_task()
    watch = mechanisms.Watch(task, task.sample(64, generator(0, "watching")).tokens)
    model = models.DisentangledTransformer(3, 8)
    training.give_matcher(model)
    stages = training.staged(n_positions=8, graph_steps=6, graph_batch_size=256, steps=6, batch_size=64)
    training.fit(model, task, stages, generator=generator(0, "training"), probe_every=1, probe=watch)
    yield from of_dynamics(watch.dynamics())


@call
def change_points() -> Numbers:
    draw = np.random.default_rng(0)
    series = {f"series {i}": np.where(np.arange(30) >= 9 + i, 1.0, 0.0) + 0.4 * draw.normal(size=30) for i in range(4)}
    yield from of_dynamics(dynamics(range(0, 60, 2), series))
    change = change_point(range(30), series["series 0"].tolist(), coverage=0.8)
    assert change is not None
    yield change.step, change.low, change.high, change.before, change.after, change.explained


@call
def descent_alignment() -> Numbers:
    task = tasks.LinearRegression(3, 5)
    model = models.LinearTransformer(4, 6, 2).initialise(generator(0, "weights"), scale=0.4)
    yield from of_alignment(mechanisms.descent_alignment(model, task, n_sequences=200))
    algorithms = mechanisms.reference_algorithms(task, 2)
    hand_set = models.gradient_steps(3, 5, eta=(0.4, 0.6))
    found = mechanisms.descent_alignment(hand_set, task, algorithms=algorithms, n_sequences=200)
    yield from of_alignment(found)
    yield [(line.layer, line.cosine) for line in (found.best(0), found.best())]
    yield found.closer(algorithms[0].name, algorithms[1].name)
    between = interpolate(hand_set, (0.2, 0.3))
    yield from of_weights(between)


@call
def layer_features() -> Numbers:
    task = tasks.SineRegression(8)
    model = models.LinearTransformer(2, 9, d_hidden=12, d_features=4, dtype=torch.float64)
    model.initialise(generator(0, "weights"), scale=0.8)
    found = mechanisms.layer_features(model, task, n_sequences=500)
    yield found.root
    yield found.spectrum
    yield found.off
    own = mechanisms.feature_descent(found, task, name="own", n_sequences=500, dtype=torch.float64)
    yield from of_alignment(mechanisms.descent_alignment(model, task, algorithms=[own], n_sequences=200))
    batch = task.sample(50, generator(3, "x"), dtype=torch.float64)
    yield function_cosine(model, own, task, batch, queries=16)


@call
def mesa() -> Numbers:
    for start in ("sparse", "ones"):
        process = tasks.AutoregressiveProcess(2, 8, start=start)
        trained = mechanisms.train_mesa(process, a=0.3, b=0.2, steps=15, batch_size=64, rate=0.3)
        yield trained.step
        yield trained.a
        yield trained.b
        yield from of_weights(trained.model)
        found = mechanisms.mesa_optimizer(trained.model, process, n_sequences=200)
        yield found.a, found.b, found.limit, found.off_kq, found.off_pv
        yield found.off_diagonal
        yield found.step_distance, found.step_distance_error, found.best_step, found.error, found.error_error
        yield found.prediction_error, found.loss, found.satisfies_moment_condition
        yield mechanisms.mesa_recovery(process, n_sequences=200)
