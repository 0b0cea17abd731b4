"""The contrastive loss's Triton kernels. The maths is reference/infonce.py's; symbols as in csrc/cpu/infonce.cpp.

u = sim / τ, z = u + what options add, both of a tile rows × columns; the positive is kept apart, in float32. Vectors x
are kept as x' = x · 2^k with |x'| in [1/2, 1), which loses nothing; x̂ = x' · factor, which is in (1, 2].
Nothing is added up by atomics: every element has one writer.
"""

from __future__ import annotations

from typing import Any, NamedTuple

import triton
import triton.language as tl

EPS = tl.constexpr(1e-12)  # under cosine, x / max(‖x‖₂, EPS)

# What scores_kernel does with a tile of z.
STATISTICS = tl.constexpr(0)  # row sums under the tile's maximum
MAXIMA = tl.constexpr(1)  # of rows whose logits have no bound
EXPONENTIALS = tl.constexpr(2)  # exp(z - offset) into the panel, and their sums
COEFFICIENTS = tl.constexpr(3)  # the loss's derivatives into the panel

# Slots of what is known of a row's tile, and of a row: beside the positive.
SUM = tl.constexpr(1)  # Σ exp(z - maximum), the maximum in slot 0; EXPONENTIALS has the offset for it
MOMENT = tl.constexpr(2)  # Σ exp(z - maximum) (u - u_positive), for τ
COUNT = tl.constexpr(3)  # of visible columns, their Σ (z - z_positive) and Σ (u - u_positive)
SAME = tl.constexpr(6)  # the same of columns with the row's label
NEGATIVES = tl.constexpr(9)  # Σ u and number of the negatives; for metrics
BEST = tl.constexpr(11)  # the largest u
SLOTS = 12


class Side(NamedTuple):
    """The rows' or the columns' vectors."""

    data: Any  # (count, dim), contiguous
    factor: Any
    labels: Any  # None: no labels, no guide
    guide: Any
    guide_factor: Any


class Rows(NamedTuple):
    inverse_tau: Any
    positive: Any  # u
    key: Any  # the row's own column, modulo the pass's period
    query: Any  # the positive, modulo the documents' period; None without hardness
    threshold: Any  # the guide's; None without


class Softmax(NamedTuple):
    """What a panel's entries are made with. None where the mode or the option has no use for it."""

    offset: Any
    by: Any  # of the exponentials
    spread: Any  # of each visible column
    share: Any  # of each with the row's label


class Mirror(NamedTuple):
    """doc_to_query among the same pairs: its rows are the tile's columns, and its columns the tile's rows."""

    rows: Any = None  # without one; Triton 3.6 can't ask whether a tuple that holds None is None
    tiles: Any = None
    softmax: Any = None


class Numbers(NamedTuple):
    first: Any  # row of the panel
    rows: Any  # of the panel
    columns: Any
    period: Any  # of own columns
    query_period: Any
    strength: Any


@triton.jit
def _products(a, b, first, first_b, keep, inside, dim, BLOCK_D: tl.constexpr, PRECISION: tl.constexpr):
    """Rows of a from `first` on by rows of b from `first_b` on."""
    a += first.to(tl.int64) * dim
    b += first_b.to(tl.int64) * dim
    rows = tl.arange(0, keep.shape[0])[:, None] * dim
    rows_b = tl.arange(0, inside.shape[0])[:, None] * dim
    sums = tl.zeros((keep.shape[0], inside.shape[0]), tl.float32)
    for begin in range(0, dim, BLOCK_D):
        columns = begin + tl.arange(0, BLOCK_D)[None, :]
        x = tl.load(a + rows + columns, mask=keep[:, None] & (columns < dim), other=0.0)
        y = tl.load(b + rows_b + columns, mask=inside[:, None] & (columns < dim), other=0.0)
        sums = tl.dot(x, tl.trans(y), sums, input_precision=PRECISION)
    return sums


