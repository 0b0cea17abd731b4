"""Attention's Triton kernels: forward; backward by key tiles and by query tiles.

z = cap(scale · q·kᵀ) + bias + relative_bias,  u = z / temperature,  p = softmax(u),  out = p · v
du = p (dp - delta + d_lse),  dp = d_out · vᵀ,  delta = Σ_j p dp,  dz = du / temperature,  d_q = scale · Σ cap' dz k

`statistics` (2, rows) holds each row's maximum of z and 1 / Σ exp((z - maximum) / temperature): lse alone has too few
digits where z / temperature is large. Nothing is added up by atomics: every element has one writer.
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
    seen,
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
    z = tl.where(visible, z, -float("inf"))
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
        acc += tl.where(tl.dot(seen(z, visible, v), bad, input_precision=PRECISION) > 0, float("nan"), 0.0)
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


@triton.jit(do_not_specialize=["n", "n_rows"])
def forward_kernel(
    out, lse, statistics, query, key, value, opt, n, n_rows, DIM: tl.constexpr, DIM_V: tl.constexpr,
    BLOCK_D: tl.constexpr, BLOCK_V: tl.constexpr, BLOCK_Q: tl.constexpr, BLOCK_K: tl.constexpr,
    PRECISION: tl.constexpr, BY_ROW: tl.constexpr, ONE_TILE: tl.constexpr,
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
    number = row_number(b, h, first_q, rows, opt, n)
    top = tl.where(empty, 0.0, top)
    of_row = top / tau + tl.log2(tl.where(empty, 1.0, total)) * LN2
    tl.store(lse + number, tl.where(empty, -float("inf"), of_row), mask=keep)
    if statistics is not None:
        tl.store(statistics + number, top, mask=keep)
        tl.store(statistics + n_rows + number, 1.0 / tl.where(empty, 1.0, total), mask=keep)


@triton.jit
def row(b, h, start, first_q, len_q, opt, n, BLOCK: tl.constexpr):
    """Of BLOCK rows: which there are, their numbers, temperature and scale."""
    rows = start + tl.arange(0, BLOCK)
    tau = temperature(b, h, first_q, rows, len_q, opt, n)
    scale = per_row(opt.scale, n.scale, b, h, first_q, rows, len_q)
    return rows < len_q, row_number(b, h, first_q, rows, opt, n), tau, scale


@triton.jit
def load_statistics(statistics, number, keep, n_rows):
    """Each row's maximum and its sum's inverse."""
    top = tl.load(statistics + number, mask=keep, other=0.0)
    return top, tl.load(statistics + n_rows + number, mask=keep, other=0.0)


@triton.jit
def _below_top(u):
    """Another kernel found the maximum, by products that may differ in the last place: a small temperature shows it."""
    return tl.minimum(u, 0.0, propagate_nan=tl.PropagateNan.ALL)


@triton.jit
def _row_sums(du, dz, u, products, AXIS: tl.constexpr):
    """What the gradients of temperature and scale need: Σ du·u, and Σ dz·q·k with dz behind the softcap."""
    return tl.sum(du * tl.maximum(u, LOWEST), AXIS) * LN2, tl.sum(dz * tl.where(dz == 0.0, 0.0, products), AXIS)


@triton.jit
def _store_factors(d_temperature, d_scale, d_lse, number, keep, of_tau, of_scale, top, tau):
    """d_temperature = -Σ du·(u + top / temperature) / temperature, and Σ du = d_lse."""
    if d_temperature is not None:
        if d_lse is not None:
            of_tau += top / tau * tl.load(d_lse + number, mask=keep, other=0.0)
        tl.store(d_temperature + number, -of_tau / tau, mask=keep)
    if d_scale is not None:
        tl.store(d_scale + number, of_scale / tau, mask=keep)


@triton.jit
def _key_tile(
    dk, dv, k, v, keep_k, d_query, d_temperature, d_scale, delta, statistics, d_out, d_lse, query, opt, n, n_rows, b, h,
    first, start, first_q, len_q, offset, DIM: tl.constexpr, DIM_V: tl.constexpr, BLOCK_D: tl.constexpr,
    BLOCK_V: tl.constexpr, BLOCK_Q: tl.constexpr, BLOCK_K: tl.constexpr, PRECISION: tl.constexpr, BY_ROW: tl.constexpr,
    NEED_K: tl.constexpr, NEED_V: tl.constexpr, WHOLE: tl.constexpr, KEYS_FIRST: tl.constexpr, CLEAN: tl.constexpr,
):  # fmt: skip
    """d_key and d_value with what BLOCK_Q rows of one head from `first` on add.

    Where all rows see the same keys and statistics are known, padding needs no mask: its gradients aren't stored."""
    AXIS: tl.constexpr = 0 if KEYS_FIRST else 1  # of the keys
    keep_q, number, tau, scale = row(b, h, first, first_q, len_q, opt, n, BLOCK_Q)
    q = load(query, b, h, first_q + first, keep_q, DIM, BLOCK_D)
    do = load(d_out, b, h, first_q + first, keep_q, DIM_V, BLOCK_V)
    rows = tl.expand_dims(first + tl.arange(0, BLOCK_Q), AXIS)
    columns = tl.expand_dims(start + tl.arange(0, BLOCK_K), 1 - AXIS)
    inside = tl.expand_dims(keep_k, 1 - AXIS) & tl.expand_dims(keep_q, AXIS)
    exponent = tl.expand_dims(1.0 / tau * LOG2E, AXIS)
    if KEYS_FIRST:
        products = tl.dot(k, tl.trans(q), input_precision=PRECISION)
    else:
        products = tl.dot(q, tl.trans(k), input_precision=PRECISION)
    z, visible, slope = scores(products, rows, columns, inside, b, h, offset, tl.expand_dims(scale, AXIS), opt, n)
    if WHOLE:
        z = tl.where(visible, z, -float("inf"))
        top = tl.max(z, AXIS)
        top = tl.where(top == -float("inf"), 0.0, top)
        u = (z - tl.expand_dims(top, AXIS)) * exponent
        p = tl.exp2(u)
        total = tl.sum(p, AXIS)
        share = 1.0 / tl.where(total == 0.0, 1.0, total)
    else:
        top, share = load_statistics(statistics, number, keep_q, n_rows)
        u = _below_top((z - tl.expand_dims(top, AXIS)) * exponent)
        p = tl.exp2(u)
    p = p * tl.expand_dims(share, AXIS)
    if CLEAN | (BY_ROW & (not WHOLE)):
        p = tl.where(visible, p, 0.0)
    dropped = p
    if opt.seed is not None:
        factor = tl.where(kept(tl.expand_dims(number, AXIS), columns, opt, n), n.keep_factor, 0.0)
        dropped = p * factor
    if NEED_V:
        weights = dropped.to(do.dtype)
        if not KEYS_FIRST:
            weights = tl.trans(weights)
        finite = do
        if CLEAN:
            ones = seen(z, visible, do)
            if not KEYS_FIRST:
                ones = tl.trans(ones)
            finite, bad = cleaned(do)
            dv += tl.where(tl.dot(ones, bad, input_precision=PRECISION) > 0, float("nan"), 0.0)
        dv = tl.dot(weights, finite, dv, input_precision=PRECISION)
    if KEYS_FIRST:
        dp = tl.dot(v, tl.trans(do), input_precision=PRECISION)
    else:
        dp = tl.dot(do, tl.trans(v), input_precision=PRECISION)
    if opt.seed is not None:
        dp = dp * factor
    if WHOLE:
        dp = tl.where(visible, dp, 0.0)
        of_row = tl.sum(p * dp, AXIS)
        if delta is not None:
            tl.store(delta + number, of_row, mask=keep_q)
    else:
        of_row = tl.load(delta + number, mask=keep_q, other=0.0)
    dp = dp - tl.expand_dims(of_row, AXIS)
    if d_lse is not None:  # after delta, which may cancel dp to the last bit
        dp += tl.expand_dims(tl.load(d_lse + number, mask=keep_q, other=0.0), AXIS)
    du = p * dp
    if BY_ROW | WHOLE:
        du = tl.where(visible, du, 0.0)
    dz = du
    if n.softcap is not None:
        dz = tl.where(visible, du * slope, 0.0)  # a hidden key's slope may be NaN
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
    if NEED_K:
        if CLEAN:
            q = cleaned(q)[0]
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
    return dk, dv


