"""info_nce's options against sentence-transformers' losses, corners of each, their memory, and several processes."""

from __future__ import annotations

import subprocess
import sys
from typing import Any

import pytest
import torch
import torch.distributed as dist
from infonce_cases import build, check, pairwise, results
from torch import Tensor

import embedkern as ek

ALL = ("query_to_doc", "query_to_query", "doc_to_query", "doc_to_doc")


def columns(count: int, rows: int = 50, dim: int = 24) -> list[Tensor]:
    """Queries, positives and hard negatives, alike enough that no gradient vanishes."""
    q = torch.randn(rows, dim)
    return [x.requires_grad_() for x in (q, *(q + torch.randn(rows, dim) for _ in range(1 + count)))]


def assert_same(got: Tensor, wanted: Tensor, inputs: list[Tensor]) -> None:
    torch.testing.assert_close(got, wanted, rtol=1e-5, atol=1e-6)
    for a, b in zip(*(torch.autograd.grad(loss, inputs) for loss in (got, wanted)), strict=True):
        torch.testing.assert_close(a, b, rtol=1e-4, atol=1e-6)


THEIRS: list[dict[str, Any]] = [
    {},
    {"directions": ("query_to_doc", "doc_to_query"), "partition_mode": "per_direction"},
    {"directions": ("query_to_doc", "doc_to_query")},
    {"directions": ALL},
    {"directions": ("query_to_doc", "doc_to_doc"), "hardness_mode": "in_batch_negatives", "hardness_strength": 9.0},
    {"hardness_mode": "hard_negatives", "hardness_strength": 5.0},
    {"directions": ("query_to_query", "query_to_doc"), "hardness_mode": "all_negatives", "hardness_strength": 2.0},
]


@pytest.mark.parametrize("backend", ["cpu", "reference"])
@pytest.mark.parametrize("options", THEIRS)
def test_same_as_ranking_losses(options: dict[str, Any], backend: str) -> None:
    losses = pytest.importorskip("sentence_transformers.sentence_transformer.losses")
    model: Any = torch.nn.Sequential(torch.nn.Identity())  # never run
    whole = losses.MultipleNegativesRankingLoss(model, scale=20.0, **options)
    cached = losses.CachedMultipleNegativesRankingLoss(model, scale=20.0, mini_batch_size=16, **options)
    for negatives in (0, 2):
        embeddings = columns(negatives)
        got = ek.info_nce(embeddings[0], torch.cat(embeddings[1:]), backend=backend, **options)
        assert_same(got, whole.compute_loss_from_embeddings(embeddings, None), embeddings)
        got = ek.info_nce(embeddings[0], torch.cat(embeddings[1:]), backend=backend, **options)
        assert_same(got, cached.calculate_loss([list(x.split(16)) for x in embeddings]), embeddings)


@pytest.mark.parametrize("backend", ["cpu", "reference"])
@pytest.mark.parametrize(("strategy", "margin"), [("absolute", 0.0), ("absolute", 0.1), ("relative", 0.2)])
def test_same_as_guided_loss(monkeypatch: pytest.MonkeyPatch, strategy: str, margin: float, backend: str) -> None:
    losses = pytest.importorskip("sentence_transformers.sentence_transformer.losses")
    module = sys.modules[losses.GISTEmbedLoss.__module__]
    monkeypatch.setattr(module, "embed_columns", lambda model, features: model)  # they are embeddings already
    for negatives, queries_too, positives_too in ((0, True, True), (0, False, False), (1, True, False)):
        theirs: Any = losses.GISTEmbedLoss.__new__(losses.GISTEmbedLoss)  # a real one wants tokenizers
        torch.nn.Module.__init__(theirs)
        embeddings = columns(negatives)
        guide = [x.detach() for x in columns(negatives, dim=10)]
        guide[1][7] = guide[1][3]  # a tie with the positive stays
        theirs.model, theirs.guide, theirs.must_retokenize = embeddings, guide, False
        theirs.similarity_fct, theirs.temperature = torch.nn.CosineSimilarity(dim=-1), 0.05
        theirs.margin_strategy, theirs.margin, theirs.gather_across_devices = strategy, margin, False
        theirs.contrast_anchors, theirs.contrast_positives = queries_too, positives_too
        theirs.cross_entropy_loss = torch.nn.CrossEntropyLoss()
        directions = ("query_to_doc", *ALL[1:2] * queries_too, *ALL[3:] * positives_too)
        got = ek.info_nce(
            embeddings[0], torch.cat(embeddings[1:]), directions=directions, guide_queries=guide[0],
            guide_documents=torch.cat(guide[1:]), margin=margin, margin_strategy=strategy, backend=backend,
        )  # fmt: skip
        assert_same(got, theirs([{}], None), embeddings)


