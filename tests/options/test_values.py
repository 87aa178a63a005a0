"""What an option takes: numbers, choices, texts and lists of them, each refused with one error."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Annotated, Any, Literal

import numpy as np
import pytest

from causal_probe.arguments import Help, check_value
from causal_probe.errors import CausalProbeError
from causal_probe.options.recover import RecoverOptions

Word = Literal["auto", "yes"]


@pytest.mark.parametrize(
    ("value", "hint", "taken"),
    [
        (3, int, 3),
        (np.int64(3), int, 3),
        (3, float, 3.0),
        (np.float32(0.5), float, 0.5),
        (None, int | None, None),
        ("auto", int | Word, "auto"),
        (7, int | Word, 7),
        ([2, 1], Sequence[int], (2, 1)),
        (np.arange(2), Sequence[int], (0, 1)),
        (iter(["a"]), Sequence[str] | None, ("a",)),
        (Path("x"), "path", Path("x")),
        (object, Any, object),
        (True, bool, True),
    ],
)
def test_what_is_taken(value: Any, hint: Any, taken: Any) -> None:
    import os

    found = check_value("x", value, str | os.PathLike[str] if hint == "path" else hint)
    assert found == taken
    assert type(found) is type(taken)


@pytest.mark.parametrize(
    ("value", "hint", "words"),
    [
        (True, int, "`x` is True. It must be a whole number of at least 1."),
        (0, int, "of at least 1"),
        (1.0, int, "a whole number"),
        ("3", int, "'3'"),
        (10**20, int, "100000000000000000000"),
        (None, int, "None"),
        (np.float64(2), int, "a whole number"),
        (float("nan"), float, "nan. It must be a finite number"),
        (float("inf"), float, "inf"),
        (10**400, float, "a finite number"),
        ("0.1", float, "'0.1'"),
        (False, float, "False"),
        (1, bool, "True or False"),
        (1, str, "a text"),
        ("auot", Word, "did you mean 'auto'? It must be 'auto' or 'yes'."),
        (1, Word, "'auto' or 'yes'"),
        ("ys", int | Word | None, "did you mean 'yes'? It must be a whole number of at least 1 or 'auto' or 'yes' or None"),
        ("2,1", Sequence[int], "a sequence, each of it a whole number of at least 1"),
        ([2, 0], Sequence[int], "[2, 0]"),
        ([2, "1"], Sequence[int], "a sequence"),
        (3, Sequence[int], "a sequence"),
        (["a", "yes"], Sequence[Word], "'auto' or 'yes'"),
        ("x" * 300, int, "..."),
    ],
)  # fmt: skip
def test_what_is_refused(value: Any, hint: Any, words: str) -> None:
    with pytest.raises(CausalProbeError) as refused:
        check_value("x", value, hint, Help("", least=1))
    assert str(refused.value).startswith("`x` is ")
    assert words in str(refused.value)
    assert len(str(refused.value)) < 300


@pytest.mark.parametrize(
    ("about", "inside", "outside"),
    [
        (Help("", least=0, most=1), (0, 0.5, 1), (-1e-9, 1.1)),
        (Help("", above=0, below=1), (1e-9, 0.5), (0, 1, -1, 2)),
    ],
)
def test_ranges(about: Help, inside: tuple[float, ...], outside: tuple[float, ...]) -> None:
    assert [check_value("x", value, float, about) for value in inside] == [float(value) for value in inside]
    for value in outside:
        with pytest.raises(CausalProbeError, match=r"of (at least 0 and at most|more than 0 and less than) 1\."):
            check_value("x", value, float, about)


def test_a_type_carries_its_own_range() -> None:
    with pytest.raises(CausalProbeError, match="of at least 2 or None"):
        check_value("x", 1, Annotated[int | None, Help("", least=2)])


def test_a_tilde_is_the_home_folder_in_out_too(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HOME", "/" + "home/me")
    assert RecoverOptions("chain", out="~/x").out == "/" + "home/me/x"
    with pytest.raises(CausalProbeError, match="no user of that name"):
        RecoverOptions("chain", out="~nouser/x")
