"""Parts of a forward pass: a layer whose stream is given, up to its queries, keys and values, or on to the logits.

What a model does in its layers is left to the model: layers before the one asked for pass on what they get, and the stream is put in at
``hook_resid_pre``. Rows of several interventions are stacked along the batch.
"""

from __future__ import annotations

import contextlib
import inspect
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from jaxtyping import Float, Int
from torch import Tensor

from causal_probe.errors import CausalProbeError
from causal_probe.hooks import attention_hook
from causal_probe.hooks.check import HookedModel, keep, logits_of, require_hooks
from causal_probe.hooks.record import stop_at_layer
from causal_probe.hooks.skip import Skips
from causal_probe.probes.circuit_weights import circuit_weights, norms_of_attention
from causal_probe.probes.qk_sides import Side, sides
from causal_probe.probes.qk_stream import StreamParts, StreamReader, head_of

__all__ = ["SIDES", "Clean", "Layers"]

#: Queries, keys and values of a layer, by "q", "k", "v": [row, pos, head or group, d].
Side3 = dict[str, Tensor]
#: What is put in at hook points.
Puts = Mapping[str, Callable[[Tensor], Tensor]]
SIDES = ("q", "k", "v")


@dataclass(frozen=True, eq=False)
class Clean:
    """One unedited forward pass.

    Attributes
    ----------
    tokens
        [row, pos].
    streams
        Before each layer, and behind the last.
    parts
        What each source has written.
    sides
        By layer with attention, its queries, keys and values.
    logits
        [row, pos, vocabulary].
    """

    tokens: Int[Tensor, "row pos"]
    streams: list[Float[Tensor, "row pos d_model"]]
    parts: StreamParts
    sides: Mapping[int, Side3]
    z: Mapping[int, Tensor]
    logits: Float[Tensor, "row pos d_out"]


