"""Latent attention on torch's own matrix products, a tile of rows at a time. Between them run Triton kernels on a GPU
(`fused`, None on a CPU) and csrc/cpu/gated.cpp on a CPU.

The latents are the same for every token, so what is computed of them is computed once a call. With M = K·Wq and
G = V·Woᵀ of each head (absorbed projections), a token's attention is softmax(x·Mᵀ)·G: 4·C·H·N operations instead of
4·C·H·D + 4·D·H·N. The feed-forward's last linear map comes after the mean. What is kept for the backward pass has C and
2·F values a row; the H·N weights are computed again.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
import torch.nn.functional as F
from torch import Tensor

from ..dispatch import Backend, Rule
from ..reference.latent_pooling import NORM_EPS, Block
from ..schema import OPS, absorbs, computed, implement
from . import triton
from .latent_rows import Rows, Tile, add_pieces, device_rows_of, rows_of

ALIGN = 64  # of products' rows and columns
# the weights whose gradients pass through the latents' keys and values
ATTENTION = ("latents", "to_q", "to_kv", "to_out", "context_weight", "context_bias")

aten = torch.ops.aten


def product(a: Tensor, b: Tensor, out: Tensor | None = None, add: bool = False) -> Tensor:
    """a·b of matrices or batches of them; written to out, or added to it. out may be wider than they are.

    MKL gives other bits with another number of threads, but not where the result's sizes are multiples of 64 (of 500
    shapes with 1 to 16 threads none differed, of 200 others a third): what isn't is padded.
    """
    rows, columns = -a.shape[-2] % ALIGN, -b.shape[-1] % ALIGN
    if out is not None and out.dtype != a.dtype:
        return out.add_(product(a, b)) if add else out.copy_(product(a, b))
    if (rows or columns) and a.device.type == "cpu":
        padded = F.pad(a, (0, 0, 0, rows)) if rows else a, F.pad(b, (0, columns)) if columns else b
        whole = product(*padded)[..., : a.shape[-2], : b.shape[-1]]
        if out is None:
            return whole
        return out.add_(whole) if add else out.copy_(whole)
    if not add:
        return torch.matmul(a, b, out=out)
    assert out is not None
    return out.addmm_(a, b) if a.ndim == 2 else out.baddbmm_(a, b)


class Gradients:
    """The gradients of a block's weights as they add up, of those that are needed."""

    def __init__(self, needs: Sequence[bool]) -> None:
        self.needed = dict(zip(Block._fields, needs, strict=True))
        self.sums: dict[str, Tensor] = {}

    def any(self, *names: str) -> bool:
        return any(self.needed[name] for name in names)

    def add(self, name: str, x: Tensor) -> None:
        """x isn't used after."""
        if self.needed[name]:
            self.sums[name] = self.sums[name].add_(x) if name in self.sums else wide(x)

    def add_product(self, name: str, a: Tensor, b: Tensor) -> None:
        if self.needed[name]:
            self.sums[name] = product(a, b, self.sums[name], add=True) if name in self.sums else wide(product(a, b))

    def of(self, weights: Sequence[Tensor]) -> list[Tensor]:
        """In each weight's dtype; empty where it isn't needed."""
        named = dict(zip(Block._fields, weights, strict=True))
        return [
            self.sums[name].to(x.dtype).contiguous()
            if name in self.sums
            else x.new_zeros(x.shape if self.needed[name] else (0,))
            for name, x in named.items()
        ]


class Norm:
    """A layer norm; its backward pass follows the call with the same x."""

    def __init__(self, w: Block, name: str, d: Gradients | None = None) -> None:
        self.name, self.d, self.fused = name, d, triton.fused(w.latents)
        self.weight, self.bias = getattr(w, f"{name}_weight"), getattr(w, f"{name}_bias")

    def __call__(self, x: Tensor) -> Tensor:
        out, self.mean, self.rstd = torch.native_layer_norm(x, x.shape[-1:], self.weight, self.bias, NORM_EPS)
        return out

    def backward(self, d_out: Tensor, x: Tensor) -> Tensor:
        assert self.d is not None
        shape, needs = list(x.shape[-1:]), [True, False, False]
        if self.fused is not None:
            needs = [True, *(self.d.needed[f"{self.name}_{what}"] for what in ("weight", "bias"))]
        d_x, *of_weights = aten.native_layer_norm_backward(
            d_out, x, shape, self.mean, self.rstd, self.weight, self.bias, needs
        )
        if self.fused is not None:
            for what, gradient in zip(("weight", "bias"), of_weights, strict=True):
                self.d.add(f"{self.name}_{what}", gradient)
            return d_x
        # The sums over rows of torch's own kernel depend on the number of threads.
        if self.d.needed[f"{self.name}_weight"]:
            self.d.add(f"{self.name}_weight", ((x - self.mean).mul_(self.rstd).mul_(d_out)).flatten(0, -2).sum(0))
        if self.d.needed[f"{self.name}_bias"]:
            self.d.add(f"{self.name}_bias", d_out.flatten(0, -2).sum(0))
        return d_x


