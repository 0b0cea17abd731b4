"""Latent attention and multi-layer pooling on torch's own matrix products, a tile of rows at a time.

The latents are the same for every token, so what is computed of them is computed once a call. With M = K·Wq and
G = V·Woᵀ of each head (absorbed projections), a token's attention is softmax(x·Mᵀ)·G: 4·C·H·N operations instead of
4·C·H·D + 4·D·H·N. The feed-forward's last linear map comes after the mean. What is kept for the backward pass has C and
2·F values a row; the H·N weights are computed again.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from itertools import accumulate
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from ..dispatch import Backend, Rule
from ..reference.latent_pooling import NORM_EPS, Block, pooled_rows
from ..schema import OPS, absorbs, implement

TILE = 1024  # rows; the gradient of the feed-forward's first matrix is read and written once a tile

aten = torch.ops.aten


class Tile(NamedTuple):
    rows: slice
    pieces: list[tuple[int, slice]]  # (sequence, its rows, counted from the tile's first)


def tiles(counts: Sequence[int]) -> Iterator[Tile]:
    """Rows of sequences that follow each other, in tiles that may cut sequences."""
    ends = list(accumulate(counts))
    sequence, total = 0, ends[-1] if ends else 0
    for begin in range(0, total, TILE):
        end, at = min(begin + TILE, total), begin
        pieces = []
        while at < end:
            while ends[sequence] <= at:
                sequence += 1
            to = min(ends[sequence], end)
            pieces.append((sequence, slice(at - begin, to - begin)))
            at = to
        yield Tile(slice(begin, end), pieces)


def add_pieces(sums: Tensor, x: Tensor, tile: Tile) -> None:
    """sums[sequence] += Σ its rows of x."""
    for sequence, rows in tile.pieces:
        sums[sequence] += x[rows].sum(0)


class Norm:
    """A layer norm whose backward pass adds up the gradients of its weight and bias, where they are wanted."""

    def __init__(self, weight: Tensor, bias: Tensor, d_weight: Tensor | None, d_bias: Tensor | None) -> None:
        self.weight, self.bias, self.d_weight, self.d_bias = weight, bias, d_weight, d_bias

    def __call__(self, x: Tensor) -> Tensor:
        out, self.mean, self.rstd = torch.native_layer_norm(x, x.shape[-1:], self.weight, self.bias, NORM_EPS)
        return out

    def backward(self, d_out: Tensor, x: Tensor) -> Tensor:
        """Right after the call with the same x."""
        needs = [True, self.d_weight is not None, self.d_bias is not None]
        shape = list(x.shape[-1:])
        d_x, d_weight, d_bias = aten.native_layer_norm_backward(
            d_out, x, shape, self.mean, self.rstd, self.weight, self.bias, needs
        )
        add(self.d_weight, d_weight)
        add(self.d_bias, d_bias)
        return d_x


def add(sums: Tensor | None, x: Tensor) -> None:
    if sums is not None:
        sums += x


def add_product(sums: Tensor | None, a: Tensor, b: Tensor) -> None:
    """sums += a·b, also of batches."""
    if sums is not None:
        (sums.addmm_ if a.ndim == 2 else sums.baddbmm_)(a, b)


class FeedForward:
    """The residual feed-forward of rows and each sequence's mean: mean(y) + mean(g)·W2ᵀ + b2, g = a·gelu(gate)."""

    def __init__(self, w: Block, d: Block | None, counts: Sequence[int]) -> None:
        self.w, self.d, self.counts = w, d, counts
        width, inner = w.ff_out_weight.shape
        self.norm = Norm(w.ff_norm_weight, w.ff_norm_bias, d and d.ff_norm_weight, d and d.ff_norm_bias)
        self.inner = inner
        self.per_row = w.latents.new_tensor([1 / max(n, 1) for n in counts])[:, None]  # (B, 1)
        if d is None:
            self.attended = w.latents.new_zeros(len(counts), width)
            self.gated = w.latents.new_zeros(len(counts), inner)

    def forward(self, y: Tensor, tile: Tile, keep: Tensor | None) -> None:
        """y (t, C); what the backward pass needs is written to keep (t, 2F)."""
        u = keep if keep is not None and keep.dtype == y.dtype else y.new_empty(y.shape[0], 2 * self.inner)
        torch.addmm(self.w.ff_in_bias, self.norm(y), self.w.ff_in_weight.T, out=u)
        if keep is not None and keep is not u:
            keep.copy_(u)
        a, gate = u.chunk(2, 1)
        add_pieces(self.attended, y, tile)
        add_pieces(self.gated, F.gelu(gate).mul_(a), tile)

    def means(self) -> tuple[Tensor, Tensor]:
        """The pooled rows (B, C), 0 where there are none, and the means of g (B, F)."""
        gated = self.gated * self.per_row
        some = (self.w.latents.new_tensor(self.counts) > 0)[:, None]
        return self.attended * self.per_row + F.linear(gated, self.w.ff_out_weight, self.w.ff_out_bias) * some, gated

    def begin_backward(self, d_pooled: Tensor, gated: Tensor) -> None:
        w, d = self.w, self.d
        assert d is not None
        some = [i for i, n in enumerate(self.counts) if n]
        add_product(d.ff_out_weight, d_pooled[some].T, gated[some])
        add(d.ff_out_bias, d_pooled[some].sum(0))
        self.d_y = d_pooled * self.per_row
        self.d_gated = self.d_y @ w.ff_out_weight

    def backward(self, y: Tensor, u: Tensor, sequences: Tensor) -> Tensor:
        """The gradient of y (t, C), whose rows are of `sequences` (t,)."""
        d = self.d
        assert d is not None
        a, gate = u.to(y.dtype).chunk(2, 1)
        d_g = self.d_gated.index_select(0, sequences)
        d_u = y.new_empty(u.shape)
        torch.mul(F.gelu(gate), d_g, out=d_u[:, : self.inner])
        aten.gelu_backward.grad_input(d_g.mul_(a), gate, grad_input=d_u[:, self.inner :])
        add_product(d.ff_in_weight, d_u.T, self.norm(y))
        add(d.ff_in_bias, d_u.sum(0) if d.ff_in_bias is not None else d_u)
        return self.norm.backward(d_u @ self.w.ff_in_weight, y) + self.d_y.index_select(0, sequences)