@triton.jit
def _key_tiles(
    k, v, keep_k, d_query, d_temperature, d_scale, delta, statistics, d_out, d_lse, query, opt, n, n_rows, b, kv, start,
    first_q, len_q, offset, DIM: tl.constexpr, DIM_V: tl.constexpr, BLOCK_D: tl.constexpr, BLOCK_V: tl.constexpr,
    BLOCK_Q: tl.constexpr, BLOCK_K: tl.constexpr, PRECISION: tl.constexpr, BY_ROW: tl.constexpr, NEED_K: tl.constexpr,
    NEED_V: tl.constexpr, WHOLE: tl.constexpr, STEPS: tl.constexpr, KEYS_FIRST: tl.constexpr, CLEAN: tl.constexpr,
):  # fmt: skip
    """d_key and d_value of BLOCK_K keys from all rows that read them; WHOLE: what belongs to the rows is stored.

    CLEAN: a row that isn't finite leaves the keys alone that it doesn't see."""
    dk = tl.zeros((BLOCK_K, BLOCK_D), tl.float32)
    dv = tl.zeros((BLOCK_K, BLOCK_V), tl.float32)
    if STEPS is None:
        begin = 0
        end = len_q
        if not WHOLE:
            begin, end = rows_seeing(start, len_q, offset, n, BLOCK_K)
        for member in range(0, n.group):
            h = kv * n.group + member
            for first in range(begin, end, BLOCK_Q):
                dk, dv = _key_tile(
                    dk, dv, k, v, keep_k, d_query, d_temperature, d_scale, delta, statistics, d_out, d_lse, query, opt,
                    n, n_rows, b, h, first, start, first_q, len_q, offset, DIM, DIM_V, BLOCK_D, BLOCK_V, BLOCK_Q,
                    BLOCK_K, PRECISION, BY_ROW, NEED_K, NEED_V, WHOLE, KEYS_FIRST, CLEAN
                )  # fmt: skip
    else:
        for step in range(0, STEPS):
            dk, dv = _key_tile(
                dk, dv, k, v, keep_k, d_query, d_temperature, d_scale, delta, statistics, d_out, d_lse, query, opt, n,
                n_rows, b, kv, step * BLOCK_Q, start, first_q, len_q, offset, DIM, DIM_V, BLOCK_D, BLOCK_V, BLOCK_Q,
                BLOCK_K, PRECISION, BY_ROW, NEED_K, NEED_V, WHOLE, KEYS_FIRST, CLEAN
            )  # fmt: skip
    return dk, dv


