"""The package as others get it: built, installed, imported; and what it says where it can't work."""

from __future__ import annotations

import ast
import importlib.metadata
import os
import re
import shutil
import subprocess
import sys
import sysconfig
import tarfile
import venv
import zipfile
from pathlib import Path

import pytest
import yaml

import causal_probe

ROOT = Path(__file__).parents[1]


def run(*command: str | Path, cwd: Path, **environment: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [str(part) for part in command], cwd=cwd, env={**os.environ, **environment}, capture_output=True, text=True
    )


def python(code: str, *, cwd: Path, **environment: str) -> subprocess.CompletedProcess[str]:
    return run(sys.executable, "-c", code, cwd=cwd, **environment)


# ------------------------------------------------------------------------------------------------------ built, installed


def source_files(*, root: Path = ROOT) -> set[str]:
    """The files of the package in the checkout, those behind the link included, relative to the root."""
    return {
        (Path(folder) / name).relative_to(root).as_posix()
        for folder, _, names in os.walk(root / "causal_probe", followlinks=True)
        for name in names
        if not folder.endswith("__pycache__")
    }


@pytest.fixture
def checkout(tmp_path: Path) -> Path:
    """A copy of what a build needs, so that building leaves nothing in the real checkout."""
    copy = tmp_path / "checkout"
    copy.mkdir()
    for name in ("causal_probe", "hooks"):
        shutil.copytree(ROOT / name, copy / name, symlinks=True, ignore=shutil.ignore_patterns("__pycache__"))
    for name in ("pyproject.toml", "README.md", "LICENSE"):
        shutil.copy(ROOT / name, copy / name)
    return copy


def build(kind: str, checkout: Path) -> Path:
    done = run(sys.executable, "-m", "build", "--no-isolation", f"--{kind}", cwd=checkout)
    assert done.returncode == 0, done.stdout + done.stderr
    (archive,) = (checkout / "dist").iterdir()
    return archive


def contents(archive: Path) -> set[str]:
    """The files in a wheel or an sdist (without its outermost folder); every one has to be a plain file."""
    if archive.suffix == ".whl":
        with zipfile.ZipFile(archive) as wheel:
            # The upper half of external_attr is the file's mode; 0o12 is a link's type.
            assert not any(member.external_attr >> 28 == 0o12 for member in wheel.infolist())
            return set(wheel.namelist())
    with tarfile.open(archive) as sdist:
        members = [member for member in sdist.getmembers() if not member.isdir()]
        assert all(member.isreg() for member in members)
        return {member.name.partition("/")[2] for member in members}


def environment_beside_ours(folder: Path) -> Path:
    """A clean virtual environment's python; the dependencies, and only they, are taken from the running one.

    A path file shows it our site-packages, behind its own. Path files are not read in a folder that was itself added by
    one, so an editable install of causal-probe in the running environment stays out of sight.
    """
    venv.create(folder, with_pip=False, symlinks=True)
    target = folder / "bin" / "python"
    inside = run(target, "-c", "import sysconfig; print(sysconfig.get_path('purelib'))", cwd=folder).stdout.strip()
    Path(inside, "dependencies.pth").write_text(sysconfig.get_path("purelib") + "\n", encoding="utf-8")
    return target


def install(what: Path, target: Path, *options: str) -> None:
    done = run(
        *(
            sys.executable,
            "-m",
            "pip",
            "--python",
            target,
            "install",
            "--no-index",
            "--no-deps",
            "--no-build-isolation",
        ),
        *("--ignore-installed", "--disable-pip-version-check", *options, what),
        cwd=what.parent,
    )
    assert done.returncode == 0, done.stdout + done.stderr


def imported_elsewhere(target: Path, folder: Path) -> Path:
    """Import the installed package from a folder that is not the checkout, and run its command; where its hooks lie."""
    folder.mkdir()
    code = (
        "import importlib.util, sys, causal_probe, causal_probe.hooks;"
        "assert importlib.util.find_spec('hooks') is None and 'hooks' not in sys.modules;"
        "print(causal_probe.hooks.__file__, causal_probe.__version__)"
    )
    done = run(target, "-I", "-c", code, cwd=folder)
    assert done.returncode == 0, done.stderr
    file, version = done.stdout.split()
    assert version == causal_probe.__version__
    helped = run(target.with_name("causal-probe"), "--help", cwd=folder)
    assert helped.returncode == 0, helped.stderr
    assert "recover" in helped.stdout
    return Path(file)