class Absorbed:
    """Tokens attend to latents through M = scale·K·Wq and G = V·Woᵀ, both (H·N, C)."""

    def __init__(self, w: Block, kv: Tensor, heads: int, d: Block | None, tables: Tensor | None = None) -> None:
        self.w, self.heads, self.d, self.n = w, heads, d, w.latents.shape[0]
        self.scale = (w.to_q.shape[0] // heads) ** -0.5
        self.k, self.v = split_heads(kv, 2 * heads).chunk(2)  # (H, N, D)
        self.wq, self.wo = w.to_q.unflatten(0, (heads, -1)), split_heads(w.to_out, heads)  # (H, D, C), (H, C, D)
        if tables is None:
            tables = torch.stack([self.k @ self.wq * self.scale, self.v @ self.wo.mT]).flatten(1, 2)
        self.tables, (self.m, self.g) = tables, tables
        needed = d is not None and any(x is not None for x in d[:4] + d[6:8])  # all but the tokens' norm
        self.d_m, self.d_g = (torch.zeros_like(x) if needed else None for x in tables)

    def weights(self, x: Tensor) -> Tensor:
        return (x @ self.m.T).unflatten(1, (self.heads, self.n)).softmax(-1)

    def forward(self, x: Tensor) -> Tensor:
        return self.weights(x).flatten(1) @ self.g

    def backward(self, d_out: Tensor, x: Tensor) -> Tensor:
        p = self.weights(x)
        add_product(self.d_g, p.flatten(1).T, d_out)
        d_s = d_softmax((d_out @ self.g.T).view_as(p), p).flatten(1)
        add_product(self.d_m, d_s.T, x)
        return d_s @ self.m

    def end_backward(self) -> Tensor | None:
        """The gradient of kv (N, 2·H·D); those of the projections are added."""
        if self.d_m is None or self.d_g is None or self.d is None:
            return None
        d_m, d_g = (x.unflatten(0, (self.heads, -1)) for x in (self.d_m * self.scale, self.d_g))  # (H, N, C)
        if self.d.to_q is not None:
            add(self.d.to_q, (self.k.mT @ d_m).flatten(0, 1))
        if self.d.to_out is not None:
            add(self.d.to_out, join_heads(d_g.mT @ self.v))
        return join_heads(torch.cat([d_m @ self.wq.mT, d_g @ self.wo]))


class AsWritten:
    """Tokens attend to latents through all projections, which is less work with more latents than a head has dims."""

    def __init__(self, w: Block, kv: Tensor, heads: int, d: Block | None, tables: Tensor | None = None) -> None:
        self.w, self.heads, self.d = w, heads, d
        self.scale = (w.to_q.shape[0] // heads) ** -0.5
        self.tables = kv.new_empty(0)
        self.k, self.v = split_heads(kv, 2 * heads).chunk(2)  # (H, N, D)
        self.d_k, self.d_v = torch.zeros_like(self.k), torch.zeros_like(self.v)

    def weights(self, x: Tensor) -> tuple[Tensor, Tensor]:
        q = split_heads(x @ self.w.to_q.T, self.heads)
        return q, (q @ self.k.mT * self.scale).softmax(-1)  # (H, t, D), (H, t, N)

    def forward(self, x: Tensor) -> Tensor:
        return join_heads(self.weights(x)[1] @ self.v) @ self.w.to_out.T

    def backward(self, d_out: Tensor, x: Tensor) -> Tensor:
        assert self.d is not None
        q, p = self.weights(x)
        if self.d.to_out is not None:
            add_product(self.d.to_out, d_out.T, join_heads(p @ self.v))
        d_o = split_heads(d_out @ self.w.to_out, self.heads)
        add_product(self.d_v, p.mT, d_o)
        d_s = d_softmax(d_o @ self.v.mT, p) * self.scale
        add_product(self.d_k, d_s.mT, q)
        d_q = join_heads(d_s @ self.k)
        add_product(self.d.to_q, d_q.T, x)
        return d_q @ self.w.to_q

    def end_backward(self) -> Tensor:
        return join_heads(torch.cat([self.d_k, self.d_v]))


def split_heads(x: Tensor, heads: int) -> Tensor:
    """(t, H·D) → (H, t, D)"""
    return x.unflatten(1, (heads, -1)).transpose(0, 1)


def join_heads(x: Tensor) -> Tensor:
    """(H, t, D) → (t, H·D)"""
    return x.transpose(0, 1).flatten(1)


def d_softmax(d_p: Tensor, p: Tensor) -> Tensor:
    return torch._softmax_backward_data(d_p, p, -1, p.dtype)


def widen(weights: Sequence[Tensor], like: Tensor) -> Block:
    """Low precision is computed in float32: the CPU's products of it are slower and round more."""
    wide = like.dtype if like.dtype == torch.float64 else torch.float32
    return Block(*(x.to(wide) for x in weights))


def wanted(w: Block, needs: Sequence[bool]) -> Block:
    """Zeros for each gradient that is needed, None for the others."""
    return Block(*(torch.zeros_like(x, memory_format=torch.contiguous_format) if need else None
                   for x, need in zip(w, needs, strict=True)))  # type: ignore[arg-type]  # fmt: skip


def found(d: Block, weights: Sequence[Tensor]) -> list[Tensor]:
    return [x.new_empty(0) if g is None else g.to(x.dtype) for g, x in zip(d, weights, strict=True)]


def unit(pooled: Tensor, normalize: bool, eps: float) -> Tensor:
    if not normalize:
        return pooled
    norm = torch.linalg.vector_norm(pooled, dim=1, keepdim=True)
    return pooled / torch.where(norm <= eps, 1.0 if eps == 0 else eps, norm)


def d_unit(d_out: Tensor, pooled: Tensor, normalize: bool, eps: float) -> Tensor:
    d_out = d_out.to(pooled.dtype)
    if not normalize:
        return d_out
    norm = torch.linalg.vector_norm(pooled, dim=1, keepdim=True)
    short = norm <= eps
    divisor = torch.where(short, 1.0 if eps == 0 else eps, norm)
    out = pooled / divisor
    along = torch.where(short, 0, (out * d_out).sum(1, keepdim=True))
    return (d_out - out * along) / divisor


def latent_attention_forward(
    hidden: Tensor,
    lengths: Tensor | None,
    mask: Tensor | None,
    cu_seqlens: Tensor | None,
    skip: Tensor | None,
    weights: list[Tensor],
    heads: int,
    normalize: bool,
    eps: float,
    keep: bool,
) -> tuple[Tensor, ...]:
    w = widen(weights, hidden)
    rows, numbers = pooled_rows(hidden, lengths, mask, cu_seqlens, skip)
    counts = numbers.tolist()
    kv = Norm(w.context_weight, w.context_bias, None, None)(w.latents) @ w.to_kv.T
    attention = (Absorbed if absorbs(w.latents, w.to_q, heads) else AsWritten)(w, kv, heads, None)
    norm, feed_forward = Norm(w.norm_weight, w.norm_bias, None, None), FeedForward(w, None, counts)
    kept = hidden.shape[:-1].numel() if keep else 0
    attended = kv.new_empty(kept, hidden.shape[-1])
    inner = hidden.new_empty(kept, w.ff_in_bias.shape[0])
    for tile in tiles(counts):
        x = hidden[tuple(i[tile.rows] for i in rows)].to(kv.dtype)
        y = x.add_(attention.forward(norm(x)))
        if keep:
            attended[tile.rows] = y
        feed_forward.forward(y, tile, inner[tile.rows] if keep else None)
    pooled, gated = feed_forward.means()
    return (
        unit(pooled, normalize, eps).to(hidden.dtype, copy=True),
        pooled,
        gated,
        attended,
        inner,
        kv,
        attention.tables,
    )


def latent_attention_backward(
    d_out: Tensor,
    hidden: Tensor,
    lengths: Tensor | None,
    mask: Tensor | None,
    cu_seqlens: Tensor | None,
    skip: Tensor | None,
    weights: list[Tensor],
    heads: int,
    normalize: bool,
    eps: float,
    saved: list[Tensor],
    needs: list[bool],
) -> list[Tensor]:
    pooled, gated, attended, inner, kv, tables = saved
    w = widen(weights, hidden)
    d = wanted(w, needs[1:])
    rows, numbers = pooled_rows(hidden, lengths, mask, cu_seqlens, skip)
    counts = numbers.tolist()
    sequences = torch.arange(len(counts), device=hidden.device).repeat_interleave(numbers)
    absorbed = absorbs(w.latents, w.to_q, heads)
    attention = (Absorbed if absorbed else AsWritten)(w, kv, heads, d, tables)
    norm, feed_forward = Norm(w.norm_weight, w.norm_bias, d.norm_weight, d.norm_bias), FeedForward(w, d, counts)
    d_hidden = hidden.new_zeros(hidden.shape if needs[0] else (0,))
    feed_forward.begin_backward(d_unit(d_out, pooled, normalize, eps), gated)
    for tile in tiles(counts):
        index = tuple(i[tile.rows] for i in rows)
        x = hidden[index].to(kv.dtype)
        d_y = feed_forward.backward(attended[tile.rows], inner[tile.rows], sequences[tile.rows])
        d_x = norm.backward(attention.backward(d_y, norm(x)), x)
        if needs[0]:
            d_hidden[index] = d_x.add_(d_y).to(hidden.dtype)
    d_kv = attention.end_backward()
    if d_kv is not None:
        context = Norm(w.context_weight, w.context_bias, d.context_weight, d.context_bias)
        add_product(d.to_kv, d_kv.T, context(w.latents))
        add(d.latents, context.backward(d_kv @ w.to_kv, w.latents))
    return [d_hidden, *found(d, weights)]


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
    w = widen(weights, layers)
    batch, n = layers.shape[0], len(w.latents)
    counts = sequence_rows(batch, n, empty)
    q = Norm(w.context_weight, w.context_bias, None, None)(w.latents) @ w.to_q.T
    x = layers.to(q.dtype) + layer_embedding.to(q.dtype)
    kv = (Norm(w.norm_weight, w.norm_bias, None, None)(x).flatten(0, 1) @ w.to_kv.T).unflatten(0, x.shape[:2])
    attention, feed_forward = LayerAttention(w, q, kv, heads, None), FeedForward(w, None, counts)
    kept = batch * n if keep else 0
    attended = q.new_empty(kept, layers.shape[-1])
    inner = layers.new_empty(kept, w.ff_in_bias.shape[0])
    done = 0
    for group in sequence_groups(counts):
        y = (attention.forward(group) + w.latents).flatten(0, 1)
        whole = Tile(slice(done, done + len(y)), [(b, slice(i * n, i * n + n)) for i, b in enumerate(group)])
        if keep:
            attended[whole.rows] = y
        feed_forward.forward(y, whole, inner[whole.rows] if keep else None)
        done += len(y)
    pooled, gated = feed_forward.means()
    return unit(pooled, normalize, eps).to(layers.dtype, copy=True), pooled, gated, attended, inner, q, kv


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
    w = widen(weights, layers)
    d = wanted(w, needs[2:])
    n = len(w.latents)
    counts = sequence_rows(layers.shape[0], n, empty)
    attention, feed_forward = LayerAttention(w, q, kv, heads, d), FeedForward(w, d, counts)
    feed_forward.begin_backward(d_unit(d_out, pooled, normalize, eps), gated)
    done = 0
    for group in sequence_groups(counts):
        rows = slice(done, done + n * len(group))
        sequences = torch.tensor(group, device=q.device).repeat_interleave(n)
        d_y = feed_forward.backward(attended[rows], inner[rows], sequences).unflatten(0, (-1, n))
        add(d.latents, d_y.sum(0))
        attention.backward(d_y, group)
        done = rows.stop
    context = Norm(w.context_weight, w.context_bias, d.context_weight, d.context_bias)
    add_product(d.to_q, attention.d_q.T, context(w.latents))
    add(d.latents, context.backward(attention.d_q @ w.to_q, w.latents))
    norm, x = (
        Norm(w.norm_weight, w.norm_bias, d.norm_weight, d.norm_bias),
        layers.to(q.dtype) + layer_embedding.to(q.dtype),
    )
    some = [i for i, count in enumerate(counts) if count]
    x, d_kv = x[some], attention.d_kv[some].flatten(0, 1)
    add_product(d.to_kv, d_kv.T, norm(x).flatten(0, 1))
    d_x = norm.backward((d_kv @ w.to_kv).view_as(x), x)
    d_layers = layers.new_zeros(layers.shape if needs[0] else (0,))
    if needs[0]:
        d_layers[some] = d_x.to(layers.dtype)
    d_embedding = d_x.sum(0).to(layer_embedding.dtype) if needs[1] else layer_embedding.new_empty(0)
    return [d_layers, d_embedding, *found(d, weights)]


class LayerAttention:
    """Latents attend to the layers of each sequence. The queries are the same for all sequences, and the projection of
    the output goes through the values, U = V·Woᵀ of each head: there are far fewer layers than latents.
    """

    def __init__(self, w: Block, q: Tensor, kv: Tensor, heads: int, d: Block | None) -> None:
        self.d, self.heads, self.kv = d, heads, kv  # kv (B, K, 2·H·D)
        self.scale = (w.to_q.shape[0] // heads) ** -0.5
        self.q = split_heads(q, heads)  # (H, N, D)
        self.wo = split_heads(w.to_out, heads)  # (H, C, D)
        if d is not None:
            self.d_heads, self.d_kv = torch.zeros_like(self.q), torch.zeros_like(kv)

    def weights(self, group: list[int]) -> tuple[Tensor, ...]:
        """k, v (H, S·K, D) of S sequences, the weights (S, N, H·K), and U (S, H·K, C)"""
        k, v = split_heads(self.kv[group].flatten(0, 1), 2 * self.heads).chunk(2)
        p = (self.q @ k.mT * self.scale).unflatten(2, (len(group), -1)).softmax(-1)  # (H, N, S, K)
        u = (v @ self.wo.mT).unflatten(1, (len(group), -1))  # (H, S, K, C)
        return k, v, p.permute(2, 1, 0, 3).flatten(2), u.transpose(0, 1).flatten(1, 2)

    def forward(self, group: list[int]) -> Tensor:
        _, _, p, u = self.weights(group)
        return p @ u  # (S, N, C)

    def backward(self, d_out: Tensor, group: list[int]) -> None:
        assert self.d is not None
        k, v, p, u = self.weights(group)
        d_u = (p.mT @ d_out).unflatten(1, (self.heads, -1)).transpose(0, 1).flatten(1, 2)  # (H, S·K, C)
        if self.d.to_out is not None:
            add(self.d.to_out, join_heads(d_u.mT @ v))
        by_head = p.unflatten(2, (self.heads, -1))
        d_s = d_softmax((d_out @ u.mT).view_as(by_head), by_head).permute(2, 1, 0, 3).flatten(2) * self.scale
        self.d_heads += d_s @ k
        d_kv = torch.cat([d_s.mT @ self.q, d_u @ self.wo])  # (2H, S·K, D)
        self.d_kv[group] = join_heads(d_kv).unflatten(0, (len(group), -1))

    @property
    def d_q(self) -> Tensor:
        return join_heads(self.d_heads)


def sequence_rows(batch: int, num_latents: int, empty: Tensor | None) -> list[int]:
    return [num_latents] * batch if empty is None else [0 if none else num_latents for none in empty.tolist()]


def sequence_groups(counts: Sequence[int]) -> Iterator[list[int]]:
    """Whole sequences that have rows, a tile's worth at a time."""
    some = [b for b, count in enumerate(counts) if count]
    size = max(1, TILE // max(counts, default=1)) if some else 1
    for begin in range(0, len(some), size):
        yield some[begin : begin + size]


implement("latent_attention_forward", latent_attention_forward)
implement("latent_attention_backward", latent_attention_backward)
implement("multi_layer_attention_forward", multi_layer_attention_forward)
implement("multi_layer_attention_backward", multi_layer_attention_backward)

_LATENT_OPERATORS = OPS.latent_attention_forward.default, OPS.latent_attention_backward.default
_MULTI_LAYER_OPERATORS = OPS.multi_layer_attention_forward.default, OPS.multi_layer_attention_backward.default
_ELSEWHERE = Rule(lambda call: call["hidden"].device.type != "cpu", "hidden is on {hidden.device.type}")
_LAYERS_ELSEWHERE = Rule(lambda call: call["layers"].device.type != "cpu", "layers is on {layers.device.type}")
_COSTS_MORE = Rule(
    lambda call: not absorbs(call["latents"], call["to_q"], call["num_heads"]),
    "{latents.shape[0]} latents are not fewer than the {to_q.shape[0]} / {num_heads} dims of a head",
)

LATENT = Backend("cpu", (_ELSEWHERE, _COSTS_MORE), *_LATENT_OPERATORS, form="absorbed projections")
LATENT_AS_WRITTEN = Backend("cpu", (_ELSEWHERE,), *_LATENT_OPERATORS, form="projections as written")
MULTI_LAYER = Backend("cpu", (_LAYERS_ELSEWHERE,), *_MULTI_LAYER_OPERATORS)
