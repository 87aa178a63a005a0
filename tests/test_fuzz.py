"""Generated bad invocations of the commands and calls of the library: each is refused in one line, soon, and nothing is left behind."""

from __future__ import annotations

import contextlib
import io
import os
import random
import signal
import subprocess
import sys
import warnings
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, Literal, get_args, get_origin

import jaxtyping
import pytest

from causal_probe import experiments
from causal_probe.cli import main
from causal_probe.cli.commands import _parts, flag
from causal_probe.errors import CausalProbeError
from causal_probe.models import DisentangledTransformer, save
from causal_probe.options import STUDIES
from causal_probe.options.base import Option
from causal_probe.options.registry import Study
from tests import hostile

INVOCATIONS, CALLS, PROCESSES = 1000, 1000, 20
SECONDS, MEMORY = 60, 2 * 2**30

#: Texts that are no number in any range.
NO_NUMBERS = (
    "a",
    "",
    "nan",
    "1e400",
    "--",
    "0x10",
    "1,5",
    "99999999999999999999",
    "-99999999999999999999",
    "½",
    "1 2",
    "None",
    "\udcff",
)


class TooLong(BaseException):
    """Something takes for ever."""


@pytest.fixture(autouse=True)
def _in_production() -> Iterator[None]:
    """Without the checks of types that the tests add to every function; nothing takes for ever, or all the memory."""

    def give_up(*_: Any) -> None:
        raise TooLong

    signal.signal(signal.SIGALRM, give_up)
    jaxtyping.config.update("jaxtyping_disable", True)
    with contextlib.suppress(OSError):  # the high-water mark is that of this test alone
        Path("/proc/self/clear_refs").write_text("5")
    before = memory("VmRSS")
    yield
    jaxtyping.config.update("jaxtyping_disable", False)
    assert memory("VmHWM") - before < MEMORY


def memory(which: str) -> int:
    """Bytes of this process; 0 where the system doesn't say."""
    try:
        return int(Path("/proc/self/status").read_text().split(f"{which}:")[1].split()[0]) * 1024
    except FileNotFoundError:
        return 0


@contextlib.contextmanager
def soon() -> Iterator[None]:
    signal.alarm(SECONDS)
    try:
        yield
    finally:
        signal.alarm(0)


