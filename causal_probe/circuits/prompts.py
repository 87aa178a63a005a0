"""Prompts with their answers: what a circuit is asked about, and by which metric."""

from __future__ import annotations

import json
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, TypeAlias

import torch
from jaxtyping import Int
from torch import Tensor

from causal_probe.errors import CausalProbeError
from causal_probe.hooks.batches import probe
from causal_probe.hooks.check import HookedModel
from causal_probe.hooks.tokens import text_start

__all__ = ["METRICS", "Prompts", "Score", "Texts", "prompts_of", "read_lines", "read_prompts", "token_ids"]

#: (logits [row, pos, vocabulary], the rows' numbers) -> [row], higher is better.
Score: TypeAlias = Callable[[Tensor, Tensor], Tensor]

#: What stands where a prompt has fewer answers than another.
NONE = -1


@dataclass(frozen=True, eq=False, repr=False)
class Prompts:
    """Prompts of one length, each with its right answers, and where there are any, wrong answers and a corrupted prompt.

    Attributes
    ----------
    name
        The task's, or the file's.
    tokens
        [prompt, pos].
    scored
        The positions whose next token is asked for: the last one, or several.
    right
        [prompt, scored, choice]: the tokens that are right there; -1 where there are fewer.
    wrong
        [prompt, scored, choice], the same for wrong ones; None where none are named.
    corrupted
        [prompt, pos]: for each prompt one from which its answer does not follow; None where there are none.
    settings
        What made them.
    """

    name: str
    tokens: Int[Tensor, "prompt pos"]
    scored: tuple[int, ...]
    right: Int[Tensor, "prompt scored choice"]
    wrong: Int[Tensor, "prompt scored other"] | None = None
    corrupted: Int[Tensor, "prompt pos"] | None = None
    settings: Mapping[str, Any] = field(default_factory=dict)

    def __post_init__(self) -> None:
        n, length = self.tokens.shape
        if not self.scored or not all(0 <= at < length for at in self.scored):
            raise CausalProbeError(f"`scored` holds positions of 0 to {length - 1}, one at least; it is {self.scored}.")
        for what, choices in (("right", self.right), ("wrong", self.wrong)):
            if choices is None:
                continue
            if choices.shape[:2] != (n, len(self.scored)):
                raise CausalProbeError(
                    f"`{what}` is {list(choices.shape)}; for {n} prompts with {len(self.scored)} scored positions it is [{n}, {len(self.scored)}, choices]."
                )
            if bool((choices < 0).all(-1).any()):
                raise CausalProbeError(f"A scored position has no token that is {what}; each needs one at least.")
        if self.wrong is not None:
            same = (self.right.unsqueeze(-1) == self.wrong.unsqueeze(-2)) & (self.right.unsqueeze(-1) >= 0)
            if bool(same.any()):
                at = int(same.flatten(1).any(1).nonzero()[0])
                raise CausalProbeError(f"Prompt {at} has a token that is right and wrong. An answer is one of both.")
        if self.corrupted is not None:
            if self.corrupted.shape != self.tokens.shape:
                raise CausalProbeError(
                    f"Corrupted prompts are aligned with the clean ones, position by position: {list(self.tokens.shape)}; they are {list(self.corrupted.shape)}."
                )
            if bool((equal := (self.corrupted == self.tokens).all(-1)).any()):
                raise CausalProbeError(
                    f"The corrupted prompt {int(equal.nonzero()[0])} equals its clean one: nothing can change. Change it, or leave corrupted prompts out."
                )

    def __len__(self) -> int:
        """How many prompts."""
        return len(self.tokens)

    def __repr__(self) -> str:
        more = f", corrupted {'too' if self.corrupted is not None else 'none'}"
        return f"Prompts({self.name!r}, {len(self)} of {self.tokens.shape[1]} tokens{more})"

    def score(self, metric: str = "logit-difference") -> Score:
        """A metric of these prompts, a mean over the scored positions.

        Parameters
        ----------
        metric
            ``"logit-difference"``: mean logit of the right tokens less that of the wrong ones, in nats of odds.
            ``"log-probability"``: log of the probability of the right tokens together, in nats, at most 0: the loss with its sign turned.
            ``"probability-difference"``: probability of the right tokens less that of the wrong ones, -1 to 1; 0 by chance where as many are right as wrong.

        Returns
        -------
        A function (logits [row, pos, vocabulary], numbers of the rows' prompts [row]) -> [row].

        Raises
        ------
        CausalProbeError
            If there is no such metric, or it compares with wrong answers and the prompts have none; from the function, if an answer is no token of the model.
        """
        if metric not in METRICS:
            raise CausalProbeError(f"Unknown metric {metric!r}; choose from {', '.join(METRICS)}.")
        if self.wrong is None and metric != "log-probability":
            raise CausalProbeError(
                f"The metric {metric} compares with wrong answers, and these prompts have none. Give them, or choose log-probability."
            )

        def score(logits: Tensor, rows: Tensor) -> Tensor:
            at = logits[:, list(self.scored)]
            for choices in (self.right, self.wrong):
                if choices is not None and int(choices.max()) >= at.shape[-1]:
                    raise CausalProbeError(
                        f"An answer is token {int(choices.max())}, and the model gives logits of 0 to {at.shape[-1] - 1}: use its own tokenizer."
                    )
            right = self.right[rows.to(self.right.device)].to(logits.device)
            wrong = right if self.wrong is None else self.wrong[rows.to(self.wrong.device)].to(logits.device)
            return METRICS[metric](at, right, wrong).mean(-1)

        return score