class FeedForward:
    """The residual feed-forward of rows and each sequence's mean: mean(y) + mean(g)·W2ᵀ + b2, g = a·gelu(gate).

    numbers (B,): how many rows each sequence has; ends (B,): where they end among all that come."""

    def __init__(self, w: Block, numbers: Tensor, ends: Tensor, d: Gradients | None = None) -> None:
        self.w, self.d, self.ends, self.fused = w, d, ends, triton.fused(w.latents)
        width, self.inner = w.ff_out_weight.shape
        self.norm = Norm(w, "ff_norm", d)
        like = wide(w.latents[:0])
        self.some = (numbers > 0)[:, None]  # (B, 1)
        self.per_row = self.some / numbers.clamp(min=1)[:, None].to(like.dtype)
        if d is None:
            self.attended = like.new_zeros(len(numbers), width)
            self.gated = like.new_zeros(len(numbers), self.inner)

    def forward(self, y: Tensor, tile: Tile, keep: Tensor | None) -> None:
        """y (t, C); what the backward pass needs is written to keep (t, 2F)."""
        u = keep if keep is not None and keep.dtype == y.dtype else y.new_empty(y.shape[0], 2 * self.inner)
        product(self.norm(y), self.w.ff_in_weight.T, u).add_(self.w.ff_in_bias)
        if keep is not None and keep is not u:
            keep.copy_(u)
        if self.fused is not None:
            self.fused.add_sums(self.attended, y, self.ends, tile.rows.start)
            self.fused.add_sums(self.gated, u, self.ends, tile.rows.start, gated=True)
            return
        add_pieces(self.attended, y, tile)
        self.gated[[b for b, _ in tile.pieces]] += OPS.gated_sums(u, [rows.stop for _, rows in tile.pieces])

    def means(self) -> tuple[Tensor, Tensor]:
        """The pooled rows (B, C), 0 where there are none, and the means of g (B, F)."""
        gated = self.gated * self.per_row
        mapped = product(gated.to(self.w.latents.dtype), self.w.ff_out_weight.T) + self.w.ff_out_bias
        return self.attended * self.per_row + mapped * self.some, gated

    def begin_backward(self, d_pooled: Tensor, gated: Tensor) -> None:
        assert self.d is not None
        d_pooled = torch.where(self.some, d_pooled, 0)
        narrow = d_pooled.to(self.w.latents.dtype)
        self.d.add_product("ff_out_weight", narrow.T, gated.to(narrow.dtype))
        self.d.add("ff_out_bias", d_pooled.sum(0))
        # a row that is nobody's reads the last
        self.d_y, self.d_gated = (
            F.pad(x * self.per_row, (0, 0, 0, 1)) for x in (d_pooled, product(narrow, self.w.ff_out_weight))
        )

    def backward(self, y: Tensor, u: Tensor, sequences: Tensor) -> Tensor:
        """The gradient of y (t, C), whose rows are of `sequences` (t,)."""
        assert self.d is not None
        d_u, d_bias = self._d_inner(u.to(y.dtype), sequences)
        self.d.add_product("ff_in_weight", d_u.T, self.norm(y))
        if d_bias is not None:
            self.d.add("ff_in_bias", d_bias)
        return self.norm.backward(product(d_u, self.w.ff_in_weight), y).add_(self.d_y.index_select(0, sequences))

    def _d_inner(self, u: Tensor, sequences: Tensor) -> tuple[Tensor, Tensor | None]:
        """The gradients of u and, if needed, of its bias."""
        assert self.d is not None
        need_bias = self.d.needed["ff_in_bias"]
        if self.fused is not None:
            return self.fused.d_gated(u, self.d_gated, sequences, need_bias)
        d_u, d_bias = OPS.gated_backward(u, self.d_gated, sequences)
        return d_u, d_bias if need_bias else None


