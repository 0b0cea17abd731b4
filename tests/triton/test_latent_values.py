"""Latent and multi-layer attention with their Triton kernels, forward and every gradient, against float64."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import pytest
import torch
from cuda_graph import replayed
from latent_cases import FORMS, HEADS, WIDTH, block, check, latent_calls, layouts, multi_layer_calls, run

import embedkern as ek
from embedkern import schema
from embedkern.backends import latent_rows
from embedkern.backends.triton import latent_kernels
from embedkern.backends.triton.launcher import DEVICE, INTERPRETED
from embedkern.schema import OPS

DTYPES = (torch.float32, torch.float16) if INTERPRETED else (torch.float32, torch.float16, torch.bfloat16)


@pytest.fixture(autouse=True)
def as_on_a_gpu(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """Products in the inputs' dtype, tiles that cut sequences."""
    schema.NARROW.add(DEVICE)
    monkeypatch.setitem(latent_rows.TILE, DEVICE, 7)
    with torch.device(DEVICE):
        yield
    schema.NARROW.discard("cpu")


@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize("dtype", DTYPES)
def test_latent_attention(form: str, dtype: torch.dtype) -> None:
    for tensors, options in latent_calls(form):
        assert ek.explain("latent_attention", *tensors, HEADS, **options).choice == "triton"
    check(ek.latent_attention, latent_calls(form), dtype)


@pytest.mark.parametrize("dtype", DTYPES)
def test_multi_layer_attention(dtype: torch.dtype) -> None:
    check(ek.multi_layer_attention, multi_layer_calls(), dtype)


def test_kernels_over_many_blocks() -> None:
    """Several programs of rows and of columns, the last ones not full, in tiles of 100 rows."""
    batch, width, rows = 3, latent_kernels.COLUMNS + 6, latent_kernels.PART + 5
    ends = torch.tensor([40, 40, rows - 3])  # the last three are nobody's
    sequences = torch.searchsorted(ends, torch.arange(rows), right=True)
    u = torch.randn(rows, 2 * width)
    leaf = u.double().requires_grad_()
    a, gate = leaf.chunk(2, 1)
    g = a * torch.nn.functional.gelu(gate)
    wanted = torch.zeros(batch + 1, width, dtype=torch.float64).index_add(0, sequences, g)
    sums, plain = torch.zeros(batch, width), torch.zeros(batch, 2 * width)
    for first in range(0, rows, 100):
        latent_kernels.add_sums(sums, u[first : first + 100], ends, first, gated=True)
        latent_kernels.add_sums(plain, u[first : first + 100], ends, first)
    torch.testing.assert_close(sums.double(), wanted[:batch].detach(), rtol=1e-5, atol=1e-5)
    plainly = torch.zeros(batch + 1, 2 * width).index_add(0, sequences, u)[:batch]
    torch.testing.assert_close(plain, plainly, rtol=1e-5, atol=1e-5)
    d_g = torch.randn(batch + 1, width)
    d_g[batch] = 0
    (exact,) = torch.autograd.grad(g, leaf, d_g[sequences].double())
    d_u, d_bias = latent_kernels.d_gated(u, d_g, sequences, True)
    torch.testing.assert_close(d_u.double(), exact, rtol=1e-5, atol=1e-6)
    torch.testing.assert_close(d_bias.double(), exact.sum(0), rtol=1e-5, atol=1e-5)


def test_while_a_graph_is_captured(monkeypatch: pytest.MonkeyPatch) -> None:
    """Nobody is asked how many rows there are: all are computed, and the others give nothing."""
    weights = block(5, 8, torch.float32)
    for hidden, options in layouts():
        wanted = run(ek.latent_attention, [hidden, *weights], torch.float32, **options)
        with monkeypatch.context() as context:
            context.setattr(latent_rows, "_capturing", lambda device: True)
            context.setattr(torch.Tensor, "item", None)
            context.setattr(torch.Tensor, "tolist", None)
            context.setattr(torch.Tensor, "__int__", None)
            got = run(ek.latent_attention, [hidden, *weights], torch.float32, **options)
        for a, b in zip(got, wanted, strict=True):
            torch.testing.assert_close(a, b, rtol=1e-5, atol=1e-5)


