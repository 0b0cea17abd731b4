"""The kernels' values, forward and every gradient, against float64. The interpreter's bfloat16 is wrong."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from accuracy import assert_accurate
from cuda_graph import replayed
from torch import Tensor

import embedkern as ek
from embedkern.backends.triton import attention
from embedkern.backends.triton.launcher import DEVICE, INTERPRETED
from embedkern.reference import attention as reference

NAN, INF = float("nan"), float("inf")
SEED = 123456789012345
NAMES = ("query", "key", "value", "bias", "relative_bias", "temperature", "scale")
DTYPES = (torch.float16,) if INTERPRETED else (torch.float16, torch.bfloat16)


def rand(*shape: int, low: float = 0.0) -> Tensor:
    return torch.rand(shape, device=DEVICE) + low


def randn(*shape: int) -> Tensor:
    return torch.randn(shape, device=DEVICE)


def inputs(
    batch: int, heads: int, kv_heads: int, len_q: int, len_k: int, dim: int, dim_v: int, dtype: torch.dtype
) -> list[Tensor]:
    """Transposed views of (B, L, H, D)."""
    shapes = ((len_q, heads, dim), (len_k, kv_heads, dim), (len_k, kv_heads, dim_v))
    return [randn(batch, *shape).to(dtype).transpose(1, 2) for shape in shapes]


def packed(tokens_q: int, tokens_k: int, heads: int, kv_heads: int, dim: int, dtype: torch.dtype) -> list[Tensor]:
    shapes = ((tokens_q, heads), (tokens_k, kv_heads), (tokens_k, kv_heads))
    return [randn(*shape, dim).to(dtype) for shape in shapes]


def upstream(out: Tensor) -> Tensor:
    x = torch.linspace(-1, 1, out.numel(), dtype=torch.float64, device=DEVICE)
    return x.sin().reshape(out.shape).to(out.dtype)


def seed() -> Tensor:
    return torch.tensor(SEED, device=DEVICE)


def ours(
    tensors: list[Tensor], lse_gradient: float, options: dict[str, Any], upstream: Any = upstream
) -> dict[str, Tensor]:
    """out, lse and the gradients of all tensors in NAMES."""
    query, key, value = tensors
    given = dict(zip(NAMES, tensors, strict=False)) | options
    window = options.get("window") or (-1, -1)
    arguments = [options.get(name) for name in ("key_lengths", "key_mask", "cu_seqlens_q", "cu_seqlens_k", "mask")]
    arguments += [options.get("bias"), options.get("relative_bias")]
    for name, number in (("temperature", 1.0), ("scale", query.shape[-1] ** -0.5)):
        x = options.get(name, number)
        arguments += [x, 1.0] if isinstance(x, Tensor) else [None, x]
    arguments += [options.get("causal", False), *window, options.get("softcap", 0.0), options.get("dropout_p", 0.0)]
    arguments.append(seed() if "dropout_p" in options else None)
    out, lse, statistics = attention.forward(query, key, value, *arguments)
    saved = (out, statistics) if statistics.numel() else (None, None)
    d_lse = torch.where(lse == -INF, 0, lse_gradient) if lse_gradient else None
    needs = [isinstance(given.get(name), Tensor) for name in NAMES]
    found = attention.backward(upstream(out), d_lse, *saved, query, key, value, *arguments, *needs)
    gradients = {name: x for name, x, need in zip(NAMES, found, needs, strict=True) if need}
    assert all(x.numel() == 0 for x, need in zip(found, needs, strict=True) if not need)
    return {"out": out, "lse": lse, **gradients}


def torchs(tensors: list[Tensor], lse_gradient: float, options: dict[str, Any], dtype: torch.dtype | None) -> Any:
    """The same from the reference, at `dtype` or at the tensors' own."""
    call: dict[str, Any] = dict(zip(NAMES, tensors, strict=False)) | options
    for name, x in call.items():
        if isinstance(x, Tensor) and x.is_floating_point():
            call[name] = x.detach().to(dtype or x.dtype).requires_grad_()
    function = reference.attention_varlen if "cu_seqlens_q" in options else reference.attention
    out, lse = function(**call, seed=seed())
    loss = (out * upstream(out)).sum() + torch.where(lse == -INF, 0, lse).sum() * lse_gradient
    leaves = {name: call[name] for name in NAMES if isinstance(call.get(name), Tensor)}
    gradients = torch.autograd.grad(loss, list(leaves.values()))
    return {"out": out.detach(), "lse": lse.detach(), **dict(zip(leaves, gradients, strict=True))}


