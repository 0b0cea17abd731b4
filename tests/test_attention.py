"""attention against its float64 reference: every layout, dtype, option and CPU variant; bad input; torch."""

from __future__ import annotations

import itertools
import math
import warnings
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from attention_cases import DTYPES, INF, NAN, check, inputs, packed, run
from torch import Tensor

import embedkern as ek
from embedkern import dispatch
from embedkern.schema import OPS

SHAPES = [  # B, Hq, Hkv, Lq, Lk, D, Dv
    (2, 2, 2, 1, 1, 8, 8),
    (3, 3, 3, 5, 7, 8, 16),
    (2, 4, 2, 33, 65, 32, 24),
    (1, 6, 1, 40, 31, 64, 64),
    (1, 2, 2, 130, 257, 40, 8),
    (2, 1, 1, 3, 70, 256, 256),
]


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("shape", SHAPES)
def test_shapes(variant: str, shape: tuple[int, ...], dtype: torch.dtype) -> None:
    check(*inputs(*shape, dtype))


@pytest.mark.parametrize("shape", [(1, 2, 2, 2000, 70, 16, 24), (2, 2, 1, 800, 300, 8, 8)])
def test_few_long_sequences(shape: tuple[int, ...]) -> None:
    """Their rows are split, and the parts' gradients of key and value summed."""
    check(*inputs(*shape))
    check(*inputs(*shape), window=(30, 20), temperature=torch.rand(()) + 0.5)


def test_results_larger_than_the_caches(variant: str) -> None:
    """They are written past the caches: the same bits as in two halves, which aren't."""
    q, k, v = inputs(512, 4, 4, 33, 32, 32, 32)
    upstream = torch.randn(512, 33, 4, 32).transpose(1, 2)
    pieces = []
    for part in (slice(512), slice(256), slice(256, 512)):
        leaves = [x[part].requires_grad_() for x in (q, k, v)]
        out = ek.attention(*leaves, backend="cpu")
        pieces.append((out.detach(), *torch.autograd.grad(out, leaves, upstream[part])))
    for together, first, second in zip(*pieces, strict=True):
        assert torch.equal(together, torch.cat([first, second]))


