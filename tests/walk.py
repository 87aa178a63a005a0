"""How often does one scan move between files of the package?

    python tests/walk.py

A move is a call or a return (also into and out of a generator) whose caller and callee stand in different files of causal_probe,
links resolved. What another library calls, as torch does the hooks, is counted apart: there the caller is the nearest one below it
that is of the package. The scan is of four sequences and one template, on models of two layers, the second time that it is made.
The fewer moves, the fewer files a reader must have open to follow one scan. Not a test: nothing is right or wrong.
"""

from __future__ import annotations

import argparse
import os
import sys
from collections import Counter
from collections.abc import Callable
from functools import partial
from pathlib import Path
from types import CodeType, FrameType
from typing import Any

#: How many pairs of files are named.
SHOWN = 10


class Walk:
    """Counts moves between the files of a folder while it is entered.

    Attributes
    ----------
    moves
        By caller's and callee's file, whichever way: calls and returns from one straight to the other.
    through_others
        In the same way, with code of others in between.
    calls
        How often a function of the package was called.
    """

    def __init__(self, package: Path) -> None:
        self.package = str(package.resolve()) + os.sep
        self.moves: Counter[tuple[str, str]] = Counter()
        self.through_others: Counter[tuple[str, str]] = Counter()
        self.calls = 0
        self._names: dict[CodeType, str | None] = {}
        # The hooks are a folder of their own in a checkout, and a link leads there.
        self._folders = {
            str(folder.resolve()) + os.sep: f"{folder.name}/" for folder in package.iterdir() if folder.is_symlink()
        } | {self.package: ""}

    def __enter__(self) -> Walk:
        sys.setprofile(self._see)
        return self

    def __exit__(self, *raised: object) -> None:
        sys.setprofile(None)

    def _see(self, frame: FrameType, event: str, argument: Any) -> None:
        if event not in ("call", "return") or (callee := self._file(frame.f_code)) is None:
            return
        self.calls += event == "call"
        below, direct = frame.f_back, True
        while below is not None and self._file(below.f_code) is None:
            below, direct = below.f_back, False
        if below is None or (caller := self._file(below.f_code)) == callee or caller is None:
            return
        (self.moves if direct else self.through_others)[min(caller, callee), max(caller, callee)] += 1

    def _file(self, code: CodeType) -> str | None:
        """The file in which code stands, relative to the package; None for code of others."""
        if code not in self._names:
            path = os.path.realpath(code.co_filename)
            places = [name + path[len(folder) :] for folder, name in self._folders.items() if path.startswith(folder)]
            self._names[code] = places[0] if places else None
        return self._names[code]


def count(name: str, scan: Callable[[], object], package: Path) -> None:
    """Make a scan twice, and print the moves of the second."""
    scan()
    with Walk(package) as walk:
        scan()
    total, hooked = walk.moves.total(), walk.through_others.total()
    print(f"{name}: {total} moves between files, {hooked} more through code of others; {walk.calls} calls of functions")
    files = {file for pair in (*walk.moves, *walk.through_others) for file in pair}
    print(f"  {len(files)} files: {', '.join(sorted(files))}")
    for (one, other), number in walk.moves.most_common(SHOWN):
        print(f"  {number:>6}  {one} <-> {other}")


def main() -> int:
    """The command line."""
    argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0]).parse_args()
    os.environ.update(OMP_NUM_THREADS="1", HF_HUB_OFFLINE="1")
    # A program has its own folder first on the path, and in it there are folders named like modules; the root belongs there.
    sys.path[0] = str(Path(__file__).resolve().parents[1])
    import torch

    import causal_probe
    from causal_probe import hooks, models, probes
    from tests import tiny_huggingface, tiny_models

    torch.set_num_threads(1)
    tokens = tiny_models.random_tokens(4)
    kinds = {
        "DisentangledTransformer": models.DisentangledTransformer(tiny_models.D_VOCAB, tiny_models.N_POSITIONS),
        "TransformerLens' own": tiny_models.transformer_lens(),
        "Hugging Face": hooks.to_hooked(tiny_huggingface.gpt2()),
    }
    package = Path(causal_probe.__file__).parent
    print(package)
    for name, model in kinds.items():
        count(name, partial(probes.scan, model, tokens, templates=["previous-token"]), package)
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
