"""Head types as *templates*: which earlier positions a head of some type attends to, given the tokens.

A template is a plain function from tokens [batch, pos] to the allowed parents of each position, as a Boolean array
[batch, query, key]: its *targets*. A perfect previous-token head puts all of its attention on ``key = query - 1``; a perfect
induction head on the keys *after* the earlier occurrences of its query's token (Olsson et al., 2022). The successor-of-parent
template is the generalised induction head of Nichani, Damian & Lee (2024) for a known causal graph.

A type of one's own is one function:

>>> import torch
>>> every_second = Template("every-second", lambda tokens: offset(2)(tokens) | offset(4)(tokens), "two or four back")
>>> every_second(torch.tensor([[5, 6, 7]]))[0].int()
tensor([[0, 0, 0],
        [0, 0, 0],
        [1, 0, 0]], dtype=torch.int32)
"""

from __future__ import annotations

import difflib
import re
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field, replace
from typing import Any

import networkx as nx
import torch
from jaxtyping import Bool, Int
from torch import Tensor

from causal_probe.arguments import checked
from causal_probe.errors import CausalProbeError
from causal_probe.graphs import check_graph
from causal_probe.results import UNSAVED

__all__ = [
    "TEMPLATES",
    "Template",
    "find_templates",
    "from_graph",
    "induction",
    "offset",
    "successor_of_parent",
    "template",
]


def _unknown(tokens: Tensor) -> Tensor:
    raise CausalProbeError(
        "This template was read from a file, which holds its name and not its function: give the template itself."
    )


@checked
@dataclass(frozen=True)
class Template:
    """A type of attention head.

    Attributes
    ----------
    name
        In kebab-case: lower-case words and numbers joined by hyphens.
    targets
        From tokens [batch, pos] to a Boolean tensor [batch, query, key] (or [query, key], where the tokens don't matter): true
        where a head of this type may attend. Targets after the query are ignored: a causal model can't see them.
    description
        One line for tables and reports.
    shown_by
        The sequences that :func:`~causal_probe.probes.scan` makes for the template: ``"repeated"`` tokens; ``"3-gram"`` walks, on which
        fewer than three matching tokens say less (:mod:`causal_probe.probes.sequences`); or a function that makes
        them, ``(model, *, n_sequences, period, bos, seed) -> Sequences``.
    looks_back
        Whether its targets are earlier positions other than the first. Where they are not, heads are scored, and neither verified
        nor drawn by default.
    kind
        The name of the sequences that show it, which follows from ``shown_by``. A file holds it, and no functions: a template that is read
        back has those of the shipped template that it is, or none.

    Raises
    ------
    CausalProbeError
        If the name is not in kebab-case.
    """

    name: str
    targets: Callable[[Tensor], Tensor] = field(default=_unknown, metadata=UNSAVED)
    description: str = ""
    shown_by: str | Callable[..., Any] = field(default="repeated", metadata=UNSAVED)
    looks_back: bool = True
    kind: str = ""

    def __post_init__(self) -> None:
        if not re.fullmatch(r"[a-z0-9]+(-[a-z0-9]+)*", self.name):
            raise CausalProbeError(
                f"A template's name is in kebab-case, such as 'previous-token'; this one is {self.name!r}."
            )

        if self.targets is not _unknown:
            named = self.shown_by if isinstance(self.shown_by, str) else self.shown_by.__name__
            object.__setattr__(self, "kind", named)
            return
        object.__setattr__(self, "shown_by", self.kind)
        shipped = _shipped(self.name)
        if shipped is not None and replace(self, targets=shipped.targets) == shipped:
            object.__setattr__(self, "targets", shipped.targets)

    def __call__(self, tokens: Int[Tensor, "batch pos"]) -> Bool[Tensor, "batch pos pos"]:
        """The visible targets, [batch, query, key]: those at or before their query.

        Raises
        ------
        CausalProbeError
            If the function returns anything but Booleans [batch, query, key] or [query, key].
        """
        batch, pos = tokens.shape
        found = self.targets(tokens.clone())  # a function of one's own may write into what it is given
        if (
            not isinstance(found, Tensor)
            or found.dtype != torch.bool
            or found.shape not in ((batch, pos, pos), (pos, pos))
        ):
            got = f"{found.dtype} {list(found.shape)}" if isinstance(found, Tensor) else type(found).__name__
            raise CausalProbeError(
                f"The template {self.name!r} must turn tokens of shape {[batch, pos]} into Booleans [batch, query, key] = "
                f"{[batch, pos, pos]}; it returned {got}."
            )
        return found.to(tokens.device).expand(batch, pos, pos).tril()


