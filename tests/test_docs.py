"""README and the site: links lead somewhere, Python runs, commands are there, and every public name has a page."""

from __future__ import annotations

import ast
import importlib
import importlib.util
import re
import shlex
import shutil
import subprocess
import sys
from collections.abc import Mapping
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest
import torch

from causal_probe import models
from causal_probe.cli import main

ROOT = Path(__file__).parents[1]
DOCS = ROOT / "docs"
WRITTEN = [ROOT / "README.md", *sorted((DOCS / "pages").rglob("*.md"))]
#: Where what stands in a page is replaced, so that it runs here: no hub.
HUB = "openai-community/gpt2"


def load(name: str) -> ModuleType:
    """A file of docs/, which is no module of the package."""
    spec = importlib.util.spec_from_file_location(f"docs_{name}", DOCS / f"{name}.py")
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


generate = load("generate")


@pytest.fixture(scope="module")
def pages() -> Mapping[str, str]:
    """Every page of the site by its place, the generated ones too."""
    written = {path.relative_to(DOCS / "pages").as_posix(): path.read_text(encoding="utf-8") for path in WRITTEN[1:]}
    return {**written, **generate.pages()}


def blocks(text: str, language: str) -> list[str]:
    return re.findall(rf"^```{language}\n(.*?)^```", text, flags=re.DOTALL | re.MULTILINE)


# ------------------------------------------------------------------------------------------------------------------ links


def slug(heading: str) -> str:
    """As Python-Markdown's table of contents makes it.

    >>> slug("## A pretrained model: which graphs it reads")
    'a-pretrained-model-which-graphs-it-reads'
    """
    words = re.sub(r"[^\w\s-]", "", heading.lstrip("#")).strip().lower()
    return re.sub(r"[-\s]+", "-", words)


def anchors(text: str) -> set[str]:
    return {slug(line) for line in text.splitlines() if line.startswith("#")}


def test_links_of_the_site_lead_to_its_pages(pages: Mapping[str, str]) -> None:
    pictures = {path.relative_to(DOCS / "pages").as_posix() for path in (DOCS / "pages").rglob("*.svg")}
    files = {*pages, *generate.PLACES.values(), *pictures}
    wrong, looked_at = [], 0
    for place, text in pages.items():
        for target in re.findall(r"\]\(([^)\s]+)\)", text):
            if "://" in target:
                continue
            looked_at += 1
            path, _, anchor = target.partition("#")
            found = (ROOT / Path(place).parent / path).resolve().relative_to(ROOT).as_posix() if path else place
            if found not in files or (anchor and anchor not in anchors(pages[found])):
                wrong.append(f"{place}: {target}")
    assert looked_at > 60
    assert not wrong, "\n".join(wrong)


def test_links_of_the_readme_lead_to_files() -> None:
    targets = re.findall(r"\]\(([^)\s]+)\)", WRITTEN[0].read_text(encoding="utf-8"))
    missing = [target for target in targets if "://" not in target and not (ROOT / target.partition("#")[0]).is_file()]
    assert len(targets) > 20
    assert not missing


def test_the_navigation_names_every_page(pages: Mapping[str, str]) -> None:
    named = set(
        re.findall(r"([\w/.-]+\.(?:md|ipynb))$", (DOCS / "mkdocs.yml").read_text(encoding="utf-8"), re.MULTILINE)
    )
    notebooks = {place for place in generate.PLACES.values() if place.endswith(".ipynb")}
    assert named == {place for place in pages if not place.startswith("api/")} | notebooks


# ----------------------------------------------------------------------------------------------------------------- README


def test_the_readme_is_short_and_fits() -> None:
    lines = WRITTEN[0].read_text(encoding="utf-8").splitlines()
    assert len(lines) <= 120
    in_code = False
    for line in lines:
        in_code ^= line.startswith("```")
        if in_code or line.startswith("    "):
            assert len(line) <= 88, line
        elif line.startswith("|"):
            shown = re.sub(r"\]\([^)]*\)", "]", line)
            assert len(shown) <= 110, line


