"""Kernels for training text-embedding models: attention, pooling and contrastive loss."""

import torch  # noqa: F401  loads the libraries that _native needs

from .ops.explain import explain
from .ops.infonce import InfoNCEFunction, info_nce
from .ops.pooling import PoolFunction, pool
from .version import __version__

__all__ = ["InfoNCEFunction", "PoolFunction", "__version__", "explain", "info_nce", "pool"]
