"""The house: who may import whom, the link, and what no file may hold."""

from __future__ import annotations

import ast
import importlib
import os
import re
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
PACKAGE = ROOT / "causal_probe"

#: The floors from the ground up. A floor may import from itself and from these below it, and everyone from FOR_EVERYONE.
LOWER = {
    "options": set(),
    "graphs": set(),
    "discovery": {"graphs"},
    "hooks": set(),
    "tasks": {"graphs"},
    "models": set(),
    "training": {"tasks", "models"},
    "probes": {"graphs", "discovery", "hooks"},
    "syntax": {"hooks", "probes"},
    "viz": {"graphs", "probes"},
    "first_gradient": {"graphs", "hooks", "tasks", "models", "training", "probes"},
    "mechanisms": {"graphs", "hooks", "tasks", "models", "training", "probes", "viz"},
    "circuits": {"options", "graphs", "hooks", "tasks", "models", "training", "probes"},
}
#: These from all that are below them.
UPPER = ("experiments", "papers", "sweep", "reports", "cli")
FLOORS = (*LOWER, *UPPER)
FOR_EVERYONE = {"arguments", "errors", "results"}
ARROWS = {floor: LOWER.get(floor, set(FLOORS[:place])) for place, floor in enumerate(FLOORS)} | {
    floor: set() for floor in FOR_EVERYONE
}

#: What the ground floor does without.
HEAVY = {"torch", "transformer_lens", "transformers", "circuitsvis", "matplotlib"}

TOP = {
    ".ci",
    ".github",
    ".gitignore",
    "CHANGELOG.md",
    "CITATION.cff",
    "CONTRIBUTING.md",
    "LICENSE",
    "Makefile",
    "README.md",
    "causal_probe",
    "constraints.txt",
    "demos",
    "docs",
    "hooks",
    "pyproject.toml",
    "tests",
}


# ------------------------------------------------------------------------------------------------------------- the arrows


def modules() -> dict[str, Path]:
    """Every module of the package by its name, those behind the link included."""
    files = [Path(folder) / name for folder, _, names in os.walk(PACKAGE, followlinks=True) for name in names]
    found = {}
    for path in sorted(file for file in files if file.suffix == ".py"):
        parts = path.relative_to(ROOT).with_suffix("").parts
        found[".".join(parts[:-1] if parts[-1] == "__init__" else parts)] = path
    return found


def imports(source: str, *, module: str, is_package: bool = False) -> Iterator[tuple[int, str, str]]:
    """(line, module, name) of everything that ``source`` imports, wherever the import stands; name is "" for a whole module."""
    here = module if is_package else module.rpartition(".")[0]
    for node in ast.walk(ast.parse(source)):
        if isinstance(node, ast.Import):
            for alias in node.names:
                yield node.lineno, alias.name, ""
        elif isinstance(node, ast.ImportFrom):
            base = ".".join(here.split(".")[: len(here.split(".")) - node.level + 1]) if node.level else ""
            origin = ".".join(filter(None, [base, node.module]))
            for alias in node.names:
                yield node.lineno, origin, alias.name
        elif isinstance(node, ast.Call) and ast.unparse(node.func).endswith(("import_module", "__import__")):
            target = node.args[0] if node.args else None
            yield node.lineno, target.value if isinstance(target, ast.Constant) else "(computed)", ""


def complaints(source: str, *, module: str, is_package: bool = False) -> list[str]:
    """What in ``source`` goes against the arrows."""
    floor = module.split(".")[1]
    found = []
    for line, origin, name in imports(source, module=module, is_package=is_package):
        where = f"{module}, line {line}:"
        top, _, rest = origin.partition(".")
        if origin == "(computed)":
            found.append(f"{where} a computed import hides its arrow")
        if floor in ("graphs", "options") and top in HEAVY:
            found.append(f"{where} {floor} is the ground floor and imports no {top}")
        if top == "hooks":
            found.append(f"{where} hooks is causal_probe.hooks")
        if top != "causal_probe":
            continue
        target = rest.split(".")[0] or name
        if target in {"", "*"}:
            found.append(f"{where} import what is needed by name, not all of causal_probe")
        elif target not in ARROWS:
            if not target.startswith("__"):  # __version__ is everyone's
                found.append(f"{where} {target} is no floor of the house")
        elif target not in {floor, *FOR_EVERYONE, *ARROWS[floor]} or (floor == "errors" and target != "errors"):
            found.append(f"{where} {floor} may not import {target}")
        elif floor == "viz" and target == "probes" and (not rest or not name[:1].isupper()):
            found.append(f"{where} viz knows results of probes only: import the class by name")
    return found


