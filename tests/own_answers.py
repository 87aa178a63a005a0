"""Prompts of which a random model knows the answers, since they are its own."""

from __future__ import annotations

import json
from typing import Any

import torch

from tests import tiny_huggingface as tiny


def own_answers(model: Any, n: int = 24) -> str:
    """A file of prompts for a tiny model and tokenizer: right is what it says rather than behind the corrupted prompt, wrong the other way round."""
    clean = tiny.tokens(n, 6)
    corrupted = clean.clone()
    corrupted[:, 2] = corrupted[:, 1]
    with torch.no_grad():
        logits, broken = (getattr(found, "logits", found) for found in (model(clean), model(corrupted)))
        likelier = (logits - broken)[:, -1, 3 : tiny.D_VOCAB - 2]
    right, wrong = (3 + likelier.argmax(-1)).tolist(), (3 + likelier.argmin(-1)).tolist()

    def text(tokens: list[int]) -> str:
        return " ".join(f"t{token}" for token in tokens)

    rows = zip(clean.tolist(), corrupted.tolist(), right, wrong, strict=True)
    lines = [{"clean": text(c), "corrupted": text(k), "answer": f" t{r}", "wrong": f" t{w}"} for c, k, r, w in rows]
    return "\n".join(json.dumps(line) for line in lines)
