"""Blocks, layouts with NaN in whatever isn't pooled, and the comparison with the reference in float64."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator
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


Call = tuple[list[torch.Tensor], dict[str, Any]]


def check(function: Callable[..., Any], calls: Iterable[Call], dtype: torch.dtype) -> None:
    """The outputs and the gradients of every tensor against the reference in float64 and at this dtype, of all calls at
    once, each scaled to 1: in a few numbers of a single one torch's error may be small by luck."""
    found: list[list[list[torch.Tensor]]] = []  # of calls, of results
    for tensors, options in calls:
        tensors = [x.to(dtype) for x in tensors]
        ours = run(function, tensors, dtype, **options)
        exact = run(function, tensors, torch.float64, backend="reference", **options)
        torchs = run(function, tensors, dtype, backend="reference", **options)
        by = [0.5 ** float(x.abs().max().frexp().exponent) for x in exact]
        results = zip(by, ours, exact, torchs, strict=True)
        found.append([[(x * scale).flatten() for x in result] for scale, *result in results])
    for i, results in enumerate(zip(*found, strict=True)):
        a, b, c = (torch.cat(x) for x in zip(*results, strict=True))
        assert_accurate(a, b, c, 2 if i == 0 else 3, f"{function.__name__} {i}")


def latent_calls(form: str) -> Iterator[Call]:
    for hidden, options in layouts():
        yield [hidden, *block(*FORMS[form])], options


def multi_layer_calls() -> Iterator[Call]:
    for num_latents, count, head_dim in ((2, 6, 8), (9, 3, 4)):  # several sequences in a tile, and one
        tensors = [torch.randn(5, count, WIDTH), torch.randn(count, WIDTH), *block(num_latents, head_dim)]
        yield tensors, {"normalize": num_latents == 2}
        empty = torch.tensor([False, True, False, False, True])
        layers = tensors[0].masked_fill(empty[:, None, None], NAN)
        yield [layers, *tensors[1:]], {"empty": empty}


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
