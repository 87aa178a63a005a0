"""Make again what the tool has made for a reader who has not run it yet: README's picture and the outputs in the notebooks.

``make pictures`` runs ``causal-probe recover --out out/demo`` and then this file.
"""

from __future__ import annotations

import io
from pathlib import Path

import nbformat
from matplotlib.figure import Figure
from nbclient import NotebookClient
from PIL import Image

from causal_probe import graphs, models, viz
from causal_probe.results import read_json

DEMOS = Path(__file__).parent
RESULT = DEMOS.parent / "out" / "demo"

#: A longer output is a script, such as circuitsvis' 1.3 MB. Git hosts don't run scripts: their readers would see nothing.
LONGEST_OUTPUT = 300_000


def draw_recovery() -> Image.Image:
    """What the command found, from the files that it wrote: the graphs; below them the learnt block and the loss curve."""
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
    return picture


def _image(figure: Figure, *, size: tuple[float, float] | None = None) -> Image.Image:
    if size is not None:
        figure.set_size_inches(size)
    return Image.open(io.BytesIO(figure._repr_png_()))


def run_notebook(path: Path) -> None:
    """Run a notebook in a clean kernel and store its outputs, without what can't be shown where scripts don't run."""
    notebook = nbformat.read(path, as_version=4)
    metadata = notebook.metadata.copy()
    NotebookClient(notebook, timeout=300, record_timing=False, resources={"metadata": {"path": DEMOS}}).execute()
    notebook.metadata = metadata  # not the Python of whoever ran it last
    for cell in notebook.cells:
        for output in cell.get("outputs", []):
            if len(output.get("data", {}).get("text/html", "")) > LONGEST_OUTPUT:
                output["data"] = {"text/plain": "An interactive picture by circuitsvis: run this cell to see it."}
    nbformat.write(notebook, path)


if __name__ == "__main__":
    draw_recovery().save(DEMOS / "images" / "recovered.png", optimize=True)
    for path in sorted(DEMOS.glob("*.ipynb")):
        run_notebook(path)