@pytest.mark.slow
@pytest.mark.parametrize("kind", ["wheel", "sdist"])
def test_built_and_installed(kind: str, checkout: Path, tmp_path: Path) -> None:
    archive = build(kind, checkout)
    held = contents(archive)
    expected = source_files()
    assert {"causal_probe/py.typed", "causal_probe/hooks/__init__.py"} <= expected
    assert any(name.endswith(".jinja") for name in expected)
    assert expected <= held
    assert not any(name.startswith("hooks/") for name in held)
    if kind == "wheel":
        assert {name.split("/")[0] for name in held - expected} == {
            f"causal_probe-{causal_probe.__version__}.dist-info"
        }

    target = environment_beside_ours(tmp_path / "venv")
    install(archive, target)
    shutil.rmtree(checkout)
    hooks = imported_elsewhere(target, tmp_path / "elsewhere")
    assert hooks.is_relative_to(tmp_path / "venv")
    shipped = hooks.parents[1]
    assert source_files(root=shipped.parent) == expected
    assert not any(path.is_symlink() for path in shipped.rglob("*"))


@pytest.mark.slow
def test_editable_install(checkout: Path, tmp_path: Path) -> None:
    target = environment_beside_ours(tmp_path / "venv")
    install(checkout, target, "--editable")
    assert imported_elsewhere(target, tmp_path / "elsewhere") == checkout / "causal_probe" / "hooks" / "__init__.py"


# --------------------------------------------------------------------------------------------------------------- released


def test_one_version_everywhere() -> None:
    cited = yaml.safe_load((ROOT / "CITATION.cff").read_text(encoding="utf-8"))
    assert cited["version"] == causal_probe.__version__
    named = re.findall(r"causal_probe-([\w.]+)-py3", (ROOT / "README.md").read_text(encoding="utf-8"))
    assert set(named) == {causal_probe.__version__}


def test_the_release_workflow_tests_what_is_claimed_and_keeps_no_secret() -> None:
    text = (ROOT / ".github" / "workflows" / "release.yml").read_text(encoding="utf-8")
    flow = yaml.safe_load(text)
    jobs = flow["jobs"]
    claimed = re.findall(r"Python :: (3\.\d+)", (ROOT / "pyproject.toml").read_text(encoding="utf-8"))
    assert jobs["test"]["strategy"]["matrix"]["python"] == claimed
    assert f">={claimed[0]}" in (ROOT / "pyproject.toml").read_text(encoding="utf-8")
    assert (jobs["build"]["needs"], jobs["publish"]["needs"]) == ("test", "build")
    assert jobs["publish"]["permissions"] == {"id-token": "write"}
    assert flow[True]["push"]["tags"] == ["v*"]  # YAML reads "on" as a truth value
    assert "secrets." not in text
    assert "password" not in text
    (check,) = (step["run"] for step in jobs["build"]["steps"] if step.get("name") == "The tag is the version")
    for tag, fits in ((f"v{causal_probe.__version__}", True), ("v9.9.9", False)):
        assert (run("bash", "-c", check, cwd=ROOT, GITHUB_REF_NAME=tag).returncode == 0) is fits


# --------------------------------------------------------------------------------------------------------------- imported


def test_import_is_light(tmp_path: Path) -> None:
    heavy = "{'torch', 'transformer_lens', 'transformers', 'matplotlib', 'pandas', 'sklearn', 'networkx', 'numpy'}"
    done = python(f"import sys, causal_probe; print({heavy} & set(sys.modules))", cwd=ROOT)
    assert done.stdout.strip() == "set()", done.stderr


@pytest.mark.parametrize("room", ["probes", "hooks", "graphs"])
def test_a_room_brings_what_its_names_need_and_no_model(room: str) -> None:
    heavy = "{'transformer_lens', 'transformers', 'datasets', 'matplotlib', 'pandas', 'sklearn', 'scipy.stats', 'scipy.optimize'}"
    done = python(f"import sys, causal_probe.{room}; print({heavy} & set(sys.modules))", cwd=ROOT)
    assert done.stdout.strip() == "set()", done.stdout + done.stderr


def test_subpackages_come_when_named() -> None:
    done = python("import causal_probe; print(causal_probe.graphs.__name__, causal_probe.results.__name__)", cwd=ROOT)
    assert done.stdout.split() == ["causal_probe.graphs", "causal_probe.results"], done.stderr


def test_names() -> None:
    floors = {path.name for path in (ROOT / "causal_probe").iterdir() if (path / "__init__.py").is_file()}
    above = {"load", "report", "save"}
    # The command line is not for notebooks.
    assert set(causal_probe.__all__) == (floors - {"cli"}) | above | {"errors", "CausalProbeError"}
    assert set(dir(causal_probe)) == {*causal_probe.__all__, "__version__"}
    assert all(getattr(causal_probe, name) is not None for name in causal_probe.__all__)
    with pytest.raises(AttributeError, match="module 'causal_probe' has no attribute 'nothing'"):
        causal_probe.nothing  # noqa: B018 - the access itself is the test


