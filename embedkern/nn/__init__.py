"""Modules over the ops."""

from .infonce import CrossBatchMemory, InfoNCELoss, SigmoidLoss
from .pooling import Pooling

__all__ = ["CrossBatchMemory", "InfoNCELoss", "Pooling", "SigmoidLoss"]
