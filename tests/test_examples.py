"""Every example in its quick form."""

import importlib
from pathlib import Path

import pytest
import torch

FOLDER = Path(__file__).parent.parent / "examples"


@pytest.fixture(autouse=True)
def in_the_folder(monkeypatch, tmp_path):
    monkeypatch.syspath_prepend(str(FOLDER))
    monkeypatch.chdir(tmp_path)
    torch.use_deterministic_algorithms(False)
    yield
    assert not list(tmp_path.iterdir())


def run(name):
    return importlib.import_module(name).main(quick=True)


def test_sentence_transformers_trainer():
    found = run("sentence_transformers_trainer")
    assert found["after"] > found["before"] + 0.2
