"""Exact information against a brute-force enumeration of all sequences, and the bounds that hold between its numbers."""

from __future__ import annotations

import math

import networkx as nx
import numpy as np
import pytest
import torch

from causal_probe import graphs
from causal_probe.errors import CausalProbeError
from causal_probe.tasks import InContextMarkov
from causal_probe.tasks.information import information, joint_law, predicted_information
from tests.tasks.tiny_tasks import TREES, law, make, random_tables


def by_enumeration(name: str, seed: int) -> tuple[dict[str, np.ndarray], np.ndarray, nx.DiGraph]:
    task = make(TREES[name])
    tables = random_tables(task, seed)
    pi = tables[1]
    probability = law(TREES[name], tables, 3, tree=True).sum(-1)  # without the query
    n = len(TREES[name])
    found = {key: np.zeros((n, n)) for key in ("g", "chi2", "shannon", "bound")}
    mu = probability.sum(tuple(range(1, n)))
    edge = (mu[:, None] * pi**2 / mu).sum() - 1
    for i in range(n):
        for j in range(n):
            joint = np.diag(probability.sum(tuple(k for k in range(n) if k != i)))
            if i != j:
                joint = probability.sum(tuple(k for k in range(n) if k not in (i, j)))
                joint = joint if i < j else joint.T
            independent = mu[:, None] * mu
            found["chi2"][i, j] = (joint**2 / independent).sum() - 1
            kept = joint > 0
            found["shannon"][i, j] = (joint[kept] * np.log(joint[kept] / independent[kept])).sum()
            found["g"][i, j] = (pi.T / mu[:, None] * joint).sum() - 1
            found["bound"][i, j] = math.sqrt(max(0, edge * found["chi2"][i, j]))
    return found, pi, task.graph


@pytest.mark.parametrize("name", TREES)
def test_every_number_is_the_enumeration_s(name: str) -> None:
    matrices = []
    expected: dict[str, list[np.ndarray]] = {}
    for seed in range(3):
        found, pi, graph = by_enumeration(name, seed)
        matrices.append(pi)
        one = information(graph, torch.tensor(pi)[None])
        assert one.stderr is None
        for key, values in found.items():
            np.testing.assert_allclose(getattr(one, key), values, atol=2e-7 if key == "bound" else 1e-12)
            expected.setdefault(key, []).append(values)
    several = information(graph, torch.tensor(np.array(matrices)))
    assert several.stderr is not None
    for key, values in expected.items():
        np.testing.assert_allclose(getattr(several, key), np.mean(values, 0), atol=2e-7)
        np.testing.assert_allclose(several.stderr[key], np.std(values, 0, ddof=1) / math.sqrt(3), atol=1e-6)


def test_the_joint_law_of_two_siblings_is_the_enumeration_s() -> None:
    task = make(TREES["two roots with children"])
    tables = random_tables(task, 0)
    probability = law(TREES["two roots with children"], tables, 3, tree=True).sum((0, 2, 3, 5))
    joint = joint_law(task.graph, torch.tensor(tables[1])[None], 4, 1)
    np.testing.assert_allclose(joint[0].numpy(), probability.T, atol=1e-12)


def test_the_bounds_hold_on_every_pair_and_the_parent_is_the_largest() -> None:
    task = InContextMarkov(graphs.random_forest(15, root_probability=0.3, seed=3), 4, 0.2)
    found = predicted_information(task, draws=64, generator=torch.Generator().manual_seed(0))
    assert (np.abs(found.g) <= found.bound + 1e-9).all()
    for child, its in enumerate(task.parents[:15]):
        earlier = found.g[child, :child]
        if its:
            assert int(earlier.argmax()) == its[0]
            assert found.g[child, its[0]] == pytest.approx(found.edge_chi2)
            assert found.chi2[child, its[0]] == pytest.approx(found.edge_chi2)
            assert (found.bound[child, :child] <= found.edge_chi2 + 1e-9).all()
            assert (found.chi2[child, :child] <= found.edge_chi2 + 1e-9).all()
        else:
            assert not earlier.any()
    assert (found.shannon <= np.log1p(found.chi2) + 1e-9).all()  # Jensen


def test_off_the_edges_g_is_not_the_information() -> None:
    """The grandparent: g_ij and I_chi2 differ, and neither is always the larger."""
    lazy = information(graphs.chain(3), torch.tensor([[[0.9, 0.1], [0.1, 0.9]]], dtype=torch.float64))
    assert lazy.g[2, 0] > lazy.chi2[2, 0]
    restless = information(graphs.chain(3), torch.tensor([[[0.1, 0.9], [0.9, 0.1]]], dtype=torch.float64))
    assert restless.g[2, 0] < 0 < restless.chi2[2, 0]


@pytest.mark.parametrize("concentration", [1e-3, 100.0])
def test_extreme_concentrations_stay_finite(concentration: float) -> None:
    task = InContextMarkov(graphs.chain(6), 3, concentration)
    found = predicted_information(task, draws=200, generator=torch.Generator().manual_seed(0))
    for values in (found.g, found.chi2, found.shannon, found.bound):
        assert np.isfinite(values).all()
    assert (found.chi2 <= 2 + 1e-6).all()


def test_bad_input_is_refused() -> None:
    with pytest.raises(CausalProbeError, match="several parents"):
        information(graphs.two_parent_tree(4), torch.eye(2)[None])
    with pytest.raises(CausalProbeError, match="without a transition matrix"):
        information(graphs.chain(2), torch.zeros(0, 2, 2))
    two = InContextMarkov(graphs.two_parent_tree(5), 3)
    with pytest.raises(CausalProbeError, match="tree tasks"):
        predicted_information(two, generator=torch.Generator())
    with pytest.raises(CausalProbeError, match="draw at least 2"):
        predicted_information(make(TREES["one node"]), draws=1, generator=torch.Generator())
