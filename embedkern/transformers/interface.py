"""`attn_implementation="embedkern"`: what a transformers model's attention layers call."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from transformers import AttentionInterface, AttentionMaskInterface
from transformers.utils import logging

from embedkern.ops.attention import attention, attention_varlen

from .masks import Pattern, make_mask

NAME = "embedkern"
# What transformers 5.23's models pass to the interface beyond the arguments that `attention_forward` serves.
VARIANTS = ("s_aux", "sinks", "cache", "indices", "block_indices")
logger = logging.get_logger(__name__)


def attention_forward(
    module: nn.Module,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attention_mask: Tensor | Pattern | None,
    *,
    scaling: float | None = None,
    dropout: float = 0.0,
    is_causal: bool | None = None,
    softcap: float | None = None,
    position_bias: Tensor | None = None,
    cu_seq_lens_q: Tensor | None = None,
    cu_seq_lens_k: Tensor | None = None,
    max_length_q: int | None = None,
    max_length_k: int | None = None,
    **kwargs: Any,
) -> tuple[Tensor, None]:
    """transformers' attention interface: query (B, Hq, Lq, D), key and value (B, Hkv, Lk, ·) → (B, Lq, Hq, Dv), None.

    attention_mask is what `make_mask` makes, a bool mask or an additive float mask (B, 1 or Hq, Lq, Lk), or None.
    position_bias is T5's (1 or B, Hq, Lq, Lk), or `attention`'s relative_bias (Hq, 2R + 1). With `cu_seq_lens_q` the
    input is packed: B is 1 and attention stays inside each sequence. The weights are never made: `output_attentions`
    gets None in their place. A patched module's temperature applies.

    Raises:
        NotImplementedError: for arguments of other variants (`s_aux`, a paged `cache`, …), for a `sliding_window` or
            causal attention with 1 < Lq != Lk that come without a mask.
        ValueError: packed input with B > 1, with a padding mask, or with keys that cu_seq_lens_k doesn't describe.
    """
    # sliding_window repeats what the mask says, where there is one.
    for name in VARIANTS if attention_mask is not None else (*VARIANTS, "sliding_window"):
        if kwargs.get(name) is not None:
            raise NotImplementedError(f"attn_implementation='{NAME}' doesn't take `{name}` ({type(module).__name__})")
    if kwargs.get("output_attentions"):
        logger.warning_once(
            f"`{NAME}` attention never forms the attention weights: `output_attentions=True` gives None for them. "
            "Use attn_implementation='eager' to see them."
        )
    options: dict[str, Any] = {
        "scale": query.shape[-1] ** -0.5 if scaling is None else scaling,
        "softcap": softcap,
        "dropout_p": dropout,
    }
    if isinstance(attention_mask, Pattern) and attention_mask.packed is not None:
        cu_seq_lens_q, cu_seq_lens_k, max_length_q, max_length_k = attention_mask.packed
    if isinstance(attention_mask, Pattern) and attention_mask.form is not None and cu_seq_lens_q is None:
        attention_mask = attention_mask.formed
    elif isinstance(attention_mask, Pattern):
        options.update(attention_mask.options)
        attention_mask = attention_mask.key_mask
    elif attention_mask is None:
        options["causal"] = _is_causal(module, is_causal)
    aligned = query.shape[2] in (1, key.shape[2]) or isinstance(attention_mask, Tensor)
    if options.get("causal") and cu_seq_lens_q is None and attention_mask is None and not aligned:
        # sdpa aligns the diagonal to the first key, flash attention and this op to the last.
        raise NotImplementedError(f"causal, {query.shape[2]} queries, {key.shape[2]} keys and no mask to align them")

    bias = None
    if position_bias is not None and position_bias.ndim == 2:
        options["relative_bias"] = position_bias
    elif position_bias is not None:
        bias = position_bias
    mask = key_mask = None
    if attention_mask is None or attention_mask.ndim == 2:
        key_mask = attention_mask
    elif attention_mask.dtype == torch.bool:
        mask = attention_mask
    else:
        bias = attention_mask if bias is None else bias + attention_mask
    width = value.shape[-1]
    query, key, value = _pad_head_dim(query), _pad_head_dim(key), _pad_head_dim(value)
    options["temperature"] = _temperature(module, query, key, mask, bias, key_mask, cu_seq_lens_q)

    if cu_seq_lens_q is not None and mask is None and bias is None:
        _check_packed(query, key, key_mask, cu_seq_lens_k)
        query, key, value = (x[0].transpose(0, 1) for x in (query, key, value))  # (1, H, T, D) → (T, H, D), no copy
        out: Any = attention_varlen(
            query,
            key,
            value,
            cu_seq_lens_q,
            cu_seq_lens_k,
            max_seqlen_q=max_length_q,
            max_seqlen_k=max_length_k,
            **options,
        )
        return out[None, ..., :width], None

    if cu_seq_lens_q is not None:
        _check_packed(query, key, key_mask, cu_seq_lens_k)
        same = _same_sequence(query, key, cu_seq_lens_q, cu_seq_lens_k)
        mask = same if mask is None else mask & same
    out = attention(query, key, value, key_mask=key_mask, mask=mask, bias=bias, **options)
    return out.transpose(1, 2)[..., :width], None


def _is_causal(module: nn.Module, is_causal: bool | None) -> bool:
    if is_causal is not None:
        return bool(is_causal)
    # A decoder's layers keep is_causal=True when config.is_causal=False makes its mask bidirectional.
    config = getattr(module, "config", None)
    return bool(getattr(module, "is_causal", True) and getattr(config, "is_causal", True))


def _temperature(
    module: nn.Module,
    query: Tensor,
    key: Tensor,
    mask: Tensor | None,
    bias: Tensor | None,
    key_mask: Tensor | None,
    cu_seq_lens: Tensor | None,
) -> float | Tensor:
    """What `patch` gave this layer: a number, its parameter, or a function of the lengths, broadcast to the rows."""
    log_temperature = getattr(module, "log_temperature", None)
    if log_temperature is not None:
        return log_temperature.exp()
    given: float | Callable[[Tensor], Tensor] = getattr(module, "_embedkern_temperature", 1.0)
    if not callable(given):
        return given
    if mask is not None or bias is not None:
        raise NotImplementedError("temperature: a function of lengths needs a padding mask, not a complete one")
    if cu_seq_lens is not None:
        lengths = cu_seq_lens.diff()
    elif key_mask is not None:
        lengths = key_mask.sum(1)
    else:
        lengths = torch.full((query.shape[0],), key.shape[2], device=query.device)
    temperature = given(lengths.clamp(min=1))  # a row of padding only has no query that counts
    if temperature.shape[:1] != lengths.shape or temperature[:1].numel() != temperature.shape[1:2].numel():
        raise ValueError(
            f"temperature: the function gave {tuple(temperature.shape)} for lengths ({lengths.shape[0]},), "
            "want (B,), (B, H) or (B, 1 or H, 1, 1)"
        )
    temperature = temperature.reshape(*lengths.shape, -1)
    if cu_seq_lens is None:
        return temperature[:, :, None, None]
    return temperature.repeat_interleave(cu_seq_lens.diff(), 0, output_size=query.shape[2])[:, :, None]


def _pad_head_dim(x: Tensor) -> Tensor:
    """Zeros up to the op's next head dim, a multiple of 8: they change neither scores nor the output's first dims."""
    missing = -x.shape[-1] % 8
    return F.pad(x, (0, missing)) if missing else x


def _check_packed(query: Tensor, key: Tensor, mask: Tensor | None, cu_seq_lens_k: Tensor | None) -> None:
    if query.shape[0] != 1:
        raise ValueError(f"cu_seq_lens_q: packed input has a batch of 1, got {query.shape[0]}")
    if mask is not None:
        raise ValueError("attention_mask: packed input (cu_seq_lens_q) has no padding, so it takes no padding mask")
    if cu_seq_lens_k is None and key.shape[2] != query.shape[2]:
        raise ValueError(
            f"cu_seq_lens_k: {key.shape[2]} keys for {query.shape[2]} queries (a cache or cross-attention) need it"
        )


def _same_sequence(query: Tensor, key: Tensor, cu_q: Tensor, cu_k: Tensor | None) -> Tensor:
    """(Tq, Tk): which pairs of packed tokens are of the same sequence."""

    def sequence_ids(cu: Tensor, length: int) -> Tensor:
        return torch.searchsorted(cu[1:], torch.arange(length, dtype=cu.dtype, device=cu.device), right=True)

    return sequence_ids(cu_q, query.shape[2])[:, None] == sequence_ids(cu_q if cu_k is None else cu_k, key.shape[2])


AttentionInterface.register(NAME, attention_forward)
AttentionMaskInterface.register(NAME, make_mask)
