"""Multi-layer pooling's attention on torch's own matrix products, whole sequences at a time.

The latents' queries are the same for every sequence. What is kept has 2·F + C values for each latent and sequence.
"""

from __future__ import annotations

from collections.abc import Iterator

import torch
from torch import Tensor

from ..dispatch import Backend, Rule
from ..reference.latent_pooling import Block
from ..schema import OPS, implement
from . import triton
from .latent_pooling import (
    FeedForward,
    Gradients,
    Norm,
    as_computed,
    d_softmax,
    d_unit,
    join_heads,
    product,
    split_heads,
    unit,
    wide,
)
from .latent_rows import TILE, Tile


def multi_layer_attention_forward(
    layers: Tensor,
    layer_embedding: Tensor,
    empty: Tensor | None,
    weights: list[Tensor],
    heads: int,
    normalize: bool,
    eps: float,
    keep: bool,
) -> tuple[Tensor, ...]:
    w, n = as_computed(weights, layers), len(weights[0])
    sequences = Sequences(layers, empty, n)
    layers = sequences.layers
    q = product(Norm(w, "context")(w.latents), w.to_q.T)
    x = Norm(w, "norm")(layers.to(q.dtype) + layer_embedding.to(q.dtype))
    kv = product(x.flatten(0, 1), w.to_kv.T).unflatten(0, layers.shape[:2])
    attention = LayerAttention(w, q, kv, heads)
    feed_forward = FeedForward(w, sequences.numbers, sequences.ends)
    kept = layers.shape[0] * n if keep else 0
    attended = q.new_empty(kept, layers.shape[-1])
    inner = layers.new_empty(kept, w.ff_in_bias.shape[0])
    done = 0
    for group in sequences.groups():
        rows = slice(done, done + n * len(group))
        out = attended[rows].unflatten(0, (-1, n)) if keep else None
        y = torch.add(attention.forward(group), w.latents, out=out).flatten(0, 1)
        pieces = [(b, slice(i * n, i * n + n)) for i, b in enumerate(group)]
        feed_forward.forward(y, Tile(rows, pieces), inner[rows] if keep else None)
        done = rows.stop
    pooled, gated = feed_forward.means()
    out = unit(pooled, normalize, eps).to(layers.dtype, copy=True)
    return out, pooled, gated, attended, inner, q.contiguous(), kv.contiguous()


def multi_layer_attention_backward(
    d_out: Tensor,
    layers: Tensor,
    layer_embedding: Tensor,
    empty: Tensor | None,
    weights: list[Tensor],
    heads: int,
    normalize: bool,
    eps: float,
    saved: list[Tensor],
    needs: list[bool],
) -> list[Tensor]:
    pooled, gated, attended, inner, q, kv = saved
    w, n, d = as_computed(weights, layers), len(weights[0]), Gradients(needs[2:])
    sequences = Sequences(layers, empty, n)
    attention = LayerAttention(w, q, kv, heads, d)
    feed_forward = FeedForward(w, sequences.numbers, sequences.ends, d)
    feed_forward.begin_backward(d_unit(d_out, pooled, normalize, eps), gated)
    done = 0
    for group in sequences.groups():
        rows = slice(done, done + n * len(group))
        d_y = feed_forward.backward(attended[rows], inner[rows], sequences.of(group)).unflatten(0, (-1, n))
        d.add("latents", d_y.sum(0))
        attention.backward(d_y, group)
        done = rows.stop
    attention.end_backward()
    context, d_q = Norm(w, "context", d), join_heads(attention.d_q).to(q.dtype)
    d.add_product("to_q", d_q.T, context(w.latents))
    d.add("latents", context.backward(product(d_q, w.to_q), w.latents))
    some = index(sequences.some)
    norm, x = Norm(w, "norm", d), sequences.layers[some].to(q.dtype) + layer_embedding.to(q.dtype)
    d_kv = attention.d_kv[some].flatten(0, 1)
    d.add_product("to_kv", d_kv.T, norm(x).flatten(0, 1))
    d_x = norm.backward(product(d_kv, w.to_kv).unflatten(0, x.shape[:2]), x)
    d_layers = layers.new_zeros(layers.shape if needs[0] else (0,))
    if needs[0]:
        d_layers[some] = d_x.to(layers.dtype)
    d_embedding = d_x.sum(0).to(layer_embedding.dtype) if needs[1] else layer_embedding.new_empty(0)
    return [d_layers, d_embedding, *d.of(weights)]


