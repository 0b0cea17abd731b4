"""Attention's Triton kernels: forward; backward by key tiles, by query tiles, of bias and of relative_bias.

z = cap(scale · q·kᵀ) + bias + relative_bias,  u = z / temperature,  p = softmax(u),  out = p · v
du = p (dp - delta + d_lse),  dp = d_out · vᵀ,  delta = Σ_j p dp,  dz = du / temperature,  d_q = scale · Σ cap' dz k

`stats` (3, rows) holds for each row the maximum of z, 1 / Σ exp((z - maximum) / temperature), and delta: lse alone has
too few digits where z / temperature is large. Nothing is added up by atomics: every element has one writer.
"""

from __future__ import annotations

import triton
import triton.language as tl

from .attention_tiles import (
    LN2,
    LOG2E,
    LOWEST,
    TINY,
    cleaned,
    is_nan,
    is_real,
    kept,
    keys_seen,
    load,
    locate,
    per_row,
    row_number,
    rows_seeing,
    scores,
    sequence,
    store,
    temperature,
)


@triton.jit
def _forward_tile(
    q, top, total, acc, key, value, first, b, h, start, first_q, len_q, first_k, len_k, real, scale, exponent, opt, n,
    DIM: tl.constexpr, DIM_V: tl.constexpr, BLOCK_D: tl.constexpr, BLOCK_V: tl.constexpr, BLOCK_Q: tl.constexpr,
    BLOCK_K: tl.constexpr, PRECISION: tl.constexpr, ONLY: tl.constexpr, CLEAN: tl.constexpr,
):  # fmt: skip
    """The online softmax's state after BLOCK_K keys from `first` on. ONLY: there are no others."""
    rows = (start + tl.arange(0, BLOCK_Q))[:, None]
    columns = first + tl.arange(0, BLOCK_K)
    keep = is_real(columns, b, real, opt)
    k = load(key, b, h // n.group, first_k + first, keep, DIM, BLOCK_D)
    v = load(value, b, h // n.group, first_k + first, keep, DIM_V, BLOCK_V)
    products = tl.dot(q, tl.trans(k), input_precision=PRECISION)
    inside = keep[None, :] & (rows < len_q)
    z, visible, _slope = scores(products, rows, columns[None, :], inside, b, h, len_k - len_q, scale, opt, n)
    higher = tl.max(z, 1)
    if not ONLY:
        higher = tl.maximum(top, higher)
    shift = tl.where(higher == -float("inf"), 0.0, higher)
    p = tl.exp2((z - shift[:, None]) * exponent[:, None])
    if ONLY:
        total = tl.sum(p, 1)
    else:
        shrink = tl.exp2((top - shift) * exponent)
        total = total * shrink + tl.sum(p, 1)
        acc = acc * shrink[:, None]
    if opt.seed is not None:
        p = tl.where(kept(row_number(b, h, first_q, rows, opt, n), columns[None, :], opt, n), p, 0.0)
    if CLEAN:
        v, bad = cleaned(v)
        acc += tl.where(tl.dot(visible.to(v.dtype), bad, input_precision=PRECISION) > 0, float("nan"), 0.0)
    acc = tl.dot(p.to(v.dtype), v, acc, input_precision=PRECISION)
    return higher, total, acc


@triton.jit
def _forward_tiles(
    q, key, value, b, h, start, first_q, len_q, first_k, len_k, real, scale, exponent, opt, n, DIM: tl.constexpr,
    DIM_V: tl.constexpr, BLOCK_D: tl.constexpr, BLOCK_V: tl.constexpr, BLOCK_Q: tl.constexpr, BLOCK_K: tl.constexpr,
    PRECISION: tl.constexpr, ONE_TILE: tl.constexpr, CLEAN: tl.constexpr,
):  # fmt: skip
    top = tl.full((BLOCK_Q,), -float("inf"), tl.float32)
    total = tl.zeros((BLOCK_Q,), tl.float32)
    acc = tl.zeros((BLOCK_Q, BLOCK_V), tl.float32)
    if ONE_TILE:
        top, total, acc = _forward_tile(
            q, top, total, acc, key, value, 0, b, h, start, first_q, len_q, first_k, len_k, real, scale, exponent, opt,
            n, DIM, DIM_V, BLOCK_D, BLOCK_V, BLOCK_Q, BLOCK_K, PRECISION, True, CLEAN
        )  # fmt: skip
    else:
        begin, end = keys_seen(start, real, len_k - len_q, n, BLOCK_Q)
        for first in range(begin, end, BLOCK_K):
            top, total, acc = _forward_tile(
                q, top, total, acc, key, value, first, b, h, start, first_q, len_q, first_k, len_k, real, scale,
                exponent, opt, n, DIM, DIM_V, BLOCK_D, BLOCK_V, BLOCK_Q, BLOCK_K, PRECISION, False, CLEAN
            )  # fmt: skip
    return top, total, acc


@triton.jit(do_not_specialize=["n"])
def forward_kernel(
    out, lse, query, key, value, opt, n, DIM: tl.constexpr, DIM_V: tl.constexpr, BLOCK_D: tl.constexpr,
    BLOCK_V: tl.constexpr, BLOCK_Q: tl.constexpr, BLOCK_K: tl.constexpr, PRECISION: tl.constexpr,
    BY_ROW: tl.constexpr, ONE_TILE: tl.constexpr,
):  # fmt: skip
    """One program: BLOCK_Q rows of one head. BY_ROW: an option hides keys from some rows only."""
    b, h, start, _rest = locate(opt.cu_seqlens_q, n.len_q, n.heads, n, BLOCK_Q)
    first_q, len_q, first_k, len_k, real = sequence(b, opt, n)
    if (start < 0) | (start >= len_q):
        return
    rows = start + tl.arange(0, BLOCK_Q)
    keep = rows < len_q
    q = load(query, b, h, first_q + start, keep, DIM, BLOCK_D)
    tau = temperature(b, h, first_q, rows, len_q, opt, n)
    scale = per_row(opt.scale, n.scale, b, h, first_q, rows, len_q)[:, None]
    exponent = 1.0 / tau * LOG2E
    top, total, acc = _forward_tiles(
        q, key, value, b, h, start, first_q, len_q, first_k, len_k, real, scale, exponent, opt, n, DIM, DIM_V, BLOCK_D,
        BLOCK_V, BLOCK_Q, BLOCK_K, PRECISION, ONE_TILE, False
    )  # fmt: skip
    if BY_ROW:
        if is_nan(acc):
            top, total, acc = _forward_tiles(
                q, key, value, b, h, start, first_q, len_q, first_k, len_k, real, scale, exponent, opt, n, DIM, DIM_V,
                BLOCK_D, BLOCK_V, BLOCK_Q, BLOCK_K, PRECISION, ONE_TILE, True
            )  # fmt: skip
    empty = total == 0.0
    share = 1.0 / tl.where(empty, 1.0, total)
    if opt.seed is not None:
        share = share * n.keep_factor
    store(out, b, h, first_q + start, keep, acc * share[:, None], DIM_V, BLOCK_V)
    of_row = tl.where(empty, 0.0, top) / tau + tl.log2(tl.where(empty, 1.0, total)) * LN2
    of_row = tl.where(empty, -float("inf"), of_row)
    tl.store(lse + row_number(b, h, first_q, rows, opt, n), of_row, mask=keep)


@triton.jit
def _row(b, h, start, first_q, len_q, opt, n, BLOCK: tl.constexpr):
    """Of BLOCK rows: which there are, their numbers, temperature and scale."""
    rows = start + tl.arange(0, BLOCK)
    tau = temperature(b, h, first_q, rows, len_q, opt, n)
    scale = per_row(opt.scale, n.scale, b, h, first_q, rows, len_q)
    return rows < len_q, row_number(b, h, first_q, rows, opt, n), tau, scale


@triton.jit
def _load_stats(stats, number, keep, rows):
    """Each row's maximum, its sum's inverse, delta."""
    top = tl.load(stats + number, mask=keep, other=0.0)
    share = tl.load(stats + rows + number, mask=keep, other=0.0)
    return top, share, tl.load(stats + 2 * rows + number, mask=keep, other=0.0)


@triton.jit
def _store_stats(stats, number, keep, rows, top, share, delta):
    tl.store(stats + number, top, mask=keep)
    tl.store(stats + rows + number, share, mask=keep)
    tl.store(stats + 2 * rows + number, delta, mask=keep)


@triton.jit
def _below_top(u):
    """Another kernel found the maximum, by products that may differ in the last place: a small temperature shows it."""
    return tl.minimum(u, 0.0, propagate_nan=tl.PropagateNan.ALL)


@triton.jit
def _row_sums(du, dz, u, products, AXIS: tl.constexpr):
    """What the gradients of temperature and scale need: Σ du·u, and Σ dz·q·k with dz behind the softcap."""
    return tl.sum(du * tl.maximum(u, LOWEST), AXIS) * LN2, tl.sum(dz * products, AXIS)


@triton.jit
def _store_factors(d_temperature, d_scale, d_lse, number, keep, of_tau, of_scale, top, tau):
    """d_temperature = -Σ du·(u + top / temperature) / temperature, and Σ du = d_lse."""
    if d_temperature is not None:
        if d_lse is not None:
            of_tau += top / tau * tl.load(d_lse + number, mask=keep, other=0.0)
        tl.store(d_temperature + number, -of_tau / tau, mask=keep)
    if d_scale is not None:
        tl.store(d_scale + number, of_scale / tau, mask=keep)


@triton.jit(do_not_specialize=["n", "stats_rows"])
def keys_kernel(
    d_query, d_key, d_value, d_temperature, d_scale, stats, d_out, d_lse, query, key, value, opt, n, stats_rows,
    DIM: tl.constexpr, DIM_V: tl.constexpr, BLOCK_D: tl.constexpr, BLOCK_V: tl.constexpr, BLOCK_Q: tl.constexpr,
    BLOCK_K: tl.constexpr, PRECISION: tl.constexpr, BY_ROW: tl.constexpr, WHOLE: tl.constexpr, STEPS: tl.constexpr,
    KEYS_FIRST: tl.constexpr, SHORTER: tl.constexpr,
):  # fmt: skip
    """One program: BLOCK_K keys of one key head; d_key and d_value. Tiles are keys × queries if KEYS_FIRST.

    WHOLE: those are all its sequence's keys, so that rows of scores are whole: their statistics come from here, d_query
    and what belongs to rows too. In a packed batch sequences of ≤ SHORTER keys are
    another launch's. STEPS: how many tiles of queries there are, where one head reads these keys."""
    AXIS: tl.constexpr = 0 if KEYS_FIRST else 1  # of the keys
    kv_heads = n.heads // n.group
    if WHOLE:
        b = tl.program_id(0) // kv_heads
        kv = tl.program_id(0) % kv_heads
        start = 0
    else:
        b, kv, start, _rest = locate(opt.cu_seqlens_k, n.len_k, kv_heads, n, BLOCK_K)
    first_q, len_q, first_k, len_k, real = sequence(b, opt, n)
    if opt.cu_seqlens_k is not None:
        if len_k <= SHORTER:
            return
        if WHOLE:
            if len_k > BLOCK_K:
                return
    if not WHOLE:
        if (start < 0) | (start >= len_k):
            return
    offset = len_k - len_q
    columns = start + tl.arange(0, BLOCK_K)
    keep_k = is_real(columns, b, real, opt)
    k = load(key, b, kv, first_k + start, keep_k, DIM, BLOCK_D)
    v = load(value, b, kv, first_k + start, keep_k, DIM_V, BLOCK_V)
    dk = tl.zeros((BLOCK_K, BLOCK_D), tl.float32)
    dv = tl.zeros((BLOCK_K, BLOCK_V), tl.float32)
    begin = 0
    end = len_q
    if not WHOLE:
        begin, end = rows_seeing(start, len_q, offset, n, BLOCK_K)
    tiles = tl.maximum(tl.cdiv(end - begin, BLOCK_Q), 0)
    steps = tiles * n.group if STEPS is None else STEPS
    for step in range(0, steps):
        h = kv
        first = step * BLOCK_Q
        if STEPS is None:
            h = kv * n.group + step // tiles
            first = begin + step % tiles * BLOCK_Q
        keep_q, number, tau, scale = _row(b, h, first, first_q, len_q, opt, n, BLOCK_Q)
        q = load(query, b, h, first_q + first, keep_q, DIM, BLOCK_D)
        do = load(d_out, b, h, first_q + first, keep_q, DIM_V, BLOCK_V)
        rows = tl.expand_dims(first + tl.arange(0, BLOCK_Q), AXIS)
        keys = tl.expand_dims(columns, 1 - AXIS)
        inside = tl.expand_dims(keep_k, 1 - AXIS) & tl.expand_dims(keep_q, AXIS)
        exponent = tl.expand_dims(1.0 / tau * LOG2E, AXIS)
        if KEYS_FIRST:
            products = tl.dot(k, tl.trans(q), input_precision=PRECISION)
        else:
            products = tl.dot(q, tl.trans(k), input_precision=PRECISION)
        z, visible, slope = scores(products, rows, keys, inside, b, h, offset, tl.expand_dims(scale, AXIS), opt, n)
        if WHOLE:
            top = tl.max(z, AXIS)
            top = tl.where(top == -float("inf"), 0.0, top)
            u = (z - tl.expand_dims(top, AXIS)) * exponent
            p = tl.exp2(u)
            total = tl.sum(p, AXIS)
            share = 1.0 / tl.where(total == 0.0, 1.0, total)
        else:
            top, share, delta = _load_stats(stats, number, keep_q, stats_rows)
            u = _below_top((z - tl.expand_dims(top, AXIS)) * exponent)
            p = tl.exp2(u)
        p = p * tl.expand_dims(share, AXIS)
        dropped = p
        if opt.seed is not None:
            factor = tl.where(kept(tl.expand_dims(number, AXIS), keys, opt, n), n.keep_factor, 0.0)
            dropped = p * factor
        if d_value is not None:
            weights = dropped.to(do.dtype)
            if not KEYS_FIRST:
                weights = tl.trans(weights)
            dv = tl.dot(weights, do, dv, input_precision=PRECISION)
        if KEYS_FIRST:
            dp = tl.dot(v, tl.trans(do), input_precision=PRECISION)
        else:
            dp = tl.dot(do, tl.trans(v), input_precision=PRECISION)
        if opt.seed is not None:
            dp = dp * factor
        dp = tl.where(visible, dp, 0.0)
        if WHOLE:
            delta = tl.sum(p * dp, AXIS)
            if stats is not None:
                _store_stats(stats, number, keep_q, stats_rows, top, share, delta)
        dp = dp - tl.expand_dims(delta, AXIS)
        if d_lse is not None:
            dp += tl.expand_dims(tl.load(d_lse + number, mask=keep_q, other=0.0), AXIS)
        du = tl.where(visible, p * dp, 0.0)
        dz = du
        if n.softcap is not None:
            dz = du * slope
        if WHOLE:
            of_tau, of_scale = _row_sums(du, dz, u, products, AXIS)
            _store_factors(d_temperature, d_scale, d_lse, number, keep_q, of_tau, of_scale, top, tau)
        if (opt.temperature is not None) | (opt.scale is not None):
            dz = dz * tl.expand_dims(scale / tau, AXIS)
        of_keys = dz.to(q.dtype)
        of_queries = of_keys
        if KEYS_FIRST:
            of_queries = tl.trans(of_keys)
        else:
            of_keys = tl.trans(of_keys)
        if d_key is not None:
            dk = tl.dot(of_keys, q, dk, input_precision=PRECISION)
        if WHOLE:
            if d_query is not None:
                dq = tl.dot(of_queries, k, input_precision=PRECISION)
                if BY_ROW:
                    if is_nan(dq):
                        dq = tl.dot(of_queries, cleaned(k)[0], input_precision=PRECISION)
                if (opt.temperature is None) & (opt.scale is None):
                    dq = dq * (n.scale / tl.maximum(n.temperature, TINY))
                store(d_query, b, h, first_q + first, keep_q, dq, DIM, BLOCK_D)
    if (opt.temperature is None) & (opt.scale is None):
        dk = dk * (n.scale / tl.maximum(n.temperature, TINY))
    inside = columns < len_k
    if d_key is not None:
        store(d_key, b, kv, first_k + start, inside, tl.where(keep_k[:, None], dk, 0.0), DIM, BLOCK_D)
    if d_value is not None:
        store(d_value, b, kv, first_k + start, inside, tl.where(keep_k[:, None], dv, 0.0), DIM_V, BLOCK_V)


@triton.jit
def _query_tile(
    q, do, d_lse, delta, top, share, k, v, first, keep_k, number, b, h, start, len_q, offset, tau, scale, opt, n,
    BLOCK_Q: tl.constexpr, BLOCK_K: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """du, dz behind the softcap, u and query·keyᵀ of a tile queries × keys whose rows' statistics are known."""
    rows = start + tl.arange(0, BLOCK_Q)
    columns = (first + tl.arange(0, BLOCK_K))[None, :]
    products = tl.dot(q, tl.trans(k), input_precision=PRECISION)
    inside = keep_k[None, :] & (rows < len_q)[:, None]
    z, visible, slope = scores(products, rows[:, None], columns, inside, b, h, offset, scale[:, None], opt, n)
    u = _below_top((z - top[:, None]) * (1.0 / tau * LOG2E)[:, None])
    p = tl.exp2(u) * share[:, None]
    dp = tl.dot(do, tl.trans(v), input_precision=PRECISION)
    if opt.seed is not None:
        dp = tl.where(kept(number[:, None], columns, opt, n), dp * n.keep_factor, 0.0)
    dp = dp - delta[:, None]
    if d_lse is not None:
        dp += tl.load(d_lse + number, mask=rows < len_q, other=0.0)[:, None]
    du = tl.where(visible, p * dp, 0.0)
    dz = du
    if n.softcap is not None:
        dz = du * slope
    return du, dz, u, products


@triton.jit
def _d_query_tiles(
    q, do, d_lse, delta, top, share, key, value, number, b, h, start, len_q, first_k, len_k, real, tau, scale, opt, n,
    DIM: tl.constexpr, DIM_V: tl.constexpr, BLOCK_D: tl.constexpr, BLOCK_V: tl.constexpr, BLOCK_Q: tl.constexpr,
    BLOCK_K: tl.constexpr, PRECISION: tl.constexpr, FACTORS: tl.constexpr, CLEAN: tl.constexpr,
):  # fmt: skip
    of_tau = tl.zeros((BLOCK_Q,), tl.float32)
    of_scale = tl.zeros((BLOCK_Q,), tl.float32)
    dq = tl.zeros((BLOCK_Q, BLOCK_D), tl.float32)
    begin, end = keys_seen(start, real, len_k - len_q, n, BLOCK_Q)
    for first in range(begin, end, BLOCK_K):
        keep = is_real(first + tl.arange(0, BLOCK_K), b, real, opt)
        k = load(key, b, h // n.group, first_k + first, keep, DIM, BLOCK_D)
        v = load(value, b, h // n.group, first_k + first, keep, DIM_V, BLOCK_V)
        du, dz, u, products = _query_tile(
            q, do, d_lse, delta, top, share, k, v, first, keep, number, b, h, start, len_q, len_k - len_q, tau, scale,
            opt, n, BLOCK_Q, BLOCK_K, PRECISION
        )  # fmt: skip
        if FACTORS:
            a, c = _row_sums(du, dz, u, products, 1)
            of_tau += a
            of_scale += c
        if CLEAN:
            k = cleaned(k)[0]
        dq = tl.dot(dz.to(k.dtype), k, dq, input_precision=PRECISION)
    return dq, of_tau, of_scale


@triton.jit(do_not_specialize=["n", "stats_rows"])
def queries_kernel(
    d_query, d_temperature, d_scale, stats, d_out, d_lse, query, key, value, opt, n, stats_rows, DIM: tl.constexpr,
    DIM_V: tl.constexpr, BLOCK_D: tl.constexpr, BLOCK_V: tl.constexpr, BLOCK_Q: tl.constexpr, BLOCK_K: tl.constexpr,
    PRECISION: tl.constexpr, BY_ROW: tl.constexpr, SHORTER: tl.constexpr,
):  # fmt: skip
    """One program: BLOCK_Q rows of one head. Their statistics first, in an online pass; then d_query."""
    b, h, start, _rest = locate(opt.cu_seqlens_q, n.len_q, n.heads, n, BLOCK_Q)
    first_q, len_q, first_k, len_k, real = sequence(b, opt, n)
    if (start < 0) | (start >= len_q):
        return
    if opt.cu_seqlens_q is not None:
        if len_k <= SHORTER:
            return
    keep_q, number, tau, scale = _row(b, h, start, first_q, len_q, opt, n, BLOCK_Q)
    q = load(query, b, h, first_q + start, keep_q, DIM, BLOCK_D)
    do = load(d_out, b, h, first_q + start, keep_q, DIM_V, BLOCK_V)
    offset = len_k - len_q
    rows = (start + tl.arange(0, BLOCK_Q))[:, None]

    top = tl.full((BLOCK_Q,), -float("inf"), tl.float32)
    total = tl.zeros((BLOCK_Q,), tl.float32)
    delta = tl.zeros((BLOCK_Q,), tl.float32)
    begin, end = keys_seen(start, real, offset, n, BLOCK_Q)
    for first in range(begin, end, BLOCK_K):
        columns = first + tl.arange(0, BLOCK_K)
        keep = is_real(columns, b, real, opt)
        k = load(key, b, h // n.group, first_k + first, keep, DIM, BLOCK_D)
        v = load(value, b, h // n.group, first_k + first, keep, DIM_V, BLOCK_V)
        products = tl.dot(q, tl.trans(k), input_precision=PRECISION)
        inside = keep[None, :] & keep_q[:, None]
        z, visible, _slope = scores(products, rows, columns[None, :], inside, b, h, offset, scale[:, None], opt, n)
        dp = tl.dot(do, tl.trans(v), input_precision=PRECISION)
        if opt.seed is not None:
            dp = tl.where(kept(number[:, None], columns[None, :], opt, n), dp * n.keep_factor, 0.0)
        higher = tl.maximum(top, tl.max(z, 1))
        shift = tl.where(higher == -float("inf"), 0.0, higher)
        p = tl.exp2((z - shift[:, None]) * (1.0 / tau * LOG2E)[:, None])
        shrink = tl.exp2((top - shift) * (1.0 / tau * LOG2E))
        total = total * shrink + tl.sum(p, 1)
        delta = delta * shrink + tl.sum(p * tl.where(visible, dp, 0.0), 1)
        top = higher
    top = tl.where(top == -float("inf"), 0.0, top)
    share = 1.0 / tl.where(total == 0.0, 1.0, total)
    delta = delta * share
    _store_stats(stats, number, keep_q, stats_rows, top, share, delta)

    FACTORS: tl.constexpr = (d_temperature is not None) | (d_scale is not None)
    if (d_query is not None) | FACTORS:
        dq, of_tau, of_scale = _d_query_tiles(
            q, do, d_lse, delta, top, share, key, value, number, b, h, start, len_q, first_k, len_k, real, tau, scale,
            opt, n, DIM, DIM_V, BLOCK_D, BLOCK_V, BLOCK_Q, BLOCK_K, PRECISION, FACTORS, False
        )  # fmt: skip
        if BY_ROW:
            if is_nan(dq):
                dq, of_tau, of_scale = _d_query_tiles(
                    q, do, d_lse, delta, top, share, key, value, number, b, h, start, len_q, first_k, len_k, real, tau,
                    scale, opt, n, DIM, DIM_V, BLOCK_D, BLOCK_V, BLOCK_Q, BLOCK_K, PRECISION, FACTORS, True
                )  # fmt: skip
        _store_factors(d_temperature, d_scale, d_lse, number, keep_q, of_tau, of_scale, top, tau)
        if d_query is not None:
            store(d_query, b, h, first_q + start, keep_q, dq * (scale / tau)[:, None], DIM, BLOCK_D)


@triton.jit
def _d_bias_tile(
    b, h, start, first, stats, stats_rows, d_out, d_lse, query, key, value, opt, n, DIM: tl.constexpr,
    DIM_V: tl.constexpr, BLOCK_D: tl.constexpr, BLOCK_V: tl.constexpr, BLOCK_Q: tl.constexpr, BLOCK_K: tl.constexpr,
    PRECISION: tl.constexpr,
):  # fmt: skip
    """dz before the softcap, an added term's gradient, of rows from `start` and keys from `first` on (also below 0)."""
    first_q, len_q, first_k, len_k, real = sequence(b, opt, n)
    keep_q, number, tau, scale = _row(b, h, start, first_q, len_q, opt, n, BLOCK_Q)
    keep_k = is_real(first + tl.arange(0, BLOCK_K), b, real, opt)
    q = load(query, b, h, first_q + start, keep_q, DIM, BLOCK_D)
    do = load(d_out, b, h, first_q + start, keep_q, DIM_V, BLOCK_V)
    k = load(key, b, h // n.group, first_k + first, keep_k, DIM, BLOCK_D)
    v = load(value, b, h // n.group, first_k + first, keep_k, DIM_V, BLOCK_V)
    top, share, delta = _load_stats(stats, number, keep_q, stats_rows)
    du, _dz, _u, _products = _query_tile(
        q, do, d_lse, delta, top, share, k, v, first, keep_k, number, b, h, start, len_q, len_k - len_q, tau, scale,
        opt, n, BLOCK_Q, BLOCK_K, PRECISION
    )  # fmt: skip
    return du / tau[:, None]


@triton.jit(do_not_specialize=["n", "stats_rows", "parts"])
def bias_kernel(
    d_bias, stats, d_out, d_lse, query, key, value, opt, n, stats_rows, parts, sizes, DIM: tl.constexpr,
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
        acc += _d_bias_tile(
            b, h, start, first, stats, stats_rows, d_out, d_lse, query, key, value, opt, n, DIM, DIM_V, BLOCK_D,
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


@triton.jit(do_not_specialize=["n", "stats_rows"])
def relative_bias_kernel(
    d_relative_bias, stats, d_out, d_lse, query, key, value, opt, n, stats_rows, DIM: tl.constexpr,
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
            dz = _d_bias_tile(
                b, h, row, row + offset + entry - n.reach, stats, stats_rows, d_out, d_lse, query, key, value, opt, n,
                DIM, DIM_V, BLOCK_D, BLOCK_V, BLOCK, 2 * BLOCK, PRECISION
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
                dz = _d_bias_tile(
                    b, h, row, column, stats, stats_rows, d_out, d_lse, query, key, value, opt, n, DIM, DIM_V,
                    BLOCK_D, BLOCK_V, BLOCK, 2 * BLOCK, PRECISION
                )  # fmt: skip
                rows = (row + tl.arange(0, BLOCK))[:, None]
                distance = column + tl.arange(0, 2 * BLOCK)[None, :] - rows - offset
                at_end = tl.where(block == 0, (distance <= -n.reach) | (n.reach == 0), distance >= n.reach)
                ends += tl.sum(tl.where(at_end, dz, 0.0), 1)
        tl.store(line + block * 2 * n.reach, tl.sum(ends, 0))
