"""The pages of the site that nobody writes: tutorials from demos/, the first page from README, the API from ``__all__``, and the commands.

A hook of mkdocs. Nothing of the package but its options and its command line is imported, so no torch.
"""

from __future__ import annotations

import ast
import inspect
import os
import re
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, Literal, get_args, get_origin

ROOT = Path(__file__).resolve().parents[1]
PACKAGE = ROOT / "causal_probe"
#: What has no page: the command line has a guide.
NO_ROOM = {"cli"}

#: Files of the repository by their place on the site. Links between them are rewritten.
PLACES = {
    "README.md": "index.md",
    "CONTRIBUTING.md": "contributing.md",
    "CHANGELOG.md": "changelog.md",
    "LICENSE": "license.txt",
    "CITATION.cff": "citation.cff.txt",
    **{
        file: file
        for folder, pattern in (("demos", "*.ipynb"), ("demos/images", "*.png"))
        for file in sorted(f"{folder}/{path.name}" for path in (ROOT / folder).glob(pattern))
    },
}


# ------------------------------------------------------------------------------------------------------------------ pages


def pages() -> dict[str, str]:
    """The generated pages by their place."""
    found = {place: moved(source) for source, place in PLACES.items() if place.endswith(".md")}
    found["guides/command-line.md"] = command_line()
    found["api/index.md"] = api_index()
    for room in rooms():
        found[f"api/{room}.md"] = api_page(room)
    return found


def moved(source: str) -> str:
    """A Markdown file of the repository, with links as the site has them.

    Links to what has no place on the site can't stand: they raise a KeyError.
    """
    text = (ROOT / source).read_text(encoding="utf-8")

    def rewritten(found: re.Match[str]) -> str:
        target, _, anchor = found[1].partition("#")
        if "://" in target or not target:
            return found[0]
        place = target.removeprefix("docs/pages/") if target.startswith("docs/pages/") else PLACES[target]
        return f"]({place}{f'#{anchor}' if anchor else ''})"

    return re.sub(r"\]\(([^)\s]+)\)", rewritten, text)


# -------------------------------------------------------------------------------------------------------------------- API


def rooms() -> list[str]:
    """The rooms that have a page, as :data:`causal_probe.__all__` names them, and ``errors``."""
    return [name for name in exported(PACKAGE / "__init__.py") if (PACKAGE / name / "__init__.py").is_file()] + [
        "errors"
    ]


def exported(file: Path) -> list[str]:
    """The names in a module's ``__all__``, in its order."""
    for node in ast.parse(file.read_text(encoding="utf-8")).body:
        if isinstance(node, ast.Assign) and ast.unparse(node.targets[0]) == "__all__":
            return [str(name) for name in ast.literal_eval(node.value)]
    raise ValueError(f"{file} has no __all__")


def init_of(room: str) -> Path:
    """The file that says what a room offers."""
    package = PACKAGE / room / "__init__.py"
    return package if package.is_file() else PACKAGE / f"{room}.py"


def public_names(room: str) -> dict[str, str]:
    """What a room offers, and where each is defined: ``{"scan": "causal_probe.probes.scan.scan"}``."""
    file = init_of(room)
    origins = {
        alias.asname or alias.name: f"{node.module}.{alias.name}"
        for node in ast.parse(file.read_text(encoding="utf-8")).body
        if isinstance(node, ast.ImportFrom) and (node.module or "").startswith("causal_probe")
        for alias in node.names
    }
    return {name: origins.get(name, f"causal_probe.{room}.{name}") for name in exported(file)}


def first_paragraph(room: str) -> str:
    """What a room is about: the first paragraph of its docstring."""
    text = ast.get_docstring(ast.parse(init_of(room).read_text(encoding="utf-8"))) or ""
    return " ".join(text.split("\n\n")[0].split())


def api_index() -> str:
    """The page over all rooms."""
    lines = ["# API reference", "", "One page for each room of the package.", ""]
    lines += ["| room | about |", "|---|---|"]
    lines += [f"| [`causal_probe.{room}`]({room}.md) | {plain_roles(first_paragraph(room))} |" for room in rooms()]
    lines += [
        "",
        "`causal_probe.report(result)`, `causal_probe.save(result, folder)` and `causal_probe.load(path)` are those of",
        "[`causal_probe.reports`](reports.md).",
    ]
    return "\n".join(lines) + "\n"


def plain_roles(text: str) -> str:
    """Without Sphinx' roles."""
    return re.sub(r":\w+:`~?([^`]*)`", r"`\1`", text)


def results_of(room: str) -> dict[str, str]:
    """Classes of results that a room's functions return, and that nobody needs to import: not in ``__all__``."""
    if room == "errors":
        return {}
    bases: dict[str, set[str]] = {}
    paths: dict[str, str] = {}
    for file in sorted(init_of(room).parent.glob("*.py")):
        for node in ast.parse(file.read_text(encoding="utf-8")).body:
            if isinstance(node, ast.ClassDef):
                bases[node.name] = {ast.unparse(base) for base in node.bases}
                paths[node.name] = f"causal_probe.{room}.{file.stem}.{node.name}"

    def is_result(name: str) -> bool:
        return name == "Result" or any(is_result(base) for base in bases.get(name, ()))

    known = public_names(room)
    return {name: paths[name] for name in paths if name[0] != "_" and name not in known and is_result(name)}


