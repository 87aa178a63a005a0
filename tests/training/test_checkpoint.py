"""A run that is killed and goes on ends as one that was never interrupted, to the last bit."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from causal_probe import graphs
from causal_probe.errors import CausalProbeError
from causal_probe.models import DisentangledTransformer
from causal_probe.results import write_arrays
from causal_probe.tasks import InContextMarkov
from causal_probe.training import fit, give_matcher
from causal_probe.training.checkpoint import Checkpoint
from causal_probe.training.loop import History
from causal_probe.training.stages import Stage

TASK = InContextMarkov(graphs.chain(5), 3, concentration=0.3)
STAGES = (
    Stage("the graph", 6, 32, "sgd", 100.0, moves=("A0.position",)),
    Stage("the rest", 9, 32, "adamw", 0.03, moves=("A1", "W_U"), schedule="cosine", weight_decay=0.1),
)


class Stop(Exception):
    """What ends a run before its time."""


def run(
    checkpoint: Checkpoint | None, *, until: int | None = None, seed: int = 0
) -> tuple[DisentangledTransformer, History | None]:
    model = DisentangledTransformer(3, 6)
    give_matcher(model)

    def stop(step: int, model: DisentangledTransformer) -> None:
        if checkpoint is not None:
            checkpoint.notes["seen"] = step
        if step == until:
            raise Stop

    try:
        history = fit(
            model,
            TASK,
            STAGES,
            generator=torch.Generator().manual_seed(seed),
            callback=stop,
            checkpoint=checkpoint,
        )
    except Stop:
        return model, None
    return model, history


def same(a: DisentangledTransformer, b: DisentangledTransformer) -> bool:
    return all(torch.equal(x, y) for x, y in zip(a.parameters(), b.parameters(), strict=True))


@pytest.mark.parametrize("until", [1, 2, 5, 6, 7, 8, 13, 15])
def test_goes_on_as_if_nothing_had_happened(until: int, tmp_path: Path) -> None:
    """Stopped in each stage, on its border, on a checkpoint's step and between two, and after the end."""
    whole, history = run(None)
    settings = {"seed": 0}
    run(Checkpoint(tmp_path / "c", settings, every=2), until=until)
    again, resumed = run(Checkpoint(tmp_path / "c", settings, every=2))
    assert resumed == history
    assert same(whole, again)


def test_notes_come_back(tmp_path: Path) -> None:
    run(Checkpoint(tmp_path / "c", {}, every=2), until=5)
    later = Checkpoint(tmp_path / "c", {})
    assert later.load(DisentangledTransformer(3, 6), torch.Generator()) is not None
    assert later.notes == {"seen": 3}  # written before step 4
    later.delete()
    later.delete()
    assert later.load(DisentangledTransformer(3, 6), torch.Generator()) is None


def test_a_finished_run_is_not_run_again(tmp_path: Path) -> None:
    first, history = run(Checkpoint(tmp_path / "c", {}))
    calls: list[int] = []
    model = DisentangledTransformer(3, 6)
    again = fit(
        model,
        TASK,
        STAGES,
        generator=torch.Generator(),
        probe=lambda step, model: calls.append(step),
        probe_every=4,
        checkpoint=Checkpoint(tmp_path / "c", {}),
    )
    assert again == history
    assert same(first, model)
    assert calls == [15]


def test_the_number_of_threads_is_taken_up_again_and_given_back(tmp_path: Path) -> None:
    before = torch.get_num_threads()
    try:
        torch.set_num_threads(2)
        run(Checkpoint(tmp_path / "c", {}, every=2), until=5)
        torch.set_num_threads(1)
        seen = []
        fit(
            DisentangledTransformer(3, 6),
            TASK,
            STAGES,
            generator=torch.Generator(),
            callback=lambda step, model: seen.append(torch.get_num_threads()),
            checkpoint=Checkpoint(tmp_path / "c", {}),
        )
        assert set(seen) == {2}
        assert torch.get_num_threads() == 1
    finally:
        torch.set_num_threads(before)


