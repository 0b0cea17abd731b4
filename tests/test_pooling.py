"""pool against its float64 reference: every mode, layout, dtype and CPU variant; bad input; torch's own machinery."""

from __future__ import annotations

import itertools
from typing import Any

import pytest
import torch
from accuracy import assert_accurate
from hypothesis import given, settings
from hypothesis import strategies as st

import embedkern as ek
from embedkern.schema import OPS, POOL_MODES

NAN = float("nan")
DTYPES = (torch.float32, torch.bfloat16, torch.float16)


def padded(batch: int, length: int, channels: int, dtype: torch.dtype, lengths: torch.Tensor) -> torch.Tensor:
    """Random tokens; NaN in the padding."""
    hidden = torch.randn(batch, length, channels).to(dtype)
    hidden[torch.arange(length) >= lengths[:, None]] = NAN
    return hidden


def check(hidden: torch.Tensor, mode: Any, factor: float = 2.0, **options: Any) -> None:
    """The default backend's output and gradient against the reference in float64 and at hidden's dtype."""
    results = {}
    for name, dtype, backend in (
        ("ours", hidden.dtype, None),
        ("exact", torch.float64, "reference"),
        ("torchs", hidden.dtype, "reference"),
    ):
        x = hidden.detach().to(dtype).requires_grad_()
        out = ek.pool(x, mode, backend=backend, **options)
        upstream = torch.linspace(-1, 1, out.numel(), dtype=torch.float64).reshape(out.shape).to(out.dtype)
        (gradient,) = torch.autograd.grad(out, x, upstream)
        results[name] = out, gradient
    for i, (what, allowed) in enumerate((("out", factor), ("gradient", factor * 1.5))):
        ours, exact, torchs = (results[name][i] for name in ("ours", "exact", "torchs"))
        assert_accurate(ours, exact, torchs, allowed, f"{what} of {mode} {options.keys()}")


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("mode", [*POOL_MODES, ("mean", "max"), ("cls", "weightedmean", "lasttoken")])
def test_lengths(variant: str, mode: Any, dtype: torch.dtype) -> None:
    lengths = torch.tensor([13, 0, 1, 70, 4, 64])
    for channels, normalize in ((5, False), (16, True), (67, True)):
        check(padded(6, 70, channels, dtype, lengths), mode, lengths=lengths, normalize=normalize)


@pytest.mark.parametrize("mode", POOL_MODES)
@pytest.mark.parametrize("integers", [torch.int32, torch.int64])
def test_packed(variant: str, mode: str, integers: torch.dtype) -> None:
    cu_seqlens = torch.tensor([0, 5, 5, 6, 140], dtype=integers)
    skip = torch.tensor([2, 1, 0, 3], dtype=integers)
    check(torch.randn(140, 37), mode, cu_seqlens=cu_seqlens, skip=skip)


@pytest.mark.parametrize("mode", POOL_MODES)
def test_mask_of_any_pattern(variant: str, mode: str) -> None:
    hidden = torch.randn(5, 33, 20)
    mask = torch.rand(5, 33) < 0.5
    mask[1], mask[2, :20], mask[3] = False, False, True
    hidden[~mask] = NAN
    for skip in (None, 3, torch.tensor([0, 1, 40, 2, 1])):
        check(hidden, mode, mask=mask, skip=skip)
    check(hidden, mode, mask=mask.int())
    check(hidden, mode, mask=mask.T.contiguous().T)


@pytest.mark.parametrize("mode", ["mean", "max", "weightedmean", ("sum", "cls")])
def test_spans_overlap_and_cross_sequences(variant: str, mode: Any) -> None:
    lengths = torch.tensor([20, 7, 40])
    hidden = padded(3, 40, 24, torch.float32, lengths)
    spans = torch.tensor([[3, 9], [15, 60], [0, 120], [50, 50], [47, 80], [85, 90]])
    check(hidden, mode, spans=spans, lengths=lengths, normalize=True)
    check(hidden, mode, spans=spans.int(), mask=torch.arange(40) < lengths[:, None])
    packed = torch.randn(120, 24)
    check(packed, mode, spans=spans)
    check(packed, mode, spans=spans, cu_seqlens=torch.tensor([0, 40, 120]))


@pytest.mark.parametrize("normalize", [False, True])
def test_truncation_comes_before_normalisation(normalize: bool) -> None:
    for truncate_dim in (2, 24, 30, 48):  # of one column, the gradient is 0 and its error pure rounding
        check(torch.randn(3, 5, 24), ("mean", "max"), truncate_dim=truncate_dim, normalize=normalize)
    out = ek.pool(torch.randn(3, 5, 24), truncate_dim=10, normalize=True)
    torch.testing.assert_close(out.norm(dim=1), torch.ones(3))


