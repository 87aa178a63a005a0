"""``causal-probe recover --method gradient`` and ``--data``: the same files as training writes, and one clear line for bad input."""

from __future__ import annotations

import html
import json
import os
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from safetensors.numpy import load_file

from causal_probe import graphs, models
from causal_probe.cli import main
from causal_probe.errors import CausalProbeError, CausalProbeWarning
from causal_probe.experiments import recover_by_gradient, recover_from_tokens
from causal_probe.experiments.gradient_recovery import GradientRecovery
from causal_probe.experiments.recover_by_gradient import attention
from causal_probe.first_gradient import gradient_graph
from causal_probe.reports import report
from causal_probe.tasks import InContextMarkov, generator

FILES = {
    "attention.safetensors",
    "graph.json",
    "model",
    "recovered.json",
    "report.html",
    "result.json",
    "result.safetensors",
}


def run(*arguments: str) -> int:
    with pytest.raises(SystemExit) as left:
        main(["recover", *arguments])
    assert isinstance(left.value.code, int)
    return left.value.code


@pytest.fixture(scope="module")
def tokens() -> np.ndarray[Any, np.dtype[np.int64]]:
    task = InContextMarkov(graphs.chain(7), 3, 0.1)
    batch = task.sample(8192, generator(0, "own"), targets="hard")
    return torch.cat([batch.tokens, batch.target.argmax(-1, keepdim=True)], 1).numpy()


