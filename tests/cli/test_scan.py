"""The command ``causal-probe scan``: its exit codes, what it prints where, and that it is a thin skin."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import pytest

from causal_probe import experiments
from causal_probe.cli import main
from causal_probe.models import DisentangledTransformer, save
from causal_probe.reports import write_page
from causal_probe.viz import Report


@pytest.fixture(autouse=True)
def _plain_report(monkeypatch: pytest.MonkeyPatch) -> None:
    """The report has its own tests; its pictures take seconds."""
    monkeypatch.setattr("causal_probe.reports.saving.report", lambda result: Report("", [], {}, {}, ""))


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> str:
    """A saved model whose first head looks one back."""
    made = DisentangledTransformer(d_vocab=12, n_positions=24)
    made.block(0, 0, query="position", key="position").diagonal(-1).fill_(30)
    folder = tmp_path_factory.mktemp("models") / "one-back"
    save(made, folder)
    return str(folder)


def run(*arguments: str) -> int:
    with pytest.raises(SystemExit) as left:
        main(arguments)
    assert isinstance(left.value.code, int)
    return left.value.code


def test_a_table_on_screen_and_where_the_report_is(
    model: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    out = tmp_path / "out"
    assert run("scan", model, "--n-sequences", "4", "--out", str(out)) == 0
    printed = capsys.readouterr().out
    (line,) = (line for line in printed.splitlines() if line.split()[:2] == ["previous-token", "L0H0"])
    assert line.split()[2] == "1.000"
    assert line.split()[-1] == "yes"
    assert f"Report: {out / 'report.html'}" in printed
    assert {path.name for path in out.iterdir()} == {"report.html", "scan.csv", "scan.json", "scan.safetensors"}


def test_json_alone_on_standard_output(model: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    out = tmp_path / "out"
    assert run("scan", model, "--n-sequences", "4", "--verify", "--attributions", "--json", "--out", str(out)) == 0
    printed = capsys.readouterr()
    result = json.loads(printed.out)
    saved = json.loads((out / "scan.json").read_text())
    assert saved.pop("files")
    assert saved.pop("sha256")
    assert result == saved
    head = result["heads"][0]
    assert (head["layer"], head["head"], head["template"]) == (0, 0, "previous-token")
    assert {"score", "chance", "excess", "stderr", "sink"} <= set(head)
    # The model looks one back and copies nothing: on a task that it doesn't do there are no verdicts.
    assert "does not surely do the task" in result["verification"]["undefined"]["verdicts"]
    assert result["verification"]["verdicts"] == []
    assert result["settings"]["delta"] == 0.05
    assert "Report:" in printed.err


def test_options_reach_the_experiment(monkeypatch: pytest.MonkeyPatch) -> None:
    seen: dict[str, object] = {}

    def record(model: str, **arguments: object) -> object:
        seen.update(model=model, **arguments)
        return type("Result", (), {"__repr__": lambda self: "result"})()

    monkeypatch.setattr(experiments, "scan", record)
    options = (
        "some/model --bos yes --batch-size 3 --corpus texts --length 9 --separator -- --field body --shard 1/4 --dtype bfloat16 --device cpu --verify --attributions --top 4 --seed 7 "
        "--out x --overwrite"
    )
    assert run("scan", *options.split(), "--templates", "induction, offset-3") == 0
    assert seen == {
        "model": "some/model", "templates": ["induction", "offset-3"], "bos": "yes",
        "batch_size": 3, "corpus": "texts", "length": 9, "separator": "--", "field": "body", "shard": "1/4", "dtype": "bfloat16", "device": "cpu", "verify": True, "attributions": True, "top": 4, "seed": 7, "out": Path("x"), "page": write_page,
        "overwrite": True, "progress": True,
    }  # fmt: skip


@pytest.mark.parametrize(
    ("options", "words"),
    [
        (
            "--templates inductoin",
            "did you mean 'induction'? The known ones: previous-token, ",
        ),
        ("--templates own.py:f", "names no file"),
        ("--bos maybe", "is not one of"),
        ("--bos yes", "the model names none"),
        ("--period 1000", "Two copies of 1000 different tokens"),
        ("--n-sequences 0", "--n-sequences is 0. It must be a whole number of at least 1"),
        ("--batch-size 0", "--batch-size is 0. It must be a whole number of at least 1"),
        ("--top 0", "--top is 0. It must be a whole number of at least 1"),
        ("--dtype float12", "float12"),
        ("--device tpu9", "can't be used here"),
        ("--length 8", "--length is about a corpus, and none was given"),
        ("--corpus nowhere", "the model has no tokenizer"),
        ("--no-such-option", "No such option"),
    ],
)
def test_bad_input_is_one_error_with_exit_code_2(
    options: str, words: str, model: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert run("scan", model, *options.split(), "--out", str(tmp_path / "out")) == 2
    printed = capsys.readouterr()
    assert words in " ".join(printed.err.split())
    assert printed.out == ""
    assert "Traceback" not in printed.err
    assert list(tmp_path.iterdir()) == []


def test_a_hub_name_without_a_network(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setenv("HF_HUB_CACHE", str(tmp_path))
    assert run("scan", "nobody/has-this-model") == 2
    error = capsys.readouterr().err
    assert "hub can't be reached" in error
    assert len(error.strip().splitlines()) == 1


def test_a_folder_without_a_model(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert run("scan", str(tmp_path)) == 2
    assert "holds no model" in capsys.readouterr().err


def test_no_model_at_all(capsys: pytest.CaptureFixture[str]) -> None:
    assert run("scan") == 2
    assert "Missing argument" in capsys.readouterr().err


def test_merging_names_what_is_missing(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert run("merge", str(tmp_path)) == 2
    assert "No scan was saved in" in capsys.readouterr().err
    assert run("merge") == 2


def test_help_does_not_wait_for_torch() -> None:
    code = (
        "import sys\n"
        "from causal_probe.cli import main\n"
        "try:\n"
        "    main(['scan', '--help'])\n"
        "except SystemExit as left:\n"
        "    assert not left.code\n"
        "assert 'torch' not in sys.modules\n"
    )
    shown = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True).stdout
    assert "--templates" in shown