class Absorbed:
    """Tokens attend to latents through M = scale·K·Wq and G = V·Woᵀ, both (H·N, C)."""

    def __init__(
        self, w: Block, kv: Tensor, heads: int, d: Gradients | None = None, tables: Tensor | None = None
    ) -> None:
        self.w, self.heads, self.d, self.n = w, heads, d, w.latents.shape[0]
        self.scale = (w.to_q.shape[0] // heads) ** -0.5
        self.k, self.v = split_heads(kv, 2 * heads).chunk(2)  # (H, N, D)
        self.wq, self.wo = w.to_q.unflatten(0, (heads, -1)), split_heads(w.to_out, heads)  # (H, D, C), (H, C, D)
        if tables is None:
            tables = kv.new_empty(2, heads, self.n, w.to_q.shape[1])
            product(self.k, self.wq, tables[0]).mul_(self.scale)
            product(self.v, self.wo.mT, tables[1])
            tables = tables.flatten(1, 2)
        self.tables, (self.m, self.g) = tables, tables
        self.sums = torch.zeros_like(wide(tables)) if d is not None and d.any(*ATTENTION) else None

    def weights(self, x: Tensor) -> Tensor:
        return product(x, self.m.T).unflatten(1, (self.heads, self.n)).softmax(-1)

    def forward(self, x: Tensor) -> Tensor:
        return product(self.weights(x).flatten(1), self.g)

    def backward(self, d_out: Tensor, x: Tensor) -> Tensor:
        p = self.weights(x)
        d_s = d_softmax(product(d_out, self.g.T).unflatten(1, (self.heads, self.n)), p).flatten(1)
        if self.sums is not None:
            product(d_s.T, x, self.sums[0], add=True)
            product(p.flatten(1).T, d_out, self.sums[1], add=True)
        return product(d_s, self.m)

    def end_backward(self) -> Tensor | None:
        """The gradient of kv (N, 2·H·D); those of the projections are added."""
        if self.sums is None or self.d is None:
            return None
        d_m, d_g = self.sums.unflatten(1, (self.heads, -1))  # (H, N, C)
        d_m, d_g = (d_m * self.scale).to(self.k.dtype), d_g.to(self.k.dtype)
        if self.d.needed["to_q"]:
            self.d.add("to_q", product(self.k.mT, d_m).flatten(0, 1))
        if self.d.needed["to_out"]:
            d_out = torch.empty_like(self.w.to_out)  # (C, H·D), written where each head belongs
            for d_head, g, v in zip(d_out.chunk(self.heads, 1), d_g, self.v, strict=True):
                product(g.T, v, d_head)
            self.d.add("to_out", d_out)
        return join_heads(torch.cat([product(d_m, self.wq.mT), product(d_g, self.wo)]))


class AsWritten:
    """Tokens attend to latents through all projections, which is less work with more latents than a head has dims."""

    def __init__(
        self, w: Block, kv: Tensor, heads: int, d: Gradients | None = None, tables: Tensor | None = None
    ) -> None:
        self.w, self.heads, self.d = w, heads, d
        self.scale = (w.to_q.shape[0] // heads) ** -0.5
        self.tables = kv.new_empty(0)
        self.k, self.v = split_heads(kv, 2 * heads).chunk(2)  # (H, N, D)
        self.sums = torch.zeros_like(wide(kv)) if d is not None and d.any("latents", "to_kv", *ATTENTION[4:]) else None

    def weights(self, x: Tensor) -> tuple[Tensor, Tensor]:
        q = split_heads(product(x, self.w.to_q.T), self.heads)
        return q, product(q, self.k.mT).mul(self.scale).softmax(-1)  # (H, t, D), (H, t, N)

    def forward(self, x: Tensor) -> Tensor:
        return product(join_heads(product(self.weights(x)[1], self.v)), self.w.to_out.T)

    def backward(self, d_out: Tensor, x: Tensor) -> Tensor:
        assert self.d is not None
        q, p = self.weights(x)
        if self.d.needed["to_out"]:
            self.d.add_product("to_out", d_out.T, join_heads(product(p, self.v)))
        d_o = split_heads(product(d_out, self.w.to_out), self.heads)
        d_s = d_softmax(product(d_o, self.v.mT), p).mul_(self.scale)
        if self.sums is not None:
            d_k, d_v = split_heads(self.sums, 2 * self.heads).chunk(2)
            product(d_s.mT, q, d_k, add=True)
            product(p.mT, d_o, d_v, add=True)
        d_q = join_heads(product(d_s, self.k))
        self.d.add_product("to_q", d_q.T, x)
        return product(d_q, self.w.to_q)

    def end_backward(self) -> Tensor | None:
        return None if self.sums is None else self.sums.to(self.k.dtype)


def split_heads(x: Tensor, heads: int) -> Tensor:
    """(t, H·D) → (H, t, D)"""
    return x.unflatten(1, (heads, -1)).transpose(0, 1)


def join_heads(x: Tensor) -> Tensor:
    """(H, t, D) → (t, H·D)"""
    return x.transpose(0, 1).flatten(1)


def d_softmax(d_p: Tensor, p: Tensor) -> Tensor:
    if d_p.device.type != "cpu":
        return aten._softmax_backward_data(d_p, p, -1, p.dtype)
    d_s = d_p * p  # torch's own kernel has other bits for another number of threads
    return d_s.addcmul_(p, d_s.sum(-1, keepdim=True), value=-1)


def wide(x: Tensor) -> Tensor:
    """What is added up is at least float32."""
    return x if x.dtype == torch.float64 else x.float()


def as_computed(weights: Sequence[Tensor], like: Tensor) -> Block:
    return Block(*(x.to(computed(like)) for x in weights))


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


def _rows(hidden: Tensor, *places: Tensor | None) -> Rows:
    return (rows_of if triton.fused(hidden) is None else device_rows_of)(hidden, *places)


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
    w = as_computed(weights, hidden)
    rows = _rows(hidden, lengths, mask, cu_seqlens, skip)
    kv = product(Norm(w, "context")(w.latents), w.to_kv.T)
    attention = (Absorbed if absorbs(w.latents, w.to_q, heads) else AsWritten)(w, kv, heads)
    norm, feed_forward = Norm(w, "norm"), FeedForward(w, rows.numbers, rows.ends)
    kept = hidden.shape[:-1].numel() if keep else 0
    attended = kv.new_empty(kept, hidden.shape[-1])
    inner = hidden.new_empty(kept, w.ff_in_bias.shape[0])
    for tile in rows.tiles():
        x = rows.read(hidden, tile).to(kv.dtype)
        y = torch.add(x, attention.forward(norm(x)), out=attended[tile.rows] if keep else x)
        feed_forward.forward(y, tile, inner[tile.rows] if keep else None)
    pooled, gated = feed_forward.means()
    out = unit(pooled, normalize, eps).to(hidden.dtype, copy=True)
    return out, pooled, gated, attended, inner, kv.contiguous(), attention.tables


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
    w = as_computed(weights, hidden)
    d = Gradients(needs[1:])
    rows = _rows(hidden, lengths, mask, cu_seqlens, skip)
    attention = (Absorbed if absorbs(w.latents, w.to_q, heads) else AsWritten)(w, kv, heads, d, tables)
    norm, feed_forward = Norm(w, "norm", d), FeedForward(w, rows.numbers, rows.ends, d)
    d_hidden = hidden.new_zeros(hidden.shape if needs[0] else (0,))
    feed_forward.begin_backward(d_unit(d_out, pooled, normalize, eps), gated)
    for tile in rows.tiles():
        x = rows.read(hidden, tile).to(kv.dtype)
        d_y = feed_forward.backward(attended[tile.rows], inner[tile.rows], rows.sequences[tile.rows])
        d_x = norm.backward(attention.backward(d_y, norm(x)), x)
        if needs[0]:
            d_hidden[tuple(i[tile.rows] for i in rows.places)] = d_x.add_(d_y).to(hidden.dtype)
    d_kv = attention.end_backward()
    if d_kv is not None:
        context = Norm(w, "context", d)
        d.add_product("to_kv", d_kv.T, context(w.latents))
        d.add("latents", context.backward(product(d_kv, w.to_kv), w.latents))
    return [d_hidden, *d.of(weights)]


implement("latent_attention_forward", latent_attention_forward)
implement("latent_attention_backward", latent_attention_backward)

_LATENT_OPERATORS = OPS.latent_attention_forward.default, OPS.latent_attention_backward.default
_CPU = Rule(lambda call: call["hidden"].device.type != "cpu", "hidden is on {hidden.device.type}")
_COSTS_MORE = Rule(
    lambda call: not absorbs(call["latents"], call["to_q"], call["num_heads"]),
    "{latents.shape[0]} latents are not fewer than the {to_q.shape[0]} / {num_heads} dims of a head",
)

LATENT = tuple(
    Backend(name, (*rules, *costs), *_LATENT_OPERATORS, form=form)
    for name, rules in (("triton", triton.rules("hidden")), ("cpu", (_CPU,)))
    for form, costs in (("absorbed projections", (_COSTS_MORE,)), ("projections as written", ()))
)
