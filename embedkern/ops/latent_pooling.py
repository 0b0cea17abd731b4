"""latent_attention and multi_layer_attention: checks, the choice of a backend, gradients."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from .. import dispatch
from ..backends.latent_pooling import LATENT
from ..backends.multi_layer_pooling import MULTI_LAYER
from ..dispatch import Backend
from ..reference import latent_pooling as reference
from ..schema import NARROW
from . import common, pooling

BACKENDS = (*LATENT, Backend("reference"))
MULTI_LAYER_BACKENDS = (*MULTI_LAYER, Backend("reference"))
WEIGHTS = len(reference.Block._fields)


def latent_attention(
    hidden: Tensor,
    latents: Tensor,
    to_q: Tensor,
    to_kv: Tensor,
    to_out: Tensor,
    norm_weight: Tensor,
    norm_bias: Tensor,
    context_weight: Tensor,
    context_bias: Tensor,
    ff_norm_weight: Tensor,
    ff_norm_bias: Tensor,
    ff_in_weight: Tensor,
    ff_in_bias: Tensor,
    ff_out_weight: Tensor,
    ff_out_bias: Tensor,
    num_heads: int,
    *,
    lengths: Tensor | None = None,
    mask: Tensor | None = None,
    cu_seqlens: Tensor | None = None,
    skip: int | Tensor | None = None,
    normalize: bool = True,
    eps: float = 1e-12,
    backend: str | None = None,
) -> Tensor:
    """NV-Embed's pooling (Lee et al. 2024): tokens attend to trainable latents, feed-forward, mean, L2.

    With LN a layer norm (eps 1e-5), of each token x: y = x + attention(LN(x), LN(latents), LN(latents)), then
    z = y + feed-forward(LN(y)), a GEGLU with the erf GELU; the mean of each sequence's z; normalised.

    Args:
        hidden: (B, L, C), or (T, C) packed with `cu_seqlens`.
        latents: (N, C), keys and values after their norm and `to_kv`.
        to_q, to_kv, to_out: (H · D, C), (2 · H · D, C) with the keys' rows first, (C, H · D).
        norm_weight, norm_bias: (C,), of the tokens' norm; `context_…` of the latents', `ff_norm_…` the feed-forward's.
        ff_in_weight, ff_in_bias: (2 · F, C) and (2 · F,), the values' rows, then the gates'.
        ff_out_weight, ff_out_bias: (C, F), (C,).
        num_heads: H.
        lengths, mask, cu_seqlens, skip: as `pool`'s.
        normalize: divide by max(‖x‖₂, eps).

    Weights may have another float dtype than hidden. On a CPU low precision is computed in float32; on a GPU products
    are in hidden's dtype, or autocast's, and add up in float32.

    Returns:
        (B, C) in hidden's dtype. Nothing to pool gives zeros. Padding and what is skipped is neither read nor computed.

    Raises:
        ValueError, TypeError: an argument has a wrong rank, size, dtype, device or value.
        NotImplementedError: the backend asked for can't run this call; second derivatives (use "reference").
    """
    weights = reference.Block(
        latents, to_q, to_kv, to_out, norm_weight, norm_bias, context_weight, context_bias, ff_norm_weight,
        ff_norm_bias, ff_in_weight, ff_in_bias, ff_out_weight, ff_out_bias
    )  # fmt: skip
    call = check(hidden, num_heads, lengths, mask, cu_seqlens, skip, normalize, eps, **weights._asdict())
    chosen = dispatch.select("latent_attention", BACKENDS, backend, call)
    if chosen.forward is None:
        return reference.latent_attention(**call)
    call["hidden"] = _autocast(hidden)
    return LatentAttentionFunction.apply(*_untracked(common.distinct(call.values())), chosen).to(hidden.dtype)


def multi_layer_attention(
    layers: Tensor,
    layer_embedding: Tensor,
    latents: Tensor,
    to_q: Tensor,
    to_kv: Tensor,
    to_out: Tensor,
    norm_weight: Tensor,
    norm_bias: Tensor,
    context_weight: Tensor,
    context_bias: Tensor,
    ff_norm_weight: Tensor,
    ff_norm_bias: Tensor,
    ff_in_weight: Tensor,
    ff_in_bias: Tensor,
    ff_out_weight: Tensor,
    ff_out_bias: Tensor,
    num_heads: int,
    *,
    empty: Tensor | None = None,
    normalize: bool = True,
    eps: float = 1e-12,
    backend: str | None = None,
) -> Tensor:
    """Multi-layer trainable pooling (Tang & Yang 2024): latents attend to a sequence's layers, feed-forward, mean, L2.

    Of each latent l: y = l + attention(LN(l), LN(x), LN(x)) over x = layers + layer_embedding, then
    z = y + feed-forward(LN(y)); the mean over the latents; normalised.

    Args:
        layers: (B, layers, C), each layer's tokens pooled.
        layer_embedding: (layers, C).
        latents: (N, C), queries after their norm, whose weights are `context_…`, and `to_q`.
        norm_weight, norm_bias: (C,), of the layers' norm, before `to_kv`.
        empty: (B,) bool, sequences whose result is zero, and whose layers are not read.
        Everything else as in `latent_attention`.

    Returns:
        (B, C) in layers' dtype.
    """
    weights = reference.Block(
        latents, to_q, to_kv, to_out, norm_weight, norm_bias, context_weight, context_bias, ff_norm_weight,
        ff_norm_bias, ff_in_weight, ff_in_bias, ff_out_weight, ff_out_bias
    )  # fmt: skip
    call = check_multi_layer(layers, layer_embedding, num_heads, empty, normalize, eps, **weights._asdict())
    chosen = dispatch.select("multi_layer_attention", MULTI_LAYER_BACKENDS, backend, call)
    if chosen.forward is None:
        return reference.multi_layer_attention(**call)
    call["layers"] = _autocast(layers)
    return MultiLayerAttentionFunction.apply(*_untracked(common.distinct(call.values())), chosen).to(layers.dtype)


def check(
    hidden: Tensor,
    num_heads: int,
    lengths: Tensor | None,
    mask: Tensor | None,
    cu_seqlens: Tensor | None,
    skip: int | Tensor | None,
    normalize: bool,
    eps: float,
    **weights: Tensor,
) -> dict[str, Any]:
    """The reference's arguments, or an error that names what is wrong."""
    pooled = pooling.check(hidden, "mean", lengths, mask, cu_seqlens, skip, None, None, normalize, eps)
    call = {"hidden": hidden, **_check_block(weights, num_heads, hidden, "hidden"), "num_heads": num_heads}
    return call | {name: pooled[name] for name in ("lengths", "mask", "cu_seqlens", "skip", "normalize", "eps")}


