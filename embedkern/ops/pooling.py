"""pool: checks, the choice of a backend, gradients."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from .. import dispatch
from ..backends import native
from ..dispatch import Backend
from ..reference import pooling as reference
from ..schema import POOL_MODES
from . import common

BACKENDS = (native.POOLING_CUDA, native.POOLING, Backend("reference"))


def pool(
    hidden: Tensor,
    mode: str | Sequence[str] = "mean",
    *,
    lengths: Tensor | None = None,
    mask: Tensor | None = None,
    cu_seqlens: Tensor | None = None,
    skip: int | Tensor | None = None,
    spans: Tensor | None = None,
    truncate_dim: int | None = None,
    normalize: bool = False,
    eps: float = 1e-12,
    backend: str | None = None,
) -> Tensor:
    """Pool the token vectors of each sequence into one vector.

    Args:
        hidden: (B, L, C), or (T, C) packed with `cu_seqlens`; float32, bfloat16, float16 (float64: reference).
        mode: "cls", "lasttoken", "max", "mean", "mean_sqrt_len_tokens", "weightedmean" (weights 1…n, the rank among
            the sequence's real tokens; Muennighoff 2022) or "sum"; several are concatenated.
        lengths: (B,) int32 or int64, the real tokens stand first.
        mask: (B, L) bool or 0/1 integers, any pattern.
        cu_seqlens: (B + 1,) int32 or int64, offsets of a packed batch.
        skip: the first `skip` real tokens of each sequence are left out (an instruction); an int or (B,).
        spans: (S, 2) int32 or int64, [start, end) rows of `hidden.view(-1, C)` to pool instead of whole sequences
            (late chunking, Günther et al. 2024); any order, may overlap; padding inside is left out.
        truncate_dim: keep the first columns of the concatenation.
        normalize: divide by max(‖x‖₂, eps), after truncation.

    Returns:
        (B, C'), with spans (S, C'), in hidden's dtype; accumulated in float32. Nothing to pool gives zeros.
        Padding, what is skipped and what lies outside every span is never read.

    On a GPU the values in lengths, cu_seqlens, skip and spans are clamped, not checked: a check would wait for the GPU.
    Nothing is read or written out of bounds whatever they are. (backend="reference" checks.)

    Raises:
        ValueError, TypeError: an argument has a wrong rank, size, dtype, device or (on a CPU) value.
        NotImplementedError: the backend asked for can't run this call; second derivatives (use "reference").
    """
    call = check(hidden, mode, lengths, mask, cu_seqlens, skip, spans, truncate_dim, normalize, eps)
    chosen = dispatch.select("pool", BACKENDS, backend, call)
    if chosen.forward is None:
        return reference.pool(**call)
    return PoolFunction.apply(*call.values(), chosen)


def check(
    hidden: Tensor,
    mode: str | Sequence[str],
    lengths: Tensor | None,
    mask: Tensor | None,
    cu_seqlens: Tensor | None,
    skip: int | Tensor | None,
    spans: Tensor | None,
    truncate_dim: int | None,
    normalize: bool,
    eps: float,
) -> dict[str, Any]:
    """The reference's arguments, or an error that names what is wrong."""
    common.check_tensor("hidden", hidden, (2, 3), "(B, L, C), or (T, C) with cu_seqlens or spans")
    common.check_float("hidden", hidden)
    if not isinstance(mode, Sequence):
        raise TypeError(f"mode must be one of {POOL_MODES} or a tuple of them, got {type(mode).__name__}")
    modes = (mode,) if isinstance(mode, str) else tuple(mode)
    if not modes:
        raise ValueError("mode must name at least one mode, got none")
    for each in modes:
        common.check_choice("mode", each, POOL_MODES)

    if sum(x is not None for x in (lengths, mask, cu_seqlens)) > 1:
        given = [n for n, x in (("lengths", lengths), ("mask", mask), ("cu_seqlens", cu_seqlens)) if x is not None]
        raise ValueError(f"lengths, mask and cu_seqlens exclude each other, got {' and '.join(given)}")
    packed = hidden.ndim == 2
    if packed and cu_seqlens is None and spans is None:
        raise ValueError(f"hidden (T, C) of shape {tuple(hidden.shape)} needs cu_seqlens or spans")
    if packed and (lengths is not None or mask is not None):
        raise ValueError(f"lengths and mask need hidden (B, L, C), got {tuple(hidden.shape)}")
    if cu_seqlens is not None:
        if not packed:
            raise ValueError(f"cu_seqlens needs hidden (T, C), got {tuple(hidden.shape)}")
        common.check_cu_seqlens("cu_seqlens", cu_seqlens, hidden, "hidden")
    if lengths is not None:
        common.check_integers("lengths", lengths, hidden.shape[:1], hidden, "hidden")
    if mask is not None:
        mask = _bool_mask(mask, hidden)

    if spans is not None:
        common.check_tensor("spans", spans, 2, "(S, 2)")
        common.check_integers("spans", spans, (spans.shape[0], 2), hidden, "hidden")
        if skip is not None:
            raise ValueError("skip and spans exclude each other")
        if lengths is not None:  # spans may cross sequences: what is padding has to be known for each row
            mask = torch.arange(hidden.shape[1], device=hidden.device) < lengths[:, None]
            lengths = None
    sequences = hidden.shape[0] if cu_seqlens is None else cu_seqlens.shape[0] - 1
    if isinstance(skip, int):
        if skip < 0:
            raise ValueError(f"skip must be ≥ 0, got {skip}")
        skip = torch.full((sequences,), skip, device=hidden.device) if skip else None
    elif skip is not None:
        common.check_integers("skip", skip, (sequences,), hidden, "hidden")

    out_channels = len(modes) * hidden.shape[-1]
    if truncate_dim is not None:
        common.check_integer("truncate_dim", truncate_dim)
        if not 1 <= truncate_dim <= out_channels:
            raise ValueError(f"truncate_dim must be in [1, {out_channels}], got {truncate_dim}")
        out_channels = truncate_dim
    common.check_flag("normalize", normalize)
    common.check_number("eps", eps)
    if not eps >= 0:
        raise ValueError(f"eps must be ≥ 0, got {eps}")
    return {
        "hidden": hidden,
        "modes": modes,
        "lengths": lengths,
        "mask": mask,
        "cu_seqlens": cu_seqlens,
        "skip": skip,
        "spans": spans,
        "out_channels": out_channels,
        "normalize": normalize,
        "eps": eps,
    }


def _bool_mask(mask: Tensor, hidden: Tensor) -> Tensor:
    common.check_tensor("mask", mask, 2, "(B, L)")
    if mask.dtype.is_floating_point or mask.dtype.is_complex:
        raise TypeError(f"mask must be bool or 0/1 integers, got {mask.dtype}")
    if hidden.ndim == 3:
        common.check_shape("mask", mask, hidden.shape[:2])
    common.check_device("mask", mask, hidden, "hidden")
    return mask if mask.dtype == torch.bool else mask != 0


class PoolFunction(torch.autograd.Function):
    """`pool` for trainers that compose Functions: `apply` takes all its arguments in their order."""

    @staticmethod
    def forward(
        ctx: Any,
        hidden: Tensor,
        mode: str | Sequence[str] = "mean",
        lengths: Tensor | None = None,
        mask: Tensor | None = None,
        cu_seqlens: Tensor | None = None,
        skip: int | Tensor | None = None,
        spans: Tensor | None = None,
        truncate_dim: int | None = None,
        normalize: bool = False,
        eps: float = 1e-12,
        backend: str | Backend | None = None,
    ) -> Tensor:
        if not isinstance(backend, Backend):  # else the public function has checked: these are what `check` returns
            call = check(hidden, mode, lengths, mask, cu_seqlens, skip, spans, truncate_dim, normalize, eps)
            backend = dispatch.select("pool", BACKENDS, backend, call)
            if backend.forward is None:
                ctx.backend, ctx.call = backend, call
                return reference.pool(**call)
            hidden, mode, lengths, mask, cu_seqlens, skip, spans, truncate_dim, normalize, eps = call.values()
        ctx.backend = backend
        places = lengths, mask, cu_seqlens, skip, spans
        ctx.options = [POOL_MODES.index(each) for each in mode], truncate_dim, normalize, eps
        out, pooled, argmax = backend.forward(hidden, *places, *ctx.options)
        ctx.shape = hidden.shape
        ctx.save_for_backward(pooled, argmax, *places)
        return out

    @staticmethod
    def backward(ctx: Any, d_out: Tensor) -> Any:
        if not ctx.needs_input_grad[0]:
            return (None,) * 11
        if ctx.backend.forward is None:
            arguments = tuple(ctx.call.values())
            needed = (True, *(False for _ in arguments[1:]))
            return (common.reference_gradients(reference.pool, arguments, needed, (d_out,))[0], *(None,) * 10)
        pooled, argmax, *places = ctx.saved_tensors
        d_hidden = ctx.backend.backward(d_out, pooled, argmax, ctx.shape, *places, *ctx.options)
        return (*common.first_derivatives("pool", d_hidden), *(None,) * 10)
