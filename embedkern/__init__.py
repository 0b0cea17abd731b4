"""Kernels for training text-embedding models: attention, pooling and contrastive loss."""

from typing import TYPE_CHECKING, Any

import torch  # noqa: F401  loads the libraries that _native needs

from . import nn
from .gradcache import GradCache
from .ops.attention import (
    AttentionFunction,
    AttentionVarlenFunction,
    attention,
    attention_varlen,
    log_length_temperature,
    relative_bias_from_buckets,
)
from .ops.contrastive import contrastive_distillation, sigmoid_loss
from .ops.explain import explain
from .ops.infonce import InfoNCEFunction, info_nce
from .ops.latent_pooling import (
    LatentAttentionFunction,
    MultiLayerAttentionFunction,
    latent_attention,
    multi_layer_attention,
)
from .ops.pooling import PoolFunction, pool
from .version import __version__

if TYPE_CHECKING:
    from .transformers import patch, patched, unpatch

__all__ = [
    "AttentionFunction",
    "AttentionVarlenFunction",
    "GradCache",
    "InfoNCEFunction",
    "LatentAttentionFunction",
    "MultiLayerAttentionFunction",
    "PoolFunction",
    "__version__",
    "attention",
    "attention_varlen",
    "contrastive_distillation",
    "explain",
    "info_nce",
    "latent_attention",
    "log_length_temperature",
    "multi_layer_attention",
    "nn",
    "patch",
    "patched",
    "pool",
    "relative_bias_from_buckets",
    "sigmoid_loss",
    "unpatch",
]


def __getattr__(name: str) -> Any:  # transformers takes seconds to import, and is an extra
    if name in ("patch", "patched", "unpatch"):
        from . import transformers

        return getattr(transformers, name)
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
