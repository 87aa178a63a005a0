"""Where the graph lives in trained weights, and what its block is worth: three graphs, five ways of training.

The staged ones differ in what stage 2 moves: the layers above (the default), or everything, layer 0's token blocks included, by plain
gradient descent or by AdamW. Printed for each model: the block that holds the graph and the rank of its ablation's cost; the share of the
in-context skill that it is worth when it is set to zero, and when it is scrambled; what is left of the skill when it is alone in its
layer; and the largest share, by either ablation, of any other block of layer 0.
"""

from __future__ import annotations

import dataclasses
from typing import Any

import pytest

from causal_probe.graphs import choose_graph
from causal_probe.mechanisms import weight_graphs
from causal_probe.mechanisms.weight_result import WeightGraphs
from causal_probe.models import DisentangledTransformer
from causal_probe.tasks import InContextMarkov, generator
from causal_probe.training import fit, give_matcher, joint, staged
from causal_probe.training.stages import Stage

POSITIONS = 20
BELOW, ABOVE = staged(n_positions=POSITIONS)
BY_SGD = dataclasses.replace(ABOVE, optimizer="sgd", learning_rate=1.0, moves=("A0", "A1", "W_U"))
WAYS: dict[str, tuple[Stage, ...]] = {
    "staged": (BELOW, ABOVE),
    "staged, then all by SGD": (BELOW, BY_SGD),
    "staged, then all by AdamW": (BELOW, dataclasses.replace(ABOVE, moves=("A0", "A1", "W_U"))),
    "joint SGD": joint(),
    "joint AdamW": joint(optimizer="adamw"),
}
GRAPH = (0, 0, "position", "position")


@pytest.mark.parametrize("way", WAYS)
@pytest.mark.parametrize("name", ["chain", "pairs", "forest"])
def test_blocks(benchmark: Any, name: str, way: str) -> None:
    task = InContextMarkov(choose_graph(name, n_positions=POSITIONS, root_probability=0.5, seed=0), 3, 0.1)
    model = DisentangledTransformer(3, POSITIONS)
    if way.startswith("staged"):
        give_matcher(model)

    def run() -> WeightGraphs:
        fit(model, task, WAYS[way], generator=generator(0, "training"))
        return weight_graphs(model, task)

    found = benchmark.pedantic(run, rounds=1)
    block = found.block(*GRAPH)
    others = [b for b in found.blocks if b.layer == 0 and b is not block]
    zeroed, scrambled = (max(others, key=lambda b: getattr(b, kind) or 0) for kind in ("share", "scrambled"))
    holders = "; ".join(f"{b.name}{' transposed' if t else ''}" for b, t in found.holders) or "no block"
    print(f"\n{name}, {way}: loss {found.loss:.4f}, skill {found.skill:.4f}; the graph lives in {holders}")
    print(
        f"  L0H0 position x position: {block.as_it_stands} edges, rank {found.blocks.index(block) + 1}, zeroed {block.share:.1%} +- {block.share_stderr:.1%}, "
        f"scrambled {block.scrambled:.1%} +- {block.scrambled_stderr:.1%}, alone {block.alone:.1%}"
    )
    print(
        f"  others in layer 0: zeroed at most {zeroed.share:.1%} ({zeroed.name}), scrambled at most {scrambled.scrambled:.1%} ({scrambled.name})"
    )
    if way.startswith("staged"):
        assert found.holders[0][0] is block
    if way == "staged":
        assert block.scrambled > 0.9 - 2 * block.scrambled_stderr
