"""The specification of the contrastive loss, in plain differentiable PyTorch. csrc/cpu/infonce.cpp computes the same.

Rows are taken in blocks that are computed again for the gradient, so that the N×M matrix doesn't exist here either.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor

from .. import distributed
from ..ops import common

EPS = 1e-12  # under cosine, x / max(‖x‖₂, EPS), as torch.nn.functional.normalize
BLOCK = 1 << 17  # elements of a block's logits


def info_nce(
    queries: Tensor,
    documents: Tensor,
    negatives: Tensor | None,
    positives: Tensor | None,
    targets: Tensor | None,
    temperature: float | Tensor,
    similarity: str,
    directions: Sequence[str],
    partition_mode: str,
    query_labels: Tensor | None,
    document_labels: Tensor | None,
    same_label: str,
    guide_queries: Tensor | None,
    guide_documents: Tensor | None,
    margin: float,
    margin_strategy: str,
    weights: Tensor | None,
    negative_weights: Tensor | None,
    hardness_mode: str | None,
    hardness_strength: float,
    label_smoothing: float,
    matryoshka_dims: Sequence[int] | None,
    matryoshka_weights: Sequence[float] | None,
    reduction: str,
    return_metrics: bool,
    group: Any,
) -> Tensor | tuple[Tensor, dict[str, Tensor]]:
    given = [x for x in (queries, documents, negatives, positives) if x is not None]
    wide = torch.float64 if any(x.dtype == torch.float64 for x in given) else torch.float32
    _check_weights(negative_weights)
    batch = distributed.gather_batch(
        queries, documents, _targets(targets, queries, documents) if targets is not None else None, query_labels,
        document_labels, guide_queries, guide_documents, negative_weights, directions, group,
    )  # fmt: skip
    tau = temperature.to(wide).reshape(-1, 1) if isinstance(temperature, Tensor) else temperature
    rows = queries.shape[0]

    with torch.autocast(queries.device.type, enabled=False):
        total = torch.zeros(rows, dtype=wide, device=queries.device)
        metrics = torch.zeros(rows, 4, dtype=wide, device=queries.device)
        dims, factors = prefixes(matryoshka_dims, matryoshka_weights, queries.shape[1])
        for dim, factor in zip(dims, factors, strict=True):

            def vectors(x: Tensor, dim: int = dim) -> Tensor:
                return _vectors(x[..., :dim], similarity, wide)

            rest = Rest(
                vectors(batch.queries), vectors(batch.documents), batch.targets, batch.offset, batch.period, tau,
                None if positives is None else vectors(positives), None if negatives is None else vectors(negatives),
                batch.query_labels, batch.document_labels, same_label == "positive",
                None if batch.guide_queries is None else _vectors(batch.guide_queries, similarity, wide),
                None if batch.guide_documents is None else _vectors(batch.guide_documents, similarity, wide),
                margin, margin_strategy == "relative", batch.negative_weights, hardness_mode, hardness_strength,
                label_smoothing, tuple(directions), partition_mode == "per_direction",
            )  # fmt: skip
            columns = sum(rest.q.shape[0] if name.endswith("query") else rest.d.shape[0] for name in directions)
            step = max(1, BLOCK // columns, dim // 16)
            if torch.compiler.is_compiling() or rows <= step:
                row_loss, of_rows = _rows(rest, 0, rows)
            else:
                row_loss, of_rows = Blocks.apply(rest, step, *(getattr(rest, name) for name in Blocks.VARY))
            total = total + factor * row_loss
            metrics = of_rows if dim == max(dims) else metrics
        loss = distributed.reduce(total, weights, reduction, group)
    return (loss, mean_metrics(metrics, group)) if return_metrics else loss


@dataclass(frozen=True)
class Rest:
    """One prefix's unit vectors and the options that each block of rows needs."""

    q: Tensor  # (N, D), of all ranks where a direction needs them
    d: Tensor  # (M, D)
    t: Tensor  # (rows,)
    offset: int  # row i is query offset + i
    period: int  # documents j and k belong to the same query if j ≡ k modulo this
    tau: Tensor | float
    p: Tensor | None
    n: Tensor | None
    query_labels: Tensor | None
    document_labels: Tensor | None
    same_positive: bool
    guide_q: Tensor | None
    guide_d: Tensor | None
    margin: float
    relative: bool
    negative_weights: Tensor | None
    hardness_mode: str | None
    hardness_strength: float
    label_smoothing: float
    directions: tuple[str, ...]
    per_direction: bool


@dataclass(frozen=True)
class Columns:
    """Of a block of rows and one direction, all (rows, columns)."""

    s: Tensor  # similarities
    visible: Tensor
    target: Tensor  # counts as a positive
    added: Tensor | float  # to the logits: constants, log w and hardness


