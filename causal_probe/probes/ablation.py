"""A model's loss with heads ablated: what :func:`~causal_probe.probes.verify` measures, batch by batch.

What a head reads out of the stream (``hook_z``) is replaced at its hook point. The layers below the first ablated head are not
run again: their output is that of the model as it is, and is *replayed*, which halves the cost on the average. (TransformerLens'
``start_at_layer`` would do on HookedTransformer; bridges ignore it or run all layers nevertheless.)
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager, nullcontext
from dataclasses import dataclass, field
from typing import Any, TypeAlias

import torch
from jaxtyping import Float, Int
from torch import Tensor, nn

from causal_probe.errors import CausalProbeError
from causal_probe.hooks import attention_hook, mean_ablate, resample_ablate, zero_ablate
from causal_probe.hooks.check import HookedModel, attention_hooks, keep, live_hooks, require_hooks

__all__ = ["Experiment", "Head", "Laboratory", "Measure", "Measured", "next_token"]

#: (layer, head), counted from 0.
Head: TypeAlias = tuple[int, int]
#: The name of a hook point and what is done there: an edit, or a recorder, which returns None.
Hook: TypeAlias = tuple[str, Callable[..., Any]]


@dataclass(frozen=True, eq=False)
class Measured:
    """What is measured of each sequence.

    Attributes
    ----------
    loss
        The loss, in nats.
    logit
        The target's logit, less the mean logit of the vocabulary; None where there is no one target.
    """

    loss: Float[Tensor, " batch"]
    logit: Float[Tensor, " batch"] | None


#: What is asked of the model: ``measure(logits [batch, pos, d_vocab], batch) -> Measured``.
Measure: TypeAlias = Callable[[Tensor, Any], Measured]


def next_token(queries: Sequence[int] | None = None) -> Measure:
    """The loss, and the logit, of the next token, averaged over some positions.

    Parameters
    ----------
    queries
        The positions at which the next token is predicted, negative ones counted from the end; all but the last by default.

    Returns
    -------
    callable
        ``measure(logits [batch, pos, d_vocab], batch) -> Measured``: the loss in nats (log d_vocab for an even guess) and the target's logit
        less the mean logit, each [batch], means over the positions.

    Raises
    ------
    CausalProbeError
        When it measures, if a position has no next token.

    Examples
    --------
    >>> logits = torch.zeros(1, 3, 4)
    >>> logits[0, 1, 2] = 4.0
    >>> next_token([1])(logits, torch.tensor([[0, 1, 2]])).logit     # 4, less the mean of 4, 0, 0, 0
    tensor([3.])
    """

    def measure(logits: Float[Tensor, "batch pos d_vocab"], batch: Any) -> Measured:
        tokens: Int[Tensor, "batch pos"] = getattr(batch, "tokens", batch)
        pos = tokens.shape[1]
        rows = list(range(pos - 1)) if queries is None else [query % pos for query in queries if -pos <= query < pos]
        if not rows or max(rows) >= pos - 1 or len(rows) != (len(rows) if queries is None else len(queries)):
            raise CausalProbeError(
                f"The next token was to be predicted at the positions {queries}; sequences of {pos} tokens have a next token at 0 to "
                f"{pos - 2}."
            )
        chosen = logits[:, rows].to(torch.promote_types(logits.dtype, torch.float32))
        target = tokens[:, [row + 1 for row in rows], None].to(chosen.device)
        logit = chosen.gather(-1, target)[..., 0]
        return Measured((chosen.logsumexp(-1) - logit).mean(1), (logit - chosen.mean(-1)).mean(1))

    return measure


class Laboratory:
    """A model, what is measured of it, and what an ablated head is replaced by.

    Parameters
    ----------
    model
        Any model with hook points ``blocks.{layer}.attn.hook_z``.
    measure
        What is measured.
    reference
        Batches over which the heads' means are taken, position by position.
    example
        A small batch, to see what the model can do.

    Raises
    ------
    CausalProbeError
        If heads can't be ablated: a hook point is missing, never fires or is not live.
    """

    def __init__(self, model: HookedModel, measure: Measure, *, reference: Iterable[Any], example: Any) -> None:
        self.model = model
        self.measure = measure
        self.n_layers = int(model.cfg.n_layers)
        #: Those that have attention.
        self.layers = [layer for layer, _ in attention_hooks(model, ["z"])]
        self.forwards = 0
        self._require_live(example)
        self.means = self._mean_heads(reference)
        #: Hook points of what each layer adds to the stream: attention, then the MLP, where the model has any.
        parts = ["attn_out"] if getattr(model.cfg, "attn_only", False) else ["attn_out", "mlp_out"]
        self.outputs = [[f"blocks.{layer}.hook_{part}" for part in parts] for layer in range(self.n_layers)]
        for layer in set(range(self.n_layers)) - set(self.layers):  # a mixer of another kind
            self.outputs[layer][0] = f"blocks.{layer}.linear_attn.hook_out"
        #: Why direct effects can't be measured; None if they can.
        self.no_direct = self._why_no_direct(example)
        #: Whether layers below the first ablated head can be replayed.
        self.replays = self._can_replay(example)

    @property
    def heads(self) -> list[Head]:
        """All heads of the model."""
        return [(layer, head) for layer in self.layers for head in range(self.means[layer].shape[1])]

    def run(self, batch: Any, hooks: Sequence[Hook] = (), *, replay: Mapping[int, Any] | None = None) -> Measured:
        """Measure one batch; ``replay`` holds, by layer, the outputs of blocks that need not run."""
        return self._measured(batch, hooks, replay or {})

    def _measured(
        self, batch: Any, hooks: Sequence[Hook] = (), replay: Mapping[int, Any] | None = None, *, finite: bool = True
    ) -> Measured:
        """As :meth:`run`; asked whether it is live, a point may be given NaN, and what comes out is not finite."""
        self.forwards += 1
        tokens = getattr(batch, "tokens", batch)
        with replayed(self.model, replay or {}), self.model.hooks(fwd_hooks=list(hooks)):
            logits = self.model(tokens)
        found = self.measure(logits, batch)
        for what, values in (("loss", found.loss), ("logit", found.logit)):
            if values is not None and (values.shape != (len(tokens),) or (finite and not values.isfinite().all())):
                raise CausalProbeError(
                    f"The measured {what} must be one finite number for each of {len(tokens)} sequences; it is "
                    f"{values.tolist() if values.numel() < 9 else list(values.shape)}."
                )
        return found

    # ----------------------------------------------------------------------------------------------------- what can be done

    def _require_live(self, example: Any) -> None:
        names = [attention_hook(layer, "z") for layer in self.layers]
        require_hooks(self.model, names)
        live = live_hooks(self.model, names, lambda: self._measured(example, finite=False).loss)
        if dead := [name for name in names if name not in live]:
            raise CausalProbeError(
                f"No effect of a head can be measured: nothing that is measured depends on the value at {', '.join(dead[:3])}"
                f"{' and others' if len(dead) > 3 else ''}. Load a Hugging Face model with eager attention; the heads of encoder "
                "bridges (BERT) can't be edited."
            )

    def _why_no_direct(self, example: Any) -> str | None:
        if self.run(example).logit is None:
            return "what is measured has no one target"
        if missing := [name for names in self.outputs for name in names if name not in self.model.hook_dict]:
            return f"the model has no hook point {missing[0]}, at which a later layer could be held still"
        for which in zip(*self.outputs, strict=True):  # attention outputs, then those of the MLPs
            if dead := set(which) - live_hooks(self.model, which, lambda: self._measured(example, finite=False).loss):
                return f"nothing reads the value at {sorted(dead)[0]}, so later layers can't be held still"
        return None

    def _can_replay(self, example: Any) -> bool:
        """Whether the model, with the output of all blocks but the last replayed, gives the same without running them."""
        first = "blocks.0.hook_resid_pre"
        blocks = getattr(self.model, "blocks", None)
        if not isinstance(blocks, nn.ModuleList) or len(blocks) != self.n_layers or first not in self.model.hook_dict:
            return False
        outputs: dict[int, Any] = {}
        fired: list[int] = []
        with recorded(self.model, outputs):
            whole = self.run(example)
        count: list[Hook] = [(first, lambda stream, hook: fired.append(1))]
        try:
            last = self.run(example, count, replay={layer: outputs[layer] for layer in range(self.n_layers - 1)})
        except Exception:  # a model whose blocks are more than functions of the stream fails in its own way
            return False
        return (not fired or self.n_layers == 1) and torch.equal(whole.loss, last.loss)

    def _mean_heads(self, batches: Iterable[Any]) -> dict[int, Float[Tensor, "pos _head _d_head"]]:
        sums: dict[int, Tensor] = {}
        passed: dict[int, Tensor] = {}
        count = 0

        def recorder(layer: int) -> Callable[..., None]:
            def record(z: Tensor, hook: Any) -> None:
                if z.ndim != 4:
                    raise CausalProbeError(
                        f"{attention_hook(layer, 'z')} was expected to carry [batch, pos, head, d_head] and carries {list(z.shape)}."
                    )
                exact = torch.float32 if z.device.type == "mps" else torch.float64
                passed[layer] = z.sum(0, dtype=exact)  # a hook may fire twice in a forward: the last value counts

            return record

        hooks: list[Hook] = [(attention_hook(layer, "z"), recorder(layer)) for layer in self.layers]
        for batch in batches:
            self.run(batch, hooks)
            count += len(getattr(batch, "tokens", batch))
            first = self.layers[0]
            if sums and sums[first].shape != passed[first].shape:
                raise CausalProbeError(
                    "Heads are replaced by their mean at each position: all sequences must be of one length."
                )
            sums = {layer: sums[layer] + z if sums else z for layer, z in passed.items()}
        if not sums:
            raise CausalProbeError("There are no sequences to take the heads' means over.")
        return {layer: z / count for layer, z in sums.items()}


@dataclass(eq=False)
class Experiment:
    """One batch: the model as it is, and with heads ablated. What is kept lives as long as the batch's turn.

    Parameters
    ----------
    laboratory
        The model and what is measured.
    batch
        The batch.
    donors
        Layers of heads that will be resample-ablated.
    direct
        Whether direct effects will be asked for.
    """

    laboratory: Laboratory
    batch: Any
    donors: frozenset[int] = frozenset()
    direct: bool = False
    clean: Measured = field(init=False)
    _blocks: dict[int, Any] = field(init=False, default_factory=dict)
    _outputs: dict[str, Tensor] = field(init=False, default_factory=dict)
    _heads: dict[int, Tensor] = field(init=False, default_factory=dict)

    def observe(self, hooks: Sequence[Hook] = ()) -> Measured:
        """Run the model as it is, and remember what later runs need."""
        lab = self.laboratory
        recorders: list[Hook] = [(attention_hook(layer, "z"), keep(self._heads, layer)) for layer in self.donors]
        if self.direct and lab.no_direct is None:
            recorders += [(name, keep(self._outputs, name)) for names in lab.outputs for name in names]
        with recorded(lab.model, self._blocks) if lab.replays else nullcontext():
            self.clean = lab.run(self.batch, [*recorders, *hooks])
        return self.clean

    def mean(self, heads: Iterable[Head], hooks: Sequence[Hook] = ()) -> Measured:
        """With all of these heads replaced by their means. ``hooks`` may record, above the first of them."""
        heads = sorted(heads)
        if not heads:
            return self.clean
        means = self.laboratory.means
        return self._run(
            [mean_ablate(layer, head, reference=means[layer][:, head]) for layer, head in heads], heads[0][0], hooks
        )

    def zero(self, head: Head) -> Measured:
        """With this head's output zero."""
        return self._run([zero_ablate(*head)], head[0])

    def resample(self, head: Head) -> Measured:
        """With what this head read out of another sequence, the one before it in the batch."""
        layer, index = head
        return self._run([resample_ablate(layer, index, donors=self._heads[layer].roll(1, 0)[:, :, index])], layer)

    def direct_effect(self, head: Head) -> Float[Tensor, " batch"] | None:
        """By how much the head's output raises the target's logit by itself, over its mean output.

        The head is replaced by its mean, and everything that could pass that on, its own layer's MLP and all later layers, is held
        at what it adds to the stream in the model as it is.
        """
        if self.laboratory.no_direct is not None or self.clean.logit is None:
            return None
        layer, index = head
        still = [
            *self.laboratory.outputs[layer][1:],
            *(n for names in self.laboratory.outputs[layer + 1 :] for n in names),
        ]
        edits: list[Hook] = [mean_ablate(layer, index, reference=self.laboratory.means[layer][:, index])]
        edits += [(name, lambda now, hook, name=name: self._outputs[name]) for name in still]
        logit = self._run(edits, layer).logit
        return None if logit is None else self.clean.logit - logit

    def _run(self, edits: Sequence[Hook], layer: int, hooks: Sequence[Hook] = ()) -> Measured:
        below = {number: output for number, output in self._blocks.items() if number < layer}
        return self.laboratory.run(self.batch, [*edits, *hooks], replay=below)


@contextmanager
def recorded(model: Any, outputs: dict[int, Any]) -> Iterator[None]:
    """Put what each block of the model returns into ``outputs``, by layer."""
    with ExitStack() as stack:
        for layer, block in enumerate(model.blocks):

            def record(block: nn.Module, args: Any, output: Any, layer: int = layer) -> None:
                outputs[layer] = output

            stack.callback(block.register_forward_hook(record).remove)
        yield


@contextmanager
def replayed(model: Any, outputs: Mapping[int, Any]) -> Iterator[None]:
    """Let blocks return what they returned before, without running."""
    with ExitStack() as stack:
        for layer, output in outputs.items():
            block = model.blocks[layer]
            own = vars(block).get("forward")  # some libraries wrap a module's forward in this way, too
            stack.callback(_restore, block, own)
            vars(block)["forward"] = lambda *args, output=output, **kwargs: output
        yield


def _restore(block: nn.Module, forward: Any) -> None:
    if forward is None:
        vars(block).pop("forward", None)
    else:
        vars(block)["forward"] = forward
