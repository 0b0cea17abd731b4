"""sentence-transformers' losses and pooling with embedkern's kernels: change the import line, keep the rest."""

from . import losses, modules

__all__ = ["losses", "modules"]
