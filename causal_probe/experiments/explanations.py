"""The two demonstrations of CLEANN: a sentiment classifier, and a recommender; each method on the same inputs.

Both are small, so that they can be made anywhere, and planted, so that the truth is known: which word carries the sentiment, which
item of a session caused the last one.
"""

# transformers' constructors and torch's backward carry no types.
# mypy: allow-untyped-calls

from __future__ import annotations

import dataclasses
import os
from collections.abc import Mapping, Sequence
from pathlib import Path, PurePath
from typing import Any, NamedTuple

import numpy as np
import pandas as pd
import torch
from jaxtyping import Int
from scipy import stats

from causal_probe import probes
from causal_probe.errors import CausalProbeError
from causal_probe.hooks.read import read_layer
from causal_probe.models.loading import load_model
from causal_probe.options import takes
from causal_probe.options.studies import SentimentOptions, SessionsOptions
from causal_probe.probes import outputs_of
from causal_probe.probes.explain import Explanation, ExplanationSummary, Outputs, summarise
from causal_probe.results import Result, Table

__all__ = ["ExplanationStudy", "Interval", "explain_sentiment", "explain_sessions", "read_ratings"]

BASELINES = ("attention", "gradient", "leave-one-out")
#: CLEANN on the graphs of the paper, and on those that count the residual stream (ours).
READINGS = {"cleann": 0.0, "cleann, residual": 0.5}

ADJECTIVES = (
    ("terrible", "awful", "boring", "dull", "poor", "horrible", "ugly", "weak"),
    ("usual", "average", "typical", "ordinary", "common", "normal", "recent", "[MASK]"),
    ("wonderful", "great", "charming", "brilliant", "superb", "excellent", "beautiful", "strong"),
)
THINGS = ("film", "book", "play", "concert", "novel", "story", "show", "movie")
PEOPLE = ("my sister", "our teacher", "the old man", "a friend", "the critic", "her brother")
SENTENCES = (
    "{who} said that the {thing} was {adjective} from start to end.",
    "the {thing} we saw last week with {who} was really {adjective}.",
    "in spite of the rain {who} thought the {thing} {adjective}.",
    "what a {adjective} {thing}, and {who} agreed with me.",
)

#: Synthetic sessions: an item below CAUSES causes the item CAUSES places higher as the last one; the others are noise.
CAUSES, ITEMS, LENGTH = 30, 100, 10


@dataclasses.dataclass(frozen=True)
class Interval:
    """A share in [0, 1], with its 95% interval (Wilson)."""

    share: float
    low: float
    high: float

    @classmethod
    def of(cls, hits: int, n: int) -> Interval:
        """From ``hits`` successes in ``n`` trials."""
        interval = stats.binomtest(hits, n).proportion_ci(method="wilson")
        return cls(hits / n, float(interval.low), float(interval.high))


