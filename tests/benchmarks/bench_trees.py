"""Do encoders that are trained here compute along trees? ``python tests/benchmarks/bench_trees.py [--seed S] [--steps N]``.

Two small encoders, each trained on sentences of known trees: one to fill in masked words of a small English grammar, one to evaluate expressions in prefix order, whose value is built along
their tree. Tree projections at steps 0 (untrained) and later, on sentences that were not trained on.
"""

from __future__ import annotations

import argparse
import time
from collections.abc import Callable, Iterator
from typing import Any

import numpy as np
import torch
import transformers
from torch import Tensor

from causal_probe import syntax
from causal_probe.syntax.treebank import Sentence

OPERATORS: dict[str, Callable[[int, int], int]] = {
    "max": max,
    "min": min,
    "first": lambda a, b: a,
    "second": lambda a, b: b,
}
DIGITS = [str(i) for i in range(8)]
#: Training sentences, those that trees are projected from, and sentences in a batch.
TRAINED, PROJECTED, BATCH = 20_000, 120, 64
IGNORED = -100


def expression(rng: np.random.Generator, depth: int) -> tuple[list[str], list[int], int]:
    """Words in prefix order, governors within them (-1 for the operator on top), and the value."""
    if depth == 0 or rng.random() < 0.25:
        digit = int(rng.integers(len(DIGITS)))
        return [DIGITS[digit]], [-1], digit
    name = str(rng.choice([*OPERATORS]))
    words, governors, values = [name], [-1], []
    for _ in range(2):
        its, under, value = expression(rng, depth - 1)
        place = len(words)
        words += its
        governors += [0 if governor < 0 else governor + place for governor in under]
        values.append(value)
    return words, governors, OPERATORS[name](*values)


def expressions(n: int, seed: int) -> list[tuple[Sentence, int]]:
    """Different ones of 5 to 15 words, with their values."""
    rng, found = np.random.default_rng(seed), {}
    while len(found) < n:
        words, governors, value = expression(rng, 3)
        if 5 <= len(words) <= 15:
            found[tuple(words)] = Sentence(tuple(words), tuple(governors), ("",) * len(words)), value
    return [*found.values()]


def tokenizer(words: list[str]) -> Any:
    """One token a word, between a start and an end."""
    from tokenizers import Tokenizer, models, pre_tokenizers, processors

    names = {name: i for i, name in enumerate(["<pad>", "<s>", "</s>", "<mask>", "<unknown>", *words])}
    fast = Tokenizer(models.WordLevel(names, unk_token="<unknown>"))
    fast.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    fast.post_processor = processors.TemplateProcessing(single="<s> $A </s>", special_tokens=[("<s>", 1), ("</s>", 2)])
    ends = {"pad_token": "<pad>", "bos_token": "<s>", "eos_token": "</s>", "mask_token": "<mask>"}
    return transformers.PreTrainedTokenizerFast(tokenizer_object=fast, **ends)


def padded(rows: list[list[int]]) -> Tensor:
    return torch.nn.utils.rnn.pad_sequence([torch.tensor(row) for row in rows], batch_first=True)


def words_to_fill_in(
    fast: Any, n: int, seed: int
) -> tuple[list[Sentence], Callable[[np.random.Generator], tuple[Tensor, Tensor]]]:
    """Sentences to project, and batches (tokens with 15% masked, the masked ones)."""
    sentences = syntax.generated_sentences(n + PROJECTED, seed=seed)
    rows = [fast(" ".join(each.words))["input_ids"] for each in sentences[:n]]

    def batch(rng: np.random.Generator) -> tuple[Tensor, Tensor]:
        tokens = padded([rows[i] for i in rng.integers(n, size=BATCH)])
        chosen = torch.from_numpy(rng.random(tokens.shape) < 0.15) & (tokens > 4)
        return torch.where(chosen, fast.mask_token_id, tokens), torch.where(chosen, tokens, IGNORED)

    return [*sentences[n:]], batch


