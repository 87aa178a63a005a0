"""What a reader sees first does what it says: the notebooks run, as stored and anew, and so does README's Python."""

from __future__ import annotations

import copy
import functools
import importlib.util
import itertools
import json
import os
import re
import shutil
import subprocess
import sys
import types
from pathlib import Path
from typing import Any

import nbformat
import pytest
from nbclient import NotebookClient
from nbformat import NotebookNode
from PIL import Image

from tests.real_model import smollm2_folder

ROOT = Path(__file__).parents[1]
DEMOS = ROOT / "demos"
NOTEBOOKS = sorted(DEMOS.glob("*.ipynb"))
README = (ROOT / "README.md").read_text(encoding="utf-8")


def outputs(notebook: NotebookNode) -> list[tuple[str, NotebookNode]]:
    """Every output of every code cell, with the cell's id."""
    return [(cell.id, output) for cell in notebook.cells if cell.cell_type == "code" for output in cell.outputs]


def shown(notebook: NotebookNode) -> dict[str, set[str]]:
    """By cell: the kinds of what it shows (MIME types, or the name of a stream)."""
    kinds: dict[str, set[str]] = {}
    for cell, output in outputs(notebook):
        kinds.setdefault(cell, set()).update([output.name] if output.output_type == "stream" else output.data)
    return kinds


@pytest.fixture(scope="module", params=NOTEBOOKS, ids=lambda path: path.stem)
def stored(request: pytest.FixtureRequest) -> NotebookNode:
    return nbformat.read(request.param, as_version=4)


@pytest.fixture(scope="module")
def run(stored: NotebookNode, tmp_path_factory: pytest.TempPathFactory) -> NotebookNode:
    """The notebook, run from top to bottom in a clean kernel and an empty folder; an error in a cell fails here."""
    if smollm2_folder() is None and any("from the hub" in cell.source for cell in stored.cells):
        pytest.skip("the pretrained model is not installed, and there is no hub")
    notebook = copy.deepcopy(stored)
    for cell in notebook.cells:
        if cell.cell_type == "code":
            cell.outputs = []
    folder = str(tmp_path_factory.mktemp("notebook"))
    return NotebookClient(
        notebook, timeout=300, kernel_name="python3", resources={"metadata": {"path": folder}}
    ).execute()


def test_there_are_notebooks() -> None:
    assert [path.name for path in NOTEBOOKS][:1] == ["0_one_probe_two_models.ipynb"]


@pytest.mark.slow
def test_runs_without_warnings(run: NotebookNode) -> None:
    assert [output.text for _, output in outputs(run) if output.get("name") == "stderr"] == []


@pytest.mark.slow
def test_shows_what_the_stored_one_shows(run: NotebookNode, stored: NotebookNode) -> None:
    """Cell by cell; a picture or a table that is missing, in the one or in the other, is a defect.

    circuitsvis' pictures are not stored. Their output is 1.3 MB of JavaScript, which git would keep anew with every change,
    and which the sites that show notebooks don't run; a line of text takes its place (see demos/pictures.py).
    """
    now, then = shown(run), shown(stored)
    interactive = {
        cell for cell, output in outputs(run) if "CircuitsVis.render" in output.get("data", {}).get("text/html", "")
    }
    assert {cell: kinds - ({"text/html"} if cell in interactive else set()) for cell, kinds in now.items()} == then
    assert sum("image/png" in kinds for kinds in now.values()) >= 3


@pytest.mark.slow
def test_one_probe_finds_the_graph_and_its_reader_in_both_models(run: NotebookNode, stored: NotebookNode) -> None:
    if "scan-second" not in shown(run):
        pytest.skip("this is about the notebook on two models")
    for notebook in (run, stored):
        text = {cell: output.data["text/plain"] for cell, output in outputs(notebook) if "data" in output}
        best = {
            cell: [line.split()[1] for line in text[cell].splitlines()[2:]] for cell in ("scan-first", "scan-second")
        }
        assert best == {"scan-first": ["L0H0", "L1H0"], "scan-second": ["L16H0", "L18H6"]}
        assert "SHD 0" in text["compare-first"].splitlines()[0]
        assert "SHD 0" in text["compare-second"].splitlines()[0]
        said = "".join(output.text for cell, output in outputs(notebook) if cell == "ablate")
        rises = [float(number) for number in re.findall(r": ([+-][\d.]+)", said)]
        assert rises[0] > 1 > 0.3 > abs(rises[1])  # a head, and another of its layer
        assert rises[2] > 1 > 0.3 > abs(rises[3])


def test_the_first_picture_is_the_notebooks() -> None:
    made, made_from = demos_pictures().draw_one_probe()
    kept = Image.open(DEMOS / "images" / "one_probe.png")
    assert kept.tobytes() == made.tobytes(), "the picture is of another run: `python demos/pictures.py 0`"
    assert json.loads(kept.text["causal-probe"]) == made_from