def test_arrows() -> None:
    found = modules()
    assert {"causal_probe.graphs", "causal_probe.hooks", "causal_probe.errors"} <= set(found)
    wrong = [
        complaint
        for module, path in found.items()
        if module != "causal_probe"
        for complaint in complaints(
            path.read_text(encoding="utf-8"), module=module, is_package=path.name == "__init__.py"
        )
    ]
    assert not wrong, "\n".join(wrong)


def test_arrows_go_downward() -> None:
    assert all(FLOORS.index(target) < place for place, floor in enumerate(FLOORS) for target in ARROWS[floor])


def test_every_floor_is_in_the_plan() -> None:
    floors = {module.split(".")[1] for module in modules() if "." in module}
    assert floors == set(ARROWS)


@pytest.mark.parametrize(
    ("module", "source"),
    [
        ("causal_probe.probes.heads", "from causal_probe.tasks import InContextMarkov"),
        ("causal_probe.probes.heads", "import causal_probe.models.disentangled"),
        ("causal_probe.probes.heads", "from causal_probe import models"),
        ("causal_probe.probes.heads", "from .. import viz"),
        ("causal_probe.probes.heads", "from ..viz.report import Report"),
        ("causal_probe.probes.heads", "def f():\n    from causal_probe.training import fit"),
        ("causal_probe.probes.heads", "import causal_probe"),
        ("causal_probe.probes.heads", "from causal_probe import *"),
        ("causal_probe.probes.heads", "import importlib\nimportlib.import_module('causal_probe.viz')"),
        ("causal_probe.probes.heads", "from importlib import import_module as find\nimport_module(name)"),
        ("causal_probe.probes.heads", "from causal_probe.nowhere import x"),
        ("causal_probe.hooks.edit", "import hooks.record"),
        ("causal_probe.hooks.edit", "from causal_probe.graphs import chain"),
        ("causal_probe.models.export", "from causal_probe.hooks import record"),
        ("causal_probe.viz.graph", "from causal_probe.probes.heads import head_graphs"),
        ("causal_probe.viz.graph", "from causal_probe import probes"),
        ("causal_probe.viz.graph", "from causal_probe.models import hand_set"),
        ("causal_probe.tasks.markov", "from causal_probe.models import hand_set"),
        ("causal_probe.mechanisms.mesa", "from causal_probe.experiments import recover"),
        ("causal_probe.experiments.scan", "from causal_probe.reports.scan import page"),
        ("causal_probe.papers.base", "from causal_probe import sweep"),
        ("causal_probe.options.base", "from causal_probe.graphs import FAMILIES"),
        ("causal_probe.options.base", "import torch"),
        ("causal_probe.graphs.compare", "import torch"),
        ("causal_probe.results", "from causal_probe.graphs import chain"),
        ("causal_probe.errors", "from causal_probe.results import cite"),
    ],
)
def test_wrong_arrows_are_found(module: str, source: str) -> None:
    assert complaints(source, module=module)


@pytest.mark.parametrize(
    ("module", "source"),
    [
        ("causal_probe.probes.heads", "from causal_probe.hooks.record import mean_patterns"),
        ("causal_probe.probes.heads", "from .match import match_heads\nfrom . import match"),
        ("causal_probe.probes.heads", "from causal_probe import __version__"),
        ("causal_probe.probes.heads", "import torch\nfrom causal_probe.errors import CausalProbeError"),
        ("causal_probe.viz.graph", "from causal_probe.probes.heads import Evidence"),
        ("causal_probe.cli.main", "from causal_probe import experiments"),
        ("causal_probe.experiments.scan", "from causal_probe.options import ScanOptions"),
        ("causal_probe.reports.scan", "from causal_probe.viz.report import Report"),
        ("causal_probe.results", "from causal_probe.errors import CausalProbeError"),
    ],
)
def test_right_arrows_are_let_through(module: str, source: str) -> None:
    assert not complaints(source, module=module)


def test_relative_imports_of_a_package_start_at_itself() -> None:
    assert list(imports("from .x import y", module="causal_probe.viz", is_package=True)) == [
        (1, "causal_probe.viz.x", "y")
    ]
    assert list(imports("from ..graphs import y", module="causal_probe.viz", is_package=True)) == [
        (1, "causal_probe.graphs", "y")
    ]


# --------------------------------------------------------------------------------------------------------------- the link


def test_hooks_is_a_relative_link() -> None:
    link = PACKAGE / "hooks"
    assert link.is_symlink()
    assert os.readlink(link) == "../hooks"
    assert (ROOT / "hooks").is_dir()
    assert not (ROOT / "hooks").is_symlink()