def test_strides_are_read_in_place() -> None:
    x = torch.randn(7, 4, 50)
    check(x.transpose(0, 1), "mean")
    check(x[..., :33], "max", normalize=True)
    check(x.transpose(1, 2), "mean")  # no unit stride: copied once
    expanded = torch.randn(1, 1, 8).expand(3, 5, 8)
    torch.testing.assert_close(ek.pool(expanded), expanded[:, 0])


def test_gradient_of_any_stride() -> None:
    x = torch.randn(3, 5, 8, requires_grad=True)
    ek.pool(x).sum().backward()  # stride 0
    torch.testing.assert_close(x.grad, torch.full_like(x, 0.2))
    x.grad = None
    ek.pool(x).backward(torch.randn(8, 3).T)
    assert torch.isfinite(x.grad).all()


def test_ties_and_nan_of_max() -> None:
    x = torch.tensor([[[1.0, 2, NAN], [3, 2, 5], [3, 2, NAN]]], requires_grad=True)
    out = ek.pool(x, "max")
    assert out[0, 0] == 3
    assert out[0, 1] == 2
    assert out[0, 2].isnan()
    out.sum().backward()
    assert x.grad[0].tolist() == [[0, 1, 1], [1, 0, 0], [0, 0, 0]]
    infinite = torch.full((1, 3, 2), -float("inf"), requires_grad=True)
    ek.pool(infinite, "max").sum().backward()
    assert infinite.grad[0].tolist() == [[1, 1], [0, 0], [0, 0]]


def test_nan_in_a_real_token_reaches_its_own_sequence_only() -> None:
    x = torch.randn(3, 4, 9)
    x[1, 2] = NAN
    out = ek.pool(x, "mean", normalize=True)
    assert out[1].isnan().all()
    assert not out[[0, 2]].isnan().any()


@pytest.mark.parametrize("mode", POOL_MODES)
def test_nothing_to_pool(mode: str) -> None:
    for x, options in (
        (torch.full((2, 4, 8), NAN), {"lengths": torch.tensor([0, 0])}),
        (torch.full((2, 4, 8), NAN), {"skip": 4, "normalize": True}),
        (torch.zeros(2, 0, 8), {"normalize": True, "eps": 0.0}),
        (torch.zeros(0, 4, 8), {}),
        (torch.zeros(0, 8), {"cu_seqlens": torch.tensor([0, 0, 0])}),
        (torch.zeros(0, 8), {"cu_seqlens": torch.tensor([0])}),
    ):
        for backend in ("cpu", "reference"):
            x = x.detach().clone().requires_grad_()
            out = ek.pool(x, mode, backend=backend, **options)
            assert out.eq(0).all()
            out.sum().backward()
            assert x.grad.eq(0).all()


def test_long_sums_in_low_precision() -> None:
    x = torch.full((1, 4096, 16), 1.0078125, dtype=torch.bfloat16)
    assert ek.pool(x, "sum").float().eq(4128).all()
    long = torch.rand(1, 100_000, 8) + 1
    torch.testing.assert_close(ek.pool(long, "sum").double(), long.double().sum(1), rtol=2e-7, atol=0)


def test_zero_vector_normalises_to_zero() -> None:
    for eps in (0.0, 1e-12):
        x = torch.zeros(2, 3, 8, requires_grad=True)
        out = ek.pool(x, normalize=True, eps=eps)
        assert out.eq(0).all()
        out.sum().backward()
        assert torch.isfinite(x.grad).all()


def test_same_bits_for_any_number_of_threads() -> None:
    x = torch.randn(9, 300, 700, requires_grad=True)
    before = torch.get_num_threads()
    results = []
    for threads in (1, 2, 5):
        torch.set_num_threads(threads)
        out = ek.pool(x, ("mean", "max"), lengths=torch.arange(9) * 37, normalize=True)
        results.append((out, torch.autograd.grad(out.sin().sum(), x)[0]))
    torch.set_num_threads(before)
    assert all(torch.equal(a, b) for other in results[1:] for a, b in zip(results[0], other, strict=True))


