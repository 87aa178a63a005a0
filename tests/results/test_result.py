"""A result of every kind of field: told, shown, kept and cited."""

from __future__ import annotations

import dataclasses
import enum
import importlib
import json
import pkgutil
from collections.abc import Mapping
from pathlib import Path
from typing import Any, Literal, NamedTuple, TypeVar

import networkx as nx
import numpy as np
import pandas as pd
import pytest
import torch
from hypothesis import HealthCheck, Phase, given, settings
from hypothesis import strategies as st
from hypothesis.extra import numpy as arrays_of
from jaxtyping import Float
from torch import Tensor
from typing_extensions import TypeAliasType

import causal_probe
from causal_probe.errors import CausalProbeError
from causal_probe.results import (
    BINARY,
    UNSAVED,
    Result,
    Table,
    base,
    load,
    merge_provenance,
    read_arrays,
    read_sealed,
    write_arrays,
)
from causal_probe.results.decoding import Undecodable, decode, hints_of


class Mood(enum.Enum):
    GOOD = "good"
    BAD = "bad"


class Estimate(NamedTuple):
    value: float
    stderr: float | None


@dataclasses.dataclass(frozen=True)
class Edge:
    parent: int
    child: int
    found: Estimate


@dataclasses.dataclass(frozen=True, eq=False, repr=False)
class Inner(Result):
    KIND = "test: inner"

    values: Float[np.ndarray, " n"]


@dataclasses.dataclass(frozen=True, eq=False, repr=False)
class Everything(Result):
    KIND = "test: everything"
    WORKS = ("elhage2021",)
    DERIVED = ("size",)

    text: str
    number: int | None
    real: float
    yes: bool
    either: int | str
    rule: Literal["mean", "sequence"]
    mood: Mood
    layers: tuple[Float[np.ndarray, "_head query key"], ...]
    by_layer: Mapping[int, Float[np.ndarray, "..."]]
    tensor: Float[Tensor, "*shape"]
    raw: np.ndarray = dataclasses.field(metadata=BINARY)
    graph: nx.DiGraph
    edges: tuple[Edge, ...]
    estimate: Estimate
    pair: tuple[int, str]
    names: frozenset[str]
    listed: list[float]
    shared: Mapping[tuple[str, str], int]
    nested: Mapping[str, tuple[Estimate | None, ...]]
    frame: pd.DataFrame | None
    inner: Inner | None
    where: Path
    model: object = dataclasses.field(default=None, metadata=UNSAVED)

    @property
    def size(self) -> int:
        """Number of layers."""
        return len(self.layers)

    @property
    def undefined(self) -> dict[str, str]:
        return {"number": "nobody counted"} if self.number is None else {}

    @property
    def methods(self) -> str:
        return f"It was measured ({self.measured_with})."

    def table(self) -> Table:
        return Table(
            f"Everything about {self.text}", ("what", "how much"), [(self.text, self.real), ("=1+1", self.number)]
        )


def same(one: Any, other: Any) -> bool:
    """Equal in type and value, to the last bit."""
    if isinstance(one, np.ndarray):
        return one.dtype == other.dtype and one.shape == other.shape and one.tobytes() == other.tobytes()
    if isinstance(one, Tensor):
        return bool(one.dtype == other.dtype) and same(one.numpy(), other.numpy())
    if isinstance(one, nx.Graph):
        return type(one) is type(other) and bool(nx.utils.graphs_equal(one, other))
    if isinstance(one, pd.DataFrame):
        return one.equals(other)
    if dataclasses.is_dataclass(one):
        names = [field.name for field in dataclasses.fields(one) if field.name != "model"]
        return type(one) is type(other) and all(same(getattr(one, name), getattr(other, name)) for name in names)
    if isinstance(one, Mapping):
        return list(one) == list(other) and all(same(one[key], other[key]) for key in one)
    if isinstance(one, (tuple, list)):
        return type(one) is type(other) and len(one) == len(other) and all(map(same, one, other))
    if isinstance(one, frozenset):
        return type(one) is type(other) and one == other
    return type(one) is type(other) and one == other and str(one) == str(other)  # -0.0 is not 0.0


