"""info_nce: checks, the choice of a backend, gradients."""

from __future__ import annotations

import inspect
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from .. import dispatch
from ..backends import native
from ..dispatch import Backend
from ..reference import infonce as reference
from . import common

BACKENDS = (native.INFONCE, Backend("reference"))

DIRECTIONS = ("query_to_doc", "query_to_query", "doc_to_query", "doc_to_doc")


def info_nce(
    queries: Tensor,
    documents: Tensor,
    *,
    negatives: Tensor | None = None,
    positives: Tensor | None = None,
    targets: Tensor | None = None,
    temperature: float | Tensor = 0.05,
    similarity: str = "cosine",
    directions: Sequence[str] = ("query_to_doc",),
    partition_mode: str = "joint",
    query_labels: Tensor | None = None,
    document_labels: Tensor | None = None,
    same_label: str = "ignore",
    guide_queries: Tensor | None = None,
    guide_documents: Tensor | None = None,
    margin: float = 0.0,
    margin_strategy: str = "absolute",
    weights: Tensor | None = None,
    negative_weights: Tensor | None = None,
    hardness_mode: str | None = None,
    hardness_strength: float = 0.0,
    label_smoothing: float = 0.0,
    matryoshka_dims: Sequence[int] | None = None,
    matryoshka_weights: Sequence[float] | None = None,
    reduction: str = "mean",
    return_metrics: bool = False,
    group: Any = None,
    backend: str | None = None,
) -> Tensor | tuple[Tensor, dict[str, Tensor]]:
    """The contrastive loss with in-batch negatives (InfoNCE, van den Oord et al. 2018), without the N×M matrix.

    Row i's loss is logsumexp over the visible columns j of z_ij, less its positive's z: z_ij = sim(q_i, d_j) / τ_i.

    Args:
        queries: (N, D); float32, bfloat16, float16 (float64: reference).
        documents: (M, D); may be column blocks [positives | negatives 1 | …], as sentence-transformers lays them out.
        negatives: (N, K, D), hard negatives that only their own query sees.
        positives: (N, D), stand at the positive's column instead of the document there.
        targets: (N,) int32 or int64, row i's positive is documents[targets[i]]; without them documents[i] (M ≥ N).
            Values are checked on the CPU.
        temperature: τ, a number or a tensor () or (N,), which gets its gradient.
        similarity: "cosine" (normalised here, x / max(‖x‖₂, 1e-12)) or "dot".
        query_labels, document_labels: (N,) and (M,) int32 or int64; what pairs with equal labels other than the
            positive are is said by `same_label`: "ignore" leaves them out of the denominator, "positive" makes them
            positives too (the row's loss is the mean over its positives). `negatives` are not touched.
        weights: (N,), scale rows; "mean" is then the weighted mean.
        label_smoothing: this share of the target is spread over the row's visible columns.
        reduction: "mean", "sum" or "none" (N,).
        return_metrics: also a dict of detached tensors: accuracy (share of rows in which nothing beats the positive),
            positive_similarity and negative_similarity (means).
        directions, partition_mode, guide_queries, guide_documents, margin, margin_strategy, negative_weights,
            hardness_mode, hardness_strength, matryoshka_dims, matryoshka_weights, group: not ready, anything but the
            default raises NotImplementedError.

    Returns:
        The loss, float32 (float64 for float64 inputs), also under autocast. A row with nothing but its positive in the
        denominator has loss 0 and zero gradients.

    Raises:
        ValueError, TypeError: an argument has a wrong rank, size, dtype, device or value.
        NotImplementedError: the backend asked for can't run this call; second derivatives (use "reference").
    """
    arguments = (
        queries, documents, negatives, positives, targets, temperature, similarity, directions, partition_mode,
        query_labels, document_labels, same_label, guide_queries, guide_documents, margin, margin_strategy, weights,
        negative_weights, hardness_mode, hardness_strength, label_smoothing, matryoshka_dims, matryoshka_weights,
        reduction, return_metrics, group,
    )  # fmt: skip
    call = check(*arguments)
    chosen = dispatch.select("info_nce", BACKENDS, backend, call)
    if chosen.forward is None:
        return reference.info_nce(**call)
    inputs = (queries, documents, negatives, positives, temperature, weights)
    if torch.is_grad_enabled() and any(isinstance(x, Tensor) and x.requires_grad for x in inputs):
        result = InfoNCEFunction.apply(*common.distinct(arguments), chosen)
    else:
        row_loss, metrics, _ = _run(chosen, call)
        loss = reference.reduce(row_loss, weights, reduction)
        result = (loss, *_mean_metrics(metrics)) if return_metrics else loss
    return (result[0], dict(zip(METRICS, result[1:], strict=True))) if return_metrics else result


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
    elif isinstance(temperature, bool) or not isinstance(temperature, (int, float, torch.SymFloat, torch.SymInt)):
        raise TypeError(f"temperature must be a number or a tensor, got {type(temperature).__name__}")
    elif not temperature > 0:
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
    if not 0 <= label_smoothing <= 1:
        raise ValueError(f"label_smoothing must be in [0, 1], got {label_smoothing}")

    _check_later_options(directions, partition_mode, margin_strategy, hardness_mode, hardness_strength)
    later = {
        "directions beyond query_to_doc": tuple(directions) != ("query_to_doc",),
        "partition_mode='per_direction'": partition_mode != "joint",
        "guide_queries and guide_documents": guide_queries is not None or guide_documents is not None,
        "negative_weights": negative_weights is not None,
        "hardness_mode": hardness_mode is not None,
        "matryoshka_dims": matryoshka_dims is not None or matryoshka_weights is not None,
        "group": group is not None,
    }
    if any(later.values()):
        wanted = ", ".join(name for name, given in later.items() if given)
        raise NotImplementedError(f"info_nce: not ready yet: {wanted}")
    return {
        "queries": queries,
        "documents": documents,
        "negatives": negatives,
        "positives": positives,
        "targets": targets,
        "temperature": temperature,
        "similarity": similarity,
        "query_labels": query_labels,
        "document_labels": document_labels,
        "same_label": same_label,
        "weights": weights,
        "label_smoothing": label_smoothing,
        "reduction": reduction,
        "return_metrics": return_metrics,
    }