def test_guide_by_hand(variant: str) -> None:
    """A duplicate of the positive ties with it in every lane and block, and stays."""
    q, d, guide_q, guide_d = torch.randn(60, 8), torch.randn(300, 8), torch.randn(60, 700), torch.randn(300, 700)
    guide_d[100:160] = guide_d[:60]
    unit = [torch.nn.functional.normalize(x.double()) for x in (guide_q, guide_d)]
    g = unit[0] @ unit[1].T
    hidden = g > g.diagonal()[:, None] + 1e-9
    s = torch.nn.functional.cosine_similarity(q[:, None], d[None], dim=-1) / 0.05
    wanted = torch.nn.functional.cross_entropy(s.masked_fill(hidden, -torch.inf), torch.arange(60))
    torch.testing.assert_close(ek.info_nce(q, d, guide_queries=guide_q, guide_documents=guide_d), wanted)


def test_negative_weights_by_hand(variant: str) -> None:
    q, d, n, w, v = torch.randn(20, 8), torch.randn(30, 8), torch.randn(20, 3, 8), torch.rand(30), torch.rand(20, 3)
    w[3], v[4] = 0, 0
    unit = [torch.nn.functional.normalize(x, dim=-1) for x in (q, d, n)]
    e, e_n = (unit[0] @ unit[1].T / 0.05).exp(), (torch.einsum("nd,nkd->nk", unit[0], unit[2]) / 0.05).exp()
    own = torch.eye(20, 30, dtype=torch.bool)
    by_documents = (torch.where(own, e, w * e).sum(1) + e_n.sum(1)).log() - e.diagonal().log()
    by_negatives = (e.sum(1) + (v * e_n).sum(1)).log() - e.diagonal().log()
    torch.testing.assert_close(ek.info_nce(q, d, negatives=n, negative_weights=w), by_documents.mean())
    torch.testing.assert_close(ek.info_nce(q, d, negatives=n, negative_weights=v), by_negatives.mean())


def test_matryoshka_is_a_sum_of_prefixes() -> None:
    q, d = (torch.randn(70, 40, requires_grad=True) for _ in range(2))
    dims, factors = (40, 7, 16), (1.0, 0.5, 2.0)
    got, metrics = ek.info_nce(q, d, matryoshka_dims=dims, matryoshka_weights=factors, return_metrics=True)
    parts = [ek.info_nce(q[:, :dim], d[:, :dim], return_metrics=True) for dim in dims]
    assert_same(got, sum(factor * loss for factor, (loss, _) in zip(factors, parts, strict=True)), [q, d])
    torch.testing.assert_close(metrics, parts[0][1])