def api_page(room: str) -> str:
    """The page of a room: its docstring, then every name of its ``__all__``."""
    lines = [
        f"# causal_probe.{room}",
        "",
        f"::: causal_probe.{room}",
        *options(members="[]", show_root_heading="false", show_root_toc_entry="false"),
        "",
    ]
    names = public_names(room)
    groups = {
        "Functions": [name for name in names if name[0].islower()],
        "Classes": [name for name in names if name[0].isupper() and not name.isupper()],
        "Constants": [name for name in names if name.isupper()],
    }
    results = results_of(room)
    names = {**names, **results}
    groups["Results"] = list(results)
    for title, its in groups.items():
        if its:
            lines += [f"## {title}", ""]
        for name in its:
            bare = {"members": "[]"} if room == "options" and name.endswith("Options") else {}
            lines += [f"::: {names[name]}", *options(**bare), ""]
    return "\n".join(lines)


def options(**said: str) -> list[str]:
    """Options of mkdocstrings, below a ``:::``."""
    return ["    options:", *(f"      {key}: {value}" for key, value in said.items())] if said else []


# --------------------------------------------------------------------------------------------------------------- commands


def command_line() -> str:
    """The guide to the commands, from what typer is told of them."""
    sys.path.insert(0, str(ROOT))
    from causal_probe.cli.commands import commands

    before = (Path(__file__).parent / "command-line.md").read_text(encoding="utf-8")
    return "\n".join([before, *(line for name, command in commands() for line in told(name, command))])


def told(name: str, command: Callable[..., None]) -> Iterator[str]:
    """One command: what it is for, examples, and its options by panel."""
    from causal_probe.cli.commands import examples

    yield from [f"## {name}", "", cell(inspect.getdoc(command) or ""), ""]
    its = [(each.name, *get_args(each.annotation)) for each in inspect.signature(command).parameters.values()]
    arguments = [about.metavar for _, _, about in its if not hasattr(about, "param_decls") or about.metavar]
    yield from ["```text", " ".join(["causal-probe", name, *arguments, "[OPTIONS]"]), "```", ""]
    yield from ["```sh", *examples(name), "```", ""]
    panels: dict[str, list[str]] = {}
    for key, hint, about in its:
        flags = about.metavar or " ".join(spelt(about) or [f"--{key.replace('_', '-')}"])
        default = about.show_default if isinstance(about.show_default, str) else ""
        choices = [f"`{value}`" for value in literals(hint)]
        text = " ".join([cell(about.help or ""), *([f"One of {', '.join(choices)}."] if choices else [])])
        panels.setdefault(about.rich_help_panel or "", []).append(f"| `{flags}` | {cell(default)} | {text} |")
    for panel, rows in sorted(panels.items()):
        yield from [f"**{panel}**" if panel else "", "", "| option | default | what |", "|---|---|---|", *rows, ""]


def spelt(about: Any) -> list[str]:
    """The flags that are given to ``typer.Option`` (which takes the first for a default, at first)."""
    given = [about.default, *(getattr(about, "param_decls", None) or [])]
    return [each for each in given if isinstance(each, str) and each.startswith("--")]


def literals(hint: Any) -> list[str]:
    """The choices in a type."""
    return (
        list(get_args(hint))
        if get_origin(hint) is Literal
        else [each for part in get_args(hint) for each in literals(part)]
    )


def cell(text: str) -> str:
    r"""A text in a table's cell. typer's markup escapes are taken back: ``\[``."""
    return text.replace("\\[", "[").replace("|", "\\|").replace("\n", " ").replace("[", "\\[")


# ------------------------------------------------------------------------------------------------------------------ hooks


def on_config(config: Any) -> Any:
    """The API's pages are in the navigation."""
    api = ["api/index.md", *({room: f"api/{room}.md"} for room in rooms())]
    config.nav = [{"API reference": api} if "API reference" in each else each for each in config.nav]
    return config


def on_files(files: Any, config: Any) -> Any:
    """The generated pages, and the files of other folders, are pages like the others."""
    from mkdocs.structure.files import File

    for place, text in pages().items():
        files.append(File.generated(config, place, content=text))
    for source, place in PLACES.items():
        if source == place:  # mkdocs-jupyter reads notebooks from their folder
            files.append(File(place, os.fspath(ROOT), config.site_dir, config.use_directory_urls))
        elif not place.endswith(".md"):
            files.append(File.generated(config, place, abs_src_path=os.fspath(ROOT / source)))
    return files


on_files.mkdocs_priority = 100  # before mkdocs-jupyter looks for notebooks


def on_page_content(html: str, page: Any, config: Any, files: Any) -> str:
    """Notebooks that name each other do so by their pages."""
    return re.sub(r'href="(\d\w+)\.ipynb', r'href="\1.html', html)