def values_to_tell(
    fast: Any, n: int, seed: int
) -> tuple[list[Sentence], Callable[[np.random.Generator], tuple[Tensor, Tensor]]]:
    """Expressions to project, and batches (tokens, the value at the start)."""
    pairs = expressions(n + PROJECTED, seed)
    rows = [fast(" ".join(each.words))["input_ids"] for each, _ in pairs[:n]]
    values = [fast.convert_tokens_to_ids(DIGITS[value]) for _, value in pairs[:n]]

    def batch(rng: np.random.Generator) -> tuple[Tensor, Tensor]:
        some = rng.integers(n, size=BATCH)
        tokens = padded([rows[i] for i in some])
        labels = torch.full_like(tokens, IGNORED)
        labels[:, 0] = torch.tensor([values[i] for i in some])
        return tokens, labels

    return [each for each, _ in pairs[n:]], batch


def trained(model: Any, batch: Any, steps: list[int], seed: int) -> Iterator[tuple[int, float, float]]:
    """(step, loss, share of right answers on the last 50 batches) at each of the steps."""
    rng, recent = np.random.default_rng([seed, 1]), []
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-3, weight_decay=0.01)
    rate = torch.optim.lr_scheduler.LambdaLR(optimizer, lambda step: min(1.0, (step + 1) / 100))
    for step in range(max(steps) + 1):
        if step in steps:
            model.eval()
            losses = np.array(recent[-50:] or [(np.nan, np.nan)])
            yield step, *losses.mean(0)
        model.train()
        tokens, labels = batch(rng)
        found = model(input_ids=tokens, attention_mask=(tokens != 0).long(), labels=labels)
        optimizer.zero_grad()
        found.loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        rate.step()
        told = labels != IGNORED
        recent.append((found.loss.item(), (found.logits.argmax(-1)[told] == labels[told]).float().mean().item()))


def show(name: str, words: list[str], data: Any, steps: list[int], seed: int) -> None:
    """Train one encoder, and print its trees."""
    fast = tokenizer(words)
    sentences, batch = data(fast, TRAINED, seed)
    torch.manual_seed(seed)
    config = transformers.BertConfig(
        vocab_size=len(fast), hidden_size=64, num_hidden_layers=4, num_attention_heads=4, intermediate_size=256, max_position_embeddings=48,
        hidden_dropout_prob=0.0, attention_probs_dropout_prob=0.0, pad_token_id=0, attn_implementation="eager",
    )  # fmt: skip
    model, start = transformers.BertForMaskedLM(config), time.process_time()
    for step, loss, right in trained(model, batch, steps, seed):
        found = syntax.tree_projection(model.bert, sentences, tokenizer=fast, seed=seed)
        trees = ", ".join(
            f"{each.tree} {each.f1:.3f}"
            + ("" if each.ahead is None else f" (ahead {each.ahead:+.3f} ± {each.stderr:.3f}, p = {each.p_value:.2g})")
            for each in found.trees
        )
        print(
            f"{name}, step {step}: loss {loss:.3f}, right {right:.3f} | masked from layer {found.first_layer} | agreement less control {found.agreement - found.control:.4f} ± "
            f"{found.agreement_stderr:.4f} | t-score {found.t_score:.3f} ± {found.t_stderr:.3f} | F1 {trees} | {time.process_time() - start:.0f} CPU s",
            flush=True,
        )


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--steps", type=int, default=4000)
    asked = parser.parse_args()
    steps = [0, *(round(asked.steps * share) for share in (0.05, 0.25, 1.0))]
    english = sorted({word for each in syntax.generated_sentences(2000, seed=0) for word in each.words})
    show("masked words", english, words_to_fill_in, steps, asked.seed)
    show("values of expressions", [*OPERATORS, *DIGITS], values_to_tell, steps, asked.seed)


if __name__ == "__main__":
    main()