def check(tensors: list[Tensor], lse_gradient: float = 0.3, **options: Any) -> None:
    got, exact = ours(tensors, lse_gradient, options), torchs(tensors, lse_gradient, options, torch.float64)
    theirs = torchs(tensors, lse_gradient, options, None)
    for name, x in got.items():
        wanted, peer = exact[name], theirs[name]
        if name == "lse":
            assert torch.equal(x == -INF, wanted == -INF)
            x, wanted, peer = (torch.where(y == -INF, 0, y) for y in (x, wanted, peer))
        factor = 2.0 if name in ("out", "lse") else 3.0
        if x.numel() < 200:
            factor *= 3  # a handful of values: torch may come out exact by chance
        assert_accurate(x.to(peer.dtype), wanted, peer, factor, f"{name} with {list(options)}")


SHAPES = [  # B, Hq, Hkv, Lq, Lk, D, Dv: from one tile of keys to several, in forward and backward
    ((2, 2, 2, 1, 1, 8, 8), torch.float32),
    ((2, 3, 3, 5, 7, 8, 16), torch.float32),
    ((1, 4, 2, 33, 65, 32, 24), torch.float16),
    ((1, 3, 1, 40, 31, 64, 64), torch.float16),
    ((1, 2, 2, 70, 150, 40, 8), torch.float16),
    ((1, 1, 1, 3, 40, 256, 200), torch.float16),
    ((1, 2, 1, 34, 70, 24, 32), torch.float32),
]


@pytest.mark.parametrize(("shape", "dtype"), SHAPES)
def test_shapes(shape: tuple[int, ...], dtype: torch.dtype) -> None:
    check(inputs(*shape, dtype))


def test_nothing() -> None:
    for shape in ((0, 2, 2, 3, 4, 8, 8), (2, 2, 2, 0, 4, 8, 8), (2, 2, 1, 3, 0, 8, 16)):
        results = ours(inputs(*shape, torch.float32), 0.3, {"temperature": rand(), "bias": randn(1, shape[4])})
        assert results["out"].shape == (*shape[:2], shape[3], shape[6])
        assert (results["lse"] == -INF).all()
        assert all((x == 0).all() for name, x in results.items() if name != "lse")