@triton.jit(do_not_specialize=["n", "n_rows"])
def keys_kernel(
    d_query, d_key, d_value, d_temperature, d_scale, delta, statistics, d_out, d_lse, query, key, value, opt, n, n_rows,
    DIM: tl.constexpr, DIM_V: tl.constexpr, BLOCK_D: tl.constexpr, BLOCK_V: tl.constexpr, BLOCK_Q: tl.constexpr,
    BLOCK_K: tl.constexpr, PRECISION: tl.constexpr, BY_ROW: tl.constexpr, WHOLE: tl.constexpr, STEPS: tl.constexpr,
    KEYS_FIRST: tl.constexpr, SHORTER: tl.constexpr,
):  # fmt: skip
    """One program: BLOCK_K keys of one key head; d_key and d_value. Tiles are keys × queries if KEYS_FIRST.

    WHOLE: those are all its sequence's keys, so that rows of scores are whole: statistics and delta come from here,
    d_query and what belongs to rows too. In a packed batch sequences of ≤ SHORTER keys are another launch's.
    STEPS: how many tiles of queries there are, where one head reads these keys."""
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
    columns = start + tl.arange(0, BLOCK_K)
    keep_k = is_real(columns, b, real, opt)
    k = load(key, b, kv, first_k + start, keep_k, DIM, BLOCK_D)
    v = load(value, b, kv, first_k + start, keep_k, DIM_V, BLOCK_V)
    NEED_K: tl.constexpr = d_key is not None
    NEED_V: tl.constexpr = d_value is not None
    dk, dv = _key_tiles(
        k, v, keep_k, d_query, d_temperature, d_scale, delta, statistics, d_out, d_lse, query, opt, n, n_rows, b, kv,
        start, first_q, len_q, len_k - len_q, DIM, DIM_V, BLOCK_D, BLOCK_V, BLOCK_Q, BLOCK_K, PRECISION, BY_ROW, NEED_K,
        NEED_V, WHOLE, STEPS, KEYS_FIRST, False
    )  # fmt: skip
    if BY_ROW:
        if is_nan(dk) | is_nan(dv):
            dk, dv = _key_tiles(
                k, v, keep_k, None, None, None, None if WHOLE else delta, statistics, d_out, d_lse, query, opt, n,
                n_rows, b, kv, start, first_q, len_q, len_k - len_q, DIM, DIM_V, BLOCK_D, BLOCK_V, BLOCK_Q, BLOCK_K,
                PRECISION, BY_ROW, NEED_K, NEED_V, WHOLE, STEPS, KEYS_FIRST, True
            )  # fmt: skip
    if (opt.temperature is None) & (opt.scale is None):
        dk = dk * (n.scale / tl.maximum(n.temperature, TINY))
    inside = columns < len_k
    if NEED_K:
        store(d_key, b, kv, first_k + start, inside, tl.where(keep_k[:, None], dk, 0.0), DIM, BLOCK_D)
    if NEED_V:
        store(d_value, b, kv, first_k + start, inside, tl.where(keep_k[:, None], dv, 0.0), DIM_V, BLOCK_V)


