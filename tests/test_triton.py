"""The Triton kernels without a GPU: their values in the interpreter, and what they compile to.

`pytest tests/test_triton.py --every-kernel` compiles what the dispatcher can pick, for each architecture and dtype.
"""

from __future__ import annotations

import math
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch

pytest.importorskip("triton")
import triton

from embedkern.backends.triton import attention
from embedkern.bench import resources
from embedkern.bench.resources import Launch, launches, loss_launches

BF16, FP32 = torch.bfloat16, torch.float32
ANY = math.inf  # of local memory


def run_values(environment: dict[str, str], *arguments: str) -> None:
    """tests/triton in a process of its own."""
    folder = Path(__file__).parent
    command = [sys.executable, "-m", "pytest", *arguments, str(folder / "triton"), "-p", "no:cacheprovider"]
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join([str(folder), *sys.path]), **environment}
    done = subprocess.run(command, env=environment, capture_output=True, text=True)
    print(done.stdout)
    assert done.returncode == 0, done.stdout[-4000:] + done.stderr[-2000:]


@pytest.mark.skipif(torch.cuda.is_available(), reason="tests/triton runs on the GPU")
def test_values_in_the_interpreter() -> None:
    run_values({"TRITON_INTERPRET": "1"})


# bfloat16, which the interpreter gets wrong, mma.sync, wgmma and tcgen05, and the compiler's layouts
PART = "test_shapes or test_packed_options or 64-64-dtype1 or 128-128-dtype1 or dtype2-0.02 or dtype2-absorbed"


@pytest.mark.skipif(torch.cuda.is_available(), reason="tests/triton runs on the GPU")
@pytest.mark.parametrize("architecture", resources.ARCHITECTURES)
def test_values_of_what_is_compiled(request: pytest.FixtureRequest, architecture: int) -> None:
    """As PTX: see tests/ptx.py. All of tests/triton takes minutes: --every-kernel."""
    part = () if request.config.getoption("--every-kernel") else ("-k", PART)
    run_values({"EK_ARCHITECTURE": str(architecture)}, "-p", "compiled", *part)


def meta(*shape: int, dtype: torch.dtype = FP32) -> torch.Tensor:
    return torch.empty(shape, dtype=dtype, device="meta")


def every_option(length: int) -> dict[str, Any]:
    return {
        "key_lengths": meta(64, dtype=torch.int64), "key_mask": meta(64, length, dtype=torch.bool),
        "mask": meta(64, 1, length, length, dtype=torch.bool), "bias": meta(1, 12, length, length),
        "relative_bias": meta(12, 65), "temperature": meta(12, 1, 1), "scale": meta(), "causal": True,
        "window_left": 20, "softcap": 30.0, "dropout_p": 0.1, "seed": meta(dtype=torch.int64), "needs": (True,) * 7,
    }  # fmt: skip


def assert_sound(launch: Launch, architecture: int, local: float = 0) -> resources.Resources:
    """It fits the device; at most `local` bytes are in local memory; wgmma where tiles have 64 rows, overlapping."""
    got = resources.resources(launch, architecture)
    what = f"{launch.name} {launch.tiles} for sm_{architecture}: {got}"
    assert got.blocks >= 1, what
    assert got.shared <= resources.SHARED[architecture], what
    assert got.stack <= local, what
    assert not got.serialised, what
    return got


CASES = [  # length, D, architecture
    (32, 32, 90), (128, 24, 90), (128, 32, 90), (64, 64, 90), (512, 64, 90), (64, 64, 80), (512, 64, 80), (64, 64, 100),
    (128, 40, 90), (512, 72, 90), (512, 40, 80),
]  # fmt: skip
BLOCKS = {  # on an SM: three registers more may cost one
    (32, 32): (16, 12), (128, 24): (4, 2), (128, 32): (4, 2), (64, 64): (6, 3), (512, 64): (5, 3, 3),
    (128, 40): (4, 1), (512, 72): (3, 2, 2), (512, 40): (5, 3, 3),
}  # fmt: skip


