"""A sample of what `make faults` tries of every command that writes: killed, or out of disk, at some file operation."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest

from causal_probe.options import STUDIES
from tests.faults import COMMANDS


def test_every_command_that_writes_is_tried() -> None:
    writing = {study.command for study in STUDIES.values() if study.command and "out" in study.options.described()}
    assert {told[0] for told in COMMANDS.values()} == writing


@pytest.mark.slow
@pytest.mark.skipif(
    not sys.platform.startswith("linux"), reason="forks, and counts what Linux' Python tells an audit hook"
)
def test_a_sample_of_all_points(tmp_path: Path) -> None:
    done = subprocess.run(
        [sys.executable, "-m", "tests.faults", str(tmp_path), "1"],
        capture_output=True,
        text=True,
        cwd=Path(__file__).parents[1],
        env={**os.environ, "OMP_NUM_THREADS": "1", "OPENBLAS_NUM_THREADS": "1", "HF_HUB_OFFLINE": "1"},
    )
    assert done.returncode == 0, done.stderr[-3000:]
    assert len(done.stdout.splitlines()) == len(COMMANDS)
