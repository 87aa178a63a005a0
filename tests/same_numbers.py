"""Do two versions of the code compute the same numbers?

    python tests/same_numbers.py record OLD.json        # in the one checkout
    python tests/same_numbers.py record NEW.json        # in the other
    python tests/same_numbers.py compare OLD.json NEW.json

``record`` runs the calls of ``tests/recorded_calls/``, each small and seeded, on one thread and offline, and writes of each how many numbers
came out, their SHA-256 and some of them, spread evenly. ``compare`` says call by call whether all are equal to the last bit, and else
how far those that were kept are apart; it ends with 1 if a call is missing, or differs by more than 1e-6, relatively.

The machine and torch's version belong to the numbers: record both files on one machine in one environment.
"""

from __future__ import annotations

import argparse
import importlib.metadata
import json
import math
import os
import sys
import traceback
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

#: How many numbers of each call are kept beside the hash of all.
KEPT = 64
#: The largest relative difference that compares as the same.
TOLERANCE = 1e-6


def record(path: Path, *, only: Sequence[str] = (), kept: int = KEPT) -> int:
    """Run the calls and write what they give; 1 if one failed otherwise than by refusing."""
    # Before anything imports NumPy or torch.
    os.environ.update(dict.fromkeys(("OMP_NUM_THREADS", "MKL_NUM_THREADS", "OPENBLAS_NUM_THREADS"), "1"))
    os.environ.update(HF_HUB_OFFLINE="1", HF_DATASETS_OFFLINE="1", MPLBACKEND="Agg")
    # A program has its own folder first on the path, and in it there are folders named like modules; the root belongs there.
    sys.path[0] = str(Path(__file__).resolve().parents[1])
    import torch

    import causal_probe
    from tests.recorded_calls import CALLS, measure

    torch.set_num_threads(1)
    names = [name for name in CALLS if not only or name in only]
    if unknown := set(only) - set(names):
        raise SystemExit(f"There is no call {', '.join(sorted(unknown))}; there are {', '.join(CALLS)}.")
    versions = {
        name: importlib.metadata.version(name) for name in ("transformer-lens", "torch", "numpy", "transformers")
    }
    about = {"causal_probe": causal_probe.__file__, "versions": versions, "threads": torch.get_num_threads()}
    print(about)
    found: dict[str, Any] = {}
    failed = []
    for name in names:
        try:
            found[name] = measure(CALLS[name], kept=kept)
        except Exception:
            traceback.print_exc()
            failed.append(name)
            continue
        its = found[name]
        what = (
            f"refused: {its['refused']}"
            if "refused" in its
            else f"{its['count']:>8,} numbers {its['cpu_seconds']:>7} s"
        )
        print(f"{name:<36} {what}", flush=True)
    path.write_text(json.dumps({"about": about, "calls": found}, indent=1), encoding="utf-8")
    total = sum(its.get("cpu_seconds", 0) for its in found.values())
    print(f"{len(found)} calls, {total:.0f} s of CPU{f'; failed: {failed}' if failed else ''}")
    return bool(failed)


def difference(old: Mapping[str, Any], new: Mapping[str, Any]) -> tuple[str, float, float]:
    """What to say of a call, and the largest absolute and relative difference of the numbers that were kept (infinite if unknown)."""
    if "refused" in old or "refused" in new:
        kinds = [f"refused: {its['refused']}" if "refused" in its else "numbers" for its in (old, new)]
        return (kinds[0], 0.0, 0.0) if kinds[0] == kinds[1] else (f"{kinds[0]} | {kinds[1]}", math.inf, math.inf)
    if old["count"] != new["count"]:
        return f"{old['count']:,} | {new['count']:,} numbers", math.inf, math.inf
    if old["sha256"] == new["sha256"]:
        return "equal to the last bit", 0.0, 0.0
    if len(old["numbers"]) != len(new["numbers"]):
        return "not as many numbers were kept", math.inf, math.inf
    pairs = list(zip(old["numbers"], new["numbers"], strict=True))
    apart = [(a, b) for a, b in pairs if a != b and not (math.isnan(a) and math.isnan(b))]
    if not apart:  # so the difference is among those that were not kept, and nobody knows how large it is
        return "differ where none was kept", math.inf, math.inf
    if not all(math.isfinite(value) for pair in apart for value in pair):
        return "differ: not finite", math.inf, math.inf
    absolute = max(abs(a - b) for a, b in apart)
    relative = max(abs(a - b) / max(abs(a), abs(b)) for a, b in apart)
    return f"{len(apart)} of {len(pairs)} kept differ", absolute, relative


def compare(old: Path, new: Path, *, only: Sequence[str] = ()) -> int:
    """Print a line for each call; 1 if one is missing in the new file, or differs by more than :data:`TOLERANCE`."""
    one, other = (json.loads(path.read_text(encoding="utf-8"))["calls"] for path in (old, new))
    names = [name for name in dict.fromkeys([*one, *other]) if not only or name in only]
    print(f"{'call':<36} {'numbers':>9}  {'absolute':>9}  {'relative':>9}  ")
    bad = bits = 0
    for name in names:
        if name not in one or name not in other:
            said, absolute, relative = f"missing in {old if name not in one else new}", math.inf, math.inf
        else:
            said, absolute, relative = difference(one[name], other[name])
        wrong = relative > TOLERANCE
        bad += wrong
        bits += said == "equal to the last bit" or (said.startswith("refused") and not relative)
        count = one.get(name, other.get(name)).get("count", 0)
        print(f"{name:<36} {count:>9,}  {absolute:>9.2g}  {relative:>9.2g}  {said}{'  <--' if wrong else ''}")
    print(
        f"{len(names)} calls: {bits} equal to the last bit, {len(names) - bits - bad} close, {bad} missing or different"
    )
    return bool(bad or not names)


def main() -> int:
    """The command line."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    commands = parser.add_subparsers(dest="command", required=True)
    to_record = commands.add_parser("record", help="run the calls, and write what they give")
    to_record.add_argument("file", type=Path)
    to_record.add_argument("--keep", type=int, default=KEPT, help=f"how many numbers of a call are kept ({KEPT})")
    to_compare = commands.add_parser("compare", help="compare two files")
    to_compare.add_argument("old", type=Path)
    to_compare.add_argument("new", type=Path)
    for each in (to_record, to_compare):
        each.add_argument("--only", metavar="NAME", action="append", default=[], help="this call only; may be repeated")
    chosen = parser.parse_args()
    if chosen.command == "record":
        return record(chosen.file, only=chosen.only, kept=chosen.keep)
    return compare(chosen.old, chosen.new, only=chosen.only)


if __name__ == "__main__":
    raise SystemExit(main())
