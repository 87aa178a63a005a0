"""In-context regression: a few examples (x, y) of a function that is new in every sequence, and a query to be answered.

The task of von Oswald et al. 2022 (arXiv 2212.07677), as in their code. In each sequence::

    W    ~  N(0, w_scale^2), d_out x d_x
    x_j  ~  iid entries, uniform in (-input_scale, input_scale) or normal with that standard deviation;  j = 1..N and the query
    y_j  =  W x_j + noise * N(0, I)            the query's target, W x_q, has no noise

    tokens, joint:      (x_1, y_1), ..., (x_N, y_N), (x_q, -W0 x_q)                    N + 1 positions
    tokens, separate:   (x_1, 0), (0, y_1), ..., (x_N, 0), (0, y_N), (x_q, -W0 x_q)    2N + 1 positions

W0 is the weight matrix that gradient descent starts from, zero unless it is given. A model's prediction is minus one times the
last d_out entries of the last token of its output: gradient descent there *subtracts* its prediction.

The authors' half-width of the inputs is 0.5 (their text says 1). Their separate tokens keep y_j in the last of d_x entries and
read the prediction out of a positional entry; here y has entries of its own, and the read-out is the same in both forms.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Literal, get_args

import torch
from jaxtyping import Float
from torch import Tensor

from causal_probe.arguments import checked
from causal_probe.errors import CausalProbeError
from causal_probe.tasks.randomness import check_batch_size, out_of_range

__all__ = ["InputLaw", "LinearRegression", "RegressionBatch", "SineRegression", "TokenForm", "regression_tokens"]

InputLaw = Literal["uniform", "normal"]
TokenForm = Literal["joint", "separate"]


@dataclass(frozen=True, eq=False)
class RegressionBatch:
    """Examples, queries, and the tokens made of them.

    Attributes
    ----------
    tokens
        The model's input.
    target
        The query's y, without noise.
    x, y
        The examples.
    x_query
        The query.
    """

    tokens: Float[Tensor, "batch pos d_token"]
    target: Float[Tensor, "batch d_out"]
    x: Float[Tensor, "batch example d_x"]
    y: Float[Tensor, "batch example d_out"]
    x_query: Float[Tensor, "batch d_x"]

    def __len__(self) -> int:
        return len(self.tokens)


def regression_tokens(
    x: Float[Tensor, "batch example d_x"],
    y: Float[Tensor, "batch example d_out"],
    x_query: Float[Tensor, "batch d_x"],
    *,
    form: TokenForm = "joint",
    W0: Float[Tensor, "d_out d_x"] | None = None,
) -> Float[Tensor, "batch pos d_token"]:
    """Tokens of examples and a query, differentiable in all three; ``d_token = d_x + d_out``.

    Examples
    --------
    >>> import torch
    >>> x = torch.eye(2)[None]
    >>> regression_tokens(x, 3 * x[..., :1], torch.tensor([[1.0, 2.0]]))
    tensor([[[1., 0., 3.],
             [0., 1., 0.],
             [1., 2., 0.]]])
    """
    d_x, d_out = x.shape[-1], y.shape[-1]
    start = x_query.new_zeros(len(x_query), d_out) if W0 is None else -x_query @ W0.to(x_query).mT
    query = torch.cat([x_query, start], -1)[:, None]
    if form == "joint":
        return torch.cat([torch.cat([x, y], -1), query], 1)
    if form != "separate":
        raise CausalProbeError(f"form must be 'joint' or 'separate', not {form!r}.")
    pad = torch.nn.functional.pad
    pairs = torch.stack([pad(x, (0, d_out)), pad(y, (d_x, 0))], 2)
    return torch.cat([pairs.flatten(1, 2), query], 1)


class _Regression:
    """Methods on examples and a query that both tasks share."""

    form: TokenForm = "joint"
    W0: Float[Tensor, "d_out d_x"] | None = None

    def tokens(
        self,
        x: Float[Tensor, "batch example d_x"],
        y: Float[Tensor, "batch example d_out"],
        x_query: Float[Tensor, "batch d_x"],
    ) -> Float[Tensor, "batch pos d_token"]:
        """The tokens of given examples and queries, differentiable."""
        return regression_tokens(x, y, x_query, form=self.form, W0=self.W0)


@checked
class LinearRegression(_Regression):
    """In-context linear regression.

    Parameters
    ----------
    d_x, n_examples, d_out
        Dimensions of x, number N of examples, dimensions of y; each >= 1.
    input_law, input_scale
        ``"uniform"`` in (-input_scale, input_scale), or ``"normal"`` with that standard deviation; > 0.
    w_scale
        Standard deviation of the entries of W; > 0.
    noise
        Standard deviation of the noise on the examples' y; >= 0.
    form
        ``"joint"`` or ``"separate"`` tokens.
    W0
        Where gradient descent starts, [d_out, d_x]; None: at zero.

    Raises
    ------
    CausalProbeError
        Naming every argument that is out of range.

    Examples
    --------
    >>> import torch
    >>> task = LinearRegression(d_x=10, n_examples=10)
    >>> batch = task.sample(4, torch.Generator().manual_seed(0))
    >>> batch.tokens.shape, batch.target.shape
    (torch.Size([4, 11, 11]), torch.Size([4, 1]))
    """

    def __init__(
        self,
        d_x: int = 10,
        n_examples: int = 10,
        *,
        d_out: int = 1,
        input_law: InputLaw = "uniform",
        input_scale: float = 0.5,
        w_scale: float = 1.0,
        noise: float = 0.0,
        form: TokenForm = "joint",
        W0: Float[Tensor, "d_out d_x"] | None = None,
    ) -> None:
        counts = {"d_x": (d_x, 1), "n_examples": (n_examples, 1), "d_out": (d_out, 1)}
        problems = out_of_range(counts, {"input_scale": input_scale, "w_scale": w_scale})
        if not 0 <= noise < math.inf:
            problems.append(f"noise must be a finite standard deviation of at least 0, not {noise}")
        if input_law not in get_args(InputLaw):
            problems.append(f"input_law must be uniform or normal, not {input_law!r}")
        if form not in get_args(TokenForm):
            problems.append(f"form must be joint or separate, not {form!r}")
        if W0 is not None and tuple(W0.shape) != (d_out, d_x):
            problems.append(f"W0 must have the shape {[d_out, d_x]}, [d_out, d_x]; its is {list(W0.shape)}")
        if problems:
            raise CausalProbeError("There is no such regression task: " + "; ".join(problems) + ".")
        self.d_x, self.n_examples, self.d_out = d_x, n_examples, d_out
        self.input_law: InputLaw = input_law
        self.input_scale, self.w_scale, self.noise = float(input_scale), float(w_scale), float(noise)
        self.form, self.W0 = form, W0

    def __repr__(self) -> str:
        law = f"U(-{self.input_scale:g}, {self.input_scale:g})"
        law = law if self.input_law == "uniform" else f"N(0, {self.input_scale:g}^2)"
        noise = f", noise {self.noise:g}" if self.noise else ""
        return f"LinearRegression({self.n_examples} examples, d_x={self.d_x}, d_out={self.d_out}, x ~ {law}{noise}, {self.form})"

    @property
    def n_positions(self) -> int:
        """Number of tokens."""
        return (1 if self.form == "joint" else 2) * self.n_examples + 1

    @property
    def d_token(self) -> int:
        """Width of a token."""
        return self.d_x + self.d_out

    @property
    def input_variance(self) -> float:
        """Variance of an entry of x."""
        return self.input_scale**2 / (3 if self.input_law == "uniform" else 1)

    def sample(
        self, batch_size: int, generator: torch.Generator, *, dtype: torch.dtype = torch.float32
    ) -> RegressionBatch:
        """Draw ``batch_size`` sequences, each with a function of its own, on the generator's device.

        Raises
        ------
        CausalProbeError
            If ``batch_size`` is below 1.
        """
        check_batch_size(batch_size, generator)
        W = self._normal((batch_size, self.d_out, self.d_x), generator, dtype) * self.w_scale
        inputs = self.sample_inputs(batch_size, generator, dtype=dtype)
        outputs = inputs @ W.mT
        x, x_query, target = inputs[:, :-1], inputs[:, -1], outputs[:, -1].clone()
        if self.noise:
            outputs[:, :-1] += self.noise * self._normal((batch_size, self.n_examples, self.d_out), generator, dtype)
        y = outputs[:, :-1]
        if self.form == "joint" and self.W0 is None:  # regression_tokens with fewer copies: sampling is most of a step
            tokens = torch.cat([inputs, outputs], -1)
            tokens[:, -1, self.d_x :] = 0
        else:
            tokens = self.tokens(x, y, x_query)
        return RegressionBatch(tokens, target, x, y, x_query)

    def sample_inputs(
        self, batch_size: int, generator: torch.Generator, *, dtype: torch.dtype = torch.float32
    ) -> Float[Tensor, "batch inputs d_x"]:
        """The inputs alone, the query last: [batch, N + 1, d_x]."""
        shape = (batch_size, self.n_examples + 1, self.d_x)
        if self.input_law == "normal":
            return self._normal(shape, generator, dtype) * self.input_scale
        uniform = torch.empty(shape, dtype=dtype, device=generator.device)
        return uniform.uniform_(-self.input_scale, self.input_scale, generator=generator)

    def _normal(self, shape: tuple[int, ...], generator: torch.Generator, dtype: torch.dtype) -> Tensor:
        return torch.randn(shape, generator=generator, dtype=dtype, device=generator.device)


@checked
class SineRegression(_Regression):
    """In-context regression of sine waves, of scalar x (von Oswald et al. 2022).

    In each sequence ``y = a sin(x + p)`` with a ~ U(0.1, 0.5), p ~ U(0, phases), and x ~ U(-input_scale, input_scale). Tokens are
    joint, (x, y). The attributes are those of :class:`LinearRegression` that a model's shape depends on.

    In terms of its features, y = c_1 sin x + c_2 cos x with c = a (cos p, sin p). Over half a turn, the authors' law, c_2 is never
    negative: its mean is 0.19, so that zero is no good start for gradient descent, and the sum of y^2 tells something about it. Over
    a whole turn c and -c are equally likely, c_1 and c_2 have one variance, and no predictor that is linear in the examples' y is much
    better than one gradient step on (sin x, cos x).

    Parameters
    ----------
    n_examples
        Number N of examples, >= 1.
    input_scale
        Half-width of the inputs, > 0. The authors' is 5.
    phases
        Upper end of the phases, > 0. The authors' is pi.

    Raises
    ------
    CausalProbeError
        If an argument is out of range.
    """

    d_x, d_out, d_token = 1, 1, 2

    def __init__(self, n_examples: int = 10, *, input_scale: float = 5.0, phases: float = math.pi) -> None:
        if problems := out_of_range({"n_examples": (n_examples, 1)}, {"input_scale": input_scale, "phases": phases}):
            raise CausalProbeError("There is no such regression task: " + "; ".join(problems) + ".")
        self.n_examples, self.input_scale, self.phases = n_examples, float(input_scale), float(phases)
        self.n_positions = n_examples + 1

    def __repr__(self) -> str:
        law = f"x ~ U(-{self.input_scale:g}, {self.input_scale:g}), phases in (0, {self.phases / math.pi:g} pi)"
        return f"SineRegression({self.n_examples} examples, {law})"

    def sample(
        self, batch_size: int, generator: torch.Generator, *, dtype: torch.dtype = torch.float32
    ) -> RegressionBatch:
        """Draw ``batch_size`` sequences; see :meth:`LinearRegression.sample`."""
        check_batch_size(batch_size, generator)

        def uniform(low: float, high: float, n: int) -> Tensor:
            drawn = torch.empty(batch_size, n, 1, dtype=dtype, device=generator.device)
            return drawn.uniform_(low, high, generator=generator)

        amplitude, phase = uniform(0.1, 0.5, 1), uniform(0.0, self.phases, 1)
        inputs = uniform(-self.input_scale, self.input_scale, self.n_examples + 1)
        outputs = amplitude * torch.sin(inputs + phase)
        x, y, x_query = inputs[:, :-1], outputs[:, :-1], inputs[:, -1]
        return RegressionBatch(self.tokens(x, y, x_query), outputs[:, -1], x, y, x_query)
