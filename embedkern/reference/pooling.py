"""The specification of pooling, in plain differentiable PyTorch. csrc/cpu/pooling.cpp computes the same."""

from __future__ import annotations

import torch
from torch import Tensor


def segments(
    hidden: Tensor, lengths: Tensor | None, mask: Tensor | None, cu_seqlens: Tensor | None, spans: Tensor | None
) -> tuple[Tensor, Tensor]:
    """(start, end) rows (S,) of each segment in hidden.view(-1, C), and which of those rows are real (rows,)."""
    rows = hidden.shape[:-1].numel()
    real = torch.ones(rows, dtype=torch.bool, device=hidden.device)
    if hidden.ndim == 3:
        batch, length = hidden.shape[:2]
        if lengths is not None:
            if ((lengths < 0) | (lengths > length)).any():
                raise ValueError(f"lengths must be in [0, {length}], got {lengths.tolist()}")
            mask = torch.arange(length, device=hidden.device) < lengths[:, None]
        if mask is not None:
            real = mask.reshape(-1)
        bounds = torch.arange(batch + 1, device=hidden.device) * length
    else:
        bounds = torch.tensor([0, rows], device=hidden.device) if cu_seqlens is None else cu_seqlens.long()
        if bounds[0] != 0:
            raise ValueError(f"cu_seqlens must start at 0, got {int(bounds[0])}")
        if (bounds[1:] < bounds[:-1]).any():
            raise ValueError(f"cu_seqlens must not decrease, got {bounds.tolist()}")
        if bounds[-1] != rows:
            raise ValueError(f"cu_seqlens must end at the number of tokens, {rows}, got {int(bounds[-1])}")
    if spans is None:
        return torch.stack([bounds[:-1], bounds[1:]], 1), real
    if ((spans < 0) | (spans > rows)).any() or (spans[:, 0] > spans[:, 1]).any():
        raise ValueError(f"spans must be 0 ≤ start ≤ end ≤ {rows}, got {spans.tolist()}")
    return spans.long(), real


def pool(
    hidden: Tensor,
    modes: tuple[str, ...],
    lengths: Tensor | None,
    mask: Tensor | None,
    cu_seqlens: Tensor | None,
    skip: Tensor | None,
    spans: Tensor | None,
    out_channels: int,
    normalize: bool,
    eps: float,
) -> Tensor:
    bounds, real = segments(hidden, lengths, mask, cu_seqlens, spans)
    channels = hidden.shape[-1]
    wide = hidden.dtype if hidden.dtype == torch.float64 else torch.float32
    x = hidden.reshape(real.shape[0], channels).to(wide)
    if skip is None:
        skip = torch.zeros(bounds.shape[0], dtype=torch.int64, device=hidden.device)
    elif (skip < 0).any():
        raise ValueError(f"skip must be ≥ 0, got {skip.tolist()}")

    results = []
    for (start, end), skipped in zip(bounds.tolist(), skip.tolist(), strict=True):
        ranks = torch.arange(1, int(real[start:end].sum()) + 1, device=hidden.device, dtype=wide)[skipped:]
        rows = x[start:end][real[start:end]][skipped:]  # (n, C): the others are not read, whatever they hold
        n = rows.shape[0]
        parts = [_pool_rows(rows, ranks, mode) if n else x.new_zeros(channels) for mode in modes]
        results.append(torch.cat(parts)[:out_channels])
    out = torch.stack(results) if results else x.new_zeros((0, out_channels))
    out = out + x[:0].sum()  # 0: where there is nothing to pool, the gradient is 0 too
    if normalize:
        norm = torch.linalg.vector_norm(out, dim=1, keepdim=True)
        divisor = torch.where(norm < eps, norm.new_tensor(eps), norm)
        out = out / torch.where(divisor == 0, torch.ones_like(divisor), divisor)
    return out.to(hidden.dtype)


def _pool_rows(rows: Tensor, ranks: Tensor, mode: str) -> Tensor:
    """rows (n, C) of one segment, n ≥ 1, and their ranks (n,) among its real rows → (C,)."""
    n = rows.shape[0]
    if mode == "cls":
        return rows[0]
    if mode == "lasttoken":
        return rows[-1]
    if mode == "max":
        return rows.gather(0, rows.argmax(0, keepdim=True))[0]  # one row gets the gradient: the first maximum
    if mode == "weightedmean":
        return (ranks[:, None] * rows).sum(0) / ranks.sum()
    return rows.sum(0) / {"mean": n, "mean_sqrt_len_tokens": n**0.5, "sum": 1}[mode]
