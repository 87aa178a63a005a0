"""The command ``causal-probe recover``: its exit codes, what it prints where, and that it is a thin skin."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch

from causal_probe import experiments
from causal_probe.cli import main
from causal_probe.experiments.recovery import CHECKPOINT_FILE
from causal_probe.reports import write_page
from causal_probe.results import read_arrays
from causal_probe.tasks import InContextMarkov
from causal_probe.viz import Report

SMALL = ["recover", "--graph", "chain", "--n-positions", "4", "--steps", "5", "--batch-size", "16", "--device", "cpu"]


@pytest.fixture(autouse=True)
def _plain_report(monkeypatch: pytest.MonkeyPatch) -> None:
    """The report has its own tests; its pictures take seconds."""
    monkeypatch.setattr("causal_probe.reports.saving.report", lambda result: Report("", [], {}, {}, ""))


def run(*arguments: str) -> int:
    with pytest.raises(SystemExit) as left:
        main(arguments)
    assert isinstance(left.value.code, int)
    return left.value.code


def test_it_says_where_the_report_is(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    out = tmp_path / "out"
    assert run(*SMALL, "--out", str(out)) == 0
    printed = capsys.readouterr().out
    assert "Recovery of chain" in printed
    assert f"Report: {out / 'report.html'}" in printed
    assert {path.name for path in out.iterdir()} == {
        "attention.safetensors", "graph.json", "model", "recovered.json", "report.html", "result.json", "result.safetensors"
    }  # fmt: skip


def test_json_alone_on_standard_output(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    out = tmp_path / "out"
    assert run(*SMALL, "--json", "--out", str(out)) == 0
    printed = capsys.readouterr()
    result = json.loads(printed.out)
    saved = json.loads((out / "result.json").read_text())
    assert saved.pop("files")
    assert saved.pop("sha256")
    assert result == saved
    assert "Report:" in printed.err


def test_options_reach_the_experiment(monkeypatch: pytest.MonkeyPatch) -> None:
    seen: dict[str, object] = {}

    def record(graph: str, **arguments: object) -> object:
        seen.update(graph=graph, **arguments)
        return type("Result", (), {"__repr__": lambda self: "result"})()

    monkeypatch.setattr(experiments, "recover", record)
    options = (
        "--graph two-parent --n-positions 32 --d-vocab 5 --concentration 0.3 --root-probability 0.2 --heads 2,1 --seed 7 "
        "--training joint --optimizer adamw --learning-rate 0.01 --steps 9 --batch-size 11 --device cpu --out x --overwrite"
    )
    assert run("recover", *options.split()) == 0
    assert seen == {
        "graph": "two-parent", "n_positions": 32, "d_vocab": 5, "concentration": 0.3, "root_probability": 0.2, "heads": [2, 1],
        "seed": 7, "training": "joint", "optimizer": "adamw", "learning_rate": 0.01, "steps": 9, "batch_size": 11,
        "device": "cpu", "out": Path("x"), "overwrite": True, "progress": True, "page": write_page,
    }  # fmt: skip


@pytest.mark.parametrize(
    ("options", "words"),
    [
        ("--heads 0,1", "--heads is [0, 1]"),
        ("--heads two", "--heads is ['two']. It must be a sequence, each of it a whole number of at least 1."),
        ("--n-positions 1", "at least 2"),
        ("--concentration 0", "--concentration is 0.0. It must be a finite number of more than 0."),
        ("--concentration nan", "--concentration is nan"),
        ("--concentration -0.1", "--concentration is -0.1"),
        ("--d-vocab 1", "--d-vocab is 1. It must be a whole number of at least 2."),
        ("--device tpu9", "can't be used here"),
        ("--graph nothing-like-it", "neither a family of graphs"),
        ("--training sideways", "is not one of"),
        ("--no-such-option", "No such option"),
    ],
)
def test_bad_input_is_one_error_with_exit_code_2(
    options: str, words: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert run("recover", *options.split(), "--out", str(tmp_path / "out")) == 2
    printed = capsys.readouterr()
    assert words in " ".join(printed.err.split())
    assert printed.out == ""
    assert "Traceback" not in printed.err
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize(
    ("edges", "words"),
    [([[0, 1], [1, 2], [2, 0]], "a cycle in"), ([[1, 0]], "the parent comes after its child")],
)
def test_graph_files_that_are_no_causal_graphs(
    edges: list[list[int]], words: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    path = tmp_path / "graph.json"
    nodes = [{"id": node} for node in range(3)]
    links = [{"source": parent, "target": child} for parent, child in edges]
    path.write_text(json.dumps({"directed": True, "nodes": nodes, "edges": links}))
    assert run("recover", "--graph", str(path), "--out", str(tmp_path / "out")) == 2
    assert words in capsys.readouterr().err
    assert not (tmp_path / "out").exists()


def test_a_folder_that_cannot_be_written(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (tmp_path / "file").write_text("")
    assert run(*SMALL, "--out", str(tmp_path / "file" / "out")) == 2
    assert "Can't make the folder" in capsys.readouterr().err


def test_a_result_of_other_settings_is_kept(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    out = str(tmp_path / "out")
    assert run(*SMALL, "--out", out) == 0
    assert run(*SMALL, "--seed", "1", "--out", out) == 2
    assert "--overwrite" in capsys.readouterr().err
    assert run(*SMALL, "--seed", "1", "--out", out, "--overwrite") == 0
    assert json.loads((tmp_path / "out" / "result.json").read_text())["settings"]["seed"] == 1


def test_an_interruption_leaves_with_130(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def interrupted(*_: object, **__: object) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr(experiments, "recover", interrupted)
    assert run(*SMALL) == 130
    assert capsys.readouterr().err.strip() == "Interrupted; nothing was written."


LONGER = [*SMALL[:-4], "--steps", "400", "--batch-size", "16", "--device", "cpu"]
CHECKPOINT = CHECKPOINT_FILE


def interrupt_after(monkeypatch: pytest.MonkeyPatch, batches: int) -> None:
    """As Ctrl-C does, while a batch is drawn."""
    drawn: list[int] = []
    sample = InContextMarkov.sample

    def interrupted(self: InContextMarkov, *arguments: object, **options: object) -> object:
        drawn.append(1)
        if len(drawn) > batches:
            raise KeyboardInterrupt
        return sample(self, *arguments, **options)  # type: ignore[arg-type]

    monkeypatch.setattr(InContextMarkov, "sample", interrupted)


def weights(out: Path) -> bytes:
    return (out / "model" / "model.safetensors").read_bytes()


def test_the_same_command_goes_on_after_an_interruption(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    out, whole = tmp_path / "out", tmp_path / "whole"
    with monkeypatch.context() as patch:
        interrupt_after(patch, 200)
        assert run(*LONGER, "--out", str(out)) == 130
    said = capsys.readouterr().err.strip().splitlines()[-1]
    assert (
        said == f"Interrupted. The training so far is kept in {out / CHECKPOINT}; the same command goes on from there."
    )
    assert [path.name for path in out.iterdir()] == [CHECKPOINT]
    (out / f".{CHECKPOINT}.causal-probe-partial").write_bytes(b"cut")  # what a kill while it is written leaves

    assert run(*LONGER, "--seed", "1", "--out", str(out)) == 2
    assert "checkpoint of a run with other settings" in capsys.readouterr().err
    assert (
        run("recover", "--method", "gradient", "--out", str(out)) == 2
    )  # it keeps no checkpoints, so this is not its own
    assert run(*LONGER, "--out", str(out)) == 0
    assert run(*LONGER, "--out", str(whole)) == 0
    assert not list(out.rglob("*checkpoint*")) + list(out.rglob("*.partial"))
    assert weights(out) == weights(whole)
    ours, theirs = (json.loads((folder / "result.json").read_text()) for folder in (out, whole))
    assert ours["history"] == theirs["history"]
    assert ours["steps_to_all_parents"] == theirs["steps_to_all_parents"]
    assert ours["provenance"]["threads"] == theirs["provenance"]["threads"] == torch.get_num_threads()

    # A finished result is made anew and stays until the new one is there; other settings need --overwrite.
    with monkeypatch.context() as patch:
        interrupt_after(patch, 200)
        assert run(*LONGER, "--seed", "1", "--overwrite", "--out", str(out)) == 130
    assert weights(out) == weights(whole)
    assert run(*LONGER, "--seed", "1", "--out", str(out)) == 2
    assert (
        run(*LONGER, "--seed", "2", "--overwrite", "--out", str(out)) == 0
    )  # neither the result's settings nor the checkpoint's
    assert json.loads((out / "result.json").read_text())["settings"]["seed"] == 2
    assert not (out / CHECKPOINT).exists()


def test_before_the_first_checkpoint_nothing_is_left(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    interrupt_after(monkeypatch, 3)
    assert run(*LONGER, "--out", str(tmp_path / "out")) == 130
    assert capsys.readouterr().err.strip().splitlines()[-1] == "Interrupted; nothing was written."
    assert list(tmp_path.iterdir()) == []


def test_a_folder_with_files_of_one_s_own_beside_a_checkpoint(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    with monkeypatch.context() as patch:
        interrupt_after(patch, 200)
        assert run(*LONGER, "--out", str(tmp_path / "out")) == 130
    (tmp_path / "out" / "notes.txt").write_text("mine")
    assert run(*LONGER, "--overwrite", "--out", str(tmp_path / "out")) == 2
    assert "is not empty and holds no earlier result" in capsys.readouterr().err


@pytest.mark.slow
def test_killed_and_interrupted_in_the_middle(tmp_path: Path) -> None:
    """kill -9, then Ctrl-C, of the command itself: in the end the weights are those of a run that nothing happened to."""
    out, whole = tmp_path / "out", tmp_path / "whole"
    # What a shell has started in the background ignores Ctrl-C, and so does all that it starts: here it must be heard.
    code = "import signal, sys\nsignal.signal(signal.SIGINT, signal.default_int_handler)\nfrom causal_probe.cli import main\nmain(sys.argv[1:])"
    arguments = [*LONGER, "--training", "joint", "--steps", "1200"]
    command = [sys.executable, "-c", code, *arguments, "--out", str(out)]
    env = {**os.environ, "OMP_NUM_THREADS": str(torch.get_num_threads())}
    for number, expected in ((signal.SIGKILL, -signal.SIGKILL), (signal.SIGINT, 130)):
        before = (out / CHECKPOINT).read_bytes() if (out / CHECKPOINT).exists() else b""
        process = subprocess.Popen(command, env=env, stderr=subprocess.PIPE, text=True)
        while not (out / CHECKPOINT).exists() or (out / CHECKPOINT).read_bytes() == before:
            assert process.poll() is None
            time.sleep(0.02)
        process.send_signal(number)
        said = process.communicate()[1]
        assert process.returncode == expected, said
        assert number == signal.SIGKILL or said.splitlines()[-1].endswith("the same command goes on from there.")
        assert "Traceback" not in said
    assert 0 < read_arrays(out / CHECKPOINT)[1]["step"] < 1200
    assert run(*arguments, "--out", str(out)) == 0
    assert run(*arguments, "--out", str(whole)) == 0
    assert weights(out) == weights(whole)


def test_help_does_not_wait_for_torch() -> None:
    code = (
        "import sys\n"
        "from causal_probe.cli import main\n"
        "try:\n"
        "    main(['recover', '--help'])\n"
        "except SystemExit as left:\n"
        "    assert not left.code\n"
        "assert 'torch' not in sys.modules\n"
    )
    assert "--graph" in subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True).stdout


def test_the_version(capsys: pytest.CaptureFixture[str]) -> None:
    assert run("--version") == 0
    assert capsys.readouterr().out.startswith("causal-probe ")