@settings(max_examples=40, deadline=None)
@given(
    lengths=st.lists(st.integers(0, 9), min_size=1, max_size=5),
    channels=st.integers(1, 40),
    modes=st.lists(st.sampled_from(POOL_MODES), min_size=1, max_size=3),
    skip=st.integers(0, 4),
    normalize=st.booleans(),
)
def test_padded_equals_packed(lengths: list[int], channels: int, modes: list[str], skip: int, normalize: bool) -> None:
    n = torch.tensor(lengths)
    hidden = padded(len(lengths), 9, channels, torch.float32, n)
    packed = hidden[torch.arange(9) < n[:, None]]
    cu_seqlens = torch.nn.functional.pad(n.cumsum(0), (1, 0))
    options: Any = {"skip": skip, "normalize": normalize}
    a = ek.pool(hidden, modes, lengths=n, **options)
    assert torch.equal(a, ek.pool(packed, modes, cu_seqlens=cu_seqlens, **options))
    torch.testing.assert_close(a, ek.pool(hidden, modes, lengths=n, backend="reference", **options))


def test_reference_in_float64() -> None:
    x = torch.randn(2, 5, 3, dtype=torch.float64, requires_grad=True)
    for mode in POOL_MODES:
        options: Any = {"lengths": torch.tensor([5, 2]), "normalize": True, "backend": "reference"}
        assert torch.autograd.gradcheck(lambda x, m=mode, o=options: ek.pool(x, m, **o), x)
        assert torch.autograd.gradgradcheck(lambda x, m=mode, o=options: ek.pool(x, m, **o), x)
        assert torch.autograd.gradcheck(lambda x, m=mode: ek.PoolFunction.apply(x, m), x)


def test_opcheck() -> None:
    x, lengths, skip = torch.randn(3, 6, 10), torch.tensor([6, 0, 3]), torch.tensor([0, 1, 1])
    modes = [POOL_MODES.index("mean"), POOL_MODES.index("max")]
    arguments: Any = (x, lengths, None, None, skip, None, modes, 20, True, 1e-12)
    torch.library.opcheck(OPS.pool_forward.default, arguments)
    out, pooled, argmax = OPS.pool_forward(*arguments)
    torch.library.opcheck(OPS.pool_backward.default, (out, pooled, argmax, list(x.shape), *arguments[1:]))


def test_compile() -> None:
    def loss(x: torch.Tensor, lengths: torch.Tensor) -> torch.Tensor:
        return ek.pool(x, ("mean", "max"), lengths=lengths, skip=1, normalize=True).sin().sum()

    compiled = torch.compile(loss, fullgraph=True, dynamic=True)
    for batch, length in ((3, 8), (5, 11)):
        x, lengths = torch.randn(batch, length, 12, requires_grad=True), torch.arange(batch) + 3
        torch.testing.assert_close(compiled(x, lengths), loss(x, lengths))
        for a, b in itertools.pairwise([torch.autograd.grad(f(x, lengths), x)[0] for f in (compiled, loss)]):
            torch.testing.assert_close(a, b)
    with pytest.raises(ValueError, match=r"lengths\[0\] must be in \[0, 11\], got 12"):
        torch.compile(loss, fullgraph=True, backend="aot_eager")(x, torch.full((5,), 12))


def test_autocast_keeps_the_dtype() -> None:
    x = torch.randn(2, 3, 8, requires_grad=True)
    with torch.autocast("cpu", torch.bfloat16):
        out = ek.pool(x.bfloat16())
        assert out.dtype == torch.bfloat16
        assert ek.pool(x).dtype == torch.float32
    out.sum().backward()
    assert x.grad.dtype == torch.float32


def test_second_derivative_raises() -> None:
    x = torch.randn(2, 3, 8, requires_grad=True)
    (first,) = torch.autograd.grad(ek.pool(x).sum(), x, create_graph=True)
    with pytest.raises(NotImplementedError, match="second derivatives only with backend='reference'"):
        (first.square() + x.square()).sum().backward()


def test_explain_and_forced_backends() -> None:
    x = torch.randn(2, 3, 8)
    assert ek.explain("pool", x).choice == "cpu"
    choice, refused = ek.explain("pool", x.double(), "max")
    assert choice == "reference"
    assert refused["cpu"] == ["hidden is torch.float64"]
    with pytest.raises(NotImplementedError, match=r"pool: backend 'cpu' can't run this: hidden is torch\.float64"):
        ek.pool(x.double(), backend="cpu")
    with pytest.raises(ValueError, match="backend must be one of"):
        ek.pool(x, backend="gpu")
    with pytest.raises(ValueError, match="name must be one of"):
        ek.explain("pooling", x)


