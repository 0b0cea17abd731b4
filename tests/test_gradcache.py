"""Gradient caching gives the uncached step's gradients, runs no chunk more often than needed, and keeps to its budget.

With dropout the uncached step draws other random numbers than the chunks do, so there the comparison is with the same
chunks run in one graph from the same generator state (``one_graph``); without dropout, with the whole batch at once.
"""

from __future__ import annotations

import sys
from collections import UserDict
from collections.abc import Callable
from datetime import timedelta
from pathlib import Path
from typing import Any
from unittest.mock import Mock, call, create_autospec

import pytest
import torch
import torch.distributed as dist
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor, nn
from torch.multiprocessing.reductions import StorageWeakRef
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils.checkpoint import checkpoint

from embedkern.gradcache import GradCache, cached, cat_input_tensor, gather_input_tensor
from embedkern.gradcache_functional import get_rng, set_rng


class Encoder(nn.Module):
    """A transformer layer and a masked mean, in a nested output."""

    def __init__(self, positions: bool = False, dropout: float = 0.2, dtype: torch.dtype = torch.float64) -> None:
        super().__init__()
        self.embed = nn.Embedding(50, 8, dtype=dtype)
        if positions:
            self.position_embeddings = nn.Embedding(32, 8, dtype=dtype)
        self.layer = nn.TransformerEncoderLayer(8, 2, 16, dropout=dropout, batch_first=True, dtype=dtype)
        self.positions, self.checkpointed = positions, ""
        self.runs: list[tuple[int, ...]] = []

    def forward(self, input_ids: Tensor, attention_mask: Tensor, position_ids: Tensor | None = None) -> Any:
        self.runs.append(tuple(input_ids.shape))
        x = self.embed(input_ids)
        if self.positions:
            columns = torch.arange(input_ids.shape[1]).expand_as(input_ids)
            x = x + self.position_embeddings(columns if position_ids is None else position_ids)
        hide = attention_mask == 0
        if self.checkpointed:
            x = checkpoint(self.layer, x, None, hide, use_reentrant=self.checkpointed == "reentrant")
        else:
            x = self.layer(x, src_key_padding_mask=hide)
        mask = attention_mask.unsqueeze(-1).to(x.dtype)
        return {"tokens": x, "pooled": ((x * mask).sum(1) / mask.sum(1).clamp(min=1),)}


class Mlp(nn.Module):
    def __init__(self, dtype: torch.dtype = torch.float64, dropout: float = 0.3) -> None:
        super().__init__()
        self.layers = nn.Sequential(
            nn.Linear(6, 16), nn.GELU(), nn.Dropout(dropout), nn.Linear(16, 16), nn.Tanh(), nn.Linear(16, 5)
        ).to(dtype)
        self.runs = 0

    def forward(self, x: Tensor, scale: Tensor | float = 1.0) -> Tensor:
        self.runs += 1
        return self.layers(x) * scale


def pooled(out: Any) -> Tensor:
    return out["pooled"][0]


def contrastive(queries: Tensor, documents: Tensor, scale: float = 2.0) -> Tensor:
    scores = scale * queries @ documents.T
    return nn.functional.cross_entropy(scores, torch.arange(len(queries)))


def texts(lengths: list[int], side: str = "right", seed: int = 0) -> dict[str, Tensor]:
    generator = torch.Generator().manual_seed(seed)
    width = max(lengths) + 1  # one column that nobody needs
    ids = torch.randint(1, 50, (len(lengths), width), generator=generator)
    column = torch.arange(width)
    real = torch.tensor(lengths).unsqueeze(1)
    mask = column < real if side == "right" else column >= width - real
    return {"input_ids": ids * mask, "attention_mask": mask.long()}


def rows(n: int, seed: int = 0, dtype: torch.dtype = torch.float64) -> Tensor:
    return torch.randn(n, 6, generator=torch.Generator().manual_seed(seed), dtype=torch.float64).to(dtype)


def gradients(*modules: nn.Module) -> list[Tensor]:
    grads = [p.grad.clone() for m in modules for p in m.parameters() if p.grad is not None]
    for module in modules:
        module.zero_grad()
    return grads


def assert_same(got: list[Tensor], want: list[Tensor], tol: float = 1e-10) -> None:
    assert len(got) == len(want)
    assert want
    for g, w in zip(got, want, strict=True):
        torch.testing.assert_close(g, w, atol=tol, rtol=tol)


