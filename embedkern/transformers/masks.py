"""transformers' mask functions in the kernels' own terms: padding, and a band that causal masks and windows are."""

from __future__ import annotations

import math
from collections.abc import Callable
from contextvars import ContextVar
from dataclasses import dataclass
from functools import cached_property
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from transformers import masking_utils
from transformers.masking_utils import and_masks, bidirectional_mask_function, causal_mask_function, sdpa_mask

from .symbolic import read

# cu_seq_lens_q, cu_seq_lens_k, max_length_q and max_length_k of the packed call in progress, for models that don't hand
# keyword arguments down to their attention: their mask brings them.
packed_call: ContextVar[tuple[Any, ...] | None] = ContextVar("packed_call", default=None)
Band = tuple[float, float]  # how far a query sees to its left and right, inf without bound


@dataclass
class Pattern:
    """A mask that isn't formed: query p sees keys p - left ≤ j ≤ p + right that key_mask (B, Lk) leaves.

    Not a tensor, since reentrant checkpointing detaches those and would lose what the attributes say. Models hand
    masks through unread; one that computes with its mask fails here.
    """

    key_mask: Tensor | None
    band: Band
    # The complete mask, if position_ids seem to begin anew within a row: only cu_seq_lens_q says it better.
    form: Callable[[], Tensor] | None = None
    packed: tuple[Any, ...] | None = None  # `packed_call`'s

    @cached_property
    def formed(self) -> Tensor | None:
        return None if self.form is None else self.form()

    @property
    def options(self) -> dict[str, Any]:
        """`attention`'s causal and window."""
        left, right = (-1 if bound == math.inf else int(bound) for bound in self.band)
        if right == 0:
            return {"causal": True, "window": None if left < 0 else (left, 0)}
        return {"causal": False, "window": None if left == right == -1 else (left, right)}


class AllReal:
    """Stands for the attention_mask (1, T) of packed tokens, of which none is padding.

    With a mask transformers doesn't look for packed sequences in position_ids, which would form a T×T mask under
    torch.compile. Before `make_mask` gets it, it reads no more of a mask than this.
    """

    ndim = 2

    def __init__(self, length: int) -> None:
        self.shape = (1, length)

    def to(self, *args: Any, **kwargs: Any) -> AllReal:
        return self


def make_mask(
    *, mask_function: Callable[..., Any], attention_mask: Tensor | AllReal | None = None, **kwargs: Any
) -> Any:
    """transformers' mask interface: what `attention_forward` gets as its attention_mask.

    Padding alone is a key mask (B, Lk) or None; causal masks and windows are a `Pattern`; everything that isn't
    recognised is what sdpa gets, bool (B, 1, Lq, Lk), and never skipped.
    """
    if attention_mask is not None and attention_mask.ndim != 2:
        raise ValueError(f"attention_mask: got {attention_mask.ndim} dims, want (B, L) or a complete (B, H, Lq, Lk)")
    if isinstance(attention_mask, AllReal):
        attention_mask = None

    def form() -> Any:
        skips = {"allow_is_causal_skip": False, "allow_is_bidirectional_skip": False}
        return sdpa_mask(mask_function=mask_function, attention_mask=attention_mask, **{**kwargs, **skips})

    if torch.compiler.is_compiling():
        band, packed, call = _recognise_traced(mask_function, kwargs), False, None
    else:
        (band, packed), call = recognise(mask_function), packed_call.get()
    if call is not None and band is not None:
        return Pattern(None, band, packed=call)
    if band is None:
        return form()
    if band == (math.inf, math.inf):
        if not kwargs.get("allow_is_bidirectional_skip", True) or packed:
            return form()
        return _key_mask(attention_mask, kwargs)
    # A caller that forbids skipping computes with the mask; packed input forbids it because sdpa has no other way.
    skip = kwargs.get("allow_is_causal_skip" if band[1] == 0 else "allow_is_bidirectional_skip", True)
    if not (skip or packed) or not _aligned(kwargs):
        return form()
    return Pattern(_key_mask(attention_mask, kwargs), band, form if packed else None)