@pytest.mark.parametrize("similarity", ["cosine", "dot"])
@pytest.mark.parametrize(
    ("rows", "columns", "dims"), [(7, 9, (16, 19)), (130, 300, (16, 32, 128, 667)), (800, 820, (48, 16))]
)
def test_prefixes_in_one_pass(variant: str, similarity: str, rows: int, columns: int, dims: tuple[int, ...]) -> None:
    """Dimensions in multiples of 16 share their products; several panels; what hides columns; every gradient."""
    labels = torch.arange(columns) % (columns // 2)
    tau = 0.2 if similarity == "cosine" else 20.0
    tensors = {"queries": torch.randn(rows, max(dims) + 3), "documents": torch.randn(columns, max(dims) + 3).bfloat16(),
               "temperature": tau + torch.rand(rows), "targets": torch.randint(columns, (rows,)),
               "weights": torch.rand(rows)}  # fmt: skip
    tensors["queries"][1] *= 1e-14  # shorter than what normalize divides by, and so is a prefix
    tensors["queries"][2, :16] *= 1e-14
    if rows < 1000:
        tensors |= {"query_labels": labels[:rows], "document_labels": labels, "guide_queries": torch.randn(rows, 9),
                    "guide_documents": torch.randn(columns, 9)}  # fmt: skip
    options = {
        "matryoshka_dims": dims,
        "matryoshka_weights": [1.5, 0.5, 1.0, 2.0][: len(dims)],
        "similarity": similarity,
    }
    for reduction in ("mean", "none"):
        check(tensors, {**options, "reduction": reduction})
    check(tensors, options, ("documents",))
    check(tensors, options, ("queries", "temperature"))


def test_prefixes_far_apart(variant: str) -> None:
    """Logits hundreds apart: the maximum jumps within a block."""
    tensors = {"queries": torch.randn(60, 48), "documents": torch.randn(300, 48), "temperature": torch.tensor(2e-3)}
    check(tensors, {"matryoshka_dims": (48, 16)})


@pytest.mark.parametrize("labels", [False, True])
@pytest.mark.parametrize("extra", [(), ("query_to_query",), ("doc_to_doc",), ("query_to_query", "doc_to_doc"), None])
@pytest.mark.parametrize(("rows", "columns"), [(1, 1), (50, 100), (420, 900)])
def test_both_ways_at_once(variant: str, rows: int, columns: int, extra: tuple[str, ...] | None, labels: bool) -> None:
    """doc_to_query: squares and beyond, documents that are nobody's positive, labels; None: per direction."""
    tensors = {"queries": torch.randn(rows, 37), "documents": torch.randn(columns, 37), "weights": torch.rand(rows),
               "temperature": torch.rand(rows) * 0.5 + 0.1}  # fmt: skip
    if rows == 50:  # column blocks, of another dtype
        tensors["documents"] = tensors["documents"].bfloat16()
    if labels:
        tensors["document_labels"] = torch.arange(columns) % (columns // 2 + 1)
        tensors["query_labels"] = torch.arange(rows) % (rows // 2 + 1)
    mode = "per_direction" if extra is None else "joint"
    options = {"directions": ("query_to_doc", "doc_to_query", *(extra or ())), "partition_mode": mode}
    check(tensors, options)
    if rows == 50:
        for frozen in (("documents",), ("queries",), ("queries", "documents")):
            check(tensors, {**options, "similarity": "dot", "reduction": "none"}, frozen)


@pytest.mark.parametrize("backend", ["cpu", "reference"])
def test_nothing_is_nan(variant: str, backend: str) -> None:
    """Everything hidden, every vector alike, zero vectors, one row, a small τ: with every option at once."""
    for rows in (1, 9, 70):
        for fill in (0.0, 1.0, None):
            made = torch.randn(rows, 8) if fill is None else torch.full((rows, 8), fill)
            tensors = {name: made.clone() for name in ("queries", "documents", "guide_queries", "guide_documents")}
            tensors["negatives"], tensors["temperature"] = made[:, None].clone(), torch.tensor(1e-3)
            tensors["query_labels"] = tensors["document_labels"] = torch.zeros(rows, dtype=torch.int64)
            for same in ("ignore", "positive"):
                options = {"directions": ALL, "same_label": same, "label_smoothing": 0.1, "margin": -0.5,
                           "hardness_mode": "all_negatives", "hardness_strength": 2.0,
                           "matryoshka_dims": (8, 1)}  # fmt: skip
                for name, x in results(tensors, options, (), backend).items():
                    assert torch.isfinite(x).all(), (rows, fill, same, name)
    zero = {"queries": torch.randn(9, 5), "documents": torch.randn(9, 5), "negative_weights": torch.zeros(9),
            "temperature": torch.tensor(1e-3)}  # fmt: skip
    for name, x in results(zero, {}, (), backend).items():
        assert (x == 0).all(), name


@pytest.mark.parametrize("kernel", ["rows", "prefixes", "both ways", "few rows"])
def test_frozen_documents_and_thread_counts(kernel: str) -> None:
    """The same bits by each kernel, the first with every option at once."""
    case = next(case for case in pairwise() if case["rows"] == 513 and len(case["directions"][0]) > 1)
    case = {**case, "dim": 33, "dtype": torch.float32, "guide": ("absolute", 0.0), "negatives": 1, "matryoshka": True}
    tensors, options = build({**case, "temperature": "rows"})
    if kernel != "rows":
        tensors = {name: torch.randn(900, 40) for name in ("queries", "documents")}
        options = {"prefixes": {"matryoshka_dims": (40, 16)}, "both ways": {"directions": ALL}}.get(kernel, {})
    if kernel == "few rows":
        tensors = {"queries": torch.randn(60, 40), "documents": torch.randn(9000, 40)}
    threads, runs = torch.get_num_threads(), []
    try:
        for n in (1, 2, 5):
            torch.set_num_threads(n)
            runs.append(results(tensors, options, (), None))
    finally:
        torch.set_num_threads(threads)
    frozen = results(tensors, options, ("documents",), None)
    for name, x in runs[0].items():
        assert torch.equal(x, runs[1][name]), name
        assert torch.equal(x, runs[2][name]), name
        assert name == "documents" or torch.equal(x, frozen[name]), name


def test_compile_with_every_option() -> None:
    def step(q: Tensor, d: Tensor, guide: Tensor, labels: Tensor) -> Tensor:
        return ek.info_nce(q, d, directions=ALL, guide_queries=guide, guide_documents=guide, query_labels=labels,
                           document_labels=labels, negative_weights=guide[:, 0].abs(), hardness_mode="all_negatives",
                           hardness_strength=1.0, label_smoothing=0.1, matryoshka_dims=(6, 3))  # fmt: skip

    compiled = torch.compile(step, fullgraph=True, dynamic=True, backend="aot_eager")
    for rows in (9, 14):
        q, d = (torch.randn(rows, 6, requires_grad=True) for _ in range(2))
        guide, labels = torch.randn(rows, 4), torch.arange(rows) // 2
        assert_same(compiled(q, d, guide, labels), step(q, d, guide, labels), [q, d])


def test_reference_in_blocks(monkeypatch: pytest.MonkeyPatch) -> None:
    """Blocks of rows change nothing, second derivatives included."""
    from embedkern.reference import infonce as reference

    tensors, options = build({**pairwise()[0], "rows": 7, "dim": 3, "more_documents": 3, "dtype": torch.float32,
                              "directions": (ALL, "joint"), "labels": "positive", "guide": ("absolute", 0.0),
                              "hardness_mode": None})  # fmt: skip
    tensors = {name: x.double() if x.is_floating_point() else x for name, x in tensors.items()}
    whole = results(tensors, options, (), "reference")
    monkeypatch.setattr(reference, "BLOCK", 60)
    for name, x in results(tensors, options, (), "reference").items():
        torch.testing.assert_close(x, whole[name])

    def loss(q: Tensor, d: Tensor) -> Tensor:
        return ek.info_nce(**{**tensors, "queries": q, "documents": d}, **options, backend="reference").sum()

    leaves = [tensors[name].detach().requires_grad_() for name in ("queries", "documents")]
    assert torch.autograd.gradgradcheck(loss, leaves)

    queries, documents = (x.detach().float().requires_grad_() for x in leaves)
    wanted = torch.autograd.grad(ek.info_nce(queries, documents, backend="reference"), queries)
    with torch.autocast("cpu"):
        found = torch.autograd.grad(ek.info_nce(queries, documents, backend="reference"), queries)
    assert torch.equal(found[0], wanted[0])


GUIDE, LABELS = "guide_queries=g[:rows], guide_documents=g", "query_labels=ids[:rows], document_labels=ids"
MEMORY: dict[str, str] = {
    "several positives": f"{GUIDE}, {LABELS}, same_label='positive', label_smoothing=0.1",
    "all directions": f"directions={ALL}, hardness_mode='all_negatives', hardness_strength=1.0, negatives=d[:, None], "
    "negative_weights=g[:, 0].abs()",
    "per direction": f"directions={ALL[::2]}, partition_mode='per_direction', return_metrics=True, {GUIDE}",
    "both ways": f"directions={ALL}",
    "prefix after prefix": "matryoshka_dims=(32, 8), label_smoothing=0.1",
    "prefixes": f"matryoshka_dims=(32, 16), {GUIDE}, {LABELS}",
    "reference": f"{GUIDE}, {LABELS}, label_smoothing=0.1, backend='reference'",
}


def test_peak_memory_of_every_option() -> None:
    """The N×M matrix would be 1 GiB; inputs and gradients are 2 MiB each. One process: options after each other."""
    code = """
import ctypes, sys, torch, embedkern as ek
n = 16384
q, d = (torch.randn(n, 32, requires_grad=True) for _ in range(2))
g, ids = torch.randn(n, 8), torch.arange(n) // 2
def status(name):
    return next(int(line.split()[1]) for line in open("/proc/self/status") if line.startswith(name)) / 1024
def run(rows, q, d, g, ids, options):
    out = eval(f"ek.info_nce(q[:rows], d, {options})")
    (out[0] if isinstance(out, tuple) else out).backward()
for options in sys.argv[1:]:
    run(64, q[:64], d[:64], g[:64], ids[:64], options)
    q.grad = d.grad = None
    ctypes.CDLL("libc.so.6").malloc_trim(0)
    open("/proc/self/clear_refs", "w").write("5")
    before = status("VmRSS")
    run(1000 if "reference" in options else n, q, d, g, ids, options)
    print(status("VmHWM") - before)
"""
    printed = subprocess.check_output([sys.executable, "-c", code, *MEMORY.values()], text=True)
    grown = dict(zip(MEMORY, map(float, printed.split()), strict=True))
    assert max(grown.values()) < 4 * 2 + 64, grown
    assert len(grown) == len(MEMORY)


def _rank(rank: int, path: str, backend: str) -> None:
    dist.init_process_group("gloo", init_method=f"file://{path}", rank=rank, world_size=2)
    try:
        _same_as_one_process(rank, backend)
    finally:
        dist.destroy_process_group()


def _same_as_one_process(rank: int, backend: str) -> None:
    """Each rank's loss and gradients against the concatenated batch's."""
    torch.manual_seed(0)
    group, sizes = dist.group.WORLD, (5, 7)
    begin, end = (0, 5) if rank == 0 else (5, 12)
    embeddings = [x.detach() for x in columns(1, rows=12, dim=6)]
    labels, weights, guide = torch.arange(12) // 2, torch.rand(12), [x.detach() for x in columns(1, rows=12, dim=4)]
    for options in (
        {},
        {"directions": ALL, "hardness_mode": "in_batch_negatives", "hardness_strength": 1.0, "label_smoothing": 0.1},
        {"directions": ALL[::2], "partition_mode": "per_direction", "matryoshka_dims": (6, 3), "reduction": "sum"},
        {"reduction": "none"},
    ):
        found = []
        for mine in (slice(0, 12), slice(begin, end)):
            leaves = [x[mine].clone().requires_grad_() for x in embeddings]
            row_weights = weights[mine].clone().requires_grad_()
            loss, metrics = ek.info_nce(
                leaves[0], torch.cat(leaves[1:]), query_labels=labels[mine], document_labels=labels[mine].repeat(2),
                guide_queries=guide[0][mine], guide_documents=torch.cat([x[mine] for x in guide[1:]]),
                weights=row_weights, temperature=0.2, group=group if mine.stop - mine.start < 12 else None,
                return_metrics=True, backend=backend, **options,
            )  # fmt: skip
            gradients = torch.autograd.grad(loss.sum(), [*leaves, row_weights])
            found.append((loss, metrics, gradients))
        (wanted, wanted_metrics, whole), (loss, metrics, mine_only) = found
        torch.testing.assert_close(loss, wanted[begin:end] if wanted.ndim else wanted)
        torch.testing.assert_close(metrics, wanted_metrics)
        for a, b in zip(mine_only, whole, strict=True):
            torch.testing.assert_close(a, b[begin:end], rtol=1e-4, atol=1e-6)
    assert sum(sizes) == 12


@pytest.mark.parametrize("backend", ["cpu", "reference"])
def test_group_of_two_processes(tmp_path: Any, backend: str) -> None:
    torch.multiprocessing.spawn(_rank, (str(tmp_path / "store"), backend), nprocs=2)
