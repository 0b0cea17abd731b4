"""The C++ kernels as backends: one for each family on the CPU."""

from __future__ import annotations

import torch

from .. import _native, schema
from ..dispatch import Backend, Call, Rule
from ..schema import OPS

schema.check_kernels(_native.kernels())

DTYPES = (torch.float32, torch.bfloat16, torch.float16)


def _on_cpu(argument: str) -> tuple[Rule, Rule]:
    """The rules about a call's main tensor that every CPU kernel has."""

    def elsewhere(call: Call) -> bool:
        return call[argument].device.type != "cpu"

    def other_dtype(call: Call) -> bool:
        return call[argument].dtype not in DTYPES

    return (
        Rule(elsewhere, f"{argument} is on {{{argument}.device.type}}"),
        Rule(other_dtype, f"{argument} is {{{argument}.dtype}}"),
    )


POOLING = Backend("cpu", _on_cpu("hidden"), OPS.pool_forward.default, OPS.pool_backward.default)
