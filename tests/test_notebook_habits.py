"""What a notebook shows of a result, what tab completion offers, and what ``help()`` teaches."""

from __future__ import annotations

import dataclasses
import importlib
import inspect
import subprocess
import sys
from collections.abc import Callable, Iterator, Mapping
from html.parser import HTMLParser
from pathlib import Path
from typing import Any

import pytest
import torch
from matplotlib.figure import Figure

import causal_probe
from causal_probe import (
    circuits,
    discovery,
    experiments,
    first_gradient,
    graphs,
    mechanisms,
    models,
    probes,
    tasks,
    training,
)
from causal_probe.discovery.sequences.lags import lags_from_stream
from causal_probe.errors import CausalProbeError
from causal_probe.experiments import check_model
from causal_probe.experiments.compared_evidence import EvidenceTable
from causal_probe.experiments.explanations import ExplanationStudy
from causal_probe.mechanisms.dynamics import dynamics
from causal_probe.probes.explain import summarise
from causal_probe.probes.permutation_sensitivity import permutation_sensitivity
from causal_probe.probes.posterior_alignment import posterior_alignment
from causal_probe.probes.score_pca import score_pca
from causal_probe.reports import plot
from causal_probe.results import Result
from causal_probe.syntax import dependency_heads, tree_projection
from tests.circuits import test_prune_nodes
from tests.syntax import test_dependency_heads, test_tree_projection
from tests.viz import every_report
from tests.viz.hostile import HOSTILE

PLACES = tuple(
    room for room in causal_probe.__all__ if room not in ("CausalProbeError", "errors", "load", "report", "save")
)


def exported() -> Iterator[tuple[str, Any]]:
    """(name, object) of everything that a subpackage names as its own."""
    for place in PLACES:
        module = importlib.import_module(f"causal_probe.{place}")
        yield from ((f"{place}.{name}", getattr(module, name)) for name in module.__all__)


# ------------------------------------------------------------------------------------------------------------ tab completion


@pytest.mark.parametrize("place", ["", *PLACES])
def test_tab_completion_offers_few_names_and_only_public_ones(place: str) -> None:
    module = importlib.import_module(f"causal_probe.{place}".rstrip("."))
    offered = set(dir(module)) - {"__version__"}
    assert offered <= set(module.__all__)
    assert len(offered) <= 30
    assert place not in ("probes", "hooks") or offered == set(module.__all__)
    assert not [name for name in module.__all__ if name.startswith("_") or not hasattr(module, name)]


# ------------------------------------------------------------------------------------------------------------------- results

#: What can be cited is a result; these are shown by other results, or are the citation itself.
NOT_SHOWN: set[str] = set()


def results() -> dict[str, type]:
    """Every class of results, exported or not: what has a kind, or says how it is cited."""
    found = {
        name.partition(".")[2]: thing
        for name, thing in exported()
        if inspect.isclass(thing) and dataclasses.is_dataclass(thing) and hasattr(thing, "cite") and thing is not Result
    }
    waiting: list[type] = [Result]
    while waiting:
        below = [each for each in waiting.pop().__subclasses__() if each.__module__.startswith("causal_probe.")]
        found |= {each.__name__: each for each in below if "KIND" in vars(each)}
        waiting += below
    return found


def model() -> Any:
    made = models.DisentangledTransformer(d_vocab=6, n_positions=12, heads=(2, 2))
    generator = torch.Generator().manual_seed(0)
    for parameter in made.parameters():
        parameter.data = 0.5 * torch.randn(parameter.shape, generator=generator)
    return made


def _phases(task: Any, batch: Any) -> Any:
    watch = mechanisms.WatchPhases.of_task(task, batch, names=["uniform", "lag 1"])
    for step in range(4):
        watch(step, models.DisentangledTransformer(3, 12))
    return watch.phases()


