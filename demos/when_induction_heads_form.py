"""When do induction heads form? A tiny transformer is trained; a sweep over its checkpoints says when each head becomes what it is.

Run ``python demos/when_induction_heads_form.py FOLDER`` (a minute or two on one core). A two-layer Llama (four heads in each layer, 64
dimensions, 64 tokens) learns sequences of random tokens that repeat after a random number of tokens, so that only what came before
tells the next token. Its checkpoints are saved as Hugging Face does, ``step100`` and so on. Then ``sweep.sweep`` scans them all, and
``Sweep.dynamics`` gives each head's score against training step, with change-points, and the picture.
"""

from __future__ import annotations

import sys
from pathlib import Path

import torch
import transformers

from causal_probe.sweep import sweep

VOCAB, LENGTH, BATCH = 64, 40, 64
STEPS = [0, 50, 100, 125, 150, 175, 200, 225, 250, 300, 350, 400, 500]


def main(folder: str) -> None:
    """Train, sweep, and draw."""
    torch.set_num_threads(1)
    top = Path(folder)
    train(top / "run")
    spec = {
        "probes": {"scan": {"templates": ["previous-token", "induction"]}},
        "grid": {"model": [str(top / "run" / f"step{step}") for step in STEPS], "seed": [0, 1]},
        "settings": {"n_sequences": 32, "period": 16},
    }
    found = sweep(spec, out=top / "sweep", progress=True)
    for template in ("previous-token", "induction"):
        over_time = found.dynamics(template)
        print(f"\n{template}\n{over_time}")
        over_time.figure(title=f"{template}, head by head", value="excess").savefig(top / f"{template}.png")


def train(folder: Path) -> None:
    """Train on the prediction of repeated tokens; keep the weights at each of STEPS."""
    if (folder / f"step{STEPS[-1]}").exists():
        return
    torch.manual_seed(0)
    shape = {"num_hidden_layers": 2, "num_attention_heads": 4, "hidden_size": 64, "intermediate_size": 128}
    config = transformers.LlamaConfig(
        vocab_size=VOCAB, max_position_embeddings=LENGTH, attn_implementation="eager", **shape
    )
    model = transformers.LlamaForCausalLM(config)
    optimizer = torch.optim.AdamW(model.parameters(), lr=3e-3, weight_decay=0.01)
    for step in range(STEPS[-1] + 1):
        if step in STEPS:
            model.save_pretrained(folder / f"step{step}")
        period = int(torch.randint(8, LENGTH // 2 + 1, ()))
        tokens = torch.randint(VOCAB, (BATCH, period)).repeat(1, LENGTH // period + 1)[:, :LENGTH]
        logits = model(tokens).logits[:, period - 1 : -1]  # what can be known
        loss = torch.nn.functional.cross_entropy(logits.flatten(0, 1), tokens[:, period:].flatten())
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        if step in STEPS:
            print(f"step {step}: loss {loss.item():.3f}", flush=True)


if __name__ == "__main__":
    main(*sys.argv[1:])
