"""info_nce: what is wrong with a call."""

from __future__ import annotations

from collections.abc import Collection, Sequence
from typing import Any

import torch
from torch import Tensor

from . import common

DIRECTIONS = ("query_to_doc", "query_to_query", "doc_to_query", "doc_to_doc")
HARDNESS = ("in_batch_negatives", "hard_negatives", "all_negatives")  # csrc/params.h, after none


def check(
    queries: Tensor,
    documents: Tensor,
    negatives: Tensor | None,
    positives: Tensor | None,
    targets: Tensor | None,
    temperature: float | Tensor,
    similarity: str,
    directions: Sequence[str],
    partition_mode: str,
    query_labels: Tensor | None,
    document_labels: Tensor | None,
    same_label: str,
    guide_queries: Tensor | None,
    guide_documents: Tensor | None,
    margin: float,
    margin_strategy: str,
    weights: Tensor | None,
    negative_weights: Tensor | None,
    hardness_mode: str | None,
    hardness_strength: float,
    label_smoothing: float,
    matryoshka_dims: Sequence[int] | None,
    matryoshka_weights: Sequence[float] | None,
    reduction: str,
    return_metrics: bool,
    group: Any,
) -> dict[str, Any]:
    """The reference's arguments, or an error that names what is wrong."""
    common.check_tensor("queries", queries, 2, "(N, D)")
    common.check_float("queries", queries)
    rows, dim = queries.shape
    if dim < 1:
        raise ValueError(f"queries must have D ≥ 1, got {tuple(queries.shape)}")
    _check_vectors("documents", documents, "(M, D)", (None, dim), queries)
    columns = documents.shape[0]
    if columns < 1:
        raise ValueError(f"documents must have M ≥ 1, got {tuple(documents.shape)}")
    if negatives is not None:
        _check_vectors("negatives", negatives, "(N, K, D)", (rows, None, dim), queries)
    if positives is not None:
        _check_vectors("positives", positives, "(N, D)", (rows, dim), queries)
    if targets is not None:
        common.check_integers("targets", targets, (rows,), queries, "queries")
    elif columns < rows:
        raise ValueError(f"documents must be at least as many as queries without targets, got {columns} for {rows}")

    if isinstance(temperature, Tensor):
        common.check_float("temperature", temperature)
        if temperature.ndim != 0:
            common.check_shape("temperature", temperature, (rows,))
        common.check_device("temperature", temperature, queries, "queries")
    else:
        common.check_number("temperature", temperature, "a number or a tensor")
        if not temperature > 0:
            raise ValueError(f"temperature must be > 0, got {temperature}")
    common.check_choice("similarity", similarity, ("cosine", "dot"))
    common.check_choice("same_label", same_label, ("ignore", "positive"))
    common.check_choice("reduction", reduction, ("mean", "sum", "none"))
    if (query_labels is None) != (document_labels is None):
        alone = "document_labels" if query_labels is None else "query_labels"
        raise ValueError(f"query_labels and document_labels belong together, got only {alone}")
    if query_labels is not None:
        common.check_integers("query_labels", query_labels, (rows,), queries, "queries")
        common.check_integers("document_labels", document_labels, (columns,), queries, "queries")
    if weights is not None:
        common.check_tensor("weights", weights, 1, "(N,)")
        common.check_float("weights", weights)
        common.check_shape("weights", weights, (rows,))
        common.check_device("weights", weights, queries, "queries")
    common.check_number("label_smoothing", label_smoothing)
    if not 0 <= label_smoothing <= 1:
        raise ValueError(f"label_smoothing must be in [0, 1], got {label_smoothing}")

    _check_directions(directions, partition_mode)
    common.check_choice("margin_strategy", margin_strategy, ("absolute", "relative"))
    common.check_number("margin", margin)
    if margin != margin:
        raise ValueError(f"margin must be a number, got {margin}")
    if hardness_mode is not None:
        common.check_choice("hardness_mode", hardness_mode, HARDNESS)
    common.check_number("hardness_strength", hardness_strength)
    if not hardness_strength >= 0:
        raise ValueError(f"hardness_strength must be ≥ 0, got {hardness_strength}")
    if (guide_queries is None) != (guide_documents is None):
        alone = "guide_documents" if guide_queries is None else "guide_queries"
        raise ValueError(f"guide_queries and guide_documents belong together, got only {alone}")
    if guide_queries is not None and guide_documents is not None:
        _check_vectors("guide_queries", guide_queries, "(N, G)", (rows, None), queries)
        _check_vectors("guide_documents", guide_documents, "(M, G)", (columns, guide_queries.shape[1]), queries)
        if guide_queries.shape[1] < 1:
            raise ValueError(f"guide_queries must have G ≥ 1, got {tuple(guide_queries.shape)}")
    if negative_weights is not None:
        _check_negative_weights(negative_weights, columns, negatives, queries)
    _check_matryoshka(matryoshka_dims, matryoshka_weights, dim)
    common.check_flag("return_metrics", return_metrics)
    return {
        "queries": queries,
        "documents": documents,
        "negatives": negatives,
        "positives": positives,
        "targets": targets,
        "temperature": temperature,
        "similarity": similarity,
        "directions": tuple(directions),
        "partition_mode": partition_mode,
        "query_labels": query_labels,
        "document_labels": document_labels,
        "same_label": same_label,
        "guide_queries": guide_queries,
        "guide_documents": guide_documents,
        "margin": margin,
        "margin_strategy": margin_strategy,
        "weights": weights,
        "negative_weights": negative_weights,
        "hardness_mode": hardness_mode,
        "hardness_strength": hardness_strength,
        "label_smoothing": label_smoothing,
        "matryoshka_dims": matryoshka_dims,
        "matryoshka_weights": matryoshka_weights,
        "reduction": reduction,
        "return_metrics": return_metrics,
        "group": group,
    }


