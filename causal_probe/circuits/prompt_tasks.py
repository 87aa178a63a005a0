"""Tasks of the literature, made by rules from the words that are one token of the model at hand."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from functools import partial
from typing import Any

import numpy as np

from causal_probe.arguments import Count, Seed
from causal_probe.circuits.prompts import Prompts, Texts, prompts_of
from causal_probe.errors import CausalProbeError
from causal_probe.hooks.batches import probe
from causal_probe.hooks.check import HookedModel
from causal_probe.probes.sequences import repeated_tokens

__all__ = ["NAMED_ORDERS", "TASKS", "ordered_words", "task_prompts"]

NAMES = (
    "Mary John James Robert Michael David William Richard Joseph Thomas Charles Daniel Matthew Anthony Mark Paul Steven Andrew George Kevin Brian "
    "Edward Peter Henry Adam Frank Scott Eric Stephen Jack Jennifer Elizabeth Susan Sarah Karen Nancy Lisa Margaret Emily Laura Anna Alice Kate Jane Rose"
)
PLACES = "store garden restaurant school hospital office house station park market church museum"
OBJECTS = "ring drink bone book computer ball letter key gift apple phone map"
NOUNS = "war marriage project trip contract drought siege voyage journey reign study program"
WORDS = (
    "file load size name time path value line list result state item number field order point group index level model user mode test date head "
    "image input output page rate role room score section source stack table target task text title token type unit version weight width"
)
#: Members in their order, by the name of the order.
ORDERS: Mapping[str, str] = {
    "weekdays": "Monday Tuesday Wednesday Thursday Friday Saturday Sunday",
    "months": "January February March April May June July August September October November December",
    "number-words": "one two three four five six seven eight nine ten eleven twelve",
    "letters": "A B C D E F G H I J K L M N O P Q R S T U V W X Y Z",
}
NAMED_ORDERS = ("numerals", *ORDERS)
NUMERALS = tuple(map(str, range(1, 31)))
#: Things that are done in a sequence.
THINGS = "Book Box Car Cup Desk Door Hat House Key Lake Lamp Map Phone Road Ship Shop Song Sun Table Train Tree Van Wall Window"
SHOWN = 3

INTROS = "order list series rest sequence next last result answer message code key"

Draw = Callable[[np.random.Generator], Texts]


class _Words:
    """Which words are one token of a model behind a space."""

    def __init__(self, model: HookedModel) -> None:
        self.tokenizer: Any = getattr(model, "tokenizer", None)
        if self.tokenizer is None:
            raise CausalProbeError(
                "Tasks of words need the model's tokenizer, and it has none. The task 'induction' needs no words."
            )

    def count(self, text: str) -> int:
        return len(self.tokenizer(text, add_special_tokens=False)["input_ids"])

    def adds_one(self, before: str, text: str) -> bool:
        """Whether a text adds one token to what stands before it, and one that the tokenizer knows."""
        ids = self.tokenizer(before + text, add_special_tokens=False)["input_ids"]
        return len(ids) == self.count(before) + 1 and ids[-1] != getattr(self.tokenizer, "unk_token_id", None)

    def single(self, text: str, least: int, what: str) -> list[str]:
        words = text.split()
        found = [word for word in words if self.adds_one("The", f" {word}")]
        if len(found) < least:
            raise CausalProbeError(
                f"{len(found)} of {len(words)} {what} are one token of this model; the task needs {least}. Give prompts of your own: circuits.read_prompts."
            )
        return found


def _some(generator: np.random.Generator, words: Sequence[str], n: int) -> list[str]:
    return [words[i] for i in generator.choice(len(words), n, replace=False)]


def _ioi(words: _Words) -> Draw:
    """Indirect objects: "When A and B went to the store, B gave a ring to" -> A; corrupted: three other names."""
    names = words.single(NAMES, 6, "names")
    places, objects = words.single(PLACES, 1, "places"), words.single(OBJECTS, 1, "objects")

    def draw(generator: np.random.Generator) -> Texts:
        a, b, *others = _some(generator, names, 5)
        place, thing = _some(generator, places, 1)[0], _some(generator, objects, 1)[0]
        first, second = (a, b) if generator.random() < 0.5 else (b, a)

        def text(one: str, two: str, giver: str) -> str:
            return f"When {one} and {two} went to the {place}, {giver} gave a {thing} to"

        return Texts(text(first, second, b), (f" {a}",), (f" {b}",), text(*others))

    return draw


def _greater_than(words: _Words) -> Draw:
    """Years: "The war lasted from the year 1743 to the year 17" -> a later year; corrupted: it begins in 1701.

    Where numbers are cut into digits, the next digit is asked for, and is right if it makes the decade later; else the next two digits.
    """
    nouns = words.single(NOUNS, 1, "nouns")
    behind = {digits: words.count(f"the year 17{digits}") - words.count("the year 17") for digits in ("4", "43", "01")}
    by_digit = behind == {"4": 1, "43": 2, "01": 2}
    if not by_digit and not (behind["43"] == behind["01"] == 1):
        raise CausalProbeError(
            "This model cuts years neither into digits nor into two halves, so the task greater-than can't be asked of it."
        )

    def draw(generator: np.random.Generator) -> Texts:
        century, year = int(generator.integers(11, 20)), int(generator.integers(21, 80))
        noun = _some(generator, nouns, 1)[0]
        last, limit, form = (10, year // 10, "{}") if by_digit else (100, year, "{:02}")

        def text(begin: int) -> str:
            return f"The {noun} lasted from the year {century}{begin:02} to the year {century}"

        right = tuple(form.format(value) for value in range(limit + 1, last))
        wrong = tuple(form.format(value) for value in range(limit))
        return Texts(text(year), right, wrong, text(1))

    return draw


def _successor(words: _Words) -> Draw:
    """Next in an order: "The order is Monday Tuesday Wednesday" -> Thursday; wrong: another of the order; corrupted: three of it at random."""
    orders = [
        order
        for order in map(str.split, ORDERS.values())
        if words.count("is " + " ".join(order)) == len(order) + words.count("is")
    ]
    if not orders:
        raise CausalProbeError(
            "Neither weekdays, months, number words nor letters are one token each of this model, so the task successor can't be asked of it."
        )

    intros = words.single(INTROS, 1, "words")

    def draw(generator: np.random.Generator) -> Texts:
        intro = _some(generator, intros, 1)[0]
        order = orders[int(generator.integers(len(orders)))]
        at = int(generator.integers(len(order) - 3))
        shown, right = order[at : at + 3], order[at + 3]
        while True:
            mixed = _some(generator, order, 3)
            if [order.index(word) - order.index(mixed[0]) for word in mixed] != [0, 1, 2]:
                break
        wrong = _some(generator, [word for word in order if word not in (*shown, right)], 1)[0]

        def text(three: Sequence[str]) -> str:
            return f"The {intro} is {' '.join(three)}"

        return Texts(text(shown), (f" {right}",), (f" {wrong}",), text(mixed))

    return draw


def ordered(words: _Words, name: str) -> tuple[str, list[str]]:
    """How a member of an order follows a word (behind a space, or numerals that are cut into digits behind " #"), and the members that are one token there.

    Raises
    ------
    CausalProbeError
        If there is no such order, or fewer than 5 of its first members are one token each.
    """
    if name not in NAMED_ORDERS:
        raise CausalProbeError(f"Unknown order {name!r}; choose from {', '.join(NAMED_ORDERS)}.")
    members = list(NUMERALS) if name == "numerals" else ORDERS[name].split()
    best: tuple[str, list[str]] = ("", [])
    for before in (" ", " #") if name == "numerals" else (" ",):
        stands, begins = (f"in{before}", "") if before.strip() else ("in", " ")
        single = [words.adds_one(stands, begins + each) for each in members]
        first = single.index(False) if False in single else len(single)
        if first > len(best[1]):
            best = before, members[:first]
    if len(best[1]) < SHOWN + 2:
        raise CausalProbeError(
            f"{len(best[1])} of the first {name} are one token each of this model; {SHOWN + 2} are needed."
        )
    return best


def _continuation(name: str, words: _Words) -> Draw:
    """Next in a sequence of things: "Van done in March. Hat done in April. Ring done in May. Desk done in" -> June; wrong: May again; corrupted: the same in another order."""
    before, members = ordered(words, name)
    things = [word for word in words.single(THINGS, 1, "words") if words.count(word) == 1]
    if len(things) <= SHOWN:
        raise CausalProbeError(
            f"{len(things)} of the words for things are one token of this model; the task {name} needs {SHOWN + 1}."
        )

    def draw(generator: np.random.Generator) -> Texts:
        own = _some(generator, things, SHOWN + 1)
        at = int(generator.integers(len(members) - SHOWN))
        shown, right = members[at : at + SHOWN], members[at + SHOWN]
        mixed = shown
        while mixed == shown:
            mixed = _some(generator, shown, SHOWN)

        def text(three: Sequence[str]) -> str:
            done = " ".join(f"{thing} done in{before}{member}." for thing, member in zip(own, three, strict=False))
            return f"{done} {own[-1]} done in{before.rstrip()}"

        space = "" if before.rstrip() else " "
        return Texts(text(shown), (space + right,), (space + shown[-1],), text(mixed))

    return draw


def _docstring(words: _Words) -> Draw:
    """Arguments in a docstring: the next ``:param`` names the third argument; wrong: the other names of the definition; corrupted: documented are two others."""
    names = words.single(WORDS, 12, "words")
    names = [word for word in names if words.count(f"(self, {word}, {word}") == words.count("(self") + 4]
    if len(names) < 12:
        raise CausalProbeError(
            f"{len(names)} words are one token of this model behind a comma; the task docstring needs 12. Give prompts of your own: circuits.read_prompts."
        )

    def draw(generator: np.random.Generator) -> Texts:
        a, b, c, d, e, u, v, *more = _some(generator, names, 12)

        def text(first: str, second: str) -> str:
            return (
                f"def {more[0]}(self, {a}, {b}, {c}, {d}, {e}):\n"
                f'    """{more[1]} {more[2]}\n\n    :param {first}: {more[3]} {more[4]}\n    :param {second}: {more[4]} {more[3]}\n    :param'
            )

        return Texts(text(a, b), (f" {c}",), tuple(f" {word}" for word in (d, e)), text(u, v))

    return draw