# ---------------------------------------------------------------------------------------------------------------- shipped


@checked
def offset(k: int) -> Template:
    """The key ``k`` positions before the query, [batch, query, key]; 0 is the query itself. Chance: the mean of 1 / (query + 1) over its rows.

    Raises
    ------
    CausalProbeError
        If ``k`` is negative.

    Examples
    --------
    >>> offset(3).name
    'offset-3'
    """
    if k < 0:
        raise CausalProbeError(f"An offset counts positions back from the query, from 0; it is {k}.")
    return Template(f"offset-{k}", lambda tokens: _back(tokens, k), f"{k} positions back")


@checked
def induction(n: int = 1) -> Template:
    """The key after an earlier occurrence of the query's last ``n`` tokens (Olsson et al., 2022, for ``n = 1``).

    Key j is a target of query i if ``tokens[j - n : j] == tokens[i - n + 1 : i + 1]`` and j <= i. The off-by-one neighbour of
    ``n = 1``, the earlier occurrence itself, is the duplicate-token template.

    Raises
    ------
    CausalProbeError
        If ``n`` is below 1.

    Examples
    --------
    >>> import torch
    >>> induction()(torch.tensor([[7, 8, 9, 7]]))[0, 3].tolist()   # 7 was seen at position 0; 8 comes after it
    [False, True, False, False]
    >>> induction(2).name
    'induction-2gram'
    """
    if n < 1:
        raise CausalProbeError(f"An n-gram has one token or more; n is {n}.")

    def targets(tokens: Tensor) -> Tensor:
        same = tokens[:, :, None] == tokens[:, None, :]
        # [query, j]: the n tokens up to query equal those up to j. Each step back is one shift along the diagonal.
        match = same
        for back in range(1, n):
            match = match & _shift(same, down=back, right=back)
        earlier = match.tril(-1)
        return _shift(earlier, right=1)

    if n == 1:
        return Template("induction", targets, "after an earlier occurrence of the current token")
    said = f"after an earlier occurrence of the last {n} tokens together"
    return Template(f"induction-{n}gram", targets, said, shown_by=f"{n}-gram")


#: The templates of :func:`~causal_probe.probes.scan`, by name.
TEMPLATES: Mapping[str, Template] = {
    each.name: each
    for each in (
        Template("previous-token", lambda tokens: _back(tokens, 1), "one position back"),
        Template(
            "duplicate-token",
            lambda tokens: (tokens[:, :, None] == tokens[:, None, :]).tril(-1),
            "an earlier occurrence of the current token",
        ),
        induction(),
        induction(2),
        induction(3),
        Template("current-token", lambda tokens: _back(tokens, 0), "the query's own position", looks_back=False),
        Template("first-token", lambda tokens: _first(tokens), "position 0, the attention sink", looks_back=False),
    )
}


@checked
def template(name: str) -> Template:
    """A shipped template by its name; ``offset-K`` and ``induction-Ngram`` for any K >= 0 and N >= 1.

    >>> template("offset-3").description
    '3 positions back'

    Raises
    ------
    CausalProbeError
        If there is none of this name; the message lists those that there are.
    """
    if shipped := _shipped(name):
        return shipped
    near = difflib.get_close_matches(name, TEMPLATES, n=1)
    raise CausalProbeError(
        f"There is no template {name!r}{f'; did you mean {near[0]!r}?' if near else '.'} The known ones: {', '.join(TEMPLATES)}, "
        "offset-K, induction-Ngram. A template of your own is causal_probe.probes.Template(name, function)."
    )


