"""Gradient caching gives the uncached step's gradients: any input, precision and number of processes.

With dropout the uncached step draws other random numbers than the chunks do, so there the comparison is with the same
chunks run in one graph from the same generator state (``one_graph``); without dropout, with the whole batch at once.
"""

from __future__ import annotations

from collections import UserDict
from collections.abc import Callable
from datetime import timedelta
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist
from gradcache_cases import Encoder, Mlp, assert_same, contrastive, gradients, one_graph, pooled, rows, texts
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor, nn

from embedkern.gradcache import GradCache, cached, cat_input_tensor, gather_input_tensor

# ---- equal gradients


@settings(max_examples=60, deadline=None)
@given(data=st.data())
def test_equals_the_same_chunks_in_one_graph(data: st.DataObject) -> None:
    """Any towers, some of them the same module, with dropout; any chunks, budget and order."""
    draw = data.draw
    towers, rows_given, text = draw(st.integers(1, 3)), draw(st.integers(1, 7)), draw(st.booleans())
    size = draw(st.none() | st.integers(1, 8) | st.lists(st.integers(1, 8), min_size=towers, max_size=towers))
    tokens = draw(st.integers(1, 40) if size is None else st.none() | st.integers(1, 40))
    budget = draw(st.sampled_from([None, 0, 3_000, 20_000, 60_000, float("inf")]))
    sort, side = draw(st.booleans()), draw(st.sampled_from(["right", "left"]))
    torch.manual_seed(draw(st.integers(0, 99)))
    dropout = draw(st.sampled_from([0.0, 0.1, 0.5]))
    made = [Encoder(dropout=dropout) if text else Mlp(dropout=dropout, width=8 * (i + 1)) for i in range(towers)]
    models = [made[draw(st.integers(0, i))] for i in range(towers)]
    batches: list[Any] = []
    for tower in range(towers):
        n = rows_given + (draw(st.integers(0, 4)) if tower else 0)  # documents may be more than queries
        lengths = draw(st.lists(st.integers(1, 9), min_size=n, max_size=n)) if text else []
        batches.append(texts(lengths, side, tower) if text else rows(n, tower))

    def loss_fn(*reps: Tensor) -> Tensor:
        return sum(contrastive(reps[0], rep, scale=1.0 + i) for i, rep in enumerate(reps))

    start, sizes = torch.get_rng_state(), size if isinstance(size, list) else [size] * towers
    in_one = zip(models, batches, sizes, strict=True)
    want_loss = loss_fn(*(one_graph(model, batch, each, tokens, sort) for model, batch, each in in_one))
    want_loss.backward()
    want, end = gradients(*dict.fromkeys(models)), torch.get_rng_state()

    cache = GradCache(
        models, size, loss_fn, get_rep_fn=pooled if text else None,
        chunk_tokens=tokens, memory_budget=budget, sort_by_length=sort,
    )  # fmt: skip
    torch.set_rng_state(start)
    loss = cache.cache_step(*batches)
    assert not loss.requires_grad
    torch.testing.assert_close(loss, want_loss.detach(), atol=1e-12, rtol=1e-12)
    assert_same(gradients(*dict.fromkeys(models)), want)
    assert torch.equal(torch.get_rng_state(), end)  # where the first run and the loss left it

    torch.set_rng_state(start)
    loss = cache(*batches)
    torch.rand(3)  # the replay doesn't depend on the generator, nor does it move it
    state = torch.get_rng_state()
    (3 * loss).backward()
    assert_same(gradients(*dict.fromkeys(models)), [3 * w for w in want])
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
