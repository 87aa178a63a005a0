"""Plain JSON types: of every kind of value, and nothing that JSON has not."""

from __future__ import annotations

import dataclasses
import enum
import json
import math
import os
from pathlib import Path
from typing import Any, NamedTuple

import networkx as nx
import numpy as np
import pandas as pd
import pytest
import torch

from causal_probe.errors import CausalProbeError
from causal_probe.results import BINARY, UNSAVED, to_jsonable, write_json
from causal_probe.results.jsonable import set_aside


@dataclasses.dataclass(frozen=True)
class Point:
    x: float
    where: Path


class Colour(enum.Enum):
    RED = "red"


class Pair(NamedTuple):
    left: int
    right: float | None


@dataclasses.dataclass(frozen=True)
class Square:
    DERIVED = ("area",)

    side: float
    corners: np.ndarray = dataclasses.field(metadata=BINARY)
    model: object = dataclasses.field(default=None, metadata=UNSAVED)

    @property
    def area(self) -> float:
        return self.side**2


@pytest.mark.parametrize(
    ("value", "plain"),
    [
        (None, None),
        (True, True),
        (np.bool_(False), False),
        (np.int64(3), 3),
        (np.float32(0.5), 0.5),
        (np.array([[1.5, 2.5]]), [[1.5, 2.5]]),
        (np.array(7), 7),
        (torch.tensor([1, 2]), [1, 2]),
        (torch.tensor(2.0, requires_grad=True), 2.0),
        ((1, "a"), [1, "a"]),
        ({3, 1, 2}, [1, 2, 3]),
        ({1: {"a": (2,)}}, {"1": {"a": [2]}}),
        (Path("a") / "b", os.path.join("a", "b")),
        (Point(0.5, Path("here")), {"x": 0.5, "where": "here"}),
        (Colour.RED, "red"),
        (Pair(1, None), {"left": 1, "right": None}),
        ({("a", 1): Pair(1, 0.5)}, [[["a", 1], {"left": 1, "right": 0.5}]]),
        (Square(2.0, np.zeros(2), object()), {"area": 4.0, "side": 2.0}),
        (pd.DataFrame({"x": [1.0, np.nan], "name": ["a", None]}), {"x": [1.0, None], "name": ["a", None]}),
    ],
)
def test_plain_json_types(value: Any, plain: Any) -> None:
    found = to_jsonable(value)
    assert found == plain
    assert type(found) is type(plain)
    json.dumps(found, allow_nan=False)


def test_a_graph_is_node_link_with_the_key_edges() -> None:
    graph = nx.DiGraph([(0, 2), (1, 2)])
    found = to_jsonable(graph)
    assert [(edge["source"], edge["target"]) for edge in found["edges"]] == [(0, 2), (1, 2)]
    assert nx.utils.graphs_equal(nx.node_link_graph(found, edges="edges"), graph)


@pytest.mark.parametrize(
    "value",
    [math.nan, [math.inf], {"a": -math.inf}, np.float32("nan"), np.array([[0.0, np.nan]]), torch.tensor(math.inf)],
)
def test_what_is_not_finite_is_refused_wherever_it_is(value: Any, tmp_path: Path) -> None:
    with pytest.raises(CausalProbeError, match="What is undefined must be None with a reason beside it"):
        write_json(tmp_path / "result.json", {"deep": [value]})
    assert list(tmp_path.iterdir()) == []


def test_what_has_no_plain_form_is_refused() -> None:
    with pytest.raises(CausalProbeError, match="A value of type complex can't be written as JSON"):
        to_jsonable([1j])


def test_arrays_are_set_aside_under_names_of_their_own() -> None:
    plain, arrays = set_aside({"a": {"b": np.array([np.nan])}, "a.b": np.ones(1), "c": Square(2.0, np.zeros(2))})
    assert plain == {
        "a": {"b": {"$array": "a.b"}},
        "a.b": {"$array": "a.b'"},
        "c": {"side": 2.0, "corners": {"$array": "c.corners"}},
    }
    assert {name: array.tolist() for name, array in arrays.items() if name != "a.b"} == {
        "a.b'": [1.0],
        "c.corners": [0.0, 0.0],
    }
    with pytest.raises(CausalProbeError, match="stands for an array"):
        set_aside({"$array": 1})
