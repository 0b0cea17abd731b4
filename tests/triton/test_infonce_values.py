"""The contrastive loss's kernels against the float64 reference: loss and every gradient. float32 and float16 in the
interpreter, whose bfloat16 is wrong; what a panel of two-byte numbers does is the same for both."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from cuda_graph import replayed
from infonce_cases import build, check, pairwise, results
from torch import Tensor

import embedkern as ek
from embedkern.backends.triton import infonce, infonce_call
from embedkern.backends.triton.launcher import DEVICE, INTERPRETED
from embedkern.ops.infonce_check import DIRECTIONS

HALF = (torch.float16,) if INTERPRETED else (torch.float16, torch.bfloat16)
NAN = float("nan")

FACTORS: dict[str, tuple[Any, ...]] = {
    "rows": (5, 70),
    "more_documents": (0, 10, -1),  # -1: fewer than rows, with targets
    "dim": (3, 20),
    "dtype": (torch.float32, *HALF),
    "similarity": ("cosine", "dot"),
    "reduction": ("mean", "none"),
    "temperature": ("number", "scalar", "rows"),
    "targets": (False, True),
    "negatives": (0, 2),
    "positives": (False, True),
    "labels": (None, "ignore", "positive"),
    "weights": (False, True),
    "label_smoothing": (0.0, 0.1),
    "directions": (
        (("query_to_doc",), "joint"),
        (("query_to_doc", "doc_to_query"), "per_direction"),
        (DIRECTIONS, "joint"),
    ),
    "guide": (None, ("absolute", 0.0), ("relative", 0.3)),
    "negative_weights": (None, "documents", "negatives"),
    "hardness_mode": (None, "in_batch_negatives", "hard_negatives", "all_negatives"),
    "matryoshka": (False,),
    "frozen": ((), ("documents",), ("queries",), ("queries", "documents")),
    "strided": (False, True),
}


def randn(*shape: int) -> Tensor:
    return torch.randn(shape, device=DEVICE)


@pytest.fixture
def small_panels(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(infonce_call, "PANEL_BYTES", 1)
    monkeypatch.setattr(infonce_call, "PANEL_ROWS", 32)


@pytest.mark.parametrize("case", pairwise(FACTORS), ids=lambda case: f"{case['rows']}-{case['similarity']}")
def test_pairs_of_options(case: dict[str, Any]) -> None:
    # With few dimensions products round as seldom as what they are multiplied with: 1 / τ, by which torch divides.
    check(*build(case, DEVICE), case["frozen"], times=2 if case["dim"] < 8 else 1)


@pytest.mark.parametrize("tau", [0.02, 0.05])  # the second has a bound in float32
@pytest.mark.parametrize("dtype", [torch.float32, *HALF])
def test_several_panels_and_tiles(small_panels: None, dtype: torch.dtype, tau: float) -> None:
    tensors = {"queries": randn(140, 20).to(dtype), "documents": randn(150, 20).to(dtype),
               "temperature": torch.tensor(tau, device=DEVICE)}  # fmt: skip
    check(tensors, {})


def test_several_panels_of_directions(small_panels: None) -> None:
    labels = torch.arange(70, device=DEVICE) // 2
    guide = randn(70, 9)
    tensors = {"queries": randn(70, 20), "documents": randn(140, 20), "query_labels": labels,
               "document_labels": labels.repeat(2), "guide_queries": guide,
               "guide_documents": guide.repeat(2, 1) + randn(140, 9),
               "temperature": torch.rand(70, device=DEVICE) + 0.2}  # fmt: skip
    check(tensors, {"directions": DIRECTIONS, "same_label": "positive", "margin": 0.3})


def test_prefixes() -> None:
    tensors = {"queries": randn(9, 40), "documents": randn(12, 40), "temperature": torch.tensor(0.2, device=DEVICE)}
    check(tensors, {"matryoshka_dims": (40, 16, 32), "matryoshka_weights": (1.0, 0.5, 2.0)})
    check(tensors, {"matryoshka_dims": (7, 40), "label_smoothing": 0.1})


@pytest.mark.parametrize("options", [{}, {"same_label": "positive"}, {"directions": DIRECTIONS}])
def test_metrics(options: dict[str, Any]) -> None:
    d = randn(80, 4)
    q = randn(70, 4) + d[:70]
    d[75:] = d[:5]  # a tie beats nothing
    labels = torch.arange(80, device=DEVICE) // 3
    tensors: dict[str, Any] = {"negatives": randn(70, 2, 4), "query_labels": labels[:70], "document_labels": labels}
    loss, metrics = ek.info_nce(q, d, **tensors, **options, return_metrics=True)
    wanted_loss, wanted = ek.info_nce(q, d, **tensors, **options, return_metrics=True, backend="reference")
    torch.testing.assert_close(loss, wanted_loss)
    torch.testing.assert_close(metrics, wanted)
    assert 0 < metrics["accuracy"] < 1
    with_gradient = ek.info_nce(q.requires_grad_(), d, **tensors, **options, return_metrics=True)
    torch.testing.assert_close(with_gradient[1], wanted)


def test_extremes() -> None:
    """Temperatures whose logits go beyond exp's range, vectors too short to normalise or of great length."""
    for tau in (1e-3, 1e3):
        tensors = {"queries": randn(9, 16), "documents": randn(20, 16), "temperature": torch.tensor(tau, device=DEVICE)}
        ours, exact = results(tensors, {}, (), "triton"), results(tensors, {}, (), "reference", wide=True)
        for name, x in ours.items():
            tolerance = max(2e-6, 2e-7 / tau) * exact[name].abs().max()  # a rounding of z = s / τ is 1e-7 / τ
            assert (x.double() - exact[name]).abs().max() <= tolerance + 1e-6, name
    short = {"queries": randn(7, 8), "documents": randn(7, 8), "negatives": torch.zeros(7, 2, 8, device=DEVICE)}
    short["queries"][2] = short["documents"][3] = 0
    short["queries"][4] = 1e-15
    short["documents"][5] *= 1e15
    check(short, {})
    check({**short, "negatives": randn(7, 2, 8) * 1e-14}, {"temperature": 1.0})
    half = {name: (x * 1e-6 if name == "queries" else x).half() for name, x in short.items() if name != "negatives"}
    half["documents"] = randn(7, 8).half() * 1000
    check(half, {"temperature": 0.1}, ("queries",))