def _check_vectors(name: str, x: Tensor, what: str, shape: tuple[int | None, ...], queries: Tensor) -> None:
    """`shape`: None where any size will do."""
    common.check_tensor(name, x, len(shape), what)
    common.check_float(name, x)
    common.check_shape(name, x, [got if wanted is None else wanted for got, wanted in zip(x.shape, shape, strict=True)])
    common.check_device(name, x, queries, "queries")


def _check_later_options(
    directions: Sequence[str], partition_mode: str, margin_strategy: str, hardness_mode: str | None, strength: float
) -> None:
    """The values of options that are not ready: a wrong one is a wrong one all the same."""
    if isinstance(directions, str) or not directions:
        raise ValueError(f"directions must be a tuple of some of {DIRECTIONS}, got {directions!r}")
    for each in directions:
        common.check_choice("directions", each, DIRECTIONS)
    if "query_to_doc" not in directions:
        raise ValueError(f"directions must hold 'query_to_doc', the positive pair's, got {tuple(directions)}")
    common.check_choice("partition_mode", partition_mode, ("joint", "per_direction"))
    common.check_choice("margin_strategy", margin_strategy, ("absolute", "relative"))
    if hardness_mode is not None:
        common.check_choice("hardness_mode", hardness_mode, ("in_batch_negatives", "hard_negatives", "all_negatives"))
    if not strength >= 0:
        raise ValueError(f"hardness_strength must be ≥ 0, got {strength}")


class InfoNCEFunction(torch.autograd.Function):
    """`info_nce` for trainers that compose Functions: `apply` takes all its arguments in their order.

    With return_metrics it returns (loss, accuracy, positive_similarity, negative_similarity).
    """

    @staticmethod
    def forward(
        ctx: Any,
        queries: Tensor,
        documents: Tensor,
        negatives: Tensor | None = None,
        positives: Tensor | None = None,
        targets: Tensor | None = None,
        temperature: float | Tensor = 0.05,
        similarity: str = "cosine",
        directions: Sequence[str] = ("query_to_doc",),
        partition_mode: str = "joint",
        query_labels: Tensor | None = None,
        document_labels: Tensor | None = None,
        same_label: str = "ignore",
        guide_queries: Tensor | None = None,
        guide_documents: Tensor | None = None,
        margin: float = 0.0,
        margin_strategy: str = "absolute",
        weights: Tensor | None = None,
        negative_weights: Tensor | None = None,
        hardness_mode: str | None = None,
        hardness_strength: float = 0.0,
        label_smoothing: float = 0.0,
        matryoshka_dims: Sequence[int] | None = None,
        matryoshka_weights: Sequence[float] | None = None,
        reduction: str = "mean",
        return_metrics: bool = False,
        group: Any = None,
        backend: str | Backend | None = None,
    ) -> Any:
        call = check(
            queries, documents, negatives, positives, targets, temperature, similarity, directions, partition_mode,
            query_labels, document_labels, same_label, guide_queries, guide_documents, margin, margin_strategy, weights,
            negative_weights, hardness_mode, hardness_strength, label_smoothing, matryoshka_dims, matryoshka_weights,
            reduction, return_metrics, group,
        )  # fmt: skip
        if not isinstance(backend, Backend):
            backend = dispatch.select("info_nce", BACKENDS, backend, call)
        ctx.backend, ctx.call = backend, call
        if backend.forward is None:
            result = reference.info_nce(**call)
            return (result[0], *result[1].values()) if return_metrics else result
        tensors = {name: x for name, x in call.items() if isinstance(x, Tensor)}
        ctx.call = {name: x for name, x in call.items() if name not in tensors}
        # A scalar's gradients are made now, in three products instead of four; they stay float32 until the upstream
        # factor arrives, which float16 under a GradScaler needs.
        d_row_loss = None if reduction == "none" else _d_row_loss(call)
        row_loss, metrics, gradients = _run(backend, call, d_row_loss, () if d_row_loss is None else _needs(ctx))
        ctx.names = tuple(tensors), tuple(gradients)
        ctx.save_for_backward(row_loss, *tensors.values(), *gradients.values())
        loss = reference.reduce(row_loss, weights, reduction)
        if not return_metrics:
            return loss
        means = _mean_metrics(metrics)
        ctx.mark_non_differentiable(*means)
        return loss, *means

    @staticmethod
    def backward(ctx: Any, d_loss: Tensor, *_: Any) -> Any:
        needs = _needs(ctx)
        if ctx.backend.forward is None:
            call = {**ctx.call, "return_metrics": False}
            found = common.reference_gradients(
                reference.info_nce, tuple(call.values()), [name in needs for name in call], (d_loss,)
            )
            gradients = dict(zip(call, found, strict=True))
            return tuple(gradients.get(name) for name in ARGUMENTS)
        row_loss, *saved = ctx.saved_tensors
        tensor_names, gradient_names = ctx.names
        tensors = dict(zip(tensor_names, saved, strict=False))
        call = {**ctx.call, **tensors}
        factor: Tensor | float
        if call["reduction"] == "none":
            weights = tensors.get("weights")
            d_row_loss = d_loss.float() if weights is None else d_loss.float() * weights.float()
            made, factor = _run(ctx.backend, {**call, "return_metrics": False}, d_row_loss, needs)[2], 1.0
        else:
            made, factor = dict(zip(gradient_names, saved[len(tensor_names) :], strict=True)), d_loss
        gradients = {name: _as_input(made[name], name, tensors[name], factor) for name in made}
        if "weights" in needs:
            d_weights = _d_weights(row_loss, tensors["weights"], call["reduction"]) * d_loss
            gradients["weights"] = d_weights.to(tensors["weights"].dtype)
        in_order = [gradients.get(name) for name in ARGUMENTS]
        return common.first_derivatives("info_nce", *in_order)