# ----------------------------------------------------------------------------------------------------------------- Python


@pytest.fixture(scope="module")
def hub(tmp_path_factory: pytest.TempPathFactory) -> str:
    """A folder in the place of a name on the hub: a small model with an induction circuit, and a head that is not used."""
    model = models.DisentangledTransformer(d_vocab=24, n_positions=48, heads=(2, 3))
    model.block(0, 0, query="position", key="position").diagonal(-1).fill_(12)
    for head in (0, 1):
        model.block(1, head, query="token", key="L0H0.token").diagonal().fill_(8)
    model.output_block("L1H0.token").diagonal().fill_(10)
    folder = tmp_path_factory.mktemp("hub") / "model"
    models.save(model, folder)
    return str(folder)


@pytest.mark.slow
@pytest.mark.parametrize(
    "path",
    [path for path in WRITTEN if "```python" in path.read_text(encoding="utf-8") and path.stem != "gallery"],
    ids=lambda path: path.stem,
)
def test_python_runs(
    path: Path, hub: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """The blocks of a page in their order. README's training has a test of its own (test_demos), and so has the gallery (below)."""
    monkeypatch.chdir(tmp_path)
    names: dict[str, Any] = {"__name__": path.stem}
    for block in blocks(path.read_text(encoding="utf-8"), "python"):
        code = compile(block.replace(HUB, hub), path.name, "exec")
        if "recover(" not in block:
            torch.manual_seed(0)
            exec(code, names)
    printed = capsys.readouterr().out
    assert printed
    if path.name == "README.md":
        verdicts = dict(
            re.findall(r"^ *(L\dH\d) +\S+ +(causal|redundant|no effect above delta)", printed, re.MULTILINE)
        )
        assert verdicts == {"L0H0": "causal", "L1H0": "causal", "L1H1": "no effect above delta"}


# ------------------------------------------------------------------------------------------------------------------ shell


def commands() -> list[str]:
    texts = [*(path.read_text(encoding="utf-8") for path in WRITTEN), generate.command_line()]
    inline = [found for text in texts for found in re.findall(r"`(causal-probe [^`\n]+)`", text)]
    lines = [line for text in texts for block in blocks(text, "sh") for line in block.replace("\\\n", "").splitlines()]
    # In prose a name in capitals may stand for all of a kind, and a command for itself.
    whole = [line for line in [*lines, *inline] if line != "causal-probe COMMAND --help"]
    return sorted(dict.fromkeys(whole))


def helped(line: str) -> int:
    """The exit code of a command that is asked for its help: its options are read before that."""
    program, *words = shlex.split(line, comments=True)
    assert program == "causal-probe"
    with pytest.raises(SystemExit) as left:
        main([*words, "--help"])
    return int(left.value.code or 0)


@pytest.mark.parametrize("line", commands())
def test_commands_are_there_with_their_options(line: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert helped(line) == 0, capsys.readouterr().err


@pytest.mark.parametrize(
    "line", ["causal-probe scna MODEL", "causal-probe scan MODEL --verfy", "causal-probe scan --blocks"]
)
def test_wrong_commands_are_found(line: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert helped(line) == 2


# ------------------------------------------------------------------------------------------------------------ public names


@pytest.mark.parametrize("room", generate.rooms())
def test_every_public_name_stands_on_the_page_of_its_room(room: str, pages: Mapping[str, str]) -> None:
    """By the module that defines it, which is told from the text alone: it must hold what the import gives."""
    module = importlib.import_module(f"causal_probe.{room}")
    named = generate.public_names(room)
    assert set(named) == set(module.__all__)
    for name, path in named.items():
        assert f"::: {path}\n" in f"{pages[f'api/{room}.md']}\n"
        where, _, its = path.rpartition(".")
        assert getattr(importlib.import_module(where), its) is getattr(module, name)


def test_every_command_and_option_stands_in_the_guide(pages: Mapping[str, str]) -> None:
    from causal_probe.cli.commands import commands, flag
    from causal_probe.options import STUDIES

    guide = pages["guides/command-line.md"]
    sections = dict(
        zip([name for name, _ in commands()], re.split(r"^## ", guide, flags=re.MULTILINE)[1:], strict=True)
    )
    assert all("| `--json` |" in section for section in sections.values())
    for study in STUDIES.values():
        for option in study.options.described().values() if study.command else ():
            if option.help.in_command:
                section = sections[str(study.command)]
                assert flag(option.name) in section or option.name.upper() in section
                assert generate.cell(option.help.text).split(". ")[0] in section


def test_names_in_the_pages_exist() -> None:
    """Such as `probes.scan` or `experiments.recover(...)`, between backticks."""
    rooms = "|".join(generate.rooms())
    looked_at = 0
    for path in WRITTEN:
        for room, name in re.findall(rf"`(?:causal_probe\.)?({rooms})\.(\w+)", path.read_text(encoding="utf-8")):
            if name in ("csv", "json", "safetensors"):  # a file
                continue
            looked_at += 1
            assert hasattr(importlib.import_module(f"causal_probe.{room}"), name), f"{path.name}: {room}.{name}"
    assert looked_at > 30


def test_the_generator_imports_no_torch() -> None:
    code = f"import sys; sys.path.insert(0, {str(DOCS)!r}); import generate; generate.pages(); print('torch' in sys.modules)"
    done = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True)
    assert done.stdout == "False\n", done.stderr


# ------------------------------------------------------------------------------------------------------------------- site


@pytest.mark.slow
@pytest.mark.skipif(importlib.util.find_spec("mkdocs") is None, reason="needs the extra [docs]")
def test_the_site_builds_without_a_warning_and_needs_no_network(tmp_path: Path) -> None:
    command = [sys.executable, "-m", "mkdocs", "build", "--config-file", "docs/mkdocs.yml", "--site-dir", str(tmp_path)]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    files = list(tmp_path.rglob("*.html"))
    assert len(files) > 40
    for file in files:
        text = file.read_text(encoding="utf-8")
        loaded = re.findall(r"<(?:script|link|img|iframe)[^>]+(?:src|href)=\"(?:https?:)?//[^\"]+", text)
        assert not loaded, file
    shutil.rmtree(tmp_path)


def test_pages_hold_no_code_but_what_parses(pages: Mapping[str, str]) -> None:
    for place, text in pages.items():
        for block in blocks(text, "python"):
            ast.parse(block, place)


# ---------------------------------------------------------------------------------------------------------------- gallery


@pytest.mark.slow
def test_the_gallery_s_pictures_are_those_of_its_lines(capsys: pytest.CaptureFixture[str]) -> None:
    """Labels and the shapes that have names, not numbers: those may differ in their last digits between machines."""
    from causal_probe import viz

    def told(svg: str) -> tuple[list[str], list[str]]:
        texts = [re.sub(r"[\d.,\N{MINUS SIGN}-]+", "#", text) for text in re.findall(r"<text[^>]*>([^<]*)</text>", svg)]
        return texts, re.findall(r' id="((?:plain|right|missing|extra|mark|edge|stage|reference)-[^"]*)"', svg)

    gallery = load("gallery")
    drawn = []
    for section, picture in gallery.pictures():
        kept = (gallery.PAGE.parent / section.file).read_text(encoding="utf-8")
        assert told(viz.figure.to_svg(picture, prefix="")) == told(kept), f"{section.title}: run `make gallery`"
        assert len(kept) < 60_000
        drawn.append(Path(section.file).stem)
    assert {*drawn} >= {*viz.__all__} - {"Curve", "Report", "write_svg"}, "a picture of each kind"
    page = gallery.PAGE.read_text(encoding="utf-8")
    assert page.count("\n## ") == page.count("```python") == len(drawn) == len(set(drawn))