def one_graph(model: nn.Module, batch: Any, size: int | None, tokens: int | None = None, sort: bool = True) -> Tensor:
    """The representations of the same chunks in one graph: a second, naive way of cutting them."""
    n = len(batch) if isinstance(batch, Tensor) else len(batch["input_ids"])
    mask = None if isinstance(batch, Tensor) else batch["attention_mask"]
    lengths = [batch.shape[1]] * n if mask is None else mask.sum(1).tolist()
    order = sorted(range(n), key=lambda row: (-lengths[row], row)) if sort else list(range(n))
    chunks: list[list[int]] = [[]]
    for row in order:
        too_long = tokens is not None and sum(lengths[r] for r in [*chunks[-1], row]) > tokens
        if chunks[-1] and (len(chunks[-1]) == size or too_long):
            chunks.append([])
        chunks[-1].append(row)
    reps: list[Any] = [None] * n
    for chunk in chunks:
        if mask is None:
            out = model(batch[chunk])
        else:
            used = mask[chunk].any(0).nonzero().flatten().tolist() or [0]
            out = pooled(model(**{k: v[chunk][:, used[0] : used[-1] + 1] for k, v in batch.items()}))
        for row, rep in zip(chunk, out, strict=True):
            reps[row] = rep
    return torch.stack(reps)


# ---- equal gradients


@settings(max_examples=40, deadline=None)
@given(data=st.data())
def test_equals_the_same_chunks_in_one_graph(data: st.DataObject) -> None:
    n, m = data.draw(st.integers(1, 7)), data.draw(st.integers(0, 4))
    size = data.draw(st.none() | st.integers(1, 8))
    tokens = data.draw(st.integers(1, 40) if size is None else st.none() | st.integers(1, 40))
    budget = data.draw(st.sampled_from([None, 0, 3_000, 20_000, 60_000, float("inf")]))
    sort, shared, text = data.draw(st.booleans()), data.draw(st.booleans()), data.draw(st.booleans())
    side = data.draw(st.sampled_from(["right", "left"]))
    torch.manual_seed(data.draw(st.integers(0, 99)))
    if text:
        lengths = st.lists(st.integers(1, 9), min_size=n, max_size=n)
        x = texts(data.draw(lengths), side, 1)
        y = texts(data.draw(lengths) + [3] * m, side, 2)
        towers = [Encoder(), Encoder()]
    else:
        x, y, towers = rows(n, 1), rows(n + m, 2), [Mlp(), Mlp()]
    towers = [towers[0], towers[0]] if shared else towers
    start = torch.get_rng_state()
    want_loss = contrastive(*(one_graph(t, v, size, tokens, sort) for t, v in zip(towers, (x, y), strict=True)))
    want_loss.backward()
    want, end = gradients(*towers), torch.get_rng_state()

    cache = GradCache(
        towers, size, contrastive, get_rep_fn=pooled if text else None,
        chunk_tokens=tokens, memory_budget=budget, sort_by_length=sort,
    )  # fmt: skip
    torch.set_rng_state(start)
    loss = cache.cache_step(x, y)
    assert not loss.requires_grad
    torch.testing.assert_close(loss, want_loss.detach(), atol=1e-12, rtol=1e-12)
    assert_same(gradients(*towers), want)
    assert torch.equal(torch.get_rng_state(), end)  # where the first run and the loss left it

    torch.set_rng_state(start)
    loss = cache(x, y)
    torch.rand(3)  # the replay doesn't depend on the generator, nor does it move it
    state = torch.get_rng_state()
    (3 * loss).backward()
    assert_same(gradients(*towers), [3 * w for w in want])
    assert torch.equal(torch.get_rng_state(), state)


@pytest.mark.parametrize("side", ["right", "left"])
@pytest.mark.parametrize("positions", [False, True])
@pytest.mark.parametrize("tokens", [None, 12])
def test_equals_the_whole_batch_without_dropout(side: str, positions: bool, tokens: int | None) -> None:
    model = Encoder(positions, dropout=0.0)
    x, y = texts([3, 9, 1, 5, 7], side, 1), texts([2, 2, 8, 4, 6, 9, 1], side, 2)
    contrastive(pooled(model(**x)), pooled(model(**y)), scale=5.0).backward()
    want = gradients(model)
    model.runs.clear()
    GradCache([model, model], 2, contrastive, get_rep_fn=pooled, chunk_tokens=tokens).cache_step(x, y, scale=5.0)
    assert_same(gradients(model), want)
    widths = {width for _, width in model.runs}
    if positions and side == "left":  # there a column's number is its position
        assert widths == {10}
    else:
        assert widths >= {1, 9}
        assert 10 not in widths


