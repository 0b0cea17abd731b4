"""The Triton kernels as backends. triton may be absent, as it is from torch's CPU builds: a Rule says so."""

from __future__ import annotations

import torch

from ...dispatch import Backend, Call, Rule

try:
    from . import attention
except ImportError as error:
    if (error.name or "").split(".")[0] != "triton":
        raise
    attention = None  # type: ignore[assignment]

DTYPES = (torch.float32, torch.bfloat16, torch.float16)


def _elsewhere(call: Call) -> bool:
    return call["query"].device.type != ("cpu" if attention is not None and attention.INTERPRETED else "cuda")


_RULES = (
    Rule(lambda call: attention is None, "triton isn't installed"),
    Rule(_elsewhere, "query is on {query.device.type}"),
    Rule(lambda call: call["query"].dtype not in DTYPES, "query is {query.dtype}"),
)
_OPERATORS = (None, None) if attention is None else (attention.forward, attention.backward)

ATTENTION = Backend("triton", _RULES, *_OPERATORS)