@pytest.mark.slow
def test_the_first_notebook_recovers_its_graph(run: NotebookNode, stored: NotebookNode) -> None:
    if "recover" not in shown(run):
        pytest.skip("this is about the first notebook")
    for notebook in (run, stored):
        text = {cell: output.data["text/plain"] for cell, output in outputs(notebook) if "data" in output}
        assert re.search(
            r"root accuracy +0\.", text["compare-attention"]
        )  # its point: attention takes some root for a child
        assert "SHD 0" in text["compare-effects"].splitlines()[0]
        assert text["recover"].startswith("Recovery of forest: exact")


@pytest.mark.slow
def test_the_second_notebook_shows_that_attention_is_no_evidence(run: NotebookNode, stored: NotebookNode) -> None:
    if "verdicts" not in shown(run):
        pytest.skip("this is about the second notebook")
    for notebook in (run, stored):
        text = {cell: output.data["text/plain"] for cell, output in outputs(notebook) if "data" in output}
        # Three heads that attend alike; of a table's line: head, template, verdict, numbers.
        lines = [line.split() for line in text["verdicts"].splitlines() if " induction " in line]
        verdicts = [list(itertools.takewhile(lambda word: not word[0].isdigit(), line[2:])) for line in lines]
        assert [(line[0], " ".join(words)) for line, words in zip(lines, verdicts, strict=True)] == [
            ("L1H0", "redundant"),
            ("L1H1", "redundant"),
            ("L1H2", "no effect above delta"),
        ]
        assert len({line[2 + len(words)] for line, words in zip(lines, verdicts, strict=True)}) == 1  # their excess
    kept = {cell: output.data["text/plain"] for cell, output in outputs(stored) if "data" in output}
    assert "L18H6" in kept["scan-it"]  # the stored one shows the pretrained model


@pytest.mark.slow
def test_the_seventh_notebook_says_yes_where_it_is_so_and_refuses_what_can_not_be_measured(
    run: NotebookNode, stored: NotebookNode
) -> None:
    if "bert" not in shown(run):
        pytest.skip("this is about the seventh notebook")
    for notebook in (run, stored):
        text: dict[str, str] = {}
        for cell, output in outputs(notebook):
            text[cell] = text.get(cell, "") + (output.get("text") or output.data["text/plain"])
        assert "L1H0: induction" in text["lens-called"]
        assert re.search(r"called: (\(\)|no rows)", text["scan-gpt2"])
        assert all("FAILS" not in text[cell] and "NO " not in text[cell] for cell in ("check-gpt2", "own-class"))
        assert "SHD 0" in text["compare"].splitlines()[0]
        assert "attend to later positions" in text["bert"]
        assert "not causal" in text["bert"]


@pytest.mark.slow
def test_the_eighth_notebook_finds_the_planted_circuit(run: NotebookNode, stored: NotebookNode) -> None:
    if "smol-upstream" not in shown(run):
        pytest.skip("this is about the eighth notebook")
    for notebook in (run, stored):
        text = {cell: output.data["text/plain"] for cell, output in outputs(notebook) if "data" in output}
        assert text["blocks"].splitlines()[2].split()[:2] == ["embed", "L0H2"]
        confirmed = [line.split()[:3] for line in text["upstream"].splitlines() if line.split()[-1] in ("True", "yes")]
        assert confirmed == [["L0H2", "L1H1", "key"]]
        read = {line.split()[1]: "no head sees" not in line for line in text["made"].splitlines()[2:]}
        assert read == {"chain": False, "pairs": False, "lag-2": True, "lag-3": False}
    kept = {cell: output.data["text/plain"] for cell, output in outputs(stored) if "data" in output}
    assert re.search("L16H0 +L18H6 +key", kept["smol-upstream"])  # the stored one shows the pretrained model


def test_one_family(stored: NotebookNode) -> None:
    """Each asks a question first, then installs itself on Colab; and ends with what was learnt and what to try next."""
    first, install = stored.cells[:2]
    assert first.cell_type == "markdown"
    assert first.source.startswith("# ")
    assert "?" in first.source
    assert (install.id, install.source, install.outputs) == ("install", demos_pictures().INSTALL, [])
    headings = [
        line
        for cell in stored.cells
        if cell.cell_type == "markdown"
        for line in cell.source.splitlines()
        if line.startswith("## ")
    ]
    assert headings[-2:] == ["## What was learnt", "## What to try next"]
    assert stored.cells[-1].cell_type == "markdown"
    titled = [cell.source for cell in stored.cells if cell.cell_type == "markdown" and cell.source.startswith("# ")]
    assert titled == [first.source]