X = torch.randn(2, 3, 8)
PACKED = torch.randn(6, 8)
LONG = torch.int64


@pytest.mark.parametrize(
    ("error", "message", "hidden", "options"),
    [
        (TypeError, r"hidden must be a tensor \(B, L, C\).*got list", [1.0], {}),
        (ValueError, r"hidden must have shape \(B, L, C\).*got \(2,\)", torch.randn(2), {}),
        (TypeError, "hidden must be floating point, got torch.int64", torch.zeros(2, 3, 8, dtype=LONG), {}),
        (ValueError, "mode must be one of .*, got 'average'", X, {"mode": "average"}),
        (ValueError, "mode must name at least one", X, {"mode": ()}),
        (
            ValueError,
            "lengths, mask and cu_seqlens exclude each other, got lengths and mask",
            X,
            {"lengths": torch.tensor([1, 2]), "mask": torch.ones(2, 3, dtype=torch.bool)},
        ),
        (ValueError, r"hidden \(T, C\) of shape \(6, 8\) needs cu_seqlens or spans", PACKED, {}),
        (ValueError, "cu_seqlens needs hidden", X, {"cu_seqlens": torch.tensor([0, 6])}),
        (
            ValueError,
            "lengths and mask need hidden",
            PACKED,
            {"lengths": torch.tensor([1]), "spans": torch.zeros(1, 2)},
        ),
        (TypeError, "lengths must be int32 or int64, got torch.float32", X, {"lengths": torch.tensor([1.0, 2])}),
        (TypeError, "lengths must be an int32 or int64 tensor, got list", X, {"lengths": [1, 2]}),
        (ValueError, r"lengths must have shape \(2,\), got \(3,\)", X, {"lengths": torch.tensor([1, 2, 3])}),
        (
            ValueError,
            "lengths must be on hidden's device cpu, got meta",
            X,
            {"lengths": torch.zeros(2, dtype=LONG, device="meta")},
        ),
        (ValueError, r"lengths\[1\] must be in \[0, 3\], got 4", X, {"lengths": torch.tensor([1, 4])}),
        (ValueError, r"lengths\[0\] must be in \[0, 3\], got -1", X, {"lengths": torch.tensor([-1, 1])}),
        (TypeError, "mask must be bool or 0/1 integers, got torch.float32", X, {"mask": torch.ones(2, 3)}),
        (ValueError, r"mask must have shape \(2, 3\), got \(3, 2\)", X, {"mask": torch.ones(3, 2, dtype=torch.bool)}),
        (ValueError, "cu_seqlens must start at 0, got 1", PACKED, {"cu_seqlens": torch.tensor([1, 6])}),
        (ValueError, "cu_seqlens must not decrease, got 4 then 3", PACKED, {"cu_seqlens": torch.tensor([0, 4, 3, 6])}),
        (
            ValueError,
            "cu_seqlens must end at the number of tokens, 6, got 5",
            PACKED,
            {"cu_seqlens": torch.tensor([0, 5])},
        ),
        (ValueError, r"cu_seqlens must have shape \(B \+ 1,\)", PACKED, {"cu_seqlens": torch.zeros(0, dtype=LONG)}),
        (ValueError, "skip must be ≥ 0, got -1", X, {"skip": -1}),
        (ValueError, "skip must be ≥ 0, got -2", X, {"skip": torch.tensor([1, -2])}),
        (ValueError, r"skip must have shape \(2,\), got \(3,\)", X, {"skip": torch.tensor([1, 2, 3])}),
        (ValueError, "skip and spans exclude each other", X, {"skip": 1, "spans": torch.tensor([[0, 1]])}),
        (ValueError, r"spans must have shape \(S, 2\), got \(2,\)", X, {"spans": torch.tensor([0, 1])}),
        (ValueError, r"spans must have shape \(1, 2\), got \(1, 3\)", X, {"spans": torch.tensor([[0, 1, 2]])}),
        (
            ValueError,
            r"spans\[1\] must be 0 ≤ start ≤ end ≤ 6, got \[2, 7\)",
            X,
            {"spans": torch.tensor([[0, 1], [2, 7]])},
        ),
        (ValueError, r"spans\[0\] must be 0 ≤ start ≤ end ≤ 6, got \[3, 2\)", X, {"spans": torch.tensor([[3, 2]])}),
        (ValueError, r"truncate_dim must be in \[1, 8\], got 9", X, {"truncate_dim": 9}),
        (ValueError, r"truncate_dim must be in \[1, 8\], got 0", X, {"truncate_dim": 0}),
        (ValueError, "eps must be ≥ 0, got -1", X, {"normalize": True, "eps": -1.0}),
        (TypeError, "eps must be a number, got NoneType", X, {"normalize": True, "eps": None}),
        (TypeError, "normalize must be True or False, got 'yes'", X, {"normalize": "yes"}),
        (TypeError, "truncate_dim must be an integer, got float", X, {"truncate_dim": 2.0}),
        (TypeError, "mode must be one of .* or a tuple of them, got int", X, {"mode": 3}),
    ],
)
def test_bad_input(error: type[Exception], message: str, hidden: Any, options: dict[str, Any]) -> None:
    with pytest.raises(error, match=message):
        ek.pool(hidden, **options)