REAL = st.floats(allow_nan=False, allow_infinity=False)
TEXT = st.text(max_size=8)
ESTIMATE = st.builds(Estimate, REAL, st.none() | REAL)


def floats(*shape: int, dtype: type = np.float64) -> st.SearchStrategy[Any]:
    return arrays_of.arrays(dtype, shape)  # NaN and infinities too


@st.composite
def graphs(draw: st.DrawFn) -> nx.DiGraph:
    graph = nx.empty_graph(draw(st.integers(0, 4)), create_using=nx.DiGraph)
    for child in range(1, len(graph)):
        graph.add_edge(child - 1, child, weight=draw(REAL), stderr=draw(st.none() | REAL))
    return graph


FRAMES = st.builds(
    lambda rows: pd.DataFrame({"x": [x for x, _ in rows], "name": [name for _, name in rows]}),
    st.lists(st.tuples(st.floats(), TEXT), min_size=1, max_size=3),
)
PLAIN = st.recursive(
    st.none() | st.booleans() | st.integers() | REAL | TEXT, lambda inner: st.lists(inner, max_size=2), max_leaves=4
)
EVERYTHING = st.builds(
    Everything,
    text=TEXT,
    number=st.none() | st.integers(),
    real=REAL,
    yes=st.booleans(),
    either=st.integers() | TEXT,
    rule=st.sampled_from(["mean", "sequence"]),
    mood=st.sampled_from(Mood),
    layers=st.lists(floats(2, 3, 3) | floats(1, 3, 3, dtype=np.float32), max_size=2).map(tuple),
    by_layer=st.dictionaries(st.integers(-2, 3), floats(0, 2) | floats(), max_size=2),
    tensor=floats(2, 2, dtype=np.float32).map(torch.from_numpy),
    raw=arrays_of.arrays(np.int64, (3,)) | arrays_of.arrays(np.bool_, (2, 1)),
    graph=graphs(),
    edges=st.lists(st.builds(Edge, st.integers(), st.integers(), ESTIMATE), max_size=2).map(tuple),
    estimate=ESTIMATE,
    pair=st.tuples(st.integers(), TEXT),
    names=st.frozensets(TEXT, max_size=3),
    listed=st.lists(REAL, max_size=3),
    shared=st.dictionaries(st.tuples(TEXT, TEXT), st.integers(), max_size=2),
    nested=st.dictionaries(
        TEXT.filter(lambda text: text != "$array"), st.lists(st.none() | ESTIMATE, max_size=2).map(tuple), max_size=2
    ),
    frame=st.none() | FRAMES,
    inner=st.none() | st.builds(Inner, floats(2)),
    where=st.just(Path("a") / "b"),
    model=st.just(object()),
    settings=st.dictionaries(TEXT.filter(lambda text: text != "$array"), PLAIN, max_size=3),
    provenance=st.just({"model": "m", "dtype": "float32", "device": "cpu"}),
)


def example(**changes: Any) -> Everything:
    zeros = np.zeros((1, 2, 2))
    made = Everything(
        text="</table><b>", number=None, real=0.5, yes=True, either=1, rule="mean", mood=Mood.GOOD, layers=(zeros,), by_layer={0: zeros},
        tensor=torch.ones(2), raw=np.arange(3), graph=nx.DiGraph([(0, 1)]), edges=(Edge(0, 1, Estimate(0.5, None)),),
        estimate=Estimate(1.0, 0.1), pair=(1, "a"), names=frozenset({"a"}), listed=[0.1], shared={("a", "b"): 2},
        nested={"a": (None, Estimate(1.0, None))}, frame=None, inner=Inner(np.ones(2)), where=Path("a"), model=object(),
        settings={"heads": (1, 1)}, provenance={"model": "m", "dtype": "float32", "device": "cpu"},
    )  # fmt: skip
    return dataclasses.replace(made, **changes)


@settings(
    max_examples=60,
    deadline=None,
    phases=[Phase.generate, Phase.shrink],
    database=None,
    suppress_health_check=[HealthCheck.function_scoped_fixture, HealthCheck.too_slow],
)
@given(result=EVERYTHING)
def test_what_is_saved_is_loaded(result: Everything, tmp_path: Path) -> None:
    path = tmp_path / "a.safetensors"
    result.save(path)
    found = Everything.load(path)
    assert same(result, found)
    assert found.model is None
    first = path.read_bytes()
    found.save(path)
    assert path.read_bytes() == first