@triton.jit
def _store_panel(panel, stride, first, first_column, x, inside):
    rows = tl.arange(0, x.shape[0])[:, None] * stride
    to = panel + first.to(tl.int64) * stride + first_column
    tl.store(to + rows + tl.arange(0, x.shape[1])[None, :], x.to(panel.dtype.element_ty), mask=inside)


@triton.jit
def _entry(softmax, index, keep, z, same, AXIS: tl.constexpr, SMOOTHING: tl.constexpr, SAME_POSITIVE: tl.constexpr):
    """p - y, by what its softmax's rows are multiplied with. Sums over a row go along AXIS."""
    offset = tl.expand_dims(tl.load(softmax.offset + index, mask=keep, other=0.0), AXIS)
    entry = tl.expand_dims(tl.load(softmax.by + index, mask=keep, other=0.0), AXIS) * tl.exp(z - offset)
    if SMOOTHING:
        spread = tl.expand_dims(tl.load(softmax.spread + index, mask=keep, other=0.0), AXIS)
        entry -= tl.where(z == -float("inf"), 0.0, spread)
    if SAME_POSITIVE:
        share = tl.expand_dims(tl.load(softmax.share + index, mask=keep, other=0.0), AXIS)
        entry -= tl.where(same, share, 0.0)
    return entry


@triton.jit
def _exponentials(z, AXIS: tl.constexpr):
    """A row's maximum, and exp(z - maximum)."""
    top = tl.max(z, AXIS)
    return top, tl.exp(z - tl.expand_dims(tl.where(top == -float("inf"), 0.0, top), AXIS))


@triton.jit
def _store_sums(
    at, slot, e, z, u, positive, same, keep, AXIS: tl.constexpr, SMOOTHING: tl.constexpr,
    SAME_POSITIVE: tl.constexpr, WITH_MOMENT: tl.constexpr,
):  # fmt: skip
    positive = tl.expand_dims(positive, AXIS)
    hidden = z == -float("inf")
    beyond = tl.where(hidden, 0.0, u - positive)
    tl.store(at + SUM * slot, tl.sum(e, AXIS), mask=keep)
    if WITH_MOMENT:
        tl.store(at + MOMENT * slot, tl.sum(e * beyond, AXIS), mask=keep)
    if SMOOTHING:
        tl.store(at + COUNT * slot, tl.sum((~hidden).to(tl.float32), AXIS), mask=keep)
        tl.store(at + (COUNT + 1) * slot, tl.sum(tl.where(hidden, 0.0, z - positive), AXIS), mask=keep)
        tl.store(at + (COUNT + 2) * slot, tl.sum(beyond, AXIS), mask=keep)
    if SAME_POSITIVE:
        tl.store(at + SAME * slot, tl.sum(same.to(tl.float32), AXIS), mask=keep)
        tl.store(at + (SAME + 1) * slot, tl.sum(tl.where(same, z - positive, 0.0), AXIS), mask=keep)
        tl.store(at + (SAME + 2) * slot, tl.sum(tl.where(same, beyond, 0.0), AXIS), mask=keep)