def _rows(rest: Rest, begin: int, end: int) -> tuple[Tensor, Tensor]:
    """The losses of rows [begin, end), and (rows, 4): does nothing beat the positive, its similarity, the sum and the
    number of the negatives' in the query's direction."""
    t = rest.t[begin:end]
    tau = rest.tau[begin:end] if isinstance(rest.tau, Tensor) and rest.tau.shape[0] > 1 else rest.tau
    forward = _columns(rest, "query_to_doc", begin, end)
    parts = [[forward]]
    if rest.n is not None:
        parts[0].append(_negatives(rest, begin, end))
    for name in rest.directions:
        if name != "query_to_doc":
            other = _columns(rest, name, begin, end)
            parts.append([other]) if rest.per_direction else parts[0].append(other)

    losses = []
    for part in parts:
        visible, target = (torch.cat([getattr(x, name) for x in part], 1) for name in ("visible", "target"))
        z = torch.cat([x.s / tau + x.added for x in part], 1)
        lse = z.masked_fill(~visible, -torch.inf).logsumexp(1)
        y = (1 - rest.label_smoothing) * target.to(z.dtype) / target.sum(1, keepdim=True)
        y = y + rest.label_smoothing * visible / visible.sum(1, keepdim=True)
        losses.append(lse - (y * torch.where(visible, z, 0)).sum(1))  # dz = softmax(z) - y
    row_loss = sum(losses[1:], losses[0]) / len(losses)

    beside = parts[0][:2] if rest.n is not None else parts[0][:1]
    s, visible, target = (
        torch.cat([getattr(x, name).detach() for x in beside], 1) for name in ("s", "visible", "target")
    )
    positive = s.gather(1, t[:, None])
    beaten = (torch.where(visible, s, -torch.inf) > positive).any(1)
    negative = visible & ~target
    of_rows = [~beaten, positive.squeeze(1), torch.where(negative, s, 0).sum(1), negative.sum(1)]
    return row_loss, torch.stack([x.to(s.dtype) for x in of_rows], 1)


class Blocks(torch.autograd.Function):
    """`_rows` of all rows, `step` at a time, computed again for the gradient; second derivatives go through that."""

    VARY = ("q", "d", "p", "n", "tau")

    @staticmethod
    def forward(ctx: Any, rest: Rest, step: int, *vary: Any) -> tuple[Tensor, Tensor]:
        ctx.save_for_backward(*(x if isinstance(x, Tensor) else None for x in vary))
        ctx.numbers = [None if isinstance(x, Tensor) else x for x in vary]
        without: dict[str, Any] = dict.fromkeys(Blocks.VARY)
        ctx.rest, ctx.step = replace(rest, **without), step
        row_loss, of_rows = rest.q.new_empty(len(rest.t)), rest.q.new_empty(len(rest.t), 4)
        for rows in _blocks(rest, step):
            row_loss[rows], of_rows[rows] = _rows(rest, rows.start, rows.stop)
        ctx.mark_non_differentiable(of_rows)
        return row_loss, of_rows

    @staticmethod
    def backward(ctx: Any, d_loss: Tensor, *_: Any) -> Any:
        vary = [number if x is None else x for x, number in zip(ctx.saved_tensors, ctx.numbers, strict=True)]
        needs = ctx.needs_input_grad[2:]

        def row_losses(*given: Any) -> Iterator[Tensor]:
            rest = replace(ctx.rest, **dict(zip(Blocks.VARY, given, strict=True)))
            return (_rows(rest, rows.start, rows.stop)[0] for rows in _blocks(rest, ctx.step))

        with torch.autocast(d_loss.device.type, enabled=False):
            if torch.is_grad_enabled():
                whole = lambda *given: torch.cat(list(row_losses(*given)))  # noqa: E731
                return None, None, *common.reference_gradients(whole, vary, needs, (d_loss,))
            leaves = [x.detach().requires_grad_() if need else x for x, need in zip(vary, needs, strict=True)]
            wanted = [x for x, need in zip(leaves, needs, strict=True) if need]
            for x in wanted:
                x.grad = torch.zeros_like(x)  # each block adds to it in place
            with torch.enable_grad():
                for row_loss, d_rows in zip(row_losses(*leaves), d_loss.split(ctx.step), strict=True):
                    torch.autograd.backward(row_loss, d_rows, inputs=wanted)
            return None, None, *(x.grad if need else None for x, need in zip(leaves, needs, strict=True))


def _blocks(rest: Rest, step: int) -> Iterator[slice]:
    return (slice(begin, min(begin + step, len(rest.t))) for begin in range(0, len(rest.t), step))


