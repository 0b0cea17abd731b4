"""Attention on Triton: which tiles a call gets, and its launches. Nothing here waits for the GPU."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, NamedTuple

import torch
import triton
from torch import Tensor

from ... import schema
from . import attention_bias_kernels as bias_kernels
from . import attention_kernels as kernels
from . import launcher
from .attention_tiles import EIGHT, YES, Numbers, Options, View


class Tiles(NamedTuple):
    """Up to so many queries, keys and head dims: tiles of `queries` × `keys`."""

    up_to: tuple[int, int, int]
    queries: int
    keys: int
    warps: int
    stages: int
    keys_first: bool = False  # tiles keys × queries, of backward
    large: bool = False  # only for GPUs with wgmma or tcgen05 and 227 KiB of shared memory; others may have 99 KiB
    registers: int | None = None  # a thread has at most, for one block more on an SM


ANY = 1 << 30
# One tile of keys while they fit; beyond, a loop over 32 of them in three stages. What they compile to: docs/triton.md.
FORWARD = {
    2: (
        Tiles((32, 32, 256), 32, 32, 2, 1),
        Tiles((ANY, 32, 256), 64, 32, 4, 1),
        Tiles((ANY, 64, 256), 64, 64, 4, 1),
        Tiles((ANY, 128, 128), 64, 128, 4, 1),
        Tiles((ANY, ANY, 128), 64, 32, 4, 3),
        Tiles((ANY, ANY, 256), 128, 32, 8, 2, large=True),
        Tiles((ANY, ANY, 256), 64, 32, 8, 2),
    ),
    4: (
        Tiles((ANY, 32, 256), 32, 32, 4, 1),
        Tiles((ANY, ANY, 256), 32, 32, 4, 2),
    ),
}
# All keys of a sequence in one program: five products.
WHOLE = {
    2: (
        Tiles((32, 32, 128), 32, 32, 2, 1),
        Tiles((ANY, 64, 64), 64, 64, 4, 1),
        Tiles((ANY, 64, 128), 64, 64, 4, 1, large=True),
        Tiles((ANY, 64, 128), 32, 64, 4, 1, True),
        Tiles((ANY, 128, 32), 64, 128, 4, 1),
        Tiles((ANY, 128, 64), 128, 128, 8, 1, large=True),
        Tiles((ANY, 128, 64), 32, 128, 8, 1, True),
    ),
    4: (Tiles((ANY, 32, 64), 32, 32, 4, 1),),
}
QUERIES = {
    2: (
        Tiles((ANY, ANY, 32), 64, 32, 4, 3),
        # Triton 3.6 takes 172 otherwise: two blocks, and 1.3 times as long by a replay of the code
        Tiles((ANY, ANY, 64), 64, 32, 4, 3, large=True, registers=168),
        Tiles((ANY, ANY, 128), 64, 32, 4, 3, large=True),
        Tiles((ANY, ANY, 128), 64, 32, 4, 2),
        Tiles((ANY, ANY, 256), 128, 32, 8, 2, large=True),
        Tiles((ANY, ANY, 256), 32, 32, 4, 1),
    ),
    4: (Tiles((ANY, ANY, 256), 32, 32, 8, 1),),
}
KEYS = {
    2: (
        Tiles((ANY, ANY, 128), 32, 64, 4, 3, True),
        Tiles((ANY, ANY, 256), 32, 128, 8, 2, True, large=True),
        Tiles((ANY, ANY, 256), 32, 32, 4, 1, True),
    ),
    4: (Tiles((ANY, ANY, 256), 32, 32, 8, 1, True),),
}
KEYS_AND_VALUES = 128  # dims up to which one program has d_key and d_value: two sums of 256 columns spill
BIAS = {2: (Tiles((ANY, ANY, 256), 32, 64, 4, 1),), 4: (Tiles((ANY, ANY, 256), 32, 64, 8, 1),)}
RELATIVE_ROWS = 512  # of queries a program of relative_bias's gradient takes
RELATIVE_BLOCK = 32
BIAS_PROGRAMS = 512  # enough for any GPU: a bias that is broadcast over more than its tiles is added up in parts


def is_large(device: torch.device) -> bool:
    return device.type != "cuda" or torch.cuda.get_device_capability(device)[0] in (9, 10)


def choose(table: dict[int, tuple[Tiles, ...]], call: _Call, queries: int, keys: int) -> Tiles | None:
    """The first that fits."""
    dim = max(call.dims)
    for tiles in table[call.itemsize]:
        fits = queries <= tiles.up_to[0] and keys <= tiles.up_to[1] and dim <= tiles.up_to[2]
        if fits and (call.large or not tiles.large):
            return tiles
    return None


def _view(x: Tensor, packed: bool) -> View:
    """(B, H, L, D) or (T, H, D)."""
    if packed:
        row, head, column = x.stride()
        return View(x, 0, head, row, column)
    return View(x, *x.stride())


def _vectors(x: Tensor, packed: bool) -> View:
    """The same of what is read and written by the row."""
    view = _view(x, packed)
    even = x.data_ptr() % 16 == 0 and all(s % EIGHT.value == 0 for s in (view.batch, view.head, view.row))
    return view._replace(even=YES) if even else view


def _broadcast(x: Tensor | None, shape: Sequence[int]) -> View | None:
    return None if x is None else _view(x.expand(shape), len(shape) == 3)


class _Call:
    """What the launches of one call share."""

    def __init__(
        self,
        query: Tensor,
        key: Tensor,
        value: Tensor,
        key_lengths: Tensor | None,
        key_mask: Tensor | None,
        cu_seqlens_q: Tensor | None,
        cu_seqlens_k: Tensor | None,
        mask: Tensor | None,
        bias: Tensor | None,
        relative_bias: Tensor | None,
        temperature: Tensor | None,
        temperature_number: float,
        scale: Tensor | None,
        scale_number: float,
        causal: bool,
        window_left: int,
        window_right: int,
        softcap: float,
        dropout_p: float,
        seed: Tensor | None,
    ) -> None:
        self.itemsize, self.large = query.element_size(), is_large(query.device)
        self.packed = packed = cu_seqlens_q is not None
        if cu_seqlens_q is not None:
            (self.len_q, self.heads), (self.len_k, self.kv_heads) = query.shape[:2], key.shape[:2]
            self.batch = cu_seqlens_q.shape[0] - 1
        else:
            self.batch, self.heads, self.len_q = query.shape[:3]
            self.kv_heads, self.len_k = key.shape[1:3]
        scores = (self.batch, self.heads, self.len_q, self.len_k)
        farthest = self.len_q + self.len_k  # of any two positions: a window that wide is none
        left = None if not 0 <= window_left < farthest else window_left
        right = None if not 0 <= window_right < farthest else window_right
        self.by_row = (
            causal or left is not None or right is not None or any(x is not None for x in (mask, bias, relative_bias))
        )
        self.dims = query.shape[-1], value.shape[-1]
        self.inputs = tuple(_vectors(x, packed) for x in (query, key, value))
        self.options = Options(
            key_lengths,
            None if key_mask is None else View(key_mask, key_mask.stride(0), 0, 0, key_mask.stride(1)),
            cu_seqlens_q,
            cu_seqlens_q if cu_seqlens_k is None else cu_seqlens_k,
            _broadcast(mask, scores),
            _broadcast(bias, scores),
            None
            if relative_bias is None
            else View(relative_bias, 0, relative_bias.stride(0), 0, relative_bias.stride(1)),
            _broadcast(temperature, (*query.shape[:-1], 1)),
            _broadcast(scale, (*query.shape[:-1], 1)),
            seed if dropout_p > 0 else None,
        )
        self.numbers = Numbers(
            self.batch,
            self.heads,
            self.heads // max(self.kv_heads, 1),
            self.len_q,
            self.len_k,
            temperature_number,
            scale_number,
            left,
            0 if causal else right,
            softcap or None,
            int(dropout_p * 2**32) if dropout_p < 1 else 0,
            1 / (1 - dropout_p) if dropout_p < 1 else 0.0,
            0 if relative_bias is None else relative_bias.shape[1] // 2,
        )
        self.constants: dict[str, Any] = {
            "DIM": self.dims[0],
            "DIM_V": self.dims[1],
            "BLOCK_D": max(16, triton.next_power_of_2(self.dims[0])),
            "BLOCK_V": max(16, triton.next_power_of_2(self.dims[1])),
            "PRECISION": launcher.precision(query.dtype),
        }

    def programs(self, length: int, block: int) -> int:
        """Tiles of a side, over all sequences: a bound on them where lengths are on the GPU."""
        return length // block + self.batch if self.packed else triton.cdiv(length, block) * self.batch

    def launch(self, kernel: Any, programs: int, *arguments: Any, tiles: Tiles, **constants: Any) -> None:
        launcher.run(
            kernel, programs, *arguments, **self.constants, **constants, warps=tiles.warps, stages=tiles.stages,
            registers=tiles.registers
        )  # fmt: skip


def _results(query: Tensor, key: Tensor, value: Tensor, *options: Any) -> tuple[Tensor, Tensor, Tensor]:
    """Of forward. statistics (2, rows); empty where backward has all keys of a row in one program, which finds them."""
    out, lse, none = schema.OPERATORS["attention_forward"][1](query, key, value, *options)
    cu_seqlens, bias, relative_bias = options[2], options[5], options[6]
    dim, whole = max(query.shape[-1], value.shape[-1]), WHOLE[query.element_size()]
    most = max((tiles.up_to[1] for tiles in whole if dim <= tiles.up_to[2]), default=0)
    if key.shape[-2] <= most and all(x is None for x in (cu_seqlens, bias, relative_bias)):
        return out, lse, none
    return out, lse, lse.new_empty((2, *lse.shape))


def _run_forward(query: Tensor, key: Tensor, value: Tensor, *options: Any) -> tuple[Tensor, Tensor, Tensor]:
    out, lse, statistics = _results(query, key, value, *options)
    call = _Call(query, key, value, *options)
    if lse.numel() == 0 or call.batch == 0 or call.len_k == 0:
        return out.zero_(), lse.fill_(-torch.inf), statistics
    mean = (call.len_q // call.batch, call.len_k // call.batch) if call.packed else (call.len_q, call.len_k)
    tiles = choose(FORWARD, call, *mean)
    assert tiles is not None
    one_tile = not call.packed and call.len_k <= tiles.keys
    with launcher.on(query.device):
        call.launch(
            kernels.forward_kernel,
            call.programs(call.len_q, tiles.queries) * call.heads,
            _vectors(out, call.packed), lse, statistics if statistics.numel() > 0 else None, *call.inputs, call.options,
            call.numbers, lse.numel(), tiles=tiles, BLOCK_Q=tiles.queries, BLOCK_K=tiles.keys, BY_ROW=call.by_row,
            ONE_TILE=one_tile
        )  # fmt: skip
    return out, lse, statistics


def _run_backward(
    d_out: Tensor,
    d_lse: Tensor | None,
    out: Tensor | None,
    statistics: Tensor | None,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    *options: Any,
) -> tuple[Tensor, ...]:
    call = _Call(query, key, value, *options[:-7])
    need_query, need_key, need_value, need_bias, need_relative_bias, need_temperature, need_scale = options[-7:]
    gradients = schema.OPERATORS["attention_backward"][1](d_out, d_lse, out, statistics, query, key, value, *options)
    if query.numel() == 0 or call.batch == 0 or call.len_k == 0:
        return tuple(g.zero_() for g in gradients)
    d_query, d_key, d_value = (
        _vectors(g, call.packed) if need else None
        for g, need in zip(gradients, (need_query, need_key, need_value), strict=False)
    )
    rows = query.shape[:-1].numel()
    by_row = [
        torch.empty(query.shape[:-1], dtype=torch.float32, device=query.device) if need else None
        for need in (need_temperature, need_scale)
    ]
    d_lse = None if d_lse is None else d_lse.float().contiguous()
    upstream = _vectors(d_out, call.packed), d_lse, *call.inputs, call.options, call.numbers, rows
    mean = (call.len_q // call.batch, call.len_k // call.batch) if call.packed else (call.len_q, call.len_k)
    shorter = -1
    delta = None if statistics is None else statistics.new_empty(rows)
    with launcher.on(query.device):
        for whole in _whole(call, mean):
            call.launch(
                kernels.keys_kernel, call.batch * call.kv_heads, d_query, d_key, d_value, *by_row,
                delta if need_bias or need_relative_bias else None, None, *upstream,
                tiles=whole, BLOCK_Q=whole.queries, BLOCK_K=whole.keys, BY_ROW=call.by_row, WHOLE=True,
                STEPS=None if call.packed or call.heads != call.kv_heads else triton.cdiv(call.len_q, whole.queries),
                KEYS_FIRST=whole.keys_first, SHORTER=shorter
            )  # fmt: skip
            shorter = whole.keys
        if call.len_k > shorter:
            tiles = choose(QUERIES, call, *mean)
            assert tiles is not None
            assert out is not None
            call.launch(
                kernels.queries_kernel, call.programs(call.len_q, tiles.queries) * call.heads, d_query, *by_row, delta,
                _vectors(out, call.packed), statistics, *upstream, tiles=tiles, BLOCK_Q=tiles.queries,
                BLOCK_K=tiles.keys, BY_ROW=call.by_row, SHORTER=shorter, ROUNDING=_rounding(call, query.dtype)
            )  # fmt: skip
            tiles = choose(KEYS, call, *mean)
            assert tiles is not None
            together = max(call.dims) <= KEYS_AND_VALUES
            for of_key, of_value in [(d_key, d_value)] if together else [(d_key, None), (None, d_value)]:
                if of_key is None and of_value is None:
                    continue
                call.launch(
                    kernels.keys_kernel, call.programs(call.len_k, tiles.keys) * call.kv_heads, None, of_key, of_value,
                    None, None, delta, statistics, *upstream, tiles=tiles, BLOCK_Q=tiles.queries, BLOCK_K=tiles.keys,
                    BY_ROW=call.by_row, WHOLE=False, STEPS=None, KEYS_FIRST=tiles.keys_first, SHORTER=shorter
                )  # fmt: skip
        if need_bias:
            _d_bias(call, gradients[3], statistics, delta, *upstream)
        if need_relative_bias:
            _d_relative_bias(call, gradients[4], statistics, delta, *upstream)
    for gradient, of_rows in zip(gradients[5:], by_row, strict=True):
        if of_rows is not None:
            gradient.copy_(of_rows[..., None].sum_to_size(gradient.shape))
    return gradients


def _rounding(call: _Call, dtype: torch.dtype) -> float:
    """An error of delta beside Σ |du| that shows."""
    if call.constants["PRECISION"] == "tf32":
        return 2.0**-11
    return torch.finfo(dtype).eps * (2.0 if dtype == torch.float32 else 0.5)


def _whole(call: _Call, mean: tuple[int, int]) -> list[Tiles]:
    """Launches for sequences whose keys fit one tile, shortest first. In a packed batch each takes its own."""
    if not call.packed:
        tiles = choose(WHOLE, call, call.len_q, call.len_k)
        return [] if tiles is None else [tiles]
    found = [choose(WHOLE, call, mean[0], keys) for keys in (32, 64, 128)]
    return [tiles for tiles in found if tiles is not None]


def _d_bias(call: _Call, d_bias: Tensor, *arguments: Any) -> None:
    (tiles,) = BIAS[call.itemsize]
    sizes = (*(1,) * (4 - d_bias.ndim), *d_bias.shape)
    own_q = 1 if sizes[2] == 1 else triton.cdiv(call.len_q, tiles.queries)
    own_k = 1 if sizes[3] == 1 else triton.cdiv(call.len_k, tiles.keys)
    own = sizes[0] * sizes[1] * own_q * own_k
    every = (
        call.batch * call.heads * triton.cdiv(call.len_q, tiles.queries) * triton.cdiv(call.len_k, tiles.keys)
    )  # fmt: skip
    parts = min(every // own, triton.cdiv(BIAS_PROGRAMS, own))
    sums = d_bias.view(1, *sizes) if parts == 1 else d_bias.new_empty((parts, *sizes))
    call.launch(
        bias_kernels.bias_kernel, own * parts, sums, *arguments, parts, sizes, tiles=tiles,
        BLOCK_Q=tiles.queries, BLOCK_K=tiles.keys, OVER_Q=sizes[2] == 1, OVER_K=sizes[3] == 1
    )  # fmt: skip
    if parts > 1:
        torch.sum(sums, 0, out=d_bias.view(sizes))


def _d_relative_bias(call: _Call, d_relative_bias: Tensor, *arguments: Any) -> None:
    (tiles,) = BIAS[call.itemsize]
    reach = d_relative_bias.shape[1] // 2
    blocks = 2 + triton.cdiv(max(2 * reach - 1, 0), RELATIVE_BLOCK)
    positions = call.programs(call.len_q, RELATIVE_ROWS)
    sums = d_relative_bias.new_zeros((positions, *d_relative_bias.shape))
    call.launch(
        bias_kernels.relative_bias_kernel, positions * call.heads * blocks, sums, *arguments, tiles=tiles,
        BLOCK=RELATIVE_BLOCK, ROWS=RELATIVE_ROWS
    )  # fmt: skip
    torch.sum(sums, 0, out=d_relative_bias)


_FORWARD = schema.twin("attention_forward", "triton", _run_forward, launcher.DEVICE, _results)
_BACKWARD = schema.twin(
    "attention_backward", "triton", _run_backward, launcher.DEVICE, schema.OPERATORS["attention_backward"][1]
)


def forward(query: Tensor, *arguments: Any) -> tuple[Tensor, Tensor, Tensor]:
    """Launches at once: an operator implemented in Python costs ~60 µs more. Traced, it is the operator."""
    traced = torch.compiler.is_compiling() or type(query) is not Tensor
    return _FORWARD(query, *arguments) if traced else _run_forward(query, *arguments)


def backward(d_out: Tensor, *arguments: Any) -> tuple[Tensor, ...]:
    traced = torch.compiler.is_compiling() or type(d_out) is not Tensor
    return _BACKWARD(d_out, *arguments) if traced else _run_backward(d_out, *arguments)