def recognise(function: Callable[..., Any]) -> tuple[Band | None, bool]:
    """A mask function's band, None if it is none or unknown, and whether it also keeps packed sequences apart."""
    if function is bidirectional_mask_function:
        return (math.inf, math.inf), False
    if function is causal_mask_function:
        return (math.inf, 0), False
    maker = KNOWN.get(getattr(function, "__code__", None))
    if maker == "and_masks":
        return _intersection(_closed_over(function)["mask_functions"])
    if maker == "sliding_window_bidirectional_overlay":
        width = _closed_over(function)["sliding_window"]
        return ((width, width) if width >= 0 else None), False
    if maker == "sliding_window_overlay":
        width = _closed_over(function)["sliding_window"]
        return ((width - 1, math.inf) if width >= 1 else None), False
    return None, False


def _recognise_traced(function: Callable[..., Any], kwargs: dict[str, Any]) -> Band | None:
    """Functions of tensors can't be called with symbols: a caller's own and packed sequences', which forbid skipping,
    and chunks', whose local_size is no window."""
    plain = function is bidirectional_mask_function or function is causal_mask_function
    window = getattr(kwargs.get("config"), "sliding_window", None)
    windowed = window is not None and window == kwargs.get("local_size")
    skip = kwargs.get("allow_is_bidirectional_skip", kwargs.get("allow_is_causal_skip", True))
    return read(function) if plain or (windowed and skip) else None


def _closed_over(function: Any) -> dict[str, Any]:
    return dict(zip(function.__code__.co_freevars, (cell.cell_contents for cell in function.__closure__), strict=True))


def _intersection(functions: tuple[Callable[..., Any], ...]) -> tuple[Band | None, bool]:
    names = [KNOWN.get(getattr(function, "__code__", None)) for function in functions]
    if sorted(map(str, names)) == ["packed_sequence_mask_function", "remap_positions_for_packed_sequence"]:
        # Positions count up by one within a sequence, so that distances are those of the indices.
        remap = functions[names.index("remap_positions_for_packed_sequence")]
        band, packed = recognise(_closed_over(remap)["mask_function"])
        return (None if packed else band), True
    parts = [recognise(function) for function in functions]
    if any(band is None or packed for band, packed in parts):
        return None, False
    left, right = zip(*(band for band, _ in parts if band is not None), strict=True)
    return (min(left), min(right)), False


def _codes() -> dict[Any, str]:
    """The code objects of transformers' closures: which function made one, whatever it closes over."""
    arguments: dict[str, tuple[Any, ...]] = {
        "sliding_window_overlay": (1,),
        "sliding_window_bidirectional_overlay": (1,),
        "packed_sequence_mask_function": (torch.zeros(1, 1),),
        "remap_positions_for_packed_sequence": (causal_mask_function, torch.zeros(1, 1)),
    }
    made = {
        name: getattr(masking_utils, name)(*args) for name, args in arguments.items() if hasattr(masking_utils, name)
    }
    return {made_by.__code__: name for name, made_by in {**made, "and_masks": and_masks(causal_mask_function)}.items()}


KNOWN = _codes()


def _aligned(kwargs: dict[str, Any]) -> bool:
    """Whether the last query stands at the last key, as `attention` takes it."""
    ends = [kwargs.get(name) for name in ("q_length", "kv_length")]
    offsets = [kwargs.get(name, 0) for name in ("q_offset", "kv_offset")]
    if None in ends or any(isinstance(offset, Tensor) for offset in offsets):  # a static cache's offset is a tensor
        return False
    return ends[0] + offsets[0] == ends[1] + offsets[1]


def _key_mask(attention_mask: Tensor | None, kwargs: dict[str, Any]) -> Tensor | None:
    if attention_mask is None:
        return None
    start, length = kwargs.get("kv_offset", 0), kwargs["kv_length"]
    key_mask = attention_mask[:, start : start + length]
    # Keys that a static cache holds beyond the mask aren't there yet.
    return F.pad(key_mask, (0, length - key_mask.shape[1])) if key_mask.shape[1] < length else key_mask