@pytest.mark.parametrize(("length", "dim", "architecture"), CASES)
def test_no_spills_and_enough_blocks(length: int, dim: int, architecture: int) -> None:
    found = launches((length, length), (dim, dim), architecture=architecture)
    assert [launch.name for launch in found] == (
        ["forward", "whole"] if length <= 128 else ["forward", "queries", "keys"]
    )
    for launch, blocks in zip(found, BLOCKS[length, dim], strict=True):
        got = assert_sound(launch, architecture)
        if architecture == 90:
            assert got.blocks >= blocks, f"{launch.name}: {got}"
            assert (got.wgmma > 0) == (length > 32), f"{launch.name}: {got}"


def test_strides_that_eight_divides() -> None:
    """The kernels are told, and read 16 bytes at a time: without, D = 40 and 72 above have local memory."""
    rows = meta(2, 5, 3, 80)[..., :72]
    for x, packed, even in (
        (rows, False, True), (rows.transpose(1, 2), False, True), (rows[0], True, True),
        (meta(2, 5, 3, 72), False, True),
        (meta(2, 5, 3, 76)[..., :72], False, False), (meta(5, 3, 76)[..., :72], True, False),
        (meta(5, 220)[:, :216].view(5, 3, 72), True, False), (meta(2, 20)[:, :16].view(2, 1, 2, 8), False, False),
        (torch.empty(1025, dtype=BF16)[1:].view(1, 2, 8, 64), False, False),
    ):  # fmt: skip
        assert attention._vectors(x, packed).even.value is even, x.stride()


def test_every_option_compiles() -> None:
    """With all options at once registers run out: local memory is allowed."""
    for launch in launches((64, 64), (32, 32), **every_option(64)):
        assert_sound(launch, 90, ANY)


def test_packed_batches_compile() -> None:
    options = {"relative_bias": meta(12, 65), "temperature": meta(12, 1)}
    options |= {"needs": (True, True, True, False, True, True, False)}
    found = launches((40, 40), (32, 32), packed=True, heads=(12, 4), **options)
    names = [launch.name for launch in found]
    assert names == ["forward", "whole", "whole", "whole", "queries", "keys", "relative_bias"]
    for launch in (found[0], found[1], found[5]):
        assert_sound(launch, 90, ANY)


def loss_options(rows: int, columns: int, dim: int) -> dict[str, Any]:
    return {
        "query_labels": meta(rows, dtype=torch.int64), "document_labels": meta(columns, dtype=torch.int64),
        "same_positive": True, "guide_queries": meta(rows, 64, dtype=BF16), "metrics": True, "doc_to_query": True,
        "guide_documents": meta(columns, 64, dtype=BF16), "document_weights": meta(columns), "hardness": 1,
        "strength": 2.0, "label_smoothing": 0.1, "negatives": meta(rows, 3, dim, dtype=BF16), "per_direction": True,
        "targets": None, "temperature": meta(rows),
    }  # fmt: skip


LOSS = ("exponentials", "statistics", "coefficients", "vectors", "gradient")


def loss_kernels(dtype: torch.dtype = BF16, **options: Any) -> dict[str, Launch]:
    """One launch of each of the loss's kernels."""
    found = loss_launches(1000, 1200, 768, dtype, **options)
    return {launch.name: launch for launch in found}


@pytest.mark.parametrize("architecture", [90, 80])
def test_loss_without_spills(architecture: int) -> None:
    symmetric = loss_kernels(doc_to_query=True, per_direction=True)
    found = {**loss_kernels(), **{name: symmetric[name] for name in ("statistics", "coefficients")}}
    assert set(found) == {"vectors", "positive", "maxima", "exponentials", "combine", "gradient", *LOSS[1:3]}
    for name in LOSS if architecture == 90 else LOSS[:1]:
        # Triton 3.6: outside the loop
        local = 8 if architecture == 80 and triton.__version__.startswith("3.6.") else 0
        got = assert_sound(found[name], architecture, local)
        assert got.blocks >= 2 or name in LOSS[1:3], f"{name}: {got}"
        if architecture == 90:
            assert (got.wgmma > 0) == (name in LOSS[:3]), f"{name}: {got}"


