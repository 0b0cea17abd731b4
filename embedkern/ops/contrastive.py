"""Losses over all pairs beside info_nce: distillation of similarities, and SigLIP's."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from .. import distributed
from ..backends import panels  # noqa: F401  gives the operators their kernels
from ..schema import OPS
from . import common


def contrastive_distillation(
    student_queries: Tensor,
    student_documents: Tensor,
    teacher_queries: Tensor,
    teacher_documents: Tensor,
    *,
    temperature: float | Tensor = 1.0,
    teacher_temperature: float = 1.0,
    loss: str = "kl",
) -> Tensor:
    """Makes a student's cosine similarities those of a teacher, without the N×M matrix.

    Args:
        student_queries, student_documents: (N, D) and (M, D), floating point.
        teacher_queries, teacher_documents: (N, T) and (M, T); they get no gradient.
        temperature: τ of the student, a number or a tensor () with its gradient.
        teacher_temperature: τ_t, a number.
        loss: "kl", the mean over rows of KL(softmax(teacher / τ_t) ‖ softmax(student / τ)), with no factor τ²; "mse",
            the mean over all pairs of the squared difference of the similarities, whatever the temperatures.

    Returns:
        The loss, float32 (float64 for float64 inputs).

    Raises:
        ValueError, TypeError: an argument has a wrong rank, size, dtype, device or value.
        NotImplementedError: second derivatives.
    """
    tensors = {
        "student_queries": student_queries,
        "student_documents": student_documents,
        "teacher_queries": teacher_queries,
        "teacher_documents": teacher_documents,
    }
    for name, x in tensors.items():
        common.check_tensor(name, x, 2, "(N, D)" if name.endswith("queries") else "(M, D)")
        common.check_float(name, x)
        common.check_device(name, x, student_queries, "student_queries")
    (rows, dim), columns = student_queries.shape, student_documents.shape[0]
    common.check_shape("student_documents", student_documents, (columns, dim))
    common.check_shape("teacher_queries", teacher_queries, (rows, teacher_queries.shape[1]))
    common.check_shape("teacher_documents", teacher_documents, (columns, teacher_queries.shape[1]))
    if columns < 1:
        raise ValueError(f"student_documents must have M ≥ 1, got {tuple(student_documents.shape)}")
    common.check_choice("loss", loss, ("kl", "mse"))
    tau = _number("temperature", temperature, student_queries, positive=True)
    if isinstance(teacher_temperature, Tensor):
        raise TypeError("teacher_temperature must be a number, got Tensor")
    _number("teacher_temperature", teacher_temperature, student_queries, positive=True)
    return _Distillation.apply(
        student_queries, student_documents, teacher_queries.detach(), teacher_documents.detach(), tau,
        float(teacher_temperature), loss == "kl",
    )  # fmt: skip


def sigmoid_loss(
    images: Tensor, texts: Tensor, logit_scale: float | Tensor, logit_bias: float | Tensor, group: Any = None
) -> Tensor:
    """SigLIP's loss (Zhai et al. 2023), -Σ_ij log σ(±(scale · x_i·y_j + bias)) / N with + on pairs, without the matrix.

    Args:
        images, texts: (N, D) both, as given: normalise them before, if they should be.
        logit_scale, logit_bias: numbers or tensors of one element with their gradients; the scale multiplies as it is.
        group: a torch.distributed process group: every rank's texts are seen, the loss is that of the concatenated
            batch on each rank, and gradients are those of that loss by this rank's inputs.

    Returns:
        The loss, float32 (float64 for float64 inputs).

    Raises:
        ValueError, TypeError: an argument has a wrong rank, size, dtype or device.
        NotImplementedError: second derivatives.
    """
    common.check_tensor("images", images, 2, "(N, D)")
    common.check_float("images", images)
    common.check_tensor("texts", texts, 2, "(N, D)")
    common.check_float("texts", texts)
    common.check_shape("texts", texts, images.shape)
    common.check_device("texts", texts, images, "images")
    scale, bias = _number("logit_scale", logit_scale, images), _number("logit_bias", logit_bias, images)
    if group is None:
        return _Sigmoid.apply(images, texts, scale, bias, 0, images.shape[0])
    (of_ranks,) = distributed.shards([images.shape[0]], images.device, group)
    every = distributed.Gather.apply(texts, of_ranks, group)
    mine = _Sigmoid.apply(images, every, scale, bias, of_ranks.offset, of_ranks.total)
    return mine + (distributed.all_sum(mine, group) - mine.detach())  # the others' share is a constant here


def _number(name: str, x: float | Tensor, like: Tensor, positive: bool = False) -> Tensor:
    """A scalar option as a tensor (), its gradient kept."""
    if isinstance(x, Tensor):
        common.check_float(name, x)
        common.check_device(name, x, like, "the inputs")
        if x.numel() != 1:
            raise ValueError(f"{name} must be a number or a tensor of one element, got shape {tuple(x.shape)}")
        return x.reshape(())
    common.check_number(name, x, "a number or a tensor")
    if positive and not x > 0:
        raise ValueError(f"{name} must be > 0, got {x}")
    return torch.full((), x, dtype=torch.float64 if like.dtype == torch.float64 else torch.float32, device=like.device)


def _finish(ctx: Any, d_loss: Tensor, family: str) -> Any:
    """The gradients made in the forward pass, times the upstream one: float32 until then."""
    gradients = [
        (gradient * d_loss).to(dtype) if need else None
        for gradient, dtype, need in zip(ctx.saved_tensors, ctx.dtypes, ctx.needs_input_grad, strict=False)
    ]
    return common.first_derivatives(family, *gradients)


class _Distillation(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any, q: Tensor, d: Tensor, t_q: Tensor, t_d: Tensor, tau: Tensor, teacher_tau: float, kl: bool
    ) -> Tensor:
        needs = ctx.needs_input_grad
        loss, d_q, d_d, d_tau = OPS.contrastive_distillation(q, d, t_q, t_d, tau, teacher_tau, kl, needs[0], needs[1])
        ctx.save_for_backward(d_q, d_d, d_q.new_empty(0), d_q.new_empty(0), d_tau)
        ctx.dtypes = [x.dtype for x in (q, d, t_q, t_d, tau)]
        return loss

    @staticmethod
    def backward(ctx: Any, d_loss: Tensor) -> Any:
        return (*_finish(ctx, d_loss, "contrastive_distillation"), None, None)


class _Sigmoid(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, y: Tensor, scale: Tensor, bias: Tensor, offset: int, total: int) -> Tensor:
        loss, *gradients = OPS.sigmoid_loss(x, y, scale, bias, offset, total, *ctx.needs_input_grad[:2])
        ctx.save_for_backward(*gradients)
        ctx.dtypes = [v.dtype for v in (x, y, scale, bias)]
        return loss

    @staticmethod
    def backward(ctx: Any, d_loss: Tensor) -> Any:
        return (*_finish(ctx, d_loss, "sigmoid_loss"), None, None)
