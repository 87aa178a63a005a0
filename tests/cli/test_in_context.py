"""``causal-probe recover --model`` and ``causal-probe leaderboard``: exit codes, what is printed where, what is refused."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from causal_probe import graphs
from causal_probe.cli import main
from causal_probe.models import hand_set, save


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> str:
    """A saved model that is made for the chain."""
    folder = tmp_path_factory.mktemp("models") / "chain"
    save(hand_set(graphs.chain(23), 4, match_scale=12.0, output_scale=4.0), folder)
    return str(folder)


def run(*arguments: str) -> int:
    with pytest.raises(SystemExit) as left:
        main(arguments)
    assert isinstance(left.value.code, int)
    return left.value.code


def test_a_model_reads_a_graph(model: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    out = str(tmp_path / "out")
    options = ("--graph", "chain", "--states", "4", "--n-sequences", "8", "--n-positions", "24", "--no-verify")
    assert run("recover", "--model", model, *options, "--out", out) == 0
    shown = capsys.readouterr().out
    assert "1 head sees the graph" in shown
    assert "Report: " in shown
    assert sorted(path.name for path in Path(out).iterdir()) == ["report.html", "result.json", "result.safetensors"]


def test_a_leaderboard_as_json(model: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert run("leaderboard", model, "--graphs", "chain,pairs", "--states", "4", "--n-sequences", "4", "--json") == 0
    found = json.loads(capsys.readouterr().out)
    assert [reading["settings"]["graph"] for reading in found["readings"]] == ["chain", "pairs"]


@pytest.mark.parametrize(
    ("arguments", "wording"),
    [
        (("recover", "--model", "MODEL", "--heads", "2,1"), "--heads (only with --method training)"),
        (
            ("recover", "--model", "MODEL", "--d-vocab", "4"),
            "--d-vocab (only with --method training, --method gradient or --data --method gradient)",
        ),
        (
            ("recover", "--states", "4"),
            "With --method training these options mean nothing: --states (only with --model)",
        ),
        (("recover", "--model", "MODEL", "--graph", "chain", "--states", "9"), "fewer than the 9 states"),
        (("recover", "--model", "MODEL", "--graph", "lag-0"), "neither a family of graphs"),
        (("recover", "--model", "MODEL", "--graph", "chain", "--n-positions", "99"), "has room for 24"),
        (("leaderboard", "MODEL", "--graphs", "chain,chain"), "named twice"),
    ],
)
def test_bad_input(arguments: tuple[str, ...], wording: str, model: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert run(*(model if word == "MODEL" else word for word in arguments)) == 2
    said = capsys.readouterr().err
    assert wording in said
    errors = [line for line in said.splitlines() if not line.startswith("Loaded ")]
    assert len(errors) == 1
