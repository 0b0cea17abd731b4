"""Gradient caching's chunks: model inputs cut into rows sorted by length, and representations put back in order."""

from __future__ import annotations

import re
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from itertools import chain
from typing import Any

import torch
from torch import Tensor, nn

# Parameters and buffers named like this make a token's column matter (BERT, GPT-2, BART, CLIP); rotary ones don't.
_ABSOLUTE_POSITIONS = re.compile(r"(^|[._])(wpe|pos(ition)?s?)([._]|$)")


@dataclass(eq=False)
class Chunk:
    tower: int
    inputs: Callable[[], Any]  # sliced anew at each run: chunks of inputs are not kept
    columns: slice | None = None  # what trimming left of the token axis
    rng: Any = None  # torch's generators before its first run
    rows: int = 0  # of its representations
    keep: bool = True  # may its graph be kept?
    graph: Tensor | None = None  # the representations with their graph, where it was kept


@dataclass(eq=False)
class Tower:
    chunks: list[Chunk]
    order: Tensor | None = None  # (B,) the rows as the chunks take them, if that isn't the order given
    width: int = 0  # L of the attention_mask
    token_axis: bool = False  # are representations (rows, L, …), to be filled up where columns were trimmed?

    def assemble(self, reps: list[Tensor]) -> Tensor:
        """The chunks' representations as one tensor (B, …), in the order given."""
        trimmed = [c.columns for c in self.chunks if c.columns is not None]
        self.token_axis = len(trimmed) == len(reps) and all(
            rep.dim() > 2 and rep.shape[1] == s.stop - s.start for rep, s in zip(reps, trimmed, strict=True)
        )
        if self.token_axis:
            reps = [
                nn.functional.pad(rep, (*[0, 0] * (rep.dim() - 2), s.start, self.width - s.stop))
                for rep, s in zip(reps, trimmed, strict=True)
            ]
        if len({rep.shape[1:] for rep in reps}) > 1:
            shapes = sorted({tuple(rep.shape[1:]) for rep in reps})
            raise ValueError(f"get_rep_fn: wanted representations of one shape for every chunk, got rows of {shapes}")
        rows = torch.cat(reps)
        if self.order is None:
            return rows
        if len(rows) != len(self.order):
            raise ValueError(
                f"get_rep_fn: wanted one representation a row ({len(self.order)}), got {len(rows)}; "
                "rows that belong together need sort_by_length=False"
            )
        return torch.empty_like(rows).index_copy_(0, self.order.to(rows.device), rows)

    def split(self, d_rep: Tensor) -> list[Tensor]:
        """The gradient of ``assemble``."""
        d_rep = d_rep if self.order is None else d_rep[self.order.to(d_rep.device)]
        parts = d_rep.split([c.rows for c in self.chunks])
        return [part[:, c.columns] if self.token_axis else part for part, c in zip(parts, self.chunks, strict=True)]


def plan(
    index: int, model: Callable[..., Any], model_input: Any, *, size: int | None, tokens: int | None, sort: bool
) -> Tower:
    """Cut the input of tower ``index`` into chunks of at most ``size`` rows and ``tokens`` tokens."""
    if not isinstance(model_input, (Tensor, list, Mapping)) and not is_args_kwargs(model_input):
        raise TypeError(
            f"model_inputs[{index}]: wanted a tensor, list, mapping or (args, kwargs), or a split_input_fn; "
            f"got {type(model_input).__name__}"
        )
    given = list(tensors(model_input))
    batch = {t.shape[0] for t in given}
    if len(batch) != 1:
        got = sorted(batch) or "no tensor"
        raise ValueError(f"model_inputs[{index}]: wanted tensors of equally many rows, got {got}")
    rows = batch.pop()
    holder = next(_with_mask(model_input), None)
    if holder is None:
        lengths = [next((t.shape[1] for t in given if t.dim() > 1), 1)] * rows
        ranges = _pack(lengths, size, tokens)
        return Tower([Chunk(index, _Slice(model_input, slice(*r), None, (rows, 0))) for r in ranges])

    mask = holder["attention_mask"] != 0
    width = mask.shape[1]
    column = torch.arange(width, device=mask.device)
    first = torch.where(mask, column, width - 1).amin(1) if width else mask.sum(1)
    last = torch.where(mask, column, 0).amax(1) if width else mask.sum(1)
    lengths, starts, ends = torch.stack([mask.sum(1), first, last]).tolist()  # on a GPU, a step's only synchronisation
    if "position_ids" not in holder and _has_absolute_positions(model):
        starts = [0] * rows
    order = None
    if sort and len(set(lengths)) > 1:
        ranked = sorted(range(rows), key=lambda row: -lengths[row])
        order = torch.tensor(ranked, device=mask.device)
        lengths, starts, ends = ([values[row] for row in ranked] for values in (lengths, starts, ends))
    chunks = []
    for i, j in _pack(lengths, size, tokens):
        start, end = min(starts[i:j], default=0), max(ends[i:j], default=width - 1)
        columns = slice(start, max(start, end) + 1)  # one column at least: all of these texts may be empty
        take = slice(i, j) if order is None else order[i:j]
        chunks.append(Chunk(index, _Slice(model_input, take, columns, (rows, width)), columns))
    return Tower(chunks, order, width)


