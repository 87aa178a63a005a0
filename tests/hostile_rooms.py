"""A good call of every public function and class of the rooms that make data, models, graphs and pictures, to put hostile values into."""

from __future__ import annotations

import inspect
import tempfile
from collections.abc import Callable, Iterator
from functools import cache
from pathlib import Path
from typing import Any

import numpy as np
import torch

from causal_probe import (
    circuits,
    discovery,
    experiments,
    first_gradient,
    graphs,
    mechanisms,
    models,
    probes,
    reports,
    results,
    tasks,
    training,
    viz,
)
from causal_probe.probes.evidence import Evidence
from causal_probe.training.stages import Stage
from tests.hostile import Call

ROOMS = (
    circuits,
    discovery,
    experiments,
    first_gradient,
    graphs,
    mechanisms,
    models,
    reports,
    results,
    tasks,
    training,
    viz,
)


@cache
def place() -> Path:
    """A folder that goes with the process."""
    place.kept = tempfile.TemporaryDirectory()  # type: ignore[attr-defined]
    return Path(place.kept.name)  # type: ignore[attr-defined]


def markov() -> Any:
    return tasks.InContextMarkov(graphs.chain(5), 3)


def two_layers() -> Any:
    return models.DisentangledTransformer(3, 6)


def generator() -> torch.Generator:
    return torch.Generator().manual_seed(0)


def batch() -> Any:
    return markov().sample(8, generator())


def two_parents() -> Any:
    return tasks.InContextMarkov(graphs.two_parent_tree(9), 3).sample(64, generator())


def regression() -> Any:
    return tasks.LinearRegression(2, 3)


def step() -> Any:
    return models.gradient_steps(2, 3, eta=[0.1])


@cache
def mesa() -> Any:
    return models.mesa_step(2, 6)


def process() -> Any:
    return tasks.AutoregressiveProcess(2, 6)


@cache
def recovered() -> Any:
    return experiments.recover_by_gradient("chain", n_positions=5, n_sequences=64)


def featured() -> Any:
    return models.LinearTransformer(3, 4, d_hidden=4, d_features=2).initialise(generator())


def fisher() -> Any:
    draws = np.random.default_rng(0).normal(size=(100, 4))
    return discovery.FisherZ(np.corrcoef(draws.T), samples=100)


def stage() -> Any:
    return Stage("one", 1, 4, "sgd", 0.1, ("A0",))


@cache
def evidence() -> Evidence:
    return Evidence.from_arrays([np.tril(np.full((2, 4, 4), 0.25))])


def saved(what: str) -> Path:
    path = place() / what
    if what == "model" and not path.exists():
        models.save(two_layers(), path)
    if what == "graph.json" and not path.exists():
        graphs.write_graph(graphs.chain(3), path)
    if what == "evidence.safetensors" and not path.exists():
        evidence().save(path)
    return path


@cache
def graph_result() -> Any:
    return graphs.compare(graphs.chain(4), graphs.chain(4))


@cache
def circuit() -> Any:
    return circuits.random_circuit(0, n_layers=2, n_heads=1, size=2)