def test_rows_with_nothing_but_their_positive() -> None:
    labels = torch.zeros(9, dtype=torch.int64, device=DEVICE)
    tensors = {"queries": randn(9, 5), "documents": randn(9, 5), "query_labels": labels, "document_labels": labels,
               "temperature": torch.full((9,), 1e-3, device=DEVICE)}  # fmt: skip
    for options in ({}, {"label_smoothing": 0.3}, {"similarity": "dot"}):
        for name, x in results(tensors, options, (), "triton").items():
            assert (x == 0).all(), (options, name)
    empty = {"queries": randn(0, 5), "documents": randn(3, 5)}
    assert all((x == 0).all() for x in results(empty, {}, (), "triton").values())


def test_small_losses_keep_their_digits() -> None:
    q = torch.eye(16, device=DEVICE, requires_grad=True)
    for tau in (1 / 20, 1 / 60):
        loss = ek.info_nce(q, q.detach(), temperature=tau)
        wanted = torch.log1p(15 * torch.tensor(-1 / tau, dtype=torch.float64).exp())  # which 1 + x would lose
        torch.testing.assert_close(loss.double().cpu(), wanted, rtol=1e-5, atol=0)
        assert (torch.autograd.grad(loss, q)[0].abs() > 0).any()


def test_hidden_and_outside() -> None:
    """NaN in a hidden column stays there; targets outside are clamped; a duplicate of the guide's positive stays."""
    q, d, ids = randn(8, 4), randn(9, 4), torch.arange(9, device=DEVICE)
    d[8], ids[8] = NAN, 5
    loss = ek.info_nce(q, d, reduction="none", query_labels=ids[:8], document_labels=ids)
    assert torch.isnan(loss).tolist() == [i != 5 for i in range(8)]
    targets = torch.tensor([0, 1, 99, -5, 2, 3, 4, 5], device=DEVICE)
    clamped = ek.info_nce(q, d[:8], targets=targets.clamp(0, 7))
    torch.testing.assert_close(ek.info_nce(q, d[:8], targets=targets), clamped)
    guide_q, guide_d = randn(60, 70), randn(200, 70)
    guide_d[100:160] = guide_d[:60]
    q, d = randn(60, 8), randn(200, 8)
    g = torch.nn.functional.normalize(guide_q.double()) @ torch.nn.functional.normalize(guide_d.double()).T
    s = torch.nn.functional.normalize(q) @ torch.nn.functional.normalize(d).T / 0.05
    hidden = g > g.diagonal()[:, None] + 1e-9
    wanted = torch.nn.functional.cross_entropy(s.masked_fill(hidden, -torch.inf), torch.arange(60, device=DEVICE))
    torch.testing.assert_close(ek.info_nce(q, d, guide_queries=guide_q, guide_documents=guide_d), wanted)


