"""contrastive_distillation, sigmoid_loss and the cross-batch memory against plain formulas, and their memory."""

from __future__ import annotations

import subprocess
import sys
from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.distributed as dist
from accuracy import assert_accurate
from torch import Tensor

import embedkern as ek
import embedkern.nn
from embedkern.backends import panels
from embedkern.reference import contrastive as reference
from embedkern.schema import OPS

DTYPES = (torch.float32, torch.bfloat16, torch.float16)


def gradients(function: Callable[..., Tensor], leaves: list[Tensor]) -> list[Tensor]:
    leaves = [x.detach().requires_grad_() for x in leaves]
    loss = function(*leaves)
    return [loss.detach(), *torch.autograd.grad(loss, leaves, torch.full_like(loss, 1.5))]


def check(ours: Callable[..., Tensor], plain: Callable[..., Tensor], leaves: list[Tensor]) -> None:
    """Against float64, by torch's own error at float32 and one rounding to the inputs' dtype."""
    exact = gradients(plain, [x.double() for x in leaves])
    torchs = [
        x.to(leaf.dtype) for x, leaf in zip(gradients(plain, [x.float() for x in leaves])[1:], leaves, strict=True)
    ]
    loss, *got = gradients(ours, leaves)
    torch.testing.assert_close(loss.double(), exact[0], rtol=2e-6, atol=1e-6)
    for i, (a, b, c) in enumerate(zip(got, exact[1:], torchs, strict=True)):
        if a.ndim:
            assert_accurate(a, b, c, 3, f"gradient {i}")
        else:  # a sum over all pairs
            torch.testing.assert_close(a.double(), b, rtol=2e-5, atol=2e-6)


SHAPES = ((1, 1, DTYPES[0]), (33, 50, DTYPES[1]), (50, 33, DTYPES[2]), (64, 64, DTYPES[0]))


@pytest.mark.parametrize("kind", ["kl", "mse"])
@pytest.mark.parametrize("elements", [300, 1 << 20])
@pytest.mark.parametrize(("rows", "columns", "dtype"), SHAPES)
def test_distillation(
    monkeypatch: pytest.MonkeyPatch, rows: int, columns: int, dtype: torch.dtype, elements: int, kind: str
) -> None:
    monkeypatch.setattr(panels, "ELEMENTS", elements)
    teacher = torch.randn(rows, 12), torch.randn(columns, 12).to(dtype)
    q, d = torch.randn(rows, 20).to(dtype)[:, 3:], torch.randn(17, columns).to(dtype).T
    tau = torch.tensor(0.2)

    def plain(q: Tensor, d: Tensor, tau: Tensor = tau) -> Tensor:
        return reference.contrastive_distillation(q, d, *(x.to(q.dtype) for x in teacher), tau.to(q.dtype), 0.3, kind)

    def ours(q: Tensor, d: Tensor, tau: Tensor = tau) -> Tensor:
        return ek.contrastive_distillation(q, d, *teacher, temperature=tau, teacher_temperature=0.3, loss=kind)

    check(ours, plain, [q, d, tau] if kind == "kl" else [q, d])


def test_distillation_by_hand() -> None:
    s, t = torch.randn(5, 4), torch.randn(5, 4)
    q, d = torch.nn.functional.normalize(s), torch.nn.functional.normalize(t)
    p, target = (q @ d.T / 0.5).log_softmax(1), (d @ q.T / 2).log_softmax(1)
    wanted = torch.nn.functional.kl_div(p, target, log_target=True, reduction="batchmean")
    got = ek.contrastive_distillation(s, t, t, s, temperature=0.5, teacher_temperature=2.0)
    torch.testing.assert_close(got, wanted)
    wanted = torch.nn.functional.mse_loss(q @ d.T, d @ q.T)
    got = ek.contrastive_distillation(s, t, t, s, temperature=0.5, teacher_temperature=2.0, loss="mse")
    torch.testing.assert_close(got, wanted)


