"""Gradients of attention's added terms: of bias and of relative_bias, from statistics and delta of every row."""

from __future__ import annotations

import triton
import triton.language as tl

from .attention_kernels import load_statistics, query_tile, row
from .attention_tiles import is_real, load, locate, sequence


@triton.jit
def d_bias_tile(
    b, h, start, first, statistics, delta, n_rows, d_out, d_lse, query, key, value, opt, n, DIM: tl.constexpr,
    DIM_V: tl.constexpr, BLOCK_D: tl.constexpr, BLOCK_V: tl.constexpr, BLOCK_Q: tl.constexpr, BLOCK_K: tl.constexpr,
    PRECISION: tl.constexpr,
):  # fmt: skip
    """dz before the softcap, an added term's gradient, of rows from `start` and keys from `first` on (also below 0)."""
    first_q, len_q, first_k, len_k, real = sequence(b, opt, n)
    keep_q, number, tau, scale = row(b, h, start, first_q, len_q, opt, n, BLOCK_Q)
    keep_k = is_real(first + tl.arange(0, BLOCK_K), b, real, opt)
    q = load(query, b, h, first_q + start, keep_q, DIM, BLOCK_D)
    do = load(d_out, b, h, first_q + start, keep_q, DIM_V, BLOCK_V)
    k = load(key, b, h // n.group, first_k + first, keep_k, DIM, BLOCK_D)
    v = load(value, b, h // n.group, first_k + first, keep_k, DIM_V, BLOCK_V)
    top, share = load_statistics(statistics, number, keep_q, n_rows)
    of_row = tl.load(delta + number, mask=keep_q, other=0.0)
    du, _dz, _u, _products = query_tile(
        q, do, d_lse, of_row, top, share, k, v, first, keep_k, number, b, h, start, len_q, len_k - len_q, tau, scale,
        opt, n, BLOCK_Q, BLOCK_K, PRECISION
    )  # fmt: skip
    return du / tau[:, None]


@triton.jit(do_not_specialize=["n", "n_rows", "parts"])
def bias_kernel(
    d_bias, statistics, delta, d_out, d_lse, query, key, value, opt, n, n_rows, parts, sizes, DIM: tl.constexpr,
    DIM_V: tl.constexpr, BLOCK_D: tl.constexpr, BLOCK_V: tl.constexpr, BLOCK_Q: tl.constexpr, BLOCK_K: tl.constexpr,
    PRECISION: tl.constexpr, OVER_Q: tl.constexpr, OVER_K: tl.constexpr,
):  # fmt: skip
    """d_bias (parts, *sizes): one program is a tile of it and adds up a part of what it is broadcast over.

    OVER_Q, OVER_K: it is broadcast over queries, keys."""
    tiles_q = tl.cdiv(n.len_q, BLOCK_Q)
    tiles_k = tl.cdiv(n.len_k, BLOCK_K)
    program = tl.program_id(0)
    part = program % parts
    program = program // parts
    # the tile's place, and how many there are, in each dim: all of it, or one that stands for all
    own_k = 1 if OVER_K else tiles_k
    own_q = 1 if OVER_Q else tiles_q
    at_k = program % own_k
    at_q = program // own_k % own_q
    at_h = program // own_k // own_q % sizes[1]
    at_b = program // own_k // own_q // sizes[1]
    over_k = tiles_k // own_k
    over_q = tiles_q // own_q
    over_h = n.heads // sizes[1]
    over = over_k * over_q * over_h * (n.batch // sizes[0])
    acc = tl.zeros((BLOCK_Q, BLOCK_K), tl.float32)
    chunk = tl.cdiv(over, parts)
    for t in range(part * chunk, tl.minimum((part + 1) * chunk, over)):
        start = (at_q + t // over_k % over_q) * BLOCK_Q
        first = (at_k + t % over_k) * BLOCK_K
        h = at_h + t // over_k // over_q % over_h
        b = at_b + t // over_k // over_q // over_h
        acc += d_bias_tile(
            b, h, start, first, statistics, delta, n_rows, d_out, d_lse, query, key, value, opt, n, DIM, DIM_V, BLOCK_D,
            BLOCK_V, BLOCK_Q, BLOCK_K, PRECISION
        )  # fmt: skip
    rows = at_q * BLOCK_Q + tl.arange(0, BLOCK_Q)[:, None]
    columns = at_k * BLOCK_K + tl.arange(0, BLOCK_K)[None, :]
    if OVER_Q:
        acc = tl.sum(acc, 0, keep_dims=True)
        rows = tl.zeros((1, 1), tl.int32)
    if OVER_K:
        acc = tl.sum(acc, 1, keep_dims=True)
        columns = tl.zeros((1, 1), tl.int32)
    head = ((part * sizes[0] + at_b).to(tl.int64) * sizes[1] + at_h) * sizes[2]
    inside = (rows < sizes[2]) & (columns < sizes[3])
    tl.store(d_bias + (head + rows) * sizes[3] + columns, acc, mask=inside)


@triton.jit(do_not_specialize=["n", "n_rows"])
def relative_bias_kernel(
    d_relative_bias, statistics, delta, d_out, d_lse, query, key, value, opt, n, n_rows, DIM: tl.constexpr,
    DIM_V: tl.constexpr, BLOCK_D: tl.constexpr, BLOCK_V: tl.constexpr, BLOCK: tl.constexpr, ROWS: tl.constexpr,
    PRECISION: tl.constexpr,
):  # fmt: skip
    """d_relative_bias (tiles, Hq, 2R + 1): one program is ROWS rows of one head and BLOCK of its entries, or an end.

    Diagonals of a tile become columns by a gather: row i's key i + c goes to column c. The ends take all keys that
    stand R or further away."""
    tile = tl.program_id(0)  # numbered as locate does
    b, h, start, block = locate(opt.cu_seqlens_q, n.len_q, n.heads, n, ROWS)
    _first_q, len_q, _first_k, len_k, real = sequence(b, opt, n)
    if (start < 0) | (start >= len_q) | ((block == 1) & (n.reach == 0)):
        return
    offset = len_k - len_q
    if opt.cu_seqlens_q is None:
        tile = tile % tl.cdiv(n.len_q, ROWS) + tl.cdiv(n.len_q, ROWS) * b
    else:
        tile = tile // n.heads % (n.len_q // ROWS + n.batch)
    line = d_relative_bias + (tile.to(tl.int64) * n.heads + h) * (2 * n.reach + 1)
    end = tl.minimum(start + ROWS, len_q)
    if block >= 2:
        entry = (block - 2) * BLOCK + 1
        acc = tl.zeros((BLOCK,), tl.float32)
        diagonal = tl.arange(0, BLOCK)[:, None] + tl.arange(0, BLOCK)[None, :]
        for row in range(start, end, BLOCK):
            dz = d_bias_tile(
                b, h, row, row + offset + entry - n.reach, statistics, delta, n_rows, d_out, d_lse, query, key, value,
                opt, n, DIM, DIM_V, BLOCK_D, BLOCK_V, BLOCK, 2 * BLOCK, PRECISION
            )  # fmt: skip
            acc += tl.sum(tl.gather(dz, diagonal, 1), 0)
        entries = entry + tl.arange(0, BLOCK)
        tl.store(line + entries, acc, mask=entries < 2 * n.reach)
    else:
        ends = tl.zeros((BLOCK,), tl.float32)
        for row in range(start, end, BLOCK):
            # of the keys at p - R and before, or at p + R and after; R = 0: all keys
            first = tl.where(block == 0, 0, tl.maximum(row + offset + n.reach, 0))
            last = tl.where((block == 0) & (n.reach > 0), tl.minimum(row + BLOCK + offset - n.reach, real), real)
            for column in range(first, last, 2 * BLOCK):
                dz = d_bias_tile(
                    b, h, row, column, statistics, delta, n_rows, d_out, d_lse, query, key, value, opt, n, DIM, DIM_V,
                    BLOCK_D, BLOCK_V, BLOCK, 2 * BLOCK, PRECISION
                )  # fmt: skip
                rows = (row + tl.arange(0, BLOCK))[:, None]
                distance = column + tl.arange(0, 2 * BLOCK)[None, :] - rows - offset
                at_end = tl.where(block == 0, (distance <= -n.reach) | (n.reach == 0), distance >= n.reach)
                ends += tl.sum(tl.where(at_end, dz, 0.0), 1)
        tl.store(line + block * 2 * n.reach, tl.sum(ends, 0))