def test_against_sdpa() -> None:
    q, k, v = inputs(2, 4, 2, 33, 65, 32, 32)
    wanted = F.scaled_dot_product_attention(q, k, v, enable_gqa=True)
    torch.testing.assert_close(ek.attention(q, k, v, backend="cpu"), wanted, rtol=1e-5, atol=1e-6)
    torch.testing.assert_close(ek.attention(q, k, v, backend="reference"), wanted, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("dtype", DTYPES)
def test_lengths_and_masks(variant: str, dtype: torch.dtype) -> None:
    q, k, v = inputs(6, 2, 1, 9, 37, 16, 24, dtype)
    lengths = torch.tensor([37, 0, 1, 20, 36, 8])
    mask = torch.rand(6, 37) < 0.6
    mask[0, :10], mask[0, 10:] = False, True  # padding on the left
    mask[2], mask[3] = False, True
    for key_lengths, key_mask in ((lengths, None), (lengths.int(), mask), (None, mask), (None, mask.T.contiguous().T)):
        hidden = torch.zeros(6, 37, dtype=torch.bool)
        if key_lengths is not None:
            hidden |= torch.arange(37) >= key_lengths[:, None]
        if key_mask is not None:
            hidden |= ~key_mask
        for content in (NAN, INF):
            k[hidden[:, None].expand(k.shape[:3])] = content
            v[hidden[:, None].expand(v.shape[:3])] = content
            check(q, k, v, key_lengths=key_lengths, key_mask=key_mask)
        k, v = (x.nan_to_num(0.5, 0.5, 0.5) for x in (k, v))


@pytest.mark.parametrize("dtype", DTYPES)
def test_varlen(variant: str, dtype: torch.dtype) -> None:
    cu_seqlens = torch.tensor([0, 5, 5, 6, 40, 60], dtype=torch.int32)
    other = torch.tensor([0, 0, 7, 9, 50, 50], dtype=torch.int32)
    check(*packed(60, 60, 4, 2, 16, dtype), function=ek.attention_varlen, cu_seqlens_q=cu_seqlens)
    q, k, v = packed(60, 50, 3, 1, 8, dtype)
    check(q, k, v, function=ek.attention_varlen, cu_seqlens_q=cu_seqlens, cu_seqlens_k=other, temperature=0.5)
    tau = torch.rand(60, 3, 1) + 0.5
    check(q, k, v, function=ek.attention_varlen, cu_seqlens_q=cu_seqlens, cu_seqlens_k=other, temperature=tau)
    scale = torch.randn(3, 1)
    check(q, k, v, function=ek.attention_varlen, cu_seqlens_q=cu_seqlens.long(), cu_seqlens_k=other.long(), scale=scale)


def test_padded_equals_packed_equals_alone() -> None:
    lengths = [7, 0, 33, 12]
    q, k, v = inputs(4, 4, 2, 33, 33, 16, 16)
    tokens = [x.transpose(1, 2) for x in (q, k, v)]
    real = torch.arange(33) < torch.tensor(lengths)[:, None]
    out, lse = ek.attention(q, k, v, key_lengths=torch.tensor(lengths), return_lse=True, backend="cpu")
    cu_seqlens = F.pad(torch.tensor(lengths).cumsum(0), (1, 0))
    packed_out, packed_lse = ek.attention_varlen(*(x[real] for x in tokens), cu_seqlens, return_lse=True, backend="cpu")
    assert torch.equal(out.transpose(1, 2)[real], packed_out)
    assert torch.equal(lse.transpose(1, 2)[real], packed_lse)
    for b, n in enumerate(lengths):  # the rest of the batch doesn't matter
        alone = ek.attention(q[b : b + 1], k[b : b + 1, :, :n], v[b : b + 1, :, :n], backend="cpu")
        assert torch.equal(alone[0], out[b])


def test_max_seqlens_change_nothing() -> None:
    q, k, v = packed(9, 9, 2, 2, 8)
    cu_seqlens = torch.tensor([0, 4, 9])
    wanted = ek.attention_varlen(q, k, v, cu_seqlens)
    for longest in (5, 1, 100):
        assert torch.equal(ek.attention_varlen(q, k, v, cu_seqlens, max_seqlen_q=longest, max_seqlen_k=longest), wanted)


@pytest.mark.parametrize("backend", ["cpu", "reference"])
@pytest.mark.parametrize(
    "shape", [(0, 2, 2, 3, 4, 8, 8), (2, 2, 2, 0, 4, 8, 8), (2, 2, 1, 3, 0, 8, 16), (2, 2, 1, 0, 0, 8, 8)]
)
def test_nothing(backend: str, shape: tuple[int, ...]) -> None:
    tau = torch.ones(shape[0], shape[1], shape[3], 1)
    results = run(ek.attention, inputs(*shape), backend, None, {"temperature": tau, "scale": torch.ones(())})
    assert results["out"].shape == (*shape[:2], shape[3], shape[6])
    assert (results["lse"] == -INF).all()
    assert all((results[name] == 0).all() for name in results if name != "lse")


@pytest.mark.parametrize("backend", ["cpu", "reference"])
def test_no_sequences(backend: str) -> None:
    options = {"relative_bias": torch.randn(2, 3), "temperature": torch.ones(2, 1), "scale": torch.ones(())}
    x, cu_seqlens = torch.randn(0, 2, 8), torch.tensor([0])
    results = run(ek.attention_varlen, (x, x, x), backend, None, {"cu_seqlens_q": cu_seqlens, **options})
    assert all(results[name].shape == value.shape and (results[name] == 0).all() for name, value in options.items())


FACTOR_SHAPES = [(), (1,), (4, 1, 1), (9, 1), (3, 1, 1, 1), (3, 4, 1, 1), (3, 1, 9, 1), (3, 4, 9, 1)]


@pytest.mark.parametrize("shape", FACTOR_SHAPES)
def test_temperature_and_scale_tensors(variant: str, shape: tuple[int, ...]) -> None:
    q, k, v = inputs(3, 4, 2, 9, 13, 16, 8)
    lengths = torch.tensor([13, 0, 6])
    check(q, k, v, temperature=torch.rand(shape) + 0.3, key_lengths=lengths)
    check(q, k, v, scale=torch.randn(shape), temperature=0.5, key_lengths=lengths)
    check(q, k, v, scale=torch.randn(shape), temperature=torch.rand(()) + 0.5)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float64])