def _induction(model: HookedModel, n: int, seed: int, bos: str) -> Prompts:
    made = repeated_tokens(model, n_sequences=n, period=_period(model), bos=bos, seed=seed)
    tokens, start = made.tokens, len(made.settings["start"])
    period = int(made.settings["period"])
    end = start + 2 * period
    tokens = tokens[:, :end]
    scored = tuple(range(start + period, end - 1))
    right = tokens[:, [at + 1 for at in scored]]
    wrong = tokens[:, [start + (at + 1 + period // 2 - start) % period for at in scored]]  # half a period on
    corrupted = tokens.clone()
    corrupted[:, start : start + period] = tokens[:, start : start + period].roll(1, dims=0)
    return Prompts(
        "induction",
        tokens,
        scored,
        right.unsqueeze(-1),
        wrong.unsqueeze(-1),
        corrupted,
        {**made.settings, "n_prompts": n},
    )


def _period(model: HookedModel) -> int | None:
    context = getattr(model.cfg, "n_ctx", None)
    return 20 if context is None or context >= 42 else None


#: Tasks by name; "induction" is made of random tokens, the others of words.
TASKS: Mapping[str, Callable[[_Words], Draw] | None] = {
    "induction": None,
    "ioi": _ioi,
    "greater-than": _greater_than,
    "successor": _successor,
    "docstring": _docstring,
    **{name: partial(_continuation, name) for name in NAMED_ORDERS},
}


@probe
def ordered_words(model: HookedModel, name: str) -> list[str]:
    """The first members of an order that are one token each of a model, as texts with the space that they begin with.

    Parameters
    ----------
    model
        Its tokenizer says which are one token.
    name
        ``"numerals"``, ``"number-words"``, ``"months"``, ``"weekdays"``, ``"letters"``. Numerals of a tokenizer that cuts digits have no space.

    Raises
    ------
    CausalProbeError
        If there is no such order, or fewer than 5 of its first members are one token each.
    """
    before, members = ordered(_Words(model), name)
    return [member if before.rstrip() else f" {member}" for member in members]


@probe
def task_prompts(model: HookedModel, task: str, *, n: Count = 96, seed: Seed = 0, bos: str = "auto") -> Prompts:
    """Prompts of a task, with right answers, wrong answers and corrupted prompts; no prompt twice.

    Parameters
    ----------
    model
        Its tokenizer says which words are one token; only these are used.
    task
        ``"induction"``: random tokens, repeated; the second copy is scored, wrong is the token half a period on, corrupted has another prompt's first copy.
        ``"ioi"`` (Wang et al. 2022, https://arxiv.org/abs/2211.00593): "When Mary and John went to the store, John gave a ring to"; corrupted: three other names.
        ``"greater-than"`` (Hanna et al. 2023, https://arxiv.org/abs/2305.00586): "The war lasted from the year 1743 to the year 17"; corrupted: from 1701.
        ``"successor"`` (Gould et al. 2023, https://arxiv.org/abs/2312.09230): "The order is Monday Tuesday Wednesday"; corrupted: three at random.
        ``"docstring"`` (Heimersheim and Janiak 2023): the third argument is documented next; corrupted: two other words are documented first.
        ``"numerals"``, ``"number-words"``, ``"months"``, ``"weekdays"``, ``"letters"`` (after Lan et al. 2024, https://arxiv.org/abs/2311.04131): "Van done in March. Hat done
        in April. Ring done in May. Desk done in"; wrong: the last one again; corrupted: the same members in another order.
    n
        How many.
    seed
        Of the draws.
    bos
        Whether a BOS token comes first: ``"yes"``, ``"no"``, or ``"auto"``, what the tokenizer does by itself.

    Raises
    ------
    CausalProbeError
        If there is no such task; the model has no tokenizer, or too few of the task's words as single tokens; or there are fewer different prompts.

    Examples
    --------
    >>> from causal_probe.models import DisentangledTransformer
    >>> task_prompts(DisentangledTransformer(d_vocab=60, n_positions=64), "induction", n=4)
    Prompts('induction', 4 of 40 tokens, corrupted too)
    """
    if task not in TASKS:
        raise CausalProbeError(
            f"Unknown task {task!r}; choose from {', '.join(TASKS)}, or read your own prompts from a file."
        )
    rule = TASKS[task]
    if rule is None:
        if n < 2:
            raise CausalProbeError(
                f"n is {n}. The first copy of a corrupted prompt is another prompt's, so there are at least 2."
            )
        return _induction(model, n, seed, bos)
    draw, generator = rule(_Words(model)), np.random.default_rng(seed)
    texts: dict[str, Texts] = {}
    for _ in range(8 * n):
        text = draw(generator)
        if text.clean != text.corrupted:
            texts.setdefault(text.clean, text)
        if len(texts) == n:
            break
    else:
        raise CausalProbeError(
            f"{8 * n} draws gave {len(texts)} different prompts of the task {task}; {n} were asked for. Ask for fewer."
        )
    settings: dict[str, Any] = {"task": task, "seed": seed}
    return prompts_of(model, list(texts.values()), name=task, bos=bos, settings=settings)