class Layers:
    """A model, ready to be run in parts.

    Attributes
    ----------
    heads
        By layer, the number of its heads; 0 where there is no attention.
    groups
        By layer, "q", "k" and "v" and the number of heads or groups that carry them.
    sources
        In the order in which they write.
    attends
        By layer with attention, the sides that can be put in.
    in_turn
        By layer, whether its MLP reads what its attention has written.
    mlps
        By layer, whether it has an MLP whose input can be edited alone.
    """

    def __init__(self, model: HookedModel, tokens: Int[Tensor, "row pos"]) -> None:
        if getattr(model.cfg, "attention_dir", "causal") != "causal":
            raise CausalProbeError("Attention is bidirectional; circuits are found in causal language models.")
        if hasattr(model, "named_blocks"):
            raise CausalProbeError(
                "This model's stream is a concatenation of named parts; give model.to_transformer_lens(), whose parts add to one stream."
            )
        self.model: Any = model
        self._points = frozenset(model.hook_dict)  # a bridge makes its dictionary anew each time
        with circuit_weights(model) as (standard, weights):
            self.heads = [len(W_O) for W_O in weights.W_O]
            self.W_O = [W_O.detach() for W_O in weights.W_O]
            behind = [norms_of_attention(block)[1] for block in standard.blocks]
            gains = [weights.gain(standard, block, name) for block, name in zip(standard.blocks, behind, strict=True)]
        self.n = len(self.heads)
        self.reader = StreamReader(model, self.n, self.heads, gains)
        self.sources = self.reader.names
        self.last = self.reader.streams[-1]
        self.carriers: dict[int, dict[str, Side | None]] = {}
        for layer, count in enumerate(self.heads):
            if count:
                q, k = sides(model, layer, count)
                self.carriers[layer] = {"q": q, "k": k, "v": None}
        require_hooks(
            model, [*self.reader.streams, *(self.point(layer, side) for layer in self.carriers for side in SIDES)]
        )
        self._passes, self._skips = Skips(model), False
        self._learn(tokens[:2])

    @property
    def shape(self) -> dict[str, Any]:
        """By layer: the number of heads, of groups that carry queries, keys and values, and whether the MLP reads what the attention writes."""
        groups = [[self.groups.get(layer, {}).get(side, 0) for side in SIDES] for layer in range(self.n)]
        return {"heads": self.heads, "groups": groups, "in_turn": self.in_turn, "d_model": self.W_O[0].shape[-1]}

    # ------------------------------------------------------------------------------------------------------------ names

    def point(self, layer: int, side: str) -> str:
        """The hook point that carries a layer's queries, keys or values."""
        carrier = self.carriers[layer][side]
        return attention_hook(layer, "v") if carrier is None else carrier.carried[0]

    # ---------------------------------------------------------------------------------------------------------- running

    def _from(self, start: int) -> contextlib.AbstractContextManager[None]:
        """Layers before ``start`` pass on what they get, where that can be."""
        return self._passes.before(start if self._skips else 0)

    def run(
        self,
        tokens: Int[Tensor, "row pos"],
        *,
        start: int = 0,
        stream: Tensor | None = None,
        puts: Puts | None = None,
        names: Sequence[str] = (),
        stop: str | None = None,
        until: int | None = None,
    ) -> tuple[dict[str, Tensor], Tensor | None]:
        """The values at hook points, and the logits.

        Parameters
        ----------
        start, stream
            The stream before layer ``start`` is given, and layers before it are passed over; None: all are run.
        puts
            By hook point, what its value is replaced by.
        names
            What is to be kept.
        stop
            The hook point at which the run ends, behind what is kept there; then there are no logits.
        until
            The number of layers that are run; None for all, and the logits.
        """
        found: dict[str, Tensor] = {}
        hooks: list[tuple[str, Callable[..., Any]]] = []
        if stream is not None:
            hooks.append((f"blocks.{start}.hook_resid_pre", lambda value, hook: stream.to(value)))
        hooks += [(name, lambda value, hook, put=put: put(value)) for name, put in (puts or {}).items()]
        hooks += [(name, keep(found, name)) for name in names if name in self._points]
        logits = None

        halted = stop_at_layer()

        def halt(value: Tensor, hook: Any) -> None:
            raise halted(value)

        end = stop if stop is not None else None if until is None else self.reader.streams[until]
        if end is not None:
            hooks.append((end, halt))
        with self._from(start if stream is not None else 0), self.model.hooks(fwd_hooks=hooks):
            if end is None:
                logits = logits_of(self.model(tokens), tokens, d_out=getattr(self.model.cfg, "d_vocab_out", None))
            else:
                with contextlib.suppress(halted):
                    more = {"stop_at_layer": self.n} if _can_stop(self.model) else {}
                    self.model(tokens, **more)
        return found, logits

    def clean(self, tokens: Int[Tensor, "row pos"]) -> Clean:
        """An unedited forward pass, with all that the others need of it."""
        points = {(layer, side): self.point(layer, side) for layer in self.carriers for side in SIDES}
        found, logits = self.run(tokens, names=[*self.reader.hooks, *points.values()])
        if silent := [name for name in (*self.reader.needed, *points.values()) if name not in found]:
            raise CausalProbeError(
                f"{silent[0]} does not fire, so the model can't be taken apart. Load it with eager attention."
            )
        assert logits is not None
        both: dict[int, Side3] = {layer: {} for layer in self.carriers}
        for (layer, side), name in points.items():
            both[layer][side] = found[name]
        parts = self.reader(found)
        z = {layer: found[attention_hook(layer, "z")] for layer in self.carriers}
        return Clean(tokens, [found[name] for name in self.reader.streams], parts, both, z, logits)

    def part(self, parts: StreamParts, source: str) -> Float[Tensor, "row pos d_model"]:
        """What a source has written."""
        place = head_of(source)
        return parts.by(source, None if place is None else self.W_O[place[0]][place[1]])

    def sides_of(self, tokens: Int[Tensor, "row pos"], layer: int, stream: Float[Tensor, "row pos d_model"]) -> Side3:
        """A layer's queries, keys and values of a given stream."""
        points = {side: self.point(layer, side) for side in SIDES}
        found, _ = self.run(
            tokens, start=layer, stream=stream, names=list(points.values()), stop=attention_hook(layer, "z")
        )
        return {side: found[name] for side, name in points.items()}

    def behind_mlp(
        self,
        tokens: Int[Tensor, "row pos"],
        layer: int,
        stream: Float[Tensor, "row pos d_model"],
        z: Tensor | None,
        puts: Puts | None = None,
    ) -> Float[Tensor, "row pos d_model"]:
        """The stream behind a layer of a given stream, whose attention gives what ``z`` gives whatever the stream."""
        put = {} if z is None else {attention_hook(layer, "z"): lambda value: z.to(value)}
        name = self.reader.streams[layer + 1]
        found, _ = self.run(
            tokens, start=layer, stream=stream, puts={**put, **(puts or {})}, names=[name], until=layer + 1
        )
        return found[name]

    def to_logits(
        self,
        tokens: Int[Tensor, "row pos"],
        layer: int,
        stream: Float[Tensor, "row pos d_model"],
        puts: Puts | None = None,
    ) -> Float[Tensor, "row pos d_out"]:
        """The logits of a given stream before a layer; before the one behind the last, only the unembedding is run."""
        if layer < self.n:
            _, logits = self.run(tokens, start=layer, stream=stream, puts=puts)
        else:
            with self._from(self.n - 1):  # the last layer is run, as its output is where the stream is put in
                _, logits = self.run(tokens, puts={self.last: lambda value: stream.to(value)})
        assert logits is not None
        return logits

    def put(self, layer: int, sides: Sequence[tuple[str, int, Tensor, slice]]) -> dict[str, Callable[[Tensor], Tensor]]:
        """Edits that put heads' (or groups') queries, keys or values in the place of the model's own.

        Parameters
        ----------
        sides
            Of each ``"q"``, ``"k"`` or ``"v"``; the number of the head or group; values as :meth:`sides_of` gives them; and the rows where they are put.
        """

        def edit(side: str) -> Callable[[Tensor], Tensor]:
            count = self.groups[layer][side]
            its = [(number, new, rows) for which, number, new, rows in sides if which == side]

            def changed(value: Tensor) -> Tensor:
                value = value.clone()
                whole = _by_head(value, count)
                step = whole.shape[2] // count  # of queries and gates, head by head, the query comes first
                for number, new, rows in its:
                    at = number * step
                    given = _by_head(new, count)[:, :, at]
                    whole[rows, :, at] = (given if len(given) != len(whole) else given[rows]).to(whole)
                return value

            return changed

        return {self.point(layer, side): edit(side) for side in SIDES if any(which == side for which, *_ in sides)}

    def only(self, layer: int, side: str, number: int, value: Tensor) -> Tensor:
        """One head's or group's share of a layer's queries, keys or values; zero elsewhere."""
        count, kept = self.groups[layer][side], torch.zeros_like(value)
        whole, given = _by_head(kept, count), _by_head(value, count)
        at = number * (whole.shape[2] // count)
        whole[:, :, at] = given[:, :, at]
        return kept

    def of_layer(self, layer: int) -> list[str]:
        """The hook points of which :meth:`StreamReader.add_layer` needs the values."""
        own = f"blocks.{layer}."
        return [*(name for name in self.reader.hooks if name.startswith(own)), self.reader.streams[layer + 1]]

    # ---------------------------------------------------------------------------------------------------------- learning

    def _learn(self, tokens: Int[Tensor, "row pos"]) -> None:
        """Whether layers can be passed over, how many groups carry each side, and that edits reach what they are to reach."""
        with self._passes.learning():
            clean = self.clean(tokens)
        self.groups: dict[int, dict[str, int]] = {layer: {} for layer in self.carriers}
        for layer, values in clean.sides.items():
            width = clean.sides[layer]["q"].shape[-1] if values["q"].ndim == 4 else clean.parts.z[layer].shape[-1]
            for side, value in values.items():
                own = value.shape[2] if value.ndim == 4 else max(1, value.shape[2] // width)
                self.groups[layer][side] = self.heads[layer] if side == "q" else min(int(own), self.heads[layer])
        like = max(float(clean.logits.abs().max()), 1e-6)
        limit = 1e-4 * like if clean.logits.dtype in (torch.float32, torch.float64) else 0.05 * like
        if self.n > 1:
            self._skips = True
            try:
                again = self.to_logits(tokens, self.n - 1, clean.streams[self.n - 1])
                self._skips = bool(((again - clean.logits).abs().max() <= limit).item())
            except Exception:  # a model of another build: its layers are run, as slow as that is
                self._skips = False
        for layer in range(self.n):
            again = (
                self.to_logits(tokens, layer, clean.streams[layer])
                if layer in (0, self.n // 2, self.n - 1)
                else clean.logits
            )
            if not bool((again - clean.logits).abs().max() <= limit):
                raise CausalProbeError(
                    f"The stream put in before layer {layer} doesn't give the model's own logits, so parts of its forward pass can't be run alone."
                )
        self.attends = {layer: self._reaches(clean, layer) for layer in self.carriers}
        self.in_turn = [self._in_turn(clean, layer) for layer in range(self.n)]
        self.mlps = [self._pinned(clean, layer) for layer in range(self.n)]

    def _reaches(self, clean: Clean, layer: int) -> tuple[str, ...]:
        """Which of a layer's sides can be put in: with those of another stream, its heads give what they give on that stream."""
        generator = torch.Generator().manual_seed(layer)
        stream = clean.streams[layer]
        noise = torch.randn(stream.shape, generator=generator).to(stream) * stream.std()
        other, z_name = stream + noise, attention_hook(layer, "z")
        points = {side: self.point(layer, side) for side in SIDES}
        found, _ = self.run(clean.tokens, start=layer, stream=other, names=[*points.values(), z_name], stop=z_name)
        puts = {name: (lambda value, name=name: found[name].to(value)) for name in points.values()}
        again, _ = self.run(clean.tokens, start=layer, stream=stream, puts=puts, names=[z_name], stop=z_name)
        scale = float(found[z_name].abs().max())
        if float((again[z_name] - found[z_name]).abs().max()) <= 1e-3 * scale:
            return SIDES
        put = {points["v"]: puts[points["v"]]}
        again, _ = self.run(clean.tokens, start=layer, stream=stream, puts=put, names=[z_name], stop=z_name)
        own, _ = self.run(
            clean.tokens, start=layer, stream=stream, names=[attention_hook(layer, "pattern")], stop=z_name
        )
        pattern = own.get(attention_hook(layer, "pattern"))
        if pattern is None:
            return ()
        count = self.groups[layer]["v"]
        v = _by_head(found[points["v"]], count)
        if (
            v.shape[2] != count or self.heads[layer] % count
        ):  # latent attention (MLA): keys and values share what carries them
            return ()
        v = v.repeat_interleave(self.heads[layer] // count, 2)
        z = torch.einsum("bhqk,bkhd->bqhd", pattern.to(v), v)
        same = float((z.reshape(again[z_name].shape) - again[z_name]).abs().max()) <= 1e-3 * scale
        return ("v",) if same else ()

    def _in_turn(self, clean: Clean, layer: int) -> bool:
        """Whether a layer's MLP reads what its attention writes, or stands beside it."""
        if not self.reader.has_mlps or layer not in self.carriers:
            return self.reader.has_mlps

        def noisy(value: Tensor) -> Tensor:
            noise = torch.randn(value.shape, generator=torch.Generator().manual_seed(layer))
            return value + noise.to(value) * (value.std() + 1)

        def run(*noised: str) -> dict[str, Tensor]:
            puts = {name: noisy for name in noised if name in self._points}
            names = [*self.of_layer(layer), *inputs]
            return self.run(
                clean.tokens, start=layer, stream=clean.streams[layer], puts=puts, names=names, until=layer + 1
            )[0]

        # An own model shows the MLP's input; a bridge the stream between attention and MLP, where the block has one.
        inputs = [f"blocks.{layer}.hook_mlp_in"] if getattr(self.model.cfg, "use_hook_mlp_in", True) else []
        inputs.append(f"blocks.{layer}.hook_resid_mid")
        own, other = run(), run(attention_hook(layer, "z"), f"blocks.{layer}.hook_attn_out")
        if any(bool((own[at] != other[at]).any()) for at in inputs if at in own and at in other):
            return True
        other = run(attention_hook(layer, "z"))
        written = []  # by an MLP whose input passes no hook point
        for found in (own, other):
            parts = StreamParts({}, {}, {})
            self.reader.add_layer(layer, {**found, self.reader.streams[layer]: clean.streams[layer]}, parts)
            written.append(parts.written[f"L{layer}.mlp"])
        return float((written[1] - written[0]).abs().max()) > 1e-4 * float(written[0].abs().max())

    def _pinned(self, clean: Clean, layer: int) -> bool:
        """Whether a layer's MLP can be given another input alone: its attention gives what its z gives, whatever the stream, and nothing else mixes positions there."""
        if not self.reader.has_mlps or layer not in self.carriers or layer in self.reader.beside:
            return False
        stream, z, out = clean.streams[layer], clean.z[layer], f"blocks.{layer}.hook_attn_out"

        def run(stream: Tensor, z: Tensor) -> tuple[Tensor, Tensor | None]:
            name = self.reader.streams[layer + 1]
            puts = {attention_hook(layer, "z"): lambda value: z.to(value)}
            found, _ = self.run(clean.tokens, start=layer, stream=stream, puts=puts, names=[name, out], until=layer + 1)
            return found[name], found.get(out)

        behind, own = run(stream, z)
        moved, _ = run(stream, 1.5 * z + z.std())
        _, other = run(1.5 * stream + stream.std(), z)
        writes = any(bool(self.part(clean.parts, f"L{layer}H{head}").any()) for head in range(self.heads[layer]))
        if writes and torch.equal(behind, moved):
            return False
        return own is None or other is None or float((own - other).abs().max()) <= 1e-3 * float(own.abs().max())


def _by_head(value: Tensor, count: int) -> Tensor:
    return value if value.ndim == 4 else value.view(*value.shape[:2], count, -1)


def _can_stop(model: Any) -> bool:
    return "stop_at_layer" in inspect.signature(getattr(model, "forward", model)).parameters