def test_gradients_have_the_dtype_of_temperature(dtype: torch.dtype) -> None:
    q, k, v = inputs(2, 2, 2, 5, 6, 8, 8, torch.bfloat16)
    tau = torch.tensor(0.7, dtype=dtype, requires_grad=True)
    ek.attention(q, k, v, temperature=tau, backend="cpu").sum().backward()
    assert tau.grad is not None
    assert tau.grad.dtype == dtype


def test_expanded_temperature() -> None:
    q, k, v = inputs(2, 2, 2, 5, 6, 8, 8)
    tau = torch.tensor(0.7, requires_grad=True)
    ek.attention(q, k, v, temperature=tau.expand(2, 2, 5, 1), backend="cpu").square().sum().backward()
    wanted = torch.autograd.grad(ek.attention(q, k, v, temperature=tau, backend="cpu").square().sum(), tau)[0]
    torch.testing.assert_close(tau.grad, wanted)


def test_scale_of_any_sign(variant: str) -> None:
    q, k, v = inputs(2, 2, 2, 9, 13, 16, 8)
    for scale in (0.0, -0.7, 3.0, 1):
        check(q, k, v, scale=scale)
        check(q, k, v, scale=torch.tensor([[scale], [0.2]])[:, None])


@pytest.mark.parametrize("backend", ["cpu", "reference"])
@pytest.mark.parametrize("tau", [5e-324, 1e-40, 1e-30, 1e-12, 1e-3, 1e3, 1e12, 1e38])
def test_extreme_temperatures_are_finite(backend: str, tau: float) -> None:
    q, k, v = inputs(2, 2, 2, 9, 13, 16, 8)
    as_number = run(ek.attention, (q, k, v), backend, None, {"temperature": tau})
    results = run(ek.attention, (q, k, v), backend, None, {"temperature": torch.tensor(tau, dtype=torch.float64)})
    assert torch.equal(as_number["out"], results["out"])
    names = ("out",) if tau < 1e-12 else ("out", "lse", "d_query", "d_key", "d_value")  # lse itself is beyond float32
    assert all(torch.isfinite(results[name]).all() for name in names)
    if 1e-3 <= tau <= 1e3:  # of many rows, since only those whose best keys are close together have any error
        check(*inputs(3, 2, 2, 65, 67, 16, 8), temperature=tau)


def test_extreme_temperatures_gradient_of_out() -> None:
    q, k, v = inputs(2, 2, 2, 9, 13, 16, 8)
    for tau in (1e-40, 1e-25, 1e-3, 1e3, 1e38):
        leaves = [x.detach().requires_grad_() for x in (q, k, v, torch.tensor(tau))]
        out = ek.attention(*leaves[:3], temperature=leaves[3], backend="cpu")
        assert all(torch.isfinite(g).all() for g in torch.autograd.grad(out.square().sum(), leaves))


def test_large_scores() -> None:
    q, k, v = inputs(1, 2, 2, 9, 13, 16, 8)
    check(q * 100, k * 100, v)


@pytest.mark.parametrize("backend", ["cpu", "reference"])
def test_visible_nan_reaches_its_rows(backend: str) -> None:
    q, k, v = inputs(3, 2, 2, 5, 9, 8, 8)
    k[1, 0, 3], v[2, 1, 8, 2], q[0, 0, 1] = NAN, INF, NAN
    out = ek.attention(q, k, v, key_lengths=torch.tensor([9, 9, 9]), backend=backend)
    bad = ~torch.isfinite(out)
    assert bad[1, 0].all()
    assert bad[2, 1, :, 2].all()
    assert bad[0, 0, 1].all()
    assert bad.sum() == 5 * 8 + 5 + 8


def test_strides_are_read_in_place(variant: str) -> None:
    q, k, v = (torch.randn(2, 3, 20, 48) for _ in range(3))
    check(q[..., :32], k[..., 8:40], v[..., 16:24])
    check(q[:, :, ::2], k[:, :, 1::3], v[:, :, 1::3])
    fused = torch.randn(2, 20, 3, 4, 16)
    check(*(fused[:, :, i].transpose(1, 2) for i in range(3)))
    check(*(torch.randn(7, 2, 3, 8).permute(1, 2, 0, 3) for _ in range(3)))  # (L, B, H, D)
    check(q.expand(2, 3, 20, 48), k[:1].expand(2, 3, 20, 48), v[:, :1].expand(2, 3, 20, 48))
    check(*(torch.randn(2, 3, 16, 20).transpose(2, 3) for _ in range(3)))  # no unit stride: copied once


