"""The specification of attention, in plain differentiable PyTorch. csrc/cpu/attention.cpp computes the same.

z = cap(scale · q·kᵀ) + bias + relative_bias,  u = z / temperature,  out = softmax(u over visible keys) · v
"""

from __future__ import annotations

import math

import torch
from torch import Tensor

from ..schema import memory_order


def attention(
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
    seed: Tensor | None = None,
) -> tuple[Tensor, Tensor]:
    """query (B, Hq, Lq, D), key (B, Hkv, Lk, D), value (B, Hkv, Lk, Dv) → out (B, Hq, Lq, Dv), lse (B, Hq, Lq).

    seed: () int64, of the dropout mask; drawn from torch's generator when it isn't given.
    """
    batch, _, len_k, _ = key.shape
    real = None  # (B, Lk)
    if key_lengths is not None:
        if not torch.compiler.is_compiling() and ((key_lengths < 0) | (key_lengths > len_k)).any():
            raise ValueError(f"key_lengths must be in [0, {len_k}], got {key_lengths.tolist()}")
        real = torch.arange(len_k, device=key.device) < key_lengths[:, None]
    if key_mask is not None:
        real = key_mask if real is None else real & key_mask
    rows = torch.arange(query.shape[:3].numel(), device=query.device).view(*query.shape[:3], 1)
    with torch.autocast(query.device.type, enabled=False):
        out, lse = _attend(
            query, key, value, real, mask, bias, relative_bias, temperature, scale, causal, window, softcap,
            dropout_p, seed, rows
        )  # fmt: skip
    return in_order_of(query, out).to(query.dtype), lse


def attention_varlen(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    cu_seqlens_q: Tensor,
    cu_seqlens_k: Tensor | None = None,
    relative_bias: Tensor | None = None,
    temperature: float | Tensor = 1.0,
    scale: float | Tensor | None = None,
    causal: bool = False,
    window: tuple[int, int] | None = None,
    softcap: float | None = None,
    dropout_p: float = 0.0,
    seed: Tensor | None = None,
) -> tuple[Tensor, Tensor]:
    """query (Tq, Hq, D), key (Tk, Hkv, D), value (Tk, Hkv, Dv) → out (Tq, Hq, Dv), lse (Tq, Hq)."""
    tokens, heads, _ = query.shape
    bounds_q = _bounds("cu_seqlens_q", cu_seqlens_q, tokens)
    bounds_k = bounds_q if cu_seqlens_k is None else _bounds("cu_seqlens_k", cu_seqlens_k, key.shape[0])
    rows = torch.arange(tokens * heads, device=query.device).view(tokens, heads, 1)
    if dropout_p > 0 and seed is None:
        seed = draw_seed(query)
    outs, lses = [], []
    for start_q, end_q, start_k, end_k in zip(bounds_q, bounds_q[1:], bounds_k, bounds_k[1:], strict=False):
        # (T, H, ·) → (1, H, L, ·)
        q, row = (x[start_q:end_q].transpose(0, 1)[None] for x in (query, rows))
        k, v = (x[start_k:end_k].transpose(0, 1)[None] for x in (key, value))
        tau, factor = temperature, scale
        if isinstance(tau, Tensor):
            tau = tau.expand(tokens, heads, 1)[start_q:end_q].transpose(0, 1)[None]
        if isinstance(factor, Tensor):
            factor = factor.expand(tokens, heads, 1)[start_q:end_q].transpose(0, 1)[None]
        with torch.autocast(query.device.type, enabled=False):
            out, lse = _attend(
                q, k, v, None, None, None, relative_bias, tau, factor, causal, window, softcap, dropout_p, seed, row
            )
        outs.append(out[0].transpose(0, 1))
        lses.append(lse[0].transpose(0, 1))
    if not outs:
        given = [x for x in (query, key, value, relative_bias, temperature, scale) if isinstance(x, Tensor)]
        nothing = torch.stack([x.sum().to(query.dtype) for x in given]).sum() * 0
        return nothing + value.new_zeros((0, heads, value.shape[2])), (nothing + query.new_zeros((0, heads))).float()
    return in_order_of(query, torch.cat(outs)).to(query.dtype), torch.cat(lses)


def _bounds(name: str, cu_seqlens: Tensor, tokens: int) -> list[int]:
    bounds = cu_seqlens.tolist()
    if bounds[0] != 0:
        raise ValueError(f"{name} must start at 0, got {bounds[0]}")
    if any(a > b for a, b in zip(bounds, bounds[1:], strict=False)):
        raise ValueError(f"{name} must not decrease, got {bounds}")
    if bounds[-1] != tokens:
        raise ValueError(f"{name} must end at the number of tokens, {tokens}, got {bounds[-1]}")
    return bounds


