"""A training step of one linear layer on in-context regression at batch 2,048, sampling included, beside a peer measured in the same run.

The peer is the authors' method as their code has it (von Oswald et al. 2022), written in torch: every product at every position, the
layer's four weights one after the other, the gradient's norm clipped, Adam. The figure of their own code (JAX 0.10.2, compiled, two CPU
cores, another day) stands beside as context.
"""

from __future__ import annotations

import math
from typing import Any

import pytest
import torch
from torch import Tensor

from causal_probe.models import LinearTransformer
from causal_probe.tasks import LinearRegression, generator
from causal_probe.training import adam, minimise, regression_loss

BATCH_SIZE = 2_048
#: Steps in one timing.
REPEATS = 10
#: Milliseconds of their code.
JAX_STEP = 23.0


class DensePeer:
    """A linear layer on all tokens, with its own sampler and step."""

    def __init__(self, task: LinearRegression, seed: int) -> None:
        self.task, self.generator = task, generator(seed, "peer")
        width = task.d_token
        self.weights = [
            (math.sqrt(0.002 / width) * torch.randn(width, width, generator=self.generator)).requires_grad_()
            for _ in range(4)
        ]
        self.optimizer = torch.optim.AdamW(self.weights, lr=1e-3, weight_decay=0)

    def __call__(self, tokens: Tensor) -> Tensor:
        Q, K, V, P = self.weights
        seen = tokens[:, :-1]
        scores = torch.einsum("bth,bTh->btT", tokens @ Q, seen @ K)
        return -(tokens + torch.einsum("btT,bTh->bth", scores, seen @ V) @ P)[:, -1, -1]

    def sample(self) -> tuple[Tensor, Tensor]:
        n, d = self.task.n_examples, self.task.d_x
        w = torch.randn(BATCH_SIZE, d, 1, generator=self.generator)
        x = torch.rand(BATCH_SIZE, n, d, generator=self.generator) - 0.5
        x_query = torch.rand(BATCH_SIZE, 1, d, generator=self.generator) - 0.5
        tokens = torch.cat([torch.cat([x, x @ w], -1), torch.cat([x_query, torch.zeros(BATCH_SIZE, 1, 1)], -1)], 1)
        return tokens, (x_query @ w)[:, 0, 0]

    def step(self) -> None:
        tokens, target = self.sample()
        loss = 0.5 * (self(tokens) - target).square().mean()
        self.optimizer.zero_grad()
        loss.backward()
        torch.nn.utils.clip_grad_norm_(self.weights, 1e-3)
        self.optimizer.step()


def test_step(benchmark: Any, request: pytest.FixtureRequest) -> None:
    """A step of Adam at batch 2,048."""
    task = LinearRegression(10, 10)
    model, peer = LinearTransformer(11, 11).initialise(generator(0, "weights")), DensePeer(task, 0)
    with torch.no_grad():  # the peer is the same function
        for name, weight in zip("QKV", peer.weights, strict=False):
            weight.copy_(getattr(model.blocks[0].attn, f"W_{name}")[0])
        peer.weights[3].copy_(model.blocks[0].attn.W_O[0])
        tokens = task.sample(8, generator(1, "x")).tokens
        torch.testing.assert_close(model.predict(tokens)[:, 0], peer(tokens), rtol=1e-4, atol=1e-6)
    loss, timer = regression_loss(model, task, generator(0, "training")), benchmark._timer

    def ours() -> None:
        minimise(model, loss, adam(REPEATS, batch_size=BATCH_SIZE), clip=1e-3)

    def theirs() -> None:
        for _ in range(REPEATS):
            peer.step()

    seconds: list[tuple[float, float]] = []
    for _ in range(8):  # in turns, so that a busy machine is busy for both
        start = timer()
        ours()
        middle = timer()
        theirs()
        seconds.append(((middle - start) / REPEATS, (timer() - middle) / REPEATS))
    ours_ms, peer_ms = (1e3 * sorted(each)[len(each) // 2] for each in zip(*seconds[1:], strict=True))
    benchmark.pedantic(ours, rounds=5)
    line = (
        f"step of a linear layer, batch {BATCH_SIZE:,}, torch {torch.__version__}, {torch.get_num_threads()} thread(s), medians: {ours_ms:.2f} ms, "
        f"dense peer {peer_ms:.2f} ms, ratio {peer_ms / ours_ms:.1f} x; authors' JAX {JAX_STEP:.0f} ms, ratio {JAX_STEP / ours_ms:.1f} x"
    )
    reporter = request.config.pluginmanager.getplugin("terminalreporter")
    with request.config.pluginmanager.getplugin("capturemanager").global_and_fixture_disabled():
        reporter.write_line("")
        reporter.write_line(line)
