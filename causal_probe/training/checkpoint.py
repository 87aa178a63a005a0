"""Checkpoints of a training run: its whole state, in one file that is written atomically, so that an interrupted run continues exactly.

The file is safetensors: the weights, the optimiser's moments, the random generator's state, the losses so far, and, in its header, the
settings that the run must share with the one that goes on, and a checksum. Nothing is pickled.

A run that goes on is equal to one that was never interrupted to the last bit, on the same machine and with the same number of
threads: sums over a batch differ between one thread and two. The number is recorded, and taken up again.
"""

from __future__ import annotations

import contextlib
import dataclasses
import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import nn

from causal_probe.errors import CausalProbeError
from causal_probe.results import read_arrays, to_jsonable, write_arrays

__all__ = ["Checkpoint", "Progress"]

KIND = "training checkpoint"
FORMAT = 1
START_ANEW = "To start anew, delete it, or pass --overwrite."


@dataclasses.dataclass
class Progress:
    """How far a run is: what :func:`~causal_probe.training.fit` goes on from.

    Attributes
    ----------
    stage, step
        Index of the stage, and how many of its steps are made.
    losses
        Of all steps so far, across stages.
    optimizer
        Moments of the stage's optimiser by parameter and name.
    """

    stage: int
    step: int
    losses: list[float]
    optimizer: dict[int, dict[str, torch.Tensor]]


@dataclasses.dataclass
class Checkpoint:
    """Where a run is kept.

    Attributes
    ----------
    path
        The file. Its folder is made when there is something to keep.
    settings
        Settings that identify the run, in plain JSON types: a checkpoint of other settings is refused.
    every
        Steps between two checkpoints; one is also written at the end of each stage and of the run.
    notes
        The state of a callback, in plain JSON types; it is saved and restored.
    overwrite
        A file that this run can't go on from is not refused: the run starts anew and replaces it.
    """

    path: Path
    settings: Mapping[str, Any]
    every: int = 50
    notes: dict[str, Any] = dataclasses.field(default_factory=dict)
    overwrite: bool = False

    def save(self, model: nn.Module, generator: torch.Generator, progress: Progress) -> None:
        """Write the state between two steps; a reader, or a kill, sees the old file or the new one."""
        head = {
            "kind": KIND,
            "format": FORMAT,
            "settings": self.settings,
            "notes": self.notes,
            "threads": torch.get_num_threads(),
            "torch": torch.__version__,
            "stage": progress.stage,
            "step": progress.step,
        }
        arrays = {f"weights.{name}": _array(tensor) for name, tensor in model.state_dict().items()}
        for index, moments in progress.optimizer.items():
            arrays |= {f"optimizer.{index}.{name}": _array(tensor) for name, tensor in moments.items()}
        arrays["generator"] = _array(generator.get_state())
        arrays["losses"] = np.asarray(progress.losses, dtype=np.float64)
        with contextlib.suppress(OSError):  # an obstacle is reported when the file is written
            self.path.parent.mkdir(exist_ok=True)
        write_arrays(self.path, arrays, about=head)

    def load(self, model: nn.Module, generator: torch.Generator) -> Progress | None:
        """Put weights, random state and the number of threads back, and say how far the run was; None without a file.

        Raises
        ------
        CausalProbeError
            If the file is broken, or of another kind, version of torch, settings or shape, or the number of threads can't be had,
            and it is not to be overwritten. Nothing is changed then.
        """
        if not self.path.exists():
            return None
        try:
            return self._load(model, generator)
        except CausalProbeError as error:
            if not self.overwrite:
                raise CausalProbeError(f"{error} {START_ANEW}") from error
            return None

    def _load(self, model: nn.Module, generator: torch.Generator) -> Progress:
        arrays, head = read_arrays(self.path, kind=KIND, newest=FORMAT)
        if head["settings"] != to_jsonable(self.settings):
            raise CausalProbeError(
                f"{self.path} is the checkpoint of a run with other settings. To go on, run with its settings."
            )
        if head["torch"] != torch.__version__:
            raise CausalProbeError(
                f"{self.path} was written with torch {head['torch']}; this is {torch.__version__}, which may round in another way."
            )
        weights = {
            name.removeprefix("weights."): torch.from_numpy(a) for name, a in arrays.items() if name[:8] == "weights."
        }
        own = model.state_dict()
        if {n: (w.shape, w.dtype) for n, w in weights.items()} != {n: (w.shape, w.dtype) for n, w in own.items()}:
            raise CausalProbeError(f"The weights in {self.path} don't fit the model.")
        before = torch.get_num_threads()
        torch.set_num_threads(int(head["threads"]))
        if torch.get_num_threads() != head["threads"]:
            torch.set_num_threads(before)
            raise CausalProbeError(
                f"{self.path} was written with {head['threads']} threads, which can't be had here: sums would differ in the last digits."
            )
        optimizer: dict[int, dict[str, torch.Tensor]] = {}
        for name, array in arrays.items():
            if name.startswith("optimizer."):
                _, index, moment = name.split(".")
                optimizer.setdefault(int(index), {})[moment] = torch.from_numpy(array)
        model.load_state_dict(weights)
        generator.set_state(torch.from_numpy(arrays["generator"]))
        self.notes.clear()
        self.notes.update(head["notes"])
        return Progress(head["stage"], head["step"], arrays["losses"].tolist(), optimizer)

    def delete(self) -> None:
        """Remove the file, if there is one, and its folder if nothing else is in it."""
        if self.path.exists():
            os.unlink(self.path)
            with contextlib.suppress(OSError):  # it is not empty
                self.path.parent.rmdir()


def _array(tensor: torch.Tensor) -> NDArray[Any]:
    return np.asarray(tensor.detach().cpu().numpy())