def _of(values: Tensor, choices: Tensor) -> Tensor:
    return values.gather(-1, choices.clamp_min(0))


def _mean(values: Tensor, choices: Tensor) -> Tensor:
    there = choices >= 0
    return (_of(values, choices) * there).sum(-1) / there.sum(-1)


def _sum(values: Tensor, choices: Tensor) -> Tensor:
    return (_of(values, choices) * (choices >= 0)).sum(-1)


def _log_sum(values: Tensor, choices: Tensor) -> Tensor:
    return _of(values, choices).masked_fill(choices < 0, -torch.inf).logsumexp(-1)


#: Metrics by name: (logits [row, scored, vocabulary], right, wrong [row, scored, choice]) -> [row, scored].
METRICS: Mapping[str, Callable[[Tensor, Tensor, Tensor], Tensor]] = {
    "logit-difference": lambda logits, right, wrong: _mean(logits, right) - _mean(logits, wrong),
    "log-probability": lambda logits, right, _: _log_sum(logits.log_softmax(-1), right),
    "probability-difference": lambda logits, right, wrong: (
        _sum(logits.softmax(-1), right) - _sum(logits.softmax(-1), wrong)
    ),
}


@dataclass(frozen=True)
class Texts:
    """One prompt as text.

    Attributes
    ----------
    clean
        The prompt, without a space at its end.
    right, wrong
        The answers, each one token of the model, with the space that it begins with.
    corrupted
        The corrupted prompt; empty where there is none.
    """

    clean: str
    right: tuple[str, ...]
    wrong: tuple[str, ...] = ()
    corrupted: str = ""


def prompts_of(
    model: HookedModel,
    texts: Sequence[Texts],
    *,
    name: str = "prompts",
    bos: str = "auto",
    settings: Mapping[str, Any] | None = None,
) -> Prompts:
    """Texts as prompts: their tokens, all of one length, and answers of one token each, read in their place behind the prompt.

    Raises
    ------
    CausalProbeError
        If the model has no tokenizer; if prompts have different lengths; if an answer is no single token behind its prompt; if some have wrong answers
        or corrupted prompts and others don't.
    """
    tokenizer = getattr(model, "tokenizer", None)
    if tokenizer is None:
        raise CausalProbeError("Prompts are text, and the model has no tokenizer. Give tokens: circuits.Prompts(...).")
    if not texts:
        raise CausalProbeError("There are no prompts.")
    start = text_start(model, bos)

    def cut(text: str) -> list[int]:
        return token_ids(model, text, bos)

    def answer(text: str, its: str) -> int:
        before, together = cut(text), cut(text + its)
        if together[:-1] != before:
            pieces = together[len(before) :] if together[: len(before)] == before else []
            found = f"{len(pieces)} tokens" if pieces else "no token of its own"
            raise CausalProbeError(
                f"The answer {its!r} is {found} behind {text[-30:]!r}. Answers are one token each; a word begins with its space, the prompt doesn't end with one."
            )
        return together[-1]

    for what in ("wrong", "corrupted"):
        has = [bool(getattr(text, what)) for text in texts]
        if any(has) and not all(has):
            raise CausalProbeError(
                f"Prompt {has.index(not has[0])} {'has no' if has[0] else 'has a'} `{what}`, unlike prompt 0. Give it for all prompts, or for none."
            )
    clean = [cut(text.clean) for text in texts]
    lengths = Counter(map(len, clean))
    if len(lengths) > 1:
        (usual, _), *_ = lengths.most_common(1)
        odd = next(at for at, tokens in enumerate(clean) if len(tokens) != usual)
        raise CausalProbeError(
            f"Prompts are aligned by position, so all have one length; {lengths[usual]} of {len(clean)} have {usual} tokens, "
            f"prompt {odd} has {len(clean[odd])}: {texts[odd].clean[:60]!r}. Keep those of one length."
        )
    broken = [cut(text.corrupted) for text in texts if text.corrupted]
    for at, tokens in enumerate(broken):
        if len(tokens) != len(clean[0]):
            raise CausalProbeError(
                f"The corrupted prompt {at} has {len(tokens)} tokens, its clean one {len(clean[0])}. They are aligned by position: give one of the same length."
            )
    right = _padded([[answer(text.clean, each) for each in text.right] for text in texts])
    wrong = _padded([[answer(text.clean, each) for each in text.wrong] for text in texts])
    return Prompts(
        name,
        torch.tensor(clean),
        (len(clean[0]) - 1,),
        right,
        wrong if texts[0].wrong else None,
        torch.tensor(broken) if broken else None,
        {"n_prompts": len(texts), "bos": bos, "start": list(start), **(settings or {})},
    )


