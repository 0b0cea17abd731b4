"""Parts that attention's kernels share: where a program's rows lie, what they see, scores and their gradients.

Symbols as in reference/attention.py. An option that isn't given is None and its code isn't compiled. Tiles are queries
× keys or keys × queries: `rows` and `columns` come expanded, as (Q, 1) and (1, K) or the other way round.
"""

from __future__ import annotations

from typing import Any, NamedTuple

import triton
import triton.language as tl

LOG2E = tl.constexpr(1.4426950408889634)
LN2 = tl.constexpr(0.6931471805599453)
EIGHT = tl.constexpr(8)  # elements: 16 bytes of 16-bit ones
YES = tl.constexpr(True)
NO = tl.constexpr(False)
TINY = tl.constexpr(1.2e-38)  # the smallest temperature: LOG2E / TINY is finite
LOWEST = tl.constexpr(-1e4)  # of a log-weight in temperature's gradient: the weight is 0, the product must not be NaN


class View(NamedTuple):
    """A tensor by pointer and strides; 0 where it is broadcast. Packed tensors have no batch stride."""

    data: Any
    batch: Any
    head: Any
    row: Any
    column: Any
    even: Any = NO  # a constant; of vectors: 16 bytes divide the address, EIGHT divides batch, head and row


class Options(NamedTuple):
    key_lengths: Any
    key_mask: Any
    cu_seqlens_q: Any
    cu_seqlens_k: Any
    mask: Any
    bias: Any
    relative_bias: Any
    temperature: Any
    scale: Any
    seed: Any
    end: Any = None  # never given: Triton 3.6 forgets the constants in a tuple's tuples unless it ends with a constant


class Numbers(NamedTuple):
    batch: Any
    heads: Any
    group: Any  # query heads to a key head
    len_q: Any  # or Tq, Tk
    len_k: Any
    temperature: Any
    scale: Any
    window_left: Any
    window_right: Any  # 0 at most where causal
    softcap: Any
    drop_below: Any  # a weight is dropped when its 32 random bits are below this
    keep_factor: Any
    reach: Any  # R of relative_bias


