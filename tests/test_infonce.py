"""info_nce against its float64 reference: pairs of options, every CPU variant; corners; torch's own machinery."""

from __future__ import annotations

import subprocess
import sys
from typing import Any

import pytest
import torch
from infonce_cases import build, check, pairwise, results
from torch import Tensor

import embedkern as ek
import embedkern.nn
from embedkern.ops.infonce_check import DIRECTIONS
from embedkern.reference import infonce as reference
from embedkern.schema import OPS

NAN = float("nan")


@pytest.mark.filterwarnings("error:.*slow reference")
@pytest.mark.parametrize("case", pairwise(), ids=lambda case: f"{case['rows']}-{case['dim']}-{case['similarity']}")
def test_pairs_of_options(variant: str, case: dict[str, Any]) -> None:
    check(*build(case), case["frozen"])


def test_several_panels(variant: str) -> None:
    """More queries than one panel holds, more dimensions than one product takes at a time."""
    check({"queries": torch.randn(800, 20), "documents": torch.randn(900, 20)}, {"temperature": 0.1})
    check({"queries": torch.randn(50, 1100), "documents": torch.randn(60, 1100)}, {"temperature": 0.1})


@pytest.mark.parametrize("columns", [1, 127, 128, 129, 130])
def test_last_block_of_documents(variant: str, columns: int) -> None:
    """Of one, two, all, or all but one of the 128 that a tile has."""
    for dtype in (torch.float32, torch.bfloat16):
        tensors = {"queries": torch.randn(7, 32), "documents": torch.randn(columns, 32)}
        targets = {"targets": torch.randint(columns, (7,))}
        check({name: x.to(dtype) for name, x in tensors.items()} | targets, {})


def test_few_queries_and_many_documents(variant: str) -> None:
    """Stretches of documents: with what a row's end adds, and with what hides."""
    tensors = {"queries": torch.randn(60, 20), "documents": torch.randn(9000, 20), "negatives": torch.randn(60, 2, 20),
               "targets": torch.randint(9000, (60,)), "temperature": torch.rand(60) * 0.2 + 0.05}  # fmt: skip
    check(tensors, {})
    tensors |= {"query_labels": torch.arange(60), "document_labels": torch.arange(9000) // 3,
                "positives": torch.randn(60, 20), "negative_weights": torch.rand(9000)}  # fmt: skip
    check(tensors, {"reduction": "none"}, ("documents",))


# Corners


@pytest.mark.parametrize("similarity", ["cosine", "dot"])
def test_rows_with_nothing_but_their_positive(variant: str, similarity: str) -> None:
    labels = torch.zeros(9, dtype=torch.int64)
    alone = results({"queries": torch.randn(1, 5), "documents": torch.randn(1, 5), "temperature": torch.tensor(0.05)},
                    {"similarity": similarity}, (), None)  # fmt: skip
    hidden = results({"queries": torch.randn(9, 5), "documents": torch.randn(9, 5), "query_labels": labels,
                      "document_labels": labels, "temperature": torch.full((9,), 1e-3)},
                     {"similarity": similarity}, (), None)  # fmt: skip
    smoothing = {"similarity": similarity, "label_smoothing": 0.3}
    smoothed = results({"queries": torch.randn(9, 5), "documents": torch.randn(9, 5), "query_labels": labels,
                        "document_labels": labels}, smoothing, (), None)  # fmt: skip
    for name, x in [*alone.items(), *hidden.items(), *smoothed.items()]:
        assert (x == 0).all(), f"{name}: {x}"


@pytest.mark.parametrize("tau", [1e-3, 1e-6, 1e3])
def test_extreme_temperatures(variant: str, tau: float) -> None:
    tensors = {"queries": torch.randn(130, 16), "documents": torch.randn(300, 16), "temperature": torch.tensor(tau)}
    ours, exact = results(tensors, {}, (), None), results(tensors, {}, (), "reference", wide=True)
    for name, x in ours.items():
        assert torch.isfinite(x).all(), name
        scale = exact[name].abs().max()
        tolerance = max(2e-6, 2e-7 / tau) * scale  # a rounding of z = s / τ is 1e-7 / τ
        assert (x.double() - exact[name]).abs().max() <= tolerance + 1e-6, name


