"""Zheng et al. 2024: the trained layer's product ab, its form, and its estimate of W; and the moment condition."""

from __future__ import annotations

import math
from typing import Any

import numpy as np

from causal_probe import viz
from causal_probe.mechanisms.mesa import mesa_optimizer, mesa_recovery, train_mesa
from causal_probe.papers.base import Line, Reproduction, Run, reproduction
from causal_probe.papers.shared import mean_and_error
from causal_probe.tasks import AutoregressiveProcess
from causal_probe.tasks.autoregressive import Start

__all__ = ["mesa", "mesa_moments"]

PAPER = ("zheng2024",)
#: Three places to begin: balanced and small, unbalanced, and beyond the limit.
STARTS = ((0.1, 0.1), (0.3, 0.03), (0.7, 0.5))
Laws = tuple[tuple[Start, float], ...]
#: (start, scale) of the processes whose limit the theory gives.
LAWS: Laws = (("normal", 0.5), ("normal", 1.0), ("normal", 2.0), ("sparse", 0.5), ("sparse", 1.0), ("sparse", 2.0))


def _begins(process: AutoregressiveProcess) -> list[tuple[float, float]]:
    """:data:`STARTS` in units of the root of the limit, so that all are as far from it on every scale, and none is in the saddle."""
    unit = math.sqrt(process.limit)
    return [(a * 2 * unit, b * 2 * unit) for a, b in STARTS]


@reproduction("mesa", "An autoregressively trained linear layer becomes a mesa-optimizer, or does not", minutes=(1, 10))
def mesa(run: Run) -> Reproduction:
    """Training of the whole layer from normal and sparse starts and from all ones."""
    length = 30
    steps, batch, sequences = (200, 256, 2_048) if run.quick else (600, 1_024, 8_192)
    laws: Laws = (("normal", 0.5), ("sparse", 1.0), ("ones", 1.0))
    if not run.quick:
        laws = (*LAWS, ("ones", 1.0))
    lines: list[Line] = []
    panels: dict[str, dict[str, viz.Curve]] = {}
    references: dict[str, dict[str, float]] = {}
    distances: dict[str, list[float]] = {}
    for start, scale in laws:
        process = AutoregressiveProcess(5, length, start=start, scale=scale)
        rows = []
        for number, (a, b) in enumerate(_begins(process)):

            def train(
                process: AutoregressiveProcess = process, seed: int = run.seed + number, a: float = a, b: float = b
            ) -> dict[str, Any]:
                trained = train_mesa(process, a=a, b=b, steps=steps, batch_size=batch, seed=seed, progress=run.progress)
                found = mesa_optimizer(trained.model, process, n_sequences=sequences, seed=seed)
                names = (
                    "product",
                    "off_kq",
                    "off_pv",
                    "step_distance",
                    "step_distance_error",
                    "error",
                    "prediction_error",
                    "verdict",
                )
                return {
                    **{name: getattr(found, name) for name in names},
                    "off_diagonal": found.off_diagonal[0],
                    "at": trained.step,
                    "products": trained.product,
                }  # fmt: skip

            scale_name = f"{scale:g}".replace(".", "p")
            rows.append(run.part(f"{start}-{scale_name}-{number}", train))
        name = f"{start}, scale {scale:g}"
        products = np.array([row["product"] for row in rows])
        far, tolerance = float(max(abs(products / process.limit - 1))), 0.05 if run.quick else 0.02
        off_mean, off_error = mean_and_error([row["off_diagonal"] for row in rows])
        distances[start] = [*distances.get(start, []), *(row["step_distance"] for row in rows)]
        entry, words = f"{name}: mean off-diagonal entry of W_KQ's block over the diagonal", "the paper, in words"
        if start == "ones":
            lines += [
                Line(f"{name}: ab", *mean_and_error(products), process.limit, "the limit, if the layer stayed diagonal", None, "the layer does not stay diagonal"),
                Line(entry, off_mean, off_error, "non-zero", words, abs(off_mean) > 3 * off_error, "beyond 3 standard errors over initialisations"),
            ]  # fmt: skip
        else:
            lines += [
                Line(f"{name}: ab", *mean_and_error(products), process.limit, "exact limit at this length", far <= tolerance, f"within {tolerance:.0%} from each of three initialisations; farthest {far:.2%}"),
                Line(entry, off_mean, off_error, 0.0, words, None, ""),
            ]  # fmt: skip
        if start == "sparse":
            worst = max(row["error"] for row in rows)
            lines.append(
                Line(
                    f"{name}: error of the recovered W",
                    worst,
                    None,
                    0.0,
                    words,
                    worst < 0.01,
                    "largest of three; below 1%",
                )
            )
        if (start, scale) in (("normal", 0.5), ("sparse", 1.0), ("ones", 1.0)):
            panels[name] = {
                f"from a = {a:.2g}, b = {b:.2g}": viz.Curve(row["at"], row["products"])
                for row, (a, b) in zip(rows, _begins(process), strict=True)
            }
            references[name] = {f"limit {process.limit:.3f}": process.limit}
    ones, sparse = distances["ones"], distances["sparse"]
    far_off = min(ones) > 5 * max(sparse) and min(ones) > 0.05
    lines.append(Line("all ones: distance to the best single gradient step", *mean_and_error(ones), "not one step", "the paper, in words", far_off, f"above 5%, and above five times the sparse starts' ({max(sparse):.4f}): not vanilla gradient descent"))  # fmt: skip
    return Reproduction(
        name="mesa",
        title="An autoregressively trained linear layer becomes a mesa-optimizer, or does not",
        paper=PAPER,
        summary=f"From normal and sparse starts the product ab goes to its predicted limit and the layer is one gradient step; from a start of all "
        f"ones it is not vanilla gradient descent: its predictions lie {float(np.mean(ones)):.0%} from those of the best single step.",
        lines=tuple(lines),
        figures={"product": viz.curves(panels, x_name="training step", y_name="ab", references=references)},
        captions={"product": "The product ab in training, from three initialisations; the line is the limit of the diagonal layer."},
        notes=(
            f"T = {length} and d = 5; fresh sequences at every step, where the authors have 10,000 fixed ones. All of W_KQ and W_PV moves.",
            "Initialisations are in units of the root of the limit.",
        ),
        method="One complex linear layer was trained by gradient descent on next-state prediction and compared with one step of least squares.",
        settings={**run.settings, "length": length, "steps": steps, "batch_size": batch, "n_sequences": sequences, "laws": laws},
    )  # fmt: skip