def check_multi_layer(
    layers: Tensor,
    layer_embedding: Tensor,
    num_heads: int,
    empty: Tensor | None,
    normalize: bool,
    eps: float,
    **weights: Tensor,
) -> dict[str, Any]:
    """The reference's arguments, or an error that names what is wrong."""
    common.check_tensor("layers", layers, 3, "(B, layers, C)")
    common.check_float("layers", layers)
    if layers.shape[1] < 1:
        raise ValueError(f"layers must hold at least one layer, got {tuple(layers.shape)}")
    _check_weight("layer_embedding", layer_embedding, layers.shape[1:], layers, "layers")
    if empty is not None:
        common.check_tensor("empty", empty, 1, "(B,)")
        if empty.dtype != torch.bool:
            raise TypeError(f"empty must be bool, got {empty.dtype}")
        common.check_shape("empty", empty, layers.shape[:1])
        common.check_device("empty", empty, layers, "layers")
    common.check_flag("normalize", normalize)
    common.check_number("eps", eps)
    if not eps >= 0:
        raise ValueError(f"eps must be ≥ 0, got {eps}")
    block = _check_block(weights, num_heads, layers, "layers")
    call = {"layers": layers, "layer_embedding": layer_embedding, **block, "num_heads": num_heads}
    return call | {"empty": empty, "normalize": normalize, "eps": eps}


def _check_block(named: dict[str, Tensor], num_heads: int, like: Tensor, like_name: str) -> dict[str, Tensor]:
    width = like.shape[-1]
    for name, what in (("latents", "(N, C)"), ("to_q", "(H · D, C)"), ("ff_out_weight", "(C, F)")):
        common.check_tensor(name, named[name], 2, what)
    rows, inner = named["to_q"].shape[0], named["ff_out_weight"].shape[1]
    if named["latents"].shape[0] < 1:
        raise ValueError(f"latents must hold at least one latent, got {tuple(named['latents'].shape)}")
    if num_heads < 1 or rows < 1 or rows % num_heads != 0:
        raise ValueError(f"num_heads must divide to_q's {rows} rows, got {num_heads}")
    shapes = {
        "latents": (named["latents"].shape[0], width),
        "to_q": (rows, width),
        "to_kv": (2 * rows, width),
        "to_out": (width, rows),
        "ff_in_weight": (2 * inner, width),
        "ff_in_bias": (2 * inner,),
        "ff_out_weight": (width, inner),
    }
    for name, x in named.items():
        _check_weight(name, x, shapes.get(name, (width,)), like, like_name)
    return named


def _check_weight(name: str, x: Any, shape: tuple[int, ...], like: Tensor, like_name: str) -> None:
    common.check_tensor(name, x, len(shape), f"{tuple(shape)}")
    common.check_float(name, x)
    common.check_shape(name, x, shape)
    common.check_device(name, x, like, like_name)


