"""The size of the house: how much code there is, in which rooms, under how many names, and that no import goes in a circle."""

from __future__ import annotations

import ast
import io
import os
import tokenize
from collections import Counter
from collections.abc import Iterator, Mapping
from functools import cache
from pathlib import Path

import networkx as nx

ROOT = Path(__file__).parents[1]
PACKAGE = ROOT / "causal_probe"

#: Lines of code, neither blank nor comment nor docstring, in the whole package. A ratchet: whoever adds a capability says by how much it rises; without the graphs from sequences 21,000 is where it is to go.
MOST_CODE = 39_000
#: Lines of text in a module, all of them.
LONGEST_MODULE = 500
#: Share of the code that one room may hold.
LARGEST_ROOM = 1 / 4
#: Different names in all rooms' ``__all__``: 160 when the rooms were made, and what capabilities have added since.
MOST_NAMES = 185


def modules() -> dict[str, Path]:
    """Every module of the package by its name, those behind the link included; a package goes by its own name."""
    files = [Path(folder) / name for folder, _, names in os.walk(PACKAGE, followlinks=True) for name in names]
    found = {}
    for path in sorted(file for file in files if file.suffix == ".py"):
        parts = path.relative_to(ROOT).with_suffix("").parts
        found[".".join(parts[:-1] if parts[-1] == "__init__" else parts)] = path
    return found


@cache
def sources() -> dict[str, str]:
    return {name: path.read_text(encoding="utf-8") for name, path in modules().items()}


def room_of(module: str) -> str:
    """The direct subpackage or module of the package; the package itself for its own __init__.

    >>> room_of("causal_probe.probes.discovery.pc"), room_of("causal_probe")
    ('probes', 'causal_probe')
    """
    return module.split(".")[1] if "." in module else module


# -------------------------------------------------------------------------------------------------------------------- size


def code_lines(source: str) -> int:
    """How many lines hold code: not those of blanks, comments and docstrings alone.

    >>> code_lines("'''Doc.'''\\n\\n# comment\\ndef f():\\n    '''Doc\\n    string.'''\\n    return (1 +  # one\\n\\n        2)\\n")
    3
    """
    documented: set[int] = set()
    for node in ast.walk(ast.parse(source)):
        if isinstance(node, (ast.Module, ast.ClassDef, ast.FunctionDef, ast.AsyncFunctionDef)) and node.body:
            first = node.body[0]
            if (
                isinstance(first, ast.Expr)
                and isinstance(first.value, ast.Constant)
                and isinstance(first.value.value, str)
            ):
                documented.update(range(first.lineno, (first.end_lineno or first.lineno) + 1))
    left_out = {
        tokenize.COMMENT, tokenize.NL, tokenize.NEWLINE, tokenize.INDENT, tokenize.DEDENT, tokenize.ENDMARKER,
    }  # fmt: skip
    held: set[int] = set()
    for token in tokenize.generate_tokens(io.StringIO(source).readline):
        if token.type not in left_out:
            held.update(range(token.start[0], token.end[0] + 1))
    return len(held - documented)


@cache
def code_by_room() -> Counter[str]:
    rooms: Counter[str] = Counter()
    for module, source in sources().items():
        rooms[room_of(module)] += code_lines(source)
    return rooms


def test_there_is_no_more_code_than_it_takes() -> None:
    rooms = code_by_room()
    assert {"probes", "hooks", "graphs", "tasks"} <= set(rooms)
    shown = ", ".join(f"{room} {lines:,}" for room, lines in rooms.most_common())
    assert rooms.total() <= MOST_CODE, f"{rooms.total():,} lines of code: {shown}"


def test_no_module_is_longer_than_can_be_read() -> None:
    lengths = {module: len(source.splitlines()) for module, source in sources().items()}
    long = {module: lines for module, lines in lengths.items() if lines > LONGEST_MODULE}
    assert not long, f"modules of more than {LONGEST_MODULE} lines: {long}"


def test_no_room_is_an_attic() -> None:
    rooms = code_by_room()
    share = {
        room: f"{lines / rooms.total():.0%}" for room, lines in rooms.items() if lines > LARGEST_ROOM * rooms.total()
    }
    assert not share, f"rooms with more than {LARGEST_ROOM:.0%} of the code: {share}"


# ------------------------------------------------------------------------------------------------------------------- names


def public_names(source: str) -> set[str]:
    """What ``__all__`` lists.

    >>> sorted(public_names("__all__ = ['b', 'a']"))
    ['a', 'b']
    """
    for node in ast.parse(source).body:
        targets = (
            node.targets if isinstance(node, ast.Assign) else [node.target] if isinstance(node, ast.AnnAssign) else []
        )
        if any(isinstance(target, ast.Name) and target.id == "__all__" for target in targets):
            return set(ast.literal_eval(node.value))  # type: ignore[attr-defined]
    return set()


def test_there_are_not_more_names_than_can_be_known() -> None:
    rooms = {room_of(module): public_names(source) for module, source in sources().items() if module.count(".") == 1}
    assert all(rooms[room] for room in ("graphs", "hooks", "probes")), "a room says in __all__ what it offers"
    names = set().union(*rooms.values())
    shown = ", ".join(f"{room} {len(its)}" for room, its in sorted(rooms.items(), key=lambda item: -len(item[1])))
    assert len(names) <= MOST_NAMES, f"{len(names)} public names: {shown}"