def test_a_tree_is_read_and_written_as_training_writes_it(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    out = tmp_path / "out"
    assert run("--method", "gradient", "--n-positions", "8", "--out", str(out)) == 0
    assert "Recovery of forest by gradient: exact" in capsys.readouterr().out
    assert {path.name for path in out.iterdir()} == FILES
    result = json.loads((out / "result.json").read_text())
    assert result["exact"]
    assert sorted(result["files"]) == result["files"]
    truth, found = (graphs.read_graph(out / name) for name in ("graph.json", "recovered.json"))
    assert truth.edges == found.edges
    arrays = load_file(out / "attention.safetensors")
    model = models.load(out / "model")
    np.testing.assert_allclose(arrays["layer0.mean"], attention(model), atol=1e-12)
    for parent, child in truth.edges:
        assert arrays["layer0.mean"][0, child, parent] > 0.99


def test_the_page_says_when_the_evidence_is_not_drawn(monkeypatch: pytest.MonkeyPatch) -> None:
    found = recover_by_gradient("chain", n_positions=9, n_sequences=2**10)
    drawn, undrawn = "in the units of chi-square information", "Heat maps of the evidence are left out"
    page = report(found).to_html()
    assert drawn in page
    assert undrawn not in page
    monkeypatch.setattr("causal_probe.reports.by_gradient.DRAWN", 7)
    page = report(found).to_html()
    assert drawn not in page
    assert f"{undrawn}, as there are more than 7 positions (8)" in page


def test_several_parents_have_a_head_each() -> None:
    found = recover_by_gradient("two-parent", n_positions=8, n_sequences=2**15)
    assert found.exact
    assert found.model.heads == (2, 1)
    assert found.loss is not None
    assert found.reference_losses is not None
    assert found.loss < found.reference_losses["uniform"]
    pattern = attention(found.model)
    for child in range(2, 7):
        assert sorted(int(pattern[head, child].argmax()) for head in range(2)) == sorted(
            found.truth.predecessors(child)
        )  # type: ignore[union-attr]


def test_an_option_that_is_given_counts_whatever_its_value(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """64 is the default of --n-sequences when a model is read, and 3 that of --d-vocab when one is trained."""
    assert run("--method", "gradient", "--graph", "chain", "--n-positions", "6", "--n-sequences", "64", "--json") == 0
    assert json.loads(capsys.readouterr().out)["settings"]["n_sequences"] == 64
    assert run("--method", "gradient", "--steps", "500") == 2
    assert "--steps" in capsys.readouterr().err
    np.save(tmp_path / "five.npy", np.arange(40).reshape(8, 5) % 5)
    assert run("--method", "gradient", "--data", str(tmp_path / "five.npy"), "--d-vocab", "3") == 2
    assert "outside the vocabulary" in capsys.readouterr().err


def test_the_predicted_node_s_parents_count() -> None:
    """It is the only child, so that no context shows its transitions: its 2 edges can't be found, and are missing."""
    truth = graphs.from_parents([None] * 5 + [(0, 1)])
    found = recover_by_gradient(truth, n_sequences=10_240)
    assert found.recovered.number_of_edges() == 0
    assert found.comparison is not None
    assert found.comparison.children == tuple(range(6))
    assert found.comparison.missing == ((0, 5), (1, 5))
    assert found.exact is False
    assert ("edges right", "0 of 2") in found.table().rows
    assert "SHD 2" in repr(found)
    result = found.to_dict()
    assert result["exact"] is False
    assert result["comparison"]["shd"] == 2


def test_a_search_that_was_cut_off_is_said_everywhere(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("causal_probe.first_gradient.queries.MAX_JOINT", 8**2)
    found = recover_by_gradient("two-parent", n_positions=8, n_sequences=2**15)
    said = "not decided: the search for the predicted node's parents was cut off, there may be more"
    assert ("roots", said) in found.table().rows
    assert "(cut off, there may be more)" in repr(found)
    result = found.to_dict()
    assert result["found"]["cut_off"] is True
    assert result["found"]["decided"] is False
    page = report(found).to_html()
    assert said in html.unescape(page)
    assert "The search was cut off at 1" in page


def test_own_tokens(tmp_path: Path, capsys: pytest.CaptureFixture[str], tokens: Any) -> None:
    np.save(tmp_path / "tokens.npy", tokens.astype(np.uint8))
    out = tmp_path / "out"
    assert run("--method", "gradient", "--data", str(tmp_path / "tokens.npy"), "--out", str(out)) == 0
    assert "not decided" in capsys.readouterr().out
    assert {path.name for path in out.iterdir()} == FILES - {"graph.json"}  # there is no known truth to write
    assert set(graphs.read_graph(out / "recovered.json").edges) == set(graphs.chain(7).edges)
    result = json.loads((out / "result.json").read_text())
    assert result["exact"] is None
    assert "not known" in result["undefined"]["truth"]
    assert result["found"]["status"] == "undecided"
    # The same command once more replaces its own result; another needs to be told.
    assert run("--method", "gradient", "--data", str(tmp_path / "tokens.npy"), "--out", str(out)) == 0
    assert run("--method", "gradient", "--data", str(tmp_path / "tokens.npy"), "--d-vocab", "5", "--out", str(out)) == 2


@pytest.mark.parametrize(
    ("content", "says"),
    [
        (lambda tokens: tokens / 2, "numbers of the type float64"),
        (lambda tokens: tokens - 1, "the token -1"),
        (lambda tokens: tokens[0], "the shape"),
        (lambda tokens: tokens[:0], "the shape"),
        (lambda tokens: tokens[:, :3], "the shape"),
        (lambda tokens: tokens == 1, "type bool"),
        (lambda tokens: np.array([[1, 2], [1, 2, 3]], dtype=object), "pickled objects"),
        (lambda tokens: tokens + 2**40, "the token 1099511627"),
    ],
)
def test_bad_token_files_are_refused_in_one_line(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], tokens: Any, content: Any, says: str
) -> None:
    np.save(tmp_path / "bad.npy", content(tokens), allow_pickle=True)
    out = tmp_path / "out"
    assert run("--method", "gradient", "--data", str(tmp_path / "bad.npy"), "--out", str(out)) == 2
    printed = capsys.readouterr()
    assert printed.out == ""
    assert says in printed.err
    assert printed.err.count("\n") == 1
    assert not out.exists()


def test_files_that_are_no_arrays_are_refused(tmp_path: Path, capsys: pytest.CaptureFixture[str], tokens: Any) -> None:
    (tmp_path / "text.npy").write_text("tokens")
    (tmp_path / "empty.npy").write_bytes(b"")
    (tmp_path / "a.csv").write_text("0,1,2,3\n1,2,3,0\n")
    os.mkfifo(tmp_path / "pipe.npy")
    for name, stated in (
        ("many.npy", (10**12, 1000)),
        ("more.npy", (10**30, 10**30)),
    ):  # headers that state more than there is
        with open(tmp_path / name, "wb") as file:
            np.lib.format.write_array_header_1_0(file, {"descr": "<i8", "fortran_order": False, "shape": stated})
            file.write(bytes(100))
    np.save(tmp_path / "cut.npy", tokens)
    (tmp_path / "cut.npy").write_bytes((tmp_path / "cut.npy").read_bytes()[:500])
    np.savez(tmp_path / "several.npz", tokens=tokens)
    for name, says in [
        ("text.npy", "Can't use"), ("empty.npy", "cut short"), ("cut.npy", "cut short"), ("several.npz", "archive"),
        ("absent.npy", "No such file"), ("x" * 5000, "File name too long"), ("a.csv", "it is no .npy file, or is cut short"),
        ("many.npy", "cut short"), ("more.npy", "cut short"), ("pipe.npy", "it is no .npy file"),
    ]:  # fmt: skip
        assert run("--method", "gradient", "--data", str(tmp_path / name)) == 2
        assert says in capsys.readouterr().err


def test_a_vocabulary_that_is_too_small_is_said(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], tokens: Any
) -> None:
    np.save(tmp_path / "tokens.npy", tokens)
    assert run("--method", "gradient", "--data", str(tmp_path / "tokens.npy"), "--d-vocab", "2") == 2
    assert "Token 2 is outside the vocabulary" in capsys.readouterr().err


@pytest.mark.parametrize(("largest", "vocab"), [(2**30, None), (50_256, None), (2, "50257"), (2, str(2**40))])
def test_a_vocabulary_that_is_too_large_is_said_before_anything_is_computed(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], tokens: Any, largest: int, vocab: str | None
) -> None:
    tokens = tokens.copy()
    tokens[5, 3] = largest
    np.save(tmp_path / "tokens.npy", tokens)
    out = tmp_path / "out"
    assert (
        run(
            "--method",
            "gradient",
            "--data",
            str(tmp_path / "tokens.npy"),
            *(["--d-vocab", vocab] if vocab else []),
            "--out",
            str(out),
        )
        == 2
    )
    printed = capsys.readouterr()
    assert "The model that has the graph would have" in printed.err
    assert printed.err.count("\n") == 1
    assert not out.exists()