ARGUMENTS = tuple(inspect.signature(InfoNCEFunction.forward).parameters)[1:]
TRACKED = ("queries", "documents", "negatives", "positives", "temperature", "weights")


def _needs(ctx: Any) -> tuple[str, ...]:
    """The inputs that need a gradient; `apply` may have been given fewer arguments than there are."""
    return tuple(name for name, need in zip(ARGUMENTS, ctx.needs_input_grad, strict=False) if need and name in TRACKED)


def _run(
    backend: Backend, call: dict[str, Any], d_row_loss: Tensor | None = None, needs: Sequence[str] = ()
) -> tuple[Tensor, Tensor, dict[str, Tensor]]:
    """Each row's loss and metrics, and the gradients of Σ d_row_loss · row_loss that are needed, in float32."""
    tau = call["temperature"]
    tau = tau.float() if isinstance(tau, Tensor) else torch.full((), tau, device=call["queries"].device)
    names = ("queries", "documents", "negatives", "positives", "temperature")
    row_loss, metrics, *gradients = backend.forward(
        call["queries"], call["documents"], call.get("negatives"), call.get("positives"), call.get("targets"), tau,
        call.get("query_labels"), call.get("document_labels"), call["same_label"] == "positive",
        float(call["label_smoothing"]), call["similarity"] == "cosine", call["return_metrics"], d_row_loss,
        *(name in needs for name in names),
    )  # fmt: skip
    return row_loss, metrics, {name: d for name, d in zip(names, gradients, strict=True) if name in needs}


METRICS = ("accuracy", "positive_similarity", "negative_similarity")


def _mean_metrics(of_rows: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """From (N, 4): does nothing beat the positive, its similarity, the negatives' sum and number."""
    hits, positive, negative, count = of_rows.sum(0).unbind()
    rows = max(of_rows.shape[0], 1)
    return hits / rows, positive / rows, negative / count.clamp(min=1)


def _as_input(gradient: Tensor, name: str, x: Tensor, factor: Tensor | float) -> Tensor:
    """A gradient as its input wants it: of its shape and dtype."""
    if name == "temperature" and x.ndim == 0:
        gradient = gradient.sum()
    if name == "documents":  # rows are padded
        gradient = gradient[:, : x.shape[1]]
    return (gradient * factor).to(x.dtype)


def _d_row_loss(call: dict[str, Any]) -> Tensor:
    """The derivative of "mean" or "sum" by each row's loss."""
    rows, weights = call["queries"].shape[0], call["weights"]
    if weights is None:
        weights = torch.ones(rows, device=call["queries"].device)
        return weights if call["reduction"] == "sum" else weights / max(rows, 1)
    weights = weights.float()
    return weights if call["reduction"] == "sum" else weights / reference.total(weights)


def _d_weights(row_loss: Tensor, weights: Tensor, reduction: str) -> Tensor:
    if reduction != "mean":
        return row_loss
    weights = weights.float()
    loss = reference.reduce(row_loss, weights, "mean")
    return torch.where(weights.sum() == 0, row_loss, (row_loss - loss) / reference.total(weights))
