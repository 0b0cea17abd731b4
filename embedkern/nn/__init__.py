"""Modules over the ops."""

from .infonce import CrossBatchMemory, InfoNCELoss, SigmoidLoss
from .latent_pooling import LatentAttentionPooling, MultiLayerPooling
from .layer_pooling import LayerPooling, ScalarMix
from .pooling import Pooling

__all__ = [
    "CrossBatchMemory",
    "InfoNCELoss",
    "LatentAttentionPooling",
    "LayerPooling",
    "MultiLayerPooling",
    "Pooling",
    "ScalarMix",
    "SigmoidLoss",
]
