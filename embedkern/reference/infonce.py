"""The specification of the contrastive loss, in plain differentiable PyTorch. csrc/cpu/infonce.cpp computes the same
without the N×M matrix that stands here."""

from __future__ import annotations

import torch
from torch import Tensor

EPS = 1e-12  # under cosine, x / max(‖x‖₂, EPS), as torch.nn.functional.normalize


def info_nce(
    queries: Tensor,
    documents: Tensor,
    negatives: Tensor | None,
    positives: Tensor | None,
    targets: Tensor | None,
    temperature: float | Tensor,
    similarity: str,
    query_labels: Tensor | None,
    document_labels: Tensor | None,
    same_label: str,
    weights: Tensor | None,
    label_smoothing: float,
    reduction: str,
    return_metrics: bool,
) -> Tensor | tuple[Tensor, dict[str, Tensor]]:
    with torch.autocast(queries.device.type, enabled=False):
        given = [x for x in (queries, documents, negatives, positives) if x is not None]
        wide = torch.float64 if any(x.dtype == torch.float64 for x in given) else torch.float32
        q, d = _vectors(queries, similarity, wide), _vectors(documents, similarity, wide)
        t = _targets(targets, queries, documents)

        s = q @ d.T  # (N, M)
        positive = torch.arange(d.shape[0], device=d.device) == t[:, None]  # (N, M): row i's own column
        if positives is not None:
            p = _vectors(positives, similarity, wide)
            s = torch.where(positive, (q * p).sum(1, keepdim=True), s)
        visible, y = torch.ones_like(positive), positive
        if query_labels is not None and document_labels is not None:
            same = query_labels[:, None] == document_labels
            if same_label == "ignore":
                visible = positive | ~same
            else:
                y = positive | same
        if negatives is not None:
            n = _vectors(negatives, similarity, wide)
            s = torch.cat([s, torch.einsum("nd,nkd->nk", q, n)], 1)  # (N, M + K)
            beside = positive.new_zeros(n.shape[:2])
            positive, visible, y = (torch.cat(x, 1) for x in ((positive, beside), (visible, ~beside), (y, beside)))

        negative = visible & ~y
        tau = temperature.to(wide).reshape(-1, 1) if isinstance(temperature, Tensor) else temperature
        z = s / tau
        lse = z.masked_fill(~visible, -torch.inf).logsumexp(1)
        y = (1 - label_smoothing) * y.to(wide) / y.sum(1, keepdim=True)
        y = y + label_smoothing * visible / visible.sum(1, keepdim=True)
        row_loss = lse - (y * torch.where(visible, z, 0)).sum(1)  # dz = softmax(z) - y
        loss = reduce(row_loss, weights, reduction)
        return (loss, _metrics(s.detach(), z.detach(), positive, negative, visible)) if return_metrics else loss


def _vectors(x: Tensor, similarity: str, wide: torch.dtype) -> Tensor:
    x = x.to(wide)
    return torch.nn.functional.normalize(x, dim=-1, eps=EPS) if similarity == "cosine" else x


def _targets(targets: Tensor | None, queries: Tensor, documents: Tensor) -> Tensor:
    if targets is None:
        return torch.arange(queries.shape[0], device=queries.device)
    outside = ((targets < 0) | (targets >= documents.shape[0])).nonzero()
    if outside.numel():
        i = int(outside[0])
        raise ValueError(f"targets[{i}] must be in [0, {documents.shape[0]}), got {int(targets[i])}")
    return targets.long()


def reduce(row_loss: Tensor, weights: Tensor | None, reduction: str) -> Tensor:
    """The result from each row's loss (N,). A mean over no weight is 0."""
    if weights is not None:
        weights = weights.to(row_loss.dtype)
        row_loss = row_loss * weights
    if reduction == "none":
        return row_loss
    if reduction == "sum":
        return row_loss.sum()
    if weights is None:
        return row_loss.sum() / max(row_loss.shape[0], 1)
    return row_loss.sum() / total(weights)


def total(weights: Tensor) -> Tensor:
    """Σ weights, or 1 where that is 0."""
    sum_ = weights.sum()
    return torch.where(sum_ == 0, torch.ones_like(sum_), sum_)


def _metrics(s: Tensor, z: Tensor, positive: Tensor, negative: Tensor, visible: Tensor) -> dict[str, Tensor]:
    """Share of rows in which nothing beats the row's own positive; mean similarity of these, and of what is no positive
    in the denominators (0 where there is nothing)."""
    beaten = (torch.where(visible, z, -torch.inf) > z[positive][:, None]).any(1)
    return {
        "accuracy": 1 - beaten.to(s.dtype).sum() / max(s.shape[0], 1),
        "positive_similarity": s[positive].sum() / max(s.shape[0], 1),
        "negative_similarity": torch.where(negative, s, 0).sum() / negative.sum().clamp(min=1),
    }
