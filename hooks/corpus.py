"""Text as sequences of tokens: streamed, document by document, in shards that add up to the whole."""

from __future__ import annotations

import dataclasses
import itertools
import json
import math
import os
import re
from collections.abc import Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from jaxtyping import Int
from torch import Tensor

from causal_probe.errors import CausalProbeError, show_path
from causal_probe.hooks.batches import Cut, context_length, probe
from causal_probe.hooks.check import HookedModel, describe
from causal_probe.hooks.tokens import text_start

__all__ = [
    "Corpus",
    "CorpusCounts",
    "CorpusPass",
    "corpus",
    "merge_readings",
    "missing_shards",
    "read_documents",
    "read_shard",
]

#: A byte order mark at the beginning of a file is no text.
ENCODING = "utf-8-sig"
#: One half of a pair that only UTF-16 has.
SURROGATE = re.compile(r"[\ud800-\udfff]")
#: Sequences that are handed on together; the probes cut them further.
BATCH = 64
#: How the source of documents that are no files is called; two of one name may hold different documents.
IN_MEMORY = "in memory: "
#: How the files that are read are called, by how they are read; case doesn't matter.
FORMS = {
    **dict.fromkeys(("", ".txt", ".text", ".md"), "text in UTF-8"),
    **dict.fromkeys((".jsonl", ".ndjson"), "JSON lines"),
    ".json": "a JSON list",
    ".parquet": "Parquet",
}
#: Of a folder, the files that hold documents, and what lies beside them.
DOCUMENTS = (".txt", ".jsonl", ".ndjson", ".json", ".parquet")
BESIDE = re.compile(r"\.|README|LICENSE", re.IGNORECASE)


@dataclasses.dataclass(frozen=True)
class CorpusCounts:
    """Counts of a corpus's documents and tokens; counts of shards add up to those of the whole.

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
class Corpus(Cut):
    """Sequences of tokens of one length, made as they are asked for: what a probe takes as its batches.

    No sequence holds text of two documents. A document gives as many sequences as it fills, one after the other, each with the start of
    a text (a BOS token, where there is one) in front, once also where the text spells it out; its end, which fills none, is left out and counted.

    Attributes
    ----------
    model
        Whose tokenizer is used.
    source
        See :func:`read_documents`. It is read anew at every pass.
    length
        Tokens in a sequence, its start included.
    bos
        See :func:`~causal_probe.hooks.tokens.text_start`.
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
        for pieces, _ in self.documents():
            yield from pieces

    def counts(self) -> CorpusCounts:
        """What is kept and left out, counted in a pass that runs no model."""
        total = CorpusCounts()
        for _, its in self.documents():
            total += its
        return total

    def first(self, n: int) -> Int[Tensor, "sequence pos"]:
        """The first n sequences, or all where there are fewer."""
        found = list(itertools.islice(self.sequences(), n))
        return torch.stack(found).to(self.device) if found else torch.empty(0, self.length, dtype=torch.long)

    @property
    def device(self) -> str:
        """Where the model is, and the batches are put."""
        return describe(self.model)["device"] or "cpu"

    def __iter__(self) -> Iterator[Int[Tensor, "batch pos"]]:
        """The sequences in batches."""
        return iter(CorpusPass(self))

    def documents(self) -> Iterator[tuple[list[Tensor], CorpusCounts]]:
        """Of each document the sequences, and what it adds to the counts."""
        tokenizer: Any = getattr(self.model, "tokenizer", None)
        start = torch.tensor(text_start(self.model, self.bos), dtype=torch.long)
        room = self.length - len(start)
        i, n = self.shard
        for number, text in enumerate(read_documents(self.source, separator=self.separator, field=self.field)):
            if number % n != i:
                continue
            tokens = torch.tensor(tokenizer(text, add_special_tokens=False)["input_ids"], dtype=torch.long)
            if tokens[: len(start)].equal(start):  # the text spells its start out
                tokens = tokens[len(start) :]
            full = len(tokens) // room
            pieces = [torch.cat([start, piece]) for piece in tokens[: full * room].view(full, room)]
            yield pieces, CorpusCounts(1, full, len(tokens), len(tokens) - full * room)