def find_templates(templates: Any) -> tuple[Template, ...]:
    """Templates, each given by itself or by its name; one alone stands for itself.

    Raises
    ------
    CausalProbeError
        If there is none, a name is unknown, or two have one name.
    """
    if isinstance(templates, (str, Template)):
        templates = [templates]
    found = tuple(template(given) if isinstance(given, str) else given for given in templates)
    if not found:
        raise CausalProbeError("There is no template to look for. Name one or more, such as 'induction'.")
    if strangers := [type(given).__name__ for given in found if not isinstance(given, Template)]:
        raise CausalProbeError(
            f"Templates are given as Template or by name; there are {', '.join(strangers)}. For a graph: from_graph(graph)."
        )
    names = [given.name for given in found]
    if twice := sorted({name for name in names if names.count(name) > 1}):
        raise CausalProbeError(f"Several templates have the name {', '.join(twice)}. Give each its own.")
    return found


def _shipped(name: str) -> Template | None:
    if match := re.fullmatch(r"offset-(\d+)", name):
        return offset(int(match[1]))
    if name not in TEMPLATES and (match := re.fullmatch(r"induction-([1-9]\d*)gram", name)):
        return induction(int(match[1]))
    return TEMPLATES.get(name)


# ----------------------------------------------------------------------------------------------------------------- graphs


@checked
def from_graph(graph: nx.DiGraph, *, name: str = "graph", first: int = 0) -> Template:
    """The parents of each position in a known graph, whatever the tokens.

    Parameters
    ----------
    graph
        Edges parent -> child over nodes 0..n-1. Nodes beyond the last position of a sequence have no row and are ignored.
    name
        The template's name.
    first
        The position of node 0: 1 where a BOS token comes first.

    Raises
    ------
    CausalProbeError
        If the graph is not one of positions, or the name is not in kebab-case.

    Examples
    --------
    >>> import torch
    >>> from causal_probe import graphs
    >>> from_graph(graphs.chain(3))(torch.zeros(1, 3, dtype=torch.long)).int()
    tensor([[[0, 0, 0],
             [1, 0, 0],
             [0, 1, 0]]], dtype=torch.int32)
    """
    check_graph(graph)
    edges = torch.tensor(sorted(graph.edges), dtype=torch.long).reshape(-1, 2) + first

    def targets(tokens: Tensor) -> Tensor:
        n = tokens.shape[1]
        parent, child = edges[(edges < n).all(1)].T
        allowed = torch.zeros(n, n, dtype=torch.bool)
        allowed[child, parent] = True
        return allowed.to(tokens.device)

    return Template(name, targets, f"the parents in a graph of {len(graph)} nodes")


@checked
def successor_of_parent(graph: nx.DiGraph, *, name: str = "successor-of-parent", first: int = 0) -> Template:
    """The nodes with a parent that carries the query's token: the generalised induction head of a causal graph.

    Node j is a target of query i if j <= i and ``tokens[p] == tokens[i]`` for a parent p of j (Nichani, Damian & Lee, 2024). On
    a chain the parent of j is j - 1, and this is :func:`induction`. Arguments and errors are those of :func:`from_graph`.

    Examples
    --------
    >>> from causal_probe import graphs
    >>> successor_of_parent(graphs.chain(5)).name
    'successor-of-parent'
    """
    parents = from_graph(graph, name=name, first=first)

    def targets(tokens: Tensor) -> Tensor:
        same = tokens[:, :, None] == tokens[:, None, :]  # [query, parent]
        of = parents(tokens)  # [child, parent]
        return torch.einsum("bqp,bkp->bqk", same.float(), of.float()) > 0

    return Template(name, targets, f"nodes whose parent, in a graph of {len(graph)} nodes, carries the current token")


# ---------------------------------------------------------------------------------------------------------------- helpers


def _back(tokens: Tensor, k: int) -> Tensor:
    position = torch.arange(tokens.shape[1], device=tokens.device)
    return position[:, None] - position == k


def _first(tokens: Tensor) -> Tensor:
    position = torch.arange(tokens.shape[1], device=tokens.device)
    return (position == 0).expand(len(position), -1)


def _shift(pairs: Tensor, *, down: int = 0, right: int = 0) -> Tensor:
    """``shifted[query, key] = pairs[query - down, key - right]``, false where that lies outside."""
    n = pairs.shape[-1]
    return torch.nn.functional.pad(pairs, (right, 0, down, 0))[..., :n, :n]
