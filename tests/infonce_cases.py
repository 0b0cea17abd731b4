"""Calls of info_nce and their judgement: pairs of options against the float64 reference. For the tests of the loss."""

from __future__ import annotations

import itertools
import random
from typing import Any

import torch
from accuracy import assert_accurate
from torch import Tensor

import embedkern as ek

TRACKED = ("queries", "documents", "negatives", "positives", "temperature", "weights")

FACTORS: dict[str, tuple[Any, ...]] = {
    "rows": (1, 7, 65, 130, 513),
    "more_documents": (0, 3, 200, -1),  # -1: fewer than rows, with targets
    "dim": (1, 3, 32, 100, 384),
    "dtype": (torch.float32, torch.bfloat16, torch.float16),
    "similarity": ("cosine", "dot"),
    "reduction": ("mean", "sum", "none"),
    "temperature": ("number", "scalar", "rows"),
    "targets": (False, True),
    "negatives": (0, 1, 4),
    "positives": (False, True),
    "labels": (None, "ignore", "positive"),
    "weights": (False, True),
    "label_smoothing": (0.0, 0.1),
    "directions": (
        (("query_to_doc",), "joint"),
        (("query_to_doc", "query_to_query"), "joint"),
        (("query_to_doc", "doc_to_query"), "per_direction"),
        (("doc_to_doc", "query_to_doc"), "joint"),
        (("query_to_doc", "query_to_query", "doc_to_query", "doc_to_doc"), "joint"),
    ),
    "guide": (None, ("absolute", 0.0), ("relative", 0.3)),
    "negative_weights": (None, "documents", "negatives"),
    "hardness_mode": (None, "in_batch_negatives", "hard_negatives", "all_negatives"),
    "matryoshka": (False, True),
    "frozen": ((), ("documents",), ("queries",), ("queries", "documents")),
    "strided": (False, True),
}


def pairwise(factors: dict[str, tuple[Any, ...]] = FACTORS) -> list[dict[str, Any]]:
    """Few cases in which every two values of two factors meet."""
    draw = random.Random(0)
    values = [(name, value) for name, all_values in factors.items() for value in all_values]
    missing = {pair: None for pair in itertools.combinations(values, 2) if pair[0][0] != pair[1][0]}  # a set in order
    cases = []
    while missing:
        start = dict(draw.choice(list(missing)))
        tried = [{name: start.get(name, draw.choice(choices)) for name, choices in factors.items()} for _ in range(60)]
        found = [[pair for pair in itertools.combinations(case.items(), 2) if pair in missing] for case in tried]
        best = max(range(len(tried)), key=lambda i: len(found[i]))
        missing = {pair: None for pair in missing if pair not in set(found[best])}
        cases.append(tried[best])
    return cases


