"""Inputs that are odd rather than wrong in type: each was once measured in silence, or ended in a traceback."""

from __future__ import annotations

import warnings
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import jaxtyping
import networkx as nx
import numpy as np
import pandas as pd
import pytest
import torch

from causal_probe import discovery, experiments, graphs, hooks, models, probes, results, sweep, tasks
from causal_probe.errors import CausalProbeError, CausalProbeWarning
from tests import hostile, tiny_huggingface

TOKENS = hostile.tokens()


@pytest.fixture(autouse=True)
def _in_production() -> Iterator[None]:
    """Without the checks of types that the tests add to every function."""
    jaxtyping.config.update("jaxtyping_disable", True)
    yield
    jaxtyping.config.update("jaxtyping_disable", False)


def graphs_of(tokens: Any) -> Any:
    return probes.head_graphs(hostile.model(), tokens)


def nested() -> torch.Tensor:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        return torch.nested.nested_tensor([TOKENS[0, :2], TOKENS[0, :3]])


def with_unknown() -> Any:
    """A model whose tokenizer says what stands for words that it does not know."""
    tokenizer = tiny_huggingface.tokenizer(bos=True)
    tokenizer.unk_token = "t3"
    return hooks.to_hooked(tiny_huggingface.llama(), tokenizer)


def drawn(batch_size: Any, generator: Any = None) -> Any:
    return tasks.InContextMarkov(graphs.chain(4), 3).sample(batch_size, generator or torch.Generator())


def masked(mask: Any) -> Any:
    return graphs_of({"input_ids": TOKENS, "attention_mask": mask})


#: What is given, and a word of the refusal.
ODD: dict[str, tuple[Callable[[], Any], str]] = {
    "a masked array": (lambda: graphs_of(np.ma.masked_equal(TOKENS.numpy(), int(TOKENS[0, 0]))), "behind a mask"),
    "a nested tensor": (lambda: graphs_of(nested()), "no batch of tokens"),
    "a memory": (lambda: graphs_of(memoryview(TOKENS.numpy())), "memoryview is no tokens"),
    "ids beyond 64 bits": (lambda: graphs_of(TOKENS.numpy().astype(np.uint64) + np.uint64(2**63)), "no batch of tokens"),
    "an empty text": (lambda: graphs_of(""), "no tokens"),
    "an empty text among texts": (lambda: graphs_of(["t5 t4", ""]), "no tokens"),
    "a text of unknown letters": (lambda: probes.head_graphs(with_unknown(), "% %"), "knows 0 of the text's"),
    "a mask of another shape": (lambda: masked(torch.ones(4, 3)), r"tokens' shape, \[4, 12\]"),
    "a mask in words": (lambda: masked("all"), "it is A str"),
    "a mask of shares": (lambda: masked(torch.full((4, 12), 0.5)), "ones and zeros"),
    "a mask of NaN": (lambda: masked(torch.full((4, 12), float("nan"))), "ones and zeros"),
    "no best heads": (lambda: hostile.scores().top("induction", -1), "`k` is -1"),
    "best heads in words": (lambda: hostile.scores().top("induction", "x"), "`k` is 'x'"),
    "a merge with itself": (lambda: hostile.scores().merge(hostile.scores()), "one twice"),
    "a merge with nothing": (lambda: hostile.scores().merge(None), "a NoneType"),
    "evidence with itself": (lambda: hostile.evidence().merge(hostile.evidence()), "count twice"),
    "no name to save under": (lambda: hostile.scores().save(None), "`path` is None"),
    "scores of another model": (lambda: probes.verify(hostile.scores(), models.DisentangledTransformer(50, 12)), "of 4 heads a layer"),
    "complex weights": (lambda: graphs.compare(graphs.chain(3), graphs.chain(3), weights=np.eye(3) * 1j), "complex"),
    "correlations that differ both ways": (lambda: discovery.FisherZ(np.array([[1, 0.5], [0.2, 1]]), samples=100), "symmetric"),
    "correlations above one": (lambda: discovery.FisherZ(np.array([[1, 1.5], [1.5, 1]]), samples=100), "-1 to 1"),
    "an array [n, n] for a graph": (lambda: experiments.recover(np.eye(4, k=1)), "from_numpy_array"),
    "edges for a graph": (lambda: experiments.recover([(0, 1)]), "networkx.DiGraph"),
    "no graph": (lambda: experiments.recover(None), "`graph` is None"),
    "one name for many models": (lambda: experiments.leaderboard("gpt2"), "must be a list"),
    "one folder for many shards": (lambda: experiments.merge_scans("out"), "must be a list"),
    "a page that is a number": (lambda: experiments.scan(hostile.own_model(), n_sequences=2, page=3), "`page` is 3"),
    "an empty folder name": (lambda: experiments.scan(hostile.own_model(), n_sequences=2, out=""), "empty text"),
    "no sweep": (lambda: sweep.sweep(None, out="never"), "`spec` is None"),
    "an empty folder for a model": (lambda: models.save(hostile.own_model(), ""), "empty text"),
    "a tokenizer's name": (lambda: hooks.to_hooked(tiny_huggingface.gpt2(), "gpt2"), "tokenizer is a str"),
    "a batch in words": (lambda: drawn("a"), "batch_size is 'a'"),
    "a batch beyond all memory": (lambda: drawn(2**40), "at most"),
    "NumPy's generator": (lambda: drawn(2, np.random.default_rng(0)), "torch.Generator"),
    "a model beyond all memory": (lambda: models.LinearTransformer(10**7, 10**7), r"2\^34 weights"),
    "whole numbers for weights": (lambda: models.DisentangledTransformer(3, 5, dtype=torch.int32), "floating"),
    "a layer before the first": (lambda: hooks.attention_hook(-1, "pattern"), "`layer` is -1"),
    "NaN for a head's output": (lambda: hooks.mean_ablate("L0H0", reference=torch.full((4,), float("nan"))), "NaN"),
    "numbers without their arrays": (lambda: results.load("scan.json"), "safetensors"),
    "a clip that turns gradients round": (lambda: _clipped(-1.0), "`clip` is -1.0"),
    "nothing to compare with": (lambda: _aligned([]), "no algorithm"),
    "several gammas for one step": (lambda: tasks.predict_descent(*_examples(), eta=[0.1], gamma=[0.1, 0.2]), "one gamma for each"),
    "another type in a mapping": (lambda: _drawn_losses({"uniform": "high"}), r"`references\['uniform'\]` is 'high'"),
}  # fmt: skip


