"""The Triton kernels as backends. triton may be absent, as it is from torch's CPU builds: a Rule says so."""

from __future__ import annotations

from types import ModuleType

from torch import Tensor

from ...dispatch import Backend, Rule
from .. import native

try:
    from . import attention, infonce, latent_kernels, launcher
except ImportError as error:
    if (error.name or "").split(".")[0] != "triton":
        raise
    attention = infonce = latent_kernels = launcher = None  # type: ignore[assignment]

DEVICE = "cuda" if launcher is None else launcher.DEVICE


def rules(argument: str) -> tuple[Rule, ...]:
    """About a call's main tensor."""
    return Rule(lambda call: launcher is None, "triton isn't installed"), *native.on(DEVICE, argument)


def fused(x: Tensor) -> ModuleType | None:
    """latent_kernels, where they serve x."""
    return latent_kernels if x.device.type == DEVICE and x.dtype in native.DTYPES else None


_OPERATORS = (None, None) if attention is None else (attention.forward, attention.backward)

ATTENTION = Backend("triton", rules("query"), *_OPERATORS)
INFONCE = Backend("triton", (*rules("queries"), native.FLOAT64_BESIDE), None if infonce is None else infonce.forward)