@pytest.fixture(scope="module")
def place(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with a model, and with files that are none."""
    here = tmp_path_factory.mktemp("fuzz")
    save(DisentangledTransformer(d_vocab=12, n_positions=24), here / "model")
    (here / "empty").mkdir()
    (here / "foreign").mkdir()
    (here / "foreign" / "letter.txt").write_text("dear")
    files = {
        "nothing.json": b"", "brackets.json": b"[" * 5000, "list.json": b"[1, 2]", "null.json": b"null", "nan.json": b'{"nodes": NaN}', "bytes.json": bytes(range(256)),
        "nothing.txt": b"", "nan.txt": b"0 1 nan\n", "backward.txt": b"5 2\n", "letters.txt": b"a b\n", "edges.dot": b"digraph { 0 -> 1 }", "nothing.yaml": b"",
        "alias.yaml": b"graph: &a [*a]\n", "brackets.yaml": b"[" * 5000, "unknown.yaml": b"probes: nosuch\n", "tag.yaml": b"!!python/object/apply:os.system ['true']",
        "surrogate.yaml": b'probes: "\\ud800"\n', "grid.yaml": b"probes: gradient\ngrid: {" + b", ".join(b"o%d: [1, 2, 3, 4, 5, 6, 7, 8, 9]" % i for i in range(15)) + b"}\n",
        "huge.npy": b"\x93NUMPY\x01\x00v\x00" + b"{'descr': '<i8', 'fortran_order': False, 'shape': (1000000000000000,), }".ljust(117) + b"\n",
        "objects.npy": b"\x93NUMPY\x01\x00v\x00" + b"{'descr': '|O', 'fortran_order': False, 'shape': (1,), }".ljust(117) + b"\n",
        "numbers.csv": b"1,2\n3,4\n", "lines.jsonl": b'{"text": null}\n', "deep.jsonl": b"[" * 100_000 + b"\n", "lone.jsonl": b'{"text": "\\ud800"}\n', "model.gguf": b"GGUF" + bytes(60),
        "pointer.safetensors": b"version https://git-lfs.github.com/spec/v1\n", "page.html": b"<p>",
    }  # fmt: skip
    for name, content in files.items():
        (here / name).write_bytes(content)
    os.mkfifo(here / "pipe")
    return here


def tree(folder: Path) -> dict[str, int | None]:
    return {
        str(path.relative_to(folder)): path.stat().st_mtime_ns if path.is_file() else None for path in folder.rglob("*")
    }


# --------------------------------------------------------------------------------------------------------- the commands


def bad_text(option: Option, draw: random.Random, place: Path) -> str | None:
    """What an option refuses, as a text; None where it takes every text."""
    parts, about = _parts(option.hint), option.help
    if any(part in (int, float) for part in parts) and str not in parts:
        beyond = [str(edge - 1) for edge in (about.least,) if edge is not None] + [
            str(edge + 1) for edge in (about.most,) if edge is not None
        ]
        beyond += [str(edge) for edge in (about.above, about.below) if edge is not None]
        whole = float not in parts
        return draw.choice([text for text in (*NO_NUMBERS, *beyond) if whole or "9999" not in text])
    if all(get_origin(part) is Literal for part in parts):
        return draw.choice(["maybe", "", "\udcff", "x" * 3000, *(f"{word}s" for word in get_args(parts[0]))])
    if option.name in ("graph", "graphs"):
        named = [
            "chian",
            "lag-0",
            "lag-x",
            "",
            "/nowhere/graph.json",
            "~nouser/g.json",
            "x" * 5000,
            "chain,chain,chian",
        ]
        files = [
            "nothing.json",
            "brackets.json",
            "list.json",
            "null.json",
            "nan.json",
            "bytes.json",
            "nothing.txt",
            "nan.txt",
            "backward.txt",
            "letters.txt",
            "edges.dot",
            "pipe",
            "empty",
        ]
        return draw.choice([*named, *(str(place / name) for name in files)])
    if option.name == "out":
        return draw.choice(
            [str(place / name) for name in ("foreign", "nothing.json", "nothing.json/x", "pipe")]
            + [".", "/", "~nouser/x", "x" * 5000, "a\0b" if False else "/proc/x"]
        )
    if option.name == "templates":
        return draw.choice(["inductoin", "previous-token,nosuch", "offset-", "x" * 4000, "induction-0"])
    if option.name == "corpus":
        return draw.choice(
            [str(place / name) for name in ("lines.jsonl", "deep.jsonl", "page.html", "pipe", "empty", "nowhere.txt")]
            + ["~nouser/c.txt"]
        )
    if option.name in ("shard",):
        return draw.choice(["2/2", "a/b", "1", "-1/2", "0/0", "99999999999999999999/3"])
    if option.name == "device":
        return draw.choice(["gpu", "cuda:99", "cuda:x", ""])
    if option.name == "dtype":
        return draw.choice(["float17", "", "int8"])
    return None


def bad_subject(study: Study, draw: random.Random, place: Path) -> str:
    files = [
        "nothing.json", "bytes.json", "empty", "foreign", "page.html", "pipe", "model.gguf", "pointer.safetensors", "huge.npy", "objects.npy", "numbers.csv",
        "alias.yaml", "brackets.yaml", "unknown.yaml", "tag.yaml", "surrogate.yaml", "grid.yaml", "nothing.yaml", "nowhere",
    ]  # fmt: skip
    return draw.choice(
        [*(str(place / name) for name in files), "", "~nouser/x", "x" * 5000, "\udcff", "/dev/null", "a/b/c", "../.."]
    )


def invocation(draw: random.Random, place: Path) -> list[str]:
    """A command with at least one thing that can't be worked with."""
    kind = draw.random()
    by_command: dict[str, list[tuple[str, Study]]] = {}
    for name, its in STUDIES.items():
        if its.command is not None:
            by_command.setdefault(its.command, []).append((name, its))
    command = draw.choice(list(by_command))
    _, study = draw.choice(by_command[command])
    if kind < 0.03:
        return draw.choice([["nosuch"], ["--nosuch"], [command[:-1]], [command, "--help="], ["-x", command]])
    given: list[str] = [command]
    subject, bad = study.options.subject, False
    if subject is not None:
        bad = draw.random() < 0.35
        value = bad_subject(study, draw, place) if bad else str(place / "model")
        given += [value] if len(by_command[command]) == 1 else [flag(subject.name), value]
    elif command == "reproduce":
        bad = draw.random() < 0.3
        given.append("noone" if bad else "mesa")
    elif study.method:
        given += ["--method", study.method]
    options = [
        option
        for option in study.options.described().values()
        if option.help.in_command and not (option.positional and option.required)
    ]
    draw.shuffle(options)
    n_bad = 0 if bad and draw.random() < 0.5 else draw.choice([1, 1, 1, 2, 3])
    for option in options:
        if n_bad and (text := bad_text(option, draw, place)) is not None:
            given += [flag(option.name), text] if draw.random() < 0.7 else [f"{flag(option.name)}={text}"]
            n_bad, bad = n_bad - 1, True
    if not bad or draw.random() < 0.1:
        given.append(
            draw.choice(
                ["--nosuch", "--seed", "stray", "--see", "-1", "--json=x", "--"]
                if bad
                else ["--nosuch", "--nosuch=3", "-q"]
            )
        )
    if "--out" not in " ".join(given) and any(option.name == "out" for option in options):
        given += ["--out", str(place / "out")]
    return given


def said_by(run: Callable[[], Any]) -> tuple[int | None, str, str]:
    out, err = io.StringIO(), io.StringIO()
    status: Any = None
    with soon(), contextlib.redirect_stdout(out), contextlib.redirect_stderr(err), warnings.catch_warnings():
        try:
            run()
        except SystemExit as left:
            status = left.code
    return status, out.getvalue(), err.getvalue()


def test_a_thousand_bad_invocations(place: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(place / "empty")
    before = tree(place)
    for number in range(INVOCATIONS):
        given = invocation(random.Random(number), place)
        try:
            status, out, err = said_by(lambda given=given: main(given))  # type: ignore[misc]
            assert status == 2
            said = [
                line for line in err.splitlines() if not line.startswith("Loaded ")
            ]  # which model was loaded before
            assert len(said) == 1
            assert said[0].startswith("Error: ")
            assert len(err) < 2500
            assert not out
            assert tree(place) == before
        except BaseException as error:
            shown = [text if len(text) < 200 else f"{text[:50]}..." for text in given]
            raise AssertionError(f"invocation {number}: {shown}") from error


#: A process that says at its end, in a file, how much memory it has had. `VmHWM` begins anew with the program; the maximum of
#: `getrusage` does not: it starts at what the process that called this one held, here all that the tests before have loaded.
MEASURED = """
import atexit, os, re
from pathlib import Path
from causal_probe.cli import main
def peak():
    return re.search(r"VmHWM:\\s+(\\d+) kB", Path("/proc/self/status").read_text())[1]
atexit.register(lambda: Path(os.environ["MEASURED"]).write_text(peak()))
main()
"""


def test_twenty_processes(place: Path, tmp_path: Path) -> None:
    before, measured = tree(place), tmp_path / "kilobytes"
    for number in range(PROCESSES):
        given = invocation(random.Random(f"process {number}"), place)
        given = [text.replace("\udcff", "x") for text in given]
        done = subprocess.run(
            [sys.executable, "-c", MEASURED, *given], capture_output=True, text=True, timeout=4 * SECONDS, cwd=place / "empty",
            env={**os.environ, "PYTHONPATH": str(Path(__file__).parents[1]), "OMP_NUM_THREADS": "1", "MEASURED": str(measured)},
        )  # fmt: skip
        assert (done.returncode, done.stderr.count("\n"), done.stdout) == (2, 1, ""), (given, done.stderr[-2000:])
        assert int(measured.read_text()) * 1024 < MEMORY, given
        measured.unlink()
    assert tree(place) == before


# ---------------------------------------------------------------------------------------------------------- the library


def changes(name: str, draw: random.Random) -> dict[str, Any]:
    """Some of the arguments of a good call, made bad."""
    arguments = list(hostile.good(name)[1])
    found: dict[str, Any] = {}
    for argument in draw.sample(arguments, min(len(arguments), draw.choice([1, 1, 2, 3]))):
        if argument in ("tokens", "reference"):
            found[argument] = draw.choice([make for make, _ in hostile.BAD_TOKENS.values()])()
        elif argument == "model" and draw.random() < 0.5:
            found[argument] = draw.choice(list(hostile.BAD_MODELS.values()))()
        else:
            found[argument] = draw.choice(list(hostile.scalars(argument).values()))
    return found


def study_call(draw: random.Random) -> tuple[str, dict[str, Any]]:
    """A study with an option that its class refuses."""
    name = draw.choice([name for name, its in STUDIES.items() if its.place == "experiments"])
    options = STUDIES[name].options
    while True:
        option = draw.choice(list(options.described()))
        value = draw.choice(list(hostile.SCALARS.values()))
        try:
            options.allowed(option, value)
        except CausalProbeError:
            return name, {option: value}


def test_a_thousand_bad_calls(place: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(place / "empty")
    n_refused = 0
    for number in range(CALLS):
        draw = random.Random(f"call {number}")
        name: str
        if draw.random() < 0.25:
            name, given = study_call(draw)
            subject = [] if STUDIES[name].options.subject is None else [hostile.own_model()]
            run = lambda: getattr(experiments, name)(*subject, **given)  # noqa: E731, B023
        else:
            name = draw.choice(list(hostile.GOOD))
            given = changes(name, draw)
            run = lambda: hostile.call(name, **given)  # noqa: E731, B023
        try:
            with soon():
                n_refused += hostile.refusal(run) is not None
        except BaseException as error:
            shown = {key: str(value)[:60] for key, value in given.items()}
            raise AssertionError(f"call {number}: {name}({shown})") from error
    assert n_refused > 0.7 * CALLS
