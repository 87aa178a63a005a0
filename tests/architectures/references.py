"""What each probe must say, computed with transformers alone: no hook point, no module of TransformerLens, no code of the package.

Every function takes a Hugging Face model with eager attention and tokens [batch, pos].
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from typing import Any

import numpy as np
import torch
from torch import Tensor

#: How the modules that an attention writes through are called.
OUTPUTS = ("o_proj", "out_proj", "dense", "c_proj", "self_attention_dense")
TEMPLATES = ("previous-token", "duplicate-token", "induction")


def attention_modules(model: Any) -> dict[int, Any]:
    """By layer that has attention, the module."""
    found: dict[int, Any] = {}
    for name, module in model.named_modules():
        last = name.rpartition(".")[2]
        if last in ("self_attn", "attn", "attention", "self_attention") and any(
            hasattr(module, each) for each in OUTPUTS
        ):
            found[int(next(part for part in name.split(".") if part.isdigit()))] = module
    return found


def output_projection(attention: Any) -> Any:
    return next(getattr(attention, name) for name in OUTPUTS if hasattr(attention, name))


def n_heads(model: Any) -> int:
    return int(getattr(model.config, "num_attention_heads", None) or model.config.n_head)


def patterns(model: Any, tokens: Tensor) -> dict[int, Tensor]:
    """By layer, the attention that the model returns."""
    with torch.no_grad():
        found = model(tokens, output_attentions=True).attentions
    return dict(zip(attention_modules(model), [each for each in found if each is not None], strict=True))


def losses(logits: Tensor, tokens: Tensor) -> Tensor:
    """The loss of the next token at each position, [batch, pos - 1]."""
    return -logits[:, :-1].log_softmax(-1).gather(-1, tokens[:, 1:, None])[..., 0]


# ------------------------------------------------------------------------------------------------------------- scan, by loops


def is_target(template: str, tokens: list[int], query: int, key: int) -> bool:
    if template == "previous-token":
        return key == query - 1
    if template == "duplicate-token":
        return key < query and tokens[key] == tokens[query]
    return 0 < key <= query and tokens[key - 1] == tokens[query]


def rows(template: str, tokens: Tensor, visible: Tensor) -> Iterator[tuple[int, int, list[int], list[int]]]:
    """Sequence, query, visible targets, visible others; rows that have both. ``visible`` is [batch, query, key]."""
    for b, sequence in enumerate(tokens.tolist()):
        for query in range(len(sequence)):
            keys = [key for key in range(query + 1) if visible[b, query, key]]
            on = [key for key in keys if is_target(template, sequence, query, key)]
            off = [key for key in keys if key not in on]
            if on and off:
                yield b, query, on, off


def template_scores(pattern: Tensor, tokens: Tensor, template: str) -> tuple[np.ndarray, float] | None:
    """One layer's scores by head, and chance: means over rows, then over sequences. None where no row is scored."""
    visible = (pattern > 0).any(1)
    score: dict[int, list[Any]] = {}
    chance: dict[int, list[float]] = {}
    for b, query, on, off in rows(template, tokens, visible):
        score.setdefault(b, []).append(pattern[b, :, query, on].double().sum(-1).numpy())
        chance.setdefault(b, []).append(len(on) / (len(on) + len(off)))
    if not score:
        return None
    means = [np.mean([np.mean(its[b], axis=0) for b in its], axis=0) for its in (score, chance)]
    return means[0], float(means[1])


def contrast(pattern: Tensor, tokens: Tensor, head: int, template: str) -> float:
    """The log of a head's attention on the edges, less its mean on the other visible keys: means over rows, then over sequences."""
    by_sequence: dict[int, list[float]] = {}
    for b, query, on, off in rows(template, tokens, (pattern > 0).any(1)):
        logs = pattern[b, head, query].double().log()
        by_sequence.setdefault(b, []).append(float(logs[on].mean() - logs[off].mean()))
    return float(np.mean([np.mean(its) for its in by_sequence.values()]))


