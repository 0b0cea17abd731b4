"""Where the time of a training step and of encoding goes, by torch's profiler: `python -m embedkern.bench.profile`.

MiniLM, patched, real definitions and words. Prints the table of docs/profile.md.
"""

from __future__ import annotations

import sys
from collections import defaultdict
from collections.abc import Callable, Iterable
from itertools import islice

import torch
from torch.profiler import ProfilerActivity, profile

from ..demo import train, wordnet
from ..machine import cpu_name
from ..transformers import patch
from .training import CACHE

# What a profiled operator belongs to: the first whose words its name contains.
PARTS = {
    "linear layers": ("addmm", "aten::mm", "aten::linear", "aten::matmul", "addbmm", "AddmmBackward", "MmBackward"),
    "attention": ("embedkern::attention", "AttentionVarlen", "AttentionFunction"),
    "pooling": ("embedkern::pool", "PoolFunction"),
    "loss": ("embedkern::info_nce", "InfoNCE"),
    "GELU": ("gelu",),
    "layer norm": ("layer_norm", "native_layer_norm", "LayerNorm"),
    "embedding tables": ("embedding", "index_select"),
    "optimizer": ("Optimizer", "_foreach", "addcmul", "addcdiv", "lerp", "aten::sqrt"),
    "sums of gradients and residuals": ("aten::add", "aten::sum", "AccumulateGrad"),
    "copies and packing": ("copy", "index", "aten::cat", "contiguous", "clone", "_to_copy", "aten::fill", "zero"),
}


def main() -> int:
    pairs = wordnet.read_pairs(wordnet.find(None, CACHE))
    settings = train.Settings(batch_size=512)
    model = patch(train.load_encoder())
    run = train.Run(model, pairs, settings)
    batch, labels = next(wordnet.batches(pairs, settings.batch_size, seed=0))
    step = train.embedkern_step(model, settings, train.ProgressBar(settings, 1))

    def training() -> None:
        run.optimizer.zero_grad()
        step(batch, labels)
        run.optimizer.step()

    definitions = [pair.definition for pair in islice(pairs, 0, None, len(pairs) // 600)]
    columns = {
        f"training step, {settings.batch_size} pairs": _shares(training),
        f"encoding, {len(definitions)} texts": _shares(lambda: model.encode(definitions, batch_size=128)),
    }
    print(f"{cpu_name()}, {torch.get_num_threads()} threads, torch {torch.__version__}, float32\n")
    print("| | " + " | ".join(columns) + " |\n| --- |" + " --- |" * len(columns))
    for part in (*PARTS, "other operators", "outside operators: Python, tokenizer"):
        print(f"| {part} | " + " | ".join(f"{100 * shares[part]:.1f} %" for shares in columns.values()) + " |")
    print("| seconds | " + " | ".join(f"{shares['seconds']:.1f}" for shares in columns.values()) + " |")
    return 0


def _shares(work: Callable[[], object]) -> dict[str, float]:
    """The share of the wall time that the thread that runs `work` and its backward spent in each part."""
    work()
    torch.set_grad_enabled(True)
    with profile(activities=[ProfilerActivity.CPU]) as profiler, torch.profiler.record_function("everything"):
        work()
    averages = profiler.key_averages()
    seconds = next(e.cpu_time_total for e in averages if e.key == "everything") / 1e6
    shares: dict[str, float] = defaultdict(float, seconds=seconds)
    for event in averages:
        if event.key != "everything":
            shares[_part(event.key)] += event.self_cpu_time_total / 1e6 / seconds
    known = sum(share for part, share in shares.items() if part != "seconds")
    shares["outside operators: Python, tokenizer"] = max(0.0, 1 - known)
    return shares


def _part(name: str) -> str:
    def contains(words: Iterable[str]) -> bool:
        return any(word in name for word in words)

    return next((part for part, words in PARTS.items() if contains(words)), "other operators")


if __name__ == "__main__":
    sys.exit(main())