def _check_vectors(name: str, x: Tensor, what: str, shape: tuple[int | None, ...], queries: Tensor) -> None:
    """`shape`: None where any size will do."""
    common.check_tensor(name, x, len(shape), what)
    common.check_float(name, x)
    common.check_shape(name, x, [got if wanted is None else wanted for got, wanted in zip(x.shape, shape, strict=True)])
    common.check_device(name, x, queries, "queries")


def _check_directions(directions: Sequence[str], partition_mode: str) -> None:
    if isinstance(directions, str) or not isinstance(directions, Collection) or not directions:
        raise ValueError(f"directions must be a tuple of some of {DIRECTIONS}, got {directions!r}")
    for each in directions:
        common.check_choice("directions", each, DIRECTIONS)
    if "query_to_doc" not in directions:
        raise ValueError(f"directions must hold 'query_to_doc', the positive pair's, got {tuple(directions)}")
    if len(set(directions)) < len(directions):
        raise ValueError(f"directions must differ, got {tuple(directions)}")
    common.check_choice("partition_mode", partition_mode, ("joint", "per_direction"))
    if partition_mode == "per_direction" and {"query_to_query", "doc_to_doc"} & set(directions):
        raise ValueError(
            "partition_mode 'per_direction' needs the positive pair in every direction, which query_to_query and "
            f"doc_to_doc don't have, got {tuple(directions)}"
        )


def _check_negative_weights(weights: object, columns: int, negatives: Tensor | None, queries: Tensor) -> None:
    if not isinstance(weights, Tensor):
        raise TypeError(f"negative_weights must be a tensor (M,) or (N, K), got {type(weights).__name__}")
    common.check_float("negative_weights", weights)
    if weights.ndim == 2 and negatives is None:
        raise ValueError(f"negative_weights (N, K) need negatives, got shape {tuple(weights.shape)} without")
    wanted = negatives.shape[:2] if weights.ndim == 2 and negatives is not None else (columns,)
    common.check_shape("negative_weights", weights, wanted)
    common.check_device("negative_weights", weights, queries, "queries")
    if weights.requires_grad and torch.is_grad_enabled():
        raise NotImplementedError("info_nce: negative_weights get no gradient; detach them")


def _check_matryoshka(dims: Sequence[int] | None, weights: Sequence[float] | None, dim: int) -> None:
    if dims is None:
        if weights is not None:
            raise ValueError("matryoshka_weights need matryoshka_dims, got only matryoshka_weights")
        return
    _check_several("matryoshka_dims", dims)
    if not dims:
        raise ValueError("matryoshka_dims must hold at least one, got none")
    for each in dims:
        common.check_integer("matryoshka_dims", each, "integers")
        if not 1 <= each <= dim:
            raise ValueError(f"matryoshka_dims must be in [1, {dim}], got {each}")
    if weights is None:
        return
    _check_several("matryoshka_weights", weights)
    if len(weights) != len(dims):
        raise ValueError(f"matryoshka_weights must be as many as matryoshka_dims, got {len(weights)} for {len(dims)}")
    for factor in weights:
        common.check_number("matryoshka_weights", factor, "numbers")


def _check_several(name: str, x: object) -> None:
    if isinstance(x, str) or not isinstance(x, Collection):
        raise TypeError(f"{name} must be a tuple or list, got {type(x).__name__}")
