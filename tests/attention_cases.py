"""Inputs of attention, and the comparison of every result and gradient with the reference in float64."""

from __future__ import annotations

from typing import Any

import torch
from accuracy import assert_accurate
from torch import Tensor

import embedkern as ek
from embedkern import _native

NAN, INF = float("nan"), float("inf")
DTYPES = (torch.float32, torch.bfloat16, torch.float16)


def inputs(
    batch: int,
    heads: int,
    kv_heads: int,
    len_q: int,
    len_k: int,
    dim: int,
    dim_v: int,
    dtype: torch.dtype = torch.float32,
) -> tuple[Tensor, Tensor, Tensor]:
    """Transposed views of (B, L, H, D)."""
    q, k, v = (
        torch.randn(batch, length, h, d).to(dtype).transpose(1, 2)
        for length, h, d in ((len_q, heads, dim), (len_k, kv_heads, dim), (len_k, kv_heads, dim_v))
    )
    return q, k, v


def packed(
    tokens_q: int, tokens_k: int, heads: int, kv_heads: int, dim: int, dtype: torch.dtype = torch.float32
) -> Any:
    return (
        torch.randn(tokens_q, heads, dim).to(dtype),
        torch.randn(tokens_k, kv_heads, dim).to(dtype),
        torch.randn(tokens_k, kv_heads, dim).to(dtype),
    )


def run(function: Any, tensors: Any, backend: str | None, dtype: torch.dtype | None, options: dict[str, Any]) -> Any:
    """out, lse and the gradient of every floating-point argument, for upstream gradients of out and lse."""
    tensors = [x.detach().to(dtype or x.dtype).requires_grad_() for x in tensors]
    options = {
        name: x.detach().to(torch.float64 if dtype == torch.float64 else x.dtype).requires_grad_()
        if isinstance(x, Tensor) and x.is_floating_point()
        else x
        for name, x in options.items()
    }
    out, lse = function(*tensors, return_lse=True, backend=backend, **options)
    upstream = torch.linspace(-1, 1, out.numel(), dtype=torch.float64).sin().reshape(out.shape).to(out.dtype)
    loss = (out * upstream).sum() + (torch.where(lse == -INF, 0, lse) * 0.3).sum()
    leaves = {name: x for name, x in options.items() if isinstance(x, Tensor) and x.requires_grad}
    gradients = torch.autograd.grad(loss, [*tensors, *leaves.values()])
    return dict(zip(("out", "lse", "d_query", "d_key", "d_value", *leaves), (out, lse, *gradients), strict=True))


def memory_order(x: Tensor) -> list[int]:
    return [stride for stride, size in zip(x.stride(), x.shape, strict=True) if size > 1]


def check(
    *tensors: Tensor,
    function: Any = ek.attention,
    backend: str | None = "cpu",
    tolerance: float | None = None,
    **options: Any,
) -> None:
    """Our output and gradients against the reference in float64 and at the inputs' dtype.

    tolerance, relative to 1 + the largest value, instead of a multiple of torch's error: for inputs that chance makes.
    """
    ours = run(function, tensors, backend, None, options)
    exact = run(function, tensors, "reference", torch.float64, options)
    torchs = run(function, tensors, "reference", None, options)
    shown = [name for name, x in options.items() if x is not None]
    for name, got in ours.items():
        wanted, theirs = exact[name], torchs[name]
        if name == "lse":
            assert torch.equal(got == -INF, wanted == -INF)
            got, wanted, theirs = (torch.where(x == -INF, 0, x) for x in (got, wanted, theirs))
        if tolerance is not None:
            error = (got.double() - wanted).abs() / (1 + wanted.abs().max()) if got.numel() else torch.zeros(1)
            assert error.max().item() <= tolerance, f"{name} with {shown}: error {error.max().item():.3g}"
            continue
        factor = 2.0 if name in ("out", "lse") else 3.0
        if got.numel() < 200:
            factor *= 3  # a handful of values: torch may come out exact by chance
        if _native.variant() == "portable":
            factor *= 2  # on x86 without fused multiply-add, which torch's products have
        assert_accurate(got, wanted, theirs, factor, f"{name} with {shown}")
    assert memory_order(ours["out"]) == memory_order(torchs["out"])