@triton.jit(do_not_specialize=["n"])
def scores_kernel(
    panel, stride, tiles, row_side, column_side, of_rows, softmax, mirror, log_weight, dim, guide_dim, n,
    MODE: tl.constexpr, APART: tl.constexpr, MIRROR_APART: tl.constexpr, HARDNESS: tl.constexpr,
    SAME_POSITIVE: tl.constexpr, SMOOTHING: tl.constexpr, METRICS: tl.constexpr, BLOCKS: tl.constexpr,
    WITH_MOMENT: tl.constexpr, BLOCK_R: tl.constexpr, BLOCK_C: tl.constexpr, BLOCK_D: tl.constexpr,
    PRECISION: tl.constexpr,
):  # fmt: skip
    """A tile of one direction, or of two: products, options, then what MODE says.

    APART: a row's own columns are left out; else they stay, whatever labels and guide say. HARDNESS: 0, or 1 + its
    number in HARDNESS. BLOCKS: the key is modulo a period less than the columns. MAXIMA makes none where all rows have
    an offset that isn't infinite.
    """
    row_tiles = tl.cdiv(n.rows, BLOCK_R)
    program = tl.program_id(0)
    column_tile = program // row_tiles
    row_tile = program % row_tiles
    first_column = column_tile * BLOCK_C
    in_panel = row_tile * BLOCK_R
    first = n.first + in_panel
    local = in_panel + tl.arange(0, BLOCK_R)
    keep = local < n.rows
    columns = first_column + tl.arange(0, BLOCK_C)
    inside = columns < n.columns
    rows = n.first + local

    if MODE == MAXIMA:
        offset = tl.load(softmax.offset + rows, mask=keep, other=0.0)
        if tl.max((offset == float("inf")).to(tl.int32), 0) == 0:
            return
    row_factor = tl.load(row_side.factor + rows, mask=keep, other=0.0)
    column_factor = tl.load(column_side.factor + columns, mask=inside, other=0.0)
    inverse_tau = tl.load(of_rows.inverse_tau + rows, mask=keep, other=0.0)
    key = tl.load(of_rows.key + rows, mask=keep, other=-1)

    products = _products(row_side.data, column_side.data, first, first_column, keep, inside, dim, BLOCK_D, PRECISION)
    u = products * (row_factor * inverse_tau)[:, None] * column_factor[None, :]
    pair = keep[:, None] & inside[None, :]
    own = key[:, None] == (columns % n.period if BLOCKS else columns)[None, :]
    hidden = ~pair
    if APART:
        hidden = hidden | own
    same = hidden & ~hidden
    hidden_of_mirror = same
    if mirror.rows is not None:
        mirrored = columns < mirror.rows
        hidden_of_mirror = ~(keep[:, None] & mirrored[None, :])
        if MIRROR_APART:
            hidden_of_mirror = hidden_of_mirror | own
    if row_side.labels is not None:
        row_labels = tl.load(row_side.labels + rows, mask=keep, other=0)
        column_labels = tl.load(column_side.labels + columns, mask=inside, other=0)
        equal = (row_labels[:, None] == column_labels[None, :]) & ~own & pair
        if SAME_POSITIVE:
            same = equal
        else:
            hidden = hidden | equal
            hidden_of_mirror = hidden_of_mirror | equal
    if row_side.guide is not None:
        guided = _products(
            row_side.guide, column_side.guide, first, first_column, keep, inside, guide_dim, BLOCK_D, PRECISION
        )
        guided = guided * tl.load(row_side.guide_factor + rows, mask=keep, other=0.0)[:, None]
        guided = guided * tl.load(column_side.guide_factor + columns, mask=inside, other=0.0)[None, :]
        threshold = tl.load(of_rows.threshold + rows, mask=keep, other=0.0)
        hidden = hidden | ((guided > threshold[:, None]) & ~same & ~own)
        if mirror.rows is not None:
            threshold = tl.load(of_rows.threshold + columns, mask=mirrored, other=0.0)
            hidden_of_mirror = hidden_of_mirror | ((guided > threshold[None, :]) & ~same & ~own)
    z = u
    if log_weight is not None:
        weight = tl.load(log_weight + columns, mask=inside, other=0.0)[None, :]
        negative = ~(same | own)
        z += tl.where(negative, weight, 0.0)
        hidden = hidden | (negative & (weight == -float("inf")))
    if HARDNESS != 0:
        harder = pair
        if HARDNESS < 3:
            query = tl.load(of_rows.query + rows, mask=keep, other=-1)
            of_query = query[:, None] == (columns % n.query_period)[None, :]
            harder = ~of_query if HARDNESS == 1 else of_query
        sim = products * row_factor[:, None] * column_factor[None, :]
        z += tl.where(harder & ~same, n.strength * sim, 0.0)
    z = tl.where(hidden, -float("inf"), z)
    if log_weight is None and HARDNESS == 0:
        u = z  # the same where it is visible, and one tile less to hold

    if mirror.rows is not None:
        inverse_tau = tl.load(of_rows.inverse_tau + columns, mask=mirrored, other=0.0)
        of_mirror = products * row_factor[:, None] * (column_factor * inverse_tau)[None, :]
        of_mirror = tl.where(hidden_of_mirror, -float("inf"), of_mirror)
        if MODE == STATISTICS:
            positive = tl.load(of_rows.positive + columns, mask=mirrored, other=0.0)
            top, e = _exponentials(of_mirror, 0)
            to = mirror.tiles + row_tile.to(tl.int64) * mirror.rows + columns
            tl.store(to, top, mask=mirrored)
            _store_sums(
                to, row_tiles.to(tl.int64) * mirror.rows, e, of_mirror, of_mirror, positive, same, mirrored, 0,
                SMOOTHING, SAME_POSITIVE, WITH_MOMENT,
            )  # fmt: skip
    at = column_tile.to(tl.int64) * n.rows + local
    slot = tl.cdiv(n.columns, BLOCK_C).to(tl.int64) * n.rows
    positive = tl.load(of_rows.positive + rows, mask=keep, other=0.0)
    if MODE == MAXIMA:
        tl.store(tiles + at, tl.max(z, 1), mask=keep)
    elif MODE == COEFFICIENTS:
        entry = _entry(softmax, rows, keep, z, same, 1, SMOOTHING, SAME_POSITIVE)
        if mirror.rows is not None:
            entry += _entry(mirror.softmax, columns, mirrored, of_mirror, same, 0, SMOOTHING, SAME_POSITIVE)
        entry = entry * row_factor[:, None] * column_factor[None, :]
        _store_panel(panel, stride, in_panel, first_column, entry, pair)
    elif MODE == EXPONENTIALS:
        offset = tl.load(softmax.offset + rows, mask=keep, other=0.0)
        e = tl.exp(z - offset[:, None])
        _store_sums(
            tiles + at, slot, e, z, u, positive, same, keep, 1, SMOOTHING, SAME_POSITIVE, WITH_MOMENT
        )  # fmt: skip
        # Read again: on sm_100 a thread has a row's columns, and held over the sums their factors spilled.
        column_factor = tl.load(column_side.factor + columns, mask=inside, other=0.0)
        _store_panel(panel, stride, in_panel, first_column, e * column_factor[None, :], pair)
    else:
        top, e = _exponentials(z, 1)
        tl.store(tiles + at, top, mask=keep)
        _store_sums(
            tiles + at, slot, e, z, u, positive, same, keep, 1, SMOOTHING, SAME_POSITIVE, WITH_MOMENT
        )  # fmt: skip
    if METRICS:
        hidden = z == -float("inf")
        negative = ~(hidden | same)
        tl.store(tiles + at + NEGATIVES * slot, tl.sum(tl.where(negative, u, 0.0), 1), mask=keep)
        tl.store(tiles + at + (NEGATIVES + 1) * slot, tl.sum(negative.to(tl.float32), 1), mask=keep)
        tl.store(tiles + at + BEST * slot, tl.max(tl.where(hidden, -float("inf"), u), 1), mask=keep)


