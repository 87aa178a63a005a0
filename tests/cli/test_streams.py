"""Standard output and standard error that are full, closed or gone: one line and exit code 2, silence, or the work goes on."""

from __future__ import annotations

import io
import os
import subprocess
import sys
from pathlib import Path

import pytest

from causal_probe.cli.streams import put
from causal_probe.errors import CausalProbeError
from tests.faults import COMMANDS

ROOT = Path(__file__).parents[2]
HERE = {**os.environ, "PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"}
RECOVER = "recover --graph chain --method gradient --n-positions 5 --n-sequences 64"

#: A file of the entry point: in PROBE are words, without quotes.
RUN = ROOT / "tests" / "cli" / "run.py"

pytestmark = pytest.mark.skipif(not sys.platform.startswith("linux"), reason="/dev/full is Linux'")


def shell(line: str, tmp_path: Path) -> tuple[int, str]:
    """The exit code and standard error of a command, as a shell runs it."""
    done = subprocess.run(
        ["bash", "-c", f"set -o pipefail; {line}"], capture_output=True, text=True, cwd=tmp_path,
        env={**HERE, "PROBE": f"{sys.executable} {RUN}"},
    )  # fmt: skip
    return done.returncode, done.stderr


@pytest.mark.parametrize("what", ["--version", "scan --help", f"{RECOVER} --json"])
def test_a_full_disk_is_one_line(what: str, tmp_path: Path) -> None:
    status, said = shell(f"$PROBE {what} > /dev/full", tmp_path)
    assert (status, said.count("\n")) == (2, 1), said
    assert said.startswith("Error: Can't print on standard output: No space left on device.")


def test_a_closed_output_is_one_line(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sys, "stdout", None)
    with pytest.raises(CausalProbeError, match="Standard output is closed"):
        put("found")


@pytest.mark.parametrize("what", ["scan --help"])
def test_a_reader_that_has_gone_is_no_error(what: str, tmp_path: Path) -> None:
    status, said = shell(f"$PROBE {what} | true", tmp_path)
    assert status in (0, 1, 141)  # typer ends with 1 where it prints itself
    assert said == ""


def test_a_full_standard_error_costs_no_work(tmp_path: Path) -> None:
    training = " ".join(COMMANDS["recover"])
    status, _ = shell(f"$PROBE {training} --out made 2> /dev/full", tmp_path)
    assert status == 0
    assert (tmp_path / "made" / "result.json").is_file()


def test_what_has_no_letter_there_is_replaced(monkeypatch: pytest.MonkeyPatch) -> None:
    held = io.BytesIO()
    monkeypatch.setattr(sys, "stdout", io.TextIOWrapper(held, encoding="ascii"))
    put("0.5 ± 0.1")
    assert held.getvalue() == b"0.5 ? 0.1\n"
