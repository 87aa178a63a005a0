"""Every command that writes, killed or refused by a full disk at its n-th file operation: ``python -m tests.faults PLACE SAMPLE [COMMAND ...]``.

Children are forked from this one warmed process. After each the same command runs again, and must end with the bytes of a run that nobody
interrupted, and with nothing beside them. SAMPLE is how many points of each command and kind are tried, or ``all``. Clocks stand still, so
that timings are the same; pages are empty, since their pictures take seconds.
"""

from __future__ import annotations

import contextlib
import io
import json
import os
import random
import shutil
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import torch

from causal_probe import papers, viz
from causal_probe.cli import main
from causal_probe.errors import CausalProbeError
from causal_probe.models import DisentangledTransformer, save
from causal_probe.papers.base import Line, Reproduction, Run, Study
from causal_probe.reports import saving
from tests import tiny_huggingface
from tests.own_answers import own_answers
from tests.results.interrupted import DONE, EVENTS, KILLED, MAKING, REFUSED, SURVIVED, full, run, tree

#: What each command is told beside --out and --seed; {} is the folder of what it reads.
TRAINING = ["--n-positions", "5", "--steps", "20", "--batch-size", "64", "--probe-sequences", "512"]
COMMANDS: dict[str, list[str]] = {
    "recover": ["recover", "--graph", "chain", *TRAINING],
    "recover by gradient": [
        "recover",
        "--graph",
        "chain",
        "--method",
        "gradient",
        "--n-positions",
        "5",
        "--n-sequences",
        "64",
    ],
    "recover from tokens": ["recover", "--data", "{}/tokens.npy"],
    "recover in a model": [
        "recover",
        "--graph",
        "chain",
        "--model",
        "{}/model",
        "--n-positions",
        "12",
        "--n-sequences",
        "16",
        "--states",
        "4",
    ],
    "scan": ["scan", "{}/model", "--n-sequences", "2", "--templates", "previous-token"],
    "scan of a corpus": [
        "scan",
        "{}/gpt2",
        "--corpus",
        "{}/corpus.txt",
        "--length",
        "4",
        "--templates",
        "previous-token",
    ],
    "circuit": [
        "circuit",
        "{}/gpt2",
        "--task",
        "{}/prompts.jsonl",
        "--contrast",
        "corrupted",
        "--most",
        "6",
        "--sampled",
        "2",
    ],
    "circuit of nodes": [
        "circuit",
        "{}/gpt2",
        "--task",
        "{}/prompts.jsonl",
        "--strategy",
        "nodes",
        "--keep",
        "0.5",
    ],
    "structure": [
        "structure",
        "{}/gpt2",
        "--n-sentences",
        "8",
        "--n-sequences",
        "4",
        "--length",
        "4",
        "--n-components",
        "1",
    ],
    "merge": ["merge", "{}/shard0", "{}/shard1"],
    "leaderboard": [
        "leaderboard",
        "{}/model",
        "--graphs",
        "chain",
        "--n-positions",
        "12",
        "--n-sequences",
        "16",
        "--states",
        "4",
    ],
    "discover": ["discover", "{}/gpt2", "--text", "t3 t4 t5 t6"],
    "reproduce": ["reproduce", "tiny"],
    "sweep": ["sweep", "{}/spec.yaml"],
}
SEEDED = {"recover", "recover by gradient", "recover in a model", "scan", "reproduce"}
SPEC = {
    "probes": "gradient",
    "grid": {"seed": [0, 1]},
    "settings": {"graph": "chain", "n_positions": 5, "n_sequences": 64},
}


def tiny(run: Run) -> Reproduction:
    """A reproduction of two parts."""
    parts = [run.part(name, lambda: {"value": 0.1 + run.seed, "curve": np.arange(3.0)}) for name in ("one", "two")]
    return Reproduction(
        name="tiny",
        title="Tiny",
        paper=("vonoswald2023",),
        summary="Nothing.",
        lines=(Line("value", parts[0]["value"], 0.1, 0.1, "by hand", True),),
        figures={},
        settings=run.settings,
        arrays={"curve": parts[1]["curve"]},
    )


