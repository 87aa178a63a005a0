"""``causal-probe sweep``: the command, its exit codes, and its one-line errors."""

from __future__ import annotations

import json

import pytest

from causal_probe.cli.main import main
from causal_probe.results import hold

SPEC = """
probes: gradient
grid:
  graph: [chain, {second}]
settings: {{n_positions: 5, n_sequences: 32}}
"""


def run(*arguments):
    with pytest.raises(SystemExit) as ended:
        main(["sweep", *map(str, arguments)])
    return ended.value.code or 0


def test_the_command(tmp_path, capsys):
    (tmp_path / "spec.yaml").write_text(SPEC.format(second="pairs"))
    arguments = (tmp_path / "spec.yaml", "--out", tmp_path / "out")
    assert run(*arguments) == 0
    shown = capsys.readouterr()
    assert "2 of 2 cells finished, 0 failed" in shown.out
    assert "Report: " in shown.out
    assert "the mean of each metric" in (tmp_path / "out" / "report.html").read_text()
    assert "2/2" in shown.err  # the bar
    assert run(*arguments, "--json") == 0
    assert json.loads(capsys.readouterr().out)["finished"] == 2
    with hold(tmp_path / "out"):
        assert run(*arguments) == 2
    error = capsys.readouterr().err
    assert error.startswith("Error: Another process is writing into")
    assert error.count("\n") == 1


def test_a_failed_cell_shows_in_the_exit_code(tmp_path, capsys):
    (tmp_path / "spec.yaml").write_text(SPEC.format(second="nowhere"))
    assert run(tmp_path / "spec.yaml", "--out", tmp_path / "out") == 1
    assert "'nowhere' is neither a family of graphs" in capsys.readouterr().out


@pytest.mark.parametrize(
    ("text", "message"), [("a: [", "can't be read as a YAML file"), ("- 1", "must hold a mapping")]
)
def test_no_spec(tmp_path, capsys, text, message):
    (tmp_path / "spec.yaml").write_text(text)
    assert run(tmp_path / "spec.yaml", "--out", tmp_path / "out") == 2
    assert message in capsys.readouterr().err
    assert not (tmp_path / "out").exists()


def test_an_interruption_says_what_is_kept(tmp_path, capsys, monkeypatch):
    from causal_probe import sweep

    def interrupted(*args, **options):
        raise KeyboardInterrupt

    monkeypatch.setattr(sweep, "sweep", interrupted)
    (tmp_path / "spec.yaml").write_text(SPEC.format(second="pairs"))
    (tmp_path / "out" / "cells").mkdir(parents=True)
    assert run(tmp_path / "spec.yaml", "--out", tmp_path / "out") == 130
    assert "Finished cells are kept" in capsys.readouterr().err
