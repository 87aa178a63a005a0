"""Does the truth about every known circuit hold? Each true edge ablated alone, and all others together, under each contrast: ``make known-circuits``.

All circuits set by hand, all programs compiled by tracr (where it is installed) on every sequence there is, and 200 random planted ones with norms, of which "resample" alone
is exact.
``--random N`` takes N of them.
"""

from __future__ import annotations

import argparse
import time
from collections.abc import Iterator

from causal_probe import circuits
from causal_probe.circuits.compiled import has_tracr
from causal_probe.circuits.known import CONTRASTS


def checked(names: list[str]) -> Iterator[tuple[str, str, int, int, bool, float, float]]:
    """By circuit and contrast: its name, the contrast, true edges and all, whether the truth holds, the smallest effect and that of all others."""
    for name in names:
        circuit = circuits.known_circuit(name)
        for contrast in circuit.truth.graph["exact"]:
            every = None if circuit.every is None else circuit.every()
            found = circuits.check_truth(circuit, every, contrast=contrast, seed=1)
            smallest = min(found.effects.values()) / found.baseline
            yield (
                name,
                contrast,
                len(found.effects),
                len(circuit.candidates()),
                found.holds,
                smallest,
                found.others / found.baseline,
            )


def main() -> None:
    asked = argparse.ArgumentParser(description=__doc__)
    asked.add_argument("--random", type=int, default=200, help="how many random planted circuits")
    n = asked.parse_args().random
    known = list(circuits.known_circuits())
    kinds = {
        "set by hand": [name for name in known if not name.startswith("tracr-")],
        "compiled by tracr": [name for name in known if name.startswith("tracr-") and has_tracr()],
        "random, planted": [f"planted-{seed}" for seed in range(n)],
    }
    print("circuits | contrast | hold | true edges | of | smallest effect | others together, at most")
    for kind, names in kinds.items():
        start = time.process_time()
        rows = list(checked(names))
        for contrast in CONTRASTS:
            its = [row for row in rows if row[1] == contrast]
            if its:
                holding = f"{sum(row[4] for row in its)} of {len(its)}"
                edges, candidates = (sum(row[place] for row in its) for place in (2, 3))
                print(
                    f"{kind} | {contrast} | {holding} | {edges} | {candidates} | {min(row[5] for row in its):.2g} | {max(row[6] for row in its):.1g}"
                )
        for name, contrast, *_, holds, _, _ in rows:
            if not holds:
                print(f"  does not hold: {name}, {contrast}")
        print(f"  {time.process_time() - start:.0f} CPU seconds")
    if not has_tracr():
        print("tracr is not installed: pip install 'causal-probe[tracr]'")
    else:
        for name in kinds["compiled by tracr"]:
            circuit = circuits.known_circuit(name)
            for source, receiver, reason in circuit.truth.edges(data="without_effect"):
                if reason:
                    print(f"  true by the rule, without effect: {name}, {source} -> {receiver}: {reason}")


if __name__ == "__main__":
    main()
