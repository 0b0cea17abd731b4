"""What the Triton kernels compile to, without a GPU: registers, shared memory, spills, wgmma of every launch of a call.

`python -m embedkern.bench.resources` prints the table of docs/triton.md.
"""

from __future__ import annotations

import argparse
import contextlib
import itertools
import re
import subprocess
import tempfile
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import torch
import triton
from triton.backends.compiler import GPUTarget

from ..backends.triton import attention, infonce, latent_kernels, launcher

ARCHITECTURES = (80, 90, 100)
SHARED = {80: 163 << 10, 90: 227 << 10, 100: 227 << 10}  # bytes a block may have; an SM has 1 KiB more for each block
REGISTERS, WARPS, BLOCKS = 65536, 64, 32  # of an SM


@dataclass(frozen=True)
class Launch:
    kernel: Any
    arguments: tuple[Any, ...]
    options: dict[str, Any]  # constants, num_warps, num_stages

    @property
    def name(self) -> str:
        if self.kernel is infonce.kernels.scores_kernel:
            return ("statistics", "maxima", "exponentials", "coefficients")[self.options["MODE"]]
        of = {"keys_kernel": "whole" if self.options.get("WHOLE") else "keys"}
        return of.get(self.kernel.__name__, self.kernel.__name__.removesuffix("_kernel"))

    @property
    def tiles(self) -> tuple[int, int]:
        if "ROWS" in self.options and "COLUMNS" in self.options:
            return self.options["ROWS"], self.options["COLUMNS"]
        block, rows = self.options.get("BLOCK", 0), self.options.get("BLOCK_R")
        if rows is not None:
            return rows, self.options.get("BLOCK_C", rows)
        return self.options.get("BLOCK_Q", block), self.options.get("BLOCK_K", 2 * block)


@dataclass(frozen=True)
class Resources:
    registers: int
    stack: int  # bytes of local memory a thread: spills
    shared: int
    blocks: int  # on an SM at once
    wgmma: int
    waits: int  # wgmma waited for before the next begins

    @property
    def serialised(self) -> bool:
        return self.wgmma > 0 and self.waits >= 0.8 * self.wgmma


def launches(
    lengths: tuple[int, int],
    dims: tuple[int, int],
    dtype: torch.dtype = torch.bfloat16,
    packed: bool = False,
    heads: tuple[int, int] = (12, 12),
    batch: int = 64,
    needs: tuple[bool, ...] = (True, True, True, False, False, False, False),
    architecture: int = 90,
    **options: Any,
) -> list[Launch]:
    """What forward and backward of a call launch. options: the operator's, tensors on the device "meta"."""
    defaults: dict[str, Any] = dict.fromkeys(
        ("key_lengths", "key_mask", "cu_seqlens_q", "cu_seqlens_k", "mask", "bias", "relative_bias", "temperature")
    )
    defaults |= {"temperature_number": 1.0, "scale": None, "scale_number": 0.125, "causal": False, "window_left": -1}
    defaults |= {"window_right": -1, "softcap": 0.0, "dropout_p": 0.0, "seed": None}
    shapes = ((lengths[0], heads[0], dims[0]), (lengths[1], heads[1], dims[0]), (lengths[1], heads[1], dims[1]))
    q, k, v = (torch.empty(batch, *shape, dtype=dtype, device="meta").transpose(1, 2) for shape in shapes)
    if packed:
        q, k, v = (x.transpose(1, 2).flatten(0, 1) for x in (q, k, v))
        defaults["cu_seqlens_q"] = torch.empty(batch + 1, dtype=torch.int32, device="meta")
    is_large, attention.is_large = attention.is_large, lambda device: architecture >= 90
    try:
        with recorded() as found:
            arguments = (q, k, v, *(defaults | options).values())
            out, lse, statistics = attention._run_forward(*arguments)
            d_lse = lse if options.get("d_lse") else None
            attention._run_backward(out, d_lse, out, statistics if statistics.numel() else None, *arguments, *needs)
    finally:
        attention.is_large = is_large
    return found


def latent_launches(rows: int, width: int, batch: int, dtype: torch.dtype = torch.bfloat16) -> list[Launch]:
    """What latent attention launches for a tile: sums of rows, of gated units; the gated units' gradient."""
    with recorded() as found, torch.device("meta"):
        u, sums = torch.empty(rows, 2 * width, dtype=dtype), torch.empty(batch, width)
        ends, sequences = (torch.empty(n, dtype=torch.int64) for n in (batch, rows))
        latent_kernels.add_sums(sums, u[:, :width].contiguous(), ends, 0)
        latent_kernels.add_sums(sums, u, ends, 0, gated=True)
        latent_kernels.d_gated(u, torch.empty(batch + 1, width), sequences, True)
    return found


def loss_launches(
    rows: int, columns: int, dim: int, dtype: torch.dtype = torch.bfloat16, gradients: bool = True,
    learned: bool = False, **options: Any
) -> list[Launch]:  # fmt: skip
    """What a call of info_nce launches. learned: τ's gradient, too. options: the operator's, tensors on "meta"."""
    q, d = (torch.empty(n, dim, dtype=dtype, device="meta") for n in (rows, columns))
    defaults: dict[str, Any] = {
        "negatives": None, "positives": None, "targets": None, "rows": rows, "offset": 0, "period": columns,
        "temperature": torch.empty((), device="meta"), "query_labels": None, "document_labels": None,
        "same_positive": False, "guide_queries": None, "guide_documents": None, "margin": 0.0, "relative": False,
        "document_weights": None, "negative_weights": None, "hardness": 0, "strength": 0.0, "label_smoothing": 0.0,
        "cosine": True, "query_to_query": False, "doc_to_query": False, "doc_to_doc": False, "per_direction": False,
        "prefixes": [], "prefix_weights": [], "metrics": False,
    }  # fmt: skip
    d_loss = torch.empty(rows, device="meta") if gradients else None
    given = q, d, options.get("negatives"), options.get("positives"), q if learned else None
    needs = [gradients and x is not None for x in given]
    with recorded() as found:
        infonce.forward(q, d, *(defaults | options).values(), d_loss, *needs)
    return found


