"""What only a GPU shows: pooling's CUDA kernels as users call them. tests/triton runs there, too."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from accuracy import assert_accurate

import embedkern as ek
from embedkern.schema import POOL_MODES

pytestmark = pytest.mark.skipif(not torch.cuda.is_available(), reason="no GPU")
DTYPES = (torch.float32, torch.bfloat16, torch.float16)


def check(function: Any, tensors: list[torch.Tensor], **options: Any) -> None:
    """The default backend's output and gradients against the reference in float64 and at the tensors' dtype."""
    results = []
    for dtype, backend in ((None, None), (torch.float64, "reference"), (None, "reference")):
        x = [t.detach().to(dtype or t.dtype).requires_grad_() for t in tensors]
        out = function(*x, backend=backend, **options)
        upstream = torch.linspace(-1, 1, out.numel(), dtype=torch.float64, device=out.device).reshape(out.shape)
        results.append((out, *torch.autograd.grad(out, x, upstream.to(out.dtype))))
    for i, (ours, exact, torchs) in enumerate(zip(*results, strict=True)):
        assert_accurate(ours, exact, torchs, 2.0 if i == 0 else 3.0, f"{i} of {list(options)}")


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("mode", POOL_MODES)
def test_pool(mode: str, dtype: torch.dtype) -> None:
    hidden = torch.randn(5, 70, 768, device="cuda").to(dtype)
    lengths = torch.tensor([70, 0, 1, 33, 64], device="cuda")
    hidden[torch.arange(70, device="cuda") >= lengths[:, None]] = float("nan")
    assert ek.explain("pool", hidden, mode, lengths=lengths).choice == "cuda"
    check(lambda h, **rest: ek.pool(h, mode, **rest), [hidden], lengths=lengths, normalize=True)
    cu_seqlens = torch.tensor([0, 5, 5, 70, 350], dtype=torch.int32, device="cuda")
    check(lambda h, **rest: ek.pool(h, mode, **rest), [torch.randn(350, 67, device="cuda")], cu_seqlens=cu_seqlens)


@pytest.mark.parametrize("mode", POOL_MODES)
def test_pool_of_some_tokens(mode: str) -> None:
    """A mask with holes, tokens skipped, spans that overlap and are empty; two modes at once, truncated."""
    hidden = torch.randn(4, 33, 96, device="cuda")
    mask = torch.rand(4, 33, device="cuda") < 0.6
    skip = torch.tensor([0, 3, 40, 1], device="cuda")
    spans = torch.tensor([[0, 5], [3, 40], [7, 7], [100, 132]], device="cuda")
    for options in ({"mask": mask, "skip": skip}, {"mask": mask, "spans": spans}, {"spans": spans}):
        check(
            lambda h, **rest: ek.pool(h, (mode, "mean"), truncate_dim=130, normalize=True, **rest), [hidden], **options
        )
