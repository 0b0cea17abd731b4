"""Kernels for training text-embedding models: attention, pooling and contrastive loss."""

import torch  # noqa: F401  loads the libraries that _native needs

from .ops.attention import (
    AttentionFunction,
    AttentionVarlenFunction,
    attention,
    attention_varlen,
    log_length_temperature,
    relative_bias_from_buckets,
)
from .ops.explain import explain
from .ops.pooling import PoolFunction, pool
from .version import __version__

__all__ = [
    "AttentionFunction",
    "AttentionVarlenFunction",
    "PoolFunction",
    "__version__",
    "attention",
    "attention_varlen",
    "explain",
    "log_length_temperature",
    "pool",
    "relative_bias_from_buckets",
]
