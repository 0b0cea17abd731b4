"""The accuracy of every operator, dtype and backend on this machine, against float64 and torch's own error."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from .ops.attention import attention, attention_varlen
from .ops.infonce import info_nce
from .ops.latent_pooling import latent_attention, multi_layer_attention
from .ops.pooling import pool

DTYPES = (torch.float32, torch.bfloat16, torch.float16)
OUTPUT_FACTOR, GRADIENT_FACTOR = 2.0, 3.0  # flash-attention's rule: our error over torch's at the same dtype


@dataclass(frozen=True)
class Case:
    """A call: `tensors` get a gradient, `options` don't."""

    name: str
    function: Callable[..., Any]
    tensors: tuple[Tensor, ...]
    options: dict[str, Any]


@dataclass(frozen=True)
class Verdict:
    case: str
    dtype: torch.dtype
    backend: str
    error: float  # of the outputs and gradients, the worst share of what is allowed: ≤ 1 passes

    @property
    def passed(self) -> bool:
        return self.error <= 1.0  # false for NaN


def cases(device: str) -> Iterator[Case]:
    generator = torch.Generator().manual_seed(0)

    def random(*shape: int) -> Tensor:
        return torch.randn(*shape, generator=generator, dtype=torch.float64)

    def integers(*values: int) -> Tensor:
        return torch.tensor(values, device=device)

    q, k, v = (random(3, heads, 33, 32) for heads in (4, 2, 2))
    yield Case("attention", attention, (q, k, v), {"key_lengths": integers(33, 0, 20), "temperature": 0.7})
    q, k, v = (random(70, heads, 64) for heads in (4, 4, 4))
    yield Case("attention_varlen", attention_varlen, (q, k, v), {"cu_seqlens_q": integers(0, 5, 5, 70)})
    hidden = random(3, 40, 96)
    for mode in ("cls", "lasttoken", "max", "mean", "mean_sqrt_len_tokens", "weightedmean", "sum"):
        options = {"lengths": integers(40, 0, 11), "normalize": mode != "sum"}
        yield Case(f"pool {mode}", lambda h, m=mode, **rest: pool(h, m, **rest), (hidden,), options)
    rows, inner, norms = 3 * 16, 2 * 24, [random(24) for _ in range(6)]
    matrices = [random(*shape) / shape[1] ** 0.5 for shape in ((rows, 24), (2 * rows, 24), (24, rows), (2 * inner, 24))]
    feed_forward = (matrices[3], random(2 * inner), random(24, inner) / inner**0.5, random(24))
    block = (random(5, 24), *matrices[:3], *norms, *feed_forward)
    options = {"num_heads": 3, "lengths": integers(40, 0, 11)}
    yield Case("latent_attention", latent_attention, (random(3, 40, 24), *block), options)
    yield Case(
        "multi_layer_attention", multi_layer_attention, (random(3, 4, 24), random(4, 24), *block), {"num_heads": 3}
    )
    queries, documents, negatives = random(50, 48), random(70, 48), random(50, 3, 48)
    yield Case("info_nce", info_nce, (queries, documents), {"temperature": 0.05})
    hard = lambda q, d, n, **rest: info_nce(q, d, negatives=n, **rest)  # noqa: E731
    yield Case("info_nce with negatives", hard, (queries, documents, negatives), {"temperature": 0.1})
    guide = {"guide_queries": random(50, 8).to(device), "guide_documents": random(70, 8).to(device)}
    every = ("query_to_doc", "query_to_query", "doc_to_query", "doc_to_doc")
    yield Case("info_nce in four directions", info_nce, (queries, documents), {"directions": every, **guide})
    yield Case("info_nce over prefixes", info_nce, (queries, documents), {"matryoshka_dims": (16, 48), **guide})


def verify(device: str = "cpu") -> Iterator[Verdict]:
    """One verdict for each case, dtype and backend that serves it."""
    for case in cases(device):
        exact = _run(case, torch.float64, "reference", device)
        for dtype in DTYPES:
            torchs = _run(case, dtype, "reference", device)
            for backend in ("cuda", "triton", "cpu"):
                try:
                    got = _run(case, dtype, backend, device)
                except NotImplementedError:
                    continue
                yield Verdict(case.name, dtype, backend, _worst(got, exact, torchs, dtype))


def _run(case: Case, dtype: torch.dtype, backend: str, device: str) -> list[Tensor]:
    """The output and the gradients of the case's tensors."""
    tensors = [x.to(device, dtype).requires_grad_() for x in case.tensors]
    out = case.function(*tensors, **case.options, backend=backend)
    upstream = torch.linspace(-1, 1, out.numel(), dtype=torch.float64, device=device).reshape(out.shape) + 0.1
    return [out, *torch.autograd.grad(out, tensors, upstream.to(out.dtype))]


def _worst(got: list[Tensor], exact: list[Tensor], torchs: list[Tensor], dtype: torch.dtype) -> float:
    worst = 0.0
    for i, (a, b, c) in enumerate(zip(got, exact, torchs, strict=True)):
        factor = OUTPUT_FACTOR if i == 0 else GRADIENT_FACTOR
        rounding = torch.finfo(dtype).eps / 2 * b.abs().max().item()
        allowed = factor * (c.double() - b).abs().max().item() + rounding
        error = (a.double() - b).abs().max().item()
        if error != error:
            return error  # NaN
        worst = max(worst, error / allowed if allowed else float(error > 0))
    return worst
