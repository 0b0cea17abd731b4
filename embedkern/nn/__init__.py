"""Modules over the ops."""

from .infonce import InfoNCELoss
from .pooling import Pooling

__all__ = ["InfoNCELoss", "Pooling"]