# -------------------------------------------------------------------------------------------------------------- telling


def test_to_dict_is_strict_json_of_all_but_what_is_left_out() -> None:
    found = example().to_dict()
    assert json.loads(json.dumps(found, allow_nan=False)) == found
    assert list(found)[:3] == ["kind", "format", "size"]
    assert list(found)[-3:] == ["undefined", "settings", "provenance"]
    fields = {field.name for field in dataclasses.fields(Everything)} - {"raw", "model"}
    assert set(found) == fields | {"kind", "format", "size", "undefined"}
    assert found["estimate"] == {"value": 1.0, "stderr": 0.1}
    assert found["inner"]["kind"] == "test: inner"
    assert found["undefined"] == {"number": "nobody counted"}
    assert found["settings"] == {"heads": [1, 1]}


def test_shown_and_cited() -> None:
    result = example()
    assert repr(result).splitlines()[1].split() == ["what", "how", "much"]
    assert "<b>" not in result._repr_html_()
    citation = result.cite()
    assert "elhage2021" in citation.bibtex
    assert citation.methods == f"It was measured ({result.measured_with})."
    assert "float32 on cpu" in citation.methods
    assert result.to_pandas()["how much"].iloc[0] == 0.5
    assert result.to_pandas()["how much"].isna().tolist() == [False, True]


# ----------------------------------------------------------------------------------------------------------------- files


def test_the_suffix_says_what_is_written(tmp_path: Path) -> None:
    result = example()
    result.save(tmp_path / "a.json")
    assert read_sealed(tmp_path / "a.json") == result.to_dict()
    result.save(tmp_path / "a.csv")
    assert (tmp_path / "a.csv").read_text().splitlines() == ["what,how much", "</table><b>,0.5", "'=1+1,"]
    result.save(tmp_path / "a.parquet")
    pd.testing.assert_frame_equal(pd.read_parquet(tmp_path / "a.parquet"), result.to_pandas())
    for name in ("a", "a.txt", "a.npz", "a.JSON"):
        with pytest.raises(CausalProbeError, match=r"ends in \.safetensors .*\.json, \.csv or \.parquet"):
            result.save(tmp_path / name)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["a.csv", "a.json", "a.parquet"]


def test_damaged_files_are_refused_or_load_equal(tmp_path: Path) -> None:
    path, result = tmp_path / "a.safetensors", example()
    result.save(path)
    whole, random, refused = path.read_bytes(), np.random.default_rng(0), 0
    for number, place in enumerate(map(int, random.integers(len(whole), size=150))):
        content = bytearray(whole)
        if number < 50:
            content[place] ^= 1 << int(random.integers(8))
        elif number < 100:
            del content[place:]
        else:
            content[place : place + 20] = bytes(len(content[place : place + 20]))
        path.write_bytes(bytes(content))
        try:
            assert same(load(path), result_of(result))
        except CausalProbeError as error:
            refused += len(str(error).splitlines())  # one line each
    assert 140 < refused <= 150


def result_of(result: Everything) -> Everything:
    """As it comes back: what is among the settings in plain JSON types."""
    return dataclasses.replace(result, settings={"heads": [1, 1]})