def test_sigmoid_loss(monkeypatch: pytest.MonkeyPatch) -> None:
    for i, (rows, dtype) in enumerate(((1, DTYPES[0]), (33, DTYPES[1]), (50, DTYPES[2]), (64, DTYPES[0]))):
        monkeypatch.setattr(panels, "ELEMENTS", (1 << 20, 300)[i % 2])
        x, y = (torch.nn.functional.normalize(torch.randn(rows, 16)).to(dtype) for _ in range(2))
        check(ek.sigmoid_loss, reference.sigmoid_loss, [x, y, torch.tensor(9.0), torch.tensor(-8.0)])
    x, y = torch.randn(3, 4), torch.randn(3, 4)
    z = 2 * x @ y.T - 1
    wanted = (
        -sum(torch.nn.functional.logsigmoid(z[i, j] if i == j else -z[i, j]) for i in range(3) for j in range(3)) / 3
    )
    torch.testing.assert_close(ek.sigmoid_loss(x, y, 2.0, -1.0), wanted)


def test_same_bits_for_any_number_of_threads() -> None:
    x, y, t_x, t_y = (torch.randn(n, d, requires_grad=True) for n, d in ((517, 100), (777, 100), (517, 60), (777, 60)))
    scale, bias = (torch.tensor(value, requires_grad=True) for value in (0.3, -1.0))
    before, results = torch.get_num_threads(), []
    for threads in (1, 2, 3, 5):
        torch.set_num_threads(threads)
        losses = [
            ek.contrastive_distillation(x, y, t_x, t_y, temperature=scale, teacher_temperature=0.1, loss=loss)
            for loss in ("kl", "mse")
        ]
        losses.append(ek.sigmoid_loss(y, x.repeat(2, 1)[:777], scale, bias))
        results.append([*losses, *(g for loss in losses for g in torch.autograd.grad(loss, (x, y, scale)))])
    torch.set_num_threads(before)
    assert all(torch.equal(a, b) for other in results[1:] for a, b in zip(results[0], other, strict=True))


def test_only_the_gradients_that_are_needed() -> None:
    x, y = torch.randn(9, 4, requires_grad=True), torch.randn(9, 4, requires_grad=True)
    whole = torch.autograd.grad(ek.sigmoid_loss(x, y, 2.0, -1.0), (x, y))
    assert torch.equal(torch.autograd.grad(ek.sigmoid_loss(x, y.detach(), 2.0, -1.0), x)[0], whole[0])
    assert (
        OPS.sigmoid_loss(x.detach(), y.detach(), torch.tensor(1.0), torch.tensor(0.0), 0, 9, False, True)[1].numel()
        == 0
    )


def test_nothing_is_nan() -> None:
    zero, one = torch.zeros(5, 3, requires_grad=True), torch.ones(5, 3, requires_grad=True)
    for loss in (
        ek.contrastive_distillation(zero, one, one, zero, temperature=1e-3, teacher_temperature=1e-3),
        ek.contrastive_distillation(zero, zero, one, one, loss="mse"),
        ek.sigmoid_loss(zero, one * 1e4, 100.0, -10.0),
        ek.sigmoid_loss(torch.zeros(0, 3, requires_grad=True), torch.zeros(0, 3), 1.0, 0.0),
        ek.contrastive_distillation(torch.zeros(0, 3, requires_grad=True), one, torch.zeros(0, 3), one),
    ):
        assert torch.isfinite(loss)
        loss.backward()
    assert torch.isfinite(zero.grad).all()
    assert torch.isfinite(one.grad).all()