def test_a_task_that_is_too_large_is_said_before_anything_is_drawn(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(InContextMarkov, "sample", None)
    with pytest.raises(CausalProbeError, match="model that has the graph would have"):
        recover_by_gradient("chain", n_positions=8, d_vocab=20_000)
    with pytest.raises(
        CausalProbeError, match="tables of transitions of one sequence over 9,000 states have 81,000,000"
    ):
        recover_by_gradient("chain", n_positions=8, d_vocab=9_000)


def test_batches_shrink_as_the_vocabulary_grows(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """No batch of targets or tables has more entries than it may; few states are drawn in the batches of before."""
    sizes: list[int] = []
    sample = InContextMarkov.sample

    def spied(self: InContextMarkov, n: int, source: torch.Generator, **given: Any) -> Any:
        sizes.append(n)
        return sample(self, n, source, **given)

    monkeypatch.setattr(InContextMarkov, "sample", spied)
    recover_by_gradient("chain", n_positions=20, n_sequences=2**14)
    assert sizes == [13_107, 2**14 - 13_107, 2**13]
    sizes.clear()
    monkeypatch.setattr("causal_probe.first_gradient.batches.TABLES_AT_ONCE", 2**14)
    monkeypatch.setattr(sys.modules[recover_by_gradient.__module__], "EVALUATED", 2**16)
    found = recover_by_gradient("chain", n_positions=5, d_vocab=30, n_sequences=100)
    assert max(sizes) == 2**14 // 30**2
    assert sum(sizes) == 100 + found.settings["evaluation_sequences"]
    assert found.settings["evaluation_sequences"] == 2**16 // 30**2
    drawn = torch.randint(2000, (600, 6), generator=torch.Generator().manual_seed(0)).numpy()
    np.save(tmp_path / "tokens.npy", drawn)
    seen: list[int] = []

    def counted(batches: Any, **given: Any) -> Any:
        seen.extend(len(batch) for batch in batches)
        return gradient_graph(batches, **given)

    monkeypatch.setattr(sys.modules[recover_by_gradient.__module__], "gradient_graph", counted)
    own = recover_from_tokens(tmp_path / "tokens.npy", d_vocab=2000)
    assert max(seen) * 2000 <= 2**18
    assert own.found.n_sequences == sum(seen) == 600


def test_options_that_mean_nothing_are_refused(capsys: pytest.CaptureFixture[str]) -> None:
    assert run("--method", "gradient", "--steps", "5", "--heads", "2,1") == 2
    said = capsys.readouterr().err
    assert "With --method gradient these options mean nothing: --heads (only with --method training), --steps" in said
    assert run("--method", "gradient", "--data", "tokens.npy", "--seed", "3") == 2
    assert "With --data --method gradient these options mean nothing: --seed" in capsys.readouterr().err
    assert run("--method", "gradient", "--n-positions", "2") == 2
    assert "T must be at least 3" in capsys.readouterr().err


def test_no_edges_where_there_are_none_and_the_result_shows() -> None:
    with pytest.warns(CausalProbeWarning, match="has no edge"):
        found = recover_by_gradient("forest", n_positions=6, root_probability=1.0, n_sequences=4096)
    assert isinstance(found, GradientRecovery)
    assert found.exact
    assert found.recovered.number_of_edges() == 0
    assert "no edges" in repr(found)
    assert "<table" in found._repr_html_()
    assert "nichani2024" in found.cite().bibtex


def test_nodes_that_are_not_decided_are_said(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as left:
        main(["recover", "--method", "gradient", "--graph", "chain", "--concentration", "100", "--n-sequences", "2048"])
    assert not left.value.code
    printed = capsys.readouterr().out
    assert "insufficient" in printed
    assert "18 (1: 2 of 2 possibilities are left" in printed
