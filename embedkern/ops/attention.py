"""attention and attention_varlen: checks, the choice of a backend, gradients."""

from __future__ import annotations

import math
from typing import Any

import torch
from torch import Tensor

from .. import dispatch
from ..backends import native, triton
from ..dispatch import Backend
from ..reference import attention as reference
from . import common
from .attention_check import check, check_varlen

BACKENDS = (triton.ATTENTION, native.ATTENTION, Backend("reference"))


def attention(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    *,
    key_lengths: Tensor | None = None,
    key_mask: Tensor | None = None,
    mask: Tensor | None = None,
    bias: Tensor | None = None,
    relative_bias: Tensor | None = None,
    temperature: float | Tensor = 1.0,
    scale: float | Tensor | None = None,
    causal: bool = False,
    window: tuple[int, int] | None = None,
    softcap: float | None = None,
    dropout_p: float = 0.0,
    return_lse: bool = False,
    backend: str | None = None,
) -> Tensor | tuple[Tensor, Tensor]:
    """softmax(z / temperature over the visible keys) · value, z = cap(scale · query·keyᵀ) + bias + relative_bias.

    Args:
        query, key, value: (B, Hq, Lq, D), (B, Hkv, Lk, D), (B, Hkv, Lk, Dv), one dtype, Hq a multiple of Hkv, D and
            Dv multiples of 8 up to 256. Any strides are read in place while the last is 1.
        key_lengths: (B,) int32 or int64: key j is visible if j < key_lengths[b].
        key_mask: (B, Lk) bool, any pattern. What is hidden is never read: NaN there is harmless.
        mask: bool, broadcastable to (B, Hq, Lq, Lk), True where a row attends.
        bias: float, broadcastable to (B, Hq, Lq, Lk); −inf hides the key.
        relative_bias: float (Hq, 2R + 1), entry clip(j − p, −R, R) + R, where query i stands at p = i + (Lk − Lq).
        temperature: a number > 0, or a tensor broadcastable to (B, Hq, Lq, 1), with gradient (values ≤ 0 aren't
            noticed in a tensor).
        scale: a number (1 / √D by default) or a tensor as temperature's.
        causal: only keys j ≤ p.
        window: (left, right), only keys p − left ≤ j ≤ p + right; −1 is no bound.
        softcap: cap(x) = softcap · tanh(x / softcap).
        dropout_p: on the weights, seeded from torch's generator.
        return_lse: also give logsumexp(z / temperature), (B, Hq, Lq) float32, differentiable.

    Returns:
        out (B, Hq, Lq, Dv) in query's dtype and memory order, accumulated in float32; with return_lse (out, lse).
        A row that sees no key gives 0, lse −inf and zero gradients.

    Raises:
        ValueError, TypeError: an argument has a wrong rank, size, dtype, device or value.
        NotImplementedError: the backend asked for can't run this call; second derivatives (use "reference").
    """
    call = check(
        query, key, value, key_lengths, key_mask, mask, bias, relative_bias, temperature, scale, causal, window,
        softcap, dropout_p
    )  # fmt: skip
    chosen = dispatch.select("attention", BACKENDS, backend, call)
    if chosen.forward is None:
        out, lse = reference.attention(**call)
    else:
        out, lse = common.applied(AttentionFunction, (*call.values(), return_lse, chosen))
    return (out, lse) if return_lse else out