def test_identical_and_zero_vectors(variant: str) -> None:
    same = {"queries": torch.ones(70, 8), "documents": torch.ones(70, 8), "temperature": torch.tensor(1e-3)}
    got = results(same, {}, (), None)
    torch.testing.assert_close(got["loss"], torch.tensor(70.0).log(), rtol=1e-5, atol=0)
    assert all(torch.isfinite(x).all() for x in got.values())
    zero = {"queries": torch.randn(7, 8), "documents": torch.randn(7, 8), "negatives": torch.zeros(7, 2, 8)}
    zero["queries"][2] = zero["documents"][3] = 0
    zero["queries"][4] = 1e-15  # shorter than what normalize divides by
    check(zero, {})


@pytest.mark.parametrize("reduction", ["mean", "sum", "none"])
def test_weights_of_zero(variant: str, reduction: str) -> None:
    tensors = {"queries": torch.randn(9, 5), "documents": torch.randn(9, 5), "weights": torch.zeros(9)}
    got = results(tensors, {"reduction": reduction}, ("weights",), None)
    assert all((x == 0).all() for x in got.values())


@pytest.mark.parametrize("options", [{}, {"directions": DIRECTIONS, "matryoshka_dims": (4, 2)}])
@pytest.mark.parametrize("backend", ["cpu", "reference"])
def test_no_rows(options: dict[str, Any], backend: str) -> None:
    q, d = torch.randn(0, 4, requires_grad=True), torch.randn(3, 4, requires_grad=True)
    loss = ek.info_nce(q, d, backend=backend, **options)
    d_q, d_d = torch.autograd.grad(loss, (q, d))
    assert loss == 0
    assert d_q.shape == (0, 4)
    assert (d_d == 0).all()


def test_nan_reaches_the_rows_that_see_it(variant: str) -> None:
    q, d = torch.randn(60, 8), torch.randn(200, 8)
    q[3] = NAN
    loss = ek.info_nce(q, d, reduction="none")
    assert torch.isnan(loss).nonzero().flatten().tolist() == [3]
    d[150] = NAN
    assert torch.isnan(ek.info_nce(q, d, reduction="none")).all()
    labels = torch.arange(200)
    labels[150] = 5  # hidden from row 5 alone, where it is 5's duplicate
    loss = ek.info_nce(q, d, reduction="none", query_labels=torch.arange(60), document_labels=labels)
    assert not torch.isnan(loss[5])
    assert torch.isnan(loss[6])


def test_only_the_gradients_that_are_needed() -> None:
    tensors = {"queries": torch.randn(60, 8), "documents": torch.randn(60, 8), "temperature": torch.tensor(0.1)}
    whole = results(tensors, {}, (), None)
    for frozen in (("documents",), ("queries",), ("queries", "documents"), ("temperature", "queries")):
        part = results(tensors, {}, frozen, None)
        for name, x in part.items():
            assert torch.equal(x, whole[name]), (frozen, name)


# torch's own machinery


def test_same_bits_for_any_number_of_threads() -> None:
    tensors = {"queries": torch.randn(900, 33), "documents": torch.randn(1000, 33),
               "negatives": torch.randn(900, 2, 33), "temperature": torch.rand(900) + 0.05}  # fmt: skip
    threads, runs = torch.get_num_threads(), []
    try:
        for n in (1, 2, 5):
            torch.set_num_threads(n)
            runs.append(results(tensors, {"reduction": "none"}, (), None))
    finally:
        torch.set_num_threads(threads)
    for name in runs[0]:
        assert torch.equal(runs[0][name], runs[1][name])
        assert torch.equal(runs[0][name], runs[2][name])


def test_opcheck() -> None:
    q, d, tau = torch.randn(5, 7), torch.randn(6, 7, dtype=torch.bfloat16), torch.rand(3) + 0.1
    labels, guides = (torch.arange(5), torch.arange(6)), (torch.randn(5, 4), torch.randn(6, 4))
    everything = (q, d, torch.randn(3, 2, 7), torch.randn(3, 7), torch.arange(3), 3, 1, 5, tau, *labels, True, *guides,
                  0.1, True, torch.rand(6), torch.rand(3, 2), 3, 0.5, 0.1, *(True,) * 4, False, [], [],
                  True)  # fmt: skip
    tests = ("test_schema", "test_faketensor", "test_aot_dispatch_dynamic")
    torch.library.opcheck(OPS.info_nce.default, (*everything, torch.ones(3), *(True,) * 5), test_utils=tests)
    bare = (q, d, None, None, None, 5, 0, 6, tau[0], None, None, False, None, None, 0.0, False, None, None, 0, 0.0, 0.0,
            *(False,) * 5, [], [], False, None, *(False,) * 5)  # fmt: skip
    torch.library.opcheck(OPS.info_nce.default, bare, test_utils=tests)


