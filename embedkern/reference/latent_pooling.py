"""The specification of latent attention (NV-Embed, Lee et al. 2024) and of multi-layer pooling (Tang & Yang 2024), in
plain differentiable PyTorch, as their authors wrote them. backends/latent_pooling.py computes the same with less work.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from . import pooling

NORM_EPS = 1e-5  # nn.LayerNorm's


class Block(NamedTuple):
    """The weights of a cross-attention and its feed-forward. N latents, width C, H heads of D, F = ff_mult · C."""

    latents: Tensor  # (N, C)
    to_q: Tensor  # (H · D, C)
    to_kv: Tensor  # (2 · H · D, C)
    to_out: Tensor  # (C, H · D)
    norm_weight: Tensor  # (C,), as every norm's: of the tokens or layers
    norm_bias: Tensor
    context_weight: Tensor  # of the latents
    context_bias: Tensor
    ff_norm_weight: Tensor
    ff_norm_bias: Tensor
    ff_in_weight: Tensor  # (2 · F, C): values, then gates
    ff_in_bias: Tensor  # (2 · F,)
    ff_out_weight: Tensor  # (C, F)
    ff_out_bias: Tensor  # (C,)


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
    lengths: Tensor | None,
    mask: Tensor | None,
    cu_seqlens: Tensor | None,
    skip: Tensor | None,
    normalize: bool,
    eps: float,
) -> Tensor:
    weights = (latents, to_q, to_kv, to_out, norm_weight, norm_bias, context_weight, context_bias, ff_norm_weight,
               ff_norm_bias, ff_in_weight, ff_in_bias, ff_out_weight, ff_out_bias)  # fmt: skip
    w = Block(*(x.to(hidden.dtype) for x in weights))
    rows, _ = pooled_rows(hidden, lengths, mask, cu_seqlens, skip)
    pooled = torch.zeros(hidden.shape[:-1], dtype=torch.bool, device=hidden.device)
    pooled[rows] = True
    x = torch.where(pooled[..., None], hidden, 0)  # the others are computed here, but not read
    x = x if hidden.ndim == 3 else x[None]  # (B, L, C)
    context = _norm(w.latents, w.context_weight, w.context_bias).expand(x.shape[0], -1, -1)
    x = _attend(_norm(x, w.norm_weight, w.norm_bias), context, w, num_heads) + x
    x = _feed_forward(_norm(x, w.ff_norm_weight, w.ff_norm_bias), w) + x
    options = ("mean",), lengths, mask, cu_seqlens, skip, None, hidden.shape[-1], normalize, eps
    return pooling.pool(x if hidden.ndim == 3 else x[0], *options)


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
    empty: Tensor | None,
    normalize: bool,
    eps: float,
) -> Tensor:
    weights = (latents, to_q, to_kv, to_out, norm_weight, norm_bias, context_weight, context_bias, ff_norm_weight,
               ff_norm_bias, ff_in_weight, ff_in_bias, ff_out_weight, ff_out_bias)  # fmt: skip
    w = Block(*(x.to(layers.dtype) for x in weights))
    if empty is not None:
        layers = torch.where(empty[:, None, None], 0, layers)
    x = _norm(layers + layer_embedding.to(layers.dtype), w.norm_weight, w.norm_bias)  # (B, layers, C)
    y = w.latents.expand(layers.shape[0], -1, -1)  # (B, N, C)
    y = _attend(_norm(y, w.context_weight, w.context_bias), x, w, num_heads) + y
    y = _feed_forward(_norm(y, w.ff_norm_weight, w.ff_norm_bias), w) + y
    if empty is not None:
        y = torch.where(empty[:, None, None], 0, y)
    places = None, None, None, None, None
    return pooling.pool(y, ("mean",), *places, layers.shape[-1], normalize, eps)


def _norm(x: Tensor, weight: Tensor, bias: Tensor) -> Tensor:
    return F.layer_norm(x, x.shape[-1:], weight, bias, NORM_EPS)


def _attend(queries: Tensor, context: Tensor, w: Block, heads: int) -> Tensor:
    """queries (B, n, C), context (B, m, C) → (B, n, C)."""
    k, v = F.linear(context, w.to_kv).chunk(2, -1)
    q, k, v = (x.unflatten(-1, (heads, -1)).transpose(1, 2) for x in (F.linear(queries, w.to_q), k, v))
    scores = q @ k.mT * q.shape[-1] ** -0.5
    wide = scores.dtype if scores.dtype == torch.float64 else torch.float32
    weights = scores.softmax(-1, dtype=wide).to(scores.dtype)  # (B, H, n, m)
    return F.linear((weights @ v).transpose(1, 2).flatten(2), w.to_out)


def _feed_forward(x: Tensor, w: Block) -> Tensor:
    values, gates = F.linear(x, w.ff_in_weight, w.ff_in_bias).chunk(2, -1)
    return F.linear(values * F.gelu(gates), w.ff_out_weight, w.ff_out_bias)


def pooled_rows(
    hidden: Tensor, lengths: Tensor | None, mask: Tensor | None, cu_seqlens: Tensor | None, skip: Tensor | None
) -> tuple[tuple[Tensor, ...], Tensor]:
    """The rows that are pooled, as an index into hidden (…, C) of tensors (n,), and how many each sequence has (B,)."""
    bounds, real = pooling.segments(hidden, lengths, mask, cu_seqlens, None)
    sequences = torch.arange(bounds.shape[0], device=hidden.device).repeat_interleave(bounds[:, 1] - bounds[:, 0])
    if skip is not None:
        if (skip < 0).any():
            raise ValueError(f"skip must be ≥ 0, got {skip.tolist()}")
        ranks = real.cumsum(0)
        before = torch.nn.functional.pad(ranks, (1, 0))[bounds[:, 0]]
        real = real & (ranks - before[sequences] > skip[sequences])
    (rows,) = real.nonzero(as_tuple=True)
    counts = torch.bincount(sequences[rows], minlength=bounds.shape[0])
    return (rows,) if hidden.ndim == 2 else (rows // hidden.shape[1], rows % hidden.shape[1]), counts
