"""Make again what the tool has made for a reader who has not run it yet: README's pictures and the outputs in the notebooks.

``make pictures`` runs ``causal-probe recover --out out/demo`` and then this file. With names (``demos/pictures.py 2 7``) only the
notebooks that begin with them are run; with ``--install-cells`` none is, and each gets its first cell of code, the same in all.
"""

from __future__ import annotations

import base64
import io
import json
import sys
from pathlib import Path

import nbformat
from matplotlib.figure import Figure
from nbclient import NotebookClient
from PIL import Image
from PIL.PngImagePlugin import PngInfo

from causal_probe import graphs, models, viz
from causal_probe.results import read_json

DEMOS = Path(__file__).parent
RESULT = DEMOS.parent / "out" / "demo"

#: README's first picture shows what these cells of this notebook show.
ONE_PROBE = "0_one_probe_two_models.ipynb"
DRAWN = ("draw-first", "draw-second")

#: A longer output is a script, such as circuitsvis' 1.3 MB. Git hosts don't run scripts: their readers would see nothing.
LONGEST_OUTPUT = 300_000

#: The name under which a picture carries what it was made from.
EMBEDDED = "causal-probe"

#: Colab has a torch of its own, built for its GPUs: it must stay.
INSTALL = """\
# On Colab this installs causal-probe beside the torch that is there; anywhere else it does nothing.
import sys

if "google.colab" in sys.modules:
    !pip list --format=freeze | grep -E "^(torch|torchvision|torchaudio|numpy|pandas)==" > installed.txt
    # Before the first release: "causal-probe[notebooks] @ git+" and the address of the repository.
    !pip install --quiet --constraint installed.txt "causal-probe[notebooks]"\
"""


def draw_recovery() -> tuple[Image.Image, dict[str, object]]:
    """What the command found, from the files that it wrote: the graphs; below them the learnt block and the loss curve.

    Beside the picture, what it was made from: the command, its settings, the graphs and the loss.
    """
    result = read_json(RESULT / "result.json")
    truth, found = (graphs.read_graph(RESULT / name) for name in ("graph.json", "recovered.json"))
    name = (0, 0, "position", "position")
    block = models.load(RESULT / "model").named_blocks()[name]
    above = _image(viz.graph(truth, found))
    left = _image(viz.blocks({name: block}, marks={name: [(c, p) for p, c in truth.edges]}), size=(3.5, 3.0))
    right = _image(viz.training(result["history"], result["reference_losses"]), size=(6.4, 3.0))

    width = max(above.width, left.width + right.width)
    picture = Image.new("RGB", (width, above.height + max(left.height, right.height)), "white")
    picture.paste(above, ((width - above.width) // 2, 0))
    picture.paste(left, (0, above.height))
    picture.paste(right, (width - right.width, above.height))
    made_from = {
        "command": "causal-probe recover",
        "settings": result["settings"],
        "recovered": sorted(list(edge) for edge in found.edges),
        "loss": result["loss"],
    }
    return picture, made_from


def draw_one_probe() -> tuple[Image.Image, dict[str, object]]:
    """The graphs in two models, from the pictures that the notebook "One probe, two models" stores."""
    notebook = nbformat.read(DEMOS / ONE_PROBE, as_version=4)
    stored = {cell.id: cell.outputs[0]["data"]["image/png"] for cell in notebook.cells if cell.id in DRAWN}
    parts = [Image.open(io.BytesIO(base64.b64decode(stored[cell]))) for cell in DRAWN]
    picture = Image.new("RGB", (max(part.width for part in parts), sum(part.height for part in parts)), "white")
    for i, part in enumerate(parts):
        picture.paste(part, ((picture.width - part.width) // 2, sum(above.height for above in parts[:i])))
    return picture, {"notebook": ONE_PROBE, "cells": list(DRAWN)}


def _image(figure: Figure, *, size: tuple[float, float] | None = None) -> Image.Image:
    if size is not None:
        figure.set_size_inches(size)
    return Image.open(io.BytesIO(figure._repr_png_()))


def save_with(picture: Image.Image, made_from: dict[str, object], path: Path) -> None:
    """Write a PNG file that says what it was made from."""
    text = PngInfo()
    text.add_text(EMBEDDED, json.dumps(made_from, sort_keys=True))
    picture.save(path, optimize=True, pnginfo=text)


def put_install_cell(notebook: nbformat.NotebookNode) -> None:
    """Make the install cell the first one of code, right after the question; stored outputs stay as they are."""
    cells = [cell for cell in notebook.cells if cell.get("id") != "install"]
    install = nbformat.v4.new_code_cell(INSTALL, id="install", execution_count=1)
    notebook.cells = [*cells[:1], install, *cells[1:]]
    for count, cell in enumerate((cell for cell in notebook.cells if cell.cell_type == "code"), start=1):
        cell.execution_count = count
        for output in cell.outputs:
            if "execution_count" in output:
                output.execution_count = count


def run_notebook(path: Path) -> None:
    """Run a notebook in a clean kernel and store its outputs, without what can't be shown where scripts don't run."""
    notebook = nbformat.read(path, as_version=4)
    metadata = notebook.metadata.copy()
    put_install_cell(notebook)
    NotebookClient(notebook, timeout=1800, record_timing=False, resources={"metadata": {"path": DEMOS}}).execute()
    notebook.metadata = metadata  # not the Python that ran it last
    for cell in notebook.cells:
        for output in cell.get("outputs", []):
            if len(output.get("data", {}).get("text/html", "")) > LONGEST_OUTPUT:
                output["data"] = {"text/plain": "An interactive picture by circuitsvis: run this cell to see it."}
    nbformat.write(notebook, path)


def main(arguments: list[str]) -> None:
    if not arguments:
        save_with(*draw_recovery(), DEMOS / "images" / "recovered.png")
    names = [name for name in arguments if not name.startswith("--")]
    for path in sorted(DEMOS.glob("*.ipynb")):
        if names and not path.name.startswith(tuple(f"{name}_" for name in names)):
            continue
        if "--install-cells" in arguments:
            notebook = nbformat.read(path, as_version=4)
            put_install_cell(notebook)
            nbformat.write(notebook, path)
        else:
            run_notebook(path)
            if path.name == ONE_PROBE:
                save_with(*draw_one_probe(), DEMOS / "images" / "one_probe.png")


if __name__ == "__main__":
    main(sys.argv[1:])
