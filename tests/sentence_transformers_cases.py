"""A tiny SentenceTransformer with a vocabulary of its own, and texts of it, shared by the tests."""

import random

import pytest
import torch

pytest.importorskip("sentence_transformers", minversion="6")

import transformers
from sentence_transformers import SentenceTransformer
from sentence_transformers.sentence_transformer import modules as their_modules

WORDS = [chr(97 + i) * n for i in range(20) for n in (1, 2)]
ROWS, DIM = 8, 16


@pytest.fixture(autouse=True, scope="module")
def one_thread():
    """The models are tiny: on busy cores their threads only wait for each other."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


def transformer_folder(path, words, width=DIM):
    path.mkdir()
    (path / "vocab.txt").write_text("\n".join(["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]", *words]))
    transformers.BertTokenizerFast(str(path / "vocab.txt")).save_pretrained(path)
    config = transformers.BertConfig(
        vocab_size=len(words) + 5, hidden_size=width, num_hidden_layers=2, num_attention_heads=2, intermediate_size=24,
        max_position_embeddings=40, initializer_range=0.3,
    )  # fmt: skip
    torch.manual_seed(len(words))
    transformers.BertModel(config).save_pretrained(path)
    return str(path)


def sentence_transformer(folder, pooling=their_modules.Pooling, **options):
    transformer = their_modules.Transformer(folder, **options)
    return SentenceTransformer(modules=[transformer, pooling(DIM)], device="cpu")


def texts(columns, seed=0):
    generator = random.Random(seed)
    return [
        [" ".join(generator.choices(WORDS, k=generator.randint(1, 9))) for _ in range(ROWS)] for _ in range(columns)
    ]


def assert_same(ours, theirs, tolerance=1e-5):
    torch.testing.assert_close(ours, theirs, rtol=tolerance, atol=tolerance)