class LayerAttention:
    """Latents attend to the layers of each sequence. The queries are the same for all sequences, and the projection of
    the output goes through the values, U = V·Woᵀ of each head: there are far fewer layers than latents.
    """

    def __init__(self, w: Block, q: Tensor, kv: Tensor, heads: int, d: Gradients | None = None) -> None:
        self.d, self.heads, self.kv = d, heads, kv  # kv (B, K, 2·H·D)
        self.scale = (w.to_q.shape[0] // heads) ** -0.5
        self.q = split_heads(q, heads)  # (H, N, D)
        self.wo = split_heads(w.to_out, heads)  # (H, C, D)
        if d is not None:
            self.d_q, self.d_kv = torch.zeros_like(wide(self.q)), torch.zeros_like(kv)
            self.d_wo = torch.zeros_like(wide(self.wo)) if d.needed["to_out"] else None

    def weights(self, group: list[int]) -> tuple[Tensor, ...]:
        """k, v (H, S·K, D) of S sequences, the weights (S, N, H·K), and U (S, H·K, C)"""
        k, v = split_heads(self.kv[index(group)].flatten(0, 1), 2 * self.heads).chunk(2)
        p = product(self.q, k.mT).mul(self.scale).unflatten(2, (len(group), -1)).softmax(-1)  # (H, N, S, K)
        u = product(v, self.wo.mT).unflatten(1, (len(group), -1))  # (H, S, K, C)
        return k, v, p.permute(2, 1, 0, 3).flatten(2), u.transpose(0, 1).flatten(1, 2)

    def forward(self, group: list[int]) -> Tensor:
        _, _, p, u = self.weights(group)
        return product(p, u)  # (S, N, C)

    def backward(self, d_out: Tensor, group: list[int]) -> None:
        k, v, p, u = self.weights(group)
        d_u = product(p.mT, d_out).unflatten(1, (self.heads, -1)).transpose(0, 1).flatten(1, 2)  # (H, S·K, C)
        if self.d_wo is not None:
            product(d_u.mT, v, self.d_wo, add=True)
        by_head = p.unflatten(2, (self.heads, -1))
        d_s = d_softmax(product(d_out, u.mT).unflatten(2, (self.heads, -1)), by_head)
        d_s = d_s.permute(2, 1, 0, 3).flatten(2) * self.scale  # (H, N, S·K)
        product(d_s, k, self.d_q, add=True)
        d_kv = torch.cat([product(d_s.mT, self.q), product(d_u, self.wo)])  # (2H, S·K, D)
        self.d_kv[index(group)] = join_heads(d_kv).unflatten(0, (len(group), -1))

    def end_backward(self) -> None:
        if self.d is not None and self.d_wo is not None:
            self.d.add("to_out", join_heads(self.d_wo))


class Sequences:
    """Which are computed: on a CPU those with layers; on a GPU, which isn't asked, all, empty ones as zeros."""

    def __init__(self, layers: Tensor, empty: Tensor | None, rows: int) -> None:
        self.layers, self.rows, batch = layers, rows, layers.shape[0]
        self.some = list(range(batch))
        self.numbers = torch.full((batch,), rows, device=layers.device)
        self.ends = self.numbers.cumsum(0)
        if empty is not None:
            self.numbers = self.numbers.masked_fill(empty, 0)
            if triton.fused(layers) is None:
                self.some = [b for b, none in enumerate(empty.tolist()) if not none]
            else:
                self.layers = layers.masked_fill(empty[:, None, None], 0)

    def groups(self) -> Iterator[list[int]]:
        """Whole sequences, a tile's worth at a time."""
        size = max(1, TILE[self.layers.device.type] // self.rows)
        for begin in range(0, len(self.some), size):
            yield self.some[begin : begin + size]

    def of(self, group: list[int]) -> Tensor:
        """The sequence of each of the group's rows."""
        return torch.arange(len(self.numbers), device=self.numbers.device)[index(group)].repeat_interleave(self.rows)


def index(group: list[int]) -> list[int] | slice:
    """A slice where it can be one: a list is copied to the GPU, which waits."""
    whole = bool(group) and group[-1] - group[0] == len(group) - 1
    return slice(group[0], group[-1] + 1) if whole else group


implement("multi_layer_attention_forward", multi_layer_attention_forward)
implement("multi_layer_attention_backward", multi_layer_attention_backward)

_CPU = Rule(lambda call: call["layers"].device.type != "cpu", "layers is on {layers.device.type}")

MULTI_LAYER = tuple(
    Backend(name, rules, OPS.multi_layer_attention_forward.default, OPS.multi_layer_attention_backward.default)
    for name, rules in (("triton", triton.rules("layers")), ("cpu", (_CPU,)))
)
