"""Mean pooling and normalisation against torch's operators and a plain copy, latent attention and multi-layer pooling
against the modules as their papers' code writes them; forward and backward."""

from __future__ import annotations

from collections.abc import Callable, Iterator

import torch
import torch.nn.functional as F
from torch import Tensor

from ..ops.latent_pooling import latent_attention, multi_layer_attention
from ..ops.pooling import pool
from ..reference.latent_pooling import Block
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


def random_block(num_latents: int, heads: int, head_dim: int, width: int = 1024, inner: int = 4096) -> Block:
    def matrix(out: int, terms: int) -> Tensor:
        return torch.randn(out, terms) / terms**0.5

    attention = matrix(heads * head_dim, width), matrix(2 * heads * head_dim, width), matrix(width, heads * head_dim)
    norms = [torch.ones(width), torch.zeros(width)] * 3
    feed_forward = matrix(2 * inner, width), torch.zeros(2 * inner), matrix(width, inner), torch.zeros(width)
    tensors = torch.randn(num_latents, width), *attention, *norms, *feed_forward
    return Block(*(x.clone().requires_grad_() for x in tensors))


def _latents() -> Iterator[Row]:
    """At the released models' shapes ÷ 4. The references are those modules, keys and values for each sequence."""

    def against(function: Callable[..., Tensor], inputs: tuple[Tensor, ...], heads: int, work: str, goal: str) -> Row:
        upstream = torch.randn(inputs[0].shape[0], inputs[0].shape[-1])

        def step(backend: str | None) -> Callable[[], object]:
            return lambda: torch.autograd.grad(function(*inputs, heads, backend=backend), inputs, upstream)

        name = "NV-Embed's module as written" if function is latent_attention else "the paper's module as written"
        return versus("pooling", work, step(None), step("reference"), name, goal, rounds=3)

    block = random_block(num_latents=128, heads=8, head_dim=1024)
    for length, batch, goal in ((512, 6, "≥ 2.5"), (128, 48, "≥ 4")):
        hidden = torch.randn(batch, length, 1024, requires_grad=True)
        work = f"latent attention {batch}×{length}×1024, 128 latents, 8 heads of 1024, float32"
        yield against(latent_attention, (hidden, *block), 8, work, goal)
    block = random_block(num_latents=192, heads=32, head_dim=512)
    layers, embedding = torch.randn(8, 8, 1024, requires_grad=True), torch.randn(8, 1024, requires_grad=True)
    work = "multi-layer attention 8×8 layers×1024, 192 latents, 32 heads of 512, float32"
    yield against(multi_layer_attention, (layers, embedding, *block), 32, work, "≥ 3")


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
    yield from _latents()
