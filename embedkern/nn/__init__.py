"""Modules over the ops."""

from .pooling import Pooling

__all__ = ["Pooling"]