def _attend(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    real: Tensor | None,  # (B, Lk): keys that are no padding
    mask: Tensor | None,
    bias: Tensor | None,
    relative_bias: Tensor | None,
    temperature: float | Tensor,
    scale: float | Tensor | None,
    causal: bool,
    window: tuple[int, int] | None,
    softcap: float | None,
    dropout_p: float,
    seed: Tensor | None,
    rows: Tensor,  # (B, Hq, Lq, 1): each row's number, from which its dropout mask follows
) -> tuple[Tensor, Tensor]:
    """One padded batch: out in the accumulation's dtype, and lse."""
    len_q, dim = query.shape[2:]
    len_k = key.shape[2]
    wide = torch.float64 if query.dtype == torch.float64 else torch.float32
    group = query.shape[1] // max(key.shape[1], 1)
    q, k, v = (x.to(wide) for x in (query, key.repeat_interleave(group, 1), value.repeat_interleave(group, 1)))
    tau, factor = (
        x.to(wide) if isinstance(x, Tensor) else torch.tensor(float(x), dtype=wide, device=query.device)
        for x in (temperature, dim**-0.5 if scale is None else scale)
    )

    tau = tau.clamp(min=1e-45)  # a positive number may be too small for float32

    # (B, Hq, Lq, Lk): visible, and the terms added to the scores; position of key j relative to query i's
    distance = torch.arange(len_k, device=query.device) - (
        torch.arange(len_q, device=query.device)[:, None] + (len_k - len_q)
    )
    visible = torch.ones((1, 1, len_q, len_k), dtype=torch.bool, device=query.device)
    if causal:
        visible = visible & (distance <= 0)
    if window is not None and window[0] >= 0:
        visible = visible & (distance >= -window[0])
    if window is not None and window[1] >= 0:
        visible = visible & (distance <= window[1])
    if mask is not None:
        visible = visible & mask
    terms = [] if bias is None else [bias.to(wide)]
    if relative_bias is not None:
        reach = relative_bias.shape[1] // 2
        terms.append(relative_bias.to(wide)[:, distance.clamp(-reach, reach) + reach])
    for term in terms:
        visible = visible & (term != -math.inf)
    terms = [torch.where(term == -math.inf, 0, term) for term in terms]

    # What no row sees is replaced before any product: 0 · NaN is NaN, in the gradients too.
    by_row = causal or window is not None or mask is not None or bool(terms)
    if real is not None:
        k, v = (x.masked_fill(~real[:, None, :, None], 0) for x in (k, v))
    finite_k, finite_v = torch.isfinite(k), torch.isfinite(v)
    if by_row:  # what isn't finite may be hidden from some rows: it is put back below, for the rows that see it
        k, v = torch.where(finite_k, k, 0), torch.where(finite_v, v, 0)
    if real is not None:
        visible = visible & real[:, None, None, :]
    visible = visible.expand(*query.shape[:3], len_k)
    empty = ~visible.any(-1, keepdim=True)  # (B, Hq, Lq, 1): rows that see no key
    q = torch.where(empty, 0, q)

    z = factor * (q @ k.transpose(-1, -2))
    if softcap is not None:
        z = softcap * torch.tanh(z / softcap)
    for term in terms:
        z = z + term
    if by_row:
        z = torch.where(finite_k.all(-1)[:, :, None, :], z, math.nan)

    # The row's maximum is subtracted before the division: z / temperature may be larger than any float. Where the
    # weight is 0 in any precision, the key counts as hidden: temperature's gradient would be 0 · infinity.
    z = torch.where(visible, z, -math.inf)
    top = torch.where(empty, 0, z.detach().amax(-1, keepdim=True)) if len_k else torch.zeros_like(z.sum(-1, True))
    shifted = torch.where(empty, 0, z - top)
    weightless = shifted.detach() < -1e4 * tau.detach()
    u = torch.where(weightless, -math.inf, torch.where(weightless, 0, shifted) / tau)
    weights = torch.where(empty, 0, torch.softmax(u, -1))
    if len_k:
        lse = torch.where(empty, -math.inf, torch.logsumexp(u, -1, keepdim=True) + top / tau)
    else:
        lse = z.sum(-1, keepdim=True) - math.inf
    if dropout_p > 0:
        weights = weights * dropout_factors(draw_seed(query) if seed is None else seed, rows, len_k, dropout_p, wide)
    out = torch.where(empty, 0, weights @ v)  # whatever upstream gradient comes for such a row
    if by_row:
        out = torch.where(visible.to(wide) @ (~finite_v).to(wide) > 0, math.nan, out)
    return out, lse[..., 0]


def draw_seed(like: Tensor) -> Tensor:
    """() int64 from the generator of like's device."""
    return torch.randint(0, 2**62, (), dtype=torch.int64, device=like.device)


def dropout_factors(seed: Tensor, rows: Tensor, len_k: int, dropout_p: float, dtype: torch.dtype) -> Tensor:
    """rows (…, 1) → (…, Lk): 0 with probability dropout_p, else 1 / (1 - dropout_p); from seed, row and key alone."""
    if dropout_p >= 1:
        return torch.zeros((), dtype=dtype, device=rows.device)
    columns = torch.arange(len_k, device=rows.device)
    bits = _mix(_mix(_mix(rows + (seed & 0xFFFFFFFF)) + (seed >> 32)) ^ _mix(columns))
    return (bits >= int(dropout_p * 2**32)).to(dtype) / (1 - dropout_p)


def _mix(x: Tensor) -> Tensor:
    """A bijection of 32 bits, held in int64, that spreads every bit over all (xor, shift and multiply)."""
    for shift, factor in ((16, 0x21F0AAAD), (15, 0xD35A2D97)):
        x = x & 0xFFFFFFFF
        x = (x ^ (x >> shift)) * factor
    x = x & 0xFFFFFFFF
    return x ^ (x >> 15)


def in_order_of(like: Tensor, x: Tensor) -> Tensor:
    """x, dense, with its dims in memory in the same order as like's."""
    order = memory_order(like.stride())
    inverse = sorted(range(len(order)), key=order.__getitem__)
    return x.permute(order).contiguous().permute(inverse)
