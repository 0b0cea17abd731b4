"""What latent attention does besides matrix products, in one pass each: sums of rows by sequence, the gated unit.

With u = [a | gate]:  g = a · gelu(gate),  gelu(x) = x · Φ(x). Sequences' rows follow each other; `ends` (B,) says where
each one's end among all rows, of which a launch has `rows` from `first` on. Every element has one writer.
"""

from __future__ import annotations

from typing import Any

import triton
import triton.language as tl
from torch import Tensor

from . import launcher

COLUMNS = 64  # 128 bytes of a row
ROWS = 16  # at once
PART = 256  # rows a program of d_gated_kernel has
WARPS, STAGES = 4, 3


@triton.jit
def _phi(x):
    """Φ, the share of a normal distribution below x."""
    return 0.5 * (1.0 + tl.erf(x * 0.7071067811865476))


@triton.jit(do_not_specialize=["first", "rows"])
def sums_kernel(
    sums, x, ends, first, rows, width, stride, GATED: tl.constexpr, COLUMNS: tl.constexpr, ROWS: tl.constexpr
):
    """sums (B, width) += Σ x of each sequence's rows, or of g if GATED: x is u then. A program: a sequence, COLUMNS."""
    blocks = tl.cdiv(width, COLUMNS)
    b = tl.program_id(0) // blocks
    columns = (tl.program_id(0) % blocks * COLUMNS + tl.arange(0, COLUMNS))[None, :]
    begin = tl.maximum(tl.load(ends + b - 1, mask=b > 0, other=0).to(tl.int32) - first, 0)
    end = tl.minimum(tl.load(ends + b).to(tl.int32) - first, rows)
    if begin >= end:
        return
    acc = tl.zeros((COLUMNS,), tl.float32)
    for at in range(begin, end, ROWS):
        row = (at + tl.arange(0, ROWS)).to(tl.int64)[:, None]
        inside = (row < end) & (columns < width)
        value = tl.load(x + row * stride + columns, mask=inside, other=0.0).to(tl.float32)
        if GATED:
            gate = tl.load(x + row * stride + width + columns, mask=inside, other=0.0).to(tl.float32)
            value = value * gate * _phi(gate)
        acc += tl.sum(value, 0)
    to = sums + b.to(tl.int64) * width + columns
    tl.store(to, tl.load(to, mask=columns < width, other=0.0) + acc[None, :], mask=columns < width)


@triton.jit(do_not_specialize=["rows"])
def d_gated_kernel(
    d_u, d_bias, u, d_g, sequences, rows, width, COLUMNS: tl.constexpr, ROWS: tl.constexpr, PART: tl.constexpr
):
    """d_u (rows, 2 · width) from d_g (B + 1, width) of each row's sequence, and d_bias (parts, 2 · width), its sums.

    A program: PART rows, COLUMNS of a and of gate."""
    blocks = tl.cdiv(width, COLUMNS)
    part = tl.program_id(0) // blocks
    columns = (tl.program_id(0) % blocks * COLUMNS + tl.arange(0, COLUMNS))[None, :]
    of_a = tl.zeros((COLUMNS,), tl.float32)
    of_gate = tl.zeros((COLUMNS,), tl.float32)
    for at in range(part * PART, tl.minimum(part * PART + PART, rows), ROWS):
        row = (at + tl.arange(0, ROWS)).to(tl.int64)[:, None]
        inside = (row < rows) & (columns < width)
        here = row * (2 * width) + columns
        a = tl.load(u + here, mask=inside, other=0.0).to(tl.float32)
        gate = tl.load(u + here + width, mask=inside, other=0.0).to(tl.float32)
        b = tl.load(sequences + row, mask=row < rows, other=0)
        d = tl.load(d_g + b * width + columns, mask=inside, other=0.0)
        phi = _phi(gate)
        d_a = d * gate * phi
        d_gate = d * a * (phi + gate * 0.3989422804014327 * tl.exp(-0.5 * gate * gate))
        tl.store(d_u + here, d_a.to(d_u.dtype.element_ty), mask=inside)
        tl.store(d_u + here + width, d_gate.to(d_u.dtype.element_ty), mask=inside)
        of_a += tl.sum(d_a, 0)
        of_gate += tl.sum(d_gate, 0)
    if d_bias is not None:
        to = d_bias + part.to(tl.int64) * (2 * width) + columns
        tl.store(to, of_a[None, :], mask=columns < width)
        tl.store(to + width, of_gate[None, :], mask=columns < width)


def _launch(kernel: Any, programs: int, first: Tensor, *arguments: Any, **constants: Any) -> None:
    with launcher.on(first.device):
        launcher.run(kernel, programs, first, *arguments, **constants, warps=WARPS, stages=STAGES)


def add_sums(sums: Tensor, x: Tensor, ends: Tensor, first: int, gated: bool = False) -> None:
    """sums (B, C) float32 += Σ of each sequence's rows of x (t, C), or of g from u (t, 2 · C) if gated."""
    batch, width = sums.shape
    if batch == 0 or x.shape[0] == 0:
        return
    _launch(
        sums_kernel, batch * triton.cdiv(width, COLUMNS), sums, x, ends, first, x.shape[0], width, x.stride(0),
        GATED=gated, COLUMNS=COLUMNS, ROWS=ROWS
    )  # fmt: skip


def d_gated(u: Tensor, d_g: Tensor, sequences: Tensor, need_bias: bool) -> tuple[Tensor, Tensor | None]:
    """The gradient of u (t, 2 · F) and of a bias added to it; rows of sequence B have none: d_g (B + 1, F) float32."""
    rows, width = u.shape[0], d_g.shape[1]
    parts = triton.cdiv(rows, PART)
    d_u = u.new_empty(u.shape)
    d_bias = d_g.new_empty(parts, 2 * width) if need_bias else None
    _launch(
        d_gated_kernel, parts * triton.cdiv(width, COLUMNS), d_u, d_bias, u, d_g, sequences, rows, width,
        COLUMNS=COLUMNS, ROWS=ROWS, PART=PART
    )  # fmt: skip
    return d_u, None if d_bias is None else d_bias.sum(0)