GOOD: dict[str, Callable[[], Call]] = {
    "circuits.compiled_circuit": lambda: (circuits.compiled_circuit, {"name": "balance", "program": None, "dtype": torch.float32}),
    "circuits.known_circuit": lambda: (circuits.known_circuit, {"name": "or-gate"}),
    "circuits.published": lambda: (circuits.published, {"name": "ioi"}),
    "circuits.random_circuit": lambda: (
        circuits.random_circuit,
        {"seed": 0, "n_layers": 2, "n_heads": 1, "mlps": True, "d_vocab": 4, "n_positions": 10, "size": 2, "norm": True, "rotate": True},
    ),
    "circuits.check_truth": lambda: (
        circuits.check_truth, {"circuit": circuit(), "contrast": "resample", "n_sequences": 4, "tolerance": 1e-5, "draws": 1, "seed": 0},
    ),
    "discovery.FisherZ": lambda: (
        discovery.FisherZ, {"correlation": np.eye(3), "samples": 100, "level": 0.01, "tolerance": None, "remember": True},
    ),
    "discovery.DSeparation": lambda: (discovery.DSeparation, {"graph": graphs.chain(3), "observed": [0, 1]}),
    "discovery.pc": lambda: (discovery.pc, {"test": fisher(), "stable": True, "max_order": 1, "max_tests": 100}),
    "discovery.icd": lambda: (discovery.icd, {"test": fisher(), "stable": True, "max_order": 1, "max_tests": 100}),
    "discovery.ordered_icd": lambda: (discovery.ordered_icd, {"test": fisher(), "stable": True, "max_order": 1, "max_tests": 100}),
    "discovery.graph_from_sequences": lambda: (
        discovery.graph_from_sequences,
        {"tokens": np.random.default_rng(0).integers(3, size=(40, 4)), "level": 0.05, "order": "columns", "seed": 0, "max_memory": 2**31},
    ),
    "experiments.measure_evidence": lambda: (
        experiments.measure_evidence,
        {"model": two_layers(), "task": markov(), "inputs": 2, "n_sequences": 8, "level": 0.01, "seed": 0},
    ),
    "experiments.open_model": lambda: (
        experiments.open_model, {"source": saved("model"), "revision": None, "dtype": None, "device": "cpu", "device_map": None},
    ),
    "first_gradient.gradient_graph": lambda: (
        first_gradient.gradient_graph, {"batches": batch(), "d_vocab": None, "beta": 1.0, "level": 1e-3},
    ),
    "first_gradient.gradient_graphs": lambda: (
        first_gradient.gradient_graphs,
        {"tasks": [markov()], "generators": [generator()], "n_sequences": 8, "targets": "soft", "beta": 1.0, "level": 1e-3},
    ),
    "first_gradient.gradient_sample_complexity": lambda: (
        first_gradient.gradient_sample_complexity,
        {"n_sequences": [16], "targets": ["soft"], "graphs": 1, "first_seed": 0, "n_positions": 5, "d_vocab": 3, "concentration": 0.1, "root_probability": 0.5},
    ),
    "first_gradient.gradient_slots": lambda: (
        first_gradient.gradient_slots, {"batches": two_parents(), "d_vocab": None, "beta": 1.0, "level": 1e-3, "held_out": 2, "explored": 16},
    ),
    "first_gradient.measure_lemma": lambda: (
        first_gradient.measure_lemma, {"task": markov(), "n_sequences": 8, "draws": 16, "seed": 0, "beta": 0.01},
    ),
    "graphs.arrowheads": lambda: (graphs.arrowheads, {"graph": graphs.chain(3)}),
    "graphs.chain": lambda: (graphs.chain, {"n": 3}),
    "graphs.pairs": lambda: (graphs.pairs, {"n": 4}),
    "graphs.two_parent_tree": lambda: (graphs.two_parent_tree, {"n": 7}),
    "graphs.lag": lambda: (graphs.lag, {"n": 6, "k": 2}),
    "graphs.check_graph": lambda: (graphs.check_graph, {"graph": graphs.chain(3), "nodes": 3, "max_parents": 1}),
    "graphs.choose_graph": lambda: (graphs.choose_graph, {"graph": "forest", "n_positions": 5, "root_probability": 0.5, "seed": 0}),
    "graphs.compare": lambda: (
        graphs.compare,
        {"predicted": graphs.chain(3), "truth": graphs.chain(3), "weights": None, "children": [1], "reversal_cost": 1, "mode": "directed"},
    ),
    "graphs.from_parents": lambda: (graphs.from_parents, {"parents": [None, 0]}),
    "graphs.mixed_graph": lambda: (graphs.mixed_graph, {"nodes": 2, "edges": [(0, "-", ">", 1)]}),
    "graphs.random_dag": lambda: (graphs.random_dag, {"n": 5, "parents": 2, "seed": 0}),
    "graphs.random_forest": lambda: (graphs.random_forest, {"n": 5, "root_probability": 0.5, "seed": 0}),
    "graphs.read_graph": lambda: (graphs.read_graph, {"path": saved("graph.json"), "nodes": 3}),
    "graphs.write_graph": lambda: (graphs.write_graph, {"graph": graphs.chain(3), "path": place() / "g.json"}),
    "mechanisms.Watch": lambda: (mechanisms.Watch, {"task": markov(), "tokens": batch().tokens}),
    "mechanisms.descent_alignment": lambda: (
        mechanisms.descent_alignment, {"model": step(), "task": regression(), "algorithms": None, "n_sequences": 16, "seed": 0},
    ),
    "mechanisms.feature_descent": lambda: (
        mechanisms.feature_descent, {"features": None, "task": regression(), "name": "x", "n_sequences": 16, "seed": 0, "dtype": torch.float32},
    ),
    "mechanisms.layer_features": lambda: (mechanisms.layer_features, {"model": featured(), "task": regression(), "n_sequences": 16, "seed": 0}),
    "mechanisms.mesa_optimizer": lambda: (mechanisms.mesa_optimizer, {"model": mesa(), "process": process(), "n_sequences": 16, "seed": 0}),
    "mechanisms.mesa_recovery": lambda: (mechanisms.mesa_recovery, {"process": process(), "product": None, "n_sequences": 16, "seed": 0}),
    "mechanisms.reference_algorithms": lambda: (mechanisms.reference_algorithms, {"task": regression(), "steps": 1, "shared": False}),
    "mechanisms.train_mesa": lambda: (
        mechanisms.train_mesa,
        {"process": process(), "a": 0.1, "b": 0.1, "steps": 2, "batch_size": 4, "rate": 0.15, "seed": 0, "progress": False},
    ),
    "mechanisms.weight_graphs": lambda: (
        mechanisms.weight_graphs, {"model": two_layers(), "task": markov(), "n_sequences": 64, "seed": 0, "level": 1e-3},
    ),
    "models.DisentangledTransformer": lambda: (
        models.DisentangledTransformer, {"d_vocab": 3, "n_positions": 5, "heads": (1, 1), "dtype": torch.float32, "device": "cpu"},
    ),
    "models.LinearTransformer": lambda: (
        models.LinearTransformer,
        {"d_token": 3, "n_positions": 4, "n_layers": 1, "n_heads": 1, "d_head": 3, "d_out": 1, "shared": False, "softmax": False, "mask": "context",
         "per_pair": False, "residual": True, "d_positions": 0, "d_hidden": 0, "d_features": 0, "dtype": torch.float32, "device": "cpu"},
    ),
    "models.ReducedTransformer": lambda: (
        models.ReducedTransformer, {"d_vocab": 3, "n_positions": 5, "beta": 1.0, "dtype": torch.float32, "device": "cpu"},
    ),
    "models.choose_device": lambda: (models.choose_device, {"device": "cpu"}),
    "models.fit_scales": lambda: (
        models.fit_scales, {"graph": graphs.chain(5), "tokens": batch().tokens, "target": batch().target, "circuit": "copy parents"},
    ),
    "models.gradient_steps": lambda: (
        models.gradient_steps, {"d_x": 2, "n_examples": 3, "eta": [0.1], "gamma": [0.0], "W0": None, "d_out": 1, "dtype": torch.float32},
    ),
    "models.hand_set": lambda: (
        models.hand_set,
        {"graph": graphs.chain(4), "d_vocab": 3, "circuit": "copy parents", "match_scale": 4.0, "output_scale": 1.0, "graph_scale": 4.0,
         "dtype": torch.float32, "device": "cpu"},
    ),
    "models.load": lambda: (models.load, {"folder": saved("model"), "device": "cpu"}),
    "models.load_model": lambda: (
        models.load_model,
        {"source": saved("model"), "revision": None, "dtype": None, "device": "cpu", "device_map": None, "any_kind": False},
    ),
    "models.mesa_step": lambda: (
        models.mesa_step, {"d_x": 2, "n_positions": 6, "a": 1.0, "b": 1.0, "real": False, "dtype": None},
    ),
    "models.save": lambda: (models.save, {"model": two_layers(), "folder": place() / "again"}),
    "models.selective_induction": lambda: (
        models.selective_induction,
        {"lags": [1, 2], "matrix": torch.full((3, 3), 1 / 3), "n_positions": 8, "dtype": torch.float32, "device": "cpu"},
    ),
    "reports.load": lambda: (reports.load, {"path": saved("evidence.safetensors")}),
    "reports.report": lambda: (lambda result: reports.report(result), {"result": recovered()}),
    "results.load": lambda: (results.load, {"path": saved("evidence.safetensors")}),
    "tasks.AutoregressiveProcess": lambda: (
        tasks.AutoregressiveProcess, {"d_x": 2, "length": 5, "start": "normal", "scale": 1.0, "real": False},
    ),
    "tasks.GraphMixture": lambda: (
        tasks.GraphMixture, {"graphs": [graphs.chain(4), graphs.pairs(4)], "d_vocab": 3, "transitions": "fixed", "concentration": 1.0, "seed": 0},
    ),
    "tasks.InContextMarkov": lambda: (tasks.InContextMarkov, {"graph": graphs.chain(4), "d_vocab": 3, "concentration": 0.1}),
    "tasks.LinearRegression": lambda: (
        tasks.LinearRegression,
        {"d_x": 2, "n_examples": 3, "d_out": 1, "input_law": "uniform", "input_scale": 0.5, "w_scale": 1.0, "noise": 0.0, "form": "joint", "W0": None},
    ),
    "tasks.MarkovMixture": lambda: (
        tasks.MarkovMixture, {"n_chains": 2, "n_positions": 4, "d_vocab": 3, "concentration": 1.0, "seed": 0},
    ),
    "tasks.RingWalk": lambda: (tasks.RingWalk, {"graph": graphs.chain(4), "d_vocab": 5}),
    "tasks.SineRegression": lambda: (tasks.SineRegression, {"n_examples": 3, "input_scale": 5.0, "phases": 3.0}),
    "tasks.VariableBinding": lambda: (
        tasks.VariableBinding, {"n_lines": 6, "hops": (1, 2), "n_variables": 6, "n_constants": 10, "copies": 0.5},
    ),
    "tasks.sample_batches": lambda: (
        lambda **given: list(tasks.sample_batches(**given)), {"task": markov(), "n_sequences": 4, "generator": generator(), "batch_size": 2},
    ),
    "tasks.cross_entropy": lambda: (tasks.cross_entropy, {"prediction": torch.full((2, 3), 1 / 3), "target": torch.full((2, 3), 1 / 3)}),
    "tasks.generator": lambda: (tasks.generator, {"seed": 0, "purpose": "x", "device": "cpu"}),
    "tasks.one_step_optimum": lambda: (tasks.one_step_optimum, {"task": regression()}),
    "tasks.predict_descent": lambda: (
        tasks.predict_descent,
        {"x": torch.ones(2, 3, 2), "y": torch.ones(2, 3, 1), "x_query": torch.ones(2, 2), "eta": [0.1], "gamma": None, "W0": None},
    ),
    "tasks.reference_losses": lambda: (tasks.reference_losses, {"task": markov(), "batch": batch()}),
    "training.Stage": lambda: (
        Stage,
        {"name": "one", "steps": 1, "batch_size": 4, "optimizer": "sgd", "learning_rate": 0.1, "moves": ("A0",), "schedule": "constant", "weight_decay": 0.0},
    ),
    "training.adam": lambda: (training.adam, {"steps": 2, "batch_size": 4, "learning_rate": 0.1, "warm": 0.5}),
    "training.evaluate": lambda: (training.evaluate, {"model": two_layers(), "batches": [batch()]}),
    "training.fit": lambda: (
        training.fit,
        {"model": two_layers(), "task": markov(), "stages": [stage()], "generator": generator(), "callback": None, "probe_every": None,
         "probe": None, "checkpoint": None, "progress": False},
    ),
    "training.fit_many": lambda: (
        training.fit_many, {"models": [two_layers()], "tasks": [markov()], "stages": [stage()], "generators": [generator()], "progress": False},
    ),
    "training.give_matcher": lambda: (training.give_matcher, {"model": two_layers(), "beta": 1.0}),
    "training.joint": lambda: (
        training.joint,
        {"n_layers": 2, "steps": 2, "batch_size": 4, "optimizer": "sgd", "learning_rate": 0.1, "schedule": "constant", "weight_decay": 0.0},
    ),
    "training.staged": lambda: (
        training.staged,
        {"n_positions": 5, "graph_steps": 2, "graph_batch_size": 4, "graph_learning_rate": 1.0, "steps": 2, "batch_size": 4, "optimizer": "sgd",
         "learning_rate": 0.1},
    ),
    "training.regression_loss": lambda: (training.regression_loss, {"model": step(), "task": regression(), "generator": generator()}),
    "training.minimise": lambda: (
        training.minimise,
        {"model": two_layers(), "loss": lambda n: torch.zeros((), requires_grad=True), "stages": [stage()], "clip": 1.0, "callback": None,
         "generator": generator(), "checkpoint": None, "progress": False},
    ),
    "viz.Curve": lambda: (viz.Curve, {"x": [0, 1], "y": [0.0, 1.0], "error": None}),
    "viz.attention": lambda: (
        viz.attention,
        {"tokens": ["a", "b"], "patterns": np.tril(np.ones((1, 2, 2))), "head_names": ["L0H0"], "graphs": None, "scores": None, "sort_by": None,
         "max_positions": 64, "max_heads": 2, "decimals": 3},
    ),
    "viz.blocks": lambda: (
        viz.blocks, {"matrices": {"a": np.eye(2)}, "marks": None, "columns": 1, "value_name": "x", "title": "t"},
    ),
    "viz.curves": lambda: (
        viz.curves,
        {"panels": {"a": {"b": viz.Curve([1, 2], [1, 2])}}, "x_name": "x", "y_name": "y", "references": None, "x_scale": "linear", "y_scale": "linear", "title": "t"},
    ),
    "viz.graph": lambda: (
        viz.graph, {"truth": graphs.chain(3), "found": graphs.chain(3), "faint": None, "labels": ["a", "b", "c"], "title": "t"},
    ),
    "viz.heads": lambda: (viz.heads, {"scores": [[0.1, 0.2]], "score_name": "s", "title": "t", "limit": 1.0}),
    "viz.mixed": lambda: (
        viz.mixed, {"graph": graphs.mixed_graph(2, [(0, "-", ">", 1)]), "labels": ["a", "b"], "highlight": [0], "target": 1, "title": "t"},
    ),
    "viz.table_map": lambda: (
        viz.table_map, {"table": _table(), "value_name": "v", "row_name": "r", "column_name": "c", "title": "t", "limit": 1.0},
    ),
    "viz.training": lambda: (
        viz.training, {"history": {"step": [0, 1], "loss": [1.0, 0.5]}, "references": {"x": 0.2}, "title": "t", "loss_name": "l"},
    ),
    "viz.write_svg": lambda: (viz.write_svg, {"figure": viz.graph(graphs.chain(3)), "path": place() / "g.svg", "description": "d"}),
    "probes.Rule": lambda: (
        probes.Rule,
        {"level": 0.01, "minimum_excess": 0.5, "delta": 0.05, "rank": 0.95, "joint_rank": 0.99, "rank_error": 0.02, "minimum_fall": 0.05},
    ),
    "probes.Template": lambda: (
        probes.Template, {"name": "mine", "targets": lambda tokens: tokens[:, :, None] >= 0, "description": "x", "shown_by": "repeated", "looks_back": True},
    ),
}  # fmt: skip


