"""Text as sequences of tokens: streamed, document by document, in shards that add up to the whole."""

from __future__ import annotations

import dataclasses
import os
from collections.abc import Iterable, Iterator, Mapping
from pathlib import Path
from typing import Any

import torch
from jaxtyping import Int
from torch import Tensor

from causal_probe.errors import CausalProbeError
from causal_probe.hooks.check import HookedModel, describe
from causal_probe.hooks.preflight import context_length
from causal_probe.hooks.tokens import text_start

__all__ = ["Corpus", "CorpusCounts", "corpus", "read_documents"]

#: Sequences that are handed on together; the probes cut them further.
BATCH = 64


@dataclasses.dataclass(frozen=True)
class CorpusCounts:
    """What became of a corpus; counts of shards add up to those of the whole.

    Attributes
    ----------
    documents, sequences
        How many documents were read, and how many sequences they gave.
    tokens
        Tokens of the documents, without the tokens that start a sequence.
    left_over
        Of these, how many were left out: the end of each document, where it fills no sequence.
    """

    documents: int = 0
    sequences: int = 0
    tokens: int = 0
    left_over: int = 0

    def __add__(self, other: CorpusCounts) -> CorpusCounts:
        return CorpusCounts(
            self.documents + other.documents,
            self.sequences + other.sequences,
            self.tokens + other.tokens,
            self.left_over + other.left_over,
        )


@dataclasses.dataclass(frozen=True, eq=False)
class Corpus:
    """Sequences of tokens of one length, made as they are asked for: what a probe takes as its batches.

    No sequence holds text of two documents. A document gives as many sequences as it fills, one after the other, each with the start of
    a text (a BOS token, where there is one) in front; its end, which fills none, is left out and counted.

    Attributes
    ----------
    model
        Whose tokenizer is used.
    source
        See :func:`read_documents`. It is read anew at every pass.
    length
        Tokens in a sequence, its start included.
    bos
        See :func:`~causal_probe.hooks.text_start`.
    separator, field
        See :func:`read_documents`.
    shard
        (i, n): of the documents, counted from 0, those whose number is i modulo n.
    """

    model: HookedModel
    source: Any
    length: int
    bos: str = "auto"
    separator: str | None = None
    field: str = "text"
    shard: tuple[int, int] = (0, 1)

    def shards(self, n: int) -> tuple[Corpus, ...]:
        """The corpus in n parts, each document in one of them: scores of the parts merge to those of the whole."""
        i, m = self.shard
        if n < 1:
            raise CausalProbeError(f"A corpus can be cut into one shard or more; {n} were asked for.")
        return tuple(dataclasses.replace(self, shard=(i + m * j, m * n)) for j in range(n))

    def sequences(self) -> Iterator[Int[Tensor, " pos"]]:
        """The sequences, one by one."""
        for pieces, _ in self._documents():
            yield from pieces

    def counts(self) -> CorpusCounts:
        """What is left in and left out, in a pass that runs no model."""
        total = CorpusCounts()
        for _, its in self._documents():
            total += its
        return total

    def __iter__(self) -> Iterator[Int[Tensor, "batch pos"]]:
        """The sequences in batches."""
        device = describe(self.model)["device"] or "cpu"
        batch: list[Tensor] = []
        for sequence in self.sequences():
            batch.append(sequence)
            if len(batch) == BATCH:
                yield torch.stack(batch).to(device)
                batch = []
        if batch:
            yield torch.stack(batch).to(device)

    def _documents(self) -> Iterator[tuple[list[Tensor], CorpusCounts]]:
        tokenizer: Any = getattr(self.model, "tokenizer", None)
        start = torch.tensor(text_start(self.model, self.bos), dtype=torch.long)
        room = self.length - len(start)
        i, n = self.shard
        for number, text in enumerate(read_documents(self.source, separator=self.separator, field=self.field)):
            if number % n != i:
                continue
            tokens = torch.tensor(tokenizer(text, add_special_tokens=False)["input_ids"], dtype=torch.long)
            full = len(tokens) // room
            pieces = [torch.cat([start, piece]) for piece in tokens[: full * room].view(full, room)]
            yield pieces, CorpusCounts(1, full, len(tokens), len(tokens) - full * room)


def corpus(
    model: HookedModel,
    source: Any,
    *,
    length: int,
    bos: str = "auto",
    separator: str | None = None,
    field: str = "text",
) -> Corpus:
    """Text as batches for a probe: ``probes.scan(model, hooks.corpus(model, "texts", length=128))``.

    Parameters
    ----------
    model
        A model with a tokenizer.
    source, separator, field
        See :func:`read_documents`.
    length
        Tokens in a sequence, its start included; at most the model's context.
    bos
        Whether a BOS token comes first; see :func:`~causal_probe.hooks.text_start`.

    Raises
    ------
    CausalProbeError
        If the model has no tokenizer, or the length does not fit.
    """
    if getattr(model, "tokenizer", None) is None:
        raise CausalProbeError("Text was given, and the model has no tokenizer. Give tokens [batch, pos].")
    shortest, longest = len(text_start(model, bos)) + 1, context_length(model)
    if length < shortest or (longest is not None and length > longest):
        raise CausalProbeError(
            f"Sequences of {length} tokens were asked for; from {shortest} (with the start of a text) to {longest} are possible."
        )
    return Corpus(model, source, length, bos, separator, field)


def read_documents(source: Any, *, separator: str | None = None, field: str = "text") -> Iterator[str]:
    r"""The documents of a source, one after the other; no more than one file's is held at once.

    Parameters
    ----------
    source
        A text file; a folder, whose ``.txt`` files are read in the order of their names; or an iterable of documents: texts,
        paths (``pathlib.Path``) or mappings with ``field``, such as a ``datasets.Dataset`` or ``IterableDataset``.
    separator
        A line that stands between two documents of a file, such as ``"<|endoftext|>"``; ``""`` is an empty line. By default a file
        is a document. With it, files are read line by line.
    field
        Of a mapping: where its text is.

    Raises
    ------
    CausalProbeError
        If a file can't be read as UTF-8, a folder has no text, or a document is something else.

    Examples
    --------
    >>> list(read_documents([{"text": "one"}, "two"]))
    ['one', 'two']
    """
    if isinstance(source, (str, os.PathLike)):
        path = Path(source)
        files = sorted(path.glob("*.txt")) if path.is_dir() else [path]
        if not files:
            raise CausalProbeError(f"The folder {path} holds no .txt file.")
        source = files
    if isinstance(source, Mapping) or not isinstance(source, Iterable):
        raise CausalProbeError(
            f"A corpus is a text file, a folder of them, or an iterable of documents; found {type(source).__name__}. Of a "
            "datasets.DatasetDict, give one split."
        )
    for number, document in enumerate(source):
        text = document.get(field) if isinstance(document, Mapping) else document
        if isinstance(text, os.PathLike):
            yield from _read_file(Path(text), separator)
        elif isinstance(text, str):
            yield text
        else:
            raise CausalProbeError(f"Document {number} has no text: its {field!r} is of type {type(text).__name__}.")


def _read_file(path: Path, separator: str | None) -> Iterator[str]:
    try:
        if separator is None:
            yield path.read_text(encoding="utf-8")
            return
        lines: list[str] = []
        with open(path, encoding="utf-8") as file:
            for line in file:
                if line.rstrip("\n") != separator:
                    lines.append(line)
                elif lines:
                    yield "".join(lines)
                    lines = []
        if lines:
            yield "".join(lines)
    except (OSError, UnicodeError) as error:
        raise CausalProbeError(f"{path} can't be read as text in UTF-8: {error}.") from error