@triton.jit
def query_tile(
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
        dz = tl.where(visible, du * slope, 0.0)  # a hidden key's slope may be NaN
    return du, dz, u, products


@triton.jit
def _query_tiles(
    q, do, d_lse, delta, top, share, key, value, number, b, h, start, len_q, first_k, len_k, real, tau, scale, opt, n,
    DIM: tl.constexpr, DIM_V: tl.constexpr, BLOCK_D: tl.constexpr, BLOCK_V: tl.constexpr, BLOCK_Q: tl.constexpr,
    BLOCK_K: tl.constexpr, PRECISION: tl.constexpr, NEED: tl.constexpr, FACTORS: tl.constexpr, CLEAN: tl.constexpr,
):  # fmt: skip
    """d_query / (scale / temperature), the sums for temperature and scale, Σ du and Σ |du| of each row."""
    of_tau = tl.zeros((BLOCK_Q,), tl.float32)
    of_scale = tl.zeros((BLOCK_Q,), tl.float32)
    total = tl.zeros((BLOCK_Q,), tl.float32)
    size = tl.zeros((BLOCK_Q,), tl.float32)
    dq = tl.zeros((BLOCK_Q, BLOCK_D), tl.float32)
    begin, end = keys_seen(start, real, len_k - len_q, n, BLOCK_Q)
    for first in range(begin, end, BLOCK_K):
        keep = is_real(first + tl.arange(0, BLOCK_K), b, real, opt)
        k = load(key, b, h // n.group, first_k + first, keep, DIM, BLOCK_D)
        v = load(value, b, h // n.group, first_k + first, keep, DIM_V, BLOCK_V)
        du, dz, u, products = query_tile(
            q, do, d_lse, delta, top, share, k, v, first, keep, number, b, h, start, len_q, len_k - len_q, tau, scale,
            opt, n, BLOCK_Q, BLOCK_K, PRECISION
        )  # fmt: skip
        total += tl.sum(du, 1)
        size += tl.sum(tl.abs(du), 1)
        if FACTORS:
            a, c = _row_sums(du, dz, u, products, 1)
            of_tau += a
            of_scale += c
        if NEED:
            if CLEAN:
                k = cleaned(k)[0]
            dq = tl.dot(dz.to(k.dtype), k, dq, input_precision=PRECISION)
    return dq, of_tau, of_scale, total, size


@triton.jit(do_not_specialize=["n", "n_rows"])
def queries_kernel(
    d_query, d_temperature, d_scale, delta, out, statistics, d_out, d_lse, query, key, value, opt, n, n_rows,
    DIM: tl.constexpr, DIM_V: tl.constexpr, BLOCK_D: tl.constexpr, BLOCK_V: tl.constexpr, BLOCK_Q: tl.constexpr,
    BLOCK_K: tl.constexpr, PRECISION: tl.constexpr, BY_ROW: tl.constexpr, SHORTER: tl.constexpr, ROUNDING: tl.constexpr,
):  # fmt: skip
    """One program: BLOCK_Q rows of one head. d_query, and delta = Σ_j p dp for those who come after.

    delta begins as Σ out·d_out, and out is rounded. Its error is -Σ du (+ d_lse); where that shows beside Σ |du|, as in
    rows whose weight is nearly all on one key, the pass is made again with the exact one."""
    b, h, start, _rest = locate(opt.cu_seqlens_q, n.len_q, n.heads, n, BLOCK_Q)
    first_q, len_q, first_k, len_k, real = sequence(b, opt, n)
    if (start < 0) | (start >= len_q):
        return
    if opt.cu_seqlens_q is not None:
        if len_k <= SHORTER:
            return
    keep_q, number, tau, scale = row(b, h, start, first_q, len_q, opt, n, BLOCK_Q)
    q = load(query, b, h, first_q + start, keep_q, DIM, BLOCK_D)
    do = load(d_out, b, h, first_q + start, keep_q, DIM_V, BLOCK_V)
    top, share = load_statistics(statistics, number, keep_q, n_rows)
    o = load(out, b, h, first_q + start, keep_q, DIM_V, BLOCK_V)
    rounded = tl.sum(o.to(tl.float32) * do.to(tl.float32), 1)
    NEED: tl.constexpr = d_query is not None
    FACTORS: tl.constexpr = (d_temperature is not None) | (d_scale is not None)
    dq, of_tau, of_scale, total, size = _query_tiles(
        q, do, d_lse, rounded, top, share, key, value, number, b, h, start, len_q, first_k, len_k, real, tau, scale,
        opt, n, DIM, DIM_V, BLOCK_D, BLOCK_V, BLOCK_Q, BLOCK_K, PRECISION, NEED, FACTORS, False
    )  # fmt: skip
    if d_lse is not None:
        total -= tl.load(d_lse + number, mask=keep_q, other=0.0)
    tl.store(delta + number, rounded + total, mask=keep_q)
    shows = tl.max((tl.abs(total) > ROUNDING * size).to(tl.int32), 0) > 0
    again = shows
    if BY_ROW:
        again = again | is_nan(dq)
    if again:
        of_row = tl.where(shows, rounded + total, rounded)
        dq, of_tau, of_scale, total, size = _query_tiles(
            q, do, d_lse, of_row, top, share, key, value, number, b, h, start, len_q, first_k, len_k, real, tau, scale,
            opt, n, DIM, DIM_V, BLOCK_D, BLOCK_V, BLOCK_Q, BLOCK_K, PRECISION, NEED, FACTORS, BY_ROW
        )  # fmt: skip
    _store_factors(d_temperature, d_scale, d_lse, number, keep_q, of_tau, of_scale, top, tau)
    if NEED:
        store(d_query, b, h, first_q + start, keep_q, dq * (scale / tau)[:, None], DIM, BLOCK_D)
