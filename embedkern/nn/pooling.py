"""Pooling as a module."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from ..ops.pooling import pool


class Pooling(torch.nn.Module):
    """`embedkern.pool` with its options fixed; has no parameters.

    Args: as `embedkern.pool`. forward(hidden, *, lengths | mask | cu_seqlens, skip, spans) → (B, C').
    """

    def __init__(
        self,
        mode: str | Sequence[str] = "mean",
        *,
        truncate_dim: int | None = None,
        normalize: bool = False,
        eps: float = 1e-12,
    ) -> None:
        super().__init__()
        self.mode = mode if isinstance(mode, str) else tuple(mode)
        self.truncate_dim, self.normalize, self.eps = truncate_dim, normalize, eps
        pool(torch.zeros(1, 1, max(truncate_dim or 1, 1)), self.mode, truncate_dim=truncate_dim, eps=eps)  # bad options

    def forward(
        self,
        hidden: Tensor,
        *,
        lengths: Tensor | None = None,
        mask: Tensor | None = None,
        cu_seqlens: Tensor | None = None,
        skip: int | Tensor | None = None,
        spans: Tensor | None = None,
    ) -> Tensor:
        return pool(
            hidden,
            self.mode,
            lengths=lengths,
            mask=mask,
            cu_seqlens=cu_seqlens,
            skip=skip,
            spans=spans,
            truncate_dim=self.truncate_dim,
            normalize=self.normalize,
            eps=self.eps,
        )

    def extra_repr(self) -> str:
        return f"mode={self.mode!r}, truncate_dim={self.truncate_dim}, normalize={self.normalize}, eps={self.eps}"
