"""Blocks, layouts with NaN in whatever isn't pooled, and the comparison with the reference in float64."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any

import torch
from accuracy import assert_accurate

NAN = float("nan")
DTYPES = (torch.float32, torch.bfloat16, torch.float16)
WIDTH, HEADS = 24, 3
FORMS = {"absorbed projections": (5, 8), "projections as written": (9, 4)}  # N, D


def block(
    num_latents: int, head_dim: int, dtype: torch.dtype = torch.float64, width: int = WIDTH
) -> list[torch.Tensor]:
    rows, inner = HEADS * head_dim, 2 * width

    def matrix(out: int, terms: int) -> torch.Tensor:
        return torch.randn(out, terms) / terms**0.5

    norms = [x for _ in range(3) for x in (1 + 0.3 * torch.randn(width), 0.3 * torch.randn(width))]
    return [
        x.to(dtype)
        for x in (
            torch.randn(num_latents, width),
            *(matrix(rows, width), matrix(2 * rows, width), matrix(width, rows)),
            *norms,
            *(matrix(2 * inner, width), torch.randn(2 * inner)),
            *(matrix(width, inner), torch.randn(width)),
        )
    ]


def run(function: Callable[..., Any], tensors: list[torch.Tensor], dtype: torch.dtype, **options: Any) -> list[Any]:
    inputs = [x.detach().to(dtype).requires_grad_() for x in tensors]
    out = function(*inputs, HEADS, **options)
    upstream = torch.linspace(-1, 1.3, out.numel(), dtype=torch.float64).sin().view(out.shape).to(out.dtype)
    return [out, *torch.autograd.grad(out, inputs, upstream)]


def check(function: Callable[..., Any], tensors: list[torch.Tensor], dtype: torch.dtype, **options: Any) -> None:
    """The output and the gradient of every tensor against the reference in float64 and at this dtype."""
    tensors = [x.to(dtype) for x in tensors]
    ours = run(function, tensors, dtype, **options)
    exact = run(function, tensors, torch.float64, backend="reference", **options)
    torchs = run(function, tensors, dtype, backend="reference", **options)
    for i, (a, b, c) in enumerate(zip(ours, exact, torchs, strict=True)):
        assert_accurate(a, b, c, 2 if i == 0 else 3, f"{function.__name__} {i} {list(options)}")


def layouts(length: int = 11) -> Iterator[tuple[torch.Tensor, dict[str, Any]]]:
    """hidden with NaN wherever it isn't pooled, and the arguments that say so."""
    lengths = torch.tensor([length, 0, 1, length - 4])
    real = torch.arange(length) < lengths[:, None]
    holes = torch.rand(4, length) < 0.5
    for mask, options in (
        (torch.ones(4, length, dtype=torch.bool), {}),
        (real, {"lengths": lengths, "normalize": False}),
        (real.flip(1), {"mask": real.flip(1)}),
        (holes, {"mask": holes.int()}),
        (real & (torch.arange(length) >= 2), {"lengths": lengths.int(), "skip": 2}),
        (holes & (holes.cumsum(1) > 2), {"mask": holes, "skip": 2}),
    ):
        hidden = torch.randn(4, length, WIDTH)
        hidden[~mask] = NAN
        yield hidden, options
    skip = torch.tensor([1, 0, 3, 0])
    packed = torch.randn(3 * length, WIDTH)
    packed[0] = packed[length : length + 3] = NAN
    bounds = torch.tensor([0, length, length, 2 * length, 3 * length])
    yield packed, {"cu_seqlens": bounds, "skip": skip, "eps": 0.0}
