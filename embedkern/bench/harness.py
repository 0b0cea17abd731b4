"""Side-by-side timing: what is compared runs interleaved in one process, and a claim is a ratio of medians or bests."""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable
from dataclasses import dataclass


@dataclass(frozen=True)
class Row:
    """One line of the table and the CSV."""

    suite: str
    work: str  # what is computed, with shapes and dtype
    against: str  # the peer and its settings
    ours: float  # in `unit`
    peer: float
    ratio: float  # how many times better ours is (peer / ours for times), or the value itself for a share of a peak
    goal: str  # of the ratio, as in "≥ 1.5"
    unit: str = "ms"


def interleave(
    candidates: dict[str, Callable[[], object]], rounds: int = 10, warmup: int = 2
) -> dict[str, list[float]]:
    """Seconds of each run: in each of `rounds` rounds every candidate runs once; `warmup` rounds before don't count."""
    seconds: dict[str, list[float]] = {name: [] for name in candidates}
    for i in range(warmup + rounds):
        for name, run in candidates.items():
            start = time.perf_counter()
            run()
            if i >= warmup:
                seconds[name].append(time.perf_counter() - start)
    return seconds


def versus(
    suite: str,
    work: str,
    ours: Callable[[], object],
    peer: Callable[[], object],
    against: str,
    goal: str,
    rounds: int = 10,
    best: bool = False,
) -> Row:
    """Times ours and the peer's, interleaved, by the median (or the best) of the rounds."""
    seconds = interleave({"ours": ours, "peer": peer}, rounds)
    choose: Callable[[list[float]], float] = min if best else statistics.median
    a, b = choose(seconds["ours"]), choose(seconds["peer"])
    return Row(suite, work, against, a * 1e3, b * 1e3, b / a, goal)


def _products(dtype: str) -> dict[str, Callable[[], object]]:
    """torch's products of square matrices, named by their size."""
    import torch

    pairs = {n: torch.randn(2, n, n, dtype=getattr(torch, dtype)) for n in (512, 768, 1024, 1536)}
    return {str(n): lambda x=x: x[0] @ x[1] for n, x in pairs.items()}  # type: ignore[misc]


def _largest_rate(seconds: dict[str, list[float]]) -> float:
    return max(2 * int(n) ** 3 / min(times) for n, times in seconds.items())


def gemm_peak(dtype: str = "float32", rounds: int = 8) -> float:
    """The largest rate, in FLOP/s, of torch's matrix product over several shapes on all threads, in this run."""
    return _largest_rate(interleave(_products(dtype), rounds))


def share_of_peak(
    suite: str, work: str, ours: Callable[[], object], flops: float, against: str, goal: str, rounds: int = 6
) -> Row:
    """The rate of `ours`, which is worth `flops`, by gemm_peak's measured in the same rounds: both at their best."""
    seconds = interleave({"ours": ours, **_products("float32")}, rounds)
    rate, peak = flops / min(seconds.pop("ours")), _largest_rate(seconds)
    return Row(suite, work, against, rate / 1e9, peak / 1e9, rate / peak, goal, "GF/s")


def keep_freed_memory() -> None:
    """Make glibc keep freed memory for the rest of this process, so that large results cost no page faults."""
    import ctypes

    m_trim_threshold, m_mmap_max = -1, -4
    libc = ctypes.CDLL("libc.so.6")
    libc.mallopt(m_mmap_max, 0)
    libc.mallopt(m_trim_threshold, 2**31 - 1)