def test_operator() -> None:
    """opcheck, a compiled call, autocast, the same bits twice, and only the gradients that are needed."""
    tensors = {"queries": randn(9, 8), "documents": randn(9, 8), "temperature": torch.tensor(0.1, device=DEVICE)}
    whole = results(tensors, {}, (), "triton")
    with torch.autocast(DEVICE, torch.bfloat16):
        again = results(tensors, {}, (), "triton")
    assert all(torch.equal(x, again[name]) for name, x in whole.items())
    for frozen in (("documents",), ("queries",), ("queries", "documents")):
        part = results(tensors, {}, frozen, "triton")
        assert all(torch.allclose(x, whole[name], rtol=1e-6, atol=0) for name, x in part.items())

    def step(q: Tensor, d: Tensor) -> Tensor:
        return ek.info_nce(q, d, temperature=0.1, directions=DIRECTIONS, label_smoothing=0.1, backend="triton")

    compiled = torch.compile(step, fullgraph=True, dynamic=True, backend="aot_eager")
    inputs = [randn(9, 8).requires_grad_() for _ in range(2)]
    got, wanted = compiled(*inputs), step(*inputs)
    torch.testing.assert_close(got, wanted)
    for a, b in zip(*(torch.autograd.grad(x, inputs) for x in (got, wanted)), strict=True):
        torch.testing.assert_close(a, b)
    q, d = inputs[0].detach()[:4], inputs[1].detach()
    tau, d_loss = torch.tensor(0.1, device=DEVICE), torch.ones(4, device=DEVICE)
    bare = (q, d, None, None, None, 4, 0, 9, tau, None, None, False, None, None, 0.0, False, None, None, 0, 0.0, 0.0,
            *(False,) * 5, [], [], False, d_loss, True, True, False, False, True)  # fmt: skip
    torch.library.opcheck(infonce._INFONCE, bare, test_utils=("test_schema", "test_faketensor"))


def test_explain() -> None:
    q = randn(4, 3)
    assert ek.explain("info_nce", q, q).choice == "triton"
    assert ek.explain("info_nce", q.double(), q).refused["triton"] == ["queries is torch.float64"]
    with pytest.raises(NotImplementedError, match="one of documents, negatives, positives is float64"):
        ek.info_nce(q, q.double(), backend="triton")


@pytest.mark.skipif(not torch.cuda.is_available(), reason="no GPU")
def test_cuda_graph() -> None:
    q, d = (randn(300, 64).half().requires_grad_() for _ in range(2))
    targets = torch.randint(300, (300,), device=DEVICE)

    def step() -> tuple[Tensor, ...]:
        loss = ek.info_nce(q, d, targets=targets) + ek.info_nce(q, d, directions=DIRECTIONS, label_smoothing=0.1)
        return torch.autograd.grad(loss, (q, d))

    got, wanted = replayed(step)
    assert all(torch.equal(a, b) for a, b in zip(got, wanted, strict=True))


@pytest.mark.skipif(not torch.cuda.is_available(), reason="no GPU")
@pytest.mark.parametrize("dtype", [torch.float32, *HALF])
@pytest.mark.parametrize("dim", [64, 768, 4096])
def test_large_on_the_gpu(dtype: torch.dtype, dim: int) -> None:
    check({"queries": randn(1000, dim).to(dtype), "documents": randn(1300, dim).to(dtype)}, {"temperature": 0.05})