def prepare(inputs: Path) -> None:
    """What the commands read; clocks stand still, and pages are empty. One thread: the children of a process with more wait for ever."""
    torch.set_num_threads(1)
    time.perf_counter = lambda: 0.0  # type: ignore[assignment]
    setattr(saving, "report", lambda result: viz.Report("", [], {}, {}, ""))  # noqa: B010
    setattr(papers, "REPRODUCTIONS", {"tiny": Study(tiny, "Tiny", (1, 2))})  # noqa: B010
    save(DisentangledTransformer(d_vocab=12, n_positions=24), inputs / "model")
    gpt2 = tiny_huggingface.gpt2()
    gpt2.save_pretrained(inputs / "gpt2")
    (inputs / "prompts.jsonl").write_text(own_answers(gpt2))
    tiny_huggingface.tokenizer().save_pretrained(inputs / "gpt2")
    np.save(inputs / "tokens.npy", np.random.default_rng(0).integers(3, size=(400, 5)))
    (inputs / "corpus.txt").write_text("t3 t4 t5 t6 t7 t8 t9 t10 t11 t12")
    (inputs / "spec.yaml").write_text(json.dumps(SPEC))
    (inputs / "corpus.jsonl").write_text('{"text": "t3 t4 t5 t6 t7 t8 t9 t10"}\n' * 4)
    for i in range(2):
        command(
            [
                "scan",
                "{}/gpt2",
                "--corpus",
                "{}/corpus.jsonl",
                "--length",
                "4",
                "--templates",
                "previous-token",
                "--shard",
                f"{i}/2",
            ],
            inputs,
            f"shard{i}",
        )(inputs, 0)


def command(told: list[str], inputs: Path, out: str = "out", *, seeded: bool = False) -> Callable[[Path, float], None]:
    """The command as ``save(place, mark)``: of the seed ``mark`` where it has one."""

    def save(place: Path, mark: float) -> None:
        given = (
            [each.format(inputs) for each in told]
            + ["--out", str(place / out)]
            + (["--seed", str(int(mark)), "--overwrite"] if seeded else [])
        )
        err = io.StringIO()
        status: Any = None
        try:
            with contextlib.redirect_stdout(io.StringIO()), contextlib.redirect_stderr(err):
                main(given)
        except SystemExit as left:
            status = left.code
        errors = [line for line in err.getvalue().splitlines() if line.startswith("Error: ")]
        if status == 2 and len(errors) == 1:
            raise CausalProbeError(errors[0])
        if status not in (0, None):
            raise AssertionError(f"{given}: {status}, {err.getvalue()}")

    return save


def points(save: Callable[[Path, float], None], above: Path, events: set[str], *, earlier: bool) -> int:
    """How many file operations a run has."""
    place = above / "count"
    place.mkdir()
    if earlier:
        save(place, 1.0)
    heard, told = os.pipe()
    assert run(save, place, sys.maxsize, events, full, told) == DONE
    shutil.rmtree(place)
    n = int(os.read(heard, 100))
    os.close(heard)
    os.close(told)
    return n


def everywhere(name: str, inputs: Path, above: Path, sample: int | None) -> int:
    """Try points of one command; their number."""
    save = command(COMMANDS[name], inputs, seeded=name in SEEDED)
    whole = above / "place"
    whole.mkdir()
    save(whole, 2.0)
    after = tree(whole)
    shutil.rmtree(whole)
    draw, tried = random.Random(name), 0
    kinds: tuple[tuple[set[str], Callable[[], Any], set[int]], ...] = (
        (EVENTS, lambda: os._exit(KILLED), {KILLED, DONE}),
        (MAKING, full, {REFUSED, SURVIVED, DONE}),
    )
    for events, act, expected in kinds:
        for earlier in (False, True) if sample is None else (draw.random() < 0.5,):
            last = points(save, above, events, earlier=earlier)
            chosen = (
                range(1, last + 2) if sample is None else sorted(draw.sample(range(1, last + 1), min(sample, last)))
            )
            for n in chosen:
                place = above / "place"
                place.mkdir()
                if earlier:
                    save(place, 1.0)
                status = run(save, place, n, events, act)
                assert status in expected, (name, n, status)
                save(place, 2.0)
                assert tree(place) == after, (
                    name,
                    n,
                    status,
                    sorted(set(tree(place).items()) ^ set(after.items()))[:4],
                )
                shutil.rmtree(place)
                tried += 1
    return tried


if __name__ == "__main__":
    folder, sample = Path(sys.argv[1]), None if sys.argv[2] == "all" else int(sys.argv[2])
    (folder / "inputs").mkdir()
    prepare(folder / "inputs")
    for name in sys.argv[3:] or COMMANDS:
        print(name, everywhere(name, folder / "inputs", folder, sample), flush=True)
