"""NV-Embed's latent attention and multi-layer trainable pooling, with their checkpoints' state-dict keys."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from ..ops.latent_pooling import latent_attention, multi_layer_attention
from ..reference.latent_pooling import Block
from .layer_pooling import PoolsLayers


class _Attention(nn.Module):
    """Weights only, as in the next three: `latent_attention` and `multi_layer_attention` compute."""

    def __init__(self, width: int, rows: int) -> None:
        super().__init__()
        self.to_q = nn.Linear(width, rows, bias=False)
        self.to_kv = nn.Linear(width, 2 * rows, bias=False)
        self.to_out = nn.Linear(rows, width, bias=False)


class _FeedForward(nn.Module):
    def __init__(self, width: int, inner: int) -> None:
        super().__init__()
        self.net = nn.Sequential(nn.Linear(width, 2 * inner), nn.GELU(), nn.Linear(inner, width))


class _PreNorm(nn.Module):
    def __init__(self, width: int, fn: nn.Module, context: bool = False) -> None:
        super().__init__()
        self.fn = fn
        self.norm = nn.LayerNorm(width)
        if context:
            self.norm_context = nn.LayerNorm(width)


class _LatentBlock(nn.Module):
    def __init__(self, width: int, num_latents: int, num_heads: int, head_dim: int, ff_mult: int) -> None:
        super().__init__()
        sizes = {"hidden_size": width, "num_latents": num_latents, "num_heads": num_heads, "head_dim": head_dim,
                 "ff_mult": ff_mult}  # fmt: skip
        for name, size in sizes.items():
            if size < 1:
                raise ValueError(f"{name} must be ≥ 1, got {size}")
        self.num_heads = num_heads
        self.latents = nn.Parameter(torch.randn(num_latents, width))
        attention = _PreNorm(width, _Attention(width, num_heads * head_dim), context=True)
        self.cross_attend_blocks = nn.ModuleList([attention, _PreNorm(width, _FeedForward(width, ff_mult * width))])

    def block(self) -> Block:
        first: Any = self.cross_attend_blocks[0]
        second: Any = self.cross_attend_blocks[1]
        attention, (ff_in, _, ff_out) = first.fn, second.fn.net
        norms = (first.norm, first.norm_context, second.norm)
        return Block(
            self.latents,
            *(layer.weight for layer in (attention.to_q, attention.to_kv, attention.to_out)),
            *(x for norm in norms for x in (norm.weight, norm.bias)),
            *(x for layer in (ff_in, ff_out) for x in (layer.weight, layer.bias)),
        )


class LatentAttentionPooling(_LatentBlock):
    """NV-Embed's pooling (Lee et al. 2024), see `embedkern.latent_attention`; loads the released checkpoint's keys.

    forward(hidden, *, lengths | mask | cu_seqlens, skip) → (B, hidden_size).
    """

    def __init__(
        self,
        hidden_size: int = 4096,
        num_latents: int = 512,
        num_heads: int = 8,
        head_dim: int = 4096,
        ff_mult: int = 4,
        normalize: bool = True,
    ) -> None:
        super().__init__(hidden_size, num_latents, num_heads, head_dim, ff_mult)
        self.normalize = normalize

    def forward(
        self,
        hidden: Tensor,
        *,
        lengths: Tensor | None = None,
        mask: Tensor | None = None,
        cu_seqlens: Tensor | None = None,
        skip: int | Tensor | None = None,
    ) -> Tensor:
        return latent_attention(
            hidden,
            *self.block(),
            self.num_heads,
            lengths=lengths,
            mask=mask,
            cu_seqlens=cu_seqlens,
            skip=skip,
            normalize=self.normalize,
        )

    def extra_repr(self) -> str:
        return f"num_heads={self.num_heads}, normalize={self.normalize}"


class MultiLayerPooling(_LatentBlock, PoolsLayers):
    """Multi-layers trainable pooling (Tang & Yang 2024), see `embedkern.multi_layer_attention`, of each layer's pooled
    tokens.

    forward(hidden_states, *, lengths | mask | cu_seqlens, skip) → (B, hidden_size), of num_layers tensors (B, L, C) or
    (T, C), or one more: the first, the embeddings, is dropped. `collect` does the same while the model runs.
    """

    def __init__(
        self,
        num_layers: int = 32,
        hidden_size: int = 4096,
        num_latents: int = 768,
        num_heads: int = 32,
        head_dim: int = 2048,
        ff_mult: int = 4,
        token_pooling: str = "mean",
        normalize: bool = True,
    ) -> None:
        super().__init__(hidden_size, num_latents, num_heads, head_dim, ff_mult)
        if num_layers < 1:
            raise ValueError(f"num_layers must be ≥ 1, got {num_layers}")
        if token_pooling not in ("mean", "lasttoken"):
            raise ValueError(f"token_pooling must be 'mean' or 'lasttoken', got {token_pooling!r}")
        self.pos_emb = nn.Embedding(num_layers, hidden_size)
        self.num_layers, self.token_pooling, self.normalize = num_layers, token_pooling, normalize

    def embed(self, pooled: list[Tensor], empty: Tensor) -> Tensor:
        layers = torch.stack(pooled, 1)
        return multi_layer_attention(
            layers, self.pos_emb.weight, *self.block(), self.num_heads, empty=empty, normalize=self.normalize
        )

    def extra_repr(self) -> str:
        return (
            f"num_layers={self.num_layers}, num_heads={self.num_heads}, token_pooling={self.token_pooling!r}, "
            f"normalize={self.normalize}"
        )
