"""The CUDA kernels as compiled code, which needs no GPU. csrc/tests/test_pooling_cuda.cpp runs them on the CPU."""

from __future__ import annotations

import re
import shutil
import subprocess
from pathlib import Path

import pytest
import torch

import embedkern as ek
from embedkern import _native
from embedkern.backends import native

ROOT = Path(__file__).resolve().parent.parent
SOURCE = ROOT / "csrc" / "cuda" / "pooling.cu"
NVCC = shutil.which("nvcc")
needs_nvcc = pytest.mark.skipif(NVCC is None, reason="nvcc isn't on PATH")
BLOCKS = {"pool_rows": 2, "d_rows": 3}  # of 256 threads, that an SM has to hold at least; the others: 4


def compile_kernels(*options: str) -> str:
    done = subprocess.run([str(NVCC), "-std=c++17", "-O3", *options, str(SOURCE)], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    return done.stdout + done.stderr


@needs_nvcc
@pytest.mark.parametrize("architecture", ["80", "90a", "100"])
def test_no_spills_and_enough_blocks(architecture: str, tmp_path: Path) -> None:
    report = compile_kernels(f"-arch=sm_{architecture}", "-cubin", "-Xptxas=-v", "-o", str(tmp_path / "kernels.cubin"))
    found = re.findall(
        r"Compiling entry function '(\w+)'.*?(\d+) bytes stack frame, (\d+) bytes spill stores, (\d+) bytes spill loads"
        r".*?Used (\d+) registers",
        report,
        re.S,
    )
    names = [re.sub(r"_ZN2ek4cuda\d+([a-z_]+?)(I|E).*", r"\1", name) for name, *_ in found]
    # 3 dtypes × 5 choices of statistics, 3 dtypes of each of the three others, find_segments
    assert {name: names.count(name) for name in names} == {
        "find_segments": 1, "pool_rows": 15, "normalize": 3, "d_normalize": 3, "d_rows": 3
    }  # fmt: skip
    for name, (mangled, stack, stores, loads, registers) in zip(names, found, strict=True):
        assert (stack, stores, loads) == ("0", "0", "0"), f"{mangled} spills"
        blocks = 65536 // (256 * (-(-int(registers) // 8) * 8))  # an SM has 65,536 registers, given out in eights
        assert blocks >= BLOCKS.get(name, 4), f"{mangled}: {registers} registers, {blocks} blocks"


@needs_nvcc
def test_tokens_are_read_and_gradients_written_16_bytes_at_a_time(tmp_path: Path) -> None:
    path = tmp_path / "kernels.ptx"
    compile_kernels("-arch=compute_90a", "-ptx", "-o", str(path))
    kernels = re.split(r"\.visible \.entry |\.entry ", path.read_text())[1:]
    for kernel in kernels:
        name = kernel.split("(", 1)[0]
        if "pool_rows" in name and "Li0E" not in name:
            # several rows' loads are under way before the first is used
            assert len(re.findall(r"ld\.global\S*\.v[24]\.[bu](32|64)", kernel)) >= 4, name
        if "d_rows" in name:
            assert re.search(r"st\.global\S*\.v[24]\.[bu](32|64)", kernel), name


@pytest.mark.skipif(shutil.which("readelf") is None, reason="readelf isn't on PATH")
def test_the_extension_needs_no_cuda_library() -> None:
    listing = subprocess.run(["readelf", "-d", _native.__file__], capture_output=True, text=True, check=True).stdout
    assert "libtorch_cpu" in listing
    assert "cuda" not in listing.lower().replace(str(Path(_native.__file__).parent).lower(), "")


@pytest.mark.skipif(not _native.has_cuda, reason="this build has no CUDA kernels")
def test_kernels_are_attached_for_cuda() -> None:
    names = [name for name, _ in _native.kernels()]
    for name in ("pool_forward", "pool_backward"):
        assert names.count(name) == 2
        assert torch._C._dispatch_has_kernel_for_dispatch_key(f"embedkern::{name}", "CUDA")


def test_reasons_not_to_run_on_cuda(monkeypatch: pytest.MonkeyPatch) -> None:
    x = torch.randn(2, 3, 8)
    monkeypatch.setattr(native, "HAS_CUDA", True)
    assert ek.explain("pool", x).refused["cuda"] == ["hidden is on cpu"]
    many = ek.explain("pool", x.double(), ["mean"] * 33).refused["cuda"]
    assert many == ["hidden is on cpu", "hidden is torch.float64", "more than 32 modes"]
    monkeypatch.setattr(native, "HAS_CUDA", False)
    assert ek.explain("pool", x).refused["cuda"] == ["built without nvcc", "hidden is on cpu"]
    with pytest.raises(NotImplementedError, match="pool: backend 'cuda' can't run this: built without nvcc"):
        ek.pool(x, backend="cuda")
