"""Losses over all pairs, a panel of rows at a time, with their gradients: operators in plain torch, for any device."""

from __future__ import annotations

from collections.abc import Callable, Iterator

import torch
from torch import Tensor
from torch.nn.functional import softplus

from .. import schema
from .latent_pooling import product

ELEMENTS = 1 << 19  # of a panel's matrix
EVEN = 840 * 64  # elements: divides into whole vectors between any number of threads up to 8
EPS = 1e-12  # x / max(‖x‖₂, EPS), as torch.nn.functional.normalize


def _panels(rows: int, columns: int) -> Iterator[slice]:
    step = max(1, ELEMENTS // max(columns, 1))
    return (slice(begin, min(begin + step, rows)) for begin in range(0, rows, step))


def _wide(*tensors: Tensor) -> list[Tensor]:
    dtype = torch.float64 if any(x.dtype == torch.float64 for x in tensors) else torch.float32
    return [x.to(dtype) for x in tensors]


def _elementwise(function: Callable[..., Tensor], *xs: Tensor) -> Tensor:
    """function(*xs), element by element, of tensors of one shape.

    Where torch cuts the elements for its threads, those that don't fill a vector are computed by other code, with other
    bits: on a CPU, what is large enough to be cut gets a length that leaves none.
    """
    count = xs[0].numel()
    if count <= 1 << 15 or xs[0].device.type != "cpu":
        return function(*xs)
    even = xs[0].new_empty(len(xs), count + -count % EVEN)
    for row, x in zip(even, xs, strict=True):
        row[:count].view(x.shape).copy_(x)
    return function(*even)[:count].view(xs[0].shape)


def _sum(x: Tensor) -> Tensor:
    """Row by row: torch cuts the sum of a whole matrix by the number of threads."""
    return x.sum(1).sum()


def _unit(x: Tensor) -> tuple[Tensor, Tensor]:
    norm = x.norm(dim=1, keepdim=True)
    return x / norm.clamp(min=EPS), norm


def _through_unit(d: Tensor, unit: Tensor, norm: Tensor) -> Tensor:
    """The gradient of x from that of x / max(‖x‖₂, EPS)."""
    along = torch.where(norm < EPS, 0, (d * unit).sum(1, keepdim=True))
    return (d - along * unit) / norm.clamp(min=EPS)


def contrastive_distillation(
    student_queries: Tensor,
    student_documents: Tensor,
    teacher_queries: Tensor,
    teacher_documents: Tensor,
    temperature: Tensor,
    teacher_temperature: float,
    kl: bool,
    d_queries: bool,
    d_documents: bool,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    rows, columns = student_queries.shape[0], student_documents.shape[0]
    q, d, tau = _wide(student_queries, student_documents, temperature)
    (q, q_norm), (d, d_norm) = _unit(q), _unit(d)
    t_q, t_d = (_unit(x)[0] for x in _wide(teacher_queries, teacher_documents))
    loss, d_tau = q.new_zeros(()), q.new_zeros(())
    d_q, d_d = (torch.zeros_like(x) if need else x.new_empty(0) for x, need in ((q, d_queries), (d, d_documents)))
    for r in _panels(rows, columns):
        s, t = product(q[r], d.T), product(t_q[r], t_d.T)
        if kl:
            z, t = s.div_(tau), t.div_(teacher_temperature).to(s.dtype)
            target = t.softmax(1)
            loss += _sum(target * (t.log_softmax(1) - z.log_softmax(1)))
            dz = z.softmax(1).sub_(target).div_(rows)  # the derivative by z
            d_tau -= _sum(dz * z) / tau
            ds = dz.div_(tau)
        else:
            ds = s.sub_(t.to(s.dtype))
            loss += _sum(ds.square())
            ds = ds.mul_(2 / max(rows * columns, 1))
        if d_queries:
            product(ds, d, d_q[r])
        if d_documents:
            product(ds.T, q[r], d_d, add=True)
    loss = loss / max(rows if kl else rows * columns, 1)
    d_q = _through_unit(d_q, q, q_norm) if d_queries else d_q
    d_d = _through_unit(d_d, d, d_norm) if d_documents else d_d
    return loss, d_q, d_d, d_tau


def sigmoid_loss(
    images: Tensor,
    texts: Tensor,
    logit_scale: Tensor,
    logit_bias: Tensor,
    offset: int,
    total: int,
    d_images: bool,
    d_texts: bool,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    x, y, scale, bias = _wide(images, texts, logit_scale, logit_bias)
    loss, d_scale, d_bias = (x.new_zeros(()) for _ in range(3))
    d_x, d_y = (torch.zeros_like(v) if need else v.new_empty(0) for v, need in ((x, d_images), (y, d_texts)))
    for r in _panels(x.shape[0], y.shape[0]):
        s = product(x[r], y.T)
        logits = scale * s + bias
        own = logits.diagonal(offset + r.start)
        loss += _sum(_elementwise(softplus, logits)) - own.sum()  # softplus(z) - z = softplus(-z)
        d = _elementwise(torch.sigmoid, logits)
        d.diagonal(offset + r.start).sub_(1)
        d.div_(max(total, 1))
        d_scale += _sum(d * s)
        d_bias += _sum(d)
        d.mul_(scale)
        if d_images:
            product(d, y, d_x[r])
        if d_texts:
            product(d.T, x[r], d_y, add=True)
    return loss / max(total, 1), d_x, d_y, d_scale, d_bias


schema.implement("contrastive_distillation", contrastive_distillation)
schema.implement("sigmoid_loss", sigmoid_loss)