def _pack(lengths: Sequence[int], size: int | None, tokens: int | None) -> list[tuple[int, int]]:
    """Ranges [first, last) of at most ``size`` rows and ``tokens`` tokens; an empty batch is one empty chunk."""
    ranges, first, total = [], 0, 0
    for row, length in enumerate(lengths):
        full = (size is not None and row - first >= size) or (tokens is not None and total + length > tokens)
        if full and row > first:
            ranges.append((first, row))
            first, total = row, 0
        total += length
    return [*ranges, (first, len(lengths))]


@dataclass(eq=False)
class _Slice:
    """Some rows of a model input, trimmed to ``columns`` where a tensor is one value, or more, a token."""

    model_input: Any
    rows: slice | Tensor
    columns: slice | None
    shape: tuple[int, int]  # (B, L) of the attention_mask

    def __call__(self) -> Any:
        return self._take(self.model_input, None)

    def _take(self, x: Any, key: Any) -> Any:
        if isinstance(x, Tensor) and x.dim() > 0:
            per_token = not x.is_floating_point() or key in ("attention_mask", "inputs_embeds")
            trim = self.columns is not None and per_token and x.shape[:2] == self.shape
            x = x[self.rows if isinstance(self.rows, slice) else self.rows.to(x.device)]
            return x[:, self.columns] if trim else x
        if isinstance(x, Mapping):
            return {k: self._take(v, k) for k, v in x.items()}
        if isinstance(x, (list, tuple)):
            return (list if isinstance(x, list) else tuple)(self._take(v, None) for v in x)
        return x


def tensors(x: Any) -> Iterator[Tensor]:
    """The tensors with rows in a model input."""
    if isinstance(x, Tensor):
        yield from (x,) if x.dim() > 0 else ()
    elif isinstance(x, (list, tuple, Mapping)):
        for value in x.values() if isinstance(x, Mapping) else x:
            yield from tensors(value)


def map_tensors(fn: Callable[[Tensor], Tensor], x: Any) -> Any:
    if isinstance(x, Tensor):
        return fn(x)
    if isinstance(x, Mapping):
        return {k: map_tensors(fn, v) for k, v in x.items()}
    if isinstance(x, (list, tuple)):
        return (list if isinstance(x, list) else tuple)(map_tensors(fn, v) for v in x)
    return x


def _with_mask(x: Any) -> Iterator[Mapping[str, Tensor]]:
    """The mappings in a model input that hold a 2-d attention_mask."""
    if isinstance(x, Mapping):
        mask = x.get("attention_mask")
        if isinstance(mask, Tensor) and mask.dim() == 2:
            yield x
    if isinstance(x, (list, tuple, Mapping)):
        for value in x.values() if isinstance(x, Mapping) else x:
            yield from _with_mask(value)


def is_args_kwargs(x: Any) -> bool:
    return isinstance(x, tuple) and len(x) == 2 and isinstance(x[0], (list, tuple)) and isinstance(x[1], Mapping)


def _has_absolute_positions(model: Callable[..., Any]) -> bool:
    if not isinstance(model, nn.Module):
        return True
    names = chain(model.named_parameters(), model.named_buffers())
    return any(_ABSOLUTE_POSITIONS.search(name) for name, _ in names)
