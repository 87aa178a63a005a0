"""Sweeps on a cluster that somebody else has started: real processes of a Dask scheduler and its workers, over TCP."""

from __future__ import annotations

import contextlib
import json
import os
import signal
import socket
import subprocess
import sys
import threading
import time

import pytest

from causal_probe import CausalProbeError
from causal_probe.sweep import Outcome, sweep

SPEC = {
    "probes": "gradient",
    "grid": {"graph_seed": [0, 1], "seed": [0, 1]},
    "settings": {"graph": "forest", "n_positions": 6, "n_sequences": 64},
}


@contextlib.contextmanager
def started(folder, n_workers):
    """The address of a scheduler, and the processes: its own, and those of its workers."""
    file = folder / "scheduler.json"
    command = [sys.executable, "-m", "distributed.cli"]
    names = {"scheduler": ["--port", "0", "--host", "127.0.0.1", "--no-dashboard", "--scheduler-file", str(file)]}
    # Without a nanny, which would start a killed worker anew.
    worker = ["--scheduler-file", str(file), "--nthreads", "1", "--no-nanny", "--no-dashboard", "--host", "127.0.0.1"]
    names |= {f"worker-{i}": [*worker, "--name", str(i), "--local-directory", str(folder)] for i in range(n_workers)}
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join(sys.path), "PYTHONWARNINGS": "ignore"}
    processes = []
    with contextlib.ExitStack() as stack:
        for name, options in names.items():
            module = f"dask_{name.split('-')[0]}"
            log = stack.enter_context(open(folder / f"{name}.log", "wb"))
            process = subprocess.Popen(
                [*command[:2], f"distributed.cli.{module}", *options],
                stdout=log,
                stderr=log,
                env=environment,
                cwd=folder,
            )
            stack.callback(process.wait)
            stack.callback(process.kill)
            processes.append(process)
            while not file.exists():
                assert process.poll() is None, (folder / f"{name}.log").read_text()
                time.sleep(0.05)
        yield json.loads(file.read_text())["address"], processes


#: The module, which the function of the same name hides.
RUN = sys.modules[sweep.__module__]


def contents(folder):
    return {path.name: path.read_bytes() for path in (folder / "cells").iterdir()}


def slow_cell(*, seed: int, a: int, folder: str) -> Outcome:
    """Says which process runs it, and takes its time."""
    with open(os.path.join(folder, f"{a}.{os.getpid()}"), "w"):
        time.sleep(0.2)
    return Outcome([{"score": float(a)}], {})


@pytest.mark.slow
def test_a_scheduler_by_its_address(tmp_path):
    direct = sweep(SPEC, out=tmp_path / "direct")
    with started(tmp_path, 2) as (address, (_, *workers)):
        assert address.startswith("tcp://127.0.0.1:")
        (tmp_path / "spec.yaml").write_text(json.dumps(SPEC))
        command = [
            sys.executable,
            "-c",
            "from causal_probe.cli import main; main()",
            "sweep",
            "spec.yaml",
            "--out",
            "far",
        ]
        command += ["--backend", "dask", "--scheduler", address]
        ran = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True, check=False)
        assert ran.returncode == 0, ran.stderr
        assert contents(tmp_path / "far") == contents(direct.folder)

        # kill -9 of a worker while it runs a cell
        marks = tmp_path / "marks"
        marks.mkdir()
        spec = {"probes": "slow", "grid": {"a": list(range(12))}, "settings": {"folder": str(marks)}}
        killed = []

        def kill():
            while not (running := [path for path in marks.iterdir() if path.suffix == f".{workers[0].pid}"]):
                time.sleep(0.01)
            workers[0].send_signal(signal.SIGKILL)
            killed.extend(running)

        killer = threading.Thread(target=kill)
        killer.start()
        found = sweep(spec, out=tmp_path / "killed", backend="dask", scheduler=address, probes={"slow": slow_cell})
        killer.join()
        assert killed
        assert not found.failed
        assert sorted(found.to_pandas()["score"]) == list(range(12))


@pytest.mark.slow
def test_a_scheduler_that_dies_meanwhile(tmp_path):
    with started(tmp_path, 1) as (address, (scheduler, _)):
        spec = {"probes": "slow", "grid": {"a": list(range(40))}, "settings": {"folder": str(tmp_path)}}
        out = tmp_path / "out"

        def kill():
            while not list(out.glob("cells/*.parquet")):
                time.sleep(0.05)
            scheduler.send_signal(signal.SIGKILL)

        killer = threading.Thread(target=kill)
        killer.start()
        with pytest.raises(CausalProbeError, match="What is finished is kept"):
            sweep(spec, out=out, backend="dask", scheduler=address, probes={"slow": slow_cell})
        killer.join()
    left = contents(out)
    assert 0 < len(left) < 40
    found = sweep(spec, out=out, probes={"slow": slow_cell})
    assert len(found.to_pandas()) == 40
    assert left.items() <= contents(out).items()


@pytest.mark.slow
def test_a_scheduler_without_workers_and_one_that_is_gone(tmp_path, monkeypatch):
    monkeypatch.setattr(RUN, "PATIENCE", 2)
    with started(tmp_path, 0) as (address, _), pytest.raises(CausalProbeError, match="has no workers") as refused:
        sweep(SPEC, out=tmp_path / "none", backend="dask", scheduler=address)
    assert "\n" not in str(refused.value)
    with pytest.raises(CausalProbeError, match="no Dask scheduler at 'tcp://") as refused:
        sweep(SPEC, out=tmp_path / "gone", backend="dask", scheduler=address)
    assert "\n" not in str(refused.value)


@pytest.mark.parametrize("address", ["tcp://127.0.0.1:{free}", "127.0.0.1:{free}", "carrier-pigeon://coop", "nonsense"])
def test_no_scheduler_there(tmp_path, monkeypatch, address):
    monkeypatch.setattr(RUN, "PATIENCE", 1)
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))
        free = taken.getsockname()[1]
    with pytest.raises(CausalProbeError, match="There is no Dask scheduler at") as refused:
        sweep(SPEC, out=tmp_path / "out", backend="dask", scheduler=address.format(free=free))
    assert "\n" not in str(refused.value)


def test_another_backend_is_refused(tmp_path):
    with pytest.raises(CausalProbeError, match=r"`backend` is 'ray'\. It must be 'loky' or 'dask'"):
        sweep(SPEC, out=tmp_path / "out", backend="ray")
