"""Which rows latent attention pools, in what order, a tile at a time."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from itertools import accumulate
from typing import NamedTuple

import torch
from torch import Tensor

from ..reference.latent_pooling import pooled_rows

TILE = {"cpu": 1024, "cuda": 4096}  # rows; a weight's gradient is read and written once a tile


class Tile(NamedTuple):
    rows: slice
    pieces: list[tuple[int, slice]]  # (sequence, its rows, counted from the tile's first); on a GPU nobody knows them


class Rows(NamedTuple):
    places: tuple[Tensor, ...]  # into hidden (…, C): the rows that are pooled, sequence by sequence, then others
    numbers: Tensor  # (B,) how many of each sequence
    total: int  # how many are computed
    counts: list[int] | None  # numbers; None on a GPU
    sequences: Tensor  # (total,) whose each row is; B: nobody's
    some_are_nobodys: bool = False

    @property
    def ends(self) -> Tensor:
        return self.numbers.cumsum(0)

    def tiles(self) -> Iterator[Tile]:
        size = TILE[self.numbers.device.type]
        if self.counts is not None:
            yield from tiles(self.counts, size)
            return
        for begin in range(0, self.total, size):
            yield Tile(slice(begin, min(begin + size, self.total)), [])

    def read(self, hidden: Tensor, tile: Tile) -> Tensor:
        x = hidden[tuple(i[tile.rows] for i in self.places)]
        if self.some_are_nobodys:
            x = x.masked_fill_((self.sequences[tile.rows] == len(self.numbers))[:, None], 0)
        return x


def tiles(counts: Sequence[int], size: int) -> Iterator[Tile]:
    """Rows of sequences that follow each other, in tiles that may cut sequences."""
    ends = list(accumulate(counts))
    sequence, total = 0, ends[-1] if ends else 0
    for begin in range(0, total, size):
        end, at = min(begin + size, total), begin
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


def rows_of(
    hidden: Tensor, lengths: Tensor | None, mask: Tensor | None, cu_seqlens: Tensor | None, skip: Tensor | None
) -> Rows:
    places, numbers = pooled_rows(hidden, lengths, mask, cu_seqlens, skip)
    sequences = torch.arange(len(numbers), device=hidden.device).repeat_interleave(numbers)
    return Rows(places, numbers, len(sequences), numbers.tolist(), sequences)


def _capturing(device: torch.device) -> bool:
    return device.type == "cuda" and torch.cuda.is_current_stream_capturing()


def device_rows_of(
    hidden: Tensor, lengths: Tensor | None, mask: Tensor | None, cu_seqlens: Tensor | None, skip: Tensor | None
) -> Rows:
    """The same for a GPU: values are clamped, not checked. If not all rows are pooled their number is asked for; while
    a CUDA graph is captured it can't be, and every row is computed, the others as zeros."""
    count, device = hidden.shape[:-1].numel(), hidden.device
    places = torch.arange(count, device=device)
    real = None
    if cu_seqlens is not None:
        bounds = cu_seqlens.long().clamp(0, count)
        begins, numbers = bounds[:-1], bounds.diff().clamp(min=0)
        if skip is not None:
            ends = bounds[1:].contiguous()
            owner = torch.searchsorted(ends, places, right=True)
            first = torch.nn.functional.pad(begins + skip.clamp(min=0), (0, 1), value=count)
            real = places >= first[owner]
            numbers = (numbers - skip.clamp(min=0)).clamp(min=0)
    else:
        batch, length = hidden.shape[:2]
        by_place = torch.arange(length, device=device)
        if lengths is not None:
            real = by_place < lengths[:, None]
        elif mask is not None:
            real = mask.bool()
        if skip is not None:
            rank = by_place + 1 if real is None else real.cumsum(1)
            real = (rank > skip[:, None]) if real is None else real & (rank > skip[:, None])
        if real is None:
            numbers = torch.full((batch,), length, device=device)
        else:
            numbers, real = real.sum(1), real.flatten()
    known = real is None or _capturing(device)
    total = count if known else min(int(numbers.sum()), count)
    if real is not None:
        places = (~real).byte().argsort(stable=True)[:total]
    sequences = torch.searchsorted(numbers.cumsum(0), torch.arange(total, device=device), right=True)
    index = (places,) if hidden.ndim == 2 else (places // hidden.shape[1], places % hidden.shape[1])
    return Rows(index, numbers, total, None, sequences, known and real is not None)