@dataclasses.dataclass(frozen=True, eq=False, repr=False)
class ExplanationStudy(Result):
    """Explanations of many decisions by every method.

    Attributes
    ----------
    summary
        Set size, success rate and replacement rank, with intervals.
    explanations
        For each input: by method. ``cleann`` searches the graphs of the paper, ``cleann, residual`` those that count the residual
        stream for half (see :func:`causal_probe.discovery.attention_correlation`); the others are the baselines.
    planted
        For each input: the nodes that were planted as the cause; None where the truth is not known.
    decides
        For each input: whether the model's decision changes when the planted nodes, and they alone, are replaced. Where it does not, the
        model did not decide by them, and no method that tells the truth about the model can name them alone. None where unknown.
    accuracy
        Share of the inputs that the model decides as they were made, in [0, 1]; for ratings: that have their last item first.
    """

    KIND = "explanation study"
    WORKS = ("rohekar2023",)
    DERIVED = ("with_cause", "cause_decides")

    summary: ExplanationSummary
    explanations: tuple[Mapping[str, Explanation], ...]
    planted: tuple[tuple[int, ...], ...] | None
    decides: tuple[bool, ...] | None
    accuracy: float

    @property
    def with_cause(self) -> dict[str, Interval | None]:
        """By method: the share of *all* inputs for which a planted cause is in one of its sets, with its 95% interval (Wilson).

        Inputs without any set count as misses. How many sets there are to be in says ``sets`` of
        :meth:`to_pandas`. None where the cause is unknown.
        """
        if self.planted is None:
            return dict.fromkeys(self.explanations[0])
        both = list(zip(self.explanations, self.planted, strict=True))
        return {
            method: Interval.of(
                sum(any(node in each for each in by[method].sets for node in planted) for by, planted in both),
                len(both),
            )
            for method in self.explanations[0]
        }

    @property
    def cause_decides(self) -> Interval | None:
        """Share of the inputs whose decision changes when the planted cause alone is replaced; None where it is unknown."""
        return None if self.decides is None else Interval.of(sum(self.decides), len(self.decides))

    @property
    def undefined(self) -> dict[str, str]:
        """Why nothing is said of causes."""
        return {} if self.planted is not None else dict.fromkeys(self.DERIVED, "no cause was planted")

    @property
    def methods(self) -> str:
        """One sentence for a methods section."""
        judged = ", and is judged by whether it holds the planted cause (Wilson intervals)"
        return (
            f"{len(self.explanations)} decisions were explained by CLEANN (Rohekar et al., 2023) and by the most attention, gradient times input and "
            "leave-one-out; a set of tokens explains a decision if replacing it changes the decision"
            f"{'' if self.planted is None else judged} ({self.measured_with})."
        )

    def to_pandas(self) -> pd.DataFrame:
        """By method: the table of the summary; ``sets``, how many sets are found where any is; ``with_cause`` and its interval."""
        table = self.summary.to_pandas()
        for method in table.index:
            counts = [len(each[method].sets) for each in self.explanations if each[method].sets]
            table.loc[method, "sets"] = float(np.mean(counts)) if counts else None
            if (share := self.with_cause[method]) is not None:
                table.loc[method, ["with_cause", "with_cause_low", "with_cause_high"]] = dataclasses.astuple(share)
        return table

    def table(self) -> Table:
        """:meth:`to_pandas`, a column for each method."""
        decides = self.cause_decides
        known = "" if decides is None else f", the planted cause decides {decides.share:.3f} of them"
        shown = self.to_pandas().T.astype(object)
        return Table(
            f"ExplanationStudy of {len(self.explanations)} inputs, accuracy {self.accuracy:.3f}{known}",
            ("", *map(str, shown.columns)),
            [(str(row.name), *row) for _, row in shown.where(shown.notna(), None).iterrows()],
        )


@takes(SentimentOptions)
def explain_sentiment(encoder: str | os.PathLike[str], o: SentimentOptions) -> ExplanationStudy:
    """A sentiment classifier on a pretrained encoder, trained on made sentences and explained on others.

    Only a linear layer over the pooled output is trained (logistic regression), on 960 sentences of three classes: negative, neutral and
    positive, by one adjective (or the mask, which is neutral); up to three of the other words are masked in each. Explained are
    sentences that are not neutral, read at [CLS], on the graphs of all heads of the last layer; tokens are replaced by the mask.
    """
    from sklearn.linear_model import LogisticRegression
    from transformers import AutoModelForSequenceClassification

    loaded = load_model(encoder, any_kind=True)
    tokenizer, rng = loaded.tokenizer, np.random.default_rng(o.seed)
    model: Any = AutoModelForSequenceClassification.from_config(
        type(loaded.model.config).from_dict({**loaded.model.config.to_dict(), "num_labels": 3}),
        attn_implementation="eager",
    )
    model.base_model.load_state_dict(loaded.model.state_dict())
    model.eval()
    texts, classes, adjectives = _sentences(960, rng, (0, 1, 2))
    # A mask must not say "neutral" wherever it stands: in each sentence up to three other words are masked, too.
    texts = [_masked(text, adjective, rng) for text, adjective in zip(texts, adjectives, strict=True)]
    pooled = []
    with torch.no_grad():
        for start in range(0, len(texts), 32):
            pooled.append(
                model.base_model(
                    **tokenizer(texts[start : start + 32], return_tensors="pt", padding=True)
                ).pooler_output
            )
    fit = LogisticRegression(C=100, max_iter=5000).fit(torch.cat(pooled).numpy(), classes)
    with torch.no_grad():
        model.classifier.weight.copy_(torch.tensor(fit.coef_))
        model.classifier.bias.copy_(torch.tensor(fit.intercept_))

    texts, classes, adjectives = _sentences(o.inputs, rng, (0, 2))
    inputs = tokenizer(texts)["input_ids"]
    pieces = [set(tokenizer(adjective, add_special_tokens=False)["input_ids"]) for adjective in adjectives]
    planted = [
        tuple(place for place, token in enumerate(tokens) if token in its)
        for tokens, its in zip(inputs, pieces, strict=True)
    ]
    settings = o.settings(encoder=PurePath(encoder).name)
    asked = Asked("class", 0, tokenizer.mask_token_id, o.max_size, fixed=(-1,))
    return _study(model, asked, inputs, classes, planted, settings)


