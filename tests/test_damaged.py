"""Damaged copies of every kind of file that is read back: refused in one line, or what is read equals the original."""

from __future__ import annotations

import random
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import networkx as nx
import numpy as np
import pytest
import torch

from causal_probe import experiments, graphs, probes, reports
from causal_probe.errors import CausalProbeError
from causal_probe.models import DisentangledTransformer, load, save
from causal_probe.papers.base import Run
from causal_probe.probes.evidence import Evidence
from causal_probe.probes.head_scores import HeadScores
from causal_probe.results import check_results_folder, results_folder, write_json
from causal_probe.results import load as load_result
from causal_probe.sweep.plan import Cell
from causal_probe.sweep.store import Store, encode
from causal_probe.training.checkpoint import Checkpoint, Progress

COPIES = 50
CELL = Cell("gradient", 0, {"graph": "chain"}, 1, {})


def model(fill: float = 0.0) -> DisentangledTransformer:
    made = DisentangledTransformer(d_vocab=6, n_positions=8)
    torch.nn.init.constant_(made.W_U, fill)
    return made


def scores() -> HeadScores:
    return probes.scan(model(1.0), torch.arange(16).view(2, 8) % 6, templates=["previous-token", "induction"])


def put_scan(folder: Path) -> Path:
    for i in range(2):
        experiments.scan(
            _worded(), corpus=_text(folder), length=4, shard=f"{i}/2", templates=["previous-token"], out=folder / f"{i}",
        )  # fmt: skip
    return folder / "1" / "scores.safetensors"


def _worded() -> Any:
    from causal_probe.hooks import to_hooked
    from tests import tiny_huggingface

    return to_hooked(tiny_huggingface.gpt2(), tiny_huggingface.tokenizer())


def _text(folder: Path) -> Path:
    path = folder / "corpus.txt"
    path.write_text("\n".join("t3 t4 t5 t6 t7 t8" for _ in range(6)))
    return path


def put_checkpoint(folder: Path) -> Path:
    its = Checkpoint(folder / "training.checkpoint.safetensors", {"seed": 0}, notes={"seen": 1})
    its.save(model(2.0), torch.Generator().manual_seed(3), Progress(0, 2, [1.0, 0.5], {0: {"exp_avg": torch.ones(2)}}))
    return its.path


def get_checkpoint(folder: Path) -> Any:
    its, blank, generator = (
        Checkpoint(folder / "training.checkpoint.safetensors", {"seed": 0}),
        model(),
        torch.Generator(),
    )
    progress = its.load(blank, generator)
    assert progress is not None
    moments = {key: value.tolist() for of in progress.optimizer.values() for key, value in of.items()}
    return (
        its.notes,
        progress.stage,
        progress.step,
        progress.losses,
        moments,
        blank.W_U.tolist(),
        generator.get_state().tolist(),
    )


def get_model(folder: Path) -> Any:
    return {name: value.tolist() for name, value in load(folder / "model").state_dict().items()}


def put_model(name: str) -> Callable[[Path], Path]:
    def put(folder: Path) -> Path:
        save(model(3.0), folder / "model")
        return folder / "model" / name

    return put


def put_cell(folder: Path) -> Path:
    rows = [
        {"layer": 0, "head": head, "score": 0.1 * head, "found": head > 2, "template": f"template {head}"}
        for head in range(5)
    ]
    store = Store(folder)
    store.cells.mkdir()
    store.put(CELL.key, encode(CELL, rows, {"f1": 0.5}, {"threads": 1}))
    return store.cells / f"{CELL.key}.parquet"


def put_sweep(which: str) -> Callable[[Path], Path]:
    def put(folder: Path) -> Path:
        with Store(folder / "out").writing([CELL], {"probes": "gradient"}):
            Store(folder / "out").put_failure(CELL, "no such graph", None)
        return folder / "out" / which.format(CELL.key)

    return put


def open_sweep(folder: Path) -> Any:
    with Store(folder / "out").writing([CELL], {"probes": "gradient"}):
        return (folder / "out" / "sweep.json").read_bytes()  # written anew, from what is asked for


def put_reproduction(which: str) -> Callable[[Path], Path]:
    def put(folder: Path) -> Path:
        Run(folder=folder / "out", settings={"name": "mine"}).part(
            "one", lambda: {"loss": 0.25, "curve": np.arange(4.0)}
        )
        return folder / "out" / which

    return put


