"""What attention and attention_varlen check before any work."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from . import common


def check(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    key_lengths: Tensor | None,
    key_mask: Tensor | None,
    mask: Tensor | None,
    bias: Tensor | None,
    relative_bias: Tensor | None,
    temperature: float | Tensor,
    scale: float | Tensor | None,
    causal: bool,
    window: tuple[int, int] | None,
    softcap: float | None,
    dropout_p: float,
    return_lse: bool = False,
) -> dict[str, Any]:
    """The reference's arguments, or an error that names what is wrong."""
    common.check_tensor("query", query, 4, "(B, Hq, Lq, D)")
    common.check_tensor("key", key, 4, "(B, Hkv, Lk, D)")
    common.check_tensor("value", value, 4, "(B, Hkv, Lk, Dv)")
    batch, heads, len_q, dim = query.shape
    kv_heads, len_k = key.shape[1], key.shape[2]
    if key.shape[0] != batch or key.shape[3] != dim:
        raise ValueError(f"key must have shape ({batch}, Hkv, Lk, {dim}) as query {_shape(query)}, got {_shape(key)}")
    if value.shape[0] != batch or value.shape[1] != kv_heads or value.shape[2] != len_k:
        raise ValueError(
            f"value must have shape ({batch}, {kv_heads}, {len_k}, Dv) as key {_shape(key)}, got {_shape(value)}"
        )
    query, key, value = _check_inputs(query, key, value, heads, kv_heads)
    if key_lengths is not None:
        common.check_integers("key_lengths", key_lengths, (batch,), query, "query")
    if key_mask is not None:
        _check_bool("key_mask", key_mask, query)
        common.check_shape("key_mask", key_mask, (batch, len_k))
    if mask is not None:
        _check_bool("mask", mask, query)
        _check_broadcast("mask", mask, (batch, heads, len_q, len_k), "(B, Hq, Lq, Lk)")
    if bias is not None:
        _check_float("bias", bias, query)
        _check_broadcast("bias", bias, (batch, heads, len_q, len_k), "(B, Hq, Lq, Lk)")
    window = _check_options(query, heads, relative_bias, causal, window, softcap, dropout_p)
    _check_factors(query, (batch, heads, len_q, 1), "(B, Hq, Lq, 1)", temperature, scale)
    return {
        "query": query,
        "key": key,
        "value": value,
        "key_lengths": key_lengths,
        "key_mask": key_mask,
        "mask": mask,
        "bias": bias,
        "relative_bias": relative_bias,
        "temperature": temperature,
        "scale": scale,
        "causal": causal,
        "window": window,
        "softcap": softcap,
        "dropout_p": dropout_p,
    }


def check_varlen(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    cu_seqlens_q: Tensor,
    cu_seqlens_k: Tensor | None,
    max_seqlen_q: int | None,
    max_seqlen_k: int | None,
    relative_bias: Tensor | None,
    temperature: float | Tensor,
    scale: float | Tensor | None,
    causal: bool,
    window: tuple[int, int] | None,
    softcap: float | None,
    dropout_p: float,
    return_lse: bool = False,
) -> dict[str, Any]:
    """The reference's arguments, or an error that names what is wrong."""
    common.check_tensor("query", query, 3, "(Tq, Hq, D)")
    common.check_tensor("key", key, 3, "(Tk, Hkv, D)")
    common.check_tensor("value", value, 3, "(Tk, Hkv, Dv)")
    tokens, heads, dim = query.shape
    tokens_k, kv_heads = key.shape[0], key.shape[1]
    if key.shape[2] != dim:
        raise ValueError(f"key must have shape (Tk, Hkv, {dim}) as query {_shape(query)}, got {_shape(key)}")
    if value.shape[0] != tokens_k or value.shape[1] != kv_heads:
        raise ValueError(
            f"value must have shape ({tokens_k}, {kv_heads}, Dv) as key {_shape(key)}, got {_shape(value)}"
        )
    query, key, value = _check_inputs(query, key, value, heads, kv_heads)
    common.check_cu_seqlens("cu_seqlens_q", cu_seqlens_q, query, "query")
    if cu_seqlens_k is not None:
        common.check_cu_seqlens("cu_seqlens_k", cu_seqlens_k, query, "query")
        if cu_seqlens_k.shape[0] != cu_seqlens_q.shape[0]:
            raise ValueError(
                f"cu_seqlens_k must have cu_seqlens_q's shape {_shape(cu_seqlens_q)}, got {_shape(cu_seqlens_k)}"
            )
    elif tokens_k != tokens:
        raise ValueError(f"key must have query's {tokens} tokens without cu_seqlens_k, got {tokens_k}")
    window = _check_options(query, heads, relative_bias, causal, window, softcap, dropout_p)
    _check_factors(query, (tokens, heads, 1), "(Tq, Hq, 1)", temperature, scale)
    return {
        "query": query,
        "key": key,
        "value": value,
        "cu_seqlens_q": cu_seqlens_q,
        "cu_seqlens_k": cu_seqlens_k,
        "relative_bias": relative_bias,
        "temperature": temperature,
        "scale": scale,
        "causal": causal,
        "window": window,
        "softcap": softcap,
        "dropout_p": dropout_p,
    }


