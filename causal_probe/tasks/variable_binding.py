"""Small programs with a true graph of their own: lines ``variable = constant`` or ``variable = variable``, then a query.

    a = 3       line 0
    b = a       line 1, whose parent is line 0
    a = 7       line 2
    c = b       line 3, whose parent is line 1
    # c         the query, whose parent is line 3; the answer is 3

The parent of a line is the line that last assigned the variable on its right-hand side; a constant has none. The answer's chain of lines is
followed from the query; its number of lines is the program's number of *hops*. Lines that the chain does not pass are distractors.
(Wu, Geiger & Milliere, *How Do Transformers Learn Variable Binding in Symbolic Programs?*, 2025, have longer programs of this kind.)
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from functools import partial

import networkx as nx
import numpy as np
import torch
from jaxtyping import Float, Int
from torch import Tensor
from torch.nn import functional

from causal_probe.arguments import checked
from causal_probe.errors import CausalProbeError
from causal_probe.tasks.randomness import check_batch_size, out_of_range

__all__ = ["Programs", "VariableBinding"]

#: Tokens of a line: variable, "=", right-hand side, end of line.
LINE = 4
#: Programs are drawn again until their query has the wanted hops; a share this rare is refused.
TRIES = 10_000


@dataclass(frozen=True)
class Programs:
    """Programs, and what is known of them.

    Attributes
    ----------
    tokens
        [program, pos]: the lines, then ``#`` and the query's variable.
    answers
        [program]: the token of the constant that the query's variable holds.
    parents
        [program, line + 1]: of each line, and last of the query, the line that it takes its value from; -1 for a constant.
    hops
        [program]: the number of lines from the query to its constant.
    """

    tokens: Int[Tensor, "program pos"]
    answers: Int[Tensor, " program"]
    parents: Int[Tensor, "program node"]
    hops: Int[Tensor, " program"]

    def __len__(self) -> int:
        return len(self.tokens)

    def graph(self, program: int) -> nx.DiGraph:
        """The true graph of one program: nodes are its lines and, last, the query; edges go from a value's source to its use."""
        its = self.parents[program].tolist()
        graph = nx.empty_graph(len(its), create_using=nx.DiGraph)
        graph.add_edges_from((parent, child) for child, parent in enumerate(its) if parent >= 0)
        return graph


