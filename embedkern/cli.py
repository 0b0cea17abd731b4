"""The command `embedkern`: doctor, verify, bench and demo."""

from __future__ import annotations

import argparse
import os
import platform
import sys
from pathlib import Path

import torch

from . import _native, verify
from .machine import cpu_name
from .ops.explain import FAMILIES, explain
from .version import __version__


def main(argv: list[str] | None = None) -> int:
    """The exit status: 0 unless something failed."""
    argv = sys.argv[1:] if argv is None else argv
    if argv[:1] == ["demo"]:  # has an argument parser of its own
        from .demo import main as demo

        return demo(argv[1:])
    parser = argparse.ArgumentParser(prog="embedkern", description=__doc__)
    parser.add_argument("--version", action="version", version=__version__)
    commands = parser.add_subparsers(required=True, metavar="command")
    commands.add_parser("doctor", help="versions, devices, and which backends are available").set_defaults(run=doctor)
    one = commands.add_parser("verify", help="accuracy of every operator, dtype and backend against float64")
    one.set_defaults(run=run_verify)
    one = commands.add_parser("bench", help="speed against torch and sentence-transformers, once verify passes")
    one.add_argument("--suite", action="append", choices=(*SUITES, *LONG), help="only this one (repeatable)")
    one.add_argument("--out", type=Path, help="folder for the CSV and the plot")
    one.set_defaults(run=run_bench)
    commands.add_parser("demo", help="fine-tune a real encoder on WordNet (embedkern demo --help)")
    arguments = parser.parse_args(argv)
    return arguments.run(arguments)


SUITES = ("attention", "pooling", "infonce", "encoding", "training")
LONG = ("infonce_large",)  # only where named


def doctor(_: argparse.Namespace) -> int:
    cuda = torch.cuda.get_device_name() if torch.cuda.is_available() else "none"
    print(f"embedkern {__version__}, Python {platform.python_version()}, torch {torch.__version__}")
    print(f"CPU: {cpu_name()}, {torch.get_num_threads()} threads; GPU: {cuda}")
    supported = ", ".join(f"{name} {'yes' if yes else 'no'}" for name, yes in _native.variants().items())
    print(f"CPU kernels: {_native.variant()} in force (this CPU supports: {supported})")
    print(f"CUDA kernels: {'built' if _native.has_cuda else 'not in this build'}")
    x = torch.zeros(1, 1, 1, 8)
    v, wide = x[0, 0, 0], torch.zeros(16, 8)
    block = (x[0, 0], wide[:8], wide, wide[:8], v, v, v, v, v, v, wide, wide[:, 0], wide[:8], v, 1)
    calls = {
        "attention": (x, x, x),
        "attention_varlen": (x[0], x[0], x[0], torch.tensor([0, 1])),
        "info_nce": (x[0, 0], x[0, 0]),
        "latent_attention": (x[0], *block),
        "multi_layer_attention": (x[0], x[0, 0], *block),
        "pool": (x[0],),
    }
    for name in FAMILIES:
        choice, refused = explain(name, *calls[name])
        print(f"{name}: {choice}" + "".join(f"; {other}: {', '.join(why)}" for other, why in refused.items()))
    return 0


def run_verify(_: argparse.Namespace) -> int:
    devices = ["cpu", *(["cuda"] if torch.cuda.is_available() else [])]
    verdicts = [verdict for device in devices for verdict in verify.verify(device)]
    print(f"{'op':<28}{'dtype':<10}{'backend':<10}error as a share of what is allowed")
    for verdict in verdicts:
        mark = "" if verdict.passed else "  FAILED"
        print(f"{verdict.case:<28}{str(verdict.dtype)[6:]:<10}{verdict.backend:<10}{verdict.error:.2f}{mark}")
    failed = sum(not verdict.passed for verdict in verdicts)
    print(
        f"{len(verdicts) - failed} of {len(verdicts)} passed "
        "(allowed: twice torch's own error at that dtype, gradients thrice)"
    )
    return int(failed > 0 or not verdicts)


def run_bench(arguments: argparse.Namespace) -> int:
    from .bench import report

    failed = [v for device in ["cpu"] for v in verify.verify(device) if not v.passed]
    if failed:
        print(
            f"not timing what is wrong: {failed[0].case} {failed[0].dtype} {failed[0].backend} fails embedkern verify"
        )
        return 1
    os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
    return report.run(arguments.suite or SUITES, arguments.out)
