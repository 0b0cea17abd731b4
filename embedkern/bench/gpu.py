"""What has to be seen on a GPU: the test suite, `embedkern verify` and speed. `make gpu-check OUT=dir`.

No network, under ten minutes. Writes gpu.log (all that is printed), gpu.json (each step's exit status), gpu.csv.
"""

from __future__ import annotations

import argparse
import csv
import itertools
import json
import os
import subprocess
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import asdict, fields
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.nn.attention import SDPBackend, sdpa_kernel

from ..ops.attention import attention
from ..ops.infonce import info_nce
from ..ops.latent_pooling import latent_attention, multi_layer_attention
from .harness import Row
from .pooling import random_block

DEVICE = "cuda"
HEADS = 12
FLUSHED = 64 << 20  # numbers, written between the runs: more than the L2 holds
SECONDS = {"tests": 270, "verify": 100, "measure": 200}
SHARDS = max(1, min(8, (os.cpu_count() or 1) // 2))  # of the tests, at once: compiling takes a core


def _milliseconds(candidates: dict[str, Callable[[], object]], rounds: int = 15) -> dict[str, float]:
    """The median of interleaved runs, on the GPU's own clock; each run starts with a cold L2."""
    flush = torch.empty(FLUSHED, dtype=torch.int32, device=DEVICE)
    times: dict[str, list[float]] = {name: [] for name in candidates}
    for i in range(3 + rounds):
        for name, run in candidates.items():
            flush.zero_()
            start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
            start.record()
            run()
            end.record()
            end.synchronize()
            if i >= 3:
                times[name].append(start.elapsed_time(end))
    return {name: sorted(x)[len(x) // 2] for name, x in times.items()}


def _peers() -> dict[str, Callable[..., Tensor]]:
    """Each of SDPA's backends, and FlashAttention where it is installed; all take and give (B, H, L, D)."""

    def sdpa(backend: SDPBackend) -> Callable[..., Tensor]:
        def run(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
            with sdpa_kernel(backend):
                return F.scaled_dot_product_attention(q, k, v)

        return run

    backends = ("FLASH_ATTENTION", "EFFICIENT_ATTENTION", "CUDNN_ATTENTION", "MATH")
    peers = {f"SDPA {name}": sdpa(getattr(SDPBackend, name)) for name in backends}
    try:
        from flash_attn import flash_attn_func
    except ImportError:
        print("flash-attn isn't installed: not compared")
    else:
        peers["flash-attn"] = lambda q, k, v: flash_attn_func(*(x.transpose(1, 2) for x in (q, k, v))).transpose(1, 2)
    return peers


def _runs(name: str, step: Callable[[], object]) -> bool:
    try:
        step()
    except Exception as error:  # whatever a peer's reason is, it is printed
        print(f"{name}: {str(error).splitlines()[0]}")
        return False
    return True


def attention_rows(
    tokens: int = 65536, dims: Sequence[int] = (32, 64, 128), lengths: Sequence[int] = (32, 64, 128, 256, 512)
) -> Iterator[Row]:
    """Forward, and forward + backward, of whole batches in bfloat16 against every peer that runs them."""
    peers = _peers()
    for dim in dims:
        for length in lengths:
            q, k, v, upstream = (
                torch.randn(tokens // length, length, HEADS, dim, dtype=torch.bfloat16, device=DEVICE).transpose(1, 2)
                for _ in range(4)
            )
            for x in (q, k, v):
                x.requires_grad_()
            work = f"{tokens} tokens H={HEADS} D={dim} L={length} bfloat16"
            passes = {
                "forward": torch.no_grad()(lambda f: f(q, k, v)),  # noqa: B023
                "forward + backward": lambda f: torch.autograd.grad(f(q, k, v), (q, k, v), upstream),  # noqa: B023
            }
            both = passes["forward + backward"]
            able = {name: f for name, f in peers.items() if _runs(f"{name}, {work}", lambda f=f: both(f))}  # type: ignore[misc]  # noqa: B023
            functions: dict[str, Callable[..., Any]] = {"ours": attention, **able}
            for what, run in passes.items():
                times = _milliseconds({name: lambda f=f, run=run: run(f) for name, f in functions.items()})  # type: ignore[misc]
                for name in functions:
                    if name != "ours":
                        ratio = times[name] / times["ours"]
                        yield Row("attention-gpu", f"{what}, {work}", name, times["ours"], times[name], ratio, "≥ 1")


def latent_rows(width: int = 4096, batches: Sequence[tuple[int, int]] = ((512, 8), (128, 64))) -> Iterator[Row]:
    """Forward + backward at the papers' sizes in bfloat16 against their modules as written, the reference."""

    def against(function: Callable[..., Tensor], tensors: list[Tensor], heads: int, work: str, **options: Any) -> Row:
        tensors = [x.detach().bfloat16().requires_grad_() for x in tensors]

        def step(backend: str) -> object:
            out = function(*tensors, heads, backend=backend, **options)
            return torch.autograd.grad(out, tensors, torch.ones_like(out))

        times = _milliseconds({name: lambda n=name: step(n) for name in ("triton", "reference")}, 5)  # type: ignore[misc]
        ours, peer = times["triton"], times["reference"]
        return Row("latent-gpu", work, "as written", ours, peer, peer / ours, "≥ 2")

    with torch.device(DEVICE):
        weights = random_block(num_latents=width // 8, heads=8, head_dim=width, width=width, inner=4 * width)
        for length, batch in batches:
            sizes = f"{width // 8} latents, 8 heads of {width}, bfloat16"
            work = f"latent attention {batch}×{length}×{width}, lengths from half of it, {sizes}"
            lengths = torch.linspace(length // 2, length, batch).long()
            yield against(latent_attention, [torch.randn(batch, length, width), *weights], 8, work, lengths=lengths)
        latents, head_dim = 3 * width // 16, width // 2
        weights = random_block(num_latents=latents, heads=32, head_dim=head_dim, width=width, inner=4 * width)
        tensors = [torch.randn(8, 32, width), torch.randn(32, width), *weights]
        work = f"multi-layer attention 8×32 layers×{width}, {latents} latents, 32 heads of {head_dim}, bfloat16"
        yield against(multi_layer_attention, tensors, 32, work)


def _cross_entropy(queries: Tensor, documents: Tensor) -> Tensor:
    scores = F.normalize(queries) @ F.normalize(documents).T / 0.05
    return F.cross_entropy(scores.float(), torch.arange(len(queries), device=queries.device))


def _both(queries: Tensor, documents: Tensor) -> Any:
    directions = ("query_to_doc", "doc_to_query")
    return info_nce(queries, documents, directions=directions, partition_mode="per_direction")


def loss_rows(
    sizes: Sequence[int] = (1024, 8192, 65536), dim: int = 768, side: int = 8192, compiled: bool = True
) -> Iterator[Row]:
    """Forward + backward of info_nce in bfloat16 against torch's cross entropy and the rate of one product."""
    peers: dict[str, Callable[..., Any]] = {"torch": _cross_entropy}
    if compiled:
        peers["torch.compile"] = torch.compile(_cross_entropy)
    for size in sizes:
        q, d = (torch.randn(size, dim, dtype=torch.bfloat16, device=DEVICE, requires_grad=True) for _ in range(2))
        a, b = (torch.randn(side, side, dtype=torch.bfloat16, device=DEVICE) for _ in range(2))
        work = f"info_nce forward + backward, N=M={size} D={dim} bfloat16"
        losses = {"ours": info_nce, "both directions, ours": _both, **peers}
        steps: dict[str, Callable[[], object]] = {
            name: lambda f=loss, q=q, d=d: torch.autograd.grad(f(q, d), (q, d))  # type: ignore[misc]
            for name, loss in losses.items()
        }
        able = {name: step for name, step in steps.items() if name not in peers or _runs(f"{name}, {work}", step)}
        times = _milliseconds(able | {"product": lambda a=a, b=b: a @ b}, 5)  # type: ignore[misc]
        for name in able:
            if name != "ours":
                goal = "≤ 1.5 (time: four products to three)" if name not in peers else "≥ 1"
                yield Row("loss-gpu", work, name, times["ours"], times[name], times[name] / times["ours"], goal)
        rate, peak = 6 * size**2 * dim / times["ours"] / 1e9, 2 * side**3 / times["product"] / 1e9
        goal = "≥ 0.6 at N=65536"
        yield Row("loss-gpu", work, f"a product of {side}³, counted as three", rate, peak, rate / peak, goal, "TF/s")


def measure(out: Path) -> None:
    print(f"attention runs on {_backend()}")
    with (out / "gpu.csv").open("w", newline="") as file:
        writer = csv.writer(file)
        writer.writerow([*(field.name for field in fields(Row)), "device", "torch"])
        for row in itertools.chain(attention_rows(), latent_rows(), loss_rows()):
            writer.writerow([*asdict(row).values(), torch.cuda.get_device_name(), torch.__version__])
            file.flush()
            ours, peer = (f"{x:.4g} {row.unit}" for x in (row.ours, row.peer))
            print(f"{row.work}: {ours}, {row.against} {peer}, ratio {row.ratio:.2f}", flush=True)


def _backend() -> str:
    from ..ops.explain import explain

    x = torch.zeros(1, 1, 1, 64, dtype=torch.bfloat16, device=DEVICE)
    return explain("attention", x, x, x).choice


def _run(command: list[str], seconds: float) -> tuple[int, str]:
    """The exit status, -1 when time was up, and what it prints."""
    few_threads = {**os.environ, "OMP_NUM_THREADS": "2"}
    process = subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True, env=few_threads)
    try:
        printed, _ = process.communicate(timeout=seconds)
    except subprocess.TimeoutExpired:
        process.kill()
        return -1, f"{process.communicate()[0]}\nstopped after {seconds} s\n"
    return process.returncode, printed


def check(out: Path) -> int:
    """Runs every step, whatever the others gave; 0 if all passed."""
    pytest = [sys.executable, "-m", "pytest", "tests", "-q", "--durations=10", "-p", "no:cacheprovider"]
    commands = {
        "tests": [[*pytest, f"--shard={i}/{SHARDS}"] for i in range(SHARDS)],
        "verify": [[sys.executable, "-c", "from embedkern.cli import main; raise SystemExit(main(['verify']))"]],
        "measure": [[sys.executable, "-m", "embedkern.bench.gpu", "--measure", "--out", str(out)]],
    }
    steps: dict[str, dict[str, Any]] = {}
    with (out / "gpu.log").open("w") as log:
        for name, at_once in commands.items():
            begin = time.perf_counter()
            with ThreadPoolExecutor(len(at_once)) as threads:
                results = list(threads.map(_run, at_once, itertools.repeat(SECONDS[name])))
            status = next((status for status, _ in results if status != 0), 0)
            steps[name] = {"status": status, "seconds": round(time.perf_counter() - begin, 1)}
            log.write("\n".join([f"== {name}: {steps[name]}", *(printed for _, printed in results)]))
            print(f"{name}: exit status {status}, {steps[name]['seconds']} s", flush=True)
    versions = {"device": torch.cuda.get_device_name(), "torch": torch.__version__, "cuda": torch.version.cuda}
    (out / "gpu.json").write_text(json.dumps({**versions, "steps": steps}, indent=2) + "\n")
    return int(any(step["status"] for step in steps.values()))


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--out", type=Path, required=True, help="folder for the log, the JSON and the CSV")
    parser.add_argument("--measure", action="store_true", help="only the benchmark")
    arguments = parser.parse_args()
    if not torch.cuda.is_available():
        print("no GPU that torch can use: nothing was checked")
        return 0
    arguments.out.mkdir(parents=True, exist_ok=True)
    if arguments.measure:
        measure(arguments.out)
        return 0
    return check(arguments.out)


if __name__ == "__main__":
    raise SystemExit(main())