@triton.jit(do_not_specialize=["total", "first", "rows", "count"])
def combine_kernel(
    out, total, tiles, first, rows, count, SLOTS: tl.constexpr, RESCALE: tl.constexpr, MORE: tl.constexpr,
    BLOCK: tl.constexpr,
):  # fmt: skip
    """What `count` tiles know of their rows, put together: (slots, total) from (slots, count, rows). MORE: and with
    what `out` holds. RESCALE: sums are under each tile's own maximum."""
    local = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    keep = local < rows
    slot = count.to(tl.int64) * rows
    to = out + first + local
    top = tl.full((BLOCK,), -float("inf"), tl.float32)
    sum_ = tl.zeros((BLOCK,), tl.float32)
    moment = tl.zeros((BLOCK,), tl.float32)
    if MORE:
        top = tl.load(to, mask=keep, other=0.0)
        sum_ = tl.load(to + SUM * total, mask=keep, other=0.0)
        moment = tl.load(to + MOMENT * total, mask=keep, other=0.0)
    at = tiles + local
    for _tile in range(0, count):
        more = tl.load(at + SUM * slot, mask=keep, other=0.0)
        more_moment = tl.load(at + MOMENT * slot, mask=keep, other=0.0)
        if RESCALE:
            of_tile = tl.load(at, mask=keep, other=0.0)
            higher = tl.maximum(top, of_tile)
            shift = tl.where(higher == -float("inf"), 0.0, higher)
            old = tl.exp(top - shift)
            new = tl.exp(of_tile - shift)
            sum_ = sum_ * old + more * new
            moment = moment * old + more_moment * new
            top = higher
        else:
            sum_ += more
            moment += more_moment
        at += rows
    tl.store(to, top, mask=keep)
    tl.store(to + SUM * total, sum_, mask=keep)
    tl.store(to + MOMENT * total, moment, mask=keep)
    for other in tl.static_range(COUNT, SLOTS):
        best = tl.full((BLOCK,), -float("inf") if other == BEST else 0.0, tl.float32)
        if MORE:
            best = tl.load(to + other * total, mask=keep, other=0.0)
        at = tiles + other * slot + local
        for _tile in range(0, count):
            of_tile = tl.load(at, mask=keep, other=0.0)
            best = tl.maximum(best, of_tile) if other == BEST else best + of_tile
            at += rows
        tl.store(to + other * total, best, mask=keep)


