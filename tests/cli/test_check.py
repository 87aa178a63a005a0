"""The command ``causal-probe check``."""

from __future__ import annotations

import json

import pytest

from causal_probe.cli import main
from tests import tiny_huggingface as tiny


@pytest.fixture
def run(capsys):
    """Runs the command; gives the exit code, what it prints, and what it complains about."""

    def run(*arguments):
        with pytest.raises(SystemExit) as left:
            main(["check", *map(str, arguments), "--device", "cpu"])
        return left.value.code, *capsys.readouterr()

    return run


def test_a_sound_model(run, tmp_path):
    tiny.gpt2().save_pretrained(tmp_path / "tiny")
    code, out, _ = run(tmp_path / "tiny")
    assert code == 0
    assert out.startswith("tiny: 2 layers of 2 heads, 50 tokens, context 32, float32 on cpu\n")
    assert "FAILS" not in out
    code, out, _ = run(tmp_path / "tiny", "--json", "--dtype", "float64")
    assert code == 0
    assert json.loads(out)["model"]["dtype"] == "float64"


def test_a_model_on_which_not_all_works(run, tmp_path):
    tiny.opt().save_pretrained(tmp_path / "tiny")
    code, out, _ = run(tmp_path / "tiny")
    assert code == 1
    assert "  FAILS  edit attention" in out


def test_no_model(run):
    code, out, err = run("nobody/no-model")
    assert (code, out) == (2, "")
    assert err.startswith("Error: There is no folder nobody/no-model, and the Hugging Face hub can't be reached")
    assert err.count("\n") == 1
