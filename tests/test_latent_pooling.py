"""Latent and multi-layer attention against their float64 references: gradients of every weight, layouts, dtypes, both
forms of the projections; what is computed and kept; bad input; torch's own machinery."""

from __future__ import annotations

import itertools
from collections.abc import Iterator
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from accuracy import assert_accurate
from latent_cases import DTYPES, FORMS, HEADS, NAN, WIDTH, block, check, latent_calls, multi_layer_calls, run
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils.flop_counter import FlopCounterMode

import embedkern as ek
from embedkern import nn
from embedkern.backends import latent_pooling as backend
from embedkern.backends import latent_rows
from embedkern.reference.latent_pooling import Block
from embedkern.schema import OPS


@pytest.fixture(autouse=True)
def one_thread() -> Iterator[None]:
    """Products this small cost more in waking threads than in work."""
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


@pytest.fixture
def small_tiles(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(latent_rows.TILE, "cpu", 7)


@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize("dtype", DTYPES)
def test_latent_attention(small_tiles: None, form: str, dtype: torch.dtype) -> None:
    check(ek.latent_attention, latent_calls(form), dtype)


@pytest.mark.parametrize("dtype", DTYPES)
def test_multi_layer_attention(small_tiles: None, dtype: torch.dtype) -> None:
    check(ek.multi_layer_attention, multi_layer_calls(), dtype)


def as_nv_embed_computes(pooling: Any, hidden: torch.Tensor, mask: torch.Tensor) -> torch.Tensor:
    """Through the module's own linear layers and norms, keys and values of the latents for each sequence."""
    first, second = pooling.cross_attend_blocks
    context = first.norm_context(pooling.latents).expand(len(hidden), -1, -1)
    q, kv = first.fn.to_q(first.norm(hidden)), first.fn.to_kv(context)
    q, k, v = (x.unflatten(-1, (pooling.num_heads, -1)).transpose(1, 2) for x in (q, *kv.chunk(2, -1)))
    attended = F.scaled_dot_product_attention(q, k, v).transpose(1, 2).flatten(2)
    hidden = first.fn.to_out(attended) + hidden
    values, gates = second.fn.net[0](second.norm(hidden)).chunk(2, -1)
    hidden = second.fn.net[2](values * F.gelu(gates)) + hidden
    return F.normalize((hidden * mask[..., None]).sum(1) / mask.sum(1, keepdim=True))


def as_tang_and_yang_compute(pooling: Any, layers: torch.Tensor) -> torch.Tensor:
    first, second = pooling.cross_attend_blocks
    latents = pooling.latents.expand(len(layers), -1, -1)
    kv = first.fn.to_kv(first.norm(layers + pooling.pos_emb.weight))
    q = first.fn.to_q(first.norm_context(latents))
    q, k, v = (x.unflatten(-1, (pooling.num_heads, -1)).transpose(1, 2) for x in (q, *kv.chunk(2, -1)))
    x = first.fn.to_out(F.scaled_dot_product_attention(q, k, v).transpose(1, 2).flatten(2)) + latents
    values, gates = second.fn.net[0](second.norm(x)).chunk(2, -1)
    return F.normalize((second.fn.net[2](values * F.gelu(gates)) + x).mean(1))


@pytest.mark.parametrize("num_latents", [6, 20])  # absorbed, and not
def test_modules_equal_the_papers(num_latents: int) -> None:
    sizes: Any = {"hidden_size": 32, "num_latents": num_latents, "num_heads": 4, "head_dim": 16}
    for pooling in (nn.LatentAttentionPooling(**sizes).double(), nn.MultiLayerPooling(5, **sizes).double()):
        for name, x in pooling.named_parameters():
            if "norm" in name:  # ones and zeros would hide a swap
                torch.nn.init.normal_(x, 1)
        parameters = list(pooling.parameters())
        hidden, mask = torch.randn(3, 9, 32, dtype=torch.float64), torch.rand(3, 9) < 0.7
        if isinstance(pooling, nn.MultiLayerPooling):
            tokens = [torch.randn(3, 9, 32, dtype=torch.float64) for _ in range(6)]
            results = [pooling(tokens, mask=mask)]
            layers = torch.stack([ek.pool(x, mask=mask, backend="reference") for x in tokens[1:]], 1)
            results.append(as_tang_and_yang_compute(pooling, layers))
        else:
            results = [pooling(hidden, mask=mask), as_nv_embed_computes(pooling, hidden, mask)]
        gradients = [torch.autograd.grad(out[:, :7].sum(), parameters) for out in results]
        for a, b in zip([results[0], *gradients[0]], [results[1], *gradients[1]], strict=True):
            torch.testing.assert_close(a, b, rtol=1e-10, atol=1e-10)


def test_checkpoint_keys() -> None:
    attention = ["to_q.weight", "to_kv.weight", "to_out.weight"]
    keys = {"latents", *(f"cross_attend_blocks.0.fn.{x}" for x in attention)}
    keys |= {f"cross_attend_blocks.{x}" for x in ("0.norm", "0.norm_context", "1.norm", "1.fn.net.0", "1.fn.net.2")}
    expanded = {y for x in keys for y in ([x] if x in ("latents",) or "to_" in x else [f"{x}.weight", f"{x}.bias"])}
    state = nn.LatentAttentionPooling(16, 4, 2, 8).state_dict()
    assert set(state) == expanded
    assert [tuple(state[f"cross_attend_blocks.{x}.weight"].shape) for x in ("0.fn.to_kv", "1.fn.net.0")] == [
        (32, 16),
        (128, 16),
    ]
    assert set(nn.MultiLayerPooling(3, 16, 4, 2, 8).state_dict()) == expanded | {"pos_emb.weight"}
    with torch.device("meta"):
        assert nn.LatentAttentionPooling().latents.shape == (512, 4096)
        assert nn.MultiLayerPooling().cross_attend_blocks[0].fn.to_out.weight.shape == (4096, 65536)


def test_forms_agree_and_explain_names_them() -> None:
    for form, sizes in FORMS.items():
        weights, hidden = block(*sizes, torch.float32), torch.randn(2, 3, WIDTH)
        explanation = ek.explain("latent_attention", hidden, *weights, HEADS)
        assert explanation.choice == "cpu"
        assert explanation.refused["reference"] == [f"able, but cpu ({form}) was chosen"]
    assert explanation.refused["cpu (absorbed projections)"] == [
        "9 latents are not fewer than the 12 / 3 dims of a head"
    ]
    assert (
        "cpu (absorbed projections)" in ek.explain("latent_attention", hidden, *weights, HEADS, backend="cpu").refused
    )
    triton = explanation.refused["triton (absorbed projections)"]
    assert "hidden is on cpu" in triton
    assert ek.explain("multi_layer_attention", hidden, hidden[0], *weights, HEADS).choice == "cpu"
    with pytest.raises(NotImplementedError, match="there is no 'cuda' backend"):
        ek.latent_attention(hidden, *weights, HEADS, backend="cuda")


def test_nothing_to_pool() -> None:
    weights = [x.requires_grad_() for x in block(5, 8, torch.float32)]
    for hidden, options in (
        (torch.full((2, 4, WIDTH), NAN), {"lengths": torch.tensor([0, 0])}),
        (torch.full((2, 4, WIDTH), NAN), {"skip": 4}),
        (torch.zeros(2, 0, WIDTH), {"eps": 0.0}),
        (torch.zeros(0, 4, WIDTH), {}),
        (torch.zeros(0, WIDTH), {"cu_seqlens": torch.tensor([0])}),
    ):
        for backend_name in ("cpu", "reference"):
            x = hidden.clone().requires_grad_()
            out = ek.latent_attention(x, *weights, HEADS, backend=backend_name, **options)
            assert out.eq(0).all()
            for gradient in torch.autograd.grad(out.sum(), [x, *weights]):
                assert gradient.eq(0).all()
    for batch in (0, 2):
        x = torch.full((batch, 3, WIDTH), NAN, requires_grad=True)
        out = ek.multi_layer_attention(x, torch.ones(3, WIDTH), *weights, HEADS, empty=torch.ones(batch).bool())
        assert out.shape == (batch, WIDTH)
        assert out.eq(0).all()
        for gradient in torch.autograd.grad(out.sum(), [x, *weights]):
            assert gradient.eq(0).all()


def test_nan_in_a_real_token_reaches_its_own_sequence_only(small_tiles: None) -> None:
    x = torch.randn(3, 4, WIDTH)
    x[1, 2] = NAN
    out = ek.latent_attention(x, *block(5, 8, torch.float32), HEADS)
    assert out[1].isnan().all()
    assert not out[[0, 2]].isnan().any()
    out = ek.multi_layer_attention(x, torch.zeros(4, WIDTH), *block(5, 8, torch.float32), HEADS)
    assert out[1].isnan().all()
    assert not out[[0, 2]].isnan().any()


def test_strides_and_repeated_tensors() -> None:
    weights = block(5, 8, torch.float32)
    for x in (
        torch.randn(7, 4, WIDTH).transpose(0, 1),
        torch.randn(4, WIDTH, 7).transpose(1, 2),
        torch.randn(4, 7, 2 * WIDTH)[..., ::2],
    ):
        lengths = torch.tensor([7, 2, 0, 5])
        wanted = ek.latent_attention(x.contiguous(), *weights, HEADS, lengths=lengths)
        assert torch.equal(ek.latent_attention(x, *weights, HEADS, lengths=lengths), wanted)
    shared = torch.ones(WIDTH, requires_grad=True)  # one tensor as all three norms' weight
    repeated = [*weights]
    repeated[4] = repeated[6] = repeated[8] = shared
    hidden = torch.randn(2, 3, WIDTH)
    gradients = [
        torch.autograd.grad(ek.latent_attention(hidden, *repeated, HEADS, backend=name).sum(), shared)[0]  # stride 0
        for name in ("cpu", "reference")
    ]
    torch.testing.assert_close(*gradients)
    transposed = [x.t().contiguous().t() for x in weights]
    torch.testing.assert_close(
        ek.latent_attention(hidden, *transposed, HEADS), ek.latent_attention(hidden, *weights, HEADS)
    )


@pytest.mark.parametrize("form", FORMS)
def test_only_needed_gradients(form: str) -> None:
    tensors = [torch.randn(2, 6, WIDTH), *block(*FORMS[form], torch.float32)]
    whole = run(ek.latent_attention, tensors, torch.float32)[1:]
    layers = [torch.randn(2, 6, WIDTH), torch.randn(6, WIDTH), *tensors[1:]]
    whole_layers = run(ek.multi_layer_attention, layers, torch.float32)[1:]
    for function, inputs, wanted in (
        (ek.latent_attention, tensors, whole),
        (ek.multi_layer_attention, layers, whole_layers),
    ):
        for i in range(len(inputs)):
            given = [x.clone().requires_grad_(i == j) for j, x in enumerate(inputs)]
            out = function(*given, HEADS)
            upstream = torch.linspace(-1, 1.3, out.numel(), dtype=torch.float64).sin().view(out.shape).float()
            out.backward(upstream)
            torch.testing.assert_close(given[i].grad, wanted[i])
            assert all(x.grad is None for j, x in enumerate(given) if j != i)


def test_other_dtypes_of_weights() -> None:
    weights = [x.requires_grad_() for x in block(5, 8, torch.float32)]
    hidden = torch.randn(2, 5, WIDTH).bfloat16().requires_grad_()
    out = ek.latent_attention(hidden, *weights, HEADS)
    assert out.dtype == torch.bfloat16
    torch.testing.assert_close(out.float(), ek.latent_attention(hidden.float(), *weights, HEADS), rtol=0.01, atol=0.01)
    gradients = torch.autograd.grad(out.sum(), [hidden, *weights])
    assert [g.dtype for g in gradients] == [torch.bfloat16, *[torch.float32] * 14]
    with torch.autocast("cpu", torch.bfloat16):  # nothing inside loses precision
        same = ek.latent_attention(hidden, *weights, HEADS)
    assert torch.equal(same, out)


class Largest(TorchDispatchMode):
    """The largest number of elements of any tensor that an operation makes."""

    size = 0

    def __torch_dispatch__(self, function: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        out = function(*args, **(kwargs or {}))
        for x in out if isinstance(out, (tuple, list)) else (out,):
            self.size = max(self.size, x.numel() if isinstance(x, torch.Tensor) else 0)
        return out


@pytest.mark.parametrize("form", FORMS)
def test_no_weights_of_all_tokens_and_no_padding_computed(form: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(latent_rows.TILE, "cpu", 16)
    num_latents, head_dim = (100, 120) if "absorbed" in form else (100, 40)
    weights, tokens = block(num_latents, head_dim, torch.float32), 400
    lengths = torch.tensor([tokens - 60, 60, 0])
    hidden = torch.randn(3, tokens, WIDTH)
    packed = torch.cat([x[:n] for x, n in zip(hidden, lengths, strict=True)])
    bounds = F.pad(lengths.cumsum(0), (1, 0))
    flops = []
    for x, places in ((hidden, (lengths, None, None, None)), (packed, (None, None, bounds, None))):
        options = (HEADS, True, 1e-12)
        with torch.no_grad(), FlopCounterMode(display=False) as counter, Largest() as largest:
            out, *saved = backend.latent_attention_forward(x, *places, weights, *options, True)
            backend.latent_attention_backward(torch.ones_like(out), x, *places, weights, *options, saved, [True] * 15)
        flops.append(counter.get_total_flops())
        assert largest.size < tokens * HEADS * num_latents
        assert all(s.numel() < tokens * HEADS * num_latents for s in saved)
        with FlopCounterMode(display=False) as counter:
            backend.latent_attention_backward(out, x, *places, weights, *options, saved, [True] * 15)
        whole = counter.get_total_flops()
        with FlopCounterMode(display=False) as counter:  # frozen weights cost nothing
            gradients = backend.latent_attention_backward(
                out, x, *places, weights, *options, saved, [True] + [False] * 14
            )
        assert gradients[0].shape == x.shape
        assert all(g.numel() == 0 for g in gradients[1:])
        assert counter.get_total_flops() < 0.75 * whole
    assert flops[0] == flops[1]


def test_nothing_is_kept_without_gradients() -> None:
    weights, hidden = block(5, 8, torch.float32), torch.randn(2, 5, WIDTH)
    options = (None, None, None, None, weights, HEADS, True, 1e-12)
    kept = [x.shape[0] for x in OPS.latent_attention_forward(hidden, *options, True)[3:5]]
    assert kept == [10, 10]
    calls = []

    def spy(*arguments: Any) -> Any:
        calls.append(arguments[-1])
        return OPS.latent_attention_forward(*arguments)

    chosen = ek.dispatch.Backend("cpu", forward=spy)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(ek.ops.latent_pooling, "BACKENDS", (chosen,))
        ek.latent_attention(hidden.requires_grad_(), *weights, HEADS)
        with torch.no_grad():
            ek.latent_attention(hidden, *weights, HEADS)
    assert calls == [True, False]


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_gated_unit(variant: str, dtype: torch.dtype) -> None:
    """Against torch, in float64 and by its own error; NaN stays in its column; sums of no rows."""

    def by_torch(u: torch.Tensor, d_g: torch.Tensor, sequences: torch.Tensor) -> list[torch.Tensor]:
        u = u.requires_grad_()
        a, gate = u.chunk(2, 1)
        g = a * F.gelu(gate)
        (d_u,) = torch.autograd.grad(g, u, d_g[sequences])
        return [torch.stack([g[:70].sum(0), g[70:70].sum(0), g[70:].sum(0)]).detach(), d_u, d_u.sum(0)]

    wide = 3 * torch.randn(200, 2 * 300), torch.randn(2, 300)
    sequences = (torch.arange(200) > 80).long()
    u, d_g = (x.to(dtype) for x in wide)
    padded = F.pad(u, (0, 5), value=NAN)[:, :600]
    for x in (u, padded):
        found = [OPS.gated_sums(x, [70, 70, 200]), *OPS.gated_backward(x, d_g, sequences)]
        exact = by_torch(u.double(), d_g.double(), sequences)
        for got, wanted, torchs in zip(found, exact, by_torch(u, d_g, sequences), strict=True):
            if dtype == torch.float64:  # what is exact here is torch's too
                torch.testing.assert_close(got, wanted, rtol=1e-13, atol=1e-13)
            else:
                assert_accurate(got, wanted, torchs, 2)
    gates = torch.tensor([NAN, torch.inf, -torch.inf, 0.0, 20.0, -20.0], dtype=dtype)
    (gelu,) = OPS.gated_sums(torch.cat([torch.ones_like(gates), gates])[None], [1])
    # by float64: in float32 torch with AVX-512 has NaN for ∞
    torch.testing.assert_close(gelu, F.gelu(gates.double()).to(dtype), equal_nan=True)
    for arguments, message in (
        ((u.half(), [1]), "u must be float32 or float64"),
        ((u, [3, 2]), "ends must ascend up to the number of rows"),
        ((u, [201]), "ends must ascend up to the number of rows"),
    ):
        with pytest.raises(ValueError, match=message):
            OPS.gated_sums(*arguments)
    for arguments, message in (
        ((u, d_g[:, 1:], sequences), r"d_g must be \(sequences, F\), of u's dtype"),
        ((u, d_g, sequences[1:]), "sequences must have a number for each row of u"),
        ((u, d_g, sequences * 2), "sequences must be rows of d_g"),
    ):
        with pytest.raises(ValueError, match=message):
            OPS.gated_backward(*arguments)


def test_same_bits_for_any_number_of_threads() -> None:
    tensors = [torch.randn(5, 60, WIDTH), *block(5, 8, torch.float32)]
    layers = [torch.randn(3, 4, WIDTH), torch.randn(4, WIDTH), *block(9, 4, torch.float32)]
    wide = [torch.randn(2, 330, 128), *block(30, 64, torch.float32, width=128)]
    odd = [torch.randn(3, 79, 100), *block(7, 24, torch.float32, width=100)]  # large enough for gelu to be cut
    unabsorbed = [tensors[0], *layers[2:]]
    results = []
    for threads in (1, 2, 3, 5):
        torch.set_num_threads(threads)
        result = run(ek.multi_layer_attention, layers, torch.float32)
        for inputs in (tensors, wide, odd, unabsorbed):
            result += run(ek.latent_attention, inputs, torch.float32)
        results.append(result)
    assert all(torch.equal(a, b) for other in results[1:] for a, b in zip(results[0], other, strict=True))


@pytest.mark.parametrize("form", FORMS)
def test_gradcheck(form: str) -> None:
    weights = [x.requires_grad_() for x in block(*FORMS[form], width=4)]
    hidden = torch.randn(2, 3, 4, dtype=torch.float64, requires_grad=True)
    lengths = torch.tensor([3, 1])
    assert torch.autograd.gradcheck(
        lambda *x: ek.latent_attention(*x, HEADS, lengths=lengths), (hidden, *weights), fast_mode=True
    )
    reference = lambda *x: ek.latent_attention(*x, HEADS, lengths=lengths, backend="reference")  # noqa: E731
    assert torch.autograd.gradgradcheck(reference, (hidden, *weights), fast_mode=True)
    embedding = torch.randn(3, 4, dtype=torch.float64, requires_grad=True)
    layers = (hidden, embedding, *weights)
    assert torch.autograd.gradcheck(lambda *x: ek.multi_layer_attention(*x, HEADS), layers, fast_mode=True)
    reference = lambda *x: ek.multi_layer_attention(*x, HEADS, backend="reference")  # noqa: E731
    assert torch.autograd.gradgradcheck(reference, layers, fast_mode=True)


def test_functions_alone() -> None:
    tensors = [torch.randn(2, 4, WIDTH), *block(5, 8, torch.float32)]
    layers = [torch.randn(2, 4, WIDTH), torch.randn(4, WIDTH), *tensors[1:]]
    skip = torch.tensor([1, 0])
    for name in (None, "reference"):
        for function, apply, inputs, options in (
            (ek.latent_attention, ek.LatentAttentionFunction.apply, tensors,
             {"lengths": torch.tensor([4, 2]), "mask": None, "cu_seqlens": None, "skip": skip, "normalize": False,
              "eps": 1e-12}),
            (ek.multi_layer_attention, ek.MultiLayerAttentionFunction.apply, layers,
             {"empty": torch.tensor([False, True]), "normalize": False, "eps": 1e-12}),
        ):  # fmt: skip
            wanted = run(function, inputs, torch.float32, backend=name, **options)
            positional = lambda *x, a=apply, o=options, n=name: a(*x, *o.values(), n)  # noqa: E731
            for a, b in zip(run(positional, inputs, torch.float32), wanted, strict=True):
                torch.testing.assert_close(a, b)
    torch.testing.assert_close(
        ek.LatentAttentionFunction.apply(*tensors, HEADS, None, None, None, 1),  # skip as a number, further defaults
        ek.latent_attention(*tensors, HEADS, skip=1),
    )
    with pytest.raises(TypeError, match="apply needs 14 weights and num_heads, got 2 arguments"):
        ek.LatentAttentionFunction.apply(*tensors[:3])


def test_second_derivative_raises() -> None:
    weights = [x.requires_grad_() for x in block(5, 8, torch.float32)]
    x = torch.randn(2, 3, WIDTH)
    for out in (
        ek.latent_attention(x, *weights, HEADS),
        ek.multi_layer_attention(x, torch.zeros(3, WIDTH), *weights, HEADS),
    ):
        (first,) = torch.autograd.grad(out.sum(), weights[0], create_graph=True)
        with pytest.raises(NotImplementedError, match="second derivatives only with backend='reference'"):
            (first.square() + weights[0].square()).sum().backward()


@pytest.mark.parametrize("form", FORMS)
def test_opcheck(form: str) -> None:
    weights, hidden = block(*FORMS[form], torch.float32), torch.randn(2, 4, WIDTH)
    torch.library.opcheck(OPS.gated_sums.default, (weights[1].detach(), [2, 5]))
    torch.library.opcheck(
        OPS.gated_backward.default, (hidden[0], torch.randn(3, WIDTH // 2), torch.tensor([0, 0, 2, 2]))
    )
    options = (weights, HEADS, True, 1e-12)
    arguments: Any = (hidden, torch.tensor([4, 1]), None, None, torch.tensor([0, 1]), *options)
    torch.library.opcheck(OPS.latent_attention_forward.default, (*arguments, False))
    arguments = (hidden, torch.tensor([4, 4]), None, None, None, *options)  # every kept row is written
    torch.library.opcheck(OPS.latent_attention_forward.default, (*arguments, True))
    out, *saved = OPS.latent_attention_forward(*arguments, True)
    needs = [True] * 14 + [False]
    torch.library.opcheck(OPS.latent_attention_backward.default, (out, *arguments, saved, needs))
    torch.library.opcheck(
        OPS.multi_layer_attention_forward.default, (hidden, hidden[0], torch.tensor([False, True]), *options, False)
    )
    arguments = (hidden, hidden[0], None, *options)
    torch.library.opcheck(OPS.multi_layer_attention_forward.default, (*arguments, True))
    out, *saved = OPS.multi_layer_attention_forward(*arguments, True)
    torch.library.opcheck(OPS.multi_layer_attention_backward.default, (out, *arguments, saved, [True, *needs]))


def test_compile() -> None:
    attention = nn.LatentAttentionPooling(16, 4, 2, 8)
    layers = nn.MultiLayerPooling(3, 16, 4, 2, 8)

    def loss(x: torch.Tensor, lengths: torch.Tensor) -> torch.Tensor:
        return (
            attention(x, lengths=lengths, skip=1).sin().sum() + layers([x, x + 1, x.cos()], lengths=lengths)[:, 0].sum()
        )

    compiled = torch.compile(loss, fullgraph=True, dynamic=True, backend="aot_eager")
    for batch, length in ((3, 8), (5, 11)):
        x, lengths = torch.randn(batch, length, 16, requires_grad=True), torch.arange(batch) + 3
        inputs = [x, *attention.parameters(), *layers.parameters()]
        torch.testing.assert_close(compiled(x, lengths), loss(x, lengths))
        for pair in itertools.pairwise([torch.autograd.grad(f(x, lengths), inputs) for f in (compiled, loss)]):
            torch.testing.assert_close(*pair)
    with pytest.raises(ValueError, match=r"lengths must be in \[0, 11\], got \[12, 12, 12, 12, 12\]"):
        compiled(x, torch.full((5,), 12))


X, LAYERS = torch.randn(2, 4, WIDTH), torch.randn(2, 3, WIDTH)
WEIGHTS = dict(zip(Block._fields, block(5, 8, torch.float32), strict=True))


@pytest.mark.parametrize(
    ("error", "message", "changes"),
    [
        (ValueError, r"hidden must have shape \(B, L, C\)", {"hidden": X[0, 0]}),
        (ValueError, "lengths and mask exclude|lengths, mask and cu_seqlens exclude",
         {"lengths": torch.tensor([1, 2]), "mask": torch.ones(2, 4).bool()}),
        (ValueError, r"lengths must be in \[0, 4\]", {"lengths": torch.tensor([1, 5])}),
        (ValueError, "skip must be ≥ 0, got -1", {"skip": -1}),
        (ValueError, r"skip must be ≥ 0, got \[0, -1\]", {"skip": torch.tensor([0, -1])}),
        (ValueError, "cu_seqlens must end at the number of tokens, 4, got 3",
         {"hidden": X[0], "cu_seqlens": torch.tensor([0, 3])}),
        (ValueError, r"latents must have shape \(5, 24\), got \(5, 23\)", {"latents": torch.randn(5, 23)}),
        (ValueError, "latents must hold at least one latent", {"latents": torch.randn(0, WIDTH)}),
        (TypeError, r"latents must be a tensor \(N, C\), got list", {"latents": [1.0]}),
        (ValueError, r"to_kv must have shape \(48, 24\), got \(24, 24\)", {"to_kv": torch.randn(24, WIDTH)}),
        (ValueError, r"to_out must have shape \(24, 24\), got \(24, 8\)", {"to_out": torch.randn(24, 8)}),
        (ValueError, r"norm_bias must have shape \(24,\), got \(8,\)", {"norm_bias": torch.randn(8)}),
        (ValueError, r"ff_in_weight must have shape \(96, 24\), got \(48, 24\)",
         {"ff_in_weight": torch.randn(48, WIDTH)}),
        (TypeError, "ff_out_bias must be floating point, got torch.int64", {"ff_out_bias": torch.zeros(WIDTH).long()}),
        (ValueError, "to_q must be on hidden's device cpu, got meta",
         {"to_q": torch.empty(24, WIDTH, device="meta")}),
        (ValueError, "num_heads must divide to_q's 24 rows, got 5", {"num_heads": 5}),
        (ValueError, "num_heads must divide to_q's 24 rows, got 0", {"num_heads": 0}),
        (ValueError, "eps must be ≥ 0, got -1", {"eps": -1.0}),
    ],
)  # fmt: skip
def test_bad_input(error: type[Exception], message: str, changes: dict[str, Any]) -> None:
    with pytest.raises(error, match=message):
        ek.latent_attention(**{"hidden": X, **WEIGHTS, "num_heads": HEADS, **changes})


@pytest.mark.parametrize(
    ("error", "message", "changes"),
    [
        (ValueError, r"layers must have shape \(B, layers, C\), got \(3, 24\)", {"layers": LAYERS[0]}),
        (ValueError, "layers must hold at least one layer", {"layers": LAYERS[:, :0]}),
        (ValueError, r"layer_embedding must have shape \(3, 24\), got \(4, 24\)",
         {"layer_embedding": torch.randn(4, WIDTH)}),
        (TypeError, "empty must be bool, got torch.int64", {"empty": torch.tensor([0, 1])}),
        (ValueError, r"empty must have shape \(2,\), got \(3,\)", {"empty": torch.zeros(3).bool()}),
        (ValueError, r"latents must have shape \(5, 24\), got \(5, 23\)", {"latents": torch.randn(5, 23)}),
        (ValueError, "eps must be ≥ 0, got nan", {"eps": NAN}),
    ],
)  # fmt: skip
def test_bad_multi_layer_input(error: type[Exception], message: str, changes: dict[str, Any]) -> None:
    with pytest.raises(error, match=message):
        ek.multi_layer_attention(
            **{"layers": LAYERS, "layer_embedding": LAYERS[0], **WEIGHTS, "num_heads": HEADS, **changes}
        )


def test_bad_sizes_of_modules() -> None:
    with pytest.raises(ValueError, match="num_latents must be ≥ 1, got 0"):
        nn.LatentAttentionPooling(16, 0)
    with pytest.raises(ValueError, match="num_layers must be ≥ 1, got 0"):
        nn.MultiLayerPooling(0, 16, 4, 2, 8)
    with pytest.raises(ValueError, match="token_pooling must be 'mean' or 'lasttoken', got 'max'"):
        nn.MultiLayerPooling(2, 16, 4, 2, 8, token_pooling="max")
