"""What attention's options do: the reference against the contract's words, the kernels against the reference."""

from __future__ import annotations

import itertools
from typing import Any

import pytest
import torch
from attention_cases import DTYPES, INF, NAN, check, inputs, packed
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

import embedkern as ek
from embedkern.reference import attention as reference

OPTIONS: dict[str, Any] = {
    "mask": lambda: torch.rand(5, 7) < 0.7,
    "bias": lambda: torch.randn(4, 1, 7),
    "relative_bias": lambda: torch.randn(4, 5),
    "causal": lambda: True,
    "window": lambda: (2, 1),
    "softcap": lambda: 2.0,
}


def naive(q: Tensor, k: Tensor, v: Tensor, b: int, h: int, i: int, options: dict[str, Any]) -> Tensor:
    """One row of attention, key by key, as the contract says it."""
    group, len_q, len_k = q.shape[1] // k.shape[1], q.shape[2], k.shape[2]
    p = i + len_k - len_q
    seen, scores = [], []
    for j in range(len_k):
        left, right = options.get("window", (-1, -1))
        mask = options.get("mask")
        if options.get("causal") and j > p or left >= 0 and j < p - left or right >= 0 and j > p + right:
            continue
        if mask is not None and not mask[i, j]:
            continue
        z = q[b, h, i] @ k[b, h // group, j] * q.shape[-1] ** -0.5
        if "softcap" in options:
            z = options["softcap"] * torch.tanh(z / options["softcap"])
        if "bias" in options:
            z = z + options["bias"][h, 0, j]
        if "relative_bias" in options:
            reach = options["relative_bias"].shape[1] // 2
            z = z + options["relative_bias"][h, min(max(j - p, -reach), reach) + reach]
        seen.append(j)
        scores.append(z)
    if not seen:
        return v.new_zeros(v.shape[-1])
    return torch.softmax(torch.stack(scores) / 0.7, 0) @ v[b, h // group, seen]


@pytest.mark.parametrize("names", [*((name,) for name in OPTIONS), tuple(OPTIONS)])
def test_reference_options(names: tuple[str, ...]) -> None:
    q, k, v = (x.double().requires_grad_() for x in inputs(2, 4, 2, 5, 7, 8, 16))
    options = {name: OPTIONS[name]() for name in names}
    options = {
        name: x.double() if isinstance(x, Tensor) and x.is_floating_point() else x for name, x in options.items()
    }
    out = ek.attention(q, k, v, temperature=0.7, **options)
    for b, h, i in itertools.product(range(2), range(4), range(5)):
        torch.testing.assert_close(out[b, h, i], naive(q, k, v, b, h, i, options))


@pytest.mark.parametrize(
    "names", [(), ("mask", "bias"), ("causal", "softcap"), ("window", "relative_bias"), tuple(OPTIONS)]
)
def test_reference_gradients(names: tuple[str, ...]) -> None:
    q, k, v = (x[:, :, :4].double().requires_grad_() for x in inputs(2, 4, 2, 4, 7, 8, 8))
    options = {name: OPTIONS[name]() for name in names}
    if "mask" in options:
        options["mask"] = options["mask"][:4, :4]
    if "bias" in options:
        options["bias"] = options["bias"][..., :4]
    tensors = {
        n: x.double().requires_grad_() for n, x in options.items() if isinstance(x, Tensor) and x.dtype != torch.bool
    }
    rest = {name: x for name, x in options.items() if name not in tensors}
    tau, scale = ((torch.rand(4, 1, 1, dtype=torch.float64) + 0.5).requires_grad_() for _ in range(2))

    def function(*x: Tensor) -> tuple[Tensor, Tensor]:
        floats = dict(zip(tensors, x[5:], strict=True))
        out, lse = ek.attention(
            *x[:3], temperature=x[3], scale=x[4], return_lse=True, backend="reference",
            key_lengths=torch.tensor([4, 0]), **floats, **rest
        )  # fmt: skip
        return out, torch.where(lse == -INF, 0, lse)

    assert torch.autograd.gradcheck(function, (q, k, v, tau, scale, *tensors.values()))


@pytest.mark.parametrize(("of_key", "of_value"), [(NAN, INF), (NAN, 0.0), (0.0, INF)])
def test_what_rows_do_not_see_is_harmless(of_key: float, of_value: float) -> None:
    q, k, v = inputs(1, 2, 2, 6, 6, 8, 8)
    bias = torch.zeros(6, 6)
    bias[:, 5] = -INF
    mask = torch.arange(6) != 5
    capped = {"mask": mask, "softcap": 2.0}
    for options in ({"causal": True}, {"bias": bias}, {"mask": mask}, capped, {"window": (1, 0)}):
        hidden_from = slice(0, 5) if "causal" in options or "window" in options else slice(0, 6)
        clean = [x.clone().requires_grad_() for x in (q, k, v)]
        wanted = ek.attention(*clean, **options)[:, :, hidden_from]  # type: ignore[arg-type]
        dirty = [x.clone() for x in (q, k, v)]
        dirty[1][:, :, 5], dirty[2][:, :, 5] = of_key, of_value
        leaves = [x.requires_grad_() for x in dirty]
        got = ek.attention(*leaves, **options)[:, :, hidden_from]  # type: ignore[arg-type]
        torch.testing.assert_close(got, wanted)
        if hidden_from.stop == 6:
            for a, b in zip(
                torch.autograd.grad(got.sum(), leaves), torch.autograd.grad(wanted.sum(), clean), strict=True
            ):
                torch.testing.assert_close(a, b)


def test_dropout() -> None:
    q, k, v = (x.requires_grad_() for x in inputs(2, 2, 2, 40, 50, 8, 8))
    ones = torch.ones_like(v)
    torch.manual_seed(1)
    kept = ek.attention(q, k, ones, dropout_p=0.3)
    assert abs(kept.mean().item() - 1) < 0.05
    torch.manual_seed(1)
    again = ek.attention(q.detach() * 2, k, ones, dropout_p=0.3, temperature=2.0)  # the mask isn't of the contents
    torch.testing.assert_close(again, kept)
    assert not torch.equal(ek.attention(q, k, ones, dropout_p=0.3), kept)
    assert ek.attention(q, k, v, dropout_p=1.0).eq(0).all()
    seed, rows = torch.tensor(123456789012345), torch.arange(200)[:, None]
    factors = reference.dropout_factors(seed, rows, 500, 0.25, torch.float32)
    assert abs((factors == 0).double().mean().item() - 0.25) < 5e-3
    assert factors.max().item() == pytest.approx(1 / 0.75)
    torch.manual_seed(2)
    out, _ = ek.AttentionFunction.apply(q, k, v, None, None, None, None, None, 1.0, None, False, None, None, 0.3)
    got = torch.autograd.grad(out.sin().sum(), (q, k, v))
    torch.manual_seed(2)
    wanted = torch.autograd.grad(ek.attention(q, k, v, dropout_p=0.3).sin().sum(), (q, k, v))
    for a, b in zip(got, wanted, strict=True):
        torch.testing.assert_close(a, b)


KERNEL_OPTIONS: list[dict[str, Any]] = [  # of the shape (3, 4, 2, 21, 37)
    {"mask": lambda: torch.rand(3, 1, 21, 37) < 0.6},
    {"mask": lambda: torch.rand(37) < 0.6, "window": lambda: (5, 3)},
    {"bias": lambda: torch.randn(3, 4, 21, 37), "temperature": lambda: torch.rand(4, 1, 1) + 0.5},
    {"bias": lambda: torch.randn(4, 21, 37), "key_lengths": lambda: torch.tensor([37, 0, 20])},
    {"bias": lambda: torch.randn(3, 1, 1, 37), "causal": lambda: True},
    {"bias": lambda: torch.randn(1, 1, 21, 1), "softcap": lambda: 3.0, "scale": lambda: torch.randn(4, 1, 1)},
    {"relative_bias": lambda: torch.randn(4, 1)},
    {"relative_bias": lambda: torch.randn(4, 9), "temperature": lambda: torch.rand(3, 1, 21, 1) + 0.5},
    {"relative_bias": lambda: torch.randn(4, 101), "key_mask": lambda: torch.rand(3, 37) < 0.6},
    {"causal": lambda: True, "key_mask": lambda: torch.rand(3, 37) < 0.6, "temperature": lambda: torch.rand(()) + 0.5},
    {"window": lambda: (0, -1), "scale": lambda: torch.zeros(())},
    {"window": lambda: (-1, 2), "softcap": lambda: 1.0, "temperature": lambda: torch.rand(()) + 0.5},
    {"dropout_p": lambda: 0.3, "key_mask": lambda: torch.rand(3, 37) < 0.6},
    {"dropout_p": lambda: 0.3, "temperature": lambda: torch.rand(4, 1, 1) + 0.5, "causal": lambda: True},
]


def check_seeded(*tensors: Tensor, **options: Any) -> None:
    """check(), with the same dropout mask in every run."""

    def function(*arguments: Any, **rest: Any) -> Any:
        torch.manual_seed(5)
        return ek.attention(*arguments, **rest)

    check(*tensors, function=function, **options)


@pytest.mark.parametrize("options", KERNEL_OPTIONS, ids=lambda options: "-".join(options))
def test_kernel_options(variant: str, options: dict[str, Any]) -> None:
    check_seeded(*inputs(3, 4, 2, 21, 37, 16, 24), **{name: make() for name, make in options.items()})


@pytest.mark.parametrize("dtype", DTYPES)
def test_all_kernel_options(dtype: torch.dtype) -> None:
    """Several blocks of rows, and windows narrower than the keys."""
    for shape in ((2, 2, 1, 260, 300, 32, 32), (1, 3, 1, 70, 520, 8, 16)):
        heads, len_q, len_k = shape[1], shape[3], shape[4]
        options = {
            "key_lengths": torch.tensor([len_k, len_k // 2][: shape[0]]),
            "mask": torch.rand(len_q, len_k) < 0.9,
            "bias": torch.where(torch.rand(heads, len_q, len_k) < 0.1, -INF, torch.randn(heads, len_q, len_k)),
            "relative_bias": torch.randn(heads, 65),
            "temperature": torch.rand(heads, 1, 1) + 0.5,
            "scale": torch.randn(heads, 1, 1),
            "window": (40, 30),
            "softcap": 4.0,
            "dropout_p": 0.2,
        }
        check_seeded(*inputs(*shape, dtype), **options)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("backend", ["cpu", "reference"])
def test_rows_that_see_nothing(variant: str, backend: str, dtype: torch.dtype) -> None:
    q, k, v = inputs(2, 2, 2, 5, 9, 8, 8, dtype)
    mask = torch.ones(5, 9, dtype=torch.bool)
    mask[2], mask[4] = False, False
    q[:, :, 2] = NAN
    leaves = [x.clone().requires_grad_() for x in (q, k, v)]
    out, lse = ek.attention(*leaves, mask=mask, return_lse=True, backend=backend)
    assert (out[:, :, [2, 4]] == 0).all()
    assert (lse[:, :, [2, 4]] == -INF).all()
    seen = lse[:, :, [0, 1, 3]]
    wanted = torch.autograd.grad(out.square().sum() + seen.sum(), leaves, retain_graph=True)
    assert (wanted[0][:, :, [2, 4]] == 0).all()
    assert all(torch.isfinite(g).all() for g in wanted)
    upstream = 2 * out.detach()
    upstream[:, :, 2], upstream[:, :, 4] = NAN, INF  # as from out / norm(out)
    gradients = torch.autograd.grad((out, seen), leaves, (upstream, torch.ones_like(seen)))
    assert all(torch.equal(a, b) for a, b in zip(gradients, wanted, strict=True))


@settings(max_examples=40, deadline=None)
@given(st.data())
def test_any_options(data: st.DataObject) -> None:
    torch.manual_seed(data.draw(st.integers(0, 99)))
    batch, kv_heads, group = (data.draw(st.integers(1, 3)) for _ in range(3))
    heads, len_q, len_k = kv_heads * group, data.draw(st.integers(1, 40)), data.draw(st.integers(1, 70))

    def sometimes(make: Any) -> Any:
        return make() if data.draw(st.booleans()) else None

    def broadcast() -> tuple[int, ...]:
        return tuple(n if data.draw(st.booleans()) else 1 for n in (batch, heads, len_q, len_k))

    check_seeded(
        *inputs(batch, heads, kv_heads, len_q, len_k, 8 * data.draw(st.integers(1, 3)), 8),
        key_lengths=sometimes(lambda: torch.randint(0, len_k + 1, (batch,))),
        key_mask=sometimes(lambda: torch.rand(batch, len_k) < 0.7),
        mask=sometimes(lambda: torch.rand(broadcast()) < 0.8),
        bias=sometimes(lambda: torch.randn(broadcast())),
        relative_bias=sometimes(lambda: torch.randn(heads, 2 * data.draw(st.integers(0, 20)) + 1)),
        temperature=data.draw(
            st.sampled_from([0.5, torch.rand(heads, 1, 1) + 0.5, torch.rand(batch, 1, len_q, 1) + 1])
        ),
        causal=data.draw(st.booleans()),
        window=sometimes(lambda: (data.draw(st.integers(-1, 9)), data.draw(st.integers(-1, 9)))),
        softcap=sometimes(lambda: 2.0),
        dropout_p=data.draw(st.sampled_from([0.0, 0.25])),
        tolerance=2e-6,
    )


def test_varlen_options_equal_those_of_each_sequence() -> None:
    q, k, v = packed(12, 15, 2, 1, 8)
    cu_q, cu_k = torch.tensor([0, 4, 12]), torch.tensor([0, 9, 15])
    relative_bias = torch.randn(2, 7)
    out = ek.attention_varlen(
        q, k, v, cu_q, cu_k, causal=True, relative_bias=relative_bias, softcap=3.0, window=(4, -1)
    )
    for b in range(2):
        of_q, of_k = slice(int(cu_q[b]), int(cu_q[b + 1])), slice(int(cu_k[b]), int(cu_k[b + 1]))
        alone = ek.attention(
            *(x.transpose(0, 1)[None] for x in (q[of_q], k[of_k], v[of_k])),
            causal=True, relative_bias=relative_bias, softcap=3.0, window=(4, -1)
        )  # fmt: skip
        torch.testing.assert_close(out[of_q], alone[0].transpose(0, 1))
