"""Mean pooling and normalisation, forward and backward, against torch's operators and against a plain copy."""

from __future__ import annotations

from collections.abc import Callable, Iterator

import torch
import torch.nn.functional as F
from torch import Tensor

from ..ops.pooling import pool
from .harness import Row, interleave, keep_freed_memory, versus

BATCH, LENGTH, CHANNELS = 64, 256, 768


def _masked(hidden: Tensor, mask: Tensor) -> Tensor:
    """sentence-transformers' form: a mask expanded to every channel."""
    weights = mask.unsqueeze(-1).expand(hidden.shape).to(hidden.dtype)
    return F.normalize((hidden * weights).sum(1) / weights.sum(1).clamp_min(1e-9))


def _einsum(hidden: Tensor, mask: Tensor) -> Tensor:
    """The form that moves least: a product with the mask's weights."""
    weights = mask.to(hidden.dtype)
    weights = weights / weights.sum(1, keepdim=True)
    return F.normalize(torch.bmm(weights[:, None], hidden)[:, 0])


def _step(function: Callable[[Tensor], Tensor], hidden: Tensor, upstream: Tensor) -> Callable[[], object]:
    return lambda: torch.autograd.grad(function(hidden), hidden, upstream)


def rows() -> Iterator[Row]:
    for keeps_memory in (False, True):
        if keeps_memory:
            keep_freed_memory()
        memory = "freed memory kept" if keeps_memory else "glibc's defaults"
        for dtype in (torch.float32, torch.bfloat16):
            hidden = torch.randn(BATCH, LENGTH, CHANNELS).to(dtype).requires_grad_()
            lengths = torch.randint(LENGTH // 2, LENGTH + 1, (BATCH,))
            full = torch.full((BATCH,), LENGTH)
            upstream = torch.randn(BATCH, CHANNELS).to(dtype)
            mask = torch.arange(LENGTH) < full[:, None]
            work = f"mean + normalise {BATCH}×{LENGTH}×{CHANNELS} {str(dtype)[6:]}, {memory}"
            ours = _step(lambda h, n=full: pool(h, lengths=n, normalize=True), hidden, upstream)  # type: ignore[misc]
            for name, form, goal in (
                ("torch: expanded mask, as sentence-transformers", _masked, "≥ 4" if not keeps_memory else "≥ 1.9"),
                ("torch: bmm with the mask", _einsum, "≥ 1.9"),
            ):
                peer = _step(lambda h, f=form, m=mask: f(h, m), hidden, upstream)  # type: ignore[misc]
                yield versus("pooling", work, ours, peer, name, goal)
            if keeps_memory:
                to = torch.empty_like(hidden)
                seconds = interleave({"ours": ours, "copy": lambda h=hidden, t=to: t.copy_(h.detach())}, 20)  # type: ignore[misc]
                ratio = min(seconds["copy"]) / min(seconds["ours"])
                yield Row("pooling", work, "a copy of hidden (the bytes that must move)", min(seconds["ours"]) * 1e3,
                          min(seconds["copy"]) * 1e3, ratio, "≥ 0.6")  # fmt: skip
            ragged = _step(lambda h, n=lengths: pool(h, lengths=n, normalize=True), hidden, upstream)  # type: ignore[misc]
            ragged_mask = torch.arange(LENGTH) < lengths[:, None]
            peer = _step(lambda h, m=ragged_mask: _masked(h, m), hidden, upstream)  # type: ignore[misc]
            yield versus("pooling", work + ", lengths 128–256", ragged, peer, "torch: expanded mask", "≥ 1.9")