def test_gradients_of_any_stride() -> None:
    q, k, v = (x.requires_grad_() for x in inputs(2, 2, 2, 5, 7, 8, 8))
    out, lse = ek.attention(q, k, v, return_lse=True, backend="cpu")
    upstream = torch.randn(8, 5, 2, 2)
    wanted = torch.autograd.grad(out, (q, k, v), upstream.permute(3, 2, 1, 0).contiguous(), retain_graph=True)
    got = torch.autograd.grad(out, (q, k, v), upstream.permute(3, 2, 1, 0), retain_graph=True)
    assert all(torch.equal(a, b) for a, b in zip(got, wanted, strict=True))
    assert all(torch.isfinite(g).all() for g in torch.autograd.grad(out.sum(), (q, k, v), retain_graph=True))
    only_lse = torch.autograd.grad(lse.sum(), (q, k), retain_graph=True)
    both = torch.autograd.grad(lse.sum() + 0 * out.sum(), (q, k))
    assert all(torch.equal(a, b) for a, b in zip(only_lse, both, strict=True))


@pytest.mark.parametrize("wanted", itertools.chain(*(itertools.combinations(range(5), n) for n in (1, 2, 4))))
def test_only_needed_gradients(wanted: tuple[int, ...]) -> None:
    leaves = [*inputs(2, 2, 2, 5, 7, 8, 8), torch.tensor(0.7), torch.randn(2, 1, 1)]
    everything = [x.clone().requires_grad_() for x in leaves]
    some = [x.clone().requires_grad_(i in wanted) for i, x in enumerate(leaves)]

    def loss(q: Tensor, k: Tensor, v: Tensor, tau: Tensor, scale: Tensor) -> Tensor:
        return ek.attention(q, k, v, temperature=tau, scale=scale, backend="cpu").square().sum()

    all_gradients = torch.autograd.grad(loss(*everything), everything)
    got = torch.autograd.grad(loss(*some), [some[i] for i in wanted])
    for i, gradient in zip(wanted, got, strict=True):  # scale's own changes where scale is multiplied to the others
        torch.testing.assert_close(gradient, all_gradients[i])


def test_same_bits_for_any_number_of_threads() -> None:
    before, results = torch.get_num_threads(), []
    q, k, v = inputs(3, 4, 2, 50, 400, 16, 16)
    options = {
        "key_lengths": torch.tensor([400, 3, 160]),
        "temperature": torch.tensor(0.7),
        "scale": torch.rand(4, 1, 1),
    }
    tokens = packed(900, 900, 2, 2, 8)
    many = inputs(64, 4, 4, 64, 64, 8, 8)
    shared = {"bias": torch.randn(64, 64), "relative_bias": torch.randn(4, 9)}  # by sequences, one by heads too
    for threads in (1, 2, 5):
        torch.set_num_threads(threads)
        padded_results = run(ek.attention, (q, k, v), "cpu", None, options)
        varlen = run(ek.attention_varlen, tokens, "cpu", None, {"cu_seqlens_q": torch.tensor([0, 850, 900])})
        of_shared = run(ek.attention, many, "cpu", None, shared)
        results.append([*padded_results.values(), *varlen.values(), *of_shared.values()])
    torch.set_num_threads(before)
    assert all(torch.equal(a, b) for other in results[1:] for a, b in zip(results[0], other, strict=True))


@pytest.mark.parametrize("backend", ["cpu", "reference"])
def test_functions_alone(backend: str) -> None:
    q, k, v = (x.requires_grad_() for x in inputs(2, 4, 2, 5, 7, 8, 8))
    tau = torch.tensor(0.7, requires_grad=True)
    lengths = torch.tensor([7, 3])
    out, lse = ek.attention(q, k, v, key_lengths=lengths, temperature=tau, return_lse=True, backend=backend)
    wanted = torch.autograd.grad(out.sin().sum() + lse.sum(), (q, k, v, tau))
    out, lse = ek.AttentionFunction.apply(
        q, k, v, lengths, None, None, None, None, tau, None, False, None, None, 0.0, False, backend
    )
    torch.testing.assert_close(torch.autograd.grad(out.sin().sum() + lse.sum(), (q, k, v, tau)), wanted)
    x = torch.randn(9, 2, 8, requires_grad=True)
    cu_seqlens = torch.tensor([0, 4, 9])
    out, lse = ek.AttentionVarlenFunction.apply(
        x, x, x, cu_seqlens, None, None, None, None, tau, None, False, None, None, 0.0, True, backend
    )
    expected = ek.attention_varlen(x, x, x, cu_seqlens, temperature=tau, backend=backend)
    wanted = torch.autograd.grad(expected.sin().sum(), (x, tau))
    torch.testing.assert_close(torch.autograd.grad(out.sin().sum(), (x, tau)), wanted)
    with pytest.raises(ValueError, match="key must have shape"):
        ek.AttentionFunction.apply(q, k[..., :4], v)