def get_part(folder: Path) -> Any:
    found = Run(folder=folder / "out", settings={"name": "mine"}).part("one", lambda: {"loss": -1.0})
    return found["loss"], found["curve"].tolist()


def put_folder(folder: Path) -> Path:
    with results_folder(folder / "out", settings={"seed": 0}) as staging:
        write_json(staging / "result.json", {"loss": 0.5, "curve": [1, 2, 3]})
    return folder / "out" / "result.json"


def put_result(folder: Path) -> Path:
    Evidence.from_arrays([np.tril(np.arange(32.0).reshape(2, 4, 4)) / 1000]).save(folder / "e.safetensors")
    return folder / "e.safetensors"


def put_study(folder: Path) -> Path:
    experiments.scan(model(1.0), n_sequences=2, templates=["previous-token"], out=folder / "out")
    return folder / "out" / "scan.safetensors"


def put_scores(folder: Path) -> Path:
    scores().save(folder / "s.safetensors")
    return folder / "s.safetensors"


def put_graph(folder: Path) -> Path:
    graphs.write_graph(graphs.chain(9), folder / "graph.json")
    return folder / "graph.json"


def get_graph(folder: Path) -> Any:
    return nx.node_link_data(graphs.read_graph(folder / "graph.json"), edges="edges")


@dataclass(frozen=True)
class Kind:
    """A kind of file: what writes one into a folder and says where, and what reads it there."""

    put: Callable[[Path], Path]
    get: Callable[[Path], Any]


KINDS = {
    "a result": Kind(put_result, lambda folder: load_result(folder / "e.safetensors").to_dict()),
    "head scores": Kind(put_scores, lambda folder: HeadScores.load(folder / "s.safetensors").to_dict()),
    "a study's result": Kind(put_study, lambda folder: reports.load(folder / "out").to_dict()),
    "a merged shard": Kind(put_scan, lambda folder: experiments.merge_scans([folder / "0", folder / "1"]).scores.to_dict()),
    "a results folder's JSON": Kind(put_folder, lambda folder: check_results_folder(folder / "out", settings={"seed": 0})),
    "a training's checkpoint": Kind(put_checkpoint, get_checkpoint),
    "a model's shape": Kind(put_model("model.json"), get_model),
    "a model's weights": Kind(put_model("model.safetensors"), get_model),
    "a sweep's cell": Kind(put_cell, lambda folder: (Store(folder).read([CELL.key]).to_pylist(), Store(folder).about(CELL.key))),
    "a sweep's failure": Kind(put_sweep("failed/{}.json"), lambda folder: Store(folder / "out").failure(CELL.key)),
    "a sweep's JSON": Kind(put_sweep("sweep.json"), open_sweep),
    "a reproduction's part": Kind(put_reproduction("parts/one.json"), get_part),
    "a part's arrays": Kind(put_reproduction("parts/one.safetensors"), get_part),
    "a reproduction's settings": Kind(put_reproduction("parts/run.json"), get_part),
    "a graph": Kind(put_graph, get_graph),
}  # fmt: skip


def damaged(content: bytes, draw: random.Random) -> bytes:
    """A bit flipped, an end cut off, or bytes zeroed."""
    at = draw.randrange(len(content))
    what = draw.choice(["bit", "bit", "cut", "zero"])
    if what == "bit":
        return content[:at] + bytes([content[at] ^ (1 << draw.randrange(8))]) + content[at + 1 :]
    if what == "cut":
        return content[:at]
    n = draw.choice([1, 4, 64, 4096])
    return content[:at] + bytes(len(content[at : at + n])) + content[at + n :]


@pytest.mark.parametrize("kind", KINDS)
def test_damaged_copies(kind: str, tmp_path: Path) -> None:
    its = KINDS[kind]
    path = its.put(tmp_path)
    whole, expected = path.read_bytes(), its.get(tmp_path)
    refused = 0
    for number in range(COPIES):
        bad = damaged(whole, random.Random(f"{kind} {number}"))
        path.write_bytes(bad)
        try:
            said = None if its.get(tmp_path) == expected else "loaded as something else"
        except CausalProbeError as error:
            said = str(error)
            refused += 1
        assert said is None or ("\n" not in said and said != "loaded as something else"), (number, said, bad[:200])
        path.write_bytes(whole)
    assert its.get(tmp_path) == expected
    assert refused > COPIES // 2