def _table() -> Any:
    import pandas as pd

    return pd.DataFrame([[0.1, 0.2]], index=["a"], columns=["b", "c"])


#: What is not looked at, since it runs inside compiled steps, and what is tried elsewhere: studies, whose options are checked; what runs a command's work; what is under another name here.
ELSEWHERE = {
    "circuits.known_circuits", "circuits.find_circuit", "circuits.next_scores", "circuits.prompt_circuit", "circuits.prune_nodes", "circuits.read_prompts",
    "circuits.task_prompts", "experiments.check_model", "experiments.compare_evidence", "experiments.discover_in_text", "experiments.explain_sentiment",
    "experiments.explain_sessions", "experiments.in_context_graph", "experiments.known_circuits", "experiments.leaderboard", "experiments.merge_scans",
    "experiments.recover", "experiments.recover_by_gradient", "experiments.recover_from_tokens", "experiments.scan", "reports.save", "reports.write_page",
    "results.claim", "discovery.fci", "training.task_loss",
}  # fmt: skip


def public() -> Iterator[str]:
    """The functions and the classes to be made by hand that these rooms offer."""
    for room in ROOMS:
        for each in room.__all__:
            if inspect.isfunction(getattr(room, each)):
                yield f"{room.__name__.rpartition('.')[2]}.{each}"