@triton.jit(do_not_specialize=["rows"])
def vectors_kernel(
    out, factor, inverse, x, x_stride, rows, dim, width, COSINE: tl.constexpr, BLOCK_R: tl.constexpr,
    BLOCK_D: tl.constexpr,
):  # fmt: skip
    """x' (rows, width), zeros beyond dim; its factor; 1 / max(‖x‖₂, EPS)."""
    row = (tl.program_id(0) * BLOCK_R + tl.arange(0, BLOCK_R)).to(tl.int64)
    keep = row < rows
    scale = tl.full((BLOCK_R,), 1.0, tl.float32)
    if COSINE:
        squares = tl.zeros((BLOCK_R,), tl.float32)
        for begin in range(0, dim, BLOCK_D):
            columns = begin + tl.arange(0, BLOCK_D)
            inside = keep[:, None] & (columns < dim)[None, :]
            part = tl.load(x + row[:, None] * x_stride + columns[None, :], mask=inside, other=0.0).to(tl.float32)
            squares += tl.sum(part * part, 1)
        norm = tl.sqrt(squares)
        norm = tl.where(norm < EPS, EPS, norm)  # this way round NaN stays NaN
        exponent = (norm.to(tl.int32, bitcast=True) >> 23) & 255
        scale = (tl.minimum(tl.maximum(253 - exponent, 1), 254) << 23).to(tl.float32, bitcast=True)
        tl.store(factor + row, 1.0 / (norm * scale), mask=keep)
        tl.store(inverse + row, 1.0 / norm, mask=keep)
    else:
        tl.store(factor + row, scale, mask=keep)
        tl.store(inverse + row, scale, mask=keep)
    for begin in range(0, width, BLOCK_D):
        columns = begin + tl.arange(0, BLOCK_D)
        inside = keep[:, None] & (columns < dim)[None, :]
        part = tl.load(x + row[:, None] * x_stride + columns[None, :], mask=inside, other=0.0).to(tl.float32)
        to = out + row[:, None] * width + columns[None, :]
        tl.store(to, (part * scale[:, None]).to(out.dtype.element_ty), mask=keep[:, None] & (columns < width)[None, :])