@triton.jit
def _sequence_of(tile, cu_seqlens, total, batch, BLOCK: tl.constexpr):
    """(sequence, first row) of a tile. Sequence b owns the tiles from cu_seqlens[b] // BLOCK + b on: enough for it."""
    low = 0
    high = batch
    while high - low > 1:
        middle = (low + high) // 2
        begin = tl.minimum(tl.maximum(tl.load(cu_seqlens + middle), 0), total).to(tl.int32)
        if begin // BLOCK + middle <= tile:
            low = middle
        else:
            high = middle
    begin = tl.minimum(tl.maximum(tl.load(cu_seqlens + low), 0), total).to(tl.int32)
    return low, (tile - begin // BLOCK - low) * BLOCK


@triton.jit
def locate(cu_seqlens, total, heads, n, BLOCK: tl.constexpr):
    """(sequence, head, first row) of a program, and its number beyond those: the grid is tiles × heads × more."""
    program = tl.program_id(0)
    if cu_seqlens is None:
        tiles = tl.cdiv(total, BLOCK)
        tile = program % tiles
        rest = program // tiles
        head = rest % heads
        rest = rest // heads
        return rest % n.batch, head, tile * BLOCK, rest // n.batch
    else:
        head = program % heads  # neighbours in memory run together
        rest = program // heads
        tiles = total // BLOCK + n.batch
        b, start = _sequence_of(rest % tiles, cu_seqlens, total, n.batch, BLOCK)
        return b, head, start, rest // tiles


@triton.jit
def _bounds(cu_seqlens, b, total):
    first = tl.minimum(tl.maximum(tl.load(cu_seqlens + b), 0), total)
    end = tl.minimum(tl.maximum(tl.load(cu_seqlens + b + 1), first), total)
    return first.to(tl.int64), (end - first).to(tl.int32)


@triton.jit
def sequence(b, opt, n):
    """First query, queries, first key, keys, and how many of those key_lengths leaves. Whatever the tensors hold,
    it lies within the inputs."""
    if opt.cu_seqlens_q is None:
        first_q = (b * 0).to(tl.int64)
        first_k = first_q
        len_q = n.len_q
        len_k = n.len_k
    else:
        first_q, len_q = _bounds(opt.cu_seqlens_q, b, n.len_q)
        first_k, len_k = _bounds(opt.cu_seqlens_k, b, n.len_k)
    real = len_k
    if opt.key_lengths is not None:
        real = tl.minimum(tl.maximum(tl.load(opt.key_lengths + b), 0), len_k).to(tl.int32)
    return first_q, len_q, first_k, len_k, real


@triton.jit
def row_number(b, h, first_q, rows, opt, n):
    """Of lse's elements and of dropout's rows: (B, Hq, Lq) or (Tq, Hq)."""
    if opt.cu_seqlens_q is None:
        return (b * n.heads + h).to(tl.int64) * n.len_q + rows
    else:
        return (first_q + rows) * n.heads + h


@triton.jit
def pointers(view, b, h, first, rows, columns):
    """For 16 bytes at a time where `view` is even. Triton only looks whether 16 divides a stride; where 8 does, as at
    D = 72, single elements went through registers, which ran out: 1.5 to 2.9 times as long by a replay of the code."""
    start = view.data + first * view.row + b.to(tl.int64) * view.batch + h.to(tl.int64) * view.head
    of_row = rows * view.row
    if view.even:
        start = tl.multiple_of(start, 16)
        of_row = tl.multiple_of(of_row, (EIGHT, EIGHT))  # for columns too: with 1, Triton 3.6 believes that
    return start + of_row + columns * view.column


@triton.jit
def load(view, b, h, first, keep, DIM: tl.constexpr, BLOCK: tl.constexpr):
    """The rows of one head from `first` on that are to `keep`, the others 0: (rows, BLOCK)."""
    rows = tl.arange(0, keep.shape[0])[:, None]
    columns = tl.arange(0, BLOCK)[None, :]
    inside = keep[:, None]
    if DIM < BLOCK:
        inside = inside & (columns < DIM)
    return tl.load(pointers(view, b, h, first, rows, columns), mask=inside, other=0.0)


@triton.jit
def store(view, b, h, first, keep, x, DIM: tl.constexpr, BLOCK: tl.constexpr):
    rows = tl.arange(0, keep.shape[0])[:, None]
    columns = tl.arange(0, BLOCK)[None, :]
    inside = keep[:, None]
    if DIM < BLOCK:
        inside = inside & (columns < DIM)
    tl.store(pointers(view, b, h, first, rows, columns), x.to(view.data.dtype.element_ty), mask=inside)


@triton.jit
def is_real(columns, b, real, opt):
    """Keys that are no padding: what isn't is never loaded."""
    keep = (columns >= 0) & (columns < real)
    if opt.key_mask is not None:
        keep = keep & tl.load(
            opt.key_mask.data + b.to(tl.int64) * opt.key_mask.batch + columns * opt.key_mask.column, mask=keep, other=0
        ).to(tl.int1)
    return keep


@triton.jit
def keys_seen(start, real, offset, n, BLOCK: tl.constexpr):
    """[first, end) of the keys that some of BLOCK rows from `start` on may see."""
    first = 0
    end = real
    if n.window_left is not None:
        first = tl.maximum(start + offset - n.window_left, 0)
    if n.window_right is not None:
        end = tl.minimum(real, start + BLOCK + offset + n.window_right)
    return first, end


@triton.jit
def rows_seeing(start, len_q, offset, n, BLOCK: tl.constexpr):
    """[first, end) of the rows that may see some of BLOCK keys from `start` on."""
    first = 0
    end = len_q
    if n.window_right is not None:
        first = tl.maximum(start - offset - n.window_right, 0)
    if n.window_left is not None:
        end = tl.minimum(len_q, start + BLOCK - offset + n.window_left)
    return first, end


@triton.jit
def per_row(view, number, b, h, first_q, rows, len_q):
    """temperature or scale of each row."""
    if view is None:
        return tl.full(rows.shape, number, tl.float32)
    else:
        return tl.load(pointers(view, b, h, first_q, rows.to(tl.int64), 0), mask=rows < len_q, other=1.0)


@triton.jit
def temperature(b, h, first_q, rows, len_q, opt, n):
    tau = per_row(opt.temperature, n.temperature, b, h, first_q, rows, len_q)
    return tl.where(tau < TINY, TINY, tau)


@triton.jit
def _tanh(x):
    """Within 4 units in the last place: by its series where 1 - 2 / (1 + e²ˣ) would cancel."""
    square = x * x
    series = x * (1 + square * (-1 / 3 + square * (2 / 15 + square * (-17 / 315 + square * (62 / 2835)))))
    return tl.where(square < 0.09, series, 1 - 2 / (1 + tl.exp2(2 * x * LOG2E)))


@triton.jit
def scores(products, rows, columns, keep, b, h, offset, scale, opt, n):
    """query·keyᵀ → z; which keys the row sees; the slope of the softcap.

    keep: what is inside and no padding. offset: Lk − Lq."""
    z = products * scale
    slope = z
    if n.softcap is not None:
        cap = _tanh(z / n.softcap)
        z = n.softcap * cap
        slope = 1 - cap * cap
    visible = keep
    distance = columns - rows - offset
    if n.window_left is not None:
        visible = visible & (distance >= -n.window_left)
    if n.window_right is not None:
        visible = visible & (distance <= n.window_right)
    if opt.mask is not None:
        allowed = tl.load(pointers(opt.mask, b, h, 0, rows.to(tl.int64), columns), mask=visible, other=0)
        visible = visible & allowed.to(tl.int1)
    if opt.bias is not None:
        term = tl.load(pointers(opt.bias, b, h, 0, rows.to(tl.int64), columns), mask=visible, other=0.0).to(tl.float32)
        z += term
        visible = visible & (term != -float("inf"))
    if opt.relative_bias is not None:
        entry = tl.minimum(tl.maximum(distance, -n.reach), n.reach) + n.reach
        term = tl.load(pointers(opt.relative_bias, b, h, 0, 0, entry))
        z += term
        visible = visible & (term != -float("inf"))
    return z, visible, slope


@triton.jit
def _mix(x):
    x = (x ^ (x >> 16)) * 0x21F0AAAD
    x = (x ^ (x >> 15)) * 0xD35A2D97
    return x ^ (x >> 15)


@triton.jit
def kept(rows, columns, opt, n):
    """Which weights dropout leaves, as reference.dropout_factors; rows: row_number."""
    seed = tl.load(opt.seed)
    of_row = _mix(_mix(rows.to(tl.uint32) + seed.to(tl.uint32)) + (seed >> 32).to(tl.uint32))
    return _mix(of_row ^ _mix(columns.to(tl.uint32))) >= n.drop_below.to(tl.uint32)


@triton.jit
def is_nan(x):
    """Whether any element is. Hidden content that isn't finite gives 0 · NaN in a product; rare, so it is seen after
    the fact and the product made again from cleaned rows. Of all elements at once: a maximum of rows' maxima fails
    to compile for sm_100 in Triton 3.6."""
    return tl.max((x != x).to(tl.int32)) > 0


@triton.jit
def seen(z, visible, like):
    """1 where the row sees the key, for a product. By way of z: Triton 3.6 fails to compile a product of masks."""
    return (tl.where(visible, z, -float("inf")) != -float("inf")).to(like.dtype)


@triton.jit
def cleaned(x):
    """x with 0 where it isn't finite, and where it isn't."""
    finite = tl.abs(x.to(tl.float32)) < float("inf")
    return tl.where(finite, x, 0.0).to(x.dtype), (~finite).to(x.dtype)
