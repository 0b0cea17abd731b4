"""The contrastive losses as modules, and a memory of past batches."""

from __future__ import annotations

import math
from typing import Any

import torch
from torch import Tensor, nn

from ..ops import common
from ..ops.contrastive import sigmoid_loss
from ..ops.infonce import info_nce


class InfoNCELoss(nn.Module):
    """`info_nce` with its options kept; what depends on the batch goes to `forward`.

    Args:
        temperature: τ, or where it starts.
        learnable_temperature: hold log τ as the parameter `log_temperature` (), so that τ stays positive.
        options: of `embedkern.info_nce`.
    """

    log_temperature: nn.Parameter | None

    def __init__(self, temperature: float = 0.05, learnable_temperature: bool = False, **options: Any) -> None:
        super().__init__()
        if not temperature > 0:
            raise ValueError(f"temperature must be > 0, got {temperature}")
        self.options = options
        self.fixed_temperature = temperature
        log_temperature = nn.Parameter(torch.tensor(math.log(temperature))) if learnable_temperature else None
        self.register_parameter("log_temperature", log_temperature)

    @property
    def temperature(self) -> float | Tensor:
        return self.fixed_temperature if self.log_temperature is None else self.log_temperature.exp()

    def forward(self, queries: Tensor, documents: Tensor, **batch: Any) -> Tensor | tuple[Tensor, dict[str, Tensor]]:
        return info_nce(queries, documents, temperature=self.temperature, **self.options, **batch)

    def extra_repr(self) -> str:
        kind = "learnable_temperature=True" if self.log_temperature is not None else f"{self.fixed_temperature}"
        return ", ".join([kind, *(f"{name}={value!r}" for name, value in self.options.items())])


class SigmoidLoss(nn.Module):
    """`sigmoid_loss` with SigLIP's trainable scale and bias.

    Args:
        logit_scale: what multiplies the similarities, where it starts; held as the parameter `log_scale` ().
        logit_bias: where the bias starts; the parameter `logit_bias` ().
        group: of `embedkern.sigmoid_loss`.
    """

    def __init__(self, logit_scale: float = 10.0, logit_bias: float = -10.0, group: Any = None) -> None:
        super().__init__()
        if not logit_scale > 0:
            raise ValueError(f"logit_scale must be > 0, got {logit_scale}")
        self.log_scale = nn.Parameter(torch.tensor(math.log(logit_scale)))
        self.logit_bias = nn.Parameter(torch.tensor(float(logit_bias)))
        self.group = group

    def forward(self, images: Tensor, texts: Tensor) -> Tensor:
        return sigmoid_loss(images, texts, self.log_scale.exp(), self.logit_bias, self.group)


class CrossBatchMemory(nn.Module):
    """The documents of past batches as further negatives (cross-batch memory, Wang et al. 2020).

    `documents, labels = memory(documents, labels)` gives this batch's documents followed by those remembered, newest
    batch last, and remembers this batch's, detached, in training mode. Give `info_nce` also targets=torch.arange(N)
    where directions or hardness would take documents from N on for column blocks.

    Args:
        size: how many documents are remembered; the oldest go first.
        dim: D.
    """

    embeddings: Tensor
    labels: Tensor
    filled: Tensor

    def __init__(self, size: int, dim: int) -> None:
        super().__init__()
        if size < 1:
            raise ValueError(f"size must be ≥ 1, got {size}")
        self.register_buffer("embeddings", torch.zeros(size, dim))
        self.register_buffer("labels", torch.zeros(size, dtype=torch.int64))
        self.register_buffer("filled", torch.tensor(0))  # the last ones are in use
        self.with_labels: bool | None = None

    def forward(self, documents: Tensor, labels: Tensor | None = None) -> tuple[Tensor, Tensor | None]:
        """documents (M, D) and their labels (M,) int64 or None → (M + remembered, D) and labels."""
        size, dim = self.embeddings.shape
        common.check_tensor("documents", documents, 2, "(M, D)")
        common.check_shape("documents", documents, (documents.shape[0], dim))
        if labels is not None:
            common.check_integers("labels", labels, (documents.shape[0],), documents, "documents")
        if self.with_labels is not None and self.with_labels != (labels is not None):
            raise ValueError(f"labels must be given always or never, got {'none' if labels is None else 'some'} now")
        filled = int(self.filled)
        remembered = self.embeddings[size - filled :].to(documents.dtype).clone()
        of_all = None if labels is None else torch.cat([labels.long(), self.labels[size - filled :]])
        if self.training:
            self.with_labels = labels is not None
            self._remember(documents.detach(), labels)
        return torch.cat([documents, remembered]), of_all

    @torch.no_grad()
    def _remember(self, documents: Tensor, labels: Tensor | None) -> None:
        size = self.embeddings.shape[0]
        self.embeddings.copy_(torch.cat([self.embeddings, documents.to(self.embeddings.dtype)])[-size:])
        if labels is not None:
            self.labels.copy_(torch.cat([self.labels, labels.long()])[-size:])
        self.filled.fill_(min(size, int(self.filled) + documents.shape[0]))

    def extra_repr(self) -> str:
        return f"{self.embeddings.shape[0]}, {self.embeddings.shape[1]}"