def _shape(x: Tensor) -> tuple[int, ...]:
    return tuple(x.shape)


def _check_inputs(
    query: Tensor, key: Tensor, value: Tensor, heads: int, kv_heads: int
) -> tuple[Tensor, Tensor, Tensor]:
    """query, key and value, in autocast's dtype under autocast."""
    common.check_float("query", query)
    device, dtype = query.device, query.dtype
    if torch.is_autocast_enabled(device.type):
        query, key, value = (_autocast(x) for x in (query, key, value))
        dtype = query.dtype
    if key.dtype != dtype or value.dtype != dtype:
        name, x = ("key", key) if key.dtype != dtype else ("value", value)
        raise TypeError(f"{name} must have query's dtype {dtype}, got {x.dtype}")
    if key.device != device or value.device != device:
        common.check_device("key", key, query, "query")
        common.check_device("value", value, query, "query")
    dim, dim_v = query.shape[-1], value.shape[-1]
    if dim % 8 != 0 or not 8 <= dim <= 256:
        raise ValueError(f"query's head dim must be a multiple of 8 from 8 to 256, got {dim}")
    if dim_v % 8 != 0 or not 8 <= dim_v <= 256:
        raise ValueError(f"value's head dim must be a multiple of 8 from 8 to 256, got {dim_v}")
    if (heads != kv_heads and kv_heads == 0) or (kv_heads != 0 and heads % kv_heads != 0):
        raise ValueError(f"query's heads must be a multiple of key's {kv_heads}, got {heads}")
    return query, key, value


def _autocast(x: Tensor) -> Tensor:
    """Custom operators are no autocast operators: what is float32 is cast here."""
    return x.to(torch.get_autocast_dtype(x.device.type)) if x.dtype == torch.float32 else x


def _check_bool(name: str, x: object, query: Tensor) -> None:
    if not isinstance(x, Tensor):
        raise TypeError(f"{name} must be a bool tensor, got {type(x).__name__}")
    if x.dtype != torch.bool:
        raise TypeError(f"{name} must be bool, got {x.dtype}")
    common.check_device(name, x, query, "query")


def _check_float(name: str, x: object, query: Tensor) -> None:
    if not isinstance(x, Tensor):
        raise TypeError(f"{name} must be a floating-point tensor, got {type(x).__name__}")
    common.check_float(name, x)
    common.check_device(name, x, query, "query")


def _check_broadcast(name: str, x: Tensor, shape: Sequence[int], what: str) -> None:
    sizes = x.shape
    if len(sizes) <= len(shape) and all(
        n == 1 or n == wanted for n, wanted in zip(sizes, shape[len(shape) - len(sizes) :], strict=True)
    ):
        return
    raise ValueError(f"{name} must be broadcastable to {what} = {tuple(shape)}, got {_shape(x)}")


def _check_factors(
    query: Tensor, shape: Sequence[int], what: str, temperature: float | Tensor, scale: float | Tensor | None
) -> None:
    if isinstance(temperature, Tensor):
        _check_float("temperature", temperature, query)
        _check_broadcast("temperature", temperature, shape, what)
    elif not isinstance(temperature, (int, float)):
        raise TypeError(f"temperature must be a number or a tensor, got {type(temperature).__name__}")
    elif not 0 < temperature < math.inf:
        raise ValueError(f"temperature must be > 0 and finite, got {temperature}")
    if isinstance(scale, Tensor):
        _check_float("scale", scale, query)
        _check_broadcast("scale", scale, shape, what)
    elif scale is not None:
        if not isinstance(scale, (int, float)):
            raise TypeError(f"scale must be a number, a tensor or None, got {type(scale).__name__}")
        if not -math.inf < scale < math.inf:
            raise ValueError(f"scale must be finite, got {scale}")


def _check_options(
    query: Tensor,
    heads: int,
    relative_bias: Tensor | None,
    causal: bool,
    window: tuple[int, int] | None,
    softcap: float | None,
    dropout_p: float,
) -> tuple[int, int] | None:
    """The window as a tuple, or None if it has no bound."""
    if relative_bias is not None:
        _check_float("relative_bias", relative_bias, query)
        if relative_bias.ndim != 2 or relative_bias.shape[0] != heads or relative_bias.shape[1] % 2 != 1:
            raise ValueError(f"relative_bias must have shape (Hq, 2R + 1), Hq = {heads}, got {_shape(relative_bias)}")
    common.check_flag("causal", causal)
    if softcap is not None and (not isinstance(softcap, (int, float)) or not 0 < softcap < math.inf):
        raise ValueError(f"softcap must be None or a number > 0, got {softcap!r}")
    if not isinstance(dropout_p, (int, float)) or not 0 <= dropout_p <= 1:
        raise ValueError(f"dropout_p must be a number in [0, 1], got {dropout_p!r}")
    if window is None:
        return None
    if (
        not isinstance(window, (tuple, list))
        or len(window) != 2
        or not all(isinstance(side, int) and side >= -1 for side in window)
    ):
        raise ValueError(f"window must be None or (left, right), integers ≥ -1, got {window!r}")
    return None if window[0] == window[1] == -1 else (window[0], window[1])