def test_nonsense_places_stay_inside() -> None:
    weights, hidden = block(5, 8, torch.float32), torch.randn(2, 6, WIDTH)
    for lengths, inside in (([99, -5], [6, 0]), ([2**40, -(2**40)], [6, 0])):
        got, wanted = (ek.latent_attention(hidden, *weights, HEADS, lengths=torch.tensor(x)) for x in (lengths, inside))
        assert torch.equal(got, wanted)
    for bounds in ([0, 30, 6], [5, 3, 99], [-4, 2**40, -(2**40)]):
        for skip in (None, torch.tensor([-3, 2])):
            x = hidden[0].clone().requires_grad_()
            out = ek.latent_attention(x, *weights, HEADS, cu_seqlens=torch.tensor(bounds), skip=skip)
            torch.autograd.grad(out.sum(), x)


def test_backends_and_autocast() -> None:
    weights, hidden = block(5, 8, torch.float32), torch.randn(2, 4, WIDTH)
    refused = ek.explain("latent_attention", hidden.double(), *weights, HEADS).refused
    assert refused["triton (absorbed projections)"] == ["hidden is torch.float64"]
    layers = (hidden.double(), hidden[0], *weights, HEADS)
    assert ek.explain("multi_layer_attention", *layers).refused["triton"] == ["layers is torch.float64"]
    assert ek.explain("multi_layer_attention", hidden, *layers[1:]).choice == "triton"
    for function, inputs in ((ek.latent_attention, (hidden,)), (ek.multi_layer_attention, (hidden, hidden[0]))):
        wanted = function(*(x.bfloat16() for x in inputs), *weights, HEADS).float()
        with torch.autocast(DEVICE, torch.bfloat16):
            got = function(*inputs, *weights, HEADS)
        assert got.dtype == torch.float32
        if function is ek.latent_attention:
            assert torch.equal(got, wanted)
        torch.testing.assert_close(got, wanted, rtol=0.05, atol=0.02)
        assert not torch.equal(got, function(*inputs, *weights, HEADS))


def test_operators() -> None:
    weights, hidden = block(5, 8, torch.float16), torch.randn(2, 4, WIDTH).half()
    options: Any = (torch.tensor([4, 4]), None, None, None, weights, HEADS, True, 1e-12)
    tests = ("test_schema", "test_faketensor")
    torch.library.opcheck(OPS.latent_attention_forward.default, (hidden, *options, True), test_utils=tests)
    out, *saved = OPS.latent_attention_forward(hidden, *options, True)
    assert [x.dtype for x in saved] == [torch.float32] * 2 + [torch.float16] * 4
    arguments = (out, hidden, *options, saved, [True] * 15)
    torch.library.opcheck(OPS.latent_attention_backward.default, arguments, test_utils=tests)
    options = (hidden[0], torch.tensor([False, True]), weights, HEADS, True, 1e-12)
    torch.library.opcheck(OPS.multi_layer_attention_forward.default, (hidden, *options, True), test_utils=tests)
    out, *saved = OPS.multi_layer_attention_forward(hidden, *options, True)
    arguments = (out, hidden, *options, saved, [True] * 16)
    torch.library.opcheck(OPS.multi_layer_attention_backward.default, arguments, test_utils=tests)


@pytest.mark.skipif(not torch.cuda.is_available(), reason="no GPU")
def test_cuda_graph() -> None:
    weights = [x.requires_grad_() for x in block(5, 8, torch.float32)]
    hidden, lengths = torch.randn(3, 9, WIDTH).requires_grad_(), torch.tensor([9, 0, 4])

    def step() -> tuple[torch.Tensor, ...]:
        out = ek.latent_attention(hidden, *weights, HEADS, lengths=lengths)
        return torch.autograd.grad(out[:, :5].sum(), [hidden, *weights])

    got, wanted = replayed(step)
    for a, b in zip(got, wanted, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-4, atol=1e-5)