def attention_varlen(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    cu_seqlens_q: Tensor,
    cu_seqlens_k: Tensor | None = None,
    *,
    max_seqlen_q: int | None = None,
    max_seqlen_k: int | None = None,
    relative_bias: Tensor | None = None,
    temperature: float | Tensor = 1.0,
    scale: float | Tensor | None = None,
    causal: bool = False,
    window: tuple[int, int] | None = None,
    softcap: float | None = None,
    dropout_p: float = 0.0,
    return_lse: bool = False,
    backend: str | None = None,
) -> Tensor | tuple[Tensor, Tensor]:
    """`attention` within each sequence of a packed batch.

    Args:
        query, key, value: (Tq, Hq, D), (Tk, Hkv, D), (Tk, Hkv, Dv).
        cu_seqlens_q, cu_seqlens_k: (B + 1,) int32 or int64, from 0 to Tq and Tk; cu_seqlens_k is cu_seqlens_q if it
            isn't given.
        max_seqlen_q, max_seqlen_k: accepted as FlashAttention takes them; they change nothing.
        temperature, scale: a number, or a tensor broadcastable to (Tq, Hq, 1).
        Everything else as in `attention`; positions count within each sequence, from its own lengths.

    Returns:
        out (Tq, Hq, Dv); with return_lse (out, lse), lse (Tq, Hq) float32.
    """
    call = check_varlen(
        query, key, value, cu_seqlens_q, cu_seqlens_k, max_seqlen_q, max_seqlen_k, relative_bias, temperature, scale,
        causal, window, softcap, dropout_p
    )  # fmt: skip
    chosen = dispatch.select("attention_varlen", BACKENDS, backend, call)
    if chosen.forward is None:
        out, lse = reference.attention_varlen(**call)
    else:
        out, lse = common.applied(AttentionVarlenFunction, (*_with_max_seqlens(call), return_lse, chosen))
    return (out, lse) if return_lse else out


def _with_max_seqlens(call: dict[str, Any]) -> tuple[Any, ...]:
    """The arguments of attention_varlen in its order, from check_varlen's."""
    arguments = tuple(call.values())
    return (*arguments[:5], None, None, *arguments[5:])


class AttentionFunction(torch.autograd.Function):
    """`attention` for trainers that compose Functions: `apply` takes all its arguments in their order.

    It returns (out, lse), whatever return_lse is.
    """

    @staticmethod
    def forward(
        ctx: Any,
        query: Tensor,
        key: Tensor,
        value: Tensor,
        key_lengths: Tensor | None = None,
        key_mask: Tensor | None = None,
        mask: Tensor | None = None,
        bias: Tensor | None = None,
        relative_bias: Tensor | None = None,
        temperature: float | Tensor = 1.0,
        scale: float | Tensor | None = None,
        causal: bool = False,
        window: tuple[int, int] | None = None,
        softcap: float | None = None,
        dropout_p: float = 0.0,
        return_lse: bool = False,
        backend: str | Backend | None = None,
    ) -> tuple[Tensor, Tensor]:
        if not isinstance(backend, Backend):  # else the public function has checked
            call = check(
                query, key, value, key_lengths, key_mask, mask, bias, relative_bias, temperature, scale, causal, window,
                softcap, dropout_p
            )  # fmt: skip
            backend = dispatch.select("attention", BACKENDS, backend, call)
            if backend.forward is None:
                return _reference_forward(ctx, reference.attention, call, (query, key, value))
            query, key, value, window = call["query"], call["key"], call["value"], call["window"]
        options = mask, bias, relative_bias, temperature, scale, causal, window, softcap, dropout_p
        return _forward(ctx, backend, query, key, value, (key_lengths, key_mask, None, None), *options)

    @staticmethod
    def backward(ctx: Any, d_out: Tensor | None, d_lse: Tensor | None) -> Any:
        if ctx.backend is None:
            return *_reference_backward(ctx, d_out, d_lse)[:14], None, None
        d_q, d_k, d_v, d_bias, d_relative, d_temperature, d_scale = _backward(ctx, (6, 7, 8, 9), d_out, d_lse)
        return d_q, d_k, d_v, None, None, None, d_bias, d_relative, d_temperature, d_scale, *(None,) * 6


