"""Scores of edges by auto-circuit 1.0.1, run in an environment of its own (transformer-lens 2.15, transformers 4.46): `PYTHON auto_circuit_scores.py FOLDER`.

FOLDER holds what bench_circuit_peers.py has written; this file imports nothing of causal-probe, and auto-circuit where it runs it.
"""

from __future__ import annotations

import json
import sys
import time
from functools import partial
from pathlib import Path
from typing import Any

import torch


def main(folder: Path) -> None:
    """Score every circuit of the folder in every way."""
    from auto_circuit.data import PromptDataLoader, PromptDataset
    from auto_circuit.prune_algos.ACDC import acdc_prune_scores
    from auto_circuit.prune_algos.mask_gradient import mask_gradient_prune_scores
    from auto_circuit.utils.graph_utils import patchable_model
    from safetensors.torch import load_file
    from transformer_lens import HookedTransformer, HookedTransformerConfig

    eap = partial(mask_gradient_prune_scores, grad_function="logit", answer_function="avg_diff")
    acdc = partial(acdc_prune_scores, tao_exps=[-4, -3, -2, -1], tao_bases=[1])
    ways: dict[str, Any] = {
        "EAP": partial(eap, mask_val=0.0),
        "EAP with integrated gradients": partial(eap, integrated_grad_samples=5),
        "ACDC, KL": acdc,
        "ACDC, squared error": partial(acdc, faithfulness_target="mse"),
    }
    torch.set_num_threads(1)
    for about in sorted(folder.glob("*.circuit.json")):
        given, arrays = json.loads(about.read_text()), load_file(about.with_suffix("").with_suffix(".safetensors"))
        tokens, right, wrong, logits = (arrays.pop(name) for name in ("tokens", "right", "wrong", "logits"))
        own = HookedTransformer(
            HookedTransformerConfig(**given["cfg"], act_fn="relu", use_attn_scale=False, use_split_qkv_input=True, use_hook_mlp_in=True, use_attn_result=True, seed=0)
        )  # fmt: skip
        own.load_state_dict(arrays, strict=False)
        own.eval()
        with torch.no_grad():
            assert float((own(tokens)[:, -1] - logits).abs().max()) < 1e-3, given["name"]
        loader = PromptDataLoader(
            PromptDataset(tokens, tokens.roll(1, 0), list(right[:, None]), list(wrong[:, None])),
            seq_len=tokens.shape[1], diverge_idx=0, batch_size=len(tokens), shuffle=False,
        )  # fmt: skip
        model = patchable_model(own, factorized=True, slice_output="last_seq", separate_qkv=True)
        found = {}
        for name, way in ways.items():
            started = time.process_time()
            scores = way(model, loader, None)
            values = {edge.name: float(edge.prune_score(scores)) for edge in model.edges}
            found[name] = {"scores": values, "seconds": time.process_time() - started}
        (folder / f"{given['name']}.scores.json").write_text(json.dumps(found))


if __name__ == "__main__":
    main(Path(sys.argv[1]))
