"""attention as a PyTorch function: derivatives, compilation, autocast, checkpointing; dispatch; helpers; bad input."""

from __future__ import annotations

import math
import warnings
from typing import Any

import pytest
import torch
from attention_cases import INF, NAN, inputs
from torch import Tensor

import embedkern as ek
from embedkern import dispatch
from embedkern.schema import OPS


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