class AttentionVarlenFunction(torch.autograd.Function):
    """`attention_varlen`, as AttentionFunction is `attention`."""

    @staticmethod
    def forward(
        ctx: Any,
        query: Tensor,
        key: Tensor,
        value: Tensor,
        cu_seqlens_q: Tensor,
        cu_seqlens_k: Tensor | None = None,
        max_seqlen_q: int | None = None,
        max_seqlen_k: int | None = None,
        relative_bias: Tensor | None = None,
        temperature: float | Tensor = 1.0,
        scale: float | Tensor | None = None,
        causal: bool = False,
        window: tuple[int, int] | None = None,
        softcap: float | None = None,
        dropout_p: float = 0.0,
        return_lse: bool = False,
        backend: str | Backend | None = None,
    ) -> tuple[Tensor, Tensor]:
        if not isinstance(backend, Backend):
            call = check_varlen(
                query, key, value, cu_seqlens_q, cu_seqlens_k, max_seqlen_q, max_seqlen_k, relative_bias, temperature,
                scale, causal, window, softcap, dropout_p
            )  # fmt: skip
            backend = dispatch.select("attention_varlen", BACKENDS, backend, call)
            if backend.forward is None:
                return _reference_forward(ctx, reference.attention_varlen, call, (query, key, value))
            query, key, value, window = call["query"], call["key"], call["value"], call["window"]
        places = None, None, cu_seqlens_q, cu_seqlens_k
        options = None, None, relative_bias, temperature, scale, causal, window, softcap, dropout_p
        return _forward(ctx, backend, query, key, value, places, *options)

    @staticmethod
    def backward(ctx: Any, d_out: Tensor | None, d_lse: Tensor | None) -> Any:
        if ctx.backend is None:
            gradients = _reference_backward(ctx, d_out, d_lse)
            return *gradients[:5], None, None, *gradients[5:12], None, None
        d_q, d_k, d_v, _, d_relative, d_temperature, d_scale = _backward(ctx, (None, 7, 8, 9), d_out, d_lse)
        return d_q, d_k, d_v, None, None, None, None, d_relative, d_temperature, d_scale, *(None,) * 6


def _forward(
    ctx: Any,
    backend: Backend,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    places: tuple[Tensor | None, ...],
    mask: Tensor | None,
    bias: Tensor | None,
    relative_bias: Tensor | None,
    temperature: float | Tensor,
    scale: float | Tensor | None,
    causal: bool,
    window: tuple[int, int] | None,
    softcap: float | None,
    dropout_p: float,
) -> tuple[Tensor, Tensor]:
    """ctx is None where no gradient is wanted. places: key_lengths, key_mask, cu_seqlens_q, cu_seqlens_k."""
    tau, tau_number = (temperature.float(), 1.0) if isinstance(temperature, Tensor) else (None, float(temperature))
    if isinstance(scale, Tensor):
        factor, factor_number = scale.float(), 1.0
    else:
        factor, factor_number = None, query.shape[-1] ** -0.5 if scale is None else float(scale)
    terms = [None if x is None else x.float() for x in (bias, relative_bias)]
    if terms[1] is not None:
        terms[1] = terms[1].contiguous()
    seed = reference.draw_seed(query) if dropout_p > 0 else None
    numbers = causal, *(window or (-1, -1)), float(softcap or 0), float(dropout_p)
    out, lse, statistics = backend.forward(
        query, key, value, *places, mask, *terms, tau, tau_number, factor, factor_number, *numbers, seed
    )  # fmt: skip
    if ctx is not None:
        ctx.set_materialize_grads(False)
        ctx.backend = backend
        ctx.numbers = tau_number, factor_number, numbers
        ctx.dtypes = [x.dtype if isinstance(x, Tensor) else None for x in (bias, relative_bias, temperature, scale)]
        saved = (out, statistics) if statistics.numel() > 0 else (None, None)
        ctx.save_for_backward(*saved, query, key, value, *places, mask, *terms, tau, factor, seed)
    return out, lse