def test_loss_with_every_option_compiles() -> None:
    """Registers run out: local memory is allowed."""
    found = loss_kernels(learned=True, **loss_options(1000, 1200, 768))
    for name in ("coefficients", "negatives", "d_negatives"):
        assert_sound(found[name], 90, ANY)


@pytest.mark.parametrize("architecture", resources.ARCHITECTURES)
@pytest.mark.parametrize("dtype", [BF16, FP32])
def test_every_loss_kernel(request: pytest.FixtureRequest, dtype: torch.dtype, architecture: int) -> None:
    if not request.config.getoption("--every-kernel"):
        pytest.skip("minutes: --every-kernel")
    labels = {"query_labels": meta(1000, dtype=torch.int64), "document_labels": meta(1200, dtype=torch.int64)}
    few = ({}, labels, {"learned": True}, {"gradients": False}, {"query_to_query": True}, {"label_smoothing": 0.1})
    for options in (*few, {"learned": True, **loss_options(1000, 1200, 768)}):
        for launch in loss_kernels(dtype, **options).values():
            # A thread of sm_100 has a row's columns and compares 128 labels: 128 bytes behind the products, where eight
            # warps would leave no second program to hide 1.5 times the products' time. On sm_80 8, outside the loop.
            with_labels = "query_labels" in options and launch.name == "exponentials"
            local = {80: 8, 90: 0, 100: 128}[architecture] if with_labels else 0
            assert_sound(launch, architecture, ANY if dtype == FP32 or "hardness" in options else local)


@pytest.mark.parametrize("architecture", resources.ARCHITECTURES)
def test_latent_attention_compiles(architecture: int) -> None:
    found = resources.latent_launches(4096, 16384, 64)
    assert [launch.name for launch in found] == ["sums", "sums", "d_gated"]
    for launch in found:
        got = assert_sound(launch, architecture)
        assert got.blocks >= (5 if launch.name == "d_gated" else 8), f"{launch.name}: {got}"


@pytest.mark.parametrize("architecture", resources.ARCHITECTURES)
@pytest.mark.parametrize("dtype", [BF16, FP32])
@pytest.mark.parametrize("dim", [8, 32, 64, 128, 256])
def test_every_kernel(request: pytest.FixtureRequest, dim: int, dtype: torch.dtype, architecture: int) -> None:
    if not request.config.getoption("--every-kernel"):
        pytest.skip("minutes: --every-kernel")
    for length in (16, 32, 64, 128, 512):
        for launch in launches((length, length), (dim, dim), dtype, architecture=architecture):
            # sm_100, D = 64: one register is stored before the loop and read behind it.
            local = 8 if (architecture, dim, launch.name) == (100, 64, "forward") else 0
            assert_sound(launch, architecture, ANY if dtype == FP32 or dim > 128 else local)
    for launch in launches((64, 64), (dim, dim), dtype, packed=True, heads=(12, 4), architecture=architecture):
        assert_sound(launch, architecture, ANY)


PADDED = (16, 24, 40, 48, 56, 72, 80, 96, 104, 112, 120)
LENGTHS = (16, 32, 64, 128, 512)


@pytest.mark.parametrize(("dim", "length"), [(dim, length) for dim in PADDED for length in LENGTHS])
def test_dims_between(request: pytest.FixtureRequest, dim: int, length: int) -> None:
    """Each dim with each length, each of both with each architecture."""
    if not request.config.getoption("--every-kernel"):
        pytest.skip("minutes: --every-kernel")
    architecture = resources.ARCHITECTURES[(PADDED.index(dim) + LENGTHS.index(length)) % 3]
    for launch in launches((length, length), (dim, dim), architecture=architecture):
        # 24 bytes outside the loop: one stage needs none and is 11 % slower by a replay, tiles of 32 × 32 29 %.
        assert_sound(launch, architecture, 32 if architecture == 80 and dim > 64 and launch.name == "keys" else 0)