def options_of(len_q: int, len_k: int) -> dict[str, dict[str, Any]]:
    """Options of a call (2, 4, 2, len_q, len_k, …) in groups that meet each other once or twice."""
    lengths = torch.tensor([len_k, len_k // 2], device=DEVICE)
    key_mask = rand(2, len_k) < 0.7
    key_mask[1] = False
    bias = randn(2, 1, 1, len_k)
    bias[:, :, :, 3] = -INF
    return {
        "causal": {"causal": True, "temperature": rand(4, 1, 1, low=0.5), "scale": randn(2, 1, len_q, 1)},
        "window": {"window": (len_k // 3, 2), "softcap": 1.5, "scale": 0.6, "bias": randn(4, len_q, len_k).half()},
        "left": {"window": (-1, 1), "key_lengths": lengths, "relative_bias": randn(4, 2 * (len_k // 4) + 1)},
        "key_mask": {"key_mask": key_mask, "dropout_p": 0.3, "temperature": rand(low=0.3), "scale": -0.4},
        "strided": {"key_mask": key_mask.T.contiguous().T, "key_lengths": lengths.int(), "bias": bias, "softcap": 3.0},
        "mask": {"mask": rand(2, 1, len_q, len_k) < 0.6, "dropout_p": 0.2, "bias": randn(2, 1, len_q, 1)},
        "columns": {"mask": rand(len_k) < 0.8, "relative_bias": randn(4, 1), "temperature": rand(2, 1, 1, 1, low=0.2)},
        "far": {"causal": True, "window": (4, -1), "relative_bias": randn(4, 2 * len_k + 3), "softcap": 2.0},
        "all": {
            "key_lengths": lengths, "key_mask": rand(2, len_k) < 0.8, "mask": rand(4, len_q, 1) < 0.8, "causal": True,
            "bias": randn(1, 4, len_q, len_k), "relative_bias": randn(4, 7), "temperature": rand(len_q, 1, low=0.5),
            "scale": rand(4, 1, 1, low=0.1), "softcap": 2.5, "dropout_p": 0.25, "window": (len_k, 3),
        },
    }  # fmt: skip


@pytest.mark.parametrize("name", options_of(1, 8))
def test_options(name: str) -> None:
    check(inputs(2, 4, 2, 9, 23, 16, 8, torch.float32), **options_of(9, 23)[name])


@pytest.mark.parametrize(
    ("name", "len_q", "len_k", "dtype"),
    [
        ("all", 40, 20, torch.float16),  # one tile of keys, two of queries
        ("causal", 40, 50, torch.float32),  # several: the statistics are another kernel's
        ("window", 20, 70, torch.float32),
        ("all", 10, 40, torch.float32),
    ],
)
def test_options_over_several_tiles(name: str, len_q: int, len_k: int, dtype: torch.dtype) -> None:
    check(inputs(2, 4, 2, len_q, len_k, 16, 8, dtype), **options_of(len_q, len_k)[name])


def test_a_window_that_reaches_one_key_into_the_next_tile() -> None:
    """Row 31 sees key 32 and row 32 key 31, of tiles of 32: bounds of both loops, to the last one."""
    check(inputs(1, 1, 1, 40, 41, 8, 8, torch.float32), window=(2, 0))


CU_Q, CU_K = [0, 5, 5, 6, 40, 60], [0, 0, 7, 9, 50, 50]


def test_packed() -> None:
    cu_q, cu_k = torch.tensor(CU_Q, dtype=torch.int32, device=DEVICE), torch.tensor(CU_K, device=DEVICE)
    check(packed(60, 60, 2, 2, 16, torch.float16), cu_seqlens_q=cu_q)
    tau = rand(60, 4, 1, low=0.5)
    check(
        packed(60, 50, 4, 2, 8, torch.float32),
        cu_seqlens_q=cu_q.long(),
        cu_seqlens_k=cu_k,
        temperature=tau,
        causal=True,
    )


def test_packed_options() -> None:
    cu_q = torch.tensor([0, 30, 75], device=DEVICE)  # 30 keys fit one tile, 45 don't
    x = packed(75, 75, 2, 1, 16, torch.float32)
    check(x, cu_seqlens_q=cu_q, relative_bias=randn(2, 9), dropout_p=0.2, softcap=2.0, scale=randn(2, 1))
    cu_q = torch.tensor([0, 30, 80, 210], device=DEVICE)  # one tile of 32 or 64 keys, or several
    check(packed(210, 210, 1, 1, 16, torch.float16), lse_gradient=0.0, cu_seqlens_q=cu_q, window=(20, 3))


def test_padded_equals_packed() -> None:
    lengths = torch.tensor([7, 0, 33, 12], device=DEVICE)
    q, k, v = inputs(4, 2, 1, 33, 33, 16, 16, torch.float32)
    real = torch.arange(33, device=DEVICE) < lengths[:, None]
    padded = ours([q, k, v], 0.0, {"key_lengths": lengths})
    cu_seqlens = torch.nn.functional.pad(lengths.cumsum(0), (1, 0))
    got = ours([x.transpose(1, 2)[real] for x in (q, k, v)], 0.0, {"cu_seqlens_q": cu_seqlens})
    torch.testing.assert_close(got["out"], padded["out"].transpose(1, 2)[real])


# The interpreter's products differ in the last place between q·kᵀ and k·qᵀ, a GPU's don't. Large scores, or small
# temperatures, turn that into a difference of weights between backward's two kernels: here one does it all.
LONGEST = 30 if INTERPRETED else 300


@pytest.mark.parametrize("tau", [1e-40, 1e-12, 1e-3, 1e3, 1e38])
def test_extreme_temperatures(tau: float) -> None:
    x = inputs(1, 2, 2, 9, 40, 16, 8, torch.float32)
    as_number = ours(x, 0.0, {"temperature": tau})
    as_tensor = ours(x, 0.0, {"temperature": torch.tensor(tau, device=DEVICE)})
    assert torch.equal(as_number["out"], as_tensor["out"])
    assert all(torch.isfinite(y).all() for name, y in as_tensor.items() if name != "lse")
    if 1e-3 <= tau <= 1e3:
        x = inputs(2, 4, 4, 32, LONGEST, 16, 8, torch.float32)
        check(x, temperature=torch.tensor(tau, device=DEVICE))


def test_large_scores() -> None:
    q, k, v = inputs(2, 4, 4, 32, LONGEST, 16, 8, torch.float32)
    check([q * 100, k * 100, v])


def test_a_rounded_delta_is_found_out() -> None:
    """Weights on one key: their gradients are differences of what is equal, and out is rounded. Keys for two tiles."""
    dtype = DTYPES[-1]
    q, k, v = inputs(1, 2, 2, 9, 140, 16, 16, dtype)
    k[:, :, :9] = q[:, :, :9] * 3
    check([q * 3, k, v], temperature=torch.tensor(0.05, device=DEVICE))


@pytest.mark.parametrize("len_k", [30, 40])
def test_hidden_content_is_harmless(len_k: int) -> None:
    """Padding is never loaded; what only some rows don't see must not reach those rows."""
    q, k, v = inputs(2, 1, 1, 9, len_k, 16, 8, torch.float32)
    keys = torch.arange(len_k, device=DEVICE)
    bias = torch.where(keys % 3 == 0, -INF, 0.0)
    mask = keys % 3 != 0
    for options, hidden in (
        ({"key_lengths": torch.tensor([7, 0], device=DEVICE)}, keys >= 7),
        ({"key_mask": mask.expand(2, len_k)}, ~mask),
        ({"mask": mask, "softcap": 2.0}, ~mask),
        ({"bias": bias, "scale": torch.tensor(0.2, device=DEVICE)}, ~mask),
        ({"window": (len_k, -12)}, keys > len_k - 9),
    ):
        options = {"causal": True, "scale": 0.1} if "window" in options else options  # the last keys: the last rows'
        results = []
        for content in (0.5, NAN, INF) if len_k == 30 else (0.5, NAN):
            x = [q, k.clone(), v.clone()]
            x[1][:, :, hidden], x[2][:, :, hidden] = content, content
            results.append(ours(x, 0.0, options))
        rows = slice(0, 1) if "causal" in options else slice(None)  # the first row sees none of them
        for other in results[1:]:
            if "bias" in options:
                assert torch.equal(other["scale"], results[0]["scale"])
            for name in ("out", "lse", "query"):
                assert torch.equal(other[name][:, :, rows], results[0][name][:, :, rows]), (name, list(options))
            if "causal" not in options:
                assert torch.equal(other["key"], results[0]["key"])
                assert torch.equal(other["value"], results[0]["value"])


def test_visible_nan_reaches_its_rows() -> None:
    for options in ({}, {"causal": True}):
        q, k, v = inputs(1, 2, 2, 5, 9, 8, 8, torch.float32)
        v[0, 1, 6, 2] = INF
        k[0, 0, 8, 1] = NAN
        out = ours([q, k, v], 0.0, options)["out"]
        bad = ~torch.isfinite(out)
        first = 2 if options else 0  # row i stands at i + 4
        assert bad[0, 1, first:, 2].all()
        assert bad[0, 0, 4 if options else 0 :].all()
        assert bad.sum() == (5 - first) + 8 * (1 if options else 5)


def test_hidden_keys_get_no_gradient_from_a_nan_query() -> None:
    q, k, v = inputs(1, 2, 2, 5, 9, 8, 8, torch.float32)
    q[0, :, 1] = NAN
    got = ours([q, k, v], 0.0, {"key_lengths": torch.tensor([4], device=DEVICE)})
    assert got["key"][:, :, 4:].eq(0).all()
    assert got["value"][:, :, 4:].eq(0).all()


@pytest.mark.parametrize("len_k", [9, 40])
def test_a_row_of_nan_leaves_keys_alone_that_it_does_not_see(len_k: int) -> None:
    """In its query or in its upstream gradient; row 1 doesn't see the last keys, and no row sees key 2."""
    q, k, v = inputs(1, 2, 1, 6, len_k, 8, 8, torch.float32)
    unseen = torch.arange(len_k, device=DEVICE) > len_k - 5
    mask = torch.arange(len_k, device=DEVICE) != 2
    others = torch.arange(6, device=DEVICE)[:, None] != 1
    for options in ({"causal": True, "mask": mask}, {"mask": mask & (~unseen | others)}):
        options["scale"] = torch.tensor(0.3, device=DEVICE)
        wanted = ours([q, k, v], 0.3, options)
        dirty = q.clone()
        dirty[:, :, 1] = NAN
        got = ours([dirty, k, v], 0.3, options)
        d_out = upstream(wanted["out"]).clone()
        d_out[:, :, 1] = NAN
        later = ours([q, k, v], 0.3, options, lambda out, d_out=d_out: d_out)
        rows = torch.arange(6) != 1
        for name in ("out", "lse"):
            assert got[name][:, :, 1].isnan().all()
            assert torch.equal(got[name][:, :, rows], wanted[name][:, :, rows])
        for result in (got, later):
            assert result["query"][:, :, 1].isnan().all()
            assert torch.equal(result["query"][:, :, rows], wanted["query"][:, :, rows])
            for name in ("key", "value"):  # made again, which a compiler may round in other places
                torch.testing.assert_close(result[name][:, :, unseen], wanted[name][:, :, unseen], rtol=1e-6, atol=1e-7)
                assert result[name][:, :, 2].eq(0).all()
        seen = mask & ~unseen
        assert got["key"][:, :, seen].isnan().all()
        assert got["value"][:, :, seen].isnan().all()
        assert later["value"][:, :, seen].isnan().all()


def test_strides_are_read_in_place() -> None:
    wide = randn(2, 2, 20, 48)
    check([wide[..., :32], wide[..., 8:40], wide[..., 16:24]])
    check([randn(7, 2, 3, 8).permute(1, 2, 0, 3) for _ in range(3)])
    check([randn(2, 3, 16, 20).transpose(2, 3) for _ in range(3)])
    check([randn(2, 2, 20, 28).to(DTYPES[-1])[..., 2:18] for _ in range(3)])  # no multiples of 16 bytes
    check([randn(1, 1, 20, 16).expand(2, 2, 20, 16), wide[:1, ::2, ::2, ::3], wide[:1, :1, ::2, 16:32]][:1] + [
        wide[..., :16], wide[:1, :1, :, :16].expand(2, 2, 20, 16)
    ])  # fmt: skip


def test_only_what_is_needed() -> None:
    x = inputs(1, 2, 2, 5, 9, 8, 8, torch.float32)
    tau, scale, bias, relative = rand(low=0.5), rand(), randn(9), randn(2, 5)
    options = {"temperature": tau, "scale": scale, "bias": bias, "relative_bias": relative}
    wanted = ours(x, 0.3, options)
    arguments = (None, None, None, None, None, bias, relative, tau, 1.0, scale, 1.0, False, -1, -1, 0.0, 0.0, None)
    out, lse, statistics = attention.forward(*x, *arguments)
    saved, d_lse = (out, statistics), torch.full_like(lse, 0.3)
    for i, name in enumerate(NAMES):
        needs = [j == i for j in range(7)]
        found = attention.backward(upstream(wanted["out"]), d_lse, *saved, *x, *arguments, *needs)
        assert torch.equal(found[i], wanted[name]), name
        assert all(y.numel() == 0 for j, y in enumerate(found) if j != i)


def test_gradients_of_any_stride() -> None:
    x = inputs(2, 2, 2, 5, 7, 8, 8, torch.float32)
    arguments = (*(None,) * 8, 1.0, None, 0.3, False, -1, -1, 0.0, 0.0, None, *(True,) * 3, *(False,) * 4)
    d_out = randn(8, 5, 2, 2).permute(3, 2, 1, 0)
    got = attention.backward(d_out, None, None, None, *x, *arguments)
    wanted = attention.backward(d_out.contiguous(), None, None, None, *x, *arguments)
    assert all(torch.equal(a, b) for a, b in zip(got, wanted, strict=True))
    expanded = torch.ones((), device=DEVICE).expand(2, 2, 5, 8)
    assert all(torch.isfinite(g).all() for g in attention.backward(expanded, None, None, None, *x, *arguments))


def test_nonsense_lengths_stay_inside() -> None:
    q, k, v = inputs(3, 2, 2, 5, 7, 8, 8, torch.float32)
    for lengths in ([99, -5, 7], [2**40, -(2**40), 3]):
        got = ours([q, k, v], 0.0, {"key_lengths": torch.tensor(lengths, device=DEVICE)})
        wanted = ours(
            [q, k, v], 0.0, {"key_lengths": torch.tensor([min(max(n, 0), 7) for n in lengths], device=DEVICE)}
        )
        assert all(torch.equal(got[name], wanted[name]) for name in got)
    x = packed(12, 12, 2, 2, 8, torch.float32)
    for bounds in ([0, 30, 12], [5, 3, 99], [-4, 2**40, -(2**40)]):
        attention.forward(*x, None, None, torch.tensor(bounds, device=DEVICE), *(None,) * 5, 1.0, None, 0.3, False, -1,
                          -1, 0.0, 0.0, None)  # fmt: skip


def test_public_functions() -> None:
    q, k, v = (x.requires_grad_() for x in inputs(2, 4, 2, 5, 7, 8, 16, torch.float32))
    tau, bias = rand(low=0.5).requires_grad_(), randn(5, 7).half().requires_grad_()
    assert ek.explain("attention", q, k, v).choice == "triton"
    results = []
    for backend in ("triton", "reference"):
        torch.manual_seed(3)
        out, lse = ek.attention(
            q, k, v, bias=bias, temperature=tau, causal=True, dropout_p=0.2, return_lse=True, backend=backend
        )
        loss = out.square().sum() + torch.where(lse == -INF, 0, lse).sum()
        results.append((out, lse, *torch.autograd.grad(loss, (q, k, v, tau, bias))))
    for got, wanted in zip(*results, strict=True):
        torch.testing.assert_close(got, wanted, rtol=1e-3 if wanted.dtype == torch.float16 else 1e-4, atol=1e-5)
    gradient = torch.autograd.grad(ek.attention(q, k, v, backend="triton").sum(), q, create_graph=True)[0]
    with pytest.raises(NotImplementedError, match="reference"):
        gradient.sum().backward()


def test_operators_and_compile() -> None:
    q, k, v = inputs(2, 4, 2, 5, 7, 8, 16, torch.float32)
    options = (torch.tensor([7, 2], device=DEVICE), None, None, None, None, None, randn(4, 5), rand(4, 1, 1, low=0.5))
    options += (1.0, None, 0.3, True, -1, -1, 0.0, 0.0, None)
    tests = ("test_schema", "test_faketensor")
    torch.library.opcheck(attention._FORWARD, (q, k, v, *options), test_utils=tests)
    d_out, needs = randn(2, 5, 4, 16).transpose(1, 2), (True, True, False, False, True, True, False)
    out, _lse, statistics = attention.forward(q, k, v, *options)
    arguments = (d_out, None, out, statistics, q, k, v, *options, *needs)
    torch.library.opcheck(attention._BACKWARD, arguments, test_utils=tests)

    def function(x: Tensor, cu_seqlens: Tensor) -> Tensor:
        return ek.attention_varlen(x, x, x, cu_seqlens, temperature=0.5, window=(3, -1), backend="triton").sin().sum()

    torch._dynamo.reset()
    compiled = torch.compile(function, fullgraph=True, dynamic=True, backend="aot_eager")
    for tokens in (9, 17):
        x = randn(tokens, 2, 8).requires_grad_()
        cu_seqlens = torch.tensor([0, 4, tokens], device=DEVICE)
        got = torch.autograd.grad(compiled(x, cu_seqlens), x)
        torch.testing.assert_close(got, torch.autograd.grad(function(x, cu_seqlens), x))


@pytest.mark.skipif(not torch.cuda.is_available(), reason="no GPU")
def test_cuda_graph() -> None:
    q, k, v = (x.requires_grad_() for x in inputs(4, 4, 2, 64, 64, 32, 32, torch.float16))
    cu_seqlens = torch.tensor([0, 50, 50, 64], device=DEVICE)
    packed_inputs = [x[0].transpose(0, 1) for x in (q, k, v)]

    def step() -> tuple[Tensor, ...]:
        out = ek.attention(q, k, v, causal=True).float().sum()
        out = out + ek.attention_varlen(*packed_inputs, cu_seqlens).float().sum()
        return torch.autograd.grad(out, (q, k, v))

    got, wanted = replayed(step)
    assert all(torch.equal(a, b) for a, b in zip(got, wanted, strict=True))


@pytest.mark.skipif(INTERPRETED, reason="minutes in the interpreter")
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("length", [16, 64, 128, 300])
@pytest.mark.parametrize("dim", [32, 64, 128, 256])
def test_every_configuration(dtype: torch.dtype, length: int, dim: int) -> None:
    check(inputs(3, 4, 4, length, length, dim, dim, dtype))
    cu_seqlens = torch.tensor([0, length, 2 * length, 2 * length + 5], device=DEVICE)
    tau = rand(2 * length + 5, 4, 1, low=0.5)
    check(packed(2 * length + 5, 2 * length + 5, 4, 2, dim, dtype), cu_seqlens_q=cu_seqlens, temperature=tau)
