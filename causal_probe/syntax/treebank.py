"""Sentences with their dependency trees, from a file in CoNLL-U."""

from __future__ import annotations

from pathlib import Path
from typing import Any, NamedTuple

import networkx as nx

from causal_probe.arguments import checked
from causal_probe.errors import CausalProbeError

__all__ = ["Sentence", "check_sentence", "read_conllu"]

#: The largest file that is read, in bytes: all of Universal Dependencies' English treebanks together are smaller.
LARGEST = 2**28


class Sentence(NamedTuple):
    """A sentence and its tree.

    Attributes
    ----------
    words
        The words, in order.
    governors
        For each word the number of its governor, from 0; -1 for the root.
    relations
        For each word the name of its relation to the governor, such as ``"nsubj"``.
    """

    words: tuple[str, ...]
    governors: tuple[int, ...]
    relations: tuple[str, ...]


@checked
def read_conllu(path: str | Path) -> tuple[Sentence, ...]:
    r"""The sentences of a CoNLL-U file, by the package conllu; words of several syntactic words ("1-2") and empty nodes ("1.1") are left out.

    Raises
    ------
    CausalProbeError
        If the file is missing, is no CoNLL-U, or a sentence's governors form no tree; it names the sentence.

    References
    ----------
    Nivre et al., "Universal Dependencies v2", LREC 2020.

    Examples
    --------
    >>> import tempfile
    >>> rows = [(1, "The", 2, "det"), (2, "cat", 3, "nsubj"), (3, "sleeps", 0, "root")]
    >>> with tempfile.NamedTemporaryFile("w", suffix=".conllu") as file:
    ...     _ = file.writelines("\t".join([str(i), word, *"____", str(head), relation, "_", "_"]) + "\n" for i, word, head, relation in rows)
    ...     _ = file.write("\n")
    ...     file.flush()
    ...     read_conllu(file.name)
    (Sentence(words=('The', 'cat', 'sleeps'), governors=(1, 2, -1), relations=('det', 'nsubj', 'root')),)
    """
    try:
        import conllu
    except ImportError as error:
        raise CausalProbeError("CoNLL-U is read by the package conllu: pip install 'causal-probe[syntax]'.") from error
    file = Path(path)
    try:
        size = file.stat().st_size if file.is_file() else None
    except (OSError, ValueError):  # no name of a file: too long, or with a null character
        size = None
    if size is None or size > LARGEST:
        raise CausalProbeError(
            f"{str(file)[:200]!r} is no file of at most {LARGEST // 2**20} MiB. Give a file in CoNLL-U."
        )
    try:
        parsed = conllu.parse(file.read_text(encoding="utf-8"))
    except (conllu.exceptions.ParseException, UnicodeDecodeError) as error:
        raise CausalProbeError(f"{file} is no CoNLL-U in UTF-8: {error}") from error
    sentences = tuple(_sentence(rows, f"{file}, sentence {number}") for number, rows in enumerate(parsed, 1))
    if not sentences:
        raise CausalProbeError(f"{file} holds no sentence.")
    return sentences


def _sentence(rows: Any, where: str) -> Sentence:
    words = [row for row in rows if isinstance(row.get("id"), int)]
    place = {row["id"]: number for number, row in enumerate(words)}
    governors = []
    for row in words:
        head = row.get("head")
        if head != 0 and head not in place:
            raise CausalProbeError(f"{where}: the head of {row.get('form')!r} is {head!r}, which is no word of it.")
        governors.append(-1 if head == 0 else place[head])
    relations = tuple(str(row.get("deprel") or "dep") for row in words)
    sentence = Sentence(tuple(str(row.get("form")) for row in words), tuple(governors), relations)
    check_sentence(sentence, where)
    return sentence


def check_sentence(sentence: Sentence, where: str) -> None:
    """Refuse what is no tree over words.

    Raises
    ------
    CausalProbeError
        If words or relations are no text or governors no whole numbers, there are no words, an empty word, other numbers of governors or relations, or the governors form no tree.
    """
    words, governors, relations = sentence
    if not all(isinstance(each, str) for each in (*words, *relations)) or not all(
        type(each) is int for each in governors
    ):
        raise CausalProbeError(f"{where}: words and relations are text, governors whole numbers.")
    if not words or not len(words) == len(governors) == len(relations) or not all(word.strip() for word in words):
        raise CausalProbeError(
            f"{where}: a sentence has words, and as many governors and relations; found {len(words)}, {len(governors)}, {len(relations)}, "
            "or a word is empty."
        )
    tree = nx.DiGraph([(governor, word) for word, governor in enumerate(governors)])
    if not set(governors) <= set(range(-1, len(words))) or governors.count(-1) != 1 or not nx.is_arborescence(tree):
        raise CausalProbeError(f"{where}: the governors {list(governors)[:12]} form no tree with one root (-1).")