@pytest.mark.parametrize("prompt", [0, 2])
@pytest.mark.parametrize("layout", ["padded", "left-padded", "flattened"])
def test_sentence_transformers_pooling(layout: str, prompt: int) -> None:
    models = pytest.importorskip("sentence_transformers.models")
    modes = ("cls", "lasttoken", "max", "mean", "mean_sqrt_len_tokens", "weightedmean")
    lengths = torch.tensor([6, 3, 4, 5])
    mask = torch.arange(6) < lengths[:, None]
    if layout == "left-padded":
        mask = mask.flip(1)
    hidden = torch.randn(4, 6, 12)
    places: Any = {"mask": mask}
    features = {"token_embeddings": hidden, "attention_mask": mask.long(), "prompt_length": prompt}
    if layout == "flattened":
        hidden = hidden[mask]
        places = {"cu_seqlens": torch.nn.functional.pad(lengths.cumsum(0), (1, 0)).int()}
        features = {"token_embeddings": hidden[None], "cu_seq_lens_q": places["cu_seqlens"], "prompt_length": prompt}
    for mode in (*modes, modes):
        theirs = models.Pooling(12, pooling_mode=mode, include_prompt=False)
        x = hidden.clone().requires_grad_()
        features["token_embeddings"] = x[None] if layout == "flattened" else x
        wanted = theirs(features)["sentence_embedding"]
        got = ek.pool(x, mode, skip=prompt, **places)
        torch.testing.assert_close(got, wanted)
        upstream = torch.randn_like(wanted)
        gradients = [torch.autograd.grad(out, x, upstream)[0] for out in (got, wanted)]
        torch.testing.assert_close(*gradients)


def test_where_sentence_transformers_differs() -> None:
    """docs/pooling.md says so: with nothing left to pool, and with NaN in the padding, theirs isn't a pooled vector."""
    models = pytest.importorskip("sentence_transformers.models")
    hidden, mask = torch.randn(2, 3, 4), torch.tensor([[0, 0, 0], [1, 1, 0]])
    for mode in POOL_MODES[:-1]:
        features = {"token_embeddings": hidden, "attention_mask": mask}
        theirs = models.Pooling(4, pooling_mode=mode)(features)["sentence_embedding"]
        assert ek.pool(hidden, mode, mask=mask)[0].eq(0).all()
        zeros = mode not in ("cls", "max")  # the first position, −inf
        assert theirs[0].eq(0).all().item() == zeros
    hidden[1, 2] = NAN
    theirs = models.Pooling(4, pooling_mode="mean")({"token_embeddings": hidden, "attention_mask": mask})
    assert theirs["sentence_embedding"][1].isnan().all()
    assert not ek.pool(hidden, mask=mask).isnan().any()


def test_more_than_32_bits() -> None:
    rows = torch.randn(2, 1, 8).expand(2, 2**31, 8)  # 2³⁵ values, all of one row
    end = torch.tensor([[2**32 - 4, 2**32], [2**31 - 1, 2**31 + 1]])
    for mode in ("mean", "cls", "lasttoken", "weightedmean"):
        torch.testing.assert_close(ek.pool(rows, mode, lengths=torch.tensor([3, 2])), rows[:, 0])
        pooled = ek.pool(rows, mode, spans=end)
        torch.testing.assert_close(pooled[0], rows[1, 0])
    torch.testing.assert_close(ek.pool(rows, spans=end)[1], rows[:, 0].mean(0))
    reasons = ["the places of maxima are int32, and hidden has 2³¹ rows or more"]
    assert ek.explain("pool", rows, ("mean", "max")).refused["cpu"] == reasons
    with pytest.raises(NotImplementedError, match="2³¹ rows or more"):
        ek.pool(rows, "max", backend="cpu")
