"""Serving Hugging Face transformers models: the attention interface, and `patch` for whole models.

Importing this package registers `attn_implementation="embedkern"`. `patch` switches a loaded model to it and, with
`unpad`, runs the model's encoder on packed tokens: rows of a padded batch (B, L) laid end to end as one row (1, T),
with `cu_seq_lens_q` telling the attention where each sequence begins. Those are transformers' own names for packed
input, so input that arrives already packed takes the same path.
"""

from . import flatten
from .interface import attention_forward
from .masks import make_mask
from .patching import export_temperature, patch, patched, unpatch

flatten.install()

__all__ = ["attention_forward", "export_temperature", "make_mask", "patch", "patched", "unpatch"]