@functools.cache
def demos_pictures() -> Any:
    """demos/pictures.py, which is no module of the package."""
    spec = importlib.util.spec_from_file_location("demos_pictures", DEMOS / "pictures.py")
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def test_the_install_cell_keeps_the_torch_that_is_there(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """On Colab, played by a module of its name and a pip that writes down what it is asked; elsewhere it does nothing."""
    from IPython.core.inputtransformer2 import TransformerManager

    pip = tmp_path / "pip"
    frozen = "torch==2.8.0+cu126\ntorchvision==0.23.0\nnumpy==2.0.2\ntorchmetrics==1.0\nrequests==2.32.4\n"
    pip.write_text(f'#!/bin/sh\n[ "$1" = list ] && printf "{frozen}" || echo "$@" >> asked\n'.replace('\n"', '\\n"'))
    pip.chmod(0o755)
    monkeypatch.setenv("PATH", f"{tmp_path}:{os.environ['PATH']}")
    monkeypatch.chdir(tmp_path)
    code = TransformerManager().transform_cell(demos_pictures().INSTALL)

    class Shell:
        def system(self, command: str) -> None:
            subprocess.run(command, shell=True, check=True)

    exec(code, {"get_ipython": Shell})
    assert not (tmp_path / "installed.txt").exists()
    monkeypatch.setitem(sys.modules, "google.colab", types.ModuleType("google.colab"))
    exec(code, {"get_ipython": Shell})
    kept = (tmp_path / "installed.txt").read_text().split()
    assert kept == ["torch==2.8.0+cu126", "torchvision==0.23.0", "numpy==2.0.2"]
    assert (tmp_path / "asked").read_text() == "install --quiet --constraint installed.txt causal-probe[notebooks]\n"


def test_stored_as_run_once_from_top_to_bottom(stored: NotebookNode) -> None:
    counts = [cell.execution_count for cell in stored.cells if cell.cell_type == "code"]
    assert counts == list(range(1, len(counts) + 1))
    assert [
        output for _, output in outputs(stored) if output.output_type == "error" or output.get("name") == "stderr"
    ] == []


def test_stored_small_and_without_paths(stored: NotebookNode) -> None:
    text = nbformat.writes(stored)
    assert len(text) < 600_000
    assert set(stored.metadata) == {"kernelspec", "language_info"}
    for _, output in outputs(stored):
        plain = json.dumps({kind: value for kind, value in output.get("data", output).items() if kind != "image/png"})
        assert not re.search(r"/(home|root|tmp|work|usr|Users)/|[A-Z]:\\\\|site-packages", plain)


# ---------------------------------------------------------------------------------------------------------------- README


@pytest.mark.slow
def test_the_readme_recovers_its_graph(tmp_path: Path) -> None:
    """The block that trains a model, as a program of its own in an empty folder (the others: test_docs)."""
    blocks = re.findall(r"^```python\n(.*?)^```", README, flags=re.DOTALL | re.MULTILINE)
    (block,) = [block for block in blocks if "experiments.recover(" in block]
    told = "import json; from causal_probe.results import to_jsonable; print('TOLD' + json.dumps(to_jsonable([result.settings, sorted(result.recovered.edges), result.loss])))"
    program = "\n".join([block, "assert result.exact", told])
    done = subprocess.run([sys.executable, "-c", program], cwd=tmp_path, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    # README says that its picture is of the same recovery: what is embedded in the picture must be what the code gives now.
    made_from = json.loads(Image.open(DEMOS / "images" / "recovered.png").text["causal-probe"])
    settings, edges, loss = json.loads(done.stdout.rpartition("TOLD")[2])
    stale = "the picture is of another recovery: run `make pictures`"
    assert made_from["command"] == re.search(r"`(causal-probe recover)` made this", README).group(1), stale
    assert made_from["settings"] == settings, stale
    assert made_from["recovered"] == edges, stale
    assert made_from["loss"] == pytest.approx(loss, abs=2e-3), stale


def test_the_files_that_the_readme_names_are_there() -> None:
    targets = re.findall(r"\]\(([^)#:]+)\)", README)
    assert {"demos/images/one_probe.png", "demos/images/recovered.png"} <= set(targets)
    assert [target for target in targets if not (ROOT / target).exists()] == []
    assert all(path.stat().st_size < 300_000 for path in (DEMOS / "images").iterdir())


@pytest.mark.skipif(shutil.which("make") is None, reason="needs make, whose targets this is about")
def test_the_make_targets_that_the_readme_names_are_there() -> None:
    for target in set(re.findall(r"\bmake ([a-z]\w*)", README)):
        done = subprocess.run(["make", "--dry-run", target], cwd=ROOT, capture_output=True, text=True)
        assert done.returncode == 0, done.stderr