@checked
class VariableBinding:
    """Programs of assignments, and a query.

    Parameters
    ----------
    n_lines
        Lines before the query, at least 1.
    hops
        Numbers of hops that queries have, each as often; from 1 to ``n_lines``.
    n_variables, n_constants
        Names and values, at least 2 of each.
    copies
        Probability that a line assigns a variable, where some variable has a value; in (0, 1).

    Raises
    ------
    CausalProbeError
        If an argument is out of range.

    Examples
    --------
    >>> from causal_probe import tasks
    >>> task = VariableBinding(n_lines=4, hops=(2,), n_variables=3, n_constants=5)
    >>> programs = task.sample(8, tasks.generator(0, "programs"))
    >>> print(task.text(programs.tokens[0]))
    b = 3
    c = 4
    a = 1
    a = a
    # a
    >>> programs.parents[0].tolist(), int(programs.answers[0])
    ([-1, -1, -1, 2, 3], 1)
    """

    def __init__(
        self, n_lines: int = 6, *, hops: tuple[int, ...] = (1, 2), n_variables: int = 6, n_constants: int = 10,
        copies: float = 0.5,
    ) -> None:  # fmt: skip
        counts = {"n_lines": (n_lines, 1), "n_variables": (n_variables, 2), "n_constants": (n_constants, 2)}
        if wrong := out_of_range(counts, {}):
            raise CausalProbeError(f"{'; '.join(wrong)}.")
        if not hops or len(set(hops)) != len(hops) or not all(isinstance(h, int) and 1 <= h <= n_lines for h in hops):
            raise CausalProbeError(
                f"hops are different whole numbers from 1 to n_lines = {n_lines}, one or more; found {hops!r}."
            )
        if not 0 < copies < 1:
            raise CausalProbeError(f"copies is a probability between 0 and 1, not {copies!r}.")
        self.n_lines, self.hops, self.copies = n_lines, tuple(hops), float(copies)
        self.n_variables, self.n_constants = n_variables, n_constants
        #: Constants come first, so that an answer is its own token; then variables, ``=``, the end of a line, ``#``.
        self.equals, self.end, self.ask = (n_constants + n_variables + i for i in range(3))
        self.d_vocab = n_constants + n_variables + 3
        self.n_positions = LINE * n_lines + 2

    def __repr__(self) -> str:
        return (
            f"VariableBinding({self.n_lines} lines, hops={self.hops}, {self.n_variables} variables, "
            f"{self.n_constants} constants, {self.n_positions} positions)"
        )

    def sample(self, batch_size: int, generator: torch.Generator) -> Programs:
        """Draw programs, on the generator's device.

        Raises
        ------
        CausalProbeError
            If ``batch_size`` is below 1, or programs with these hops are too rare to be found.
        """
        check_batch_size(batch_size, generator)
        device = generator.device
        seed = int(torch.randint(2**62, (), generator=generator, device=device))
        rng = np.random.default_rng(seed)
        hops = rng.choice(self.hops, batch_size)
        lines = np.empty(
            (batch_size, self.n_lines, 2), np.int64
        )  # left, right; a right-hand variable is n_constants + its number
        parents = np.empty((batch_size, self.n_lines + 1), np.int64)
        asked = np.empty(batch_size, np.int64)
        wanted = np.arange(batch_size)
        for _ in range(TRIES):
            if not len(wanted):
                break
            its = self._draw(len(wanted), rng, hops[wanted])
            lines[wanted], parents[wanted], asked[wanted], right = its
            wanted = wanted[~right]
        else:
            raise CausalProbeError(
                f"Programs of {self.n_lines} lines and {max(self.hops)} hops are too rare to be drawn: take fewer hops, more lines or more variables."
            )
        answers = self._answers(lines, parents)
        tokens = np.empty((batch_size, self.n_positions), np.int64)
        tokens[:, 0:-2:LINE] = self.n_constants + lines[..., 0]
        tokens[:, 1:-2:LINE], tokens[:, 2:-2:LINE], tokens[:, 3:-2:LINE] = self.equals, lines[..., 1], self.end
        tokens[:, -2], tokens[:, -1] = self.ask, self.n_constants + asked
        return Programs(*(torch.from_numpy(each).to(device) for each in (tokens, answers, parents, hops)))

    def references(self) -> dict[str, Callable[[Programs], Float[Tensor, "program 1 d_vocab"]]]:
        """Predictors of the answer that know a part of the rules, by name; each gives probabilities over all tokens.

        *A constant*: all alike. *A constant of the program*: each as often as it stands there. *The first line's*: line 0 always assigns one. *A line of the
        variable*: lines that assign the query's variable, the last and those before it alike; where one assigns a variable, a constant of the program. *One hop*: the last
        of these lines. *Two hops*: the line that this one takes its value from, too; where that is no constant, one of the program. *Exact*: the answer.
        """
        C = self.n_constants

        def parts(programs: Programs) -> tuple[Tensor, Tensor, Tensor, Tensor]:
            left, right = programs.tokens[:, 0:-2:LINE], programs.tokens[:, 2:-2:LINE]
            law = functional.one_hot(right, self.d_vocab).double()
            seen = law * (right < C)[..., None]
            seen = seen.sum(1, keepdim=True) / (right < C).sum(1)[:, None, None]
            law = torch.where(
                (right < C)[..., None], law, seen
            )  # [program, line, token]: what each line says by itself
            return left, right, law, seen

        def at(law: Tensor, line: Tensor) -> Tensor:
            return law[torch.arange(len(law), device=law.device), line][:, None]

        def named(programs: Programs) -> Tensor:
            left, _, law, _ = parts(programs)
            its = (left == programs.tokens[:, -1:]).double()
            return ((its / its.sum(1, keepdim=True))[..., None] * law).sum(1, keepdim=True)

        def hops(programs: Programs, n: int) -> Tensor:
            line = programs.parents[:, -1]
            for _ in range(n - 1):
                above = programs.parents.gather(1, line[:, None])[:, 0]
                line = torch.where(above >= 0, above, line)
            return at(parts(programs)[2], line)

        even = functional.pad(torch.full((C,), 1 / C, dtype=torch.float64), (0, self.d_vocab - C))
        return {
            "a constant": lambda programs: even.to(programs.tokens.device).expand(len(programs), 1, -1),
            "a constant of the program": lambda programs: parts(programs)[3],
            "the first line's": lambda programs: parts(programs)[2][:, :1],
            "a line of the variable": named,
            **{name: partial(hops, n=n) for n, name in ((1, "one hop"), (2, "two hops")) if n < max(self.hops)},
            "exact": partial(hops, n=max(self.hops)),
        }

    def text(self, tokens: Int[Tensor, " pos"]) -> str:
        """One program as text, a line each."""
        variables = [chr(ord("a") + i) if i < 26 else f"v{i}" for i in range(self.n_variables)]
        words = [*map(str, range(self.n_constants)), *variables, "=", "\n", "#"]
        return " ".join(words[token] for token in tokens.tolist()).replace(" \n ", "\n")

    def _draw(
        self, n: int, rng: np.random.Generator, hops: Int[np.ndarray, " program"]
    ) -> tuple[np.ndarray, np.ndarray, np.ndarray, np.ndarray]:
        """Programs by chance: lines, parents, the variable asked for, and whether one has the wanted hops."""
        row = np.arange(n)
        last = np.full((n, self.n_variables), -1)  # by variable: the line that last assigned it
        depth = np.zeros((n, self.n_lines), np.int64)
        lines = np.empty((n, self.n_lines, 2), np.int64)
        parents = np.full((n, self.n_lines + 1), -1)
        for line in range(self.n_lines):
            left = rng.integers(self.n_variables, size=n)
            known = last >= 0
            source = (rng.random((n, self.n_variables)) * known).argmax(1)  # of those with a value, each as likely
            copied = known.any(1) & (rng.random(n) < self.copies)
            lines[:, line, 0] = left
            lines[:, line, 1] = np.where(copied, self.n_constants + source, rng.integers(self.n_constants, size=n))
            parents[:, line] = np.where(copied, last[row, source], -1)
            depth[:, line] = np.where(copied, depth[row, parents[:, line]] + 1, 1)
            last[row, left] = line
        fits = (last >= 0) & (depth[row[:, None], last] == hops[:, None])
        asked = (rng.random((n, self.n_variables)) * fits).argmax(1)
        parents[:, -1] = last[row, asked]
        return lines, parents, asked, fits.any(1)

    @staticmethod
    def _answers(lines: np.ndarray, parents: np.ndarray) -> np.ndarray:
        """The constant at the end of each query's chain."""
        row, at = np.arange(len(lines)), parents[:, -1].copy()
        for _ in range(lines.shape[1]):
            above = parents[row, at]
            at = np.where(above >= 0, above, at)
        return np.asarray(lines[row, at, 1])