def test_load_finds_the_class_and_the_class_finds_its_own(tmp_path: Path) -> None:
    path = tmp_path / "a.safetensors"
    Inner(np.ones(2)).save(path)
    assert type(load(path)) is Inner
    assert type(Result.load(path)) is Inner
    with pytest.raises(CausalProbeError, match=r"holds test: inner \(Inner\), no Everything"):
        Everything.load(path)
    write_arrays(path, {}, about={"kind": "of another day", "format": 1})
    with pytest.raises(CausalProbeError, match="holds of another day, which no class that is imported reads"):
        load(path)
    write_arrays(path, {})
    with pytest.raises(CausalProbeError, match="holds no result, which no class"):
        load(path)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"format": 2}, "is of format 2, written by causal-probe .*; this version reads format 1. Upgrade"),
        ({"values": None}, "does not hold a whole Inner: values: .*was expected, and 'None' found"),
        ({"values": {"$array": "nowhere"}}, "the array 'nowhere' is missing"),
        ({"more": 1}, "fields that are missing or unknown: more"),
        ({"settings": [1]}, "settings"),
    ],
)
def test_what_does_not_fit_its_class(changes: dict[str, Any], message: str, tmp_path: Path) -> None:
    path = tmp_path / "a.safetensors"
    Inner(np.ones(2)).save(path)
    arrays, about = read_arrays(path)
    write_arrays(path, arrays, about={**about, **changes})
    with pytest.raises(CausalProbeError, match=message):
        load(path)


@pytest.mark.parametrize("array", [np.ones((2, 2)), np.ones(2, dtype=np.int64)])
def test_arrays_of_another_shape_or_dtype(array: np.ndarray, tmp_path: Path) -> None:
    path = tmp_path / "a.safetensors"
    Inner(np.ones(2)).save(path)
    _, about = read_arrays(path)
    write_arrays(path, {"values": array}, about=about)
    with pytest.raises(CausalProbeError, match=r"values: .*was expected"):
        load(path)


# ------------------------------------------------------------------------------------------------------------ provenance


def test_a_result_states_the_process_that_measured_it(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = tmp_path / "a.safetensors"
    monkeypatch.setattr(base, "this_process", lambda **about: {**about, "threads": 7, "versions": {"torch": "1.0"}})
    result = example()
    result.save(path)
    monkeypatch.undo()
    assert example().provenance["versions"]["torch"].startswith(torch.__version__.split("+")[0])
    found = dataclasses.replace(Everything.load(path), number=3)
    found.save(path)
    for each in (result, found, load(path)):
        assert each.provenance["versions"] == {"torch": "1.0"}
        assert each.provenance["threads"] == 7
        assert each.to_dict()["provenance"]["versions"] == {"torch": "1.0"}
    merged = dataclasses.replace(found, provenance=merge_provenance(found.provenance, example().provenance))
    assert merged.provenance["versions"]["torch"].startswith("1.0 and ")


# -------------------------------------------------------------------------------------------------------------- classes


def test_a_kind_is_of_one_class() -> None:
    with pytest.raises(TypeError, match="are both of the kind 'test: inner'"):

        class Other(Result):
            KIND = "test: inner"

    assert base._CLASSES["test: inner"] is Inner


def test_every_class_of_results_says_what_it_must() -> None:
    for module in pkgutil.walk_packages(causal_probe.__path__, "causal_probe."):
        if not module.name.endswith("__main__"):
            importlib.import_module(module.name)
    ours = {kind: cls for kind, cls in base._CLASSES.items() if cls.__module__.startswith("causal_probe.")}
    assert len(ours) >= 6
    for kind, cls in ours.items():
        assert dataclasses.is_dataclass(cls), kind
        assert cls.__dataclass_params__.frozen, kind  # type: ignore[attr-defined]
        holds_arrays = any("ndarray" in str(hint) or "Tensor" in str(hint) for hint in hints_of(cls).values())
        assert "__eq__" not in vars(cls) or not holds_arrays, f"{kind}: eq=False, or arrays are compared"
        assert cls.__repr__ is Result.__repr__, f"{kind}: repr=False, or its table is not shown"
        assert cls.methods is not Result.methods, kind
        assert cls.table is not Result.table, kind
        assert set(hints_of(cls)) >= {field.name for field in dataclasses.fields(cls)}, kind


def test_an_alias_of_a_type_is_the_type() -> None:
    """``NDArray`` is one from NumPy 2.5 and Python 3.12 on."""
    kind = TypeVar("kind")
    array = TypeAliasType("array", np.ndarray, type_params=(kind,))
    values = np.ones(3)
    assert decode(array[Any], values, find=type) is values
    assert decode(dict[str, array[Any]], {"a": values}, find=type)["a"] is values  # type: ignore[valid-type]
    with pytest.raises(Undecodable, match="was expected"):
        decode(array[Any], "text", find=type)