def test_position_ids_allow_trimming_on_the_left() -> None:
    model = Encoder(positions=True, dropout=0.0)
    x = texts([3, 9, 1, 5], "left")
    x["position_ids"] = (x["attention_mask"].cumsum(1) - 1).clamp(min=0)
    contrastive(*[pooled(model(**x))] * 2).backward()
    want = gradients(model)
    model.runs.clear()
    GradCache([model], 2, lambda q: contrastive(q, q), get_rep_fn=pooled).cache_step(x)
    assert_same(gradients(model), want)
    assert model.runs == [(2, 9), (2, 3)] * 2


def test_token_representations_are_filled_up_where_trimmed() -> None:
    model = Encoder(dropout=0.0)
    x = texts([3, 9, 1, 5], "left")

    def loss(tokens: Tensor) -> Tensor:
        return (tokens * x["attention_mask"].unsqueeze(-1)).sin().sum()

    loss(model(**x)["tokens"]).backward()
    want = gradients(model)
    GradCache([model], 2, loss, get_rep_fn=lambda out: out["tokens"]).cache_step(x)
    assert_same(gradients(model), want)


@pytest.mark.parametrize("kind", ["list", "dict", "UserDict", "args and kwargs", "nested", "split_input_fn"])
def test_input_types(kind: str) -> None:
    model, x, scale = Mlp(dropout=0.0), rows(7), torch.rand(7, 1, dtype=torch.float64)
    model(x, scale).cos().sum().backward()
    want = gradients(model)
    split, tower = None, model
    if kind == "nested":
        tower = lambda inputs, scale: model(inputs["x"][0], scale)  # noqa: E731  any callable is a tower
    if kind == "split_input_fn":
        split = lambda given, size: [[t[i : i + size] for t in given] for i in range(0, 7, size)]  # noqa: E731
    given = {
        "list": [x, scale],
        "dict": {"x": x, "scale": scale},
        "UserDict": UserDict(x=x, scale=scale),
        "args and kwargs": ([x], {"scale": scale}),
        "nested": ([{"x": (x,), "task": "query"}], {"scale": scale}),
        "split_input_fn": (x, scale),
    }[kind]
    if kind == "split_input_fn":
        given = [x, scale]
    GradCache([tower], [3], lambda rep: rep.cos().sum(), split).cache_step(given)
    assert_same(gradients(model), want)


@pytest.mark.parametrize("side", ["left", "right"])
def test_empty_texts_and_an_empty_batch(side: str) -> None:
    model, x = nn.Embedding(50, 4, dtype=torch.float64), texts([0, 3, 0, 0, 2], side)

    def embed(input_ids: Tensor, attention_mask: Tensor) -> Tensor:
        return (model(input_ids) * attention_mask.unsqueeze(-1)).sum(1)

    embed(**x).sin().sum().backward()
    want = gradients(model)
    for part in (x, {k: v[:0] for k, v in x.items()}):
        GradCache([embed], 2, lambda rep: rep.sin().sum(), chunk_tokens=4).cache_step(part)
        assert_same(gradients(model), want)
        want = [torch.zeros_like(w) for w in want]


def test_inputs_and_loss_parameters_get_gradients() -> None:
    model, factor = Mlp(dropout=0.0), torch.tensor(1.5, dtype=torch.float64, requires_grad=True)
    base = rows(5).requires_grad_()

    def loss(rep: Tensor) -> Tensor:
        return (rep * factor).sin().sum()

    (loss(model(base * 2)) + base.sum()).backward()
    want = [*gradients(model), base.grad, factor.grad]
    base.grad = factor.grad = None
    for budget in (0, float("inf")):
        (GradCache([model], 2, loss, memory_budget=budget)(base * 2) + base.sum()).backward()
        assert_same([*gradients(model), base.grad, factor.grad], want)
        base.grad = factor.grad = None


def test_backward_twice_and_unused_towers() -> None:
    model, other = Mlp(), Mlp()
    x = rows(5).requires_grad_()
    cache = GradCache([model, other], 2, lambda a, b: a.sin().sum(), memory_budget=float("inf"))
    loss = cache(x, rows(5))
    loss.backward(retain_graph=True)
    first, x.grad = [*gradients(model), x.grad], None
    loss.backward()  # the graphs kept are gone: replayed
    assert_same([*gradients(model), x.grad], first)
    assert all(p.grad is None for p in other.parameters())


