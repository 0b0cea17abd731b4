"""`make gpu-check` where there is no GPU: what it says, how it runs its steps, and its benchmark on the CPU."""

from __future__ import annotations

import json
import sys
import time
from pathlib import Path
from typing import Any

import pytest
import torch

from embedkern.bench import gpu


def test_without_a_gpu(monkeypatch: pytest.MonkeyPatch, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    monkeypatch.setattr(sys, "argv", ["gpu", "--out", str(tmp_path / "out")])
    assert gpu.main() == 0
    assert capsys.readouterr().out == "no GPU that torch can use: nothing was checked\n"
    assert not (tmp_path / "out").exists()


def test_a_step() -> None:
    code = "import os; print(os.environ['OMP_NUM_THREADS']); exit(3)"
    assert gpu._run([sys.executable, "-c", code], 20) == (3, "2\n")
    begin = time.monotonic()
    status, printed = gpu._run([sys.executable, "-uc", "import time; print('begun'); time.sleep(60)"], 1)
    assert time.monotonic() - begin < 30
    assert (status, printed) == (-1, "begun\n\nstopped after 1 s\n")


@pytest.mark.parametrize("failing", [None, "--shard=1/2", "--measure"])
def test_every_step_runs(failing: str | None, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    ran: list[list[str]] = []

    def run(command: list[str], seconds: float) -> tuple[int, str]:
        ran.append(command)
        return int(failing in command), f"printed by {command[-1]}\n"

    monkeypatch.setattr(gpu, "_run", run)
    monkeypatch.setattr(gpu, "SHARDS", 2)
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda: "some GPU")
    monkeypatch.setattr(sys, "argv", ["gpu", "--out", str(tmp_path)])
    assert gpu.main() == int(failing is not None)
    assert len(ran) == 4
    assert {command[-1] for command in ran} >= {"--shard=0/2", "--shard=1/2", str(tmp_path)}
    report = json.loads((tmp_path / "gpu.json").read_text())
    assert report["device"] == "some GPU"
    assert [step["status"] for step in report["steps"].values()] == [
        int(failing == "--shard=1/2"), 0, int(failing == "--measure")
    ]  # fmt: skip
    assert "printed by --shard=1/2" in (tmp_path / "gpu.log").read_text()
    assert sum(gpu.SECONDS.values()) < 600


class Clock:
    """A CUDA event that does nothing."""

    def __init__(self, enable_timing: bool) -> None:
        assert enable_timing

    def record(self) -> None: ...

    def synchronize(self) -> None: ...

    def elapsed_time(self, end: Clock) -> float:
        return 2.0


def test_what_is_measured(monkeypatch: pytest.MonkeyPatch, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    monkeypatch.setattr(gpu, "DEVICE", "cpu")
    monkeypatch.setattr(torch.cuda, "Event", Clock)
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda: "some GPU")
    monkeypatch.setattr(gpu, "FLUSHED", 1)
    attention, latent, loss = gpu.attention_rows, gpu.latent_rows, gpu.loss_rows
    monkeypatch.setattr(gpu, "attention_rows", lambda: attention(64, (32,), (32,)))
    monkeypatch.setattr(gpu, "latent_rows", lambda: latent(64, ((4, 2),)))
    monkeypatch.setattr(gpu, "loss_rows", lambda: loss((32,), 16, 32, compiled=False))
    for name in ("latent_attention", "multi_layer_attention"):
        function: Any = getattr(gpu, name)
        as_here = lambda *x, backend, f=function, **rest: f(*x, backend=backend.replace("triton", "cpu"), **rest)  # noqa: E731
        monkeypatch.setattr(gpu, name, as_here)
    gpu.measure(tmp_path)
    printed = capsys.readouterr().out
    assert "attention runs on cpu\n" in printed
    assert "SDPA CUDNN_ATTENTION, 64 tokens H=12 D=32 L=32 bfloat16: " in printed  # it can't, and says why
    header, *rows = (tmp_path / "gpu.csv").read_text().splitlines()
    assert header.endswith("ratio,goal,unit,device,torch")
    assert [row.split(",")[0] for row in rows] == ["attention-gpu"] * (len(rows) - 5) + ["latent-gpu"] * 2 + [
        "loss-gpu"
    ] * 3
    assert len(rows) >= 5 + 2 * 2  # forward, and forward + backward, against two of SDPA's backends at least
    assert "64 tokens H=12 D=32 L=32 bfloat16: 2 ms, SDPA MATH 2 ms, ratio 1.00" in printed
