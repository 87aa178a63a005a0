"""Circuits as papers describe them."""

from __future__ import annotations

import pytest

from causal_probe import circuits
from causal_probe.circuits.known import order_of
from causal_probe.circuits.published import CIRCUITS
from causal_probe.errors import CausalProbeError
from causal_probe.results import BIBLIOGRAPHY


@pytest.mark.parametrize("name", CIRCUITS)
def test_its_edges_go_forward_between_components_of_the_model(name: str) -> None:
    graph = circuits.published(name)
    assert graph.graph["work"] in BIBLIOGRAPHY
    for source, receiver in graph.edges:
        assert order_of(source) < order_of(receiver), (source, receiver)
        for component in (source, receiver.rpartition(".")[0] if receiver[-2:] in (".q", ".k", ".v") else receiver):
            if component.startswith("L"):
                layer, _, head = component[1:].removesuffix(".mlp").partition("H")
                assert 0 <= int(layer) < 12
                assert not head or 0 <= int(head) < 12


def test_the_circuit_of_indirect_objects_is_the_paper_s() -> None:
    ioi = circuits.published("ioi")
    assert sum(map(len, ioi.graph["roles"].values())) == 26  # heads, as the paper counts them
    assert {source for source, _ in ioi.in_edges("logits")} == {
        head for role, its in ioi.graph["roles"].items() if role.endswith("mover") for head in its
    }
    assert ("L8H10", "L9H9.q") in ioi.edges
    assert ("L9H9", "L9H6.q") not in ioi.edges


def test_every_number_greater_goes_through_a_late_mlp() -> None:
    graph = circuits.published("greater-than")
    assert ("L9H1", "L9.mlp") in graph.edges
    assert ("L9H1", "L8.mlp") not in graph.edges
    assert ("L8.mlp", "L8.mlp") not in graph.edges


def test_a_name_that_is_none_is_refused() -> None:
    with pytest.raises(CausalProbeError, match="did you mean 'ioi'"):
        circuits.published("oi")