def test_second_derivatives() -> None:
    q, k, v = (x.requires_grad_() for x in inputs(1, 2, 2, 3, 4, 8, 8))
    tau = torch.tensor(0.7, requires_grad=True)
    out = ek.attention(q, k, v, temperature=tau, backend="cpu")
    for gradient in torch.autograd.grad(out.sum(), (q, k, v, tau), create_graph=True):
        with pytest.raises(NotImplementedError, match="reference"):
            torch.autograd.grad(gradient.sum(), q, retain_graph=True)
    q, k, v = (x.detach().double().requires_grad_() for x in (q, k, v))
    assert torch.autograd.gradgradcheck(lambda *x: ek.attention(*x, backend="reference"), (q, k, v))


def test_opcheck() -> None:
    q, k, v = (x.requires_grad_() for x in inputs(2, 4, 2, 5, 7, 8, 16))
    tau, scale, lengths = torch.rand(4, 1, 1) + 0.5, torch.rand(()), torch.tensor([7, 2])
    terms = torch.rand(5, 7) < 0.9, torch.randn(4, 5, 7), torch.randn(4, 5)
    of_scores = True, -1, 2, 5.0, 0.25, torch.tensor(7)
    options = (lengths, torch.rand(2, 7) < 0.8, None, None, *terms, tau, 1.0, scale, 1.0, *of_scores)
    tests = ("test_schema", "test_faketensor", "test_aot_dispatch_dynamic")
    torch.library.opcheck(
        OPS.attention_forward.default, (q.detach(), k.detach(), v.detach(), *options), test_utils=tests
    )
    d_out, d_lse = torch.randn(2, 5, 4, 16).transpose(1, 2), torch.randn(2, 4, 5)
    for needs in ((True,) * 7, (True, False, False, True, False, True, False)):
        arguments = (d_out, d_lse, None, None, q.detach(), k.detach(), v.detach(), *options, *needs)
        torch.library.opcheck(OPS.attention_backward.default, arguments, test_utils=tests)
    x, cu_seqlens = torch.randn(9, 2, 8), torch.tensor([0, 4, 9])
    without = False, -1, -1, 0.0, 0.0, None
    arguments = (x, x, x, None, None, cu_seqlens, None, None, None, None, None, 0.5, None, 0.3, *without)
    torch.library.opcheck(OPS.attention_forward.default, arguments, test_utils=tests)


def test_compile() -> None:
    def function(q: Tensor, k: Tensor, v: Tensor, lengths: Tensor, tau: Tensor) -> Tensor:
        out, lse = ek.attention(q, k, v, key_lengths=lengths, temperature=tau, return_lse=True)
        return out.sin().sum() + lse.sum()

    def varlen(x: Tensor, cu_seqlens: Tensor) -> Tensor:
        return ek.attention_varlen(x, x, x, cu_seqlens, temperature=0.5).sin().sum()

    torch._dynamo.reset()
    compiled = torch.compile(function, fullgraph=True, dynamic=True, backend="aot_eager")
    for batch, length in ((2, 5), (3, 9)):
        q, k, v = (x.requires_grad_() for x in inputs(batch, 4, 2, length, length + 2, 8, 16))
        tau, lengths = torch.tensor(0.7, requires_grad=True), torch.randint(1, length + 3, (batch,))
        got = torch.autograd.grad(compiled(q, k, v, lengths, tau), (q, k, v, tau))
        wanted = torch.autograd.grad(function(q, k, v, lengths, tau), (q, k, v, tau))
        assert all(torch.equal(a, b) for a, b in zip(got, wanted, strict=True))
    compiled_varlen = torch.compile(varlen, fullgraph=True, dynamic=True, backend="aot_eager")
    for tokens in (9, 17):
        x, cu_seqlens = torch.randn(tokens, 2, 8, requires_grad=True), torch.tensor([0, 4, tokens])
        got = torch.autograd.grad(compiled_varlen(x, cu_seqlens), x)
        wanted = torch.autograd.grad(varlen(x, cu_seqlens), x)
        torch.testing.assert_close(got, wanted)  # q, k and v are one: their gradients are added in another order