def _autocast(x: Tensor) -> Tensor:
    """Where products in low precision pay, autocast's dtype decides theirs."""
    narrow = x.dtype == torch.float32 and x.device.type in NARROW and torch.is_autocast_enabled(x.device.type)
    return x.to(torch.get_autocast_dtype(x.device.type)) if narrow else x


def _untracked(arguments: list[Any]) -> list[Any]:
    """Without gradients nothing is kept: a Function sees only requires_grad, not the grad mode."""
    if torch.is_grad_enabled():
        return arguments
    return [x.detach() if isinstance(x, Tensor) else x for x in arguments]


class LatentAttentionFunction(torch.autograd.Function):
    """`latent_attention` for trainers that compose Functions: `apply` takes all its arguments in their order."""

    @staticmethod
    def forward(ctx: Any, hidden: Tensor, *arguments: Any) -> Tensor:
        weights, num_heads, options, backend = _split(arguments, (None, None, None, None, True, 1e-12))
        call = None
        if not isinstance(backend, Backend):  # else the public function has checked
            call = check(hidden, num_heads, *options, **reference.Block(*weights)._asdict())
            backend = dispatch.select("latent_attention", BACKENDS, backend, call)
            options = tuple(call[name] for name in ("lengths", "mask", "cu_seqlens", "skip", "normalize", "eps"))
        ctx.given = len(arguments)
        return _forward(ctx, backend, reference.latent_attention, call, (hidden, *options[:4]), weights,
                        (num_heads, *options[4:]))  # fmt: skip

    @staticmethod
    def backward(ctx: Any, d_out: Tensor) -> Any:
        return _backward(ctx, "latent_attention", 1, d_out)


class MultiLayerAttentionFunction(torch.autograd.Function):
    """`multi_layer_attention`, as LatentAttentionFunction is `latent_attention`."""

    @staticmethod
    def forward(ctx: Any, layers: Tensor, layer_embedding: Tensor, *arguments: Any) -> Tensor:
        weights, num_heads, options, backend = _split(arguments, (None, True, 1e-12))
        call = None
        if not isinstance(backend, Backend):
            call = check_multi_layer(
                layers, layer_embedding, num_heads, *options, **reference.Block(*weights)._asdict()
            )
            backend = dispatch.select("multi_layer_attention", MULTI_LAYER_BACKENDS, backend, call)
        ctx.given = len(arguments) + 1
        return _forward(ctx, backend, reference.multi_layer_attention, call, (layers, layer_embedding, options[0]),
                        weights, (num_heads, *options[1:]))  # fmt: skip

    @staticmethod
    def backward(ctx: Any, d_out: Tensor) -> Any:
        return _backward(ctx, "multi_layer_attention", 2, d_out)


def _split(arguments: tuple[Any, ...], defaults: tuple[Any, ...]) -> tuple[Any, ...]:
    """The weights, num_heads, the options and the backend."""
    if len(arguments) <= WEIGHTS:
        raise TypeError(f"apply needs {WEIGHTS} weights and num_heads, got {len(arguments)} arguments")
    options = (*arguments[WEIGHTS + 1 :], *(*defaults, None)[len(arguments) - WEIGHTS - 1 :])
    return arguments[:WEIGHTS], arguments[WEIGHTS], options[:-1], options[-1]


def _forward(
    ctx: Any,
    backend: Backend,
    function: Any,
    call: dict[str, Any] | None,
    inputs: tuple[Any, ...],
    weights: tuple[Tensor, ...],
    options: tuple[Any, ...],
) -> Tensor:
    """inputs come before the weights in the operators' arguments, options after them."""
    ctx.backend, ctx.reference, ctx.call, ctx.options = backend, function, call, options
    if backend.forward is None:
        assert call is not None
        return function(**call)
    out, *saved = backend.forward(*inputs, list(weights), *options, any(ctx.needs_input_grad))
    ctx.inputs, ctx.weights = len(inputs), len(weights)
    ctx.save_for_backward(*inputs, *weights, *saved)
    return out


def _backward(ctx: Any, family: str, tensors: int, d_out: Tensor) -> tuple[Any, ...]:
    """The gradients of the first `tensors` inputs and the weights."""
    count = tensors + WEIGHTS
    needs = list(ctx.needs_input_grad[:count])
    nothing = (None,) * (ctx.given + 1 - count)
    if ctx.backend.forward is None:
        arguments = tuple(ctx.call.values())
        needed = (*needs, *(False for _ in arguments[count:]))
        return (*common.reference_gradients(ctx.reference, arguments, needed, (d_out,))[:count], *nothing)
    inputs, rest = ctx.saved_tensors[: ctx.inputs], ctx.saved_tensors[ctx.inputs :]
    weights, saved = list(rest[: ctx.weights]), list(rest[ctx.weights :])
    found = ctx.backend.backward(d_out, *inputs, weights, *ctx.options, saved, needs)
    return (*common.first_derivatives(family, *(g if need else None for g, need in zip(found, needs, strict=True))),
            *nothing)  # fmt: skip
