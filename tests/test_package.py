"""The package as a whole: the operator table, the command line, the README's example, what the sources may contain."""

from __future__ import annotations

import re
import subprocess
import sys
from pathlib import Path

import pytest
import torch

import embedkern as ek
from embedkern import _native, cli, nn
from embedkern.bench import harness, report
from embedkern.schema import OPERATORS, PYTHON_OPERATORS, check_kernels

ROOT = Path(__file__).resolve().parent.parent


@pytest.mark.parametrize(
    ("right", "wrong"),
    [("Tensor hidden", "Tensor? hidden"), ("float eps", "int eps"), ("int[] modes", "float[] modes"),
     ("bool normalize", "int normalize"), ("-> (Tensor out, Tensor pooled, Tensor argmax)", "-> Tensor")],
)  # fmt: skip
def test_a_kernel_that_differs_from_its_row_is_refused(right: str, wrong: str) -> None:
    signature, fake = OPERATORS["pool_forward"]
    assert right in signature
    operators = {**OPERATORS, "pool_forward": (signature.replace(right, wrong), fake)}
    with pytest.raises(TypeError, match="pool_forward: schema.py says"):
        check_kernels(_native.kernels(), operators)


def test_every_kernel_has_a_row_and_every_row_a_kernel() -> None:
    assert {name for name, _ in _native.kernels()} == set(OPERATORS)
    for name in PYTHON_OPERATORS:
        assert torch._C._dispatch_has_kernel_for_dispatch_key(f"embedkern::{name}", "CompositeExplicitAutograd")


def test_unknown_variant() -> None:
    with pytest.raises(ValueError, match="no variant 'avx9'"):
        _native.force_variant("avx9")


def test_doctor_and_verify(capsys: pytest.CaptureFixture[str]) -> None:
    assert cli.main(["doctor"]) == 0
    assert "pool: cpu" in capsys.readouterr().out
    assert cli.main(["verify"]) == 0
    printed = capsys.readouterr().out
    assert "pool mean" in printed
    assert "FAILED" not in printed


def test_verify_notices_a_wrong_kernel(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    right = ek.verify.pool
    wrong = lambda h, m, **options: right(h, m, **options) * (1 + 1e-3 * (options["backend"] == "cpu"))  # noqa: E731
    monkeypatch.setattr(ek.verify, "pool", wrong)
    assert cli.main(["verify"]) == 1
    assert "FAILED" in capsys.readouterr().out
    assert cli.main(["bench"]) == 1
    assert "not timing what is wrong: pool" in capsys.readouterr().out


def test_bench_report(tmp_path: Path) -> None:
    row = harness.versus(
        "pooling", "a sum", lambda: sum(range(10)), lambda: sum(range(20)), "a longer sum", "≥ 1", rounds=3
    )
    assert row.ours > 0
    report.write([row, row], tmp_path)
    lines = (tmp_path / "bench.csv").read_text().splitlines()
    assert lines[0].startswith("suite,work,against,ours,peer,ratio,goal,unit,machine")
    assert len(lines) == 3
    assert (tmp_path / "bench.png").stat().st_size > 1000


def test_nn_pooling() -> None:
    x = torch.randn(2, 5, 8)
    module = nn.Pooling(("mean", "cls"), truncate_dim=10, normalize=True)
    lengths = torch.tensor([3, 5])
    wanted = ek.pool(x, ("mean", "cls"), truncate_dim=10, normalize=True, lengths=lengths)
    assert torch.equal(module(x, lengths=lengths), wanted)
    assert "truncate_dim=10" in repr(module)
    with pytest.raises(ValueError, match="mode must be one of"):
        nn.Pooling("average")


def test_examples_run_as_pasted() -> None:
    pages = [ROOT / "README.md", *sorted((ROOT / "docs").glob("*.md"))]
    blocks = [block for page in pages for block in re.findall(r"```python\n(.*?)```", page.read_text(), re.S)]
    offline = [block for block in blocks if "MiniLM" not in block]  # the others fetch a model
    assert len(offline) >= 8
    # in one process: imports take long
    code = "import sys\nfor block in sys.stdin.read().split(chr(0)):\n    exec(block, {})"
    subprocess.run([sys.executable, "-c", code], input="\0".join(offline), text=True, check=True, timeout=300, cwd=ROOT)


def test_importing_needs_neither_transformers_nor_triton() -> None:
    code = (
        "import sys\nfor name in ('transformers', 'sentence_transformers', 'triton', 'matplotlib', 'tqdm'):\n"
        "    sys.modules[name] = None\nimport embedkern\nassert 'pool' in dir(embedkern)\nembedkern.nn.Pooling()"
    )
    subprocess.run([sys.executable, "-c", code], check=True)