def probed() -> dict[str, Callable[[], Any]]:
    """By class: one result of each probe and study that writes no report."""
    tiny = model()
    tokens = torch.randint(6, (4, 12), generator=torch.Generator().manual_seed(1))
    task = tasks.InContextMarkov(graphs.chain(11), d_vocab=6, concentration=0.1)
    batches = [task.sample(16, tasks.generator(0, "shown"))]
    heads = probes.head_graphs(tiny, tokens)
    pairs = tasks.InContextMarkov(graphs.from_parents([None, 0, (0, 1), (1, 2), (2, 3)]), d_vocab=3, concentration=0.1)
    linear = models.gradient_steps(2, 3, eta=[0.1], dtype=torch.float64)

    def loss(each: Any, batch: Any) -> Any:
        return training.task_loss(each.predict(batch.tokens), batch.target)

    def explained() -> Any:
        found = probes.discover_from_attention(tiny, tokens[0], layer=1, samples=100)
        return probes.explain(found, probes.outputs_of(tiny, "next"), target=11, replacement=0, head="any", max_size=1)[
            "cleann"
        ]

    def studied() -> Any:
        row = {"cleann": explained(), "attention": explained()}
        return ExplanationStudy(summarise([row, row]), (row, row), ((1,), (2,)), (True, True), 1.0)

    process = tasks.AutoregressiveProcess(2, 6, start="sparse")
    mixture = tasks.GraphMixture.of_lags((1, 2), n_positions=12, d_vocab=3)
    mixed = mixture.sample(32, tasks.generator(0, "shown"))
    return {
        "Recovery": every_report.recovery,
        "GradientRecovery": every_report.gradient,
        "ModelStructure": every_report.structure,
        "ModelScan": every_report.scan,
        "InContextGraph": every_report.in_context,
        "TextDiscovery": every_report.discovery,
        "Reproduction": every_report.reproduction,
        "HeadAblation": lambda: probes.ablate_heads(tiny, tokens.repeat(2, 1), "L1H0"),
        "HeadScores": lambda: every_report.scan().scores,
        "Verification": lambda: every_report.scan().verification,
        "QKAttributions": lambda: every_report.scan().circuits[0].attributions,
        "Upstream": lambda: every_report.scan().circuits[1].upstream,
        "Discovery": lambda: probes.discover_from_attention(tiny, tokens[0], layer=1, samples=100),
        "Explanation": explained,
        "ExplanationSummary": lambda: summarise([{"cleann": explained(), "attention": explained()}] * 2),
        "ExplanationStudy": studied,
        "Evidence": lambda: heads,
        "SequenceGraphs": lambda: probes.head_graphs(tiny, tokens, per="sequence"),
        "SequenceComparison": lambda: probes.head_graphs(tiny, tokens, per="sequence").compare(graphs.chain(12), 0, 0),
        "HeadMatch": lambda: probes.match_heads(heads, graphs.chain(11)),
        "EdgeEffects": lambda: probes.edge_effects(tiny, batches, loss, layer=0, head=0, candidates=[(0, 1), (1, 2)]),
        "HeadWeights": lambda: probes.head_weights(tiny.to_transformer_lens()),
        "Composition": lambda: probes.composition(tiny.to_transformer_lens()),
        "InContextScore": lambda: probes.in_context_score(tiny, tokens, early=2, late=8),
        "CopyLosses": lambda: probes.copy_losses(tiny, tokens[:, :6].repeat(1, 2), period=6),
        "CopySensitivity": lambda: probes.copy_sensitivity(linear.float(), torch.randn(2, 4, 3)),
        "GraphSelectivity": lambda: probes.graph_selectivity(
            models.DisentangledTransformer(3, 12), mixed.tokens, mixed.labels, mixture.graphs, permutations=19
        ),
        "PermutationSensitivity": lambda: permutation_sensitivity(tiny, tokens, n_permutations=1),
        "ScorePCA": lambda: score_pca(tiny, tokens, n_components=1),
        "TreeProjection": lambda: tree_projection(
            test_tree_projection.bert(), test_dependency_heads.sentences(6), tokenizer=test_dependency_heads.tokenizer()
        ),
        "DependencyHeads": lambda: dependency_heads(test_dependency_heads.planted(), test_dependency_heads.sentences(8)),
        "PosteriorAlignment": lambda: posterior_alignment(
            models.DisentangledTransformer(3, 12), mixed.tokens, mixture.graphs, mixture.posterior(mixed.tokens)
        ),
        "Phases": lambda: _phases(mixture, mixed),
        "ImpliedSteps": lambda: probes.implied_step(linear.double()),
        "DescentAlignment": lambda: mechanisms.descent_alignment(
            models.gradient_steps(2, 3, eta=[0.1]), tasks.LinearRegression(d_x=2, n_examples=3), n_sequences=8
        ),
        "SequenceGraph": lambda: discovery.graph_from_sequences(batches[0].tokens),
        "SequenceLags": lambda: lags_from_stream(batches[0].tokens.reshape(-1), max_lag=2),
        "SequencePlan": lambda: experiments.plan_sequences(n_positions=[6], concentration=[0.1], n_sequences=[100], forests=1),
        "GradientGraph": lambda: first_gradient.gradient_graph([task.sample(64, tasks.generator(0, "shown"))]),
        "GradientSlots": lambda: first_gradient.gradient_slots([pairs.sample(64, tasks.generator(n, "s")) for n in range(2)], held_out=64),
        "MesaOptimizer": lambda: mechanisms.mesa_optimizer(models.mesa_step(2, 6, a=0.1), process, n_sequences=16),
        "EvidenceTable": lambda: EvidenceTable(
            experiments.measure_evidence(tiny, task, graph="chain", name="random", inputs=2, n_sequences=64), settings={"graphs": ["chain"]}
        ),
        "JudgedMethods": lambda: experiments.known_circuits(["and-gate", "value-composition"], ["EAP", "circuit", "upstream"], n_prompts=24),
        "LayerFeatures": lambda: mechanisms.layer_features(
            models.LinearTransformer(2, 9, d_hidden=12, d_features=4, dtype=torch.float64).initialise(
                tasks.generator(0, "weights"), scale=0.3
            ),
            tasks.SineRegression(8),
            n_sequences=64,
        ),
        "Circuit": lambda: circuits.find_circuit(
            (known := circuits.known_circuit("duplicate-token")).model,
            known.sample(24, torch.Generator().manual_seed(0)),
            known.metric,
        ),
        "NodeCircuit": lambda: circuits.prune_nodes(
            tiny_language_model := test_prune_nodes.pretrained(), test_prune_nodes.asked(tiny_language_model), contrast="zero", n_random=2
        ),
        "NextScores": lambda: circuits.next_scores(test_prune_nodes.pretrained(), [f"t{i}" for i in range(5, 9)]),
        "TruthCheck": lambda: circuits.check_truth(circuits.known_circuit("and-gate"), n_sequences=8),
        "MesaTraining": lambda: mechanisms.train_mesa(process, steps=3, batch_size=8),
        "WeightGraphs": lambda: mechanisms.weight_graphs(tiny, task, n_sequences=64),
    }  # fmt: skip