@pytest.mark.parametrize(
    ("name", "content", "word"),
    [
        ("graph.json", '{"nodes": [{"id": 0}, {"id": 1}], "edges": [], "edges": [{"source": 0, "target": 1}]}', "'edges' stands twice"),
        ("spec.yaml", "probes: gradient\ngrid: {seed: [0]}\ngrid: {seed: [1]}\n", "'grid' stands twice"),
    ],
)  # fmt: skip
def test_a_key_that_stands_twice_is_refused(name: str, content: str, word: str, tmp_path: Path) -> None:
    (tmp_path / name).write_text(content)
    with pytest.raises(CausalProbeError, match=word):
        graphs.read_graph(tmp_path / name) if name.endswith("json") else sweep.sweep(
            tmp_path / name, out=tmp_path / "out"
        )


def test_a_folder_has_no_revisions(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    models.save(models.DisentangledTransformer(3, 5), tmp_path / "mine")
    monkeypatch.chdir(tmp_path)
    with pytest.raises(CausalProbeError, match="'main' was asked for; mine is on this machine"):
        models.load_model("mine@main")


def _clipped(clip: float) -> Any:
    from causal_probe.training import minimise

    return minimise(hostile.own_model(), lambda step: torch.zeros(()), [], clip=clip)


def _aligned(algorithms: Any) -> Any:
    from causal_probe.mechanisms import descent_alignment

    return descent_alignment(
        models.gradient_steps(2, 3, eta=[0.1]), tasks.LinearRegression(2, 3), algorithms=algorithms, n_sequences=4
    )


def _examples() -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    return torch.ones(2, 3, 2), torch.ones(2, 3, 1), torch.ones(2, 2)


def _drawn_losses(references: Any) -> Any:
    from causal_probe import viz

    return viz.training({"step": [0], "loss": [1.0]}, references)


@pytest.mark.parametrize("what", ODD)
def test_odd_inputs_are_refused_in_one_line(what: str) -> None:
    make, word = ODD[what]
    with pytest.raises(CausalProbeError, match=word) as caught:
        make()
    assert "\n" not in str(caught.value)
    assert len(str(caught.value)) < 600


SAME: dict[str, Callable[[], Any]] = {
    "a DataFrame": lambda: pd.DataFrame(TOKENS.numpy()),
    "bytes in another order": lambda: TOKENS.numpy().astype(">i8"),
    "rows backwards in memory": lambda: TOKENS.flip(0).numpy()[::-1],
    "a mask of ones": lambda: {"input_ids": TOKENS, "attention_mask": torch.ones(4, 12)},
}


@pytest.mark.parametrize("what", SAME)
def test_other_forms_of_the_same_tokens_give_the_same(what: str) -> None:
    assert graphs_of(SAME[what]()).to_dict() == graphs_of(TOKENS).to_dict()


def test_a_table_of_columns_is_read_as_its_numbers() -> None:
    columns = np.random.default_rng(0).integers(3, size=(60, 3))
    found = discovery.graph_from_sequences(pd.DataFrame(columns))
    assert found.to_dict() == discovery.graph_from_sequences(columns).to_dict()


def test_a_text_that_is_unknown_in_part_is_warned_of() -> None:
    with pytest.warns(CausalProbeWarning, match="knows 2 of the text's 3"):
        probes.head_graphs(with_unknown(), "t5 t4 %")


def test_what_is_missing_is_said_with_the_function_s_name() -> None:
    with pytest.raises(TypeError, match=r"upstream\(\) missing"):
        probes.upstream(hostile.model(), TOKENS, "L1H0")  # type: ignore[call-arg]


def test_a_graph_with_the_nodes_of_another_view_is_taken() -> None:
    view = nx.freeze(graphs.chain(6)).subgraph([0, 1, 2])
    assert tasks.InContextMarkov(view, 3).sample(2, torch.Generator()).tokens.shape == (2, 4)
