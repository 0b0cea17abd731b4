"""The contrastive loss at N = 80,000: minutes, so only where the suite is named."""

from __future__ import annotations

import subprocess
import sys
from collections.abc import Iterator

from .harness import Row


def rows() -> Iterator[Row]:
    n, dim = 80_000, 1024
    code = """
import sys, torch
from embedkern.bench import infonce
n, dim = map(int, sys.argv[1:])
q, d = (torch.randn(n, dim, requires_grad=True) for _ in range(2))
infonce.info_nce(q[:64], d[:64], temperature=infonce.TAU).backward()
q.grad = d.grad = None
def status(field):
    return next(int(line.split()[1]) for line in open("/proc/self/status") if line.startswith(field)) / 1024
open("/proc/self/clear_refs", "w").write("5")
before = status("VmRSS")
infonce.info_nce(q, d, temperature=infonce.TAU).backward()
print(status("VmHWM") - before)
"""
    ours = float(subprocess.check_output([sys.executable, "-c", code, str(n), str(dim)]))
    logits = n * n * 4 / 2**20
    work = f"peak memory above the inputs, N=M={n} D={dim}"
    yield Row("infonce_large", work, "torch's logits alone", ours, logits, logits / ours, "ours < 2,200 MB", "MiB")
