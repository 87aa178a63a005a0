"""Killed, or out of disk, at any file operation: the next run ends with the same bytes, and nothing is left beside them."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest


@pytest.mark.skipif(
    not sys.platform.startswith("linux"), reason="forks, and counts what Linux' Python tells an audit hook"
)
@pytest.mark.parametrize(("what", "points"), [("file", 8), pytest.param("folder", 60, marks=pytest.mark.slow)])
def test_at_every_file_operation(what: str, points: int, tmp_path: Path) -> None:
    done = subprocess.run(
        [sys.executable, "-m", "tests.results.interrupted", what, str(tmp_path)],
        capture_output=True,
        text=True,
        cwd=Path(__file__).parents[2],
        env={**os.environ, "OMP_NUM_THREADS": "1", "OPENBLAS_NUM_THREADS": "1"},
    )
    assert done.returncode == 0, done.stderr[-3000:]
    assert int(done.stdout) > 6 * points  # killed, refused, and refused what makes; with an earlier result and without
