"""What a command says before it works: its help, its examples, what is misspelt, and what it has loaded."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

import pytest
import typer.main

from causal_probe import models
from causal_probe.cli import main
from causal_probe.cli.commands import commands, examples
from causal_probe.cli.main import app

COMMANDS = dict(commands())


def left_with(*words: str) -> int:
    with pytest.raises(SystemExit) as left:
        main([*words])
    return int(left.value.code or 0)


@pytest.mark.parametrize("name", COMMANDS)
def test_every_option_has_a_text_and_a_default(name: str) -> None:
    shown: Any = typer.main.get_command(app).commands[name]  # type: ignore[attr-defined]
    options = [each for each in shown.params if each.param_type_name == "option" and each.name != "help"]
    chosen_by = {"data", "model"} if name == "recover" else set()  # each chooses a mode, and has no default
    assert options
    for option in options:
        assert len(option.help or "") > 10, option.name
        assert option.required or isinstance(option.show_default, str) or option.name in chosen_by, (
            f"--{option.name} says no default"
        )


@pytest.mark.parametrize("name", COMMANDS)
def test_every_help_has_examples(name: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert left_with(name, "--help") == 0
    said = re.sub(r"\s+", " ", capsys.readouterr().out)
    assert examples(name)
    assert all(line in said for line in examples(name))


@pytest.mark.parametrize(
    ("words", "said"),
    [
        (["scan", "nowhere", "--templates", "inductoin"], "did you mean 'induction'"),
        (["leaderboard", "nowhere", "--graphs", "chian"], "'chian' is neither a family of graphs"),
        (["recover", "--model", "nowhere", "--graph", "chian"], "'chian' is neither a family of graphs"),
        (["discover", "nowhere", "--text", "a b", "--algorithm", "picd"], "picd"),
        (["reproduce", "figure-91"], "'figure-9'"),
        (["scan", "nowhere", "--dtype", "float31"], "float31"),
    ],
)
def test_a_typo_is_found_before_a_model_is_loaded(
    words: list[str], said: str, capsys: pytest.CaptureFixture[str]
) -> None:
    """There is no such model, and that is not what is said."""
    assert left_with(*words) == 2
    error = capsys.readouterr().err
    assert said in re.sub(r"\s+", " ", error)
    assert "nowhere" not in error


def test_a_line_says_what_was_loaded_and_a_bar_how_far_it_is(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    models.save(models.DisentangledTransformer(d_vocab=12, n_positions=24, heads=(2, 3)), tmp_path / "model")
    assert left_with("scan", str(tmp_path / "model"), "--templates", "induction", "--n-sequences", "6", "--json") == 0
    shown = capsys.readouterr()
    lines = [line for line in shown.err.splitlines() if line.startswith("Loaded ")]
    assert len(lines) == 1
    assert re.fullmatch(r"Loaded \S+: 2 layers of 2 and 3 heads, float32 on (cpu|cuda:0)", lines[0])
    assert re.search(r"scanning: 100%.*6/6 .*sequences/s", shown.err)
    assert shown.out.startswith("{")
