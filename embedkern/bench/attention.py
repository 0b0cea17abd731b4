"""Attention, forward and backward, against torch's SDPA and the rate of matrix products."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from ..ops.attention import attention, attention_varlen
from .harness import Row, interleave, share_of_peak, versus

HEADS, TOKENS = 12, 8192
PRODUCTS = 7  # of 2·L²·D each: two forward, five backward


def _heads(batch: int, length: int, dim: int, dtype: torch.dtype = torch.float32) -> list[Tensor]:
    """query, key, value and the gradient of out, as models have them: transposed views of (B, L, H, D)."""
    x = [torch.randn(batch, length, HEADS, dim).to(dtype).transpose(1, 2) for _ in range(4)]
    return [*(t.requires_grad_() for t in x[:3]), x[3]]


def _step(function: Callable[..., Any], q: Tensor, k: Tensor, v: Tensor, upstream: Tensor, *more: Tensor) -> Any:
    return lambda: torch.autograd.grad(function(q, k, v), (q, k, v, *more), upstream)


def _seconds(run: Callable[[], object]) -> float:
    return min(interleave({"": run}, 6)[""])


def _full_batches() -> Iterator[Row]:
    work = "H={} D={} L={} {}, {} tokens"
    for dtype, dim, length, goal, share in (
        (torch.float32, 32, 32, "≥ 2", "≥ 0.6"),
        (torch.float32, 32, 128, "≥ 1.4", "≥ 0.75"),
        (torch.float32, 32, 512, "≥ 1.25", "≥ 0.8"),
        (torch.float32, 64, 512, "", "≥ 0.8"),
        (torch.bfloat16, 32, 32, "≥ 6", ""),
        (torch.bfloat16, 32, 128, "≥ 4", ""),
        (torch.bfloat16, 32, 512, "≥ 2", ""),
    ):
        tensors = _heads(TOKENS // length, length, dim, dtype)
        what = work.format(HEADS, dim, length, str(dtype)[6:], TOKENS)
        ours = _step(attention, *tensors)
        row = versus("attention", what, ours, _step(F.scaled_dot_product_attention, *tensors), "SDPA, no mask", goal)
        yield row
        if share:
            flops = PRODUCTS * 2 * length * TOKENS * dim * HEADS
            yield share_of_peak("attention", what, ours, flops, "GEMM peak, seven products", share)


def _ragged() -> Iterator[Row]:
    torch.manual_seed(0)  # of lengths, which decide what is compared
    for what, longest, mean in (("short texts", 128, 2.6), ("long texts", 512, 5.0)):
        lengths = torch.empty(TOKENS // 32).log_normal_(mean, 0.7).long().clamp(3, longest).tolist()
        batch, total = len(lengths), sum(lengths)
        cu_seqlens = F.pad(torch.tensor(lengths).cumsum(0), (1, 0))
        packed = [torch.randn(total, HEADS, 32).requires_grad_() for _ in range(3)]
        upstream = torch.randn(total, HEADS, 32)
        ours = _step(lambda q, k, v, cu=cu_seqlens: attention_varlen(q, k, v, cu), *packed, upstream)
        padded = _heads(batch, max(lengths), 32)
        mask = (torch.arange(max(lengths)) < torch.tensor(lengths)[:, None])[:, None, None]
        sdpa = _step(lambda q, k, v, m=mask: F.scaled_dot_product_attention(q, k, v, attn_mask=m), *padded)
        work = f"{what}, {batch} of {min(lengths)}–{max(lengths)} tokens, H={HEADS} D=32 float32"
        goals = ("≥ 8", "≥ 2") if longest == 128 else ("≥ 5", "≥ 1.4")
        yield versus("attention", work, ours, sdpa, "SDPA, padded, its mask", goals[0], rounds=4)
        groups = [_step(F.scaled_dot_product_attention, *_heads(lengths.count(n), n, 32)) for n in sorted(set(lengths))]
        by_length = lambda g=groups: [run() for run in g]  # noqa: E731
        yield versus("attention", work, ours, by_length, "SDPA on groups of equal length", goals[1])


def _temperature() -> Iterator[Row]:
    tensors = _heads(TOKENS // 128, 128, 32)
    tau = torch.tensor(0.7, requires_grad=True)
    learned = _step(lambda q, k, v: attention(q, k, v, temperature=tau), *tensors, tau)
    fixed = _step(lambda q, k, v: attention(q, k, v, temperature=0.7), *tensors)
    work = f"temperature with gradient, H={HEADS} D=32 L=128 float32"
    yield versus("attention", work, learned, fixed, "the same without its gradient", "≥ 0.97", best=True)


def _relative_bias() -> Iterator[Row]:
    tensors = _heads(TOKENS // 128, 128, 32)
    bias = torch.randn(HEADS, 255, requires_grad=True)
    ours = _step(lambda q, k, v: attention(q, k, v, relative_bias=bias), *tensors, bias)
    work = f"relative_bias with gradient, H={HEADS} D=32 L=128 float32"
    yield versus("attention", work, ours, _step(attention, *tensors), "the call without it", "≥ 0.8", best=True)


def _lengths() -> Iterator[Row]:
    """Time against length at the same tokens · L, and the rate at L = 16."""

    def rate(tokens: int, length: int) -> float:
        run = _step(attention, *_heads(tokens // length, length, 32))
        return PRODUCTS * 2 * length * tokens * 32 * HEADS / _seconds(run)

    rates = {length: rate(2**23 // length, length) for length in (256, 512, 1024, 2048)}
    x = [math.log(length) for length in rates]
    y = [math.log(length / r) for length, r in rates.items()]  # time per token
    x_mean, y_mean = sum(x) / len(x), sum(y) / len(y)
    slope = sum((a - x_mean) * (b - y_mean) for a, b in zip(x, y, strict=True)) / sum((a - x_mean) ** 2 for a in x)
    yield Row("attention", "time per token ~ L^e, L = 256–2048", "e", slope, 1.0, slope, "≤ 1.05", unit="")
    short, best = rate(TOKENS, 16), max(rates.values())
    yield Row("attention", "rate at L=16, float32 D=32", "the best rate", short / 1e9, best / 1e9, short / best,
              "≥ 0.35", unit="GF/s")  # fmt: skip


def rows() -> Iterator[Row]:
    yield from _full_batches()
    yield from _ragged()
    yield from _temperature()
    yield from _relative_bias()
    yield from _lengths()