def test_torch_machinery() -> None:
    x, y, tau = torch.randn(5, 4), torch.randn(6, 4).bfloat16(), torch.tensor(0.5)
    tests = ("test_schema", "test_faketensor", "test_aot_dispatch_dynamic")
    for needs in ((True, True), (False, True)):
        torch.library.opcheck(
            OPS.contrastive_distillation.default, (x, y, x, y, tau, 0.2, True, *needs), test_utils=tests
        )
        torch.library.opcheck(OPS.sigmoid_loss.default, (x, y, tau, tau, 1, 5, *needs), test_utils=tests)

    def step(x: Tensor, y: Tensor, tau: Tensor) -> Tensor:
        return ek.contrastive_distillation(x, y, y, x, temperature=tau) + ek.sigmoid_loss(x, y, tau, -1.0)

    compiled = torch.compile(step, fullgraph=True, dynamic=True, backend="aot_eager")
    for rows in (5, 8):
        leaves = [torch.randn(rows, 4), torch.randn(rows, 4), torch.tensor(0.7)]
        for a, b in zip(gradients(compiled, leaves), gradients(step, leaves), strict=True):
            torch.testing.assert_close(a, b)
    leaf = torch.randn(5, 4, requires_grad=True)
    with torch.autocast("cpu", torch.bfloat16):
        assert ek.sigmoid_loss(leaf, leaf.detach(), 2.0, 0.0).dtype == torch.float32
        torch.testing.assert_close(step(leaf, leaf, tau), step(leaf.double(), leaf.double(), tau.double()).float())
    for loss in (ek.sigmoid_loss(leaf, leaf.detach(), 2.0, 0.0), ek.contrastive_distillation(leaf, leaf, leaf, leaf)):
        (first,) = torch.autograd.grad(loss, leaf, create_graph=True)
        with pytest.raises(NotImplementedError, match="second derivatives"):
            first.square().sum().backward()


def test_peak_memory() -> None:
    """The N×M matrix would be 256 MiB; inputs and gradients are 1 MiB each."""
    code = """
import torch, embedkern as ek
torch.set_num_threads(1)
q, d = (torch.randn(8192, 32, requires_grad=True) for _ in range(2))
def status(name):
    return next(int(line.split()[1]) for line in open("/proc/self/status") if line.startswith(name)) / 1024
for loss in (lambda q, d: ek.contrastive_distillation(q, d, d, q), lambda q, d: ek.sigmoid_loss(q, d, 10.0, -10.0)):
    loss(q[:64], d[:64]).backward()
    q.grad = d.grad = None
    open("/proc/self/clear_refs", "w").write("5")
    before = status("VmRSS")
    loss(q, d).backward()
    print(status("VmHWM") - before)
"""
    grown = [float(x) for x in subprocess.check_output([sys.executable, "-c", code], text=True).split()]
    assert len(grown) == 2
    assert max(grown) < 2 * 2 + 64, grown


def _rank(rank: int, path: str) -> None:
    dist.init_process_group("gloo", init_method=f"file://{path}", rank=rank, world_size=2)
    try:
        torch.manual_seed(0)
        x, y, begin, end = torch.randn(9, 4), torch.randn(9, 4), 4 * rank, 4 + 5 * rank
        whole = gradients(lambda x, y, b: ek.sigmoid_loss(x, y, 2.0, b), [x, y, torch.tensor(-1.0)])
        mine = gradients(lambda x, y, b: ek.sigmoid_loss(x, y, 2.0, b, dist.group.WORLD),
                         [x[begin:end], y[begin:end], torch.tensor(-1.0)])  # fmt: skip
        torch.testing.assert_close(mine[0], whole[0])
        for a, b in zip(mine[1:3], whole[1:3], strict=True):
            torch.testing.assert_close(a, b[begin:end])
        dist.all_reduce(mine[3])
        torch.testing.assert_close(mine[3], whole[3])
    finally:
        dist.destroy_process_group()


def test_group_of_two_processes(tmp_path: Any) -> None:
    torch.multiprocessing.spawn(_rank, (str(tmp_path / "store"),), nprocs=2)


def test_sigmoid_module() -> None:
    x, y = torch.randn(6, 4), torch.randn(6, 4)
    module = ek.nn.SigmoidLoss(5.0, -2.0)
    loss = module(x, y)
    torch.testing.assert_close(loss, ek.sigmoid_loss(x, y, 5.0, -2.0))
    loss.backward()
    assert module.log_scale.grad.abs() > 0
    assert module.logit_bias.grad.abs() > 0