def test_compile_reference() -> None:
    torch._dynamo.reset()
    q, k, v = inputs(2, 4, 2, 5, 7, 8, 16)
    mask = torch.rand(5, 7) < 0.8

    def function(q: Tensor) -> Tensor:
        return ek.attention(q, k, v, mask=mask, causal=True)

    for dynamic in (False, True):
        compiled = torch.compile(function, fullgraph=True, dynamic=dynamic, backend="aot_eager")
        torch.testing.assert_close(compiled(q), function(q))


def test_autocast() -> None:
    q, k, v = (x.requires_grad_() for x in inputs(2, 2, 2, 5, 7, 8, 8))
    tau = torch.tensor(0.7, requires_grad=True)
    for apply in (
        lambda: ek.attention(q, k, v, temperature=tau),
        lambda: ek.AttentionFunction.apply(q, k, v, None, None, None, None, None, tau)[0],
        lambda: ek.attention(q, k, v, temperature=tau, backend="reference"),
        lambda: ek.AttentionFunction.apply(
            q, k, v, None, None, None, None, None, tau, None, False, None, None, 0.0, False, "reference"
        )[0],
    ):
        with torch.autocast("cpu", torch.bfloat16):
            out = apply()
        assert out.dtype == torch.bfloat16
        gradients = torch.autograd.grad(out.float().sum(), (q, k, v, tau))
        assert all(g.dtype == torch.float32 for g in gradients)
    x = q.detach().bfloat16()
    expected = ek.attention(x, x, x, return_lse=True, backend="reference")
    with torch.autocast("cpu", torch.bfloat16):  # the reference's own products stay float32
        got = ek.attention(x, x, x, return_lse=True, backend="reference")
    assert all(torch.equal(a, b) for a, b in zip(got, expected, strict=True))


def test_activation_checkpointing() -> None:
    q, k, v = (x.requires_grad_() for x in inputs(2, 2, 2, 5, 7, 8, 8))
    for dropout_p in (0.0, 0.3):
        torch.manual_seed(5)
        wanted = torch.autograd.grad(ek.attention(q, k, v, dropout_p=dropout_p).sum(), (q, k, v))
        torch.manual_seed(5)
        out = torch.utils.checkpoint.checkpoint(
            lambda *x, p=dropout_p: ek.attention(*x, dropout_p=p), q, k, v, use_reentrant=False
        )
        assert all(torch.equal(a, b) for a, b in zip(torch.autograd.grad(out.sum(), (q, k, v)), wanted, strict=True))


def test_explain_and_fallback() -> None:
    q, k, v = inputs(1, 2, 2, 3, 4, 8, 8)
    assert ek.explain("attention", q, k, v).choice == "cpu"
    refused = ek.explain("attention", q.double(), k.double(), v.double())
    assert refused.choice == "reference"
    assert refused.refused["cpu"] == ["query is torch.float64"]
    assert ek.explain("attention", q, k, v, softcap=2.0, causal=True, dropout_p=0.1).choice == "cpu"
    x = torch.randn(3, 2, 8)
    assert ek.explain("attention_varlen", x, x, x, torch.tensor([0, 3]), causal=True).choice == "cpu"
    with pytest.raises(NotImplementedError, match=r"query is torch\.float64"):
        ek.attention(q.double(), k.double(), v.double(), backend="cpu")
    with pytest.raises(NotImplementedError, match="triton"):
        ek.attention(q, k, v, backend="triton")
    dispatch._warned.discard("attention")
    with pytest.warns(UserWarning, match=r"query is torch\.float64"):
        ek.attention(q.double(), k.double(), v.double())
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        ek.attention(q.double(), k.double(), v.double())  # once is enough
        ek.attention(q, k, v)