def test_compile() -> None:
    def step(q: Tensor, d: Tensor, tau: Tensor, labels: Tensor, reduction: str) -> Tensor:
        loss = ek.info_nce(q, d, temperature=tau, reduction=reduction, query_labels=labels, document_labels=labels)
        return loss.square().sum()

    compiled = torch.compile(step, fullgraph=True, dynamic=True)
    for reduction, rows in (("mean", 9), ("none", 9), ("mean", 14)):
        inputs = [torch.randn(rows, 6, requires_grad=True) for _ in range(2)]
        inputs.append(torch.tensor(0.2, requires_grad=True))
        labels = torch.arange(rows) // 2
        got, wanted = (f(*inputs, labels, reduction) for f in (compiled, step))
        torch.testing.assert_close(got, wanted)
        for a, b in zip(*(torch.autograd.grad(loss, inputs) for loss in (got, wanted)), strict=True):
            torch.testing.assert_close(a, b)


def test_autocast_and_a_grad_scaler() -> None:
    q, d = (torch.randn(40, 16).half().requires_grad_() for _ in range(2))
    with torch.autocast("cpu", torch.bfloat16):
        for backend in ("cpu", "reference"):
            loss = ek.info_nce(q, d, temperature=1.0, backend=backend)
            exact = ek.info_nce(q.double(), d.double(), temperature=1.0, backend="reference")
            assert loss.dtype == torch.float32
            torch.testing.assert_close(loss, exact.float())
    # Gradients below float16's smallest number survive, because the factor meets them in float32.
    (tiny,) = torch.autograd.grad(ek.info_nce(q, d, temperature=50.0) * 1e-4, q, retain_graph=True)
    (scaled,) = torch.autograd.grad(ek.info_nce(q, d, temperature=50.0) * 65536.0, q)
    wide = q.detach().double().requires_grad_()
    exact = ek.info_nce(wide, d.double(), temperature=50.0, backend="reference")
    (wanted,) = torch.autograd.grad(exact * 65536.0, wide)
    assert (tiny == 0).float().mean() > 0.5
    torch.testing.assert_close(scaled.double(), wanted, rtol=1e-3, atol=1e-4)


def test_second_derivatives_raise() -> None:
    q, d = (torch.randn(5, 4, requires_grad=True) for _ in range(2))
    for reduction in ("mean", "none"):
        (first,) = torch.autograd.grad(ek.info_nce(q, d, reduction=reduction).sum(), q, create_graph=True)
        with pytest.raises(NotImplementedError, match="second derivatives"):
            first.square().sum().backward()
    wide = [x.detach().double().requires_grad_() for x in (q, d)]
    assert torch.autograd.gradgradcheck(lambda *x: ek.info_nce(*x, backend="reference"), wide)


def test_temperature_may_be_an_integer() -> None:
    q, d = torch.randn(6, 4, requires_grad=True), torch.randn(6, 4)
    for temperature in (1, 2):
        loss, wanted = ek.info_nce(q, d, temperature=temperature), ek.info_nce(q, d, temperature=float(temperature))
        assert torch.equal(loss, wanted)
        assert torch.equal(*(torch.autograd.grad(x, q)[0] for x in (loss, wanted)))


def test_backward_twice() -> None:
    """The last backward may overwrite what the graph keeps; one that isn't the last may not, nor share it."""
    q, d = (torch.randn(40, 16, requires_grad=True) for _ in range(2))
    wanted = torch.autograd.grad(3 * ek.info_nce(q, d), (q, d))
    loss = ek.info_nce(q, d)
    first = torch.autograd.grad(3 * loss, (q, d), retain_graph=True)
    kept = [x.clone() for x in first]
    first[0].zero_()
    again = torch.autograd.grad(3 * loss, (q, d))
    for a, b, c in zip(wanted, kept, again, strict=True):
        assert torch.equal(a, b)
        assert torch.equal(a, c)