def gain(model: Any, pattern: Tensor, tokens: Tensor, layer: int, head: int, template: str) -> float:
    """The log of a head's attention on the edges, less that of even attention, a sink's share included: means as above."""
    sinks = getattr(attention_modules(model)[layer], "sinks", None)
    nothing = 0.0 if sinks is None else float(sinks[head].detach().double().exp())
    by_sequence: dict[int, list[float]] = {}
    for b, query, on, off in rows(template, tokens, (pattern > 0).any(1)):
        start = -np.log(len(on) + len(off) + nothing)
        by_sequence.setdefault(b, []).append(float(pattern[b, head, query, on].double().log().mean()) - start)
    return float(np.mean([np.mean(its) for its in by_sequence.values()]))


# ------------------------------------------------------------------------------------------------------------------- edits


@contextmanager
def edited(*hooks: Any) -> Iterator[None]:
    with ExitStack() as stack:
        for handle in hooks:
            stack.callback(handle.remove)
        yield


def before(module: Any, edit: Callable[[Tensor], Tensor]) -> Any:
    """Change what a module is given first."""
    return module.register_forward_pre_hook(lambda module, args: (edit(args[0]), *args[1:]))


def after(module: Any, edit: Callable[[Tensor], Tensor]) -> Any:
    """Change what a module returns."""
    return module.register_forward_hook(lambda module, args, output: edit(output))


def inputs(model: Any, tokens: Tensor, modules: dict[Any, Any]) -> dict[Any, Tensor]:
    """By key, what each module is given first."""
    found: dict[Any, Tensor] = {}

    def keep(key: Any) -> Callable[[Tensor], Tensor]:
        def look(value: Tensor) -> Tensor:
            found[key] = value.detach()
            return value

        return look

    with torch.no_grad(), edited(*(before(module, keep(key)) for key, module in modules.items())):
        model(tokens)
    return found


def ablation_effect(model: Any, tokens: Tensor, layer: int, head: int) -> float:
    """Rise of the mean loss when a head's part of the output projection's input is that of the sequence before."""
    projection = output_projection(attention_modules(model)[layer])
    z = inputs(model, tokens, {0: projection})[0]
    width = z.shape[-1] // n_heads(model)
    own = slice(head * width, (head + 1) * width)

    def of_another(value: Tensor) -> Tensor:
        value = value.clone()
        value[..., own] = value[..., own].roll(1, 0)
        return value

    with torch.no_grad():
        clean = losses(model(tokens).logits, tokens).mean()
        with edited(before(projection, of_another)):
            return float(losses(model(tokens).logits, tokens).mean() - clean)


def score_gradients(model: Any, tokens: Tensor) -> dict[int, Tensor]:
    """By layer, minus the gradient of each sequence's mean loss with respect to zeros that are added to the mask, mean over sequences."""
    leaves: dict[int, Tensor] = {}

    def add(layer: int) -> Callable[..., Any]:
        def edit(module: Any, args: Any, kwargs: Any) -> Any:
            def with_leaf(value: Any) -> Any:
                if not (isinstance(value, Tensor) and value.ndim == 4 and value.shape[-2:] == (tokens.shape[1],) * 2):
                    return value
                leaves[layer] = torch.zeros(len(tokens), n_heads(model), *value.shape[-2:], requires_grad=True)
                return value + leaves[layer]

            return tuple(map(with_leaf, args)), {name: with_leaf(value) for name, value in kwargs.items()}

        return edit

    hooks = [its.register_forward_pre_hook(add(n), with_kwargs=True) for n, its in attention_modules(model).items()]
    with edited(*hooks):
        loss = losses(model(tokens).logits, tokens).mean(1).sum()
    found = torch.autograd.grad(loss, list(leaves.values()))
    return {layer: -gradient.mean(0) for layer, gradient in zip(leaves, found, strict=True)}


# --------------------------------------------------------------------------------------------- a source's part, norms held still


def frozen(norm: Any, at: Tensor) -> Callable[[Tensor], Tensor]:
    """A norm's linear part with its scale of one forward: which kind it is follows from what it makes of ``at``."""
    with torch.no_grad():
        told = norm(at)
    weight = getattr(norm, "weight", None)
    gain = torch.ones(at.shape[-1]) if weight is None else weight.detach()
    bias = getattr(norm, "bias", None)
    eps = next((float(getattr(norm, name)) for name in ("eps", "variance_epsilon") if hasattr(norm, name)), 1e-5)
    for centred in (False, True):
        for one in (0, 1):
            x = at - at.mean(-1, keepdim=True) if centred else at
            scale = torch.rsqrt(x.square().mean(-1, keepdim=True) + eps)
            if torch.allclose(x * scale * (gain + one) + (0 if bias is None else bias), told, atol=1e-4):
                return lambda y, c=centred, s=scale, g=gain + one: (y - y.mean(-1, keepdim=True) if c else y) * s * g
    raise AssertionError(f"{type(norm).__name__} is no norm that is known here")