@pytest.mark.parametrize("budget", [0, float("inf")])
@pytest.mark.parametrize("kind", ["reentrant", "saved hooks"])
def test_activation_checkpointing(kind: str, budget: float) -> None:
    model, x = Encoder(), texts([3, 9, 1, 5, 7])
    torch.manual_seed(3)
    contrastive(*[one_graph(model, x, 2)] * 2).backward()
    want = gradients(model)
    model.checkpointed = kind
    torch.manual_seed(3)
    cache = GradCache([model], 2, lambda q: contrastive(q, q), get_rep_fn=pooled, memory_budget=budget)
    cache.cache_step(x)
    assert_same(gradients(model), want)


# ---- mixed precision


@pytest.mark.parametrize("budget", [0, 1_500, float("inf")])
@pytest.mark.parametrize("inside", [False, True])
def test_autocast(inside: bool, budget: float) -> None:
    model, x = Mlp(torch.float32), rows(9, dtype=torch.float32)
    seen: list[torch.dtype] = []
    model.register_forward_hook(lambda _m, _a, out: seen.append(out.dtype))
    tower = torch.autocast("cpu", torch.bfloat16)(model.forward) if inside else model

    def step(reps: Callable[[Tensor], Tensor]) -> Tensor:
        torch.manual_seed(1)
        if inside:
            return reps(x)
        with torch.autocast("cpu", torch.bfloat16):
            return reps(x)

    step(lambda x: torch.cat([tower(part) for part in x.split(2)]).float().sin().sum()).backward()
    want = gradients(model)
    cache = GradCache([tower], 2, lambda rep: rep.float().sin().sum(), memory_budget=budget)
    step(cache).backward()  # outside autocast, as usual
    assert_same(gradients(model), want, 3e-2)  # one_graph adds the weights' gradients in bfloat16, the cache in float32
    assert set(seen) <= {torch.bfloat16}


def test_autocast_replays_the_same_numbers() -> None:
    model, x = Mlp(torch.float32), rows(4, dtype=torch.float32)
    outs: list[Tensor] = []
    model.register_forward_hook(lambda _m, _a, out: outs.append(out.detach()))
    with torch.autocast("cpu", torch.bfloat16):
        loss = GradCache([model], 2, lambda rep: rep.float().sum())(x)
    loss.backward()
    assert outs[0].dtype == torch.bfloat16
    assert all(torch.equal(first, again) for first, again in zip(outs[:2], outs[2:], strict=True))


@pytest.mark.parametrize("budget", [0, 1_500, float("inf")])
def test_a_whole_step_under_autocast(budget: float) -> None:
    # Weights that autocast cast and cached without a graph, in the first run, must not serve the replay.
    model, x = Mlp(torch.float32), rows(9, dtype=torch.float32)
    cache = GradCache([model], 2, lambda rep: rep.float().sin().sum(), memory_budget=budget)
    torch.manual_seed(1)
    with torch.autocast("cpu", torch.bfloat16):
        loss = cache(x)
    loss.backward()
    want = gradients(model)
    torch.manual_seed(1)
    with torch.autocast("cpu", torch.bfloat16):
        cache.cache_step(x)
    assert_same(gradients(model), want, 1e-6)


@pytest.mark.parametrize("how", ["fp16", "backward"])
def test_grad_scaler(how: str) -> None:
    model, x = Mlp(torch.float32, dropout=0.0), rows(8, dtype=torch.float32)
    scaler = torch.amp.GradScaler("cpu", init_scale=2.0**10)

    def loss(rep: Tensor) -> Tensor:
        return rep.float().sin().sum() * 1e-4

    with torch.autocast("cpu", torch.float16):
        want_loss = loss(model(x))
    scaler.scale(want_loss).backward()
    want = gradients(model)
    if how == "fp16":
        got_loss = GradCache([model], 3, loss, fp16=True, scaler=scaler).cache_step(x)
    else:
        with torch.autocast("cpu", torch.float16):
            got_loss = GradCache([model], 3, loss)(x)
        scaler.scale(got_loss).backward()
    torch.testing.assert_close(got_loss.detach(), want_loss.detach(), rtol=1e-3, atol=1e-6)
    optimizer = torch.optim.SGD(model.parameters(), 1.0)
    scaler.unscale_(optimizer)
    assert_same([p.grad for p in model.parameters()], [w / 2.0**10 for w in want], 2e-3)
    scaler.step(optimizer)
    scaler.update()


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


# ---- luyug's functional form