def test_function_alone() -> None:
    q, d = (torch.randn(6, 4, requires_grad=True) for _ in range(2))
    wanted = torch.autograd.grad(ek.info_nce(q, d), (q, d))
    for extra in ((), (None, None, None, 0.05), (*(None,) * 3, 0.05, "cosine", ("query_to_doc",), "joint", *(None,) * 2,
                  "ignore", None, None, 0.0, "absolute", None, None, None, 0.0, 0.0, None, None, "mean", False, None,
                  "reference")):  # fmt: skip
        got = torch.autograd.grad(ek.InfoNCEFunction.apply(q, d, *extra), (q, d))
        for a, b in zip(got, wanted, strict=True):
            torch.testing.assert_close(a, b)


def test_module() -> None:
    q, d = torch.randn(9, 4), torch.randn(9, 4)
    fixed = ek.nn.InfoNCELoss(0.2, reduction="sum")
    learnable = ek.nn.InfoNCELoss(0.2, learnable_temperature=True, reduction="sum")
    assert list(fixed.parameters()) == []
    torch.testing.assert_close(fixed(q, d), learnable(q, d))
    torch.testing.assert_close(fixed(q, d), ek.info_nce(q, d, temperature=0.2, reduction="sum"))
    tau = torch.tensor(0.2, requires_grad=True)
    (wanted,) = torch.autograd.grad(ek.info_nce(q, d, temperature=tau, reduction="sum"), tau)
    learnable(q, d).backward()
    torch.testing.assert_close(learnable.log_temperature.grad, wanted * tau)


@pytest.mark.parametrize("similarity", ["cosine", "dot"])
def test_a_duplicate_of_the_positive_beats_nothing(variant: str, similarity: str) -> None:
    """Also where their similarity is far smaller than its sum's terms."""
    d = torch.randn(1, 100).expand(2, 100)
    q = torch.randn(300, 100)
    q -= (q @ d[0])[:, None] * d[0] / d[0].square().sum()
    options: dict[str, Any] = {"targets": torch.zeros(300, dtype=torch.int64), "similarity": similarity}
    for dtype in (torch.float32, torch.bfloat16):
        _, metrics = ek.info_nce(q.to(dtype), d.to(dtype), **options, return_metrics=True)
        assert metrics["accuracy"] == 1


@pytest.mark.parametrize("same_label", [None, "ignore", "positive"])
def test_metrics(variant: str, same_label: str | None) -> None:
    d, negatives = torch.randn(140, 4), torch.randn(90, 2, 4)
    q = torch.randn(90, 4) + 2 * d[:90]
    d[130:] = d[:10]  # a tie beats nothing
    options: dict[str, Any] = {"negatives": negatives, "temperature": torch.rand(90) + 0.1}
    if same_label:
        labels = torch.arange(140) // 3
        options |= {"query_labels": labels[:90], "document_labels": labels, "same_label": same_label}
    loss, metrics = ek.info_nce(q, d, **options, return_metrics=True)
    wanted_loss, wanted = ek.info_nce(q, d, **options, return_metrics=True, backend="reference")
    torch.testing.assert_close(loss, wanted_loss)
    torch.testing.assert_close(metrics, wanted)
    assert 0 < metrics["accuracy"] < 1
    q.requires_grad_()
    with_gradient = ek.info_nce(q, d, **options, return_metrics=True)
    torch.testing.assert_close(with_gradient[1], wanted)
    (d_q,) = torch.autograd.grad(with_gradient[0], q)
    torch.testing.assert_close(d_q, torch.autograd.grad(ek.info_nce(q, d, **options), q)[0])


@pytest.mark.parametrize("columns", [40, 4200])
def test_metrics_by_hand(columns: int) -> None:
    q, d = torch.randn(30, 4), torch.randn(columns, 4)
    q += 2 * d[:30]
    _, metrics = ek.info_nce(q, d, return_metrics=True)
    s = torch.nn.functional.cosine_similarity(q[:, None], d[None], dim=-1)
    torch.testing.assert_close(metrics["accuracy"], (s.argmax(1) == torch.arange(30)).float().mean())
    torch.testing.assert_close(metrics["positive_similarity"], s.diagonal().mean())
    torch.testing.assert_close(metrics["negative_similarity"], s[torch.eye(30, columns) == 0].mean())


def test_small_losses_keep_their_digits(variant: str) -> None:
    q = torch.eye(16, requires_grad=True)
    loss = ek.info_nce(q, q.detach(), temperature=1 / 20)
    wanted = torch.log1p(15 * torch.tensor(-20.0, dtype=torch.float64).exp())  # 3e-8, which 1 + x would lose
    torch.testing.assert_close(loss.double(), wanted, rtol=1e-5, atol=0)
    assert (torch.autograd.grad(loss, q)[0].abs() > 0).any()