def linear(module: Any, y: Tensor) -> Tensor:
    """A projection without its bias."""
    with torch.no_grad():
        product: Tensor = module(y) - module(torch.zeros_like(y))
    return product


def block_of(model: Any, layer: int) -> Any:
    stack = next(module for _, module in model.named_modules() if isinstance(module, torch.nn.ModuleList))
    return stack[layer]


def norm_before(block: Any) -> Any:
    """The norm that a block's attention reads through; None where there is none."""
    return next(
        (
            getattr(block, name)
            for name in ("input_layernorm", "ln_1", "attention_layernorm", "self_attn_layer_norm", "operator_norm")
            if hasattr(block, name)
        ),
        None,
    )


def norm_behind(block: Any) -> Any:
    """The norm of what a block's attention writes; None where there is none."""
    if hasattr(block, "post_self_attn_layernorm"):
        return block.post_self_attn_layernorm
    behind_both = any(hasattr(block, name) for name in ("post_feedforward_layernorm", "post_mlp_layernorm"))
    return block.post_attention_layernorm if behind_both else None


def written_by(model: Any, tokens: Tensor, layer: int, head: int) -> Tensor:
    """What a head has added to the stream, the norm behind its layer's attention held still."""
    block, projection = block_of(model, layer), output_projection(attention_modules(model)[layer])
    behind = norm_behind(block)
    seen = inputs(model, tokens, {"z": projection} | ({} if behind is None else {"whole": behind}))
    z = seen["z"]
    width = z.shape[-1] // n_heads(model)
    own = torch.zeros_like(z)
    own[..., head * width : (head + 1) * width] = z[..., head * width : (head + 1) * width]
    written = linear(projection, own)
    if behind is not None:
        written = frozen(behind, seen["whole"])(written)
    return written * float(getattr(model.config, "residual_multiplier", 1.0))


Edits = list[tuple[Any, slice, Tensor]]


