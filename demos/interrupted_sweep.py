"""Two hundred cells on three sets of workers, and killed ten times: is it the same to the last bit, and is nothing lost?

Run ``python demos/interrupted_sweep.py FOLDER``; ``python demos/interrupted_sweep.py FOLDER 4 3`` takes 4 graphs (instead of 20) and
3 kills (instead of 10). 20 graphs x 5 seeds x 2 trainings are swept (1) by loky, (2) by a local Dask cluster of processes, (3) by loky
again, with ``kill -9`` of a worker or of the main process, in turn, at random moments, and a restart after each. Then:
every file is the same bytes in all three; and none that was there at a kill was written anew.
"""

from __future__ import annotations

import contextlib
import hashlib
import json
import os
import random
import signal
import subprocess
import sys
import time
from pathlib import Path

import psutil


def main(folder: str, graphs: str = "20", kills: str = "10") -> None:
    """Sweep three times and compare."""
    top = Path(folder)
    top.mkdir(parents=True, exist_ok=True)
    spec = {
        "probes": "recover",
        "grid": {"graph_seed": list(range(int(graphs))), "seed": list(range(5)), "training": ["staged", "joint"]},
        "settings": {"graph": "forest", "n_positions": 6, "steps": 10, "batch_size": 64, "probe_sequences": 256},
    }
    (top / "spec.yaml").write_text(json.dumps(spec), encoding="utf-8")  # JSON is YAML
    cells = int(graphs) * 10
    for backend in ("loky", "dask"):
        started = time.perf_counter()
        sweep(top, backend, backend).wait()
        print(f"{backend}: {time.perf_counter() - started:.0f} s, {digest(top / backend)}", flush=True)
    killed, rewritten, lost = interrupt(top, cells, int(kills))
    sweep(top, "killed", "loky").wait()
    print(f"killed {killed} times: {digest(top / 'killed')}; {lost} finished cells lost, {rewritten} written again")
    same = len({digest(top / name) for name in ("loky", "dask", "killed")}) == 1
    count = len(list((top / "loky" / "cells").glob("*.parquet")))
    left = list((top / "killed").rglob("*.partial"))
    print(f"{count} of {cells} cells; identical: {same}; partial files left: {len(left)}")
    sys.exit(not (same and count == cells and not rewritten and not lost and not left))


def sweep(top: Path, name: str, backend: str) -> subprocess.Popen[bytes]:
    """Start the command on the folder ``name``, with two workers."""
    command = [
        sys.executable,
        "-c",
        "from causal_probe.cli import main; main()",
        "sweep",
        "spec.yaml",
        "--out",
        name,
        "--backend",
        backend,
    ]
    with open(top / f"{name}.log", "ab") as log:
        return subprocess.Popen([*command, "--jobs", "2"], cwd=top, stdout=log, stderr=log)


def interrupt(top: Path, cells: int, kills: int) -> tuple[int, int, int]:
    """Kill at random moments; return how often, how many finished files were written again, and how many were lost."""
    chance = random.Random(0)
    written: dict[str, int] = {}
    killed = rewritten = lost = 0
    for turn in range(kills):
        process = sweep(top, "killed", "loky")
        goal = len(written) + max(1, cells // (2 * kills))  # so that there is something left for the last kill
        while process.poll() is None and len(files(top)) < goal:
            time.sleep(0.05)
        time.sleep(chance.random())
        workers = [
            child
            for child in (psutil.Process(process.pid).children(recursive=True) if process.poll() is None else ())
            if "resource_tracker" not in " ".join(child.cmdline())
        ]
        if process.poll() is not None:
            break
        killed += 1
        if turn % 2 and workers:
            chance.choice(workers).send_signal(signal.SIGKILL)
            time.sleep(5 * chance.random())  # it goes on by itself; then the whole of it is stopped
        process.send_signal(signal.SIGKILL)
        process.wait()
        for child in workers:
            with contextlib.suppress(psutil.NoSuchProcess):
                child.kill()
        now = files(top)
        lost += len(written.keys() - now.keys())
        rewritten += sum(now[name] != stamp for name, stamp in written.items() if name in now)
        written = now
        print(f"  kill {killed} ({'worker, then main' if turn % 2 else 'main'}): {len(now)} finished", flush=True)
    return killed, rewritten, lost


def files(top: Path) -> dict[str, int]:
    """When each finished cell was written."""
    return {path.name: path.stat().st_mtime_ns for path in (top / "killed" / "cells").glob("*.parquet")}


def digest(folder: Path) -> str:
    """Of the names and bytes of all finished cells."""
    found = hashlib.sha256()
    for path in sorted((folder / "cells").glob("*.parquet")):
        found.update(path.name.encode() + path.read_bytes())
    return found.hexdigest()[:16]


if __name__ == "__main__":
    os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")
    main(*sys.argv[1:])
