"""Gradient caching runs no chunk more often than needed, keeps to its budget, and says what it can't take."""

from __future__ import annotations

import subprocess
import sys
from typing import Any
from unittest.mock import Mock, call, create_autospec

import pytest
import torch
from gradcache_cases import Encoder, Mlp, contrastive, pooled, rows, texts
from torch import Tensor
from torch.multiprocessing.reductions import StorageWeakRef
from torch.utils._python_dispatch import TorchDispatchMode

from embedkern.gradcache import GradCache
from embedkern.gradcache_functional import get_rng, set_rng

# ---- what is run, and what is held


def test_budget_decides_what_runs_twice() -> None:
    x, counts = rows(12), []
    for budget in (0, 2_500, 4_500, 1e9):
        model = Mlp()
        GradCache([model], 2, lambda rep: rep.sum(), memory_budget=budget).cache_step(x)
        counts.append(model.runs)
    assert counts[0] == 12
    assert counts[-1] == 6
    assert counts == sorted(counts, reverse=True)
    assert len(set(counts)) == 4


class LiveBytes(TorchDispatchMode):
    """Bytes of the storages made in its scope that are still alive, and their peak: no knowledge of graphs."""

    def __init__(self) -> None:
        super().__init__()
        self.made: dict[int, tuple[StorageWeakRef, int]] = {}
        self.peak = 0

    def now(self) -> int:
        self.made = {key: value for key, value in self.made.items() if not value[0].expired()}
        return sum(size for _, size in self.made.values())

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        out = func(*args, **(kwargs or {}))
        for t in out if isinstance(out, (tuple, list)) else [out]:
            if isinstance(t, Tensor):
                storage = t.untyped_storage()
                self.made[storage._cdata] = (StorageWeakRef(storage), storage.nbytes())
        self.peak = max(self.peak, self.now())
        return out


@pytest.mark.parametrize("budget", [0, 12_000, 40_000, 80_000, 120_000, 160_000, 10**9])
def test_budget_holds(budget: int) -> None:
    model, x = Encoder(), texts([9] * 8 + [8, 7, 6, 5] * 2)
    graph, live, held = LiveBytes(), LiveBytes(), []
    with graph:  # what the longest chunk takes, by the same measure
        model(**{k: v[:2] for k, v in x.items()})

    def loss(rep: Tensor) -> Tensor:
        held.extend([live.now(), live.peak])
        live.peak = 0
        return rep.sum()

    model.runs.clear()
    with live:
        GradCache([model], 2, loss, get_rep_fn=pooled, memory_budget=budget).cache_step(x)
    after, peak = held
    kept = 16 - len(model.runs)
    reps, passing = 6_000, 14_000  # bytes: the representations, and a run's own without a graph
    assert after <= budget + reps
    assert peak <= budget + reps + passing
    assert budget != 12_000 or peak < graph.peak
    assert live.peak <= max(budget, graph.peak) + reps + 5_000  # gradients of the parameters
    if budget in (0, 12_000, 10**9):  # 12_000: every chunk tried exceeds it, and is dropped while it runs
        assert kept == (8 if budget == 10**9 else 0)
    else:
        assert 0 < kept < 8
        assert after >= budget - graph.peak  # what fits is kept


def test_budget_is_the_real_peak() -> None:
    """What a process grows by at most, of 180 MB that all graphs would take; a chunk's graph takes 3 MB."""
    code = """
import ctypes, torch
from embedkern import GradCache
ctypes.CDLL("libc.so.6").mallopt(-3, 1 << 15)  # M_MMAP_THRESHOLD: what is freed leaves the process at once
torch.set_num_threads(1)
layer = torch.nn.TransformerEncoderLayer(64, 4, 256, batch_first=True)
x = torch.randn(1024, 32, 64)
def status(name):
    return next(int(line.split()[1]) for line in open("/proc/self/status") if line.startswith(name)) * 1024
for budget in (0, 0, 50e6, 100e6):
    cache = GradCache([lambda x: layer(x).mean(1)], 16, lambda rep: rep.square().sum(), memory_budget=budget)
    open("/proc/self/clear_refs", "w").write("5")
    before = status("VmRSS")
    cache.cache_step(x)
    print(status("VmHWM") - before)
"""
    _, without, small, large = map(float, subprocess.check_output([sys.executable, "-c", code], text=True).split())
    assert without < 10e6
    assert 0.9 * 50e6 < small < 1.1 * 50e6
    assert 0.9 * 100e6 < large < 1.1 * 100e6


def test_frozen_tower_runs_once_without_a_graph() -> None:
    model, frozen = Mlp(), Mlp().requires_grad_(False)
    x, y = rows(6, 1), rows(6, 2)
    modes: list[bool] = []
    frozen.register_forward_hook(lambda *_: modes.append(torch.is_grad_enabled()))
    for budget in (0, 1e9):
        GradCache([model, frozen], 2, contrastive, memory_budget=budget).cache_step(x, y)
    assert modes == [False] * 6
    assert all(p.grad is not None for p in model.parameters())


def test_no_grad_gives_the_loss_alone() -> None:
    model = Mlp()
    with torch.no_grad():
        loss = GradCache([model], 2, lambda rep: rep.sum(), memory_budget=1e9)(rows(6))
    assert not loss.requires_grad
    assert model.runs == 3