class Outline(HTMLParser):
    """The tags of a piece of HTML, and the text in it."""

    def __init__(self, page: str) -> None:
        super().__init__()
        self.tags: list[str] = []
        self.text = ""
        self.feed(page)
        self.close()

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        assert not [name for name, _ in attrs if name.startswith("on")]
        self.tags.append(tag)

    def handle_data(self, data: str) -> None:
        self.text += data


def with_hostile_text(result: Any) -> Any:
    """A copy whose settings, provenance, tokens and words hold hostile text."""
    text = "".join(HOSTILE[:2]) + "\ud800"
    changes: dict[str, Any] = {}
    for field in dataclasses.fields(result):
        value = getattr(result, field.name)
        if field.name in ("provenance", "settings") and isinstance(value, Mapping):
            keep = ("versions", "sink", "source", "algorithm", "tokens")
            changes[field.name] = {
                name: text if isinstance(each, str) and name not in keep else each for name, each in value.items()
            }
        elif (
            field.name in ("texts", "changed_to", "words", "edges")
            and isinstance(value, tuple)
            and all(isinstance(v, str) for v in value)
        ):
            changes[field.name] = tuple(text for _ in value)
        elif field.name in ("decision", "edges", "verdict", "title", "summary") and isinstance(value, str):
            changes[field.name] = text
    made = object.__new__(type(result))  # without the checks of its types and values: no loop may look at them twice
    for field in dataclasses.fields(result):
        object.__setattr__(made, field.name, changes.get(field.name, getattr(result, field.name)))
    return made