def test_other_settings_and_broken_files_are_one_clear_error(tmp_path: Path) -> None:
    path = tmp_path / "c"
    run(Checkpoint(path, {"seed": 0}, every=2), until=5)
    with pytest.raises(CausalProbeError, match="of a run with other settings"):
        run(Checkpoint(path, {"seed": 1}))
    with pytest.raises(CausalProbeError, match="don't fit the model"):
        Checkpoint(path, {"seed": 0}).load(DisentangledTransformer(3, 7), torch.Generator())
    content = path.read_bytes()
    for damaged in (b"", b"not safetensors", content[: len(content) // 2]):
        path.write_bytes(damaged)
        with pytest.raises(CausalProbeError, match="To start anew, delete it"):
            run(Checkpoint(path, {"seed": 0}))
    write_arrays(path, {}, about={"kind": "another", "format": 1})
    with pytest.raises(CausalProbeError, match="holds something else"):
        run(Checkpoint(path, {"seed": 0}))


def test_what_can_t_be_gone_on_from_is_replaced_if_that_is_said(tmp_path: Path) -> None:
    whole, _ = run(None, seed=1)
    run(Checkpoint(tmp_path / "c", {"seed": 0}, every=2), until=5)
    other, _ = run(Checkpoint(tmp_path / "c", {"seed": 1}, every=2, overwrite=True), seed=1)
    assert same(other, whole)
    run(Checkpoint(tmp_path / "d", {}, every=2), until=5)
    calls: list[int] = []
    fit(
        DisentangledTransformer(3, 6),
        TASK,
        STAGES,
        generator=torch.Generator(),
        callback=lambda step, model: calls.append(step),
        checkpoint=Checkpoint(tmp_path / "d", {}, overwrite=True),
    )
    assert calls[0] == 4  # of its own settings: gone on from


def test_a_training_that_diverges_keeps_nothing(tmp_path: Path) -> None:
    """It would diverge again."""
    wild = (STAGES[0], Stage("wild", 30, 8, "sgd", 1e12, moves=("A0", "A1", "W_U"), weight_decay=1e12))
    seen = []

    def look(step: int, model: DisentangledTransformer) -> None:
        seen.append((tmp_path / "new" / "c").exists())

    with pytest.raises(CausalProbeError, match="too large"):
        fit(
            DisentangledTransformer(3, 6),
            TASK,
            wild,
            generator=torch.Generator(),
            callback=look,
            checkpoint=Checkpoint(tmp_path / "new" / "c", {}, every=2),
        )
    assert any(seen)
    assert list(tmp_path.iterdir()) == []


def test_what_fails_besides_the_training_leaves_the_checkpoint(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A callback that raises, and a disk that is full: the run goes on from before that."""
    whole, history = run(None)

    def fail(step: int, model: DisentangledTransformer) -> None:
        if step == 5:
            raise CausalProbeError("not my day")

    model = DisentangledTransformer(3, 6)
    give_matcher(model)
    with pytest.raises(CausalProbeError, match="not my day"):
        fit(
            model,
            TASK,
            STAGES,
            generator=torch.Generator().manual_seed(0),
            callback=fail,
            checkpoint=Checkpoint(tmp_path / "c", {}, every=2),
        )

    def full(*arguments: object, **options: object) -> None:
        raise CausalProbeError("Can't write: no space left")

    with monkeypatch.context() as patch:
        patch.setattr("causal_probe.training.checkpoint.write_arrays", full)
        with pytest.raises(CausalProbeError, match="no space left"):
            run(Checkpoint(tmp_path / "c", {}, every=2))
    again, resumed = run(Checkpoint(tmp_path / "c", {}, every=2))
    assert resumed == history
    assert same(whole, again)


def program(path: Path, out: Path) -> str:
    return f"""
import torch
from pathlib import Path
from causal_probe import graphs, models, tasks, training
task = tasks.InContextMarkov(graphs.chain(5), 3, concentration=0.3)
model = models.DisentangledTransformer(3, 6)
stages = training.joint(optimizer="adamw", steps=400, batch_size=64)
training.fit(model, task, stages, generator=torch.Generator().manual_seed(0),
             checkpoint=training.checkpoint.Checkpoint(Path({str(path)!r}), {{}}, every=1))
models.save(model, {str(out)!r})
"""


@pytest.mark.slow
def test_killed_in_the_middle(tmp_path: Path) -> None:
    """kill -9 while it runs, wherever that is; the same program then goes on."""
    whole, path = tmp_path / "whole", tmp_path / "c"
    subprocess.run([sys.executable, "-c", program(tmp_path / "other", whole)], check=True)
    process = subprocess.Popen([sys.executable, "-c", program(path, tmp_path / "killed")])
    while not path.exists():
        assert process.poll() is None
        time.sleep(0.01)
    time.sleep(0.2)
    os.kill(process.pid, signal.SIGKILL)
    assert process.wait() != 0
    assert not (tmp_path / "killed").exists()
    subprocess.run([sys.executable, "-c", program(path, tmp_path / "killed")], check=True)
    ours, theirs = (load_file(folder / "model.safetensors") for folder in (whole, tmp_path / "killed"))
    assert all(torch.equal(ours[name], theirs[name]) for name in ours)
