"""The specification of the losses over all pairs, in plain differentiable PyTorch with the N×M matrix.
backends/panels.py computes the same without it."""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn.functional import logsigmoid, normalize


def contrastive_distillation(
    student_queries: Tensor,
    student_documents: Tensor,
    teacher_queries: Tensor,
    teacher_documents: Tensor,
    temperature: float | Tensor,
    teacher_temperature: float,
    loss: str,
) -> Tensor:
    s = normalize(student_queries, dim=-1) @ normalize(student_documents, dim=-1).T
    t = normalize(teacher_queries, dim=-1) @ normalize(teacher_documents, dim=-1).T
    if loss == "mse":
        return (s - t).square().mean()
    log_p, log_t = (s / temperature).log_softmax(1), (t / teacher_temperature).log_softmax(1)
    return (log_t.exp() * (log_t - log_p)).sum(1).mean()


def sigmoid_loss(images: Tensor, texts: Tensor, logit_scale: float | Tensor, logit_bias: float | Tensor) -> Tensor:
    logits = logit_scale * images @ texts.T + logit_bias
    signs = 2 * torch.eye(len(images), dtype=logits.dtype, device=logits.device) - 1
    return -logsigmoid(signs * logits).sum() / len(images)
