"""The contrastive loss at N = 80,000 with five hard negatives a query: minutes, so only where the suite is named."""

from __future__ import annotations

import subprocess
import sys
from collections.abc import Iterator

from .harness import Row, gemm_peak

ROWS, DIM, NEGATIVES = 80_000, 1024, 5


def rows() -> Iterator[Row]:
    code = """
import sys, time, torch
from embedkern.bench import infonce
n, dim, k = map(int, sys.argv[1:])
inputs = [torch.randn(*shape, requires_grad=True) for shape in ((n, dim), (n, dim), (n, k, dim))]
def step(q, d, negatives):
    infonce.info_nce(q, d, negatives=negatives, temperature=infonce.TAU).backward()
def status(field):
    return next(int(line.split()[1]) for line in open("/proc/self/status") if line.startswith(field)) / 1024
step(*(x[:64] for x in inputs))
for x in inputs:
    x.grad = None
open("/proc/self/clear_refs", "w").write("5")
before, start = status("VmRSS"), time.perf_counter()
step(*inputs)
print(status("VmHWM") - before, time.perf_counter() - start)
"""
    shape = map(str, (ROWS, DIM, NEGATIVES))
    printed = subprocess.check_output([sys.executable, "-c", code, *shape], text=True)
    memory, seconds = map(float, printed.split())
    work = f"N=M={ROWS} D={DIM} float32, {NEGATIVES} negatives a query, forward + backward"
    peak_memory, gradients = f"peak memory above the inputs, {work}", ROWS * (2 + NEGATIVES) * DIM * 4 / 2**20
    logits = ROWS * ROWS * 4 / 2**20
    yield Row("infonce_large", peak_memory, "torch's logits alone", memory, logits, logits / memory, "", "MiB")
    share = gradients / memory
    yield Row("infonce_large", peak_memory, "the inputs' gradients alone", memory, gradients, share, "", "MiB")
    rate, peak = 6 * ROWS * ROWS * DIM / seconds, gemm_peak()
    against = "GEMM peak, three products"
    yield Row("infonce_large", f"{work}: {seconds:.0f} s", against, rate / 1e9, peak / 1e9, rate / peak, "", "GF/s")
