"""What the Triton backends' hosts share."""

from __future__ import annotations

import contextlib
from typing import Any

import torch
import triton

INTERPRETED = triton.knobs.runtime.interpret
DEVICE = "cpu" if INTERPRETED else "cuda"


def on(device: torch.device) -> Any:
    return torch.cuda.device(device) if device.type == "cuda" else contextlib.nullcontext()


def precision(dtype: torch.dtype) -> str:
    """Of products of float32: torch's setting."""
    return "tf32" if torch.backends.cuda.matmul.allow_tf32 and dtype == torch.float32 else "ieee"


def run(
    kernel: Any, programs: int, *arguments: Any, warps: int, stages: int, registers: int | None = None, **constants: Any
) -> None:
    options: dict[str, Any] = {} if INTERPRETED else {"enable_fp_fusion": True, "maxnreg": registers}
    kernel[(programs,)](*arguments, **constants, num_warps=warps, num_stages=stages, **options)
