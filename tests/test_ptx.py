"""tests/ptx.py notices what a GPU wouldn't forgive, or what would differ from run to run there."""

from __future__ import annotations

from typing import Any

import pytest
import torch

pytest.importorskip("triton")
import triton
import triton.language as tl
from ptx import execute

from embedkern.bench.resources import Launch, compile_launch


@triton.jit
def count_kernel(to, n, STEP: tl.constexpr, BLOCK: tl.constexpr, FIRST: tl.constexpr, HINT: tl.constexpr):
    """Each program writes BLOCK numbers from its own STEP on."""
    at = tl.program_id(0) * STEP + tl.arange(0, BLOCK)
    place = to + FIRST + at
    if HINT:
        place = tl.multiple_of(place, 16)
    tl.store(place, at, mask=at < n)


def count(to: torch.Tensor, n: int, programs: int, **constants: Any) -> None:
    constants = {"STEP": 128, "BLOCK": 128, "FIRST": 0, "HINT": False, "num_warps": 1} | constants
    execute(compile_launch(Launch(count_kernel, (to, n), constants), 80), programs, (to, n))


def test_values() -> None:
    to = torch.full((300,), -1, dtype=torch.int32)
    count(to, 290, 3)
    assert to.tolist() == [*range(290), *[-1] * 10]


@pytest.mark.parametrize(
    ("n", "constants", "what"),
    [
        (301, {}, "outside its tensor"),
        (300, {"STEP": 127}, "another program wrote this"),
        (256, {"FIRST": 1, "HINT": True}, "misaligned"),
    ],
)
def test_what_is_refused(n: int, constants: dict[str, Any], what: str) -> None:
    with pytest.raises(AssertionError, match=what):
        count(torch.zeros(300, dtype=torch.int32), n, 3, **constants)