@triton.jit(do_not_specialize=["rows", "margin"])
def positive_kernel(
    out, a, b, a_factor, b_factor, rows, dim, margin, GUIDE: tl.constexpr, RELATIVE: tl.constexpr,
    BLOCK_R: tl.constexpr, BLOCK_C: tl.constexpr, BLOCK_D: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """Of each row its similarity with the positive, or the guide's threshold from that: a tile's diagonal, by the same
    product as in scores_kernel, so that a duplicate of the positive has the same number."""
    first = tl.program_id(0) * BLOCK_R
    row = first + tl.arange(0, BLOCK_R)
    keep = row < rows
    column = first + tl.arange(0, BLOCK_C)
    inside = column < rows
    products = _products(a, b, first, first, keep, inside, dim, BLOCK_D, PRECISION)
    products = products * tl.load(a_factor + row, mask=keep, other=0.0)[:, None]
    products = products * tl.load(b_factor + column, mask=inside, other=0.0)[None, :]
    of_row = tl.sum(tl.where(row[:, None] == column[None, :], products, 0.0), 1)
    if GUIDE:
        of_row = of_row - (tl.abs(of_row) * margin if RELATIVE else margin)
    tl.store(out + row, of_row, mask=keep)


@triton.jit(do_not_specialize=["rows"])
def gradient_kernel(
    out, out_stride, sums, scale, other, weight, unit, inverse, rows, dim, width, BLOCK_R: tl.constexpr,
    BLOCK_D: tl.constexpr,
):  # fmt: skip
    """The gradient of x from that of x̂, d = scale · sums + weight · other: (d - x̂ (x̂·d)) / max(‖x‖₂, EPS), without the
    term in x̂ where ‖x‖₂ < EPS. Without `unit`, d. x̂ = x' / ‖x'‖₂: one number alone becomes exactly ±1."""
    row = (tl.program_id(0) * BLOCK_R + tl.arange(0, BLOCK_R)).to(tl.int64)
    keep = row < rows
    by = tl.full((BLOCK_R,), 1.0, tl.float32)
    along = tl.zeros((BLOCK_R,), tl.float32)
    norm = tl.full((BLOCK_R,), 1.0, tl.float32)
    if unit is not None:
        by = tl.load(inverse + row, mask=keep, other=0.0)
        squares = tl.zeros((BLOCK_R,), tl.float32)
        for begin in range(0, dim, BLOCK_D):
            x = _part(unit, row, keep, begin, dim, width, BLOCK_D)
            along += tl.sum(_derivative(sums, scale, other, weight, row, keep, begin, dim, width, BLOCK_D) * x, 1)
            squares += tl.sum(x * x, 1)
        shorter = by >= 1 / EPS
        norm = tl.where(shorter | ~keep, 1.0, tl.sqrt(squares))
        along = tl.where(shorter, 0.0, along / norm)
    for begin in range(0, out_stride, BLOCK_D):
        d = _derivative(sums, scale, other, weight, row, keep, begin, dim, width, BLOCK_D)
        if unit is not None:
            x = _part(unit, row, keep, begin, dim, width, BLOCK_D) / norm[:, None]
            d = (d - along[:, None] * x) * by[:, None]
        columns = begin + tl.arange(0, BLOCK_D)
        inside = keep[:, None] & (columns < out_stride)[None, :]
        tl.store(out + row[:, None] * out_stride + columns[None, :], d, mask=inside)


@triton.jit
def _part(data, row, keep, begin, dim, width, BLOCK_D: tl.constexpr):
    columns = begin + tl.arange(0, BLOCK_D)
    inside = keep[:, None] & (columns < dim)[None, :]
    return tl.load(data + row[:, None] * width + columns[None, :], mask=inside, other=0.0).to(tl.float32)


@triton.jit
def _derivative(sums, scale, other, weight, row, keep, begin, dim, width, BLOCK_D: tl.constexpr):
    d = tl.zeros((row.shape[0], BLOCK_D), tl.float32)
    if sums is not None:
        by = tl.load(scale + row, mask=keep, other=0.0)
        d += by[:, None] * _part(sums, row, keep, begin, dim, width, BLOCK_D)
    if other is not None:
        by = tl.load(weight + row, mask=keep, other=0.0)
        d += by[:, None] * _part(other, row, keep, begin, dim, width, BLOCK_D)
    return d


class Negatives(NamedTuple):
    """Each row's own (rows, count, dim), unit stride in the last dim."""

    data: Any
    row: Any  # strides
    each: Any
    count: Any


@triton.jit
def _load_negatives(negatives, row, each, columns, dim):
    inside = (each < negatives.count)[:, None] & (columns < dim)[None, :]
    at = negatives.data + row * negatives.row + each.to(tl.int64)[:, None] * negatives.each + columns[None, :]
    return tl.load(at, mask=inside, other=0.0).to(tl.float32)


@triton.jit
def negatives_kernel(
    out, inverse, negatives, unit, factor, dim, width, COSINE: tl.constexpr, BLOCK_K: tl.constexpr,
    BLOCK_D: tl.constexpr,
):  # fmt: skip
    """A row's similarities with its own negatives, and 1 / max(‖n‖₂, EPS) of these, both (rows, count)."""
    row = tl.program_id(0).to(tl.int64)
    for first in range(0, negatives.count, BLOCK_K):
        each = first + tl.arange(0, BLOCK_K)
        keep = each < negatives.count
        products = tl.zeros((BLOCK_K,), tl.float32)
        squares = tl.zeros((BLOCK_K,), tl.float32)
        for begin in range(0, dim, BLOCK_D):
            columns = begin + tl.arange(0, BLOCK_D)
            n = _load_negatives(negatives, row, each, columns, dim)
            q = tl.load(unit + row * width + columns, mask=columns < dim, other=0.0).to(tl.float32)
            products += tl.sum(n * q[None, :], 1)
            squares += tl.sum(n * n, 1)
        by = tl.full((BLOCK_K,), 1.0, tl.float32)
        if COSINE:
            norm = tl.sqrt(squares)
            by = 1.0 / tl.where(norm < EPS, EPS, norm)
        at = row * negatives.count + each
        tl.store(out + at, products * by * tl.load(factor + row), mask=keep)
        tl.store(inverse + at, by, mask=keep)


@triton.jit
def d_negatives_kernel(
    d_negatives, sums, negatives, coefficient, scale, sim, inverse, unit, factor, dim, width, COSINE: tl.constexpr,
    BLOCK_K: tl.constexpr, BLOCK_D: tl.constexpr,
):  # fmt: skip
    """sums += Σ_k coefficient · n̂_k, and the gradients of the negatives. One program: a row, BLOCK_D dimensions."""
    blocks = tl.cdiv(dim, BLOCK_D)
    row = (tl.program_id(0) // blocks).to(tl.int64)
    columns = tl.program_id(0) % blocks * BLOCK_D + tl.arange(0, BLOCK_D)
    within = columns < dim
    q = tl.load(unit + row * width + columns, mask=within, other=0.0).to(tl.float32) * tl.load(factor + row)
    more = tl.zeros((BLOCK_D,), tl.float32)
    for first in range(0, negatives.count, BLOCK_K):
        each = first + tl.arange(0, BLOCK_K)
        keep = each < negatives.count
        at = row * negatives.count + each
        c = tl.load(coefficient + at, mask=keep, other=0.0)
        by = tl.load(inverse + at, mask=keep, other=0.0)
        n = _load_negatives(negatives, row, each, columns, dim) * by[:, None]
        more += tl.sum(c[:, None] * n, 0)
        if d_negatives is not None:
            d = q[None, :]
            if COSINE:
                along = tl.load(sim + at, mask=keep & (by < 1 / EPS), other=0.0)
                d = (d - along[:, None] * n) * by[:, None]
            d = d * (c * tl.load(scale + row))[:, None]
            tl.store(d_negatives + at[:, None] * dim + columns[None, :], d, mask=keep[:, None] & within[None, :])
    if sums is not None:
        to = sums + row * width + columns
        tl.store(to, tl.load(to, mask=within, other=0.0) + more, mask=within)
