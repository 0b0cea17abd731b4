"""The demo from end to end."""

from __future__ import annotations

import argparse
from dataclasses import replace
from pathlib import Path
from typing import Any

from embedkern import _native
from embedkern.transformers import patched

from . import report, wordnet
from .report import say
from .train import ProgressBar, Run, Settings, embedkern_step, load_encoder, load_split, train_peer

INTERRUPTED = 130  # the exit status of a command that Ctrl-C ended
SHORT_STRIDE = 50  # a short run answers from every fiftieth word
SHORT = Settings(steps=2, batch_size=128, held_out=50, pairs=600, chunk_tokens=512, memory_budget=1e7)


def run(args: argparse.Namespace) -> int:
    out, state = args.out, args.out / "unfinished.pt"
    if state.exists() and not (args.resume or args.fresh):
        raise SystemExit(f"{state} is from an interrupted run: --resume continues it, --fresh starts anew")
    if args.resume and not state.exists():
        raise SystemExit(f"there is no interrupted run in {out}")
    out.mkdir(parents=True, exist_ok=True)
    settings = choose(args, Run.saved_settings(state) if args.resume else None)
    if args.fresh:
        state.unlink(missing_ok=True)

    folder = wordnet.find(args.wordnet, out / "wordnet")
    split = load_split(folder, settings)
    words = wordnet.common_words(folder)[:: SHORT_STRIDE if settings.pairs else 1]
    asked = (*report.EXAMPLES, *(args.ask or ()))
    say(f"{len(split.train):,} pairs to train on, {len(split.test):,} held out; {'bf16' if settings.bf16 else 'fp32'}")

    model = load_encoder()
    training = Run(model, split.train, settings)
    data = {
        "train": len(split.train),
        "validation": len(split.validation),
        "test": len(split.test),
        "candidate_words": len(words),
        "fingerprint": training.data,
    }
    with patched(model):
        say("judging the unadapted model …")
        before = report.judge(model, split.test, asked, words)
        if args.resume:
            training.load(state)
        try:
            with ProgressBar(settings, settings.steps, training.history.steps) as bar:
                training.train(embedkern_step(model, settings, bar), bar)
            say("judging the adapted model …")
            after = report.judge(model, split.test, asked, words)
        except KeyboardInterrupt:
            training.save(state)
            after = None

    ours, peer = training.history, None
    model.save_pretrained(str(out / "model"), create_model_card=False)
    write(out, report.figures(settings, data, before, after, ours, peer))
    if after is None:
        say(f"interrupted after {ours.steps} of {settings.steps} steps, saved in {out}: --resume goes on from there")
        return INTERRUPTED
    state.unlink(missing_ok=True)
    report.print_quality(before, after, len(split.test), len(words))
    report.print_training("embedkern", ours, settings)
    print(f"of a step's {settings.batch_size**2:,} combinations, same words or definitions masked: {ours.masked}")

    if args.compare:
        say("\nthe same steps with sentence-transformers' CachedMultipleNegativesRankingLoss …")
        peer = train_peer(folder, settings, min(args.compare_steps or settings.steps, settings.steps))
        write(out, report.figures(settings, data, before, after, ours, peer))
        report.print_training("sentence-transformers", peer, settings)
        report.print_comparison(ours, peer, settings)
    print(f"\nIn {out}: model (a SentenceTransformer), figures.json, curves.png")
    return 0


def choose(args: argparse.Namespace, saved: Settings | None) -> Settings:
    """The settings that the arguments ask for; those that they leave open are the saved run's, or the defaults."""
    base = replace(SHORT if args.short else Settings(), bf16=_native.variants()["avx512_bf16"])
    asked = {
        "steps": args.steps,
        "batch_size": args.batch_size,
        "learning_rate": args.learning_rate,
        "seed": args.seed,
        "memory_budget": args.memory_budget and args.memory_budget * 1e9,
        "bf16": None if args.precision == "auto" else args.precision == "bf16",
        "distinct": args.compare or None,
    }
    return replace(saved or base, **{name: value for name, value in asked.items() if value is not None})


def write(out: Path, figures: dict[str, Any]) -> None:
    report.write_json(figures, out / "figures.json")
    report.write_plot(figures, out / "curves.png")