def test_the_type_checker_is_told_of_every_name() -> None:
    """What __getattr__ gives at run time, `if TYPE_CHECKING` declares."""
    tree = ast.parse((ROOT / "causal_probe" / "__init__.py").read_text(encoding="utf-8"))
    declared = {
        alias.name
        for node in tree.body
        if isinstance(node, (ast.If, ast.ImportFrom))
        for inner in ast.walk(node)
        if isinstance(inner, ast.ImportFrom) and (inner.module or "").startswith("causal_probe")
        for alias in inner.names
    }
    assert declared == set(causal_probe.__all__)


# ------------------------------------------------------------------------------------------------ where it can't work


def with_transformer_lens(version: str, folder: Path) -> str:
    """A folder for PYTHONPATH that makes the installed TransformerLens look like another one."""
    info = folder / f"transformer_lens-{version}.dist-info"
    info.mkdir()
    (info / "METADATA").write_text(
        f"Metadata-Version: 2.1\nName: transformer-lens\nVersion: {version}\n", encoding="utf-8"
    )
    return str(folder)


@pytest.mark.parametrize("version", ["2.16.1", "3.8.1", "3.0.0b4"])
def test_old_transformer_lens(version: str, tmp_path: Path) -> None:
    done = python("import causal_probe", cwd=ROOT, PYTHONPATH=with_transformer_lens(version, tmp_path))
    assert done.returncode == 1
    assert done.stderr.splitlines()[-1] == (
        f"ImportError: causal-probe needs TransformerLens 3.9 or newer, and {version} was found: "
        "pip install 'transformer-lens>=3.9,<5'"
    )


@pytest.mark.parametrize("version", ["3.9.0", "3.10.1", "4.0.0rc1", "4.3.0"])
def test_new_transformer_lens(version: str, tmp_path: Path) -> None:
    done = python("import causal_probe", cwd=ROOT, PYTHONPATH=with_transformer_lens(version, tmp_path))
    assert done.returncode == 0, done.stderr


def test_no_transformer_lens(monkeypatch: pytest.MonkeyPatch) -> None:
    def absent(name: str) -> str:
        raise importlib.metadata.PackageNotFoundError(name)

    monkeypatch.setattr(importlib.metadata, "version", absent)
    problem = causal_probe._unmet_requirement()
    assert problem == (
        "causal-probe needs TransformerLens 3.9 or newer, and none was found: pip install 'transformer-lens>=3.9,<5'"
    )


def test_the_command_gives_one_line_and_no_traceback(tmp_path: Path) -> None:
    script = tmp_path / "causal-probe"
    script.write_text("from causal_probe.cli import main\nmain()\n", encoding="utf-8")
    versions = with_transformer_lens("3.8.1", tmp_path)
    done = run(sys.executable, script, cwd=tmp_path, PYTHONPATH=os.pathsep.join([versions, str(ROOT)]))
    assert done.returncode == 2
    assert re.fullmatch(
        r"Error: causal-probe needs TransformerLens 3\.9 or newer, and 3\.8\.1 was found: .*\n", done.stderr
    )


@pytest.mark.skipif(shutil.which("git") is None, reason="needs git, whose checkout of a link this is about")
def test_a_checkout_without_links_says_what_to_do(checkout: Path, tmp_path: Path) -> None:
    """As Git for Windows leaves it; and what the message advises is then done, word by word."""

    def git(*words: str, cwd: Path) -> None:
        done = run("git", *words, cwd=cwd)
        assert done.returncode == 0, done.stderr

    git("init", "--quiet", cwd=checkout)
    git("add", ".", cwd=checkout)
    git("-c", "user.name=x", "-c", "user.email=x@localhost", "commit", "--quiet", "--message=x", cwd=checkout)
    git("clone", "--quiet", "-c", "core.symlinks=false", str(checkout), "clone", cwd=tmp_path)
    clone = tmp_path / "clone"
    link = clone / "causal_probe" / "hooks"
    assert not link.is_symlink()
    assert link.read_text(encoding="utf-8") == "../hooks"

    done = python("import causal_probe", cwd=clone)
    assert done.returncode == 1
    said = done.stderr.splitlines()[-1]
    assert said.startswith("ImportError: causal_probe/hooks must be a link to the folder hooks/ and is not")

    assert "delete the file causal_probe/hooks" in said
    link.unlink()
    assert "causal_probe/hooks" in python("import causal_probe", cwd=clone).stderr  # no link at all: the same words
    commands = [words.split() for words in re.findall(r"`(git [^`]+)`", said)]
    assert len(commands) == 2
    for command in commands:
        git(*command[1:], cwd=clone)
    assert link.is_symlink()
    done = python("import causal_probe.hooks", cwd=clone)
    assert done.returncode == 0, done.stderr