@reproduction("mesa-moments", "When a mesa-optimizer recovers the true dynamics: the moment condition", minutes=(1, 3))
def mesa_moments(run: Run) -> Reproduction:
    """The limit of ab and the recovered W against the sequence length, under and without the moment condition."""
    lengths = (10, 30, 100, 300) if run.quick else (10, 30, 100, 300, 1_000)
    sequences = 1_024 if run.quick else 4_096
    lines: list[Line] = []
    curves: dict[str, viz.Curve] = {}
    products: dict[str, viz.Curve] = {}
    laws: Laws = (("sparse", 1.0), ("ones", 1.0), ("normal", 1.0))
    for start, scale in laws:
        processes = [AutoregressiveProcess(5, length, start=start, scale=scale) for length in lengths]

        def measure(processes: list[AutoregressiveProcess] = processes) -> dict[str, Any]:
            found = [mesa_recovery(process, n_sequences=sequences, seed=run.seed) for process in processes]
            return {"error": [error for error, _ in found], "stderr": [stderr for _, stderr in found]}

        row = run.part(f"recovery-{start}", measure)
        curves[start] = viz.Curve(lengths, [max(error, 1e-8) for error in row["error"]])
        products[start] = viz.Curve(lengths, [process.limit for process in processes])
        first, last = row["error"][1], row["error"][-1]
        holds = {"sparse": max(row["error"]) < 1e-5, "ones": last < 0.35 * first, "normal": last > 0.8 * first}[start]
        rule = {
            "sparse": "below 1e-5 at every length",
            "ones": f"falls towards 0: below 0.35 times that at T = 30, {first:.3f}",
            "normal": f"stays: above 0.8 times that at T = 30, {first:.3f}",
        }[start]
        paper = {"sparse": "0 at every T", "ones": "0 in the limit", "normal": "not 0"}[start]
        lines.append(
            Line(
                f"{start}: error of the recovered W at T = {lengths[-1]}",
                last,
                row["stderr"][-1],
                paper,
                "the paper, in words",
                holds,
                rule,
            )
        )
    for start, scale in LAWS:
        process = AutoregressiveProcess(5, 30, start=start, scale=scale)
        ends = [float(process.flow(a, b).product[-1]) for a, b in _begins(process)]
        far = max(abs(end / process.limit - 1) for end in ends)
        lines.append(Line(f"{start}, scale {scale:g}: end of the exact population flow, ab", float(np.mean(ends)), None, process.limit, "the limit in closed form", far < 0.02, f"within 2% from each of three initialisations; farthest {far:.1e}"))  # fmt: skip
    return Reproduction(
        name="mesa-moments",
        title="The moment condition: when a mesa-optimizer recovers the true dynamics",
        paper=PAPER,
        summary="W is recovered exactly from sparse starts at every length, from a start of all ones as the sequences grow longer, and never from "
        "normal starts, as the moment condition says.",
        lines=tuple(lines),
        figures={
            "recovery": viz.curves({"": curves}, x_name="length T", y_name="error of the recovered W", x_scale="log", y_scale="log"),
            "limit": viz.curves({"": products}, x_name="length T", y_name="limit of ab", x_scale="log"),
        },
        captions={"recovery": "Relative error of the W that the layer in the limit recovers from whole sequences; below 1e-8 is shown at 1e-8."},
        notes=("The layer is the diagonal one at its limit for each length. From all ones a freely trained layer leaves that form: see mesa.",),
        method="The estimate of W by the limiting layer was measured on sequences of several lengths.",
        arrays={"lengths": np.array(lengths)},
        settings={**run.settings, "lengths": lengths, "n_sequences": sequences},
    )  # fmt: skip
