"""One table: every operator's signature and fake. C++ kernels attach by name and are compared with it on import.

A size or a count is a SymInt: declared as int, each new value would compile anew.
"""

from __future__ import annotations

import functools
import math
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
    order: list[int] = []
    for dim in range(len(strides) - 1):  # torch.compile can't trace sorted() with symbolic keys
        order.insert(len([other for other in order if strides[other] >= strides[dim]]), dim)
    return [*order, len(strides) - 1]


def _empty_in_order_of(like: Tensor, last: int) -> Tensor:
    order = memory_order(like.stride())
    sizes = [*like.shape[:-1], last]
    inverse = sorted(range(len(order)), key=order.__getitem__)
    return like.new_empty([sizes[dim] for dim in order]).permute(inverse)


def _attention_forward(query: Tensor, key: Tensor, value: Tensor, *_: Any) -> tuple[Tensor, Tensor, Tensor]:
    return (
        _empty_in_order_of(query, value.shape[-1]),
        query.new_empty(query.shape[:-1], dtype=torch.float32),
        query.new_empty((0,), dtype=torch.float32),
    )


def _attention_backward(
    d_out: Tensor,
    d_lse: Tensor | None,
    out: Tensor | None,
    statistics: Tensor | None,
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
    rows: int,
    *rest: Any,
) -> tuple[Tensor, ...]:
    n, dim = queries.shape
    query_to_query, doc_to_query = rest[16:18]
    metrics, _, d_queries, d_documents, d_negatives, d_positives, d_temperature = rest[22:]
    k, padded_dim = 0 if negatives is None else negatives.shape[1], (dim + 15) // 16 * 16
    wanted = (
        (True, (rows,)),
        (metrics, (rows, 4)),
        (d_queries, (rows, dim)),
        (d_queries and (query_to_query or doc_to_query), (n, padded_dim)),
        (d_documents, (documents.shape[0], padded_dim)),
        (d_negatives, (rows, k, dim)),
        (d_positives, (rows, dim)),
        (d_temperature, (rows,)),
    )
    return tuple(queries.new_empty(shape if wants else (0,), dtype=torch.float32) for wants, shape in wanted)


def _contrastive_distillation(
    student_queries: Tensor,
    student_documents: Tensor,
    teacher_queries: Tensor,
    teacher_documents: Tensor,
    temperature: Tensor,
    teacher_temperature: float,
    kl: bool,
    d_queries: bool,
    d_documents: bool,
) -> tuple[Tensor, ...]:
    shapes = (), student_queries.shape if d_queries else (0,), student_documents.shape if d_documents else (0,), ()
    like = (student_queries, student_documents, temperature)
    wide = torch.float64 if any(x.dtype == torch.float64 for x in like) else torch.float32
    return tuple(student_queries.new_empty(shape, dtype=wide) for shape in shapes)


def _sigmoid_loss(
    images: Tensor,
    texts: Tensor,
    logit_scale: Tensor,
    logit_bias: Tensor,
    offset: int,
    total: int,
    d_images: bool,
    d_texts: bool,
) -> tuple[Tensor, ...]:
    shapes = (), images.shape if d_images else (0,), texts.shape if d_texts else (0,), (), ()
    like = (images, texts, logit_scale, logit_bias)
    wide = torch.float64 if any(x.dtype == torch.float64 for x in like) else torch.float32
    return tuple(images.new_empty(shape, dtype=wide) for shape in shapes)


def absorbs(latents: Tensor, to_q: Tensor, num_heads: int) -> bool:
    """Whether a product of two projections over the latents is smaller than the projections: N < D."""
    return latents.shape[0] * num_heads < to_q.shape[0]


def _wide(x: Tensor) -> torch.dtype:
    return torch.float64 if x.dtype == torch.float64 else torch.float32


NARROW = {"cuda"}  # devices whose products of 16-bit numbers are fast and add up in float32


def computed(x: Tensor) -> torch.dtype:
    """What latent attention computes in: on a CPU products of low precision are slower and round more."""
    return x.dtype if x.device.type in NARROW else _wide(x)


def _empty(like: Tensor, shape: Sequence[int], dtype: torch.dtype) -> Tensor:
    return like.new_empty(shape, dtype=dtype)


