"""Batches that lie on several ranks: what a loss needs of the others, and where gradients go back to.

Everything is the identity without a process group.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, NamedTuple

import torch
import torch.distributed as dist
from torch import Tensor


def all_sum(x: Tensor, group: Any) -> Tensor:
    """Σ over the ranks, of detached values."""
    if group is None:
        return x
    x = x.detach().clone()
    dist.all_reduce(x, group=group)
    return x


class Shards(NamedTuple):
    """How many rows of a gathered tensor each rank has, and which rank this is."""

    sizes: tuple[int, ...]
    rank: int

    @property
    def offset(self) -> int:
        return sum(self.sizes[: self.rank])

    @property
    def total(self) -> int:
        return sum(self.sizes)


def shards(rows: Sequence[int], device: torch.device, group: Any) -> list[Shards]:
    """One for each of the counts, in one exchange."""
    if group is None:
        return [Shards((n,), 0) for n in rows]
    mine = torch.tensor(rows, device=device)
    every = [torch.empty_like(mine) for _ in range(dist.get_world_size(group))]
    dist.all_gather(every, mine, group=group)
    of_ranks = torch.stack(every, 1).tolist()
    return [Shards(tuple(sizes), dist.get_rank(group)) for sizes in of_ranks]


class Gather(torch.autograd.Function):
    """x (rows, …) of all ranks, one after the other; the gradients of all ranks' copies are summed at the owner."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, of_ranks: Shards, group: Any) -> Tensor:
        ctx.of_ranks, ctx.group = of_ranks, group
        longest = max(of_ranks.sizes)
        padded = x.new_zeros((longest, *x.shape[1:]))  # ranks may have different numbers of rows
        padded[: x.shape[0]] = x
        every = [torch.empty_like(padded) for _ in of_ranks.sizes]
        dist.all_gather(every, padded, group=group)
        return torch.cat([part[:size] for part, size in zip(every, of_ranks.sizes, strict=True)])

    @staticmethod
    def backward(ctx: Any, d_all: Tensor) -> Any:
        return SumOfShards.apply(d_all, ctx.of_ranks, ctx.group), None, None


class SumOfShards(torch.autograd.Function):
    """Gather's transpose: this rank's rows of the sum over ranks."""

    @staticmethod
    def forward(ctx: Any, d_all: Tensor, of_ranks: Shards, group: Any) -> Tensor:
        ctx.of_ranks, ctx.group = of_ranks, group
        return all_sum(d_all, group).narrow(0, of_ranks.offset, of_ranks.sizes[of_ranks.rank])

    @staticmethod
    def backward(ctx: Any, d: Tensor) -> Any:
        return Gather.apply(d, ctx.of_ranks, ctx.group), None, None


class Gathered(NamedTuple):
    """Stands for the group in a call whose tensors are of all ranks already."""

    group: Any
    offset: int
    period: int


class Batch(NamedTuple):
    """What this rank's rows see. Row i is query offset + i, its positive document targets[i]; documents j and k belong
    to the same query if j ≡ k modulo period."""

    queries: Tensor
    documents: Tensor
    targets: Tensor
    query_labels: Tensor | None
    document_labels: Tensor | None
    guide_queries: Tensor | None
    guide_documents: Tensor | None
    negative_weights: Tensor | None
    offset: int
    period: int


def gather_batch(
    queries: Tensor,
    documents: Tensor,
    targets: Tensor | None,
    query_labels: Tensor | None,
    document_labels: Tensor | None,
    guide_queries: Tensor | None,
    guide_documents: Tensor | None,
    negative_weights: Tensor | None,
    directions: Sequence[str],
    group: Any,
) -> Batch:
    """The batch of all ranks, differentiable. Queries come from the others only where a direction has them as columns.

    Column blocks [positives | negatives 1 | …] become blocks of all ranks' documents.
    """
    rows, columns = queries.shape[0], documents.shape[0]
    in_blocks = targets is None and rows > 0 and columns % rows == 0
    mine = torch.arange(rows, device=queries.device) if targets is None else targets
    if group is None:
        return Batch(
            queries, documents, mine, query_labels, document_labels, guide_queries, guide_documents, negative_weights,
            0, rows if in_blocks else columns,
        )  # fmt: skip
    of_queries, of_documents, blocks = shards(
        [rows, columns, columns // rows if in_blocks else -1], queries.device, group
    )
    order = None
    if len(set(blocks.sizes)) == 1 and blocks.sizes[0] > 0:
        starts = [sum(of_documents.sizes[:r]) for r in range(len(of_documents.sizes))]
        order = torch.cat([
            torch.arange(n, device=queries.device) + start + block * n
            for block in range(blocks.sizes[0])
            for start, n in zip(starts, of_queries.sizes, strict=True)
        ])  # fmt: skip

    def queries_of_all(x: Tensor) -> Tensor:
        return Gather.apply(x, of_queries, group)

    def documents_of_all(x: Tensor) -> Tensor:
        every = Gather.apply(x, of_documents, group)
        return every if order is None or blocks.sizes[0] == 1 else every[order]

    as_columns = any(name.endswith("query") for name in directions)
    weights = negative_weights
    return Batch(
        queries_of_all(queries) if as_columns else queries,
        documents_of_all(documents),
        mine + (of_documents.offset if order is None else of_queries.offset),
        queries_of_all(query_labels) if as_columns and query_labels is not None else query_labels,
        None if document_labels is None else documents_of_all(document_labels),
        queries_of_all(guide_queries) if as_columns and guide_queries is not None else guide_queries,
        None if guide_documents is None else documents_of_all(guide_documents),
        documents_of_all(weights) if weights is not None and weights.ndim == 1 else weights,
        of_queries.offset if as_columns else 0,
        of_documents.total if order is None else of_queries.total,
    )


def reduce(row_loss: Tensor, weights: Tensor | None, reduction: str, group: Any) -> Tensor:
    """The result from each row's loss (N,). A mean over no weight is 0.

    With a group "mean" and "sum" are over all ranks' rows; the other ranks' share is a constant here, since its
    gradients reach this rank through what was gathered.
    """
    if weights is not None:
        weights = weights.to(row_loss.dtype)
        row_loss = row_loss * weights
    if reduction == "none":
        return row_loss
    loss = row_loss.sum()
    if group is not None:
        loss = loss + (all_sum(loss, group) - loss.detach())
    return loss if reduction == "sum" else loss / total(row_loss, weights, group)


def total(row_loss: Tensor, weights: Tensor | None, group: Any) -> Tensor | int:
    """Σ weights, or 1 where that is 0."""
    if weights is None and group is None:
        return max(row_loss.shape[0], 1)
    sum_ = row_loss.new_full((), row_loss.shape[0]) if weights is None else weights.sum()
    if group is not None:
        sum_ = sum_ + (all_sum(sum_, group) - sum_.detach())
    return torch.where(sum_ == 0, torch.ones_like(sum_), sum_)
