"""One table: every operator's signature and fake. C++ kernels attach by name and are compared with it on import.

A size or a count is a SymInt: declared as int, each new value would compile anew.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

POOL_MODES = ("cls", "lasttoken", "max", "mean", "mean_sqrt_len_tokens", "weightedmean", "sum")  # csrc/params.h


def _pool_forward(
    hidden: Tensor,
    lengths: Tensor | None,
    mask: Tensor | None,
    cu_seqlens: Tensor | None,
    skip: Tensor | None,
    spans: Tensor | None,
    modes: list[int],
    out_channels: int,
    normalize: bool,
    eps: float,
) -> tuple[Tensor, Tensor, Tensor]:
    if spans is not None:
        segments = spans.shape[0]
    elif cu_seqlens is not None:
        segments = cu_seqlens.shape[0] - 1
    else:
        segments = hidden.shape[0]
    with_argmax = segments if POOL_MODES.index("max") in modes else 0
    return (
        hidden.new_empty((segments, out_channels)),
        hidden.new_empty((segments, out_channels), dtype=torch.float32),
        hidden.new_empty((with_argmax, out_channels), dtype=torch.int32),
    )


def _pool_backward(d_out: Tensor, pooled: Tensor, argmax: Tensor, shape: list[int], *_: Any) -> Tensor:
    return d_out.new_empty(shape)


def memory_order(strides: Sequence[int]) -> list[int]:
    """The dims before the last from the outermost to the innermost in memory, then the last."""
    return [*sorted(range(len(strides) - 1), key=lambda dim: -strides[dim]), len(strides) - 1]


def _empty_in_order_of(like: Tensor, last: int) -> Tensor:
    order = memory_order(like.stride())
    sizes = [*like.shape[:-1], last]
    inverse = sorted(range(len(order)), key=order.__getitem__)
    return like.new_empty([sizes[dim] for dim in order]).permute(inverse)


def _attention_forward(query: Tensor, key: Tensor, value: Tensor, *_: Any) -> tuple[Tensor, Tensor]:
    return (
        _empty_in_order_of(query, value.shape[-1]),
        query.new_empty(query.shape[:-1], dtype=torch.float32),
    )


def _attention_backward(
    d_out: Tensor,
    d_lse: Tensor | None,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    key_lengths: Tensor | None,
    key_mask: Tensor | None,
    cu_seqlens_q: Tensor | None,
    cu_seqlens_k: Tensor | None,
    mask: Tensor | None,
    bias: Tensor | None,
    relative_bias: Tensor | None,
    temperature: Tensor | None,
    temperature_number: float,
    scale: Tensor | None,
    scale_number: float,
    causal: bool,
    window_left: int,
    window_right: int,
    softcap: float,
    dropout_p: float,
    seed: Tensor | None,
    *needs: bool,
) -> tuple[Tensor, ...]:
    inputs = [_empty_in_order_of(x, x.shape[-1]) if need else x.new_empty((0,)) for x, need in
              zip((query, key, value), needs, strict=False)]  # fmt: skip
    others = [
        query.new_empty(x.shape if need and x is not None else (0,), dtype=torch.float32)
        for x, need in zip((bias, relative_bias, temperature, scale), needs[3:], strict=True)
    ]
    return (*inputs, *others)


_ATTENTION_OPTIONS = (
    "Tensor? key_lengths, Tensor? key_mask, Tensor? cu_seqlens_q, Tensor? cu_seqlens_k, Tensor? mask, Tensor? bias, "
    "Tensor? relative_bias, Tensor? temperature, float temperature_number, Tensor? scale, float scale_number, "
    "bool causal, SymInt window_left, SymInt window_right, float softcap, float dropout_p, Tensor? seed"
)


def _info_nce(
    queries: Tensor,
    documents: Tensor,
    negatives: Tensor | None,
    positives: Tensor | None,
    targets: Tensor | None,
    temperature: Tensor,
    query_labels: Tensor | None,
    document_labels: Tensor | None,
    same_positive: bool,
    label_smoothing: float,
    cosine: bool,
    metrics: bool,
    d_loss: Tensor | None,
    d_queries: bool,
    d_documents: bool,
    d_negatives: bool,
    d_positives: bool,
    d_temperature: bool,
) -> tuple[Tensor, ...]:
    n, dim = queries.shape
    k = 0 if negatives is None else negatives.shape[1]
    wanted = (
        (True, (n,)),
        (metrics, (n, 4)),
        (d_queries, (n, dim)),
        (d_documents, (documents.shape[0], (dim + 15) // 16 * 16)),
        (d_negatives, (n, k, dim)),
        (d_positives, (n, dim)),
        (d_temperature, (n,)),
    )
    return tuple(queries.new_empty(shape if wants else (0,), dtype=torch.float32) for wants, shape in wanted)


OPERATORS: dict[str, tuple[str, Callable[..., Any]]] = {
    "pool_forward": (
        "(Tensor hidden, Tensor? lengths, Tensor? mask, Tensor? cu_seqlens, Tensor? skip, Tensor? spans, int[] modes, "
        "SymInt out_channels, bool normalize, float eps) -> (Tensor out, Tensor pooled, Tensor argmax)",
        _pool_forward,
    ),
    "pool_backward": (
        "(Tensor d_out, Tensor pooled, Tensor argmax, SymInt[] shape, Tensor? lengths, Tensor? mask, "
        "Tensor? cu_seqlens, Tensor? skip, Tensor? spans, int[] modes, SymInt out_channels, bool normalize, "
        "float eps) -> Tensor",
        _pool_backward,
    ),
    # padded (B, H, L, D) or, with cu_seqlens, packed (T, H, D); bias, relative_bias, temperature and scale float32,
    # the last two or their numbers; window_left or _right -1: no bound, softcap 0: none, seed () int64 for dropout
    "attention_forward": (
        f"(Tensor query, Tensor key, Tensor value, {_ATTENTION_OPTIONS}) -> (Tensor out, Tensor lse)",
        _attention_forward,
    ),
    # a gradient that isn't needed is empty
    "attention_backward": (
        f"(Tensor d_out, Tensor? d_lse, Tensor query, Tensor key, Tensor value, {_ATTENTION_OPTIONS}, bool need_query, "
        "bool need_key, bool need_value, bool need_bias, bool need_relative_bias, bool need_temperature, "
        "bool need_scale) -> (Tensor d_query, Tensor d_key, Tensor d_value, Tensor d_bias, Tensor d_relative_bias, "
        "Tensor d_temperature, Tensor d_scale)",
        _attention_backward,
    ),
    # Gradients of Σ d_loss · loss, float32; those not wanted are empty. d_documents has its rows rounded up to 16.
    "info_nce": (
        "(Tensor queries, Tensor documents, Tensor? negatives, Tensor? positives, Tensor? targets, Tensor temperature, "
        "Tensor? query_labels, Tensor? document_labels, bool same_positive, float label_smoothing, bool cosine, "
        "bool metrics, Tensor? d_loss, bool d_queries, bool d_documents, bool d_negatives, bool d_positives, "
        "bool d_temperature) -> (Tensor loss, Tensor metrics, Tensor d_queries, Tensor d_documents, "
        "Tensor d_negatives, Tensor d_positives, Tensor d_temperature)",
        _info_nce,
    ),
}


def check_kernels(
    kernels: Iterable[tuple[str, str]], operators: Mapping[str, tuple[str, Callable[..., Any]]] = OPERATORS
) -> None:
    """Raise if a C++ kernel's types differ from its row. torch itself compares only the number of arguments."""
    for name, signature in kernels:
        schema = torch._C.parse_schema(name + operators[name][0])
        arguments = [str(argument.type) for argument in schema.arguments]
        row = " ".join([*arguments, "->", *(str(result.type) for result in schema.returns)])
        if signature.strip() != row:
            raise TypeError(f"{name}: schema.py says {row!r}, C++ {signature.strip()!r}")


_library = torch.library.Library("embedkern", "DEF")  # the operators live as long as this object


def _define(name: str, signature: str, fake: Callable[..., Any]) -> None:
    _library.define(name + signature, tags=(torch.Tag.pt2_compliant_tag,))
    torch.library.register_fake(f"embedkern::{name}", fake, lib=_library)


for _name, (_signature, _fake) in OPERATORS.items():
    _define(_name, _signature, _fake)


def twin(name: str, backend: str, kernel: Callable[..., Any], device: str) -> Any:
    """The operator `name`_`backend` of the same row, which runs a Python function: for backends that have no C++."""
    _define(f"{name}_{backend}", *OPERATORS[name])
    _library.impl(f"{name}_{backend}", kernel, device.upper())
    return getattr(torch.ops.embedkern, f"{name}_{backend}").default


OPS = torch.ops.embedkern
