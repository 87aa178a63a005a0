"""auto-circuit's EAP and ACDC on known circuits, beside ours: `python tests/benchmarks/bench_circuit_peers.py PYTHON [CIRCUIT ...]`.

PYTHON is that of an environment with auto-circuit 1.0.1, transformer-lens 2.15.4 and transformers 4.46.3, which this project's own versions don't go with. Its clean and corrupted prompts are
the same as ours, a row and the row before it; the metric is the right answer's logit less that of another symbol at the last position. Its source `Resid Start` is embeddings and positions
together: an edge from there is true if either is, and of ours the sum is compared.
"""

from __future__ import annotations

import json
import subprocess
import sys
import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import torch
from safetensors.torch import save_file
from sklearn.metrics import roc_auc_score
from torch import Tensor

from causal_probe import circuits
from causal_probe.circuits.edge_methods import run_of
from causal_probe.circuits.handset import HAND_SET
from causal_probe.circuits.known import Edge, KnownCircuit
from causal_probe.circuits.screen import attributions
from causal_probe.hooks.check import undisturbed

N = 64
EMBEDDINGS = ("embed", "pos_embed")


def difference(tokens: Tensor, right: Tensor, wrong: Tensor) -> Callable[[Tensor, Tensor], Tensor]:
    """The metric: at the last position, the logit of the right answer less that of the wrong one."""
    answers = {tuple(row): pair for row, *pair in zip(tokens.tolist(), right.tolist(), wrong.tolist(), strict=True)}

    def metric(logits: Tensor, rows: Tensor) -> Tensor:
        pairs = torch.tensor([answers[tuple(row)] for row in rows.tolist()])
        both = logits[:, -1].gather(-1, pairs)
        return both[:, 0] - both[:, 1]

    return metric


def main() -> None:
    python, names = sys.argv[1], sys.argv[2:] or [name for name in HAND_SET if name != "or-gate"]
    torch.set_num_threads(1)
    ours: dict[str, dict[str, dict[str, float]]] = {}
    known: dict[str, KnownCircuit] = {}
    with tempfile.TemporaryDirectory() as place:
        folder = Path(place)
        for name in names:
            known[name] = circuit = circuits.known_circuit(name)
            model: Any = circuit.model
            tokens = circuit.sample(N, torch.Generator().manual_seed(0))
            with undisturbed(model):
                logits = model(tokens)[:, -1]
            right = logits.argmax(-1)
            wrong = (right + 1) % logits.shape[-1]
            cfg = model.cfg
            about = {"n_layers": cfg.n_layers, "d_model": cfg.d_model, "n_ctx": len(model.W_pos), "d_head": cfg.d_head, "n_heads": cfg.n_heads, "d_vocab": cfg.d_vocab, "d_vocab_out": cfg.d_vocab_out, "d_mlp": cfg.d_mlp, "attn_only": cfg.attn_only, "normalization_type": None if model.ln_final is None else "RMS"}  # fmt: skip
            (folder / f"{name}.circuit.json").write_text(json.dumps({"name": name, "cfg": about}))
            arrays = {key: value.detach().contiguous() for key, value in model.state_dict().items()}
            save_file({**arrays, "tokens": tokens, "right": right, "wrong": wrong, "logits": logits.contiguous()}, folder / f"{name}.safetensors")  # fmt: skip
            with undisturbed(model):
                run = run_of(model, tokens, difference(tokens, right, wrong), "corrupted")
                ours[name] = {
                    "EAP": _merged({edge: float(v.sum()) for edge, v in attributions(run, steps=1).items()}),
                    "EAP with integrated gradients": _merged({edge: float(v.sum()) for edge, v in attributions(run, steps=5).items()}),
                    "ablation": _merged(dict(zip(edges := circuit.candidates(), run.effects(edges).mean(1).tolist(), strict=True))),
                }  # fmt: skip
        subprocess.run([python, str(Path(__file__).parent / "auto_circuit_scores.py"), place], check=True, stdout=subprocess.DEVNULL)  # fmt: skip
        theirs = {name: json.loads((folder / f"{name}.scores.json").read_text()) for name in names}
    columns: dict[str, list[float]] = {}
    errors = []
    for name in names:
        true = _merged(dict.fromkeys(known[name].edges("mean-by-position"), 1.0))
        for way, found in theirs[name].items():
            columns.setdefault(f"auto-circuit {way}", []).append(_auroc(found["scores"], true))
        for way, scores in ours[name].items():
            columns.setdefault(f"ours, {way}", []).append(_auroc(scores, true))
        # theirs is minus the gradient by the mask, of the same difference
        own, other = ours[name]["EAP"], theirs[name]["EAP"]["scores"]
        errors.append(max(abs(abs(own[edge]) - abs(other[edge])) for edge in own) / max(map(abs, own.values())))
        seconds = {way: round(found["seconds"], 1) for way, found in theirs[name].items()}
        print(f"{name}: {len(other)} edges; largest difference of EAP, ours and auto-circuit's, over the largest score {errors[-1]:.1g}; its CPU seconds {seconds}", flush=True)  # fmt: skip
    for way, values in columns.items():
        print(
            f"{way}: AUROC {np.mean(values):.3f} +- {np.std(values, ddof=1) / len(values) ** 0.5:.3f}, {len(values)} circuits"
        )


def _merged(scores: dict[Edge, float]) -> dict[str, float]:
    """By auto-circuit's name of an edge; embeddings and positions together."""
    found: dict[str, float] = {}
    for (source, receiver), value in scores.items():
        name = f"{_source(source)}->{_receiver(receiver)}"
        found[name] = found.get(name, 0.0) + value
    return found


def _source(name: str) -> str:
    if name in EMBEDDINGS:
        return "Resid Start"
    layer, _, rest = name[1:].replace(".", "H").partition("H")
    return f"MLP {layer}" if rest == "mlp" else f"A{layer}.{rest}"


def _receiver(name: str) -> str:
    if name == "logits":
        return "Resid End"
    place, _, side = name.rpartition(".")
    return _source(name) if side == "mlp" else f"{_source(place)}.{side.upper()}"


def _auroc(scores: dict[str, float], true: dict[str, float]) -> float:
    largest = max(abs(v) for v in scores.values() if np.isfinite(v)) or 1.0
    values = [round(min(abs(v) / largest, 2.0), 6) for v in scores.values()]
    return float(roc_auc_score([edge in true for edge in scores], values))


if __name__ == "__main__":
    main()