@pytest.mark.slow
def test_every_result_is_shown_as_a_table_of_text(tmp_path: Path) -> None:
    made = {name: make() for name, make in probed().items()}
    made |= {"Leaderboard": every_report.leaderboard(), "Sweep": every_report.sweep(tmp_path / "sweep")}
    made["ModelCheck"] = check_model(every_report.language_model())
    made["GraphComparison"] = graphs.compare(graphs.chain(5), graphs.chain(5))
    made["Dynamics"] = dynamics([0, 1, 2, 3, 4], {"".join(HOSTILE[:2]): [0, 0, 1, 1, 1]})
    classes = results()
    assert set(classes) - set(made) == NOT_SHOWN, "give each class of results an example here"
    drawn = set()
    for name, result in made.items():
        if isinstance(result, tuple(kind for kind in plot.registry if kind is not object)):
            drawn.add(name)
            assert isinstance(result.plot(), Figure), name
        elif isinstance(result, Result):
            with pytest.raises(CausalProbeError, match=f"no picture of a {type(result).__name__}.*Upstream"):
                result.plot()
        assert name not in classes or isinstance(result, classes[name]), name
        for each in (result, with_hostile_text(result)):
            page = each._repr_html_()
            page.encode()
            outline = Outline(page)
            assert "table" in outline.tags, name
            assert set(outline.tags) <= {"table", "caption", "thead", "tbody", "tr", "th", "td", "p", "style", "div"}, (
                name
            )
            assert "HACKED" not in page or "&lt;" in page, name
            assert outline.tags.count("tr") < 70, f"{name} is a dump, not a table"
            assert len(page) < 60_000, name
    assert drawn == {kind.__name__ for kind in plot.registry if kind is not object}


# ---------------------------------------------------------------------------------------------------------------------- help

#: Public functions whose example would not be short: why.
WITHOUT_EXAMPLE = {
    "options.takes": "the docstring of its module shows it",
    "hooks.corpus": "needs a tokenizer and a folder of texts",
    "hooks.on_residual_stream": "needs a model that was trained on vectors",
    "experiments.compare_evidence": "trains models, minutes; measure_evidence shows one",
    "experiments.discover_in_text": "needs a model's folder with a tokenizer",
    "experiments.explain_sentiment": "needs a pretrained encoder",
    "experiments.explain_sessions": "trains a recommender",
    "mechanisms.feature_descent": "fits features of a trained MLP",
    "mechanisms.layer_features": "needs a trained MLP in front of a layer",
    "experiments.merge_scans": "needs a corpus that was scanned in shards",
    "papers.reproduce": "takes minutes",
}


def test_every_public_function_has_an_example_that_runs() -> None:
    """In its docstring, where ``help()`` shows it; doctest runs it with the tests."""
    lacking = {name for name, thing in exported() if inspect.isfunction(thing) and ">>>" not in (thing.__doc__ or "")}
    assert lacking - WITHOUT_EXAMPLE.keys() == set(), "give each an example, or name it in WITHOUT_EXAMPLE"
    assert WITHOUT_EXAMPLE.keys() - lacking == set(), "these have examples now"


def test_the_package_itself_is_quiet() -> None:
    """In a process of its own, which imports it for the first time."""
    said = "import causal_probe; from causal_probe import graphs, options; graphs.chain(3); causal_probe.__doc__"
    shown = subprocess.run([sys.executable, "-W", "always", "-c", said], capture_output=True, text=True, check=True)
    assert (shown.stdout, shown.stderr) == ("", "")