def _masked(text: str, adjective: str, rng: np.random.Generator) -> str:
    """The text with none to three words masked, but not the adjective."""
    words = text.split()
    others = [place for place, word in enumerate(words) if word.strip(".,") != adjective]
    for place in rng.permutation(others)[: rng.integers(0, 4)]:
        words[place] = "[MASK]"
    return " ".join(words)


def _sentences(n: int, rng: np.random.Generator, classes: Sequence[int]) -> tuple[list[str], list[int], list[str]]:
    texts, labels, adjectives = [], [], []
    for _ in range(n):
        label = int(rng.choice(classes))
        adjective = str(rng.choice(ADJECTIVES[label]))
        texts.append(
            str(rng.choice(SENTENCES)).format(who=rng.choice(PEOPLE), thing=rng.choice(THINGS), adjective=adjective)
        )
        labels.append(label)
        adjectives.append(adjective)
    return texts, labels, adjectives


@takes(SessionsOptions)
def explain_sessions(o: SessionsOptions) -> ExplanationStudy:
    """A small recommender in the manner of BERT4Rec, trained on sessions and explained on others.

    Two layers, two heads, width 64, trained as BERT is: the last item and 15% of the others are the targets; of these others
    80% are masked, 10% replaced by a random item and 10% left. (With a loss at the last item alone the last layer's rows of the others
    are never trained, and a graph read from them is one of random rows: then CLEANN found a set for one session in eight.)
    Explained is the item that the model puts first at the mask, on the graphs of all heads of the last layer; items are
    replaced by the mask.
    """
    from transformers import BertConfig, BertForMaskedLM

    inputs, ratings, seed = o.inputs, o.ratings, o.seed
    # Apart, so that the model does not depend on how many sessions are explained.
    rng, fresh = (np.random.default_rng(source) for source in np.random.SeedSequence(seed).spawn(2))
    if ratings is None:
        sessions, held = synthetic_sessions(4096, rng), synthetic_sessions(inputs, fresh)
        places: list[int] | None = [int(np.flatnonzero(row[:-1] < CAUSES)[0]) for row in held]
        n_items = ITEMS
    else:
        everything = read_ratings(ratings)
        if len(everything) < 2 * inputs:
            raise CausalProbeError(
                f"{ratings} has {len(everything)} users with enough ratings; {inputs} inputs need {2 * inputs}."
            )
        order = rng.permutation(len(everything))
        held, sessions, places = everything[order[:inputs]], everything[order[inputs:]], None
        n_items = int(everything.max()) + 1
    mask = n_items
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        model: Any = BertForMaskedLM._from_config(
            BertConfig(
                vocab_size=n_items + 1,
                hidden_size=64,
                num_hidden_layers=2,
                num_attention_heads=2,
                intermediate_size=128,
                max_position_embeddings=max(16, sessions.shape[1]),
                hidden_dropout_prob=0.0,
                attention_probs_dropout_prob=0.0,
            ),
            attn_implementation="eager",
        )
        _train(model, sessions, mask, o.steps, rng)
    planted = None if places is None else [(place,) for place in places]
    settings = o.settings(ratings=None if ratings is None else PurePath(ratings).name)
    asked = Asked("masked", held.shape[1] - 1, mask, o.max_size)
    return _study(model, asked, [[*row[:-1].tolist(), mask] for row in held], held[:, -1].tolist(), planted, settings)


def synthetic_sessions(n: int, rng: np.random.Generator) -> Int[np.ndarray, "session item"]:
    """Sessions [n, LENGTH + 1] of noise items, one cause at a random place, and its effect at the end."""
    rows = rng.integers(2 * CAUSES, ITEMS, size=(n, LENGTH + 1))
    causes = rng.integers(0, CAUSES, size=n)
    rows[np.arange(n), rng.integers(0, LENGTH, size=n)] = causes
    rows[:, -1] = CAUSES + causes
    return rows