def test_functional_form() -> None:
    model = Mlp()
    parts = [rows(2, seed) for seed in range(3)]
    torch.manual_seed(5)
    contrastive(*[torch.cat([model(part) for part in parts])] * 2, scale=3.0).backward()
    want = gradients(model)
    torch.manual_seed(5)
    embed = cached(lambda m, x: m(x))
    leaves, replays = zip(*(embed(model, part) for part in parts), strict=True)
    cat_input_tensor(contrastive)(list(leaves), documents=list(leaves), scale=3.0).backward()
    state = torch.get_rng_state()
    for replay, leaf in zip(replays, leaves, strict=True):
        replay(leaf)
    assert torch.equal(torch.get_rng_state(), state)
    assert_same(gradients(model), want)


# ---- several processes


def _step_of_rank(rank: int, world: int, kind: str, budget: float, steps: int) -> None:
    torch.manual_seed(0)
    alone, tower = Encoder(dropout=0.0), Encoder(dropout=0.0)
    other_alone, other = Mlp(dropout=0.0), Mlp(dropout=0.0)
    tower.load_state_dict(alone.state_dict())
    other.load_state_dict(other_alone.state_dict())
    x, y, z = texts([9, 8, 7, 9, 1, 1, 1, 1], seed=1), texts([1, 2, 3, 9, 9, 9, 9, 9], seed=2), rows(8)

    def loss(a: Tensor, b: Tensor, c: Tensor) -> Tensor:
        return contrastive(a, b) + c.sin().mean() * a.cos().mean()

    reduced: list[int] = []
    if kind == "ddp":
        tower, other = nn.parallel.DistributedDataParallel(tower), nn.parallel.DistributedDataParallel(other)

        def hook(_, bucket):  # type: ignore[no-untyped-def]  # DDP reads annotations, and strings are not to its taste
            reduced.append(bucket.index())
            whole = dist.all_reduce(bucket.buffer().div_(world), async_op=True).get_future()
            return whole.then(lambda done: done.value()[0])

        tower.register_comm_hook(None, hook)
        other.register_comm_hook(None, hook)
    else:
        from torch.distributed.fsdp import fully_shard

        fully_shard(tower.layer)
        fully_shard(tower)
        fully_shard(other)
    # One rank has a chunk a tower, the other several; FSDP can't have that.
    tokens = None if kind == "fsdp" else (100, 9)[rank]
    everywhere = gather_input_tensor(loss)
    cache = GradCache(
        [tower, other, tower],
        2 if kind == "fsdp" else 4,
        lambda a, c, b: everywhere(a, b, c) * world,
        get_rep_fn=lambda out: out if isinstance(out, Tensor) else pooled(out),
        chunk_tokens=tokens,
        memory_budget=budget,
    )
    per_rank = slice(rank * 8 // world, (rank + 1) * 8 // world)
    mine = [{k: v[per_rank] for k, v in x.items()}, z[per_rank], {k: v[per_rank] for k, v in y.items()}]
    for _ in range(steps):
        loss(pooled(alone(**x)), pooled(alone(**y)), other_alone(z)).backward()
        want = gradients(alone, other_alone)
        reduced.clear()
        value = cache.cache_step(*mine, no_sync_except_last=kind == "ddp")
        assert value.isfinite()
        params = [*tower.parameters(), *other.parameters()]
        got = [p.grad.full_tensor() if hasattr(p.grad, "full_tensor") else p.grad for p in params]
        assert_same(got, want)
        assert kind != "ddp" or reduced == [0, 0], reduced  # once for each of the two modules
        tower.zero_grad()
        other.zero_grad()


def _rank(rank: int, world: int, store: str) -> None:
    torch.set_num_threads(1)
    limit = timedelta(seconds=60)  # ranks that disagree wait for each other
    dist.init_process_group("gloo", init_method=f"file://{store}", rank=rank, world_size=world, timeout=limit)
    try:
        _step_of_rank(rank, world, "ddp", 0, steps=1)
        _step_of_rank(rank, world, "ddp", 60_000, steps=3)  # DDP regroups its buckets in the second
        _step_of_rank(rank, world, "fsdp", 0, steps=2)
        if world > 1:
            with pytest.raises(NotImplementedError, match="FSDP"):
                _step_of_rank(rank, world, "fsdp", 1, steps=1)
        else:
            _step_of_rank(rank, world, "fsdp", 60_000, steps=1)
            _step_of_rank(rank, world, "fsdp", float("inf"), steps=2)
        dist.barrier()
    finally:
        dist.destroy_process_group()


@pytest.mark.parametrize("world", [1, 2])
def test_ddp_and_fsdp(world: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("GLOO_SOCKET_IFNAME", "lo")
    if world == 1:
        _rank(0, 1, str(tmp_path / "store"))
    else:
        torch.multiprocessing.spawn(_rank, (world, str(tmp_path / "store")), nprocs=world)