def test_helpers() -> None:
    s = torch.tensor([0.5, 2.0], requires_grad=True)
    tau = ek.log_length_temperature(torch.tensor([1, 2, 100]), s)
    assert tau.shape == (3, 2, 1, 1)
    assert tau[2, 0, 0, 0].item() == pytest.approx(1 / (0.5 * math.log(100)))
    assert torch.isfinite(tau).all()
    tau.sum().backward()
    assert ek.log_length_temperature(torch.tensor([7]), 1.0).shape == (1, 1, 1, 1)
    table = torch.arange(32.0)[:, None].repeat(1, 2).requires_grad_()
    both_ways = ek.relative_bias_from_buckets(table, 32, 128)
    assert both_ways.shape == (2, 257)
    of = {distance: int(both_ways[0, 128 + distance]) for distance in (-128, -100, -8, -7, 0, 1, 7, 8, 100, 128)}
    assert of == {-128: 15, -100: 15, -8: 8, -7: 7, 0: 0, 1: 17, 7: 23, 8: 24, 100: 31, 128: 31}
    one_way = ek.relative_bias_from_buckets(table, 32, 128, bidirectional=False)
    assert one_way[0, 128:].eq(0).all()
    assert one_way[0, 0] == 31
    assert one_way[0, 128 - 15] == 15


Q, K, V = torch.zeros(2, 4, 3, 8), torch.zeros(2, 2, 5, 8), torch.zeros(2, 2, 5, 16)
BAD: list[tuple[dict[str, Any], type[Exception], str]] = [
    ({"query": [1]}, TypeError, "query must be a tensor"),
    ({"query": Q[0]}, ValueError, r"query must have shape \(B, Hq, Lq, D\), got \(4, 3, 8\)"),
    ({"query": Q.long()}, TypeError, "query must be floating point, got torch.int64"),
    ({"key": K[:1]}, ValueError, r"key must have shape \(2, Hkv, Lk, 8\).*got \(1, 2, 5, 8\)"),
    ({"key": V}, ValueError, r"key must have shape .*got \(2, 2, 5, 16\)"),
    ({"value": V[:, :, :4]}, ValueError, r"value must have shape \(2, 2, 5, Dv\).*got \(2, 2, 4, 16\)"),
    ({"key": K.half()}, TypeError, "key must have query's dtype torch.float32, got torch.float16"),
    ({"value": V.double()}, TypeError, "value must have query's dtype torch.float32, got torch.float64"),
    ({"value": V.to("meta")}, ValueError, "value must be on query's device cpu, got meta"),
    ({"query": torch.zeros(2, 3, 3, 8)}, ValueError, "query's heads must be a multiple of key's 2, got 3"),
    ({"query": Q[..., :4], "key": K[..., :4]}, ValueError, "head dim must be a multiple of 8 from 8 to 256, got 4"),
    ({"value": torch.zeros(2, 2, 5, 264)}, ValueError, "value's head dim must be .*got 264"),
    ({"key_lengths": torch.tensor([1.0, 2.0])}, TypeError, "key_lengths must be int32 or int64, got torch.float32"),
    ({"key_lengths": torch.tensor([1])}, ValueError, r"key_lengths must have shape \(2,\), got \(1,\)"),
    ({"key_lengths": [1, 2]}, TypeError, "key_lengths must be an int32 or int64 tensor, got list"),
    ({"key_lengths": torch.tensor([6, 0])}, ValueError, r"key_lengths.* must be in \[0, 5\], got"),
    ({"key_lengths": torch.tensor([0, -1])}, ValueError, r"key_lengths.* must be in \[0, 5\], got"),
    ({"key_mask": torch.ones(2, 5)}, TypeError, "key_mask must be bool, got torch.float32"),
    ({"key_mask": torch.ones(2, 4, dtype=torch.bool)}, ValueError, r"key_mask must have shape \(2, 5\), got \(2, 4\)"),
    ({"mask": torch.ones(3, 5)}, TypeError, "mask must be bool, got torch.float32"),
    ({"mask": torch.ones(2, 5, dtype=torch.bool)}, ValueError, r"mask must be broadcastable to .*got \(2, 5\)"),
    ({"bias": torch.ones(3, 5).long()}, TypeError, "bias must be floating point, got torch.int64"),
    ({"bias": torch.ones(3, 4)}, ValueError, r"bias must be broadcastable to .* = \(2, 4, 3, 5\), got \(3, 4\)"),
    ({"relative_bias": torch.ones(4, 4)}, ValueError, r"relative_bias must have shape .*got \(4, 4\)"),
    ({"relative_bias": 1.0}, TypeError, "relative_bias must be a floating-point tensor, got float"),
    ({"temperature": 0.0}, ValueError, "temperature must be > 0 and finite, got 0.0"),
    ({"temperature": NAN}, ValueError, "temperature must be > 0 and finite, got nan"),
    ({"temperature": "1"}, TypeError, "temperature must be a number or a tensor, got str"),
    ({"temperature": torch.ones(2)}, ValueError, r"temperature must be broadcastable to .*got \(2,\)"),
    ({"temperature": torch.ones(1, dtype=torch.int64)}, TypeError, "temperature must be floating point"),
    ({"scale": INF}, ValueError, "scale must be finite, got inf"),
    ({"scale": "1"}, TypeError, "scale must be a number, a tensor or None, got str"),
    ({"scale": torch.ones(2, 4, 3, 5)}, ValueError, "scale must be broadcastable to"),
    ({"causal": 1}, TypeError, "causal must be True or False, got 1"),
    ({"window": 3}, ValueError, "window must be None or"),
    ({"window": (1, -2)}, ValueError, r"window must be None or .*got \(1, -2\)"),
    ({"softcap": 0.0}, ValueError, "softcap must be None or a number > 0, got 0.0"),
    ({"dropout_p": 1.5}, ValueError, r"dropout_p must be a number in \[0, 1\], got 1.5"),
    ({"backend": "cuda9"}, ValueError, "backend must be one of"),
]


