"""attention against its float64 reference: every layout, dtype and CPU variant; temperatures, gradients, threads."""

from __future__ import annotations

import itertools

import pytest
import torch
import torch.nn.functional as F
from attention_cases import DTYPES, INF, NAN, check, inputs, packed, run
from torch import Tensor

import embedkern as ek

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


def test_temperature_where_scores_are_far_from_zero(variant: str) -> None:
    """The gradients of scores, which add up to 0, are rounded to bfloat16: times such scores that would show."""
    tensors = [(torch.randn(2, 3, 70, 32) + mean).bfloat16() for mean in (3, 3, 0)]
    upstream = torch.randn(2, 3, 70, 32).bfloat16()
    tau = (torch.rand(3, 1, 1) + 0.5).requires_grad_()
    found = []
    for dtype, backend in ((torch.float64, "reference"), (torch.bfloat16, "cpu")):
        temperature = tau.double() if dtype == torch.float64 else tau
        out = ek.attention(*(x.to(dtype) for x in tensors), temperature=temperature, backend=backend)
        found += torch.autograd.grad(out, tau, upstream.to(dtype))
    exact, ours = found
    assert (ours - exact).abs().max() <= torch.finfo(torch.bfloat16).eps * exact.abs().max()


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
    # Shared by sequences, bias by heads too. Huge gradients that cancel show any other order of the sums.
    shared = [torch.randn(128, 128, requires_grad=True), torch.randn(4, 9, requires_grad=True)]
    many = [x.repeat(4, 1, 1, 1) for x in inputs(16, 4, 4, 128, 128, 8, 8)]
    upstream = torch.randn(64, 4, 128, 8)
    upstream[:16] *= 1e12
    upstream[16:32] = -upstream[:16]
    for threads in (1, 2, 5):
        torch.set_num_threads(threads)
        padded_results = run(ek.attention, (q, k, v), "cpu", None, options)
        varlen = run(ek.attention_varlen, tokens, "cpu", None, {"cu_seqlens_q": torch.tensor([0, 850, 900])})
        out = ek.attention(*many, bias=shared[0], relative_bias=shared[1], backend="cpu")
        of_shared = torch.autograd.grad(out, shared, upstream)
        results.append([*padded_results.values(), *varlen.values(), *of_shared])
    torch.set_num_threads(before)
    assert all(torch.equal(a, b) for other in results[1:] for a, b in zip(results[0], other, strict=True))