def test_every_module_imports_and_none_as_a_global_hooks() -> None:
    found = modules()
    assert "causal_probe.hooks" in found
    for name in found:
        if not name.endswith("__main__"):  # that one is a program: importing it would run it
            importlib.import_module(name)
    assert "hooks" not in sys.modules
    # One file is one module: the classes behind the link exist once.
    files = [
        os.path.realpath(module.__file__) for name, module in sys.modules.items() if name in found and module.__file__
    ]
    assert len(files) == len(set(files))


# -------------------------------------------------------------------------------------------------------------- the files


def files() -> list[Path]:
    """The files of the repository, from git where there is one; the link's are counted once, under hooks/."""
    listed = subprocess.run(
        ["git", "ls-files", "-z", "--cached", "--others", "--exclude-standard"],
        cwd=ROOT,
        capture_output=True,
        text=True,
    )
    if listed.returncode == 0:
        names = [name for name in listed.stdout.split("\0") if name]
    else:  # a copy without its history
        names = [
            os.path.relpath(Path(folder) / name, ROOT)
            for top in TOP
            for folder, _, inside in os.walk(ROOT / top)
            for name in inside
            if not folder.endswith("__pycache__")
        ] + [name for name in TOP if (ROOT / name).is_file()]
    return [path for path in (ROOT / name for name in names) if path.is_file() and not path.is_symlink()]


def test_top_level_is_the_plan() -> None:
    assert {path.relative_to(ROOT).parts[0] for path in files()} <= TOP
    assert {name for name in TOP if (ROOT / name).exists()} | {"docs"} == TOP  # which are not in every copy


#: Places that exist on one machine only, and hosts that a mirror or a closed network would have to replace.
NOT_FOR_A_FILE = {
    "a machine's own path": re.compile(r"(?<![\w.~/-])(?:/(?:root|home|Users|work|opt|mnt|tmp)/\w|[A-Z]:\\\\?Users\\)"),
    "a package registry": re.compile(
        r"pypi\.org|pythonhosted|download\.pytorch|anaconda\.org|--(?:extra-)?index-url|--find-links"
    ),
}


@pytest.mark.parametrize("what", NOT_FOR_A_FILE)
def test_no_file_holds(what: str) -> None:
    pattern = NOT_FOR_A_FILE[what]
    looked_at = 0
    found = []
    for path in files():
        if path == Path(__file__):
            continue
        try:
            text = path.read_text(encoding="utf-8")
        except UnicodeDecodeError:  # a picture
            continue
        looked_at += 1
        for number, line in enumerate(text.splitlines(), start=1):
            if match := pattern.search(line):
                found.append(f"{path.relative_to(ROOT)}:{number}: {match.group()}")
    assert looked_at > 10
    assert not found, "\n".join(found)


@pytest.mark.parametrize(
    ("what", "line"),
    [
        ("a machine's own path", '"/' + 'home/me/x"'),  # in two, so that this file holds none itself
        ("a machine's own path", "File /tmp/ipykernel_12/3.py:1"),
        ("a machine's own path", r"C:\Users\me"),
        ("a package registry", "pip install torch --index" + "-url https://example.org/simple"),
        ("a package registry", "https://" + "pypi.org/project/causal-probe"),
    ],
)
def test_the_patterns_find(what: str, line: str) -> None:
    assert NOT_FOR_A_FILE[what].search(line)


def test_constraints_are_plain_pins() -> None:
    lines = (ROOT / "constraints.txt").read_text(encoding="utf-8").splitlines()
    assert lines
    assert all(re.fullmatch(r"[A-Za-z0-9._-]+==[0-9][A-Za-z0-9.]*", line) for line in lines)
    # The two supported lines share the pins, so TransformerLens itself is named by the Makefile.
    assert not any(line.lower().startswith("transformer-lens==") for line in lines)


def test_every_module_with_arrays_is_checked_at_run_time(pytestconfig: pytest.Config) -> None:
    """Only these hold no array and are called millions of times: mypy alone checks their types."""
    checked = tuple(pytestconfig.getoption("--jaxtyping-packages").split(",")[:-1])
    left = {
        module: path
        for module, path in modules().items()
        if not any(module == name or module.startswith(name + ".") for name in checked)
    }
    bit_sets = {f"causal_probe.discovery.{name}" for name in ("icd", "marks", "orientation", "possible_d_sep")}
    assert set(left) == {"causal_probe", "causal_probe.errors", "causal_probe.discovery"} | bit_sets
    assert not [module for module, path in left.items() if "jaxtyping" in path.read_text(encoding="utf-8")]
