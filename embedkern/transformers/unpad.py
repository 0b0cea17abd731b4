"""A patched encoder's forward: the call on packed tokens, and its outputs back in the padded layout."""

from __future__ import annotations

import inspect
import warnings
from collections.abc import Callable
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch
import torch.nn.functional as F
from torch import Tensor

from .families import FIRST
from .masks import AllReal, Pattern, packed_call

if TYPE_CHECKING:
    from .patching import Patch

# Arguments of a call that don't index tokens, and those that do and are packed with them.
PASSED = frozenset({"output_attentions", "output_hidden_states", "return_dict", "use_cache", "num_items_in_batch"})
PACKED = ("input_ids", "inputs_embeds", "token_type_ids", "position_ids")


@dataclass
class PackedBatch:
    """The arguments of a packed call, and the way back to the padded layout."""

    inputs: dict[str, Any]
    indices: Tensor  # (T,) where each packed token stands in the flattened (B·L)
    shape: tuple[int, int]  # B, L
    pooled: Tensor | None  # (B,) the position that the encoder's pooling reads

    def pad(self, x: Tensor) -> Tensor:
        """(1, T, C) → (B, L, C), zeros at padding."""
        rows, length = self.shape
        padded = x.new_zeros(rows * length, x.shape[-1])
        return padded.index_copy(0, self.indices, x[0]).view(rows, length, -1)


