"""Modules over the ops."""

from .infonce import InfoNCELoss
from .latent_pooling import LatentAttentionPooling, MultiLayerPooling
from .layer_pooling import LayerPooling, ScalarMix
from .pooling import Pooling

__all__ = ["InfoNCELoss", "LatentAttentionPooling", "LayerPooling", "MultiLayerPooling", "Pooling", "ScalarMix"]
