"""info_nce: checks, the choice of a backend, gradients."""

from __future__ import annotations

import inspect
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from .. import dispatch, distributed
from ..backends import native, triton
from ..dispatch import Backend
from ..reference import infonce as reference
from ..reference.infonce import METRICS
from . import common
from .infonce_check import HARDNESS, check

BACKENDS = (triton.INFONCE, native.INFONCE, Backend("reference"))


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
            Values are checked on the CPU, and clamped on a GPU, as negative weights are.
        temperature: τ, a number or a tensor () or (N,), which gets its gradient.
        similarity: "cosine" (normalised here, x / max(‖x‖₂, 1e-12)) or "dot".
        directions: what row i's softmax holds besides "query_to_doc": "query_to_query" (the other queries),
            "doc_to_query" (its positive against all queries), "doc_to_doc" (its positive against all documents but its
            own query's: its positive, or with column blocks that column of each).
        partition_mode: "joint", one softmax over the directions; "per_direction", the mean of one loss each
            (query_to_doc and doc_to_query).
        query_labels, document_labels: (N,) and (M,) int32 or int64; what pairs with equal labels other than the
            positive are is said by `same_label`: "ignore" leaves them out of the denominator, "positive" makes them
            positives too (the row's loss is the mean over its positives). `negatives` are not touched.
        guide_queries, guide_documents: (N, G) and (M, G), another model's: what they find more similar than the
            positive pair (g > g_ii - margin, or g_ii - |g_ii|·margin with margin_strategy "relative") leaves the row's
            denominator, in every direction (GISTEmbed, Solatorio 2024). Duplicates of the positive tie and stay.
        weights: (N,), scale rows; "mean" is then the weighted mean.
        negative_weights: (M,) or (N, K), ≥ 0, multiply the exponentials of documents or `negatives` as negatives. They
            get no gradient.
        hardness_mode, hardness_strength: "in_batch_negatives", "hard_negatives" (the query's own) or "all_negatives"
            of query_to_doc have their similarity, detached, times this strength added to the logit.
        label_smoothing: this share of the target is spread over the row's visible columns.
        matryoshka_dims, matryoshka_weights: the loss is the weighted sum over these prefixes, each normalised anew.
        reduction: "mean", "sum" or "none" (N,).
        return_metrics: also a dict of detached tensors: accuracy (share of rows in which nothing beats the positive),
            positive_similarity and negative_similarity (means), of query_to_doc and the longest prefix.
        group: a torch.distributed process group. Every rank's documents are seen, "mean" and "sum" are those of the
            concatenated batch on each rank, and gradients are those of that loss by this rank's inputs.

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
    call = _gathered(call)
    if torch.is_grad_enabled() and any(isinstance(x, Tensor) and x.requires_grad for x in call.values()):
        result = InfoNCEFunction.apply(*common.distinct(call.values()), chosen)
    else:
        row_loss, metrics, _ = _run(chosen, call)
        loss = distributed.reduce(row_loss, weights, reduction, group)
        result = (loss, *reference.mean_metrics(metrics, group).values()) if return_metrics else loss
    return (result[0], dict(zip(METRICS, result[1:], strict=True))) if return_metrics else result


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
        arguments = (
            queries, documents, negatives, positives, targets, temperature, similarity, directions, partition_mode,
            query_labels, document_labels, same_label, guide_queries, guide_documents, margin, margin_strategy, weights,
            negative_weights, hardness_mode, hardness_strength, label_smoothing, matryoshka_dims, matryoshka_weights,
            reduction, return_metrics, group,
        )  # fmt: skip
        call = dict(zip(ARGUMENTS, arguments, strict=False))
        if not isinstance(backend, Backend):  # used alone: nobody has checked yet
            check(*arguments)
            backend = dispatch.select("info_nce", BACKENDS, backend, call)
        ctx.backend, ctx.call = backend, call
        ctx.composed = backend.forward is None or (group is not None and not isinstance(group, distributed.Gathered))
        if ctx.composed:
            result = _composed(backend, **call)
            return (result[0], *result[1].values()) if return_metrics else result
        tensors = {name: x for name, x in call.items() if isinstance(x, Tensor)}
        ctx.call = {name: x for name, x in call.items() if name not in tensors}
        # A scalar's gradients are made now, in three products instead of four; they stay float32 until the upstream
        # factor arrives, which float16 under a GradScaler needs.
        d_row_loss = None if reduction == "none" else _d_row_loss(call)
        row_loss, metrics, gradients = _run(backend, call, d_row_loss, () if d_row_loss is None else _needs(ctx))
        ctx.names = tuple(tensors), tuple(gradients)
        ctx.save_for_backward(row_loss, *tensors.values(), *gradients.values())
        ranks = None if group is None else group.group
        loss = distributed.reduce(row_loss, weights, reduction, ranks)
        if not return_metrics:
            return loss
        means = reference.mean_metrics(metrics, ranks).values()
        ctx.mark_non_differentiable(*means)
        return loss, *means

    @staticmethod
    def backward(ctx: Any, d_loss: Tensor, *_: Any) -> Any:
        needs = _needs(ctx)
        if ctx.composed:
            call = {**ctx.call, "return_metrics": False}
            found = common.reference_gradients(
                lambda *values: _composed(ctx.backend, **dict(zip(call, values, strict=True))),
                tuple(call.values()), [name in needs for name in call], (d_loss,),
            )  # fmt: skip
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
        spent = ctx.call["reduction"] == "none" or common.last_backward()
        gradients = {name: _as_input(made[name], name, tensors[name], factor, spent) for name in made}
        if "weights" in needs:
            d_weights = _d_weights(row_loss, tensors["weights"], call["reduction"], call["group"]) * d_loss
            gradients["weights"] = d_weights.to(tensors["weights"].dtype)
        in_order = [gradients.get(name) for name in ARGUMENTS]
        return common.first_derivatives("info_nce", *in_order)


ARGUMENTS = tuple(inspect.signature(InfoNCEFunction.forward).parameters)[1:]
TRACKED = ("queries", "documents", "negatives", "positives", "temperature", "weights")


def _needs(ctx: Any) -> tuple[str, ...]:
    """The inputs that need a gradient; `apply` may have been given fewer arguments than there are."""
    return tuple(name for name, need in zip(ARGUMENTS, ctx.needs_input_grad, strict=False) if need and name in TRACKED)


def _composed(backend: Backend, **call: Any) -> Any:
    """The result by functions that are differentiable themselves: the reference, or what gathers before the kernel."""
    return reference.info_nce(**call) if backend.forward is None else info_nce(**call, backend=backend.name)


def _gathered(call: dict[str, Any]) -> dict[str, Any]:
    """With a group, the call on the batch of all ranks."""
    if call["group"] is None:
        return call
    names = ("queries", "documents", "targets", "query_labels", "document_labels", "guide_queries", "guide_documents",
             "negative_weights")  # fmt: skip
    batch = distributed.gather_batch(**{name: call[name] for name in (*names, "directions", "group")})
    gathered = distributed.Gathered(call["group"], batch.offset, batch.period)
    return {**call, **{name: getattr(batch, name) for name in names}, "group": gathered}


def _run(
    backend: Backend, call: dict[str, Any], d_row_loss: Tensor | None = None, needs: Sequence[str] = ()
) -> tuple[Tensor, Tensor, dict[str, Tensor]]:
    """Each row's loss and metrics, and the gradients of Σ d_row_loss · row_loss that are needed, in float32."""
    dim, dims = call["queries"].shape[1], call["matryoshka_dims"]
    if dims is None:
        return _run_prefix(backend, call, dim, d_row_loss, needs, {dim: 1.0})
    levels: dict[int, float] = {}
    for size, factor in zip(*reference.prefixes(dims, call["matryoshka_weights"], dim), strict=True):
        levels[size] = levels.get(size, 0.0) + factor
    longest = max(levels)
    row_loss, metrics, gradients = torch.zeros(()), torch.zeros(()), {}
    for part in [levels] if _in_one_pass(call, levels) else [{size: factor} for size, factor in levels.items()]:
        size = max(part)
        loss, of_rows, found = _run_prefix(backend, call, size, d_row_loss, needs, part)
        row_loss, metrics = row_loss + loss, of_rows if size == longest else metrics
        for name, d in found.items():
            if name not in gradients:
                gradients[name] = d.new_zeros((*d.shape[:-1], dim) if name in VECTORS else d.shape)
            into = gradients[name][..., :size] if name in VECTORS else gradients[name]
            into += d[..., :size] if name in VECTORS else d
    return row_loss, metrics, gradients


def _in_one_pass(call: dict[str, Any], levels: dict[int, float]) -> bool:
    """Does the kernel take these prefixes together? Else they are calls of their own."""
    several_targets = call["label_smoothing"] or (call["query_labels"] is not None and call["same_label"] == "positive")
    options = ("negatives", "positives", "negative_weights", "hardness_mode")
    simple = call["directions"] == ("query_to_doc",) and all(call[name] is None for name in options)
    whole = all(size % 16 == 0 for size in levels if size < max(levels)) and 1 < len(levels) <= 8
    return bool(simple and whole and not several_targets and not call["return_metrics"])


VECTORS = ("queries", "documents", "negatives", "positives")


def _run_prefix(
    backend: Backend,
    call: dict[str, Any],
    dim: int,
    d_row_loss: Tensor | None,
    needs: Sequence[str],
    levels: dict[int, float],
) -> tuple[Tensor, Tensor, dict[str, Tensor]]:
    """The same of the vectors' first dimensions and the prefixes of these, each with its weight."""
    prefixes = sorted(levels) if len(levels) > 1 else []
    factor = 1.0 if prefixes else levels[dim]
    d_row_loss = d_row_loss if d_row_loss is None or factor == 1 else d_row_loss * factor
    queries, documents, negatives, positives = (
        x if x is None or x.shape[-1] == dim else x[..., :dim] for x in (call[name] for name in VECTORS)
    )
    tau, directions, group = call["temperature"], call["directions"], call["group"]
    if not isinstance(tau, Tensor):
        tau = torch.full((), tau, dtype=torch.float32, device=queries.device)
    tau = tau.float()
    if group is not None:
        rows, offset, period = call["targets"].shape[0], group.offset, group.period
    else:
        rows, offset, period = queries.shape[0], 0, documents.shape[0]
        asked = "doc_to_doc" in directions or call["hardness_mode"] is not None
        if asked and call["targets"] is None and rows > 0 and period % rows == 0:  # column blocks
            period = rows
    hardness = 0 if call["hardness_mode"] is None else 1 + HARDNESS.index(call["hardness_mode"])
    guides = (None if x is None else x.float() if x.dtype == torch.float64 else x
              for x in (call["guide_queries"], call["guide_documents"]))  # fmt: skip
    weights = call["negative_weights"]
    weights = None if weights is None else weights.float()
    names = (*VECTORS, "temperature")
    row_loss, metrics, d_queries, d_columns, *gradients = backend.forward(
        queries, documents, negatives, positives, call["targets"], rows, offset, period, tau, call["query_labels"],
        call["document_labels"], call["same_label"] == "positive", *guides, float(call["margin"]),
        call["margin_strategy"] == "relative", weights if weights is not None and weights.ndim == 1 else None,
        weights if weights is not None and weights.ndim == 2 else None, hardness if call["hardness_strength"] else 0,
        float(call["hardness_strength"]), float(call["label_smoothing"]), call["similarity"] == "cosine",
        *(name in directions for name in ("query_to_query", "doc_to_query", "doc_to_doc")),
        call["partition_mode"] == "per_direction", prefixes, [float(levels[size]) for size in prefixes],
        call["return_metrics"], d_row_loss,
        *(name in needs for name in names),
    )  # fmt: skip
    if "queries" in needs and any(name.endswith("query") for name in directions):
        d_columns = d_columns[:, :dim]
        d_columns[offset : offset + rows] += d_queries
        d_queries = d_columns
    row_loss = row_loss if factor == 1 else row_loss * factor
    return row_loss, metrics, {name: d for name, d in zip(names, (d_queries, *gradients), strict=True) if name in needs}


def _as_input(gradient: Tensor, name: str, x: Tensor, factor: Tensor | float, spent: bool) -> Tensor:
    """A gradient as its input wants it: of its shape and dtype, in the same memory if nobody asks for it again."""
    if name == "temperature" and x.ndim == 0:
        gradient = gradient.sum()
    if name == "documents":  # rows are padded
        gradient = gradient[:, : x.shape[1]]
    return (gradient.mul_(factor) if spent else gradient * factor).to(x.dtype)


def _d_row_loss(call: dict[str, Any]) -> Tensor:
    """The derivative of "mean" or "sum" by each row's loss."""
    weights, group = call["weights"], call["group"]
    if weights is None:
        rows = call["queries"].shape[0] if group is None else call["targets"].shape[0]
        weights = torch.ones(rows, device=call["queries"].device)
    weights = weights.float()
    if call["reduction"] == "sum":
        return weights
    given = None if call["weights"] is None else weights
    return weights / distributed.total(weights, given, None if group is None else group.group)


def _d_weights(row_loss: Tensor, weights: Tensor, reduction: str, group: distributed.Gathered | None) -> Tensor:
    if reduction != "mean":
        return row_loss
    weights, ranks = weights.float(), None if group is None else group.group
    total = distributed.all_sum(weights.sum(), ranks)
    loss = distributed.reduce(row_loss, weights, "mean", ranks)
    return torch.where(total == 0, row_loss, (row_loss - loss) / torch.where(total == 0, 1, total))