# ----------------------------------------------------------------------------------------------------------------- circles


def circles(known: Mapping[str, str]) -> list[list[str]]:
    """The sets of modules, given by their sources, each of which imports every other, over some others or by itself."""
    graph = import_graph(known)
    return sorted(
        sorted(component)
        for component in nx.strongly_connected_components(graph)
        if len(component) > 1 or any(graph.has_edge(module, module) for module in component)
    )


def import_graph(known: Mapping[str, str]) -> nx.DiGraph:
    """Which module imports which, wherever the import stands: in a function or for type checkers as well.

    ``from package import name`` imports the package's __init__ where that binds the name, as it does what it re-exports; else, if
    there is such a submodule, the submodule and nothing else; else the package.
    """
    trees = {module: ast.parse(source) for module, source in known.items()}
    names = {module: bound(tree, module, known) for module, tree in trees.items()}
    graph = nx.DiGraph()
    graph.add_nodes_from(known)
    for module, tree in trees.items():
        for origin, name in imports(tree, module, known):
            submodule = f"{origin}.{name}"
            target = submodule if submodule in known and name not in names.get(origin, ()) else origin
            if target in known:
                graph.add_edge(module, target)
    return graph


def imports(tree: ast.Module, module: str, known: Mapping[str, str]) -> Iterator[tuple[str, str]]:
    """(module, name) of everything that is imported; the name is "" for a whole module."""
    is_package = any(other.startswith(f"{module}.") for other in known)
    here = module.split(".") if is_package else module.split(".")[:-1]
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            yield from ((alias.name, "") for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            base = here[: len(here) - node.level + 1] if node.level else []
            origin = ".".join([*base, *([node.module] if node.module else [])])
            yield from ((origin, alias.name) for alias in node.names)
        elif isinstance(node, ast.Call) and ast.unparse(node.func).endswith(("import_module", "__import__")):
            target = node.args[0] if node.args else None
            if isinstance(target, ast.Constant) and isinstance(target.value, str):
                yield target.value, ""


def bound(tree: ast.Module, module: str, known: Mapping[str, str]) -> set[str]:
    """The names that a module binds as it is run: what it defines, and what it imports from others. Its own submodules are no such names."""
    names: set[str] = set()
    for node in tree.body:
        if isinstance(node, (ast.FunctionDef, ast.AsyncFunctionDef, ast.ClassDef)):
            names.add(node.name)
        elif isinstance(node, ast.ImportFrom):
            origins = {origin for origin, _ in imports(ast.Module([node], []), module, known)}
            names.update(alias.asname or alias.name for alias in node.names if module not in origins)
        elif isinstance(node, (ast.Assign, ast.AnnAssign)):
            targets = node.targets if isinstance(node, ast.Assign) else [node.target]
            names.update(target.id for target in targets if isinstance(target, ast.Name))
    return names


def test_no_import_goes_in_a_circle() -> None:
    found = circles(sources())
    assert not found, "\n".join(f"{len(circle)} modules: {', '.join(circle)}" for circle in found)


def test_a_circle_is_seen_wherever_its_imports_stand() -> None:
    a, b = "p.a", "p.b"
    for source in (
        "from p.b import f",
        "from p import b",
        "from . import b",
        "from p import b as other",
        "from .b import f",
        "import p.b",
        "import p.b as other",
        "def g():\n    from p.b import f",
        "from typing import TYPE_CHECKING\nif TYPE_CHECKING:\n    from p.b import F",
        "import importlib\nimportlib.import_module('p.b')",
    ):
        assert circles({"p": "", a: source, b: "from p.a import g"}) == [[a, b]], source
        assert circles({"p": "", a: source, b: ""}) == [], source


def test_a_package_s_own_modules_do_not_import_from_it() -> None:
    package = "from p.a import f"
    assert circles({"p": package, "p.a": "", "p.b": "from p import f"}) == []  # nothing leads from p or p.a to p.b
    assert circles({"p": f"{package}\nfrom p.b import g", "p.a": "", "p.b": "from p import f"}) == [["p", "p.b"]]
    assert circles({"p": package, "p.a": "from p import g"}) == [["p", "p.a"]]
    assert circles({"p": package, "p.a": "from . import g"}) == [["p", "p.a"]]
    # A function named as its module is what the package's name stands for; without it, the module itself is meant.
    assert circles({"p": "from p.a import a\nfrom p.b import g", "p.a": "", "p.b": "from p import a"}) == [["p", "p.b"]]
    assert circles({"p": "from p.b import g", "p.a": "", "p.b": "from p import a"}) == []


def test_a_name_from_another_room_leads_to_its_door_alone() -> None:
    known = {
        "p": "",
        "p.low": "from p.low.a import f",
        "p.low.a": "",
        "p.low.b": "from p.high import g",
        "p.high": "from p.low import f",
    }
    assert list(import_graph(known).successors("p.high")) == ["p.low"]
    assert circles(known) == []
    assert circles({**known, "p.low.a": "from p.high import g"}) == [["p.high", "p.low", "p.low.a"]]