def token_ids(model: HookedModel, text: str, bos: str) -> list[int]:
    """A text's tokens, behind those that it starts with."""
    tokenizer: Any = getattr(model, "tokenizer", None)
    return [*text_start(model, bos), *tokenizer(text, add_special_tokens=False)["input_ids"]]


def _padded(answers: list[list[int]]) -> Int[Tensor, "prompt 1 choice"]:
    widest = max(map(len, answers))
    return torch.tensor([each + [NONE] * (widest - len(each)) for each in answers], dtype=torch.long).unsqueeze(1)


@probe
def read_prompts(model: HookedModel, path: str | Path, *, bos: str = "auto") -> Prompts:
    """Prompts from a file of JSON lines.

    Parameters
    ----------
    model
        Its tokenizer cuts the texts.
    path
        Each line an object with ``clean`` (the prompt) and ``answer`` (one token, or a list of them: ``" Mary"``); if wanted ``wrong`` (the same for wrong
        answers) and ``corrupted`` (a prompt of the same length from which the answer doesn't follow).
    bos
        Whether a BOS token comes first: ``"yes"``, ``"no"``, or ``"auto"``, what the tokenizer does by itself.

    Raises
    ------
    CausalProbeError
        If the file can't be read, a line is no such object, or :func:`prompts_of` refuses the texts; a line is named by its number, from 1.

    Examples
    --------
    >>> from causal_probe.models import DisentangledTransformer
    >>> read_prompts(DisentangledTransformer(d_vocab=3, n_positions=4), "no.jsonl")
    Traceback (most recent call last):
    causal_probe.errors.CausalProbeError: no.jsonl can't be read: No such file or directory.
    """
    path = Path(path)
    texts = [_text(line, f"{path.name}, line {number}") for number, line in read_lines(path)]
    return prompts_of(model, texts, name=path.stem, bos=bos, settings={"file": path.name})


def read_lines(path: Path) -> list[tuple[int, str]]:
    """The lines of a text file that are not empty, with their numbers from 1."""
    try:
        lines = path.read_text(encoding="utf-8").splitlines()
    except (OSError, UnicodeDecodeError) as error:
        why = getattr(error, "strerror", None) or "it is no text in UTF-8"
        raise CausalProbeError(f"{path} can't be read: {why}.") from None
    return [(number, line) for number, line in enumerate(lines, 1) if line.strip()]


def _text(line: str, place: str) -> Texts:
    expected = 'A line is {"clean": "...", "answer": " word"}, and if wanted "wrong" and "corrupted".'
    try:
        given = json.loads(line)
    except ValueError:
        raise CausalProbeError(f"{place}: this is no JSON: {line[:60]!r}. {expected}") from None
    if not isinstance(given, dict):
        raise CausalProbeError(f"{place}: found {type(given).__name__}. {expected}")
    if unknown := set(given) - {"clean", "answer", "wrong", "corrupted"}:
        raise CausalProbeError(f"{place}: unknown {', '.join(map(repr, sorted(unknown)))}. {expected}")
    texts = {name: given.get(name, "") for name in ("clean", "corrupted")}
    answers = {
        name: tuple([given.get(name, [])] if isinstance(given.get(name), str) else given.get(name) or ())
        for name in ("answer", "wrong")
        if isinstance(given.get(name), str | list | None)
    }
    good = all(isinstance(text, str) for text in texts.values()) and len(answers) == 2
    if not good or not all(isinstance(each, str) and each for found in answers.values() for each in found):
        raise CausalProbeError(
            f"{place}: clean and corrupted are texts, answer and wrong texts or lists of texts. {expected}"
        )
    if not texts["clean"] or not answers["answer"]:
        missing = "clean" if not texts["clean"] else "answer"
        raise CausalProbeError(f"{place}: {missing} is missing. {expected}")
    return Texts(texts["clean"], answers["answer"], answers["wrong"], texts["corrupted"])