class Forward:
    """Stands for a patched encoder's `forward`.

    As an attribute that refers to its encoder, rather than a closure over it, it follows the encoder through
    `copy.deepcopy` and pickling.
    """

    def __init__(self, patch: Patch, unpad: bool) -> None:
        self.patch, self.unpad = patch, unpad

    @property
    def __wrapped__(self) -> Callable[..., Any]:
        # `inspect.signature` follows this: trainers and sentence-transformers pick their inputs by forward's names.
        return self.patch.own_forward

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        forward, encoder = self.__wrapped__, self.patch.encoder
        if args and args[0] is encoder:  # accelerate's unwrap_model makes a bound method of us
            args = args[1:]
        if not self.patch.active:
            return forward(*args, **kwargs)
        if args:
            kwargs = inspect.signature(type(encoder).forward).bind(encoder, *args, **kwargs).arguments
            kwargs.pop("self")
            kwargs.update(kwargs.pop("kwargs", {}))
        batch = self.pack(kwargs) if self.unpad else None
        if batch is None:
            return self.run(forward, kwargs)
        return_dict = kwargs.get("return_dict")
        packed = {**kwargs, **batch.inputs, "attention_mask": self.mask(len(batch.indices)), "return_dict": True}
        if self.patch.family.decoder:
            packed["use_cache"] = False  # its keys would be packed
        out = self.run(forward, packed)
        last = out.last_hidden_state
        padded = batch.pad(last)
        if out.get("hidden_states") is not None:  # holds None where output_hidden_states selects layers
            out.hidden_states = tuple(
                h if h is None else padded if h is last else batch.pad(h) for h in out.hidden_states
            )
        out.last_hidden_state = padded
        if self.patch.family.pooled is not None and batch.pooled is not None and out.get("pooler_output") is not None:
            out.pooler_output = self.patch.family.pooled.pool(encoder, padded, batch.pooled)
        if return_dict is None:
            return_dict = getattr(encoder.config, "return_dict", True)
        return out if return_dict else out.to_tuple()

    def mask(self, tokens: int) -> Any:
        """A packed call's attention_mask. Gemma 3 is made bidirectional by a mask function of its own."""
        config = self.patch.encoder.config
        if not self.patch.family.decoder:
            return None
        if not getattr(config, "use_bidirectional_attention", False):
            return AllReal(tokens)
        reach = config.sliding_window - 1
        return {"full_attention": None, "sliding_attention": Pattern(None, (reach, reach))}

    def run(self, forward: Callable[..., Any], kwargs: dict[str, Any]) -> Any:
        if self.patch.family.hands_on or kwargs.get("cu_seq_lens_q") is None:
            return forward(**kwargs)
        names = ("cu_seq_lens_q", "cu_seq_lens_k", "max_length_q", "max_length_k")
        token = packed_call.set(tuple(kwargs.pop(name, None) for name in names))
        try:
            return torch.compiler.disable(forward)(**kwargs)  # a compiled make_mask wouldn't see packed_call
        finally:
            packed_call.reset(token)

    def pack(self, kwargs: dict[str, Any]) -> PackedBatch | None:
        """The packed form of a call, or None for one that has to run as it is (correct, but not unpadded)."""
        mask, tokens = kwargs.get("attention_mask"), kwargs.get("input_ids")
        if tokens is None:
            tokens = kwargs.get("inputs_embeds")
        if tokens is None or not isinstance(mask, Tensor) or mask.shape != tokens.shape[:2]:
            return None
        if kwargs.get("cu_seq_lens_q") is not None:
            return None
        unknown = {name for name, x in kwargs.items() if x is not None}.difference(PASSED, PACKED, ("attention_mask",))
        if self.patch.family.decoder and kwargs.get("use_cache"):
            unknown.add("use_cache")
        if unknown:
            warnings.warn(f"embedkern: a call with {', '.join(sorted(unknown))} runs padded", stacklevel=3)
            return None
        rows, length = tokens.shape[:2]
        mask = mask.to(device=tokens.device, dtype=torch.bool)
        (indices,) = mask.flatten().nonzero(as_tuple=True)  # the one synchronisation: T sizes everything
        if len(indices) == rows * length:
            kwargs["attention_mask"] = None  # no padding: dense attention, and no mask to read
            return None
        if len(indices) == 0:
            return None
        lengths = mask.sum(1)
        pooled = self.reads(kwargs, mask)
        if pooled is not None and bool((~mask.gather(1, pooled[:, None])[:, 0] & (lengths > 0)).any()):
            what = "the last" if self.patch.family.pooled not in (None, FIRST) else "the first"
            side = "left" if what == "the first" else "right"
            warnings.warn(
                f"embedkern: a batch padded on the {side} runs padded, because the pooler or head reads {what} "
                f"position, padding or not; pad on the {'right' if side == 'left' else 'left'}",
                stacklevel=3,
            )
            return None
        if self.patch.by_distance and bool((mask[:, 1:] & ~mask[:, :-1]).sum(1).add(mask[:, 0]).gt(1).any()):
            warnings.warn(
                "embedkern: a mask with holes runs padded, because packing changes the distances that windows and "
                "relative positions count",
                stacklevel=3,
            )
            return None
        inputs = {name: kwargs[name] for name in PACKED if kwargs.get(name) is not None}
        if self.patch.family.positions is not None:
            inputs.setdefault("position_ids", self.position_ids(tokens))
        packed = {name: x.expand(rows, *x.shape[1:]).flatten(0, 1)[indices][None] for name, x in inputs.items()}
        packed["cu_seq_lens_q"] = F.pad(lengths.cumsum(0), (1, 0)).to(torch.int32)
        packed["max_length_q"] = length  # an upper bound: the exact one would cost a synchronisation
        return PackedBatch(packed, indices, (rows, length), pooled)

    def reads(self, kwargs: dict[str, Any], mask: Tensor) -> Tensor | None:
        """(B,) the position that the encoder's pooling or a head reads, if any."""
        family, encoder = self.patch.family, self.patch.encoder
        if family.pooled is not None and (family.pooled is not FIRST or getattr(encoder, "pooler", None) is not None):
            return family.pooled.reads(encoder, kwargs, mask)
        return FIRST.reads(encoder, kwargs, mask) if self.patch.reads_first else None

    def position_ids(self, tokens: Tensor) -> Tensor:
        """The positions the encoder gives a padded batch when it is told none: (1 or B, L)."""
        count = torch.arange(tokens.shape[1], device=tokens.device)[None]
        if self.patch.family.positions == "count":
            return count  # padding counts, on the left too
        # RoBERTa counts from padding_idx + 1 the tokens that aren't padding_idx, whatever attention_mask says.
        padding = self.patch.encoder.embeddings.padding_idx
        if tokens.ndim == 3:
            return count + padding + 1
        real = tokens.ne(padding)
        return real.cumsum(1) * real + padding