def test_peak_memory() -> None:
    """The N×M matrix would be 1 GiB; inputs and gradients are 4 MiB each."""
    code = """
import torch, embedkern as ek
torch.set_num_threads(1)
q, d = (torch.randn(16384, 64, requires_grad=True) for _ in range(2))
ek.info_nce(q[:100], d[:100]).backward()
open("/proc/self/clear_refs", "w").write("5")
def status(name):
    return next(int(line.split()[1]) for line in open("/proc/self/status") if line.startswith(name)) / 1024
before = status("VmRSS")
ek.info_nce(q, d).backward()
print(status("VmHWM") - before)
"""
    grown = float(subprocess.check_output([sys.executable, "-c", code], text=True))
    assert grown < 2 * 4 + 64, f"{grown} MiB"


# Bad input


def bad_calls() -> list[tuple[dict[str, Any], type[Exception], str]]:
    q, d, ids = torch.randn(4, 3), torch.randn(5, 3), torch.arange(4)
    return [
        ({"queries": [1.0]}, TypeError, "queries must be a tensor"),
        ({"queries": torch.randn(4)}, ValueError, r"queries must have shape \(N, D\), got \(4,\)"),
        ({"queries": q.long()}, TypeError, "queries must be floating point, got torch.int64"),
        ({"queries": torch.randn(4, 0)}, ValueError, "queries must have D ≥ 1"),
        ({"documents": torch.randn(5, 2)}, ValueError, r"documents must have shape \(5, 3\), got \(5, 2\)"),
        ({"documents": torch.randn(0, 3)}, ValueError, "documents must have M ≥ 1"),
        ({"documents": d.to("meta")}, ValueError, "documents must be on queries's device cpu, got meta"),
        ({"documents": d[:3]}, ValueError, "documents must be at least as many as queries without targets, got 3 for"),
        ({"negatives": torch.randn(5, 2, 3)}, ValueError, r"negatives must have shape \(4, 2, 3\), got \(5, 2, 3\)"),
        ({"negatives": d}, ValueError, r"negatives must have shape \(N, K, D\), got \(5, 3\)"),
        ({"positives": d}, ValueError, r"positives must have shape \(4, 3\), got \(5, 3\)"),
        ({"targets": ids[:3]}, ValueError, r"targets must have shape \(4,\), got \(3,\)"),
        ({"targets": ids.float()}, TypeError, "targets must be int32 or int64, got torch.float32"),
        ({"targets": ids + 2}, ValueError, r"targets\[3\] must be in \[0, 5\), got 5"),
        ({"targets": ids - 1}, ValueError, r"targets\[0\] must be in \[0, 5\), got -1"),
        ({"temperature": 0.0}, ValueError, "temperature must be > 0, got 0.0"),
        ({"temperature": NAN}, ValueError, "temperature must be > 0, got nan"),
        ({"temperature": "1"}, TypeError, "temperature must be a number or a tensor, got str"),
        ({"temperature": torch.ones(3)}, ValueError, r"temperature must have shape \(4,\), got \(3,\)"),
        ({"similarity": "l2"}, ValueError, r"similarity must be one of \('cosine', 'dot'\), got 'l2'"),
        ({"reduction": "max"}, ValueError, "reduction must be one of"),
        ({"same_label": "drop"}, ValueError, "same_label must be one of"),
        ({"query_labels": ids}, ValueError, "query_labels and document_labels belong together, got only query_labels"),
        ({"query_labels": ids, "document_labels": ids}, ValueError, r"document_labels must have shape \(5,\)"),
        ({"weights": torch.ones(3)}, ValueError, r"weights must have shape \(4,\), got \(3,\)"),
        ({"weights": ids}, TypeError, "weights must be floating point"),
        ({"label_smoothing": 1.5}, ValueError, r"label_smoothing must be in \[0, 1\], got 1.5"),
        ({"directions": ("doc_to_doc",)}, ValueError, "directions must hold 'query_to_doc'"),
        ({"directions": ("query_to_doc", "up")}, ValueError, "directions must be one of"),
        ({"partition_mode": "both"}, ValueError, "partition_mode must be one of"),
        ({"margin_strategy": "x"}, ValueError, "margin_strategy must be one of"),
        ({"hardness_mode": "x"}, ValueError, "hardness_mode must be one of"),
        ({"hardness_strength": -1.0}, ValueError, "hardness_strength must be ≥ 0"),
        ({"backend": "gpu"}, ValueError, "backend must be one of"),
        ({"backend": "cpu", "queries": q.double()}, NotImplementedError, "queries is torch.float64"),
        ({"backend": "cuda"}, NotImplementedError, "cuda"),
        ({"directions": ("query_to_doc",) * 2}, ValueError, "directions must differ"),
        ({"directions": 3}, ValueError, "directions must be a tuple of some of .*, got 3"),
        ({"label_smoothing": None}, TypeError, "label_smoothing must be a number, got NoneType"),
        ({"hardness_strength": "1"}, TypeError, "hardness_strength must be a number, got str"),
        ({"margin": NAN}, ValueError, "margin must be a number, got nan"),
        ({"margin": None}, TypeError, "margin must be a number, got NoneType"),
        ({"return_metrics": "no"}, TypeError, "return_metrics must be True or False, got 'no'"),
        ({"matryoshka_dims": 2}, TypeError, "matryoshka_dims must be a tuple or list, got int"),
        ({"matryoshka_dims": (2,), "matryoshka_weights": 1.0}, TypeError, "matryoshka_weights must be a tuple or list"),
        ({"matryoshka_dims": (2,), "matryoshka_weights": ("a",)}, TypeError, "matryoshka_weights must be numbers, got"),
        (
            {"directions": ("query_to_doc", "doc_to_doc"), "partition_mode": "per_direction"},
            ValueError,
            "partition_mode 'per_direction' needs the positive pair in every direction",
        ),
        ({"guide_queries": q}, ValueError, "guide_queries and guide_documents belong together, got only guide_queries"),
        ({"guide_queries": q, "guide_documents": q}, ValueError, r"guide_documents must have shape \(5, 3\), got"),
        ({"guide_queries": q[:, :0], "guide_documents": d[:, :0]}, ValueError, "guide_queries must have G ≥ 1"),
        ({"negative_weights": torch.ones(4)}, ValueError, r"negative_weights must have shape \(5,\), got \(4,\)"),
        ({"negative_weights": torch.ones(4, 2)}, ValueError, r"negative_weights \(N, K\) need negatives"),
        ({"negative_weights": -torch.ones(5)}, ValueError, "negative_weights must be ≥ 0, got -1"),
        ({"negative_weights": [1.0]}, TypeError, "negative_weights must be a tensor"),
        ({"negative_weights": torch.ones(5, requires_grad=True)}, NotImplementedError, "negative_weights get no grad"),
        ({"matryoshka_weights": (1.0,)}, ValueError, "matryoshka_weights need matryoshka_dims"),
        ({"matryoshka_dims": ()}, ValueError, "matryoshka_dims must hold at least one"),
        ({"matryoshka_dims": (2, 4)}, ValueError, r"matryoshka_dims must be in \[1, 3\], got 4"),
        ({"matryoshka_dims": (2.0,)}, TypeError, "matryoshka_dims must be integers, got float"),
        ({"matryoshka_dims": (2,), "matryoshka_weights": (1.0, 2.0)}, ValueError, "as many as matryoshka_dims, got 2"),
    ]


@pytest.mark.parametrize(("arguments", "error", "message"), bad_calls())
def test_bad_input(arguments: dict[str, Any], error: type[Exception], message: str) -> None:
    good = {"queries": torch.randn(4, 3), "documents": torch.randn(5, 3)}
    with pytest.raises(error, match=message):
        ek.info_nce(**{**good, **arguments})


def test_targets_are_checked_in_the_reference_and_in_a_compiled_call() -> None:
    q, d, targets = torch.randn(4, 3), torch.randn(5, 3), torch.tensor([0, 1, 2, 7])
    compiled = torch.compile(lambda: ek.info_nce(q, d, targets=targets), fullgraph=True, backend="aot_eager")
    for call in (compiled, lambda: ek.info_nce(q, d, targets=targets, backend="reference")):
        with pytest.raises(ValueError, match=r"targets\[3\] must be in \[0, 5\), got 7"):
            call()


def test_explain() -> None:
    q = torch.randn(4, 3)
    choice, refused = ek.explain("info_nce", q, q)
    assert choice == "cpu"
    assert ek.explain("info_nce", q.double(), q.double()).choice == "reference"
    assert set(refused) == {"cuda", "triton", "reference"}
    assert reference.EPS == 1e-12
