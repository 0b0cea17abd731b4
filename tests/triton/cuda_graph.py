"""A step in a CUDA graph, for the tests that run on a GPU."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor


def replayed(step: Callable[[], tuple[Tensor, ...]]) -> tuple[tuple[Tensor, ...], tuple[Tensor, ...]]:
    """What a captured step gives when replayed, and what it gave before, launched as usual."""
    stream = torch.cuda.Stream()
    with torch.cuda.stream(stream):
        wanted = step()
    torch.cuda.current_stream().wait_stream(stream)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        got = step()
    graph.replay()
    return got, wanted