def build(case: dict[str, Any], device: str = "cpu") -> tuple[dict[str, Any], dict[str, Any]]:
    """The tensors, and the options that are none."""
    rows, dim = case["rows"], case["dim"]
    columns = max(1, rows - 3) if case["more_documents"] < 0 else rows + case["more_documents"]

    def vectors(*shape: int) -> Tensor:
        if case["strided"]:  # rows apart by more than their length, in reverse memory order for negatives
            wide = torch.randn(*shape[:-1], shape[-1] + 5)[..., 2 : 2 + shape[-1]]
            return wide.transpose(0, 1).contiguous().transpose(0, 1) if len(shape) == 3 else wide
        return torch.randn(*shape)

    tensors: dict[str, Any] = {"queries": vectors(rows, dim), "documents": vectors(columns, dim)}
    if case["negatives"]:
        tensors["negatives"] = vectors(rows, case["negatives"], dim)
    if case["positives"]:
        tensors["positives"] = vectors(rows, dim)
    tensors = {name: _with_dtype(x, case["dtype"]) for name, x in tensors.items()}
    if case["targets"] or columns < rows:
        tensors["targets"] = torch.randint(columns, (rows,))
    if case["weights"]:
        tensors["weights"] = torch.rand(rows)
    if case["labels"]:
        tensors["query_labels"] = torch.randint(-2, 3, (rows,)) << 33
        tensors["document_labels"] = torch.randint(-2, 3, (columns,)) << 33
    if case["guide"]:
        guide = torch.randn(columns, 5)
        tensors["guide_queries"] = (guide.repeat(rows // columns + 1, 1)[:rows] + torch.randn(rows, 5)).half()
        tensors["guide_documents"] = guide
    if case["negative_weights"]:
        own = case["negative_weights"] == "negatives" and "negatives" in tensors
        weights = torch.rand(tensors["negatives"].shape[:2] if own else (columns,))
        tensors["negative_weights"] = torch.where(weights < 0.2, 0, weights)
    tau = 0.3 * (dim**0.5 if case["similarity"] == "dot" else 1)
    if case["temperature"] != "number":
        tensors["temperature"] = torch.tensor(tau) if case["temperature"] == "scalar" else tau + torch.rand(rows)
    options = {name: case[name] for name in ("similarity", "reduction", "label_smoothing")}
    options["same_label"] = case["labels"] or "ignore"
    options["directions"], options["partition_mode"] = case["directions"]
    if case["guide"]:
        options["margin_strategy"], options["margin"] = case["guide"]
    options |= {"hardness_mode": case["hardness_mode"], "hardness_strength": 2 / dim if tau > 0.3 else 2.0}
    if case["matryoshka"]:
        options |= {"matryoshka_dims": (max(1, dim // 3), dim, max(1, dim // 2)), "matryoshka_weights": (2.0, 1.0, 0.5)}
    if case["temperature"] == "number":
        options["temperature"] = tau
    return {name: _with_dtype(x, x.dtype, device) for name, x in tensors.items()}, options


def _with_dtype(x: Tensor, dtype: torch.dtype, device: str = "cpu") -> Tensor:
    """x.to(device, dtype) with x's strides."""
    return torch.empty_strided(x.shape, x.stride(), dtype=dtype, device=device).copy_(x)


def results(
    tensors: dict[str, Any], options: dict[str, Any], frozen: tuple[str, ...], backend: str | None, wide: bool = False
) -> dict[str, Tensor]:
    """The loss and each gradient, for an upstream gradient that differs from row to row."""
    leaves = {}
    for name, x in tensors.items():
        x = x.double() if wide and x.is_floating_point() else x.detach()
        leaves[name] = x.requires_grad_(name in TRACKED and name not in frozen)
    loss = ek.info_nce(**leaves, **options, backend=backend)
    wanted = [name for name, x in leaves.items() if x.requires_grad]
    upstream = torch.linspace(-1, 1.5, max(loss.numel(), 2), dtype=torch.float64, device=loss.device)
    upstream = upstream[: loss.numel()].reshape(loss.shape)
    if not wanted:
        return {"loss": loss}
    gradients = torch.autograd.grad(loss, [leaves[name] for name in wanted], upstream.to(loss.dtype))
    return {"loss": loss.detach(), **dict(zip(wanted, gradients, strict=True))}


VECTORS = ("queries", "documents", "negatives", "positives")


def worst_of_torch(
    tensors: dict[str, Any], options: dict[str, Any], frozen: tuple[str, ...], exact: dict[str, Tensor]
) -> dict[str, Tensor]:
    """Torch's results with the largest error among three orders of the dimensions: one alone may be exact by chance."""
    dim = tensors["queries"].shape[-1]
    prefixes = sorted({0, dim, *options.get("matryoshka_dims", ())})  # each keeps its dimensions
    parts = [torch.arange(begin, end) for begin, end in itertools.pairwise(prefixes)]
    runs = []
    for shuffle in (lambda x: x, lambda x: x.flip(0), lambda x: x[torch.randperm(len(x))]):
        order = torch.cat([shuffle(part) for part in parts]).to(tensors["queries"].device)
        shuffled = {name: x[..., order] if name in VECTORS else x for name, x in tensors.items()}
        found = results(shuffled, options, frozen, "reference")
        runs.append({name: x[..., order.argsort()] if name in VECTORS else x for name, x in found.items()})
    return {name: max((run[name] for run in runs), key=lambda x: (x - exact[name]).abs().max()) for name in exact}


def check(tensors: dict[str, Any], options: dict[str, Any], frozen: tuple[str, ...] = (), times: float = 1) -> None:
    """The default backend against the reference in float64, judged by torch's own error, of which `times` the usual.

    τ's gradient sums N·M terms of both signs, and a loss N terms: 16 roundings of their size are allowed as well.
    """
    ours = results(tensors, options, frozen, None)
    exact = results(tensors, options, frozen, "reference", wide=True)
    torchs = worst_of_torch(tensors, options, frozen, exact)
    assert ours.keys() == exact.keys()
    for name in ours:
        factor = times * (2 if name == "loss" else 3)
        if name not in VECTORS:
            error, allowed = ((x[name].double() - exact[name]).abs().max() for x in (ours, torchs))
            scale = exact[name].abs().max()
            if name == "temperature" and tensors["temperature"].ndim == 0:
                rows = {**tensors, "temperature": tensors["temperature"].expand(tensors["queries"].shape[0])}
                scale = results(rows, options, frozen, "reference", wide=True)["temperature"].abs().sum()
            assert error <= factor * allowed + 16 * 1.2e-7 * scale + 1e-7, f"{name}: error {error}, torch's {allowed}"
        elif options.get("similarity") != "dot" and tensors[name].shape[-1] == 1:
            assert ((ours[name] * tensors[name]).abs() < 1e-5).all(), f"{name}: {ours[name]}, but 0 is exact"
        else:
            assert_accurate(ours[name], exact[name], torchs[name], factor, name)