def read_ratings(path: str | os.PathLike[str], *, length: int = 10) -> Int[np.ndarray, "user item"]:
    """Each user's last ``length`` items in order of time, items numbered from 0, of a file in MovieLens-100k's format.

    Users with fewer are left out.

    Raises
    ------
    CausalProbeError
        If the file can't be read, or is not four whole numbers a line between tabs.
    """
    try:
        table = pd.read_csv(Path(path), sep="\t", header=None)
    except (OSError, ValueError) as error:
        raise CausalProbeError(f"The ratings {path} can't be read: {error}") from error
    if table.shape[1] != 4 or not all(kind.kind == "i" for kind in table.dtypes):
        raise CausalProbeError(
            f"{path} is no ratings file: each line has user, item, rating and time, whole numbers between tabs."
        )
    table.columns = ["user", "item", "rating", "time"]
    table["item"] = pd.factorize(table["item"], sort=True)[0]
    # Ties in time are broken by item, so that the order of the lines plays no part.
    rows = [
        user["item"].to_numpy()[-length:]
        for _, user in table.sort_values(["time", "item"]).groupby("user")
        if len(user) >= length
    ]
    if not rows:
        raise CausalProbeError(f"No user in {path} has {length} ratings.")
    return np.stack(rows)


def _train(
    model: Any, sessions: Int[np.ndarray, "session item"], mask: int, steps: int, rng: np.random.Generator
) -> None:
    optimizer = torch.optim.AdamW(model.parameters(), lr=2e-3)
    model.train()
    for _ in range(steps):
        batch = torch.tensor(sessions[rng.integers(0, len(sessions), 128)])
        asked = torch.tensor(rng.random(tuple(batch.shape)) < 0.15)
        chance = torch.tensor(rng.random(tuple(batch.shape)))
        asked[:, -1], chance[:, -1] = True, 0
        shown = batch.masked_fill(asked & (chance < 0.8), mask)
        other = torch.tensor(rng.integers(0, mask, tuple(batch.shape)))
        shown = torch.where(asked & (chance >= 0.8) & (chance < 0.9), other, shown)
        loss = torch.nn.functional.cross_entropy(model(input_ids=shown).logits[asked], batch[asked])
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    model.eval()


def _changes(outputs: Outputs, tokens: Sequence[int], nodes: Sequence[int], replacement: int) -> bool:
    """Whether the decision is another one with these tokens replaced."""
    rows = torch.tensor([list(tokens)] * 2)
    rows[1, list(nodes)] = replacement
    with torch.no_grad():
        before, after = outputs(rows).argmax(dim=-1).tolist()
    return bool(before != after)


class Asked(NamedTuple):
    """Which decision is explained: its kind, at which position, what replaces tokens, the largest set, and what is never replaced."""

    kind: Any
    target: int
    replacement: int
    max_size: int
    fixed: tuple[int, ...] = ()


def _study(
    model: Any,
    asked: Asked,
    inputs: Sequence[list[int]],
    expected: Sequence[int],
    planted: Sequence[tuple[int, ...]] | None,
    settings: Mapping[str, Any],
) -> ExplanationStudy:
    """Every decision explained, and compared with what was expected and what was planted."""
    outputs = outputs_of(model, asked.kind, position=asked.target)
    explained = [_explain(model, outputs, tokens, asked) for tokens in inputs]
    right = sum(each["cleann"].decision == label for each, label in zip(explained, expected, strict=True))
    summary = summarise(explained)
    decides = None
    if planted is not None:
        each = zip(inputs, planted, strict=True)
        decides = tuple(_changes(outputs, tokens, cause, asked.replacement) for tokens, cause in each)
        planted = tuple(planted)
    share = right / len(inputs)
    about = {"settings": settings, "provenance": summary.provenance}
    return ExplanationStudy(summary, tuple(explained), planted, decides, share, **about)


def _explain(model: Any, outputs: Outputs, tokens: list[int], asked: Asked) -> dict[str, Explanation]:
    row = torch.tensor([tokens])
    options: dict[str, Any] = {
        "target": asked.target, "replacement": asked.replacement, "fixed": [place % len(tokens) for place in asked.fixed],
        "max_size": asked.max_size, "max_tested": 500, "head": "any",
    }  # fmt: skip
    found = {}
    for name, residual in READINGS.items():
        discovery = probes.discover_from_attention(model, row, residual=residual)
        found[name] = probes.explain(discovery, outputs, **options)["cleann"]
    # The baselines rank the tokens; the graphs play no part in them.
    pattern = read_layer(model, row, -1).mean(dim=0)
    return found | probes.explain(discovery, outputs, methods=BASELINES, pattern=pattern, model=model, **options)
