"""Accuracy is judged against float64, by torch's own error at the same dtype (flash-attention's rule)."""

from __future__ import annotations

import torch
from torch import Tensor


def assert_accurate(got: Tensor, exact: Tensor, torchs: Tensor, factor: float, what: str = "") -> None:
    """max |got - exact| ≤ factor · max |torchs - exact|, plus half a unit of the dtype's rounding of the largest value.

    exact: float64; torchs: what plain torch computes at got's dtype.
    """
    assert got.dtype == torchs.dtype, f"{what}: got {got.dtype}, torch gives {torchs.dtype}"
    assert got.shape == exact.shape, f"{what}: got shape {tuple(got.shape)}, wanted {tuple(exact.shape)}"
    if got.numel() == 0:
        return
    assert not torch.isnan(got).any(), f"{what}: NaN"
    error = (got.double() - exact).abs().max().item()
    allowed = factor * (torchs.double() - exact).abs().max().item()
    rounding = torch.finfo(got.dtype).eps / 2 * exact.abs().max().item()
    assert error <= allowed + rounding, f"{what}: error {error:.3g}, allowed {allowed:.3g} + {rounding:.3g}"
