"""The Triton kernels as backends. triton may be absent, as it is from torch's CPU builds: a Rule says so."""

from __future__ import annotations

from types import ModuleType

import torch
from torch import Tensor

from ...dispatch import Backend, Call, Rule
from ..native import FLOAT64_BESIDE

try:
    from . import attention, infonce, latent_kernels
except ImportError as error:
    if (error.name or "").split(".")[0] != "triton":
        raise
    attention = infonce = latent_kernels = None  # type: ignore[assignment]

DTYPES = (torch.float32, torch.bfloat16, torch.float16)
DEVICE = "cpu" if attention is not None and attention.INTERPRETED else "cuda"


def rules(argument: str) -> tuple[Rule, ...]:
    """About a call's main tensor."""

    def elsewhere(call: Call) -> bool:
        return call[argument].device.type != DEVICE

    def other_dtype(call: Call) -> bool:
        return call[argument].dtype not in DTYPES

    return (
        Rule(lambda call: attention is None, "triton isn't installed"),
        Rule(elsewhere, f"{argument} is on {{{argument}.device.type}}"),
        Rule(other_dtype, f"{argument} is {{{argument}.dtype}}"),
    )


def fused(x: Tensor) -> ModuleType | None:
    """latent_kernels, where they serve x."""
    return latent_kernels if x.device.type == DEVICE and x.dtype in DTYPES else None


_OPERATORS = (None, None) if attention is None else (attention.forward, attention.backward)

ATTENTION = Backend("triton", rules("query"), *_OPERATORS)
INFONCE = Backend("triton", (*rules("queries"), FLOAT64_BESIDE), None if infonce is None else infonce.forward)
