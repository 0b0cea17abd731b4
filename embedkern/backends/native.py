"""The C++ and CUDA kernels as backends, one for each family and kind of device."""

from __future__ import annotations

import torch

from .. import _native, schema
from ..dispatch import Backend, Call, Rule
from ..schema import OPS

schema.check_kernels(_native.kernels())

DTYPES = (torch.float32, torch.bfloat16, torch.float16)
HAS_CUDA = _native.has_cuda  # read once: a call into pybind11 doesn't trace
POOL_MODES_LIMIT = 32  # csrc/cuda/pooling.h


def on(device: str, argument: str) -> tuple[Rule, Rule]:
    """The rules about a call's main tensor that every kernel has."""

    def elsewhere(call: Call) -> bool:
        return call[argument].device.type != device

    def other_dtype(call: Call) -> bool:
        return call[argument].dtype not in DTYPES

    return (
        Rule(elsewhere, f"{argument} is on {{{argument}.device.type}}"),
        Rule(other_dtype, f"{argument} is {{{argument}.dtype}}"),
    )


_BUILT = Rule(lambda call: not HAS_CUDA, "built without nvcc")
_FEW_MODES = Rule(lambda call: len(call["modes"]) > POOL_MODES_LIMIT, f"more than {POOL_MODES_LIMIT} modes")
_PLACES = Rule(
    lambda call: "max" in call["modes"] and call["hidden"].shape[:-1].numel() >= 2**31,
    "the places of maxima are int32, and hidden has 2³¹ rows or more",
)
_POOL_OPERATORS = OPS.pool_forward.default, OPS.pool_backward.default

POOLING = Backend("cpu", (*on("cpu", "hidden"), _PLACES), *_POOL_OPERATORS)
POOLING_CUDA = Backend("cuda", (_BUILT, *on("cuda", "hidden"), _FEW_MODES, _PLACES), *_POOL_OPERATORS)


_ATTENTION_OPERATORS = OPS.attention_forward.default, OPS.attention_backward.default

ATTENTION = Backend("cpu", on("cpu", "query"), *_ATTENTION_OPERATORS)


def _float64_beside(call: Call) -> bool:
    return any(
        call[name] is not None and call[name].dtype not in DTYPES for name in ("documents", "negatives", "positives")
    )


FLOAT64_BESIDE = Rule(_float64_beside, "one of documents, negatives, positives is float64")
INFONCE = Backend("cpu", (*on("cpu", "queries"), FLOAT64_BESIDE), OPS.info_nce.default)
