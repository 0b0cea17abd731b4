"""The contrastive loss against torch, plain and compiled, and against sentence-transformers' cached loss."""

from __future__ import annotations

import subprocess
import sys
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from ..ops.infonce import info_nce
from ..ops.infonce_check import DIRECTIONS
from .harness import Row, interleave, keep_freed_memory, share_of_peak, versus

ROWS, DIM, TAU = 8192, 384, 0.05
ROUNDS = 3
PREFIXES = (384, 320, 256, 192, 128, 64)


def plain(queries: Tensor, documents: Tensor) -> Tensor:
    scores = F.normalize(queries) @ F.normalize(documents).T / TAU
    return F.cross_entropy(scores, torch.arange(len(queries)))


def panels(queries: Tensor, documents: Tensor) -> tuple[Tensor, Tensor]:
    """The gradients by a Python loop over 512 queries at a time: torch's way to do without the whole matrix."""
    q, d = F.normalize(queries), F.normalize(documents)
    d_unit = d.detach().requires_grad_()
    d_queries: list[Any] = []
    for begin in range(0, len(q), 512):
        part = q[begin : begin + 512].detach().requires_grad_()
        targets = torch.arange(begin, begin + len(part))
        loss = F.cross_entropy(part @ d_unit.T / TAU, targets, reduction="sum") / len(q)
        loss.backward()
        d_queries.append(part.grad)
    gradients = torch.autograd.grad((q, d), (queries, documents), (torch.cat(d_queries), d_unit.grad))
    return gradients[0], gradients[1]


def cached(queries: Tensor, documents: Tensor, mini_batch_size: int) -> Callable[[], object]:
    """The loss stage of sentence-transformers' cached loss, on embeddings that are there already."""
    from sentence_transformers.sentence_transformer.losses import CachedMultipleNegativesRankingLoss

    model: Any = torch.nn.Sequential(torch.nn.Identity())  # never run
    loss = CachedMultipleNegativesRankingLoss(model, scale=1 / TAU, mini_batch_size=mini_batch_size)

    def run() -> None:
        reps = [[part.detach().requires_grad_() for part in x.split(mini_batch_size)] for x in (queries, documents)]
        loss.calculate_loss(reps, with_backward=True)

    return run


def step(loss: Callable[[], Any], inputs: Sequence[Tensor]) -> Callable[[], object]:
    return lambda: torch.autograd.grad(loss(), inputs)


def rows() -> Iterator[Row]:
    q, d = (torch.randn(ROWS, DIM, requires_grad=True) for _ in range(2))
    work = f"N=M={ROWS} D={DIM} float32, forward + backward"
    ours = step(lambda: info_nce(q, d, temperature=TAU), (q, d))
    torchs = step(lambda: plain(q, d), (q, d))
    yield versus("infonce", work, ours, torchs, "torch, glibc's defaults", "≥ 1.8", ROUNDS)
    yield from _memory()

    keep_freed_memory()
    kept = work + ", freed memory kept"
    compiled_loss = torch.compile(plain)
    compiled = step(lambda: compiled_loss(q, d), (q, d))
    yield versus("infonce", kept, ours, torchs, "torch", "≥ 1.05", ROUNDS)
    yield versus("infonce", kept, ours, compiled, "torch.compile", "≥ 1.05", ROUNDS)
    yield versus("infonce", kept, ours, lambda: panels(q, d), "torch in panels of 512 queries", "≥ 1.1", ROUNDS)
    flops = 6 * ROWS * ROWS * DIM
    yield share_of_peak("infonce", kept, ours, flops, "GEMM peak, three products", "≥ 0.9", ROUNDS)
    for size, name, goal in ((32, "defaults", "≥ 8"), (256, "mini_batch_size=256", "≥ 1.8")):
        against = f"sentence-transformers' cached loss stage, {name}"
        yield versus("infonce", kept, ours, cached(q, d, size), against, goal, rounds=2)
    yield from _options(q, d, ours, kept)


def _options(q: Tensor, d: Tensor, plain_call: Callable[[], object], work: str) -> Iterator[Row]:
    labels = torch.randint(ROWS // 2, (ROWS,))
    negatives, guide = torch.randn(ROWS, 5, DIM, requires_grad=True), torch.randn(ROWS, DIM)
    forward = torch.no_grad()(lambda: info_nce(q, d, temperature=TAU))
    tau = torch.tensor(TAU, requires_grad=True)
    bf16 = [x.detach().bfloat16().requires_grad_() for x in (q, d)]
    calls: dict[str, tuple[Callable[[], object], str]] = {
        "frozen documents": (step(lambda: info_nce(q, d.detach(), temperature=TAU), (q,)), "≤ 0.75"),
        "forward only": (forward, "≤ 0.45"),
        "labels": (
            step(lambda: info_nce(q, d, temperature=TAU, query_labels=labels, document_labels=labels), (q, d)),
            "≤ 1.1",
        ),
        "5 negatives a query": (
            step(lambda: info_nce(q, d, temperature=TAU, negatives=negatives), (q, d, negatives)),
            "≤ 1.1",
        ),
        "guide (G = D)": (
            step(lambda: info_nce(q, d, temperature=TAU, guide_queries=guide, guide_documents=guide), (q, d)),
            "≤ 1.6",
        ),
        "Matryoshka, 6 prefixes": (
            step(lambda: info_nce(q, d, temperature=TAU, matryoshka_dims=PREFIXES), (q, d)),
            "≤ 1.35",
        ),
        "four directions": (step(lambda: info_nce(q, d, temperature=TAU, directions=DIRECTIONS), (q, d)), "≤ 3"),
        "learnable temperature": (step(lambda: info_nce(q, d, temperature=tau), (q, d, tau)), "≤ 1.03"),
        "bfloat16 inputs": (step(lambda: info_nce(*bf16, temperature=TAU), bf16), "≤ 0.5 with bf16 products"),
    }
    for name, (call, goal) in calls.items():
        seconds = interleave({"plain": plain_call, "call": call}, ROUNDS)
        a, b = min(seconds["call"]), min(seconds["plain"])
        yield Row("infonce", f"{work}: {name}", "the plain call (time, not speed)", a * 1e3, b * 1e3, a / b, goal)


def _memory() -> Iterator[Row]:
    """What a step adds to the resident set at its peak, gradients included, each in a process of its own."""
    code = """
import sys, torch
from embedkern.bench import infonce
name, n, dim = sys.argv[1], int(sys.argv[2]), int(sys.argv[3])
q, d = (torch.randn(n, dim, requires_grad=True) for _ in range(2))
function = infonce.plain if name == "torch" else lambda q, d: infonce.info_nce(q, d, temperature=infonce.TAU)
function(q[:64], d[:64]).backward()
q.grad = d.grad = None
def status(field):
    return next(int(line.split()[1]) for line in open("/proc/self/status") if line.startswith(field)) / 1024
open("/proc/self/clear_refs", "w").write("5")
before = status("VmRSS")
function(q, d).backward()
print(status("VmHWM") - before)
"""
    n, dim = 16384, 384
    ours, torchs = (
        float(subprocess.check_output([sys.executable, "-c", code, name, str(n), str(dim)]))
        for name in ("ours", "torch")
    )
    work = f"peak memory above the inputs, N=M={n} D={dim}"
    yield Row("infonce", work, "torch", ours, torchs, torchs / ours, "ours < 250 MB", "MiB")
