"""What is known of a tokenizer is read once, and again when it has changed."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest

from causal_probe.hooks import to_hooked
from causal_probe.hooks.tokens import content_tokens, special_tokens
from causal_probe.models import DisentangledTransformer
from tests import tiny_huggingface as tiny


def test_a_tokenizer_is_read_once_and_anew_when_it_has_grown(monkeypatch: pytest.MonkeyPatch) -> None:
    model = to_hooked(tiny.llama(), tiny.tokenizer(bos=True))
    tokenizer = model.tokenizer
    read: list[int] = []
    vocabulary: Callable[[], dict[str, int]] = tokenizer.get_vocab
    monkeypatch.setattr(tokenizer, "get_vocab", lambda: (read.append(1), vocabulary())[1])
    first = content_tokens(model).tolist()
    count = len(read)
    assert [content_tokens(model).tolist() for _ in range(3)] == [first] * 3
    assert len(read) == count <= 1
    assert len(tokenizer) < tiny.D_VOCAB
    tokenizer.add_tokens(["new"])
    assert content_tokens(model).tolist() == sorted([*first, tokenizer.convert_tokens_to_ids("new")])


def test_a_token_that_becomes_special_is_no_content_any_more() -> None:
    model = to_hooked(tiny.llama(), tiny.tokenizer())
    tokenizer = model.tokenizer
    word = tokenizer.convert_ids_to_tokens(7)
    assert 7 in content_tokens(model)
    tokenizer.add_special_tokens({"additional_special_tokens": [word]})
    assert 7 in special_tokens(model).ids
    assert 7 not in content_tokens(model)


def test_what_can_not_be_kept_is_read_each_time() -> None:
    class Slotted:
        __slots__ = ("inner",)
        __hash__ = None  # type: ignore[assignment]

        def __init__(self, inner: Any) -> None:
            self.inner = inner

        def __call__(self, *texts: Any, **options: Any) -> Any:
            return self.inner(*texts, **options)

        def __getattr__(self, name: str) -> Any:
            return getattr(self.inner, name)

    model: Any = DisentangledTransformer(tiny.D_VOCAB, 8)
    model.tokenizer = tiny.tokenizer()
    expected = content_tokens(model).tolist()
    model.tokenizer = Slotted(tiny.tokenizer())
    assert content_tokens(model).tolist() == expected