@pytest.mark.parametrize(("changes", "error", "message"), BAD)
def test_bad_input(changes: dict[str, Any], error: type[Exception], message: str) -> None:
    with pytest.raises(error, match=message):
        ek.attention(**{"query": Q, "key": K, "value": V, **changes})
    if "key_lengths" in changes:
        with pytest.raises(error, match=message):
            ek.attention(**{"query": Q, "key": K, "value": V, "backend": "reference", **changes})


X = torch.zeros(5, 2, 8)
BAD_VARLEN: list[tuple[dict[str, Any], type[Exception], str]] = [
    ({"query": Q}, ValueError, r"query must have shape \(Tq, Hq, D\), got"),
    ({"key": X[..., :0]}, ValueError, r"key must have shape \(Tk, Hkv, 8\).*got \(5, 2, 0\)"),
    ({"value": X[:4]}, ValueError, r"value must have shape \(5, 2, Dv\).*got \(4, 2, 8\)"),
    ({"cu_seqlens_q": torch.tensor([0.0, 5.0])}, TypeError, "cu_seqlens_q must be int32 or int64"),
    ({"cu_seqlens_q": torch.tensor(5)}, ValueError, r"cu_seqlens_q must have shape \(B \+ 1,\), got \(\)"),
    ({"cu_seqlens_q": torch.tensor([1, 5])}, ValueError, "cu_seqlens_q must start at 0, got 1"),
    ({"cu_seqlens_q": torch.tensor([0, 4, 3, 5])}, ValueError, "cu_seqlens_q must not decrease, got"),
    ({"cu_seqlens_q": torch.tensor([0, 4])}, ValueError, "cu_seqlens_q must end at the number of tokens, 5, got 4"),
    ({"cu_seqlens_k": torch.tensor([0, 2, 5])}, ValueError, r"cu_seqlens_k must have cu_seqlens_q's shape \(2,\)"),
    ({"cu_seqlens_k": torch.tensor([0, 6])}, ValueError, "cu_seqlens_k must end at the number of tokens, 5, got 6"),
    ({"key": X[:4], "value": X[:4]}, ValueError, "key must have query's 5 tokens without cu_seqlens_k, got 4"),
    ({"temperature": torch.ones(5, 1)}, ValueError, r"temperature must be broadcastable to \(Tq, Hq, 1\)"),
]


@pytest.mark.parametrize(("changes", "error", "message"), BAD_VARLEN)
@pytest.mark.parametrize("backend", [None, "reference"])
def test_bad_varlen_input(changes: dict[str, Any], error: type[Exception], message: str, backend: str | None) -> None:
    arguments = {"query": X, "key": X, "value": X, "cu_seqlens_q": torch.tensor([0, 5]), "backend": backend}
    with pytest.raises(error, match=message):
        ek.attention_varlen(**{**arguments, **changes})