def test_chunks_by_tokens() -> None:
    model, x = Encoder(), texts([2, 9, 4, 4, 3, 9, 1, 1])
    GradCache([model], None, lambda rep: rep.sum(), get_rep_fn=pooled, chunk_tokens=10, memory_budget=1e9).cache_step(x)
    assert model.runs == [(1, 9), (1, 9), (2, 4), (4, 3)]
    model.runs.clear()
    cache = GradCache([model], 3, lambda rep: rep.sum(), get_rep_fn=pooled, chunk_tokens=10, sort_by_length=False)
    cache.cache_step(x)
    assert model.runs == [(1, 2), (1, 9), (2, 4), (1, 3), (2, 9), (1, 1)] * 2
    dense = Mlp()
    GradCache([dense], None, lambda rep: rep.sum(), chunk_tokens=18, memory_budget=1e9).cache_step(rows(7))
    assert dense.runs == 3  # three rows of six "tokens"


def test_a_graph_kept_notices_that_parameters_changed() -> None:
    model = Mlp()
    loss = GradCache([model], 2, lambda rep: rep.sum(), memory_budget=1e9)(rows(4))
    with torch.no_grad():
        model.layers[3].weight.mul_(2)
    with pytest.raises(RuntimeError, match="in place"):
        loss.backward()


def test_progress(capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> None:
    GradCache([Mlp()], 2, lambda rep: rep.sum(), show_progress=True).cache_step(rows(6))
    assert "3/3" in capsys.readouterr().err
    monkeypatch.setitem(sys.modules, "tqdm.auto", None)
    with pytest.raises(ImportError, match="tqdm"):
        GradCache([Mlp()], 2, lambda rep: rep.sum(), show_progress=True)


def test_generators_of_devices(monkeypatch: pytest.MonkeyPatch) -> None:
    # Without a device: the calls must fit torch.cuda's signatures and name the device.
    devices, states = [torch.device("cuda", 0), torch.device("cuda", 3)], [torch.tensor([1]), torch.tensor([2])]
    module = Mock(spec=torch.cuda)
    module.get_rng_state = create_autospec(torch.cuda.get_rng_state, side_effect=states)
    module.set_rng_state = create_autospec(torch.cuda.set_rng_state)
    monkeypatch.setattr(torch, "get_device_module", lambda _: module)
    state = get_rng(devices)
    set_rng(state)
    assert [d.type for d, _ in state] == ["cpu", "cuda", "cuda"]
    assert module.set_rng_state.call_args_list == [call(s, d) for s, d in zip(states, devices, strict=True)]


# ---- bad input


@pytest.mark.parametrize(
    ("error", "match", "change"),
    [
        (TypeError, "models", {"models": Mlp()}),
        (ValueError, "models", {"models": []}),
        (ValueError, "chunk_sizes", {"chunk_sizes": [2]}),
        (ValueError, "chunk_sizes", {"chunk_sizes": 0}),
        (TypeError, "chunk_sizes", {"chunk_sizes": 2.5}),
        (TypeError, "chunk_sizes", {"chunk_sizes": True}),
        (ValueError, "chunk_sizes", {"chunk_sizes": None}),
        (ValueError, "chunk_tokens", {"chunk_tokens": 0}),
        (ValueError, "chunk_tokens", {"chunk_tokens": 8, "split_input_fn": lambda x, size: [x]}),
        (ValueError, "chunk_sizes", {"chunk_sizes": None, "split_input_fn": lambda x, size: [x]}),
        (TypeError, "loss_fn", {"loss_fn": None}),
        (TypeError, "get_rep_fn", {"get_rep_fn": 3}),
        (ValueError, "scaler", {"fp16": True}),
        (ValueError, "memory_budget", {"memory_budget": -1}),
        (ValueError, "memory_budget", {"memory_budget": float("nan")}),
        (TypeError, "memory_budget", {"memory_budget": "1GB"}),
    ],
)
def test_bad_construction(error: type[Exception], match: str, change: dict[str, Any]) -> None:
    given = {"models": [Mlp(), Mlp()], "chunk_sizes": 2, "loss_fn": contrastive} | change
    with pytest.raises(error, match=match):
        GradCache(**given)


def test_bad_calls() -> None:
    cache = GradCache([Mlp(), Mlp()], 2, contrastive)
    with pytest.raises(ValueError, match=r"model_inputs.*\(2\), got 1"):
        cache(rows(3))
    with pytest.raises(TypeError, match=r"model_inputs\[1\].*got str"):
        cache(rows(3), "text")
    with pytest.raises(ValueError, match=r"model_inputs\[1\].*\[3, 4\]"):
        cache(rows(3), [rows(3), rows(4)])
    with pytest.raises(ValueError, match="no tensor"):
        cache({}, rows(3))
    with pytest.raises(TypeError, match="no_sync_except_last"):
        cache.cache_step(rows(3), rows(3), no_sync_except_last=True)
    with pytest.raises(TypeError, match=r"get_rep_fn.*dict"):
        GradCache([Encoder()], 2, contrastive)(texts([3, 1]))
    with pytest.raises(ValueError, match="sort_by_length=False"):
        GradCache([Encoder()], 2, contrastive, get_rep_fn=lambda out: pooled(out)[:1])(texts([3, 1, 2, 2]))
    with pytest.raises(TypeError, match="loss_fn"):
        GradCache([Mlp()], 2, lambda rep: (rep.sum(), {})).cache_step(rows(3))
    loss = GradCache([Mlp()], 2, lambda rep: rep.sum())(rows(3).requires_grad_())
    with pytest.raises(NotImplementedError, match="second derivative"):
        loss.backward(create_graph=True)
    x = rows(3).requires_grad_()
    with pytest.raises(NotImplementedError, match=r"\.grad"):
        torch.autograd.grad(GradCache([Mlp()], 2, lambda rep: rep.sum())(x), x)
