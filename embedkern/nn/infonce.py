"""The contrastive loss as a module."""

from __future__ import annotations

import math
from typing import Any

import torch
from torch import Tensor, nn

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
