"""``causal-probe recover --data`` and ``plan``: what they print and write, and what they refuse."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import pytest

from causal_probe import graphs, models
from causal_probe.cli import main
from causal_probe.discovery.sequences.redrawn import dirichlet, walk
from causal_probe.experiments import graph_from_file, plan_sequences
from causal_probe.reports import load, report

FOREST = [-1, 0, 1, 1, -1, 4, 4, 2, 5, 5]
EDGES = {(parent, child) for child, parent in enumerate(FOREST) if parent >= 0}


def run(*arguments: str) -> int:
    with pytest.raises(SystemExit) as left:
        main(arguments)
    assert isinstance(left.value.code, int)
    return left.value.code


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    made = tmp_path_factory.mktemp("data")
    rng = np.random.default_rng(0)
    tokens = walk(FOREST, 0.999 * dirichlet(np.full((3, 3), 0.1), 600, rng) + 0.001 / 3, rng)
    np.save(made / "a.npy", tokens)
    np.savetxt(made / "a.csv", tokens, fmt="%d", delimiter=",")
    pd.DataFrame(tokens, columns=[f"t{i}" for i in range(10)]).to_parquet(made / "a.parquet")
    return made


@pytest.mark.parametrize("name", ["a.npy", "a.csv", "a.parquet"])
def test_json(folder: Path, name: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert run("recover", "--data", str(folder / name), "--level", "0.01", "--json") == 0
    found = json.loads(capsys.readouterr().out)
    assert {tuple(edge) for edge in found["edges"]} == EDGES
    assert (found["structure"], found["level"], found["undecided"]) == ("in-context", 0.01, [])
    assert set(found) >= {"structure", "edges", "roots", "undecided", "not_identifiable", "level", "nodes"}


def test_a_folder_with_a_page_and_models_beside(
    folder: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """The trained transformer finds the parents itself; one that is set by hand, with one wrong parent, agrees with all others."""
    known = [None if parent < 0 else parent for parent in FOREST]
    known[3] = 0
    models.save(models.hand_set(graphs.from_parents(known[:9]), 3), tmp_path / "model")
    out = tmp_path / "out"
    asked = ("--data", str(folder / "a.npy"), "--train", "--beside", str(tmp_path / "model"), "--out", str(out))
    assert run("recover", *asked) == 0
    printed = capsys.readouterr().out
    assert "edge (level 0.05)" in printed
    assert "found" not in printed
    found: Any = load(out)
    assert set(graphs.read_graph(out / "recovered.json").edges) == EDGES
    trained, own = found.beside
    assert trained.of == len(EDGES) - 1
    assert trained.agrees >= trained.of - 1
    # One parent is wrong, and the last column is the model's query, which attends evenly.
    assert (own.agrees, own.of) == (len(EDGES) - 2, len(EDGES))
    page = (out / "report.html").read_text()
    assert "candidates, not claimed" in page or "Pale and dashed" in page
    assert "1968" in page


def test_nothing_is_claimed_of_coins(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    np.save(tmp_path / "coins.npy", np.random.default_rng(0).integers(3, size=(300, 6)))
    assert run("recover", "--data", str(tmp_path / "coins.npy")) == 0
    assert ": none (level 0.05); edges 0" in capsys.readouterr().out
    assert run("recover", "--data", str(tmp_path / "coins.npy"), "--method", "gradient") == 0
    printed = capsys.readouterr().out
    assert "candidate edges, which nothing tested" in printed
    assert "found" not in printed
    assert run("recover", "--data", str(tmp_path / "coins.npy"), "--train") == 2
    assert "no edge to a column without children was claimed" in capsys.readouterr().err


def test_lags(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    np.save(tmp_path / "stream.npy", np.random.default_rng(0).integers(3, size=4000))
    assert run("recover", "--data", str(tmp_path / "stream.npy"), "--max-lag", "3", "--out", str(tmp_path / "out")) == 0
    assert "no lag is claimed" in capsys.readouterr().out
    assert "none claimed" in (tmp_path / "out" / "report.html").read_text()
    assert run("recover", "--data", str(tmp_path / "stream.npy"), "--max-lag", "3", "--train") == 2
    assert "--max-lag" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("name", "content", "says"),
    [
        ("a.txt", "0,1\n", "'.txt', which isn't read"),
        ("a.json", "[[0, 1]]", "'.json', which isn't read"),
        ("ragged.csv", "0,1,2\n1,2,0,1\n", "Rows of different lengths"),
        ("words.csv", "a,b\nc,d\n", "no table of whole numbers"),
        ("floats.csv", "0.5,1\n1,2\n", "float64"),
        ("holes.csv", "0,1\n1,\n", "NaN"),
        ("one.csv", "0\n1\n", "1 columns"),
        ("single.csv", "0,1,2\n", "1 sequences"),
        ("empty.csv", "", "Can't read empty.csv"),
        ("broken.parquet", "no", "Can't read broken.parquet"),
        ("broken.npy", "no", "Can't read broken.npy"),
    ],
)
def test_bad_files(tmp_path: Path, capsys: pytest.CaptureFixture[str], name: str, content: str, says: str) -> None:
    (tmp_path / name).write_text(content)
    assert run("recover", "--data", str(tmp_path / name), "--out", str(tmp_path / "out")) == 2
    printed = capsys.readouterr()
    assert says in printed.err
    assert printed.out == ""
    assert printed.err.count("\n") == 1
    assert not (tmp_path / "out").exists()


def test_two_columns_are_never_an_edge(tmp_path: Path) -> None:
    np.save(tmp_path / "two.npy", np.repeat(np.random.default_rng(0).integers(3, size=(300, 1)), 2, 1))
    found = graph_from_file(tmp_path / "two.npy")
    assert found.edges == ()
    report(found)


def test_a_plan(capsys: pytest.CaptureFixture[str]) -> None:
    small = ("--n-positions", "8", "--concentration", "0.1", "--n-sequences", "100,600", "--forests", "1")
    assert run("plan", *small, "--prior", "diagonal") == 0
    assert "edges claimed" in capsys.readouterr().out
    few, many = plan_sequences(n_positions=[8], concentration=[0.1], n_sequences=[100, 600], forests=2).lines
    assert (few.wrong_graphs, many.wrong_graphs) == (0, 0)
    assert few.claimed <= many.claimed == many.edges