def test_cross_batch_memory() -> None:
    memory = ek.nn.CrossBatchMemory(5, 3)
    batches = [torch.randn(4, 3, requires_grad=True) for _ in range(3)]
    labels = [torch.arange(4) + 10 * i for i in range(3)]
    for i, expected in enumerate(([], [batches[0]], [batches[0][3:], batches[1]])):
        documents, ids = memory(batches[i], labels[i])
        torch.testing.assert_close(documents, torch.cat([batches[i], *expected]))
        (d_batch,) = torch.autograd.grad(documents.sum(), batches[i])
        assert (d_batch == 1).all()
    assert ids.tolist() == [20, 21, 22, 23, 3, 10, 11, 12, 13]
    loss = ek.info_nce(torch.randn(4, 3), documents, query_labels=labels[2], document_labels=ids)
    assert torch.isfinite(loss)
    other = ek.nn.CrossBatchMemory(5, 3)
    other.load_state_dict(memory.state_dict())
    other.eval()
    for _ in range(2):  # nothing is remembered in evaluation
        torch.testing.assert_close(other(batches[0], labels[0])[0][4:], torch.cat([batches[1], batches[2]])[3:])
    with pytest.raises(ValueError, match="labels must be given always or never"):
        memory(batches[0])
    with pytest.raises(ValueError, match=r"documents must have shape \(4, 3\), got \(4, 2\)"):
        memory(batches[0][:, :2])


def bad_calls() -> list[tuple[Callable[[], Tensor], type[Exception], str]]:
    x, y = torch.randn(4, 3), torch.randn(5, 3)
    distil = ek.contrastive_distillation
    return [
        (lambda: distil([1.0], y, x, y), TypeError, "student_queries must be a tensor"),
        (lambda: distil(x, y.long(), x, y), TypeError, "student_documents must be floating point, got torch.int64"),
        (lambda: distil(x, y[:, :2], x, y), ValueError, r"student_documents must have shape \(5, 3\), got \(5, 2\)"),
        (lambda: distil(x, y, y, y), ValueError, r"teacher_queries must have shape \(4, 3\), got \(5, 3\)"),
        (lambda: distil(x, y, x, x), ValueError, r"teacher_documents must have shape \(5, 3\), got \(4, 3\)"),
        (lambda: distil(x, y[:0], x, y[:0]), ValueError, "student_documents must have M ≥ 1"),
        (lambda: distil(x, y, x, y, loss="l1"), ValueError, "loss must be one of"),
        (lambda: distil(x, y, x, y, temperature=0.0), ValueError, "temperature must be > 0, got 0.0"),
        (lambda: distil(x, y, x, y, teacher_temperature=x), TypeError, "teacher_temperature must be a number"),
        (
            lambda: distil(x, y, x, y, temperature=torch.ones(4)),
            ValueError,
            "temperature must be a number or a tensor of",
        ),
        (lambda: ek.sigmoid_loss(x, y, 1.0, 0.0), ValueError, r"texts must have shape \(4, 3\), got \(5, 3\)"),
        (lambda: ek.sigmoid_loss(x, x.to("meta"), 1.0, 0.0), ValueError, "texts must be on images's device"),
        (lambda: ek.sigmoid_loss(x, x, "1", 0.0), TypeError, "logit_scale must be a number or a tensor, got str"),
        (lambda: ek.nn.SigmoidLoss(0.0), ValueError, "logit_scale must be > 0"),
        (lambda: ek.nn.CrossBatchMemory(0, 3), ValueError, "size must be ≥ 1"),
    ]


@pytest.mark.parametrize(("call", "error", "message"), bad_calls())
def test_bad_input(call: Callable[[], Tensor], error: type[Exception], message: str) -> None:
    with pytest.raises(error, match=message):
        call()
