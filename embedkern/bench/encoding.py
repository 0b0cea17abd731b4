"""Encoding real texts with all-MiniLM-L6-v2: a patched model against sentence-transformers' `encode`."""

from __future__ import annotations

import inspect
from collections.abc import Callable, Iterator
from typing import Any

import torch

from ..demo import train, wordnet
from ..transformers import patch
from .harness import Row, interleave
from .training import CACHE

ROUNDS = 3
BATCH_SIZES = (16, 32, 128)  # 32 is encode's default


def texts() -> dict[str, list[str]]:
    """WordNet's definitions, and torch's long docstrings, most of them cut off at 256 tokens."""
    pairs = wordnet.read_pairs(wordnet.find(None, CACHE))
    names = [getattr(module, name) for module in (torch, torch.nn, torch.nn.functional) for name in dir(module)]
    docstrings = {text for named in names if len(text := inspect.getdoc(named) or "") > 600}
    return {"short": [pair.definition for pair in pairs[:: len(pairs) // 600]], "long": sorted(docstrings)[:64]}


def rows() -> Iterator[Row]:
    ours = patch(train.load_encoder())
    theirs: dict[str, Any] = {name: train.load_encoder() for name in ("sdpa", "eager")}
    for name, model in theirs.items():
        model[0].model.set_attn_implementation(name)
    for length, goal in (("short", "≥ 1.2"), ("long", "≥ 1.1")):
        chosen = texts()[length]
        candidates = {f"ours, batch {size}": _encode(ours, chosen, size) for size in BATCH_SIZES}
        candidates |= {f"sdpa, batch {size}": _encode(theirs["sdpa"], chosen, size) for size in BATCH_SIZES}
        candidates["eager, batch 32"] = _encode(theirs["eager"], chosen, 32)
        seconds = {name: min(times) for name, times in interleave(candidates, ROUNDS, warmup=0).items()}
        fastest = min((name for name in seconds if name.startswith("ours")), key=seconds.__getitem__)
        best = min((name for name in seconds if not name.startswith("ours")), key=seconds.__getitem__)
        work = f"encode, MiniLM, {len(chosen)} {length} texts"
        for one, peer, what, wanted in (
            (fastest, "sdpa, batch 32", "sentence-transformers' encode, defaults", "≥ 1.5"),
            (fastest, best, f"its best ({best})", goal),
            ("ours, batch 32", "sdpa, batch 32", "sentence-transformers' encode, the same batch", goal),
        ):
            a, b = seconds[one], seconds[peer]
            yield Row("encoding", f"{work}, {one}", what, a, b, b / a, wanted, unit="s")


def _encode(model: Any, chosen: list[str], batch_size: int) -> Callable[[], object]:
    return lambda: model.encode(chosen, batch_size=batch_size, show_progress_bar=False)
