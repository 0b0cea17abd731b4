"""A call of the contrastive loss for Triton: its vectors, options and directions as the kernels take them."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any, NamedTuple

import torch
import triton
from torch import Tensor

from . import infonce_kernels as kernels
from . import launcher
from .infonce_kernels import MOMENT, SLOTS


class Tiles(NamedTuple):
    rows: int
    columns: int
    depth: int  # dimensions at a time
    warps: int
    alone: int  # warps where no second tile is held beside the scores: two programs an SM
    stages: int


# By the products: float32's are FMAs without tf32. What they compile to: docs/triton.md.
TILES = {
    "half": Tiles(128, 128, 64, 8, 4, 3), "tf32": Tiles(128, 128, 32, 8, 8, 3), "ieee": Tiles(64, 64, 32, 8, 8, 2)
}  # fmt: skip
# Rows go without a maximum where all logits lie within so many units: exp of less is no longer a normal number.
BOUNDS = {torch.float32: 80.0, torch.bfloat16: 80.0, torch.float16: 8.0}
PANEL_BYTES = 64 << 20
PANEL_ROWS = 4096


class Vectors(NamedTuple):
    """x as the kernels take it."""

    data: Tensor  # (rows, width): x · 2^k
    factor: Tensor  # what is left to make it a unit vector
    inverse: Tensor  # 1 / max(‖x‖₂, EPS)

    def rows(self, targets: Tensor | None, first: int, count: int) -> Vectors:
        """Those of `targets`, or `count` from `first` on."""
        if targets is None:
            return Vectors(*(x[first : first + count] for x in self))
        return Vectors(*(x.index_select(0, targets) for x in self))


class Pass(NamedTuple):
    """A direction: queries (0) or their positives (1) as rows, documents (0) or queries (1) as columns."""

    rows: int
    columns: int
    part: int  # of the softmaxes
    apart: bool  # the row's own columns are left out
    key: Tensor
    period: int


class Call:
    """What the launches of one call share."""

    def __init__(
        self,
        queries: Tensor,
        documents: Tensor,
        negatives: Tensor | None,
        positives: Tensor | None,
        targets: Tensor | None,
        rows: int,
        offset: int,
        period: int,
        temperature: Tensor,
        query_labels: Tensor | None,
        document_labels: Tensor | None,
        same_positive: bool,
        guide_queries: Tensor | None,
        guide_documents: Tensor | None,
        margin: float,
        relative: bool,
        document_weights: Tensor | None,
        negative_weights: Tensor | None,
        hardness: int,
        strength: float,
        label_smoothing: float,
        cosine: bool,
        query_to_query: bool,
        doc_to_query: bool,
        doc_to_doc: bool,
        per_direction: bool,
        _prefixes: list[int],  # none: they are calls of their own
        _prefix_weights: list[float],
        metrics: bool,
        d_loss: Tensor | None,
        *needs: bool,
    ) -> None:
        self.rows, self.cosine, self.label_smoothing, self.metrics = rows, cosine, label_smoothing, metrics
        self.hardness, self.strength = hardness, strength if hardness else 0.0
        self.query_period, self.tau, self.d_loss = period, temperature, d_loss
        self.need_queries, self.need_documents, self.need_negatives, self.need_positives, self.need_temperature = needs
        self.dim, self.device = queries.shape[1], queries.device
        self.width = -(-self.dim // 16) * 16
        given = {x.dtype for x in (queries, documents, positives) if x is not None}
        self.dtype = given.pop() if len(given) == 1 else torch.float32
        self.guide_dtype = None if guide_queries is None or guide_documents is None else torch.promote_types(
            guide_queries.dtype, guide_documents.dtype
        )  # fmt: skip
        widest = torch.float32 if torch.float32 in (self.dtype, self.guide_dtype) else self.dtype
        self.precision = launcher.precision(widest)
        self.tiles = TILES[self.precision if widest == torch.float32 else "half"]
        columns = documents.shape[0], queries.shape[0]
        self.targets = None if targets is None else targets.long().clamp(0, columns[0] - 1)
        self.columns = [self.vectors(documents, self.dtype), self.vectors(queries, self.dtype)]
        self.own_positives = positives is not None
        self.anchors = [
            self.columns[1].rows(None, offset, rows),
            self.columns[0].rows(self.targets, 0, rows) if positives is None else self.vectors(positives, self.dtype),
        ]
        self.inverse_tau = temperature.reciprocal().expand(rows).contiguous()
        self.sim_positive = self.positive(self.anchors[0], self.anchors[1])
        self.u_positive = self.sim_positive * self.inverse_tau
        self.labels = query_labels is not None
        self.same_positive = same_positive and self.labels
        self.sides = self._sides(
            offset, query_labels, document_labels, guide_queries, guide_documents, margin, relative
        )  # fmt: skip
        weights = None if document_weights is None else document_weights.clamp(min=0).log().contiguous()
        self.log_weights = [weights, None]
        self._negatives(negatives, negative_weights)

        of_target = torch.arange(rows, device=self.device) if self.targets is None else self.targets
        of_query = torch.arange(rows, device=self.device) + offset
        self.query = (of_target % period).int()
        self.parts = 2 if per_direction and doc_to_query else 1
        self.passes = [Pass(0, 0, 0, True, of_target.int(), columns[0])]
        if query_to_query:
            self.passes.append(Pass(0, 1, 0, True, of_query.int(), columns[1]))
        self.mirror: Pass | None = None
        if doc_to_query:
            other = Pass(1, 1, self.parts - 1, self.parts > 1, of_query.int(), columns[1])
            if targets is None and positives is None and rows == columns[1]:
                self.mirror = other  # the same pairs as the first pass's
            else:
                self.passes.append(other)
        if doc_to_doc:
            self.passes.append(Pass(1, 0, 0, True, self.query, period))
        plain = not (label_smoothing or self.same_positive or metrics)
        self.slots = MOMENT.value + 1 if plain else SLOTS
        weighed = document_weights is not None or negative_weights is not None
        self.bound = BOUNDS[self.dtype] if cosine and not weighed else 0.0
        self.d_z: Tensor | None = None  # by the rows' own negatives, in the units of the rows' sums
        seen = sum(columns[each.columns] for each in self.passes) + (self.rows if self.mirror is not None else 0)
        self.scale = 2.0 ** (seen.bit_length() // 2)  # p is within 1 / seen and 1: the middle, for float16's range

    def launch(
        self, kernel: Any, programs: int, *arguments: Any, tiles: bool = False, alone: bool = False, **constants: Any
    ) -> None:
        warps, stages = 4, 1
        if tiles:
            constants |= {"BLOCK_R": self.tiles.rows, "BLOCK_C": self.tiles.columns, "BLOCK_D": self.tiles.depth}
            warps, stages = self.tiles.alone if alone else self.tiles.warps, self.tiles.stages
        launcher.run(kernel, programs, *arguments, **constants, warps=warps, stages=stages)

    def floats(self, *shape: int) -> Tensor:
        return torch.empty(shape, dtype=torch.float32, device=self.device)

    def vectors(self, x: Tensor, dtype: torch.dtype) -> Vectors:
        x = x if x.stride(1) == 1 or x.shape[1] == 1 else x.contiguous()
        rows, dim = x.shape
        width = -(-dim // 16) * 16
        data = torch.empty((rows, width), dtype=dtype, device=x.device)
        found = Vectors(data, self.floats(rows), self.floats(rows))
        self.launch(
            kernels.vectors_kernel, triton.cdiv(rows, 16), *found, x, x.stride(0), rows, dim, width, COSINE=self.cosine,
            BLOCK_R=16, BLOCK_D=64
        )  # fmt: skip
        return found

    def positive(
        self, a: Vectors, b: Vectors, margin: float = 0.0, guide: bool = False, relative: bool = False
    ) -> Tensor:
        out = self.floats(self.rows)
        self.launch(
            kernels.positive_kernel, triton.cdiv(self.rows, self.tiles.rows), out, a.data, b.data, a.factor, b.factor,
            self.rows, a.data.shape[1], margin, tiles=True, GUIDE=guide, RELATIVE=relative, PRECISION=self.precision
        )  # fmt: skip
        return out

    def _sides(
        self, offset: int, query_labels: Tensor | None, document_labels: Tensor | None, guide_queries: Tensor | None,
        guide_documents: Tensor | None, margin: float, relative: bool
    ) -> tuple[list[kernels.Side], list[kernels.Side]]:  # fmt: skip
        """Of the rows, queries and their positives, and of the columns, documents and queries."""
        labels: list[Any] = [[None] * 2, [None] * 2]
        guides: list[Any] = [[Vectors(None, None, None)] * 2, [Vectors(None, None, None)] * 2]  # type: ignore[arg-type]
        self.threshold, self.guide_width = None, 0
        if query_labels is not None and document_labels is not None:
            of_rows = query_labels[offset : offset + self.rows].contiguous()
            chosen = document_labels[: self.rows] if self.targets is None else document_labels[self.targets]
            labels = [[of_rows, chosen.contiguous()], [document_labels.contiguous(), query_labels.contiguous()]]
        if guide_queries is not None and guide_documents is not None:
            assert self.guide_dtype is not None
            q, d = (self.vectors(x, self.guide_dtype) for x in (guide_queries, guide_documents))
            guides = [[q.rows(None, offset, self.rows), d.rows(self.targets, 0, self.rows)], [d, q]]
            self.threshold = self.positive(guides[0][0], guides[0][1], margin, True, relative)
            self.guide_width = q.data.shape[1]
        rows, columns = (
            [kernels.Side(v.data, v.factor, of, g.data, g.factor) for v, of, g in zip(*three, strict=True)]
            for three in zip((self.anchors, self.columns), labels, guides, strict=True)
        )
        return rows, columns

    def _negatives(self, negatives: Tensor | None, weights: Tensor | None) -> None:
        """Similarities with each row's own, their u and z."""
        self.negatives = None
        if negatives is None or negatives.shape[1] == 0:
            return
        x = negatives if negatives.stride(2) == 1 or negatives.shape[2] == 1 else negatives.contiguous()
        count = x.shape[1]
        self.negatives = kernels.Negatives(x, x.stride(0), x.stride(1), count)
        self.sim, self.inverse = self.floats(self.rows, count), self.floats(self.rows, count)
        q = self.anchors[0]
        self.launch(
            kernels.negatives_kernel, self.rows, self.sim, self.inverse, self.negatives, q.data, q.factor, self.dim,
            self.width, COSINE=self.cosine, BLOCK_K=8, BLOCK_D=256
        )  # fmt: skip
        self.u = self.sim * self.inverse_tau[:, None]
        self.z = self.u + self.strength * self.sim if self.hardness > 1 else self.u
        if weights is not None:
            self.z = self.z + weights.clamp(min=0).log()
        self.seen = self.z != -torch.inf

    def panels(self, each: Pass) -> Iterator[tuple[int, int]]:
        """First row and rows of each. Columns' sums are read and written once a panel: so its rows grow with D."""
        size = max(PANEL_BYTES // (self.dtype.itemsize * self.count(each)), 2 * self.width)
        size = triton.cdiv(min(size, PANEL_ROWS), self.tiles.rows) * self.tiles.rows
        for first in range(0, self.rows, size):
            yield first, min(size, self.rows - first)

    def scores(
        self, mode: Any, each: Pass, first: int, rows: int, tiles: Tensor | None, panel: Tensor | None = None,
        softmax: kernels.Softmax | None = None, mirror: kernels.Mirror | None = None
    ) -> None:  # fmt: skip
        forward = each is self.passes[0]
        count = self.count(each)
        numbers = kernels.Numbers(first, rows, count, each.period, self.query_period, self.strength)
        of_rows = kernels.Rows(self.inverse_tau, self.u_positive, each.key, self.query, self.threshold)
        hardness, log_weight = self.hardness if forward else 0, self.log_weights[each.columns]
        metrics = self.metrics and forward and tiles is not None and tiles.ndim == 3
        # MAXIMA, which have work for few rows, spilled 32 to 336 bytes with labels.
        few = not self.labels if mode is kernels.MAXIMA else mode is kernels.EXPONENTIALS and not self.need_temperature
        alone = few and not (hardness or metrics or self.threshold is not None)
        self.launch(
            kernels.scores_kernel, triton.cdiv(rows, self.tiles.rows) * triton.cdiv(count, self.tiles.columns), panel,
            0 if panel is None else panel.stride(0), tiles, self.sides[0][each.rows], self.sides[1][each.columns],
            of_rows, softmax, mirror or kernels.Mirror(), log_weight, self.width, self.guide_width, numbers,
            tiles=True, alone=alone, MODE=mode.value, APART=each.apart, MIRROR_APART=self.parts > 1, HARDNESS=hardness,
            SAME_POSITIVE=self.same_positive, SMOOTHING=self.label_smoothing != 0, METRICS=metrics,
            BLOCKS=each.period < count, WITH_MOMENT=self.need_temperature, PRECISION=self.precision
        )  # fmt: skip

    def count(self, each: Pass) -> int:
        return self.columns[each.columns].data.shape[0]

    def panel(self, each: Pass, rows: int) -> Tensor:
        count = self.count(each)
        return torch.empty((rows, -(-count // 64) * 64), dtype=self.dtype, device=self.device)[:, :count]

    def tile_sums(self, each: Pass, rows: int) -> Tensor:
        return self.floats(self.slots, triton.cdiv(self.count(each), self.tiles.columns), rows)

    def combine(self, out: Tensor, tiles: Tensor, first: int, rescale: bool, more: bool = False) -> None:
        slots, count, rows = tiles.shape
        self.launch(
            kernels.combine_kernel, triton.cdiv(rows, 128), out, self.rows, tiles, first, rows, count, SLOTS=slots,
            RESCALE=rescale, MORE=more, BLOCK=128
        )  # fmt: skip