def _backward(
    ctx: Any, others: tuple[int | None, ...], d_out: Tensor | None, d_lse: Tensor | None
) -> tuple[Tensor | None, ...]:
    """others: where bias, relative_bias, temperature and scale stand among the Function's arguments."""
    out, statistics, query, key, value, *places_and_terms, tau, factor, seed = ctx.saved_tensors
    if d_out is None:
        d_out = value.new_zeros(()).expand(*query.shape[:-1], value.shape[-1])
    given = len(ctx.needs_input_grad)
    needs = [i is not None and i < given and ctx.needs_input_grad[i] for i in (0, 1, 2, *others)]
    tau_number, factor_number, numbers = ctx.numbers
    gradients = ctx.backend.backward(
        d_out, d_lse, out, statistics, query, key, value, *places_and_terms, tau, tau_number, factor, factor_number,
        *numbers, seed, *needs
    )  # fmt: skip
    dtypes = (query.dtype, key.dtype, value.dtype, *ctx.dtypes)
    wanted = [g.to(dtype) if need else None for g, need, dtype in zip(gradients, needs, dtypes, strict=True)]
    return common.first_derivatives("attention", *wanted)


def _reference_forward(
    ctx: Any, function: Any, call: dict[str, Any], given: tuple[Tensor, ...]
) -> tuple[Tensor, Tensor]:
    """given: query, key and value before autocast's cast, which the gradients go through."""
    dtype, seed = call["query"].dtype, reference.draw_seed(given[0]) if call["dropout_p"] > 0 else None

    def run(query: Tensor, key: Tensor, value: Tensor, *options: Any) -> tuple[Tensor, Tensor]:
        return function(query.to(dtype), key.to(dtype), value.to(dtype), *options, seed)

    ctx.backend, ctx.run = None, run
    ctx.set_materialize_grads(False)
    ctx.arguments = (*given, *tuple(call.values())[3:])
    return run(*ctx.arguments)


def _reference_backward(ctx: Any, d_out: Tensor | None, d_lse: Tensor | None) -> tuple[Tensor | None, ...]:
    needed = [isinstance(x, Tensor) and x.dtype.is_floating_point and x.requires_grad for x in ctx.arguments]
    return common.reference_gradients(ctx.run, ctx.arguments, needed, (d_out, d_lse))


def log_length_temperature(lengths: Tensor, s: float | Tensor) -> Tensor:
    """Scalable-Softmax (Nakanishi 2025): softmax(s · log n · z) is a temperature of 1 / (s · log n).

    lengths (B,), s a number, () or (H,) → (B, 1, 1, 1) or (B, H, 1, 1), float32, differentiable in s. A sequence of
    less than two tokens gets that of two: over a single key every temperature gives the same.
    """
    log_n = torch.log(lengths.clamp(min=2).float())[:, None, None, None]
    return 1 / (log_n * (s.float().reshape(-1, 1, 1) if isinstance(s, Tensor) else s))


def relative_bias_from_buckets(
    table: Tensor, num_buckets: int, max_distance: int, bidirectional: bool = True
) -> Tensor:
    """The relative_bias (H, 2 · max_distance + 1) of a T5 or MPNet table (num_buckets, H), differentiable in it.

    Half of the buckets are single distances, the others grow by logarithm up to max_distance (Raffel 2020).
    """
    if table.ndim != 2 or table.shape[0] != num_buckets:
        raise ValueError(f"table must have shape ({num_buckets}, H), got {tuple(table.shape)}")
    distance = torch.arange(-max_distance, max_distance + 1, device=table.device)  # j - p
    side = num_buckets // 2 if bidirectional else num_buckets
    steps = distance.abs() if bidirectional else (-distance).clamp(min=0)
    single = side // 2
    growth = torch.log(steps.clamp(min=1).float() / single) / math.log(max_distance / single) * (side - single)
    bucket = torch.where(steps < single, steps, (single + growth.long()).clamp(max=side - 1))
    if bidirectional:
        bucket = bucket + side * (distance > 0)
    return table[bucket].T