@contextlib.contextmanager
def recorded() -> Iterator[list[Launch]]:
    """Launches are noted down instead of made."""
    found: list[Launch] = []

    def record(
        kernel: Any, programs: int, *arguments: Any, warps: int, stages: int, registers: int | None = None,
        **constants: Any
    ) -> None:  # fmt: skip
        options = {"num_warps": warps, "num_stages": stages, "enable_fp_fusion": True, "maxnreg": registers}
        found.append(Launch(kernel, arguments, constants | options))

    usual, launcher.run = launcher.run, record
    try:
        yield found
    finally:
        launcher.run = usual


class _Driver:
    """Stands for a GPU of an architecture, so that the launcher's own code specializes arguments and compiles."""

    def __init__(self, architecture: int) -> None:
        self.architecture = architecture

    def get_current_target(self) -> GPUTarget:
        return GPUTarget("cuda", self.architecture, 32)

    def get_current_device(self) -> int:
        return self.architecture

    def get_current_stream(self, device: int) -> int:
        return 0


def compile_launch(launch: Launch, architecture: int) -> Any:
    """The compiled kernel (`asm`, `metadata`), as the launcher would make it."""
    driver = triton.runtime.driver
    usual = driver._active
    driver.set_active(_Driver(architecture))
    try:
        return launch.kernel.warmup(*launch.arguments, grid=(1,), **launch.options)
    finally:
        driver._active = usual


def _tool(name: str, *arguments: str) -> str:
    path = getattr(triton.knobs.nvidia, name).path
    return subprocess.run([path, *arguments], capture_output=True, text=True, check=True).stdout


def resources(launch: Launch, architecture: int) -> Resources:
    compiled = compile_launch(launch, architecture)
    with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
        file.write(compiled.asm["cubin"])
        file.flush()
        usage = _tool("cuobjdump", "-res-usage", file.name)
        code = _tool("cuobjdump", "-sass", file.name)
    registers, stack = (int(re.search(rf"{what}:(\d+)", usage).group(1)) for what in ("REG", "STACK"))  # type: ignore[union-attr]
    warps, shared = launch.options["num_warps"], compiled.metadata.shared
    blocks = min(
        REGISTERS // (-(-registers // 8) * 8 * 32 * warps), WARPS // warps, BLOCKS,
        (SHARED[architecture] + 1024) // (shared + 1024)
    )  # fmt: skip
    spilled = bool(re.search(r"\b(LDL|STL)\b", code))
    order = re.findall(r"\bHGMMA|WARPGROUP\.DEPBAR", code)
    return Resources(
        registers, max(stack, int(spilled)), shared, blocks, order.count("HGMMA"),
        sum(each == "HGMMA" != following for each, following in itertools.pairwise(order))
    )  # fmt: skip


def table() -> Iterator[tuple[str, Launch, int, Resources]]:
    """Each launch of bf16 attention over whole batches, for sm_90 and where it differs sm_80."""
    for dim in (32, 64, 128):
        for length in (32, 64, 128, 512):
            for architecture in (90, 80):
                for launch in launches((length, length), (dim, dim), architecture=architecture):
                    yield f"L={length} D={dim}", launch, architecture, resources(launch, architecture)


def latent_table() -> Iterator[tuple[str, Launch, int, Resources]]:
    """The same for latent attention at NV-Embed's size."""
    for launch in latent_launches(4096, 16384, 64):
        for architecture in (90, 80):
            yield "F=16384", launch, architecture, resources(launch, architecture)


def loss_calls() -> list[tuple[str, list[Launch]]]:
    """Launches of info_nce that work on tiles: query_to_doc, also with τ learned; both directions, one softmax each."""
    kinds = {
        "loss": loss_launches(8192, 8192, 768),
        "loss, τ learned": loss_launches(8192, 8192, 768, learned=True),
        "loss, both": loss_launches(8192, 8192, 768, doc_to_query=True, per_direction=True),
    }
    return [(name, [x for x in found if x.kernel is infonce.kernels.scores_kernel]) for name, found in kinds.items()]


def loss_table() -> Iterator[tuple[str, Launch, int, Resources]]:
    """The same for these."""
    for call, found in loss_calls():
        for launch in {each.name: each for each in found}.values():
            for architecture in (90, 80):
                yield call, launch, architecture, resources(launch, architecture)


def main() -> None:
    argparse.ArgumentParser(description=__doc__).parse_args()
    print("| call | kernel | tile q×k | warps, stages | sm | registers | shared | blocks/SM | local | wgmma |")
    print("| --- | --- | --- | --- | --- | --- | --- | --- | --- | --- |")
    for call, launch, architecture, r in itertools.chain(table(), latent_table(), loss_table()):
        tile = "×".join(map(str, launch.tiles))
        options = f"{launch.options['num_warps']}, {launch.options['num_stages']}"
        wgmma = f"{r.wgmma}{' serialised' if r.serialised else ''}"
        print(
            f"| {call} | {launch.name} | {tile} | {options} | {architecture} | {r.registers} | {r.shared} "
            f"| {r.blocks} | {r.stack} | {wgmma} |",
            flush=True,
        )


if __name__ == "__main__":
    main()