def _columns(rest: Rest, direction: str, begin: int, end: int) -> Columns:
    from_query, to_query = direction.startswith("query"), direction.endswith("query")
    t, me = rest.t[begin:end, None], torch.arange(begin, end, device=rest.t.device)[:, None] + rest.offset
    anchors = rest.q[me[:, 0]] if from_query else rest.d[t[:, 0]] if rest.p is None else rest.p[begin:end]
    columns = rest.q if to_query else rest.d
    s = anchors @ columns.T
    j = torch.arange(columns.shape[0], device=t.device)
    of_own_query = j % rest.period == t % rest.period
    nothing = torch.zeros_like(of_own_query if not to_query else j == me)

    # The positive's own pair; what isn't there at all: a query beside itself, documents of the same query.
    pair = j == t if direction == "query_to_doc" else j == me if direction == "doc_to_query" else nothing
    gone = j == me if direction == "query_to_query" else of_own_query if direction == "doc_to_doc" else nothing
    if direction == "query_to_doc" and rest.p is not None:
        s = torch.where(pair, (anchors * rest.p[begin:end]).sum(1, keepdim=True), s)
    target = pair if direction == "query_to_doc" or rest.per_direction else nothing
    hidden = nothing
    if rest.query_labels is not None and rest.document_labels is not None:
        label = rest.query_labels[me] if from_query else rest.document_labels[t]
        same = (label == (rest.query_labels if to_query else rest.document_labels)) & ~pair & ~gone
        if rest.same_positive:
            target = target | same
        else:
            hidden = same
    if rest.guide_q is not None and rest.guide_d is not None:
        positive = (rest.guide_q[me[:, 0]] @ rest.guide_d.T).gather(1, t)
        guide = rest.guide_q[me[:, 0]] if from_query else rest.guide_d[t[:, 0]]
        least = positive - (positive.abs() * rest.margin if rest.relative else rest.margin)
        guided = guide @ (rest.guide_q if to_query else rest.guide_d).T > least
        hidden = hidden | (guided & ~pair & ~target)

    visible = ~gone & ~hidden
    negative = visible & ~target & ~pair
    added = torch.zeros_like(s)
    if direction == "query_to_doc" and rest.hardness_mode is not None:
        chosen = {"in_batch_negatives": ~of_own_query, "hard_negatives": of_own_query}
        harder = chosen.get(rest.hardness_mode, negative) & negative
        added = torch.where(harder, rest.hardness_strength * s.detach(), added)
    weights = rest.negative_weights
    if not to_query and weights is not None and weights.ndim == 1:
        added, visible = _weighted(added, visible, negative, weights)
    return Columns(s, visible, target, added)


def _negatives(rest: Rest, begin: int, end: int) -> Columns:
    """Each query's own hard negatives, which belong to the query's direction."""
    assert rest.n is not None
    rows = torch.arange(begin, end, device=rest.t.device) + rest.offset
    s = torch.einsum("nd,nkd->nk", rest.q[rows], rest.n[begin:end])
    visible = torch.ones_like(s, dtype=torch.bool)
    added = torch.zeros_like(s)
    if rest.hardness_mode in ("hard_negatives", "all_negatives"):
        added = rest.hardness_strength * s.detach()
    weights = rest.negative_weights
    if weights is not None and weights.ndim == 2:
        added, visible = _weighted(added, visible, visible, weights[begin:end])
    return Columns(s, visible, torch.zeros_like(visible), added)


def _weighted(added: Tensor, visible: Tensor, negative: Tensor, weights: Tensor) -> tuple[Tensor, Tensor]:
    """Weights multiply the negatives' exponentials; one of 0 hides."""
    log = torch.where(weights > 0, weights.to(added.dtype), 1).log()
    return added + torch.where(negative, log, 0), visible & ~(negative & (weights == 0))


def prefixes(
    dims: Sequence[int] | None, weights: Sequence[float] | None, dim: int
) -> tuple[Sequence[int], Sequence[float]]:
    """Matryoshka's prefixes and their weights; without any the whole vectors."""
    dims = (dim,) if dims is None else dims
    return dims, (1.0,) * len(dims) if weights is None else weights


def _vectors(x: Tensor, similarity: str, wide: torch.dtype) -> Tensor:
    x = x.to(wide)
    return torch.nn.functional.normalize(x, dim=-1, eps=EPS) if similarity == "cosine" else x


def _targets(targets: Tensor, queries: Tensor, documents: Tensor) -> Tensor:
    outside = ((targets < 0) | (targets >= documents.shape[0])).nonzero()
    if outside.numel():
        i = int(outside[0])
        raise ValueError(f"targets[{i}] must be in [0, {documents.shape[0]}), got {int(targets[i])}")
    return targets.long()


def _check_weights(negative_weights: Tensor | None) -> None:
    if negative_weights is not None and not (negative_weights >= 0).all():
        raise ValueError(f"negative_weights must be ≥ 0, got {negative_weights.min().item()}")


METRICS = ("accuracy", "positive_similarity", "negative_similarity")


def mean_metrics(of_rows: Tensor, group: Any) -> dict[str, Tensor]:
    """Share of rows in which nothing beats the row's own positive; mean similarity of these, and of what is no positive
    in the denominators (0 where there is nothing)."""
    sums = torch.cat([of_rows.detach().sum(0), of_rows.new_full((1,), of_rows.shape[0])])
    hits, positive, negative, count, rows = distributed.all_sum(sums, group).unbind()
    means = hits / rows.clamp(min=1), positive / rows.clamp(min=1), negative / count.clamp(min=1)
    return dict(zip(METRICS, means, strict=True))