def parts(model: Any, tokens: Tensor, layer: int, head: int, side: str, written: Tensor) -> Edits:
    """Where something written into the stream meets a head's queries or keys before the rotation: module, columns, its part of them."""
    attention, block = attention_modules(model)[layer], block_of(model, layer)
    pre = norm_before(block)
    if pre is not None:
        written = frozen(pre, inputs(model, tokens, {0: pre})[0])(written)
    heads = n_heads(model)
    if hasattr(attention, "kv_a_proj_with_mqa"):
        return _latent_parts(model, tokens, attention, head, side, written)
    joint = next(
        (getattr(attention, name) for name in ("qkv_proj", "query_key_value", "c_attn") if hasattr(attention, name)),
        None,
    )
    if joint is not None:
        part = linear(joint, written)
        d_head = written.shape[-1] // heads
        if hasattr(attention, "qkv_proj"):
            groups = (part.shape[-1] // d_head - heads) // 2
            start = head * d_head if side == "query" else (heads + head * groups // heads) * d_head
        elif hasattr(attention, "c_attn"):
            start = head * d_head + (0 if side == "query" else heads * d_head)
        elif part.shape[-1] == (heads + 2) * d_head:  # one key for all heads, behind the queries
            start = (head if side == "query" else heads) * d_head
        else:  # head by head: query, key, value
            start = (3 * head + (side == "key")) * d_head
        columns = slice(start, start + d_head)
        return [(joint, columns, part[..., columns])]
    projection = attention.q_proj if side == "query" else attention.k_proj
    names = (
        ("q_norm", "q_layernorm", "query_layernorm") if side == "query" else ("k_norm", "k_layernorm", "key_layernorm")
    )
    norm = next((getattr(attention, name) for name in names if getattr(attention, name, None) is not None), None)
    part = linear(projection, written)
    d_head = int(attention.head_dim)
    if norm is not None and hasattr(norm, "norms"):  # one norm for each head
        at = head * len(norm.norms) // heads
        own = norm.norms[at]
        through = frozen(own, inputs(model, tokens, {0: own})[0].reshape(*part.shape[:2], d_head))
        return [(own, slice(0, d_head), through(part[..., at * d_head : (at + 1) * d_head]))]
    if hasattr(
        attention, "qk_norm"
    ):  # one without weights for both, behind the rotation: its scales, by the number of heads
        x = inputs(model, tokens, {0: projection})[0]
        with torch.no_grad():
            raw = [each(x).unflatten(-1, (-1, d_head)) for each in (attention.q_proj, attention.k_proj)]
        scales = {
            each.shape[2]: torch.rsqrt(each.square().mean(-1, keepdim=True) + attention.qk_norm.eps) for each in raw
        }
        assert len(scales) == 2
        by_head = part.unflatten(-1, (-1, d_head))
        at = head * by_head.shape[2] // heads
        columns = slice(at * d_head, (at + 1) * d_head)
        scale = scales[by_head.shape[2]][:, :, at]
        return [
            (projection, columns, (by_head[:, :, at], scale)),  # type: ignore[list-item]
            (attention.qk_norm, None, lambda value: value * scales[value.shape[2]]),  # type: ignore[list-item]
        ]
    if norm is None:
        at = head if side == "query" else head * (part.shape[-1] // d_head) // heads
        columns = slice(at * d_head, (at + 1) * d_head)
        return [(projection, columns, part[..., columns])]
    full = inputs(model, tokens, {0: norm})[0]
    if full.ndim == 3:  # over the whole width
        through = frozen(norm, full)(part)
        at = head if side == "query" else head * (part.shape[-1] // d_head) // heads
        columns = slice(at * d_head, (at + 1) * d_head)
        return [(norm, columns, through[..., columns])]
    if side == "query" and part.shape[-1] == 2 * heads * d_head:  # beside its gate
        part = part.unflatten(-1, (heads, -1))[..., :d_head].flatten(-2)
    by_head = part.unflatten(-1, (-1, d_head))  # [batch, pos, head, d_head]
    turned_first = type(attention).__name__.startswith("NanoChat")
    if turned_first or names.index(next(name for name in names if hasattr(attention, name))) == 2:
        # behind the rotation, which keeps lengths
        at = head * by_head.shape[2] // heads
        eps = norm.eps if turned_first else norm.variance_epsilon
        scale = torch.rsqrt(full[:, at].square().mean(-1, keepdim=True) + eps)
        columns = slice(at * d_head, (at + 1) * d_head)
        held = frozen(norm, full)  # its scale is that of the clean forward
        return [(projection, columns, (by_head[:, :, at], scale)), (norm, None, held)]  # type: ignore[list-item]
    first = full.shape[1] == tokens.shape[1]  # some norms are given the positions first
    full = full if first else full.transpose(1, 2)
    at = head * by_head.shape[2] // heads
    through = frozen(norm, full)(by_head)[:, :, at]
    return [(norm, (slice(None), slice(None), at) if first else (slice(None), at), through)]  # type: ignore[list-item]


def _latent_parts(model: Any, tokens: Tensor, attention: Any, head: int, side: str, written: Tensor) -> Edits:
    nope, rotated = attention.qk_nope_head_dim, attention.qk_rope_head_dim
    if side == "query":
        norm = attention.q_a_layernorm
        latent = frozen(norm, inputs(model, tokens, {0: norm})[0])(linear(attention.q_a_proj, written))
        part = linear(attention.q_b_proj, latent)
        columns = slice(head * (nope + rotated), (head + 1) * (nope + rotated))
        return [(attention.q_b_proj, columns, part[..., columns])]
    down = linear(attention.kv_a_proj_with_mqa, written)
    norm = attention.kv_a_layernorm
    latent = frozen(norm, inputs(model, tokens, {0: norm})[0])(down[..., :-rotated])
    start = head * (nope + attention.v_head_dim)
    columns = slice(start, start + nope)
    up = linear(attention.kv_b_proj, latent)[..., columns]
    shared = slice(down.shape[-1] - rotated, down.shape[-1])
    return [(attention.kv_b_proj, columns, up), (attention.kv_a_proj_with_mqa, shared, down[..., shared])]


def drop(
    model: Any, tokens: Tensor, source: tuple[int, int], target: tuple[int, int], side: str, template: str
) -> float:
    """Fall of the target's attention on the edges when the source's part of one side is its mean over sequences and positions."""

    def put(where: Any, part: Any) -> Callable[[Tensor], Tensor]:
        """The mean in a part's place; the mean is that of the part times its norm's scale, where that is given."""
        part, scale = part if isinstance(part, tuple) else (part, torch.ones(1))
        change = (part * scale).mean((0, 1)) / scale - part

        def edit(value: Tensor) -> Tensor:
            value = value.clone()
            at = where if isinstance(where, tuple) else (..., where)
            value[at] += change.reshape(value[at].shape)
            return value

        return edit

    written = written_by(model, tokens, *source)
    edits = parts(model, tokens, *target, side, written)
    clean = patterns(model, tokens)[target[0]]
    hooks = [
        module.register_forward_hook(lambda module, args, output, held=part: held(args[0]))
        if where is None
        else after(module, put(where, part))
        for module, where, part in edits
    ]
    with edited(*hooks):
        changed = patterns(model, tokens)[target[0]]
    by_sequence: dict[int, list[float]] = {}
    for b, query, on, _ in rows(template, tokens, (clean > 0).any(1)):
        by_sequence.setdefault(b, []).append(float((clean - changed)[b, target[1], query, on].double().sum()))
    return float(np.mean([np.mean(its) for its in by_sequence.values()]))


# ---------------------------------------------------------------------------------------------------------------- weights


def gain_of(norm: Any, width: int) -> Callable[[Tensor], Tensor]:
    """A norm's linear part, its scale left out."""
    if norm is None:
        return lambda y: y
    at = torch.randn(1, width, generator=torch.Generator().manual_seed(0))
    through = frozen(norm, at)
    scale = (
        (at - at.mean(-1, keepdim=True)).square().mean().sqrt()
        if isinstance(norm, torch.nn.LayerNorm)
        else at.square().mean().sqrt()
    )
    return lambda y: through(y) * scale


def copying(model: Any, layer: int, head: int) -> float:
    """Sum over moduli of the eigenvalues of the whole [d_vocab, d_vocab] matrix from a token through the head to the logits."""
    attention, block = attention_modules(model)[layer], block_of(model, layer)
    embedding = model.get_input_embeddings().weight.detach()
    width, heads = embedding.shape[1], n_heads(model)
    x = gain_of(norm_before(block), width)(embedding)
    projection = output_projection(attention)
    d_head = linear_width(projection) // heads
    if hasattr(attention, "kv_a_proj_with_mqa"):
        latent = linear(attention.kv_a_proj_with_mqa, x)[..., : -attention.qk_rope_head_dim]
        up = linear(attention.kv_b_proj, latent * attention.kv_a_layernorm.weight.detach()).unflatten(-1, (heads, -1))
        values = up[:, head, attention.qk_nope_head_dim :]
    elif hasattr(attention, "v_proj"):
        each = linear(attention.v_proj, x).unflatten(-1, (-1, d_head))
        values = each[:, head * each.shape[1] // heads]
    elif hasattr(attention, "query_key_value"):
        each = linear(attention.query_key_value, x).unflatten(-1, (-1, d_head))
        values = each[:, -1] if each.shape[1] == heads + 2 else each[:, 3 * head + 2]
    else:
        joint = attention.qkv_proj if hasattr(attention, "qkv_proj") else attention.c_attn
        each = linear(joint, x).unflatten(-1, (-1, d_head))
        groups = (each.shape[1] - heads) // 2
        values = each[:, heads + groups + head * groups // heads]
    own = torch.zeros(len(values), heads * d_head)
    own[:, head * d_head : (head + 1) * d_head] = values
    written = gain_of(norm_behind(block), width)(linear(projection, own))
    finals = ("norm", "norm_f", "ln_f", "final_layer_norm", "final_layernorm", "embedding_norm", "layer_norm")
    final = model.get_submodule(
        min((name for name, _ in model.named_modules() if name.rpartition(".")[2] in finals), key=len)
    )
    logits = gain_of(final, width)(written) @ model.get_output_embeddings().weight.detach().T
    eigenvalues = torch.linalg.eigvals(
        (logits - logits.mean(-1, keepdim=True)).double()
    )  # a shift of all logits means nothing
    return float(eigenvalues.sum().real / eigenvalues.abs().sum())


def linear_width(projection: Any) -> int:
    weight = projection.weight
    return int(weight.shape[0] if type(projection).__name__ == "Conv1D" else weight.shape[1])