class CorpusPass(Cut):
    """One pass over a corpus: its batches, and once they have all been seen, what was read.

    Parameters
    ----------
    corpus
        The corpus.
    """

    def __init__(self, corpus: Corpus) -> None:
        self.corpus = corpus
        self.model = corpus.model
        self.counts = CorpusCounts()

    def __iter__(self) -> Iterator[Int[Tensor, "batch pos"]]:
        """The sequences in batches, counted as they pass."""
        self.counts = CorpusCounts()
        batch: list[Tensor] = []
        for pieces, its in self.corpus.documents():
            self.counts += its
            for sequence in pieces:
                batch.append(sequence)
                if len(batch) == BATCH:
                    yield torch.stack(batch).to(self.corpus.device)
                    batch = []
        if batch:
            yield torch.stack(batch).to(self.corpus.device)
        if not self.counts.sequences and self.corpus.shard[1] == 1:
            raise CausalProbeError(
                f"No document of this corpus fills a sequence of {self.corpus.length} tokens: there are {self.counts.documents} "
                f"documents of {self.counts.tokens} tokens in all. Ask for a smaller length."
            )

    @property
    def reading(self) -> dict[str, Any]:
        """The parts that were read, in plain JSON types: where from, how it was cut, which shards, and the :class:`CorpusCounts`."""
        its = self.corpus
        named = isinstance(its.source, (str, os.PathLike))
        return {
            "kind": "corpus",
            "source": os.fspath(its.source) if named else f"{IN_MEMORY}{type(its.source).__name__}",
            "length": its.length,
            "bos": its.bos,
            "start": list(text_start(its.model, its.bos)),
            "separator": its.separator,
            "field": its.field,
            "shards": [list(its.shard)],
            **dataclasses.asdict(self.counts),
        }


def merge_readings(*readings: Mapping[str, Any]) -> dict[str, Any]:
    """The parts that several passes have read (:attr:`CorpusPass.reading`) together: counts are added up, shards stand side by side.

    Raises
    ------
    CausalProbeError
        If they cut documents in different ways, or some documents were read twice: shards of one source that overlap.

    Examples
    --------
    >>> halves = [{"source": "a.txt", "shards": [[i, 2]], "sequences": 3} for i in (0, 1)]
    >>> merge_readings(*halves)
    {'source': 'a.txt', 'shards': [[0, 2], [1, 2]], 'sequences': 6}
    """
    counted = [field.name for field in dataclasses.fields(CorpusCounts)]
    first = readings[0]
    for name in first:
        values = [reading.get(name) for reading in readings]
        if name not in (*counted, "shards", "source") and any(value != values[0] for value in values):
            different = next(value for value in values if value != values[0])
            raise CausalProbeError(
                f"Readings of a corpus can't be merged: their {name} differs, {values[0]!r} and {different!r}."
            )
    total = {name: sum(reading[name] for reading in readings) if name in counted else first[name] for name in first}
    sources = list(dict.fromkeys(source for reading in readings for source in _listed(reading["source"])))
    if len(sources) == 1:
        shards = [tuple(shard) for reading in readings for shard in reading["shards"]]
        for (i, n), (j, m) in itertools.combinations(shards, 2):
            if (i - j) % math.gcd(n, m) == 0 and not sources[0].startswith(IN_MEMORY):
                raise CausalProbeError(
                    f"The shards {i}/{n} and {j}/{m} of {sources[0]} share documents, which would count twice: merge each shard once."
                )
        return total | {"shards": [list(shard) for shard in shards]}
    # Of several corpora each has its own shards, by source.
    by_source: dict[str, list[Mapping[str, Any]]] = {}
    for reading in readings:
        for source in _listed(reading["source"]):
            mine = reading["shards"][source] if isinstance(reading["shards"], Mapping) else reading["shards"]
            by_source.setdefault(source, []).append({"source": source, "shards": mine})
    return total | {
        "source": sources,
        "shards": {source: merge_readings(*its)["shards"] for source, its in by_source.items()},
    }


def missing_shards(reading: Mapping[str, Any]) -> tuple[str, ...]:
    """The missing shards of the corpora that were read: shards such as ``"2/4"``, after their source where there are several.

    >>> missing_shards({"source": "a.txt", "shards": [[0, 2], [1, 4]]})
    ('3/4',)
    """
    if isinstance(reading["shards"], Mapping):
        each = ((source, {"source": source, "shards": shards}) for source, shards in reading["shards"].items())
        return tuple(f"{source} {shard}" for source, its in each for shard in missing_shards(its))
    shards = reading["shards"]
    n = math.lcm(*(m for _, m in shards))
    return tuple(f"{i}/{n}" for i in range(n) if all(i % m != j for j, m in shards))