def _latent_attention_forward(
    hidden: Tensor,
    lengths: Tensor | None,
    mask: Tensor | None,
    cu_seqlens: Tensor | None,
    skip: Tensor | None,
    weights: list[Tensor],
    num_heads: int,
    normalize: bool,
    eps: float,
    keep: bool,
) -> tuple[Tensor, ...]:
    latents, to_q, to_kv, inner, width = weights[0], weights[1], weights[2], weights[11].shape[0], hidden.shape[-1]
    batch = hidden.shape[0] if cu_seqlens is None else cu_seqlens.shape[0] - 1
    rows = math.prod(hidden.shape[:-1]) if keep else 0
    absorbed = (2, latents.shape[0] * num_heads, width) if absorbs(latents, to_q, num_heads) else (0,)
    shapes = ((batch, width), (batch, inner // 2), (rows, width), (latents.shape[0], to_kv.shape[0]), absorbed)
    dtypes = (_wide(hidden), _wide(hidden), *(computed(hidden),) * 3)
    pooled, gated, attended, kv, tables = map(functools.partial(_empty, hidden), shapes, dtypes)
    return hidden.new_empty((batch, width)), pooled, gated, attended, hidden.new_empty((rows, inner)), kv, tables


def _multi_layer_attention_forward(
    layers: Tensor,
    layer_embedding: Tensor,
    empty: Tensor | None,
    weights: list[Tensor],
    num_heads: int,
    normalize: bool,
    eps: float,
    keep: bool,
) -> tuple[Tensor, ...]:
    latents, to_q, to_kv, inner = weights[0], weights[1], weights[2], weights[11].shape[0]
    batch, count, width = layers.shape
    rows = batch * latents.shape[0] if keep else 0
    shapes: list[tuple[int, ...]] = [(batch, width), (batch, inner // 2), (rows, width)]
    shapes += [(latents.shape[0], to_q.shape[0]), (batch, count, to_kv.shape[0])]
    dtypes = (_wide(layers), _wide(layers), *(computed(layers),) * 3)
    pooled, gated, attended, q, kv = map(functools.partial(_empty, layers), shapes, dtypes)
    return layers.new_empty((batch, width)), pooled, gated, attended, layers.new_empty((rows, inner)), q, kv


def _needed(inputs: Sequence[Tensor], needs: Sequence[bool]) -> list[Tensor]:
    return [x.new_empty(x.shape if need else (0,)) for x, need in zip(inputs, needs, strict=True)]


def _latent_attention_backward(
    d_out: Tensor,
    hidden: Tensor,
    lengths: Tensor | None,
    mask: Tensor | None,
    cu_seqlens: Tensor | None,
    skip: Tensor | None,
    weights: list[Tensor],
    num_heads: int,
    normalize: bool,
    eps: float,
    saved: list[Tensor],
    needs: list[bool],
) -> list[Tensor]:
    return _needed([hidden, *weights], needs)


def _multi_layer_attention_backward(
    d_out: Tensor,
    layers: Tensor,
    layer_embedding: Tensor,
    empty: Tensor | None,
    weights: list[Tensor],
    num_heads: int,
    normalize: bool,
    eps: float,
    saved: list[Tensor],
    needs: list[bool],
) -> list[Tensor]:
    return _needed([layers, layer_embedding, *weights], needs)


_LATENT_OPTIONS = (
    "Tensor hidden, Tensor? lengths, Tensor? mask, Tensor? cu_seqlens, Tensor? skip, Tensor[] weights, "
    "SymInt num_heads, bool normalize, float eps"
)
_MULTI_LAYER_OPTIONS = (
    "Tensor layers, Tensor layer_embedding, Tensor? empty, Tensor[] weights, SymInt num_heads, bool normalize, "
    "float eps"
)

OPERATORS: dict[str, tuple[str, Callable[..., Any]]] = {
    # of a gated unit a · gelu(gate), u (rows, 2 · F) = [a, gate]: the sums of pieces of rows, which end at `ends`
    "gated_sums": ("(Tensor u, SymInt[] ends) -> Tensor", lambda u, ends: u.new_empty((len(ends), u.shape[1] // 2))),
    # d_g (B, F); sequences (rows,): each row's among them
    "gated_backward": (
        "(Tensor u, Tensor d_g, Tensor sequences) -> (Tensor d_u, Tensor d_bias)",
        lambda u, d_g, sequences: (u.new_empty(u.shape), u.new_empty((u.shape[1],))),
    ),
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
    # statistics: what backward takes with out where the kernel saves something for it, else empty
    "attention_forward": (
        f"(Tensor query, Tensor key, Tensor value, {_ATTENTION_OPTIONS}) -> "
        "(Tensor out, Tensor lse, Tensor statistics)",
        _attention_forward,
    ),
    # a gradient that isn't needed is empty
    "attention_backward": (
        "(Tensor d_out, Tensor? d_lse, Tensor? out, Tensor? statistics, Tensor query, Tensor key, Tensor value, "
        f"{_ATTENTION_OPTIONS}, bool need_query, bool need_key, bool need_value, bool need_bias, "
        "bool need_relative_bias, bool need_temperature, bool need_scale) -> (Tensor d_query, Tensor d_key, "
        "Tensor d_value, Tensor d_bias, Tensor d_relative_bias, Tensor d_temperature, Tensor d_scale)",
        _attention_backward,
    ),
    # The losses of `rows` queries from `offset` on. Gradients of Σ d_loss · loss, float32; those not wanted are empty.
    # d_query_columns and d_documents have their rows rounded up to 16. Prefixes ascend by multiples of 16 but for the
    # last, whole vectors; at most 8, of query_to_doc without negatives, positives, several targets, weights, metrics.
    "info_nce": (
        "(Tensor queries, Tensor documents, Tensor? negatives, Tensor? positives, Tensor? targets, SymInt rows, "
        "SymInt offset, SymInt period, Tensor temperature, Tensor? query_labels, Tensor? document_labels, "
        "bool same_positive, Tensor? guide_queries, Tensor? guide_documents, float margin, bool relative, "
        "Tensor? document_weights, Tensor? negative_weights, int hardness, float strength, float label_smoothing, "
        "bool cosine, bool query_to_query, bool doc_to_query, bool doc_to_doc, bool per_direction, SymInt[] prefixes, "
        "float[] prefix_weights, bool metrics, Tensor? d_loss, bool d_queries, bool d_documents, bool d_negatives, "
        "bool d_positives, bool d_temperature) -> "
        "(Tensor loss, Tensor metrics, Tensor d_queries, Tensor d_query_columns, Tensor d_documents, "
        "Tensor d_negatives, Tensor d_positives, Tensor d_temperature)",
        _info_nce,
    ),
}

# Implemented in Python, in backends/. A gradient that isn't needed is empty.
PYTHON_OPERATORS: dict[str, tuple[str, Callable[..., Any]]] = {
    # the loss and its gradients, float32
    "contrastive_distillation": (
        "(Tensor student_queries, Tensor student_documents, Tensor teacher_queries, Tensor teacher_documents, "
        "Tensor temperature, float teacher_temperature, bool kl, bool d_queries, bool d_documents) -> "
        "(Tensor loss, Tensor d_queries, Tensor d_documents, Tensor d_temperature)",
        _contrastive_distillation,
    ),
    # image i's text is text offset + i; the sum over pairs is divided by `total`
    "sigmoid_loss": (
        "(Tensor images, Tensor texts, Tensor logit_scale, Tensor logit_bias, SymInt offset, SymInt total, "
        "bool d_images, bool d_texts) -> "
        "(Tensor loss, Tensor d_images, Tensor d_texts, Tensor d_logit_scale, Tensor d_logit_bias)",
        _sigmoid_loss,
    ),
    # weights: a reference.latent_pooling.Block; without `keep`, attended and inner are empty
    "latent_attention_forward": (
        f"({_LATENT_OPTIONS}, bool keep) -> (Tensor out, Tensor pooled, Tensor gated, Tensor attended, Tensor inner, "
        "Tensor kv, Tensor tables)",
        _latent_attention_forward,
    ),
    "latent_attention_backward": (
        f"(Tensor d_out, {_LATENT_OPTIONS}, Tensor[] saved, bool[] needs) -> Tensor[]",
        _latent_attention_backward,
    ),
    "multi_layer_attention_forward": (
        f"({_MULTI_LAYER_OPTIONS}, bool keep) -> (Tensor out, Tensor pooled, Tensor gated, Tensor attended, "
        "Tensor inner, Tensor q, Tensor kv)",
        _multi_layer_attention_forward,
    ),
    "multi_layer_attention_backward": (
        f"(Tensor d_out, {_MULTI_LAYER_OPTIONS}, Tensor[] saved, bool[] needs) -> Tensor[]",
        _multi_layer_attention_backward,
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


for _name, (_signature, _fake) in (OPERATORS | PYTHON_OPERATORS).items():
    _define(_name, _signature, _fake)


def twin(name: str, backend: str, kernel: Callable[..., Any], device: str, fake: Callable[..., Any]) -> Any:
    """The operator `name`_`backend` of the same row, which runs a Python function: for backends that have no C++."""
    _define(f"{name}_{backend}", OPERATORS[name][0], fake)
    _library.impl(f"{name}_{backend}", kernel, device.upper())
    return getattr(torch.ops.embedkern, f"{name}_{backend}").default


OPS = torch.ops.embedkern


def implement(name: str, function: Callable[..., Any]) -> None:
    """Gives an operator its kernel in Python, for every device: what it calls doesn't see autocast."""

    def kernel(*arguments: Any) -> Any:
        device = next(x for x in arguments if isinstance(x, Tensor)).device.type
        with torch.no_grad(), torch.autocast(device, enabled=False):
            return function(*arguments)

    _library.impl(name, kernel, "CompositeExplicitAutograd")