def read_shard(shard: str | Sequence[int]) -> tuple[int, int]:
    """(i, n) from ``"i/n"``, or from two numbers.

    Raises
    ------
    CausalProbeError
        If it is no such thing, or i is not one of 0 ... n - 1.

    Examples
    --------
    >>> read_shard("2/4")
    (2, 4)
    """
    if isinstance(shard, str):
        match = re.fullmatch(r"(\d{1,9})/(\d{1,9})", shard)
        numbers = [] if match is None else [int(match[1]), int(match[2])]
    else:
        numbers = list(shard)
    if len(numbers) != 2 or not all(isinstance(number, int) for number in numbers) or not 0 <= numbers[0] < numbers[1]:
        raise CausalProbeError(f"A shard is i/n, number i of n, counted from 0: 0/4, 1/4, 2/4, 3/4. Found {shard!r}.")
    return numbers[0], numbers[1]


@probe
def corpus(
    model: HookedModel,
    source: Any,
    *,
    length: int,
    bos: str = "auto",
    separator: str | None = None,
    field: str = "text",
    shard: str | Sequence[int] = (0, 1),
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
        Whether a BOS token comes first; see :func:`~causal_probe.hooks.tokens.text_start`.
    shard
        ``"i/n"`` or (i, n): only the documents whose number, counted from 0, is i modulo n. What is measured on all n merges to what
        would have been measured on the whole (``HeadScores.merge``, ``Evidence.merge``).

    Raises
    ------
    CausalProbeError
        If the model has no tokenizer, the length does not fit, or the source can be read once only.
    """
    if getattr(model, "tokenizer", None) is None:
        raise CausalProbeError("Text was given, and the model has no tokenizer. Give tokens [batch, pos].")
    shortest, longest = len(text_start(model, bos)) + 1, context_length(model)
    if length < shortest or (longest is not None and length > longest):
        raise CausalProbeError(
            f"Sequences of {length} tokens were asked for; from {shortest} (with the start of a text) to {longest} are possible."
        )
    if isinstance(source, Iterator):
        raise CausalProbeError(
            f"A corpus is read anew at every pass, and a {type(source).__name__} can be read once. Give a list, a path, or a "
            "datasets object."
        )
    return Corpus(model, source, length, bos, separator, field, read_shard(shard))


def read_documents(source: Any, *, separator: str | None = None, field: str = "text") -> Iterator[str]:
    r"""The documents of a source, one after the other; no more than one file's is held at once.

    Parameters
    ----------
    source
        A file; a folder, whose ``.txt``, ``.jsonl``, ``.ndjson``, ``.json`` and ``.parquet`` files are read in the order of their names,
        hidden files, READMEs and licences aside; or an iterable of documents: texts, paths (``pathlib.Path``) or mappings with
        ``field``, such as a ``datasets.Dataset`` or ``IterableDataset``. A ``.jsonl`` or ``.ndjson`` file holds a document in each line,
        a ``.json`` file a list of them, a ``.parquet`` file one in each row; ``.txt``, ``.text``, ``.md`` and files without a suffix
        are text. Files of other names are refused.
    separator
        A line that stands between two documents of a text file, such as ``"<|endoftext|>"``; ``""`` is an empty line. By default a
        file is a document. With it, files are read line by line.
    field
        Of a mapping, a line of JSON or a row: where its text is.

    Raises
    ------
    CausalProbeError
        If a file can't be read or isn't one of these, a folder has no such files or others too, or a document is something else.

    Examples
    --------
    >>> list(read_documents([{"text": "one"}, "two"]))
    ['one', 'two']
    """
    if isinstance(source, (str, os.PathLike)):
        path = Path(os.path.expanduser(source))
        source = _files(path) if os.path.isdir(path) else [path]
    if isinstance(source, Mapping) or not isinstance(source, Iterable):
        raise CausalProbeError(
            f"A corpus is a file, a folder of them, or an iterable of documents; found {type(source).__name__}. Of a "
            "datasets.DatasetDict, give one split."
        )
    for number, document in enumerate(source):
        if isinstance(document, os.PathLike):
            yield from _read_file(Path(document), separator, field)
        else:
            yield _text(document, field, f"Document {number}")


def _files(folder: Path) -> list[Path]:
    """The documents' files in a folder."""
    found = sorted(each for each in folder.iterdir() if not each.is_dir() and not BESIDE.match(each.name))
    if others := [each.name for each in found if each.suffix.lower() not in DOCUMENTS]:
        raise CausalProbeError(
            f"The folder {folder} also holds {', '.join(others[:3])}; of a folder {', '.join(DOCUMENTS)} files are read. Move the others away, "
            "or give a list of paths."
        )
    if not found:
        raise CausalProbeError(f"The folder {folder} holds no {', '.join(DOCUMENTS[:-1])} or {DOCUMENTS[-1]} file.")
    return found


def _text(document: Any, field: str, name: str) -> str:
    if isinstance(document, Mapping) and field not in document:
        raise CausalProbeError(
            f"{name} has no text: it has no {field!r}. It has {', '.join(map(repr, document)) or 'nothing'}: name the field."
        )
    text = document[field] if isinstance(document, Mapping) else document
    if not isinstance(text, str):
        its = f"its {field!r} is" if isinstance(document, Mapping) else "it is"
        raise CausalProbeError(f"{name} has no text: {its} of type {type(text).__name__}. Leave it out.")
    if not text.isascii() and (half := SURROGATE.search(text)):
        raise CausalProbeError(
            f"{name} is no text: it holds {half[0]!a}, half of a character, at place {half.start()}."
        )
    return text


def _read_file(path: Path, separator: str | None, field: str) -> Iterator[str]:
    path = Path(os.path.expanduser(path))
    kind = FORMS.get(path.suffix.lower())
    if not os.path.isfile(path):
        what = "is no file" if os.path.exists(path) else "is not there"
        raise CausalProbeError(f"The documents of {show_path(path)} can't be read: it {what}.")
    if kind is None:
        raise CausalProbeError(
            f"{path} is no file of documents: its name ends in {path.suffix}, and files in {', '.join(filter(None, FORMS))} are read. Give "
            "its texts as a list, or rename it if it is one of these."
        )
    import pyarrow as pa  # only files need it

    try:
        if kind == "Parquet":
            yield from _read_parquet(path, field)
        elif kind == "JSON lines":
            with open(path, encoding=ENCODING) as file:
                for number, line in enumerate(file, 1):
                    if line.strip():
                        yield _text(json.loads(line), field, f"Line {number} of {path}")
        elif kind == "a JSON list":
            documents = json.loads(path.read_text(encoding=ENCODING))
            if not isinstance(documents, list):
                raise ValueError(f"it holds a {type(documents).__name__}")
            for number, document in enumerate(documents):
                yield _text(document, field, f"Document {number} of {path}")
        elif separator is None:
            yield path.read_text(encoding=ENCODING)
        else:
            yield from _read_parts(path, separator)
    except (OSError, ValueError, RecursionError, pa.ArrowException) as error:
        if isinstance(error, CausalProbeError):
            raise
        reason = (
            "it is nested too deep" if isinstance(error, RecursionError) else getattr(error, "strerror", None) or error
        )
        raise CausalProbeError(f"{path} can't be read as {kind}: {reason}.") from error


def _read_parquet(path: Path, field: str) -> Iterator[str]:
    import pyarrow.parquet as pq

    with pq.ParquetFile(path) as file:
        if field not in file.schema_arrow.names:
            raise CausalProbeError(
                f"{path} has no column {field!r}; it has {', '.join(map(repr, file.schema_arrow.names))}: name the field."
            )
        rows = itertools.chain.from_iterable(part.column(0) for part in file.iter_batches(BATCH, columns=[field]))
        for number, value in enumerate(rows):
            yield _text({field: value.as_py()}, field, f"Row {number} of {path}")


def _read_parts(path: Path, separator: str) -> Iterator[str]:
    """The parts of a text file between lines that are the separator."""
    lines: list[str] = []
    with open(path, encoding=ENCODING) as file:
        for line in file:
            if line.rstrip("\n") != separator:
                lines.append(line)
            elif lines:
                yield "".join(lines)
                lines = []
    if lines:
        yield "".join(lines)


def _listed(value: Any) -> list[str]:
    return [value] if isinstance(value, str) else list(value)
