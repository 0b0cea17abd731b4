"""The contrastive loss on Triton: panels of rows. Their scores, with what options do to them, are Triton's; a panel's
products with vectors are torch's. Nothing waits for the GPU; targets and negative weights are clamped, not checked.
"""

from __future__ import annotations

from typing import Any, NamedTuple

import torch
import triton
from torch import Tensor

from ... import schema
from . import infonce_kernels as kernels
from . import launcher
from .infonce_call import Call, Pass, Vectors
from .infonce_kernels import BEST, COUNT, MOMENT, NEGATIVES, SAME, SUM

LARGE = 60.0  # exp of this and of its negative are far from float32's limits


class Sums(NamedTuple):
    """Of a softmax's rows, beside the positive; the last six of visible columns and of those with the row's label."""

    offset: Tensor
    rest: Tensor  # Σ exp(z - offset)
    moment: Tensor  # Σ exp(z - offset) (u - u_positive)
    visible: Tensor  # how many
    z: Tensor  # Σ (z - z_positive)
    u: Tensor
    same: Tensor
    same_z: Tensor
    same_u: Tensor


class Softmax(NamedTuple):
    """What that comes to."""

    offset: Tensor
    total: Tensor
    spread: Tensor  # y of each visible column
    share: Tensor  # y, in addition, of each with the row's label
    loss: Tensor
    u_spread: Tensor  # Σ (p - y) u
    at_positive: Tensor  # p - y


def _accumulate(into: Tensor, a: Tensor, b: Tensor) -> None:
    """into (float32) += a · b"""
    if a.dtype == torch.float32:
        into.addmm_(a, b)
    elif launcher.DEVICE == "cpu":
        into.addmm_(a.float(), b.float())
    else:
        torch.addmm(into, a, b, out_dtype=torch.float32, out=into)


class Loss(Call):
    """One call, from statistics to gradients."""

    def run(self, outputs: tuple[Tensor, ...]) -> None:
        loss, metrics, _, d_columns, d_documents, _, _, d_temperature = outputs
        of_rows: list[Tensor | None] = [None, None]  # Σ over columns, by kinds of rows
        of_columns = [d_documents.zero_() if self.need_documents else None, None]
        if self.d_loss is not None:
            self.by_row = self.d_loss / self.parts * self.inverse_tau
            largest = self.by_row.abs().amax()
            self.unit = torch.where(largest > 0, largest, 1) / self.scale
            need_anchors = self.need_positives or (self.need_documents and not self.own_positives)
            self.row_scale = [self.unit / x.factor for x in self.anchors]
            if self.need_queries:
                of_rows[0] = torch.zeros((self.rows, self.width), device=self.device)
            if need_anchors and any(each.rows == 1 for each in self.passes):
                of_rows[1] = torch.zeros((self.rows, self.width), device=self.device)
            if d_columns.numel():
                of_columns[1] = d_columns.zero_()
        with_panels = any(x is not None for x in of_rows + of_columns)
        one_target = not self.label_smoothing and not self.same_positive
        if with_panels and one_target and len(self.passes) == 1 and self.mirror is None:
            found, parts = self.exponentials(of_rows[0], of_columns[0])
        else:
            both = [self.statistics(each) for each in self.passes]
            found = [x for x, _ in both]
            members = [*zip(self.passes, found, strict=True), (self.mirror, both[0][1])]
            parts = [
                self.softmax(
                    self.sums(part, [x for each, x in members if each and x is not None and each.part == part])
                )
                for part in range(self.parts)
            ]
            if with_panels:
                self.coefficients(parts, of_rows, of_columns)
        torch.mul(sum(part.loss for part in parts), 1 / self.parts, out=loss)
        if self.metrics:
            self.row_metrics(metrics, found[0])
        if self.d_loss is not None:
            if d_temperature.numel():
                torch.mul(self.by_row, -sum(part.u_spread for part in parts), out=d_temperature)
            self.gradients(outputs, parts, of_rows, of_columns)

    def statistics(self, each: Pass) -> tuple[Tensor, Tensor | None]:
        """(slots, rows), and the same of the first pass's mirror image."""
        found, mirror, of_mirror = self.floats(self.slots, self.rows), None, None
        if self.mirror is not None and each is self.passes[0]:
            of_mirror = self.floats(self.slots, self.rows)
        for first, rows in self.panels(each):
            tiles = self.tile_sums(each, rows)
            if of_mirror is not None:
                of_columns = self.floats(self.slots, triton.cdiv(rows, self.tiles.rows), self.rows)
                mirror = kernels.Mirror(self.rows, of_columns, None)
            self.scores(kernels.STATISTICS, each, first, rows, tiles, mirror=mirror)
            self.combine(found, tiles, first, rescale=True)
            if of_mirror is not None:
                self.combine(of_mirror, of_columns, 0, rescale=True, more=first > 0)
        return found, of_mirror

    def sums(self, part: int, found: list[Tensor]) -> Sums:
        """A softmax's, from those of its passes."""
        offset = self.u_positive
        for x in found:
            offset = torch.maximum(offset, x[0])
        if part == 0 and self.negatives is not None:
            offset = torch.maximum(offset, self.z.amax(1))
        rest, moment = torch.zeros_like(offset), torch.zeros_like(offset)
        for x in found:
            by = (x[0] - offset).exp()
            rest, moment = rest + x[SUM.value] * by, moment + x[MOMENT.value] * by
        return self.with_negatives(part, found, offset, rest, moment)

    def with_negatives(self, part: int, found: list[Tensor], offset: Tensor, rest: Tensor, moment: Tensor) -> Sums:
        """The same with the rows' own negatives, and what smoothing and several positives sum."""
        mine = part == 0 and self.negatives is not None
        if mine:
            e = (self.z - offset[:, None]).exp()
            rest = rest + e.sum(1)
            moment = moment + (e * (self.u - self.u_positive[:, None])).sum(1)
        more = [torch.zeros_like(offset)] * 6
        if self.label_smoothing:
            more[:3] = torch.stack([x[COUNT.value : COUNT.value + 3] for x in found]).sum(0)
            if mine:
                z, u = (torch.where(self.seen, x - self.u_positive[:, None], 0).sum(1) for x in (self.z, self.u))
                more[:3] = more[0] + self.seen.sum(1), more[1] + z, more[2] + u
        if self.same_positive:
            more[3:] = torch.stack([x[SAME.value : SAME.value + 3] for x in found]).sum(0)
        return Sums(offset, rest, moment, *more)

    def softmax(self, s: Sums) -> Softmax:
        beyond = s.offset - self.u_positive
        total = s.rest + (-beyond).exp()
        spread = torch.where(s.visible > 0, self.label_smoothing / (s.visible + 1), 0)
        share = (1 - self.label_smoothing) / (1 + s.same)
        # log1p keeps a small loss's digits
        loss = torch.where(beyond < LARGE, (s.rest * beyond.exp()).log1p(), beyond + total.log())
        at_positive = -s.rest / total
        if self.label_smoothing or self.same_positive:  # among other targets p and y are alike and small
            among = (-beyond).exp() / total - share - spread
            at_positive = torch.where((spread == 0) & (s.same == 0), at_positive, among)
        return Softmax(
            s.offset, total, spread, share, loss - spread * s.z - share * s.same_z,
            s.moment / total - spread * s.u - share * s.same_u, at_positive,
        )  # fmt: skip

    def exponentials(self, of_rows: Tensor | None, of_columns: Tensor | None) -> tuple[list[Tensor], list[Softmax]]:
        """Three products, or four where logits have no bound: a panel of exp(z - offset) makes its sums and, normalised
        by these afterwards, both gradients."""
        (each,) = self.passes
        rows_side, columns_side = self.anchors[0], self.columns[0]
        limit = self.inverse_tau + self.strength
        offset = torch.where(2 * limit <= self.bound, limit, torch.inf)
        softmax = kernels.Softmax(offset, None, None, None)
        highest = self.floats(self.rows)
        for first, rows in self.panels(each):
            tiles = self.tile_sums(each, rows)[0]
            self.scores(kernels.MAXIMA, each, first, rows, tiles, softmax=softmax)
            torch.amax(tiles, 0, out=highest[first : first + rows])
        highest = torch.maximum(highest, self.u_positive)
        if self.negatives is not None:
            highest = torch.maximum(highest, self.z.amax(1))
        offset = torch.where(offset == torch.inf, highest, offset)
        softmax = kernels.Softmax(offset, None, None, None)
        own = (self.u_positive - offset).exp()
        e = None if self.negatives is None else (self.z - offset[:, None]).exp()
        found, totals = self.floats(self.slots, self.rows), torch.empty_like(offset)
        for first, rows in self.panels(each):
            part = slice(first, first + rows)
            panel, tiles = self.panel(each, rows), self.tile_sums(each, rows)
            self.scores(kernels.EXPONENTIALS, each, first, rows, tiles, panel, softmax)
            self.combine(found, tiles, first, rescale=False)
            total = found[SUM.value, part] + own[part]
            totals[part] = total if e is None else total + e[part].sum(1)
            if of_rows is not None:
                _accumulate(of_rows[part], panel, columns_side.data)
            if of_columns is not None:
                by = rows_side.factor[part] * self.by_row[part] / (totals[part] * self.unit)
                _accumulate(of_columns, panel.T, (rows_side.data[part] * by[:, None]).to(self.dtype))
        s = self.softmax(self.with_negatives(0, [found], offset, found[SUM.value], found[MOMENT.value]))
        self.row_scale[0] = self.by_row / totals
        self.d_z = e
        return [found], [s]

    def coefficients(self, parts: list[Softmax], of_rows: list[Tensor | None], of_columns: list[Tensor | None]) -> None:
        """A panel of the loss's derivatives by s, which makes both gradients: four products with the statistics'."""
        by = self.by_row / self.unit
        of_parts = [kernels.Softmax(s.offset, by / s.total, by * s.spread, by * s.share) for s in parts]
        for each in self.passes:
            to_rows, to_columns, mirror = of_rows[each.rows], of_columns[each.columns], None
            if to_rows is None and to_columns is None:
                continue
            if self.mirror is not None and each is self.passes[0]:
                mirror = kernels.Mirror(self.rows, None, of_parts[self.mirror.part])
            for first, rows in self.panels(each):
                panel, part = self.panel(each, rows), slice(first, first + rows)
                self.scores(kernels.COEFFICIENTS, each, first, rows, None, panel, of_parts[each.part], mirror)
                if to_rows is not None:
                    _accumulate(to_rows[part], panel, self.columns[each.columns].data)
                if to_columns is not None:
                    _accumulate(to_columns, panel.T, self.anchors[each.rows].data[part])

    def gradients(
        self, outputs: tuple[Tensor, ...], parts: list[Softmax], of_rows: list[Tensor | None],
        of_columns: list[Tensor | None]
    ) -> None:  # fmt: skip
        """From those of unit vectors, with the positive's and the rows' own negatives' share."""
        _, _, d_queries, d_columns, d_documents, d_negatives, d_positives, _ = outputs
        q, p = self.anchors
        at_positive = self.by_row * sum(part.at_positive for part in parts)
        if self.negatives is not None and (self.need_queries or self.need_negatives):
            if self.d_z is None:
                s = parts[0]
                e = (self.z - s.offset[:, None]).exp() / s.total[:, None]
                self.d_z = (self.by_row / self.unit * q.factor)[:, None] * (e - self.seen * s.spread[:, None])
            self.launch(
                kernels.d_negatives_kernel, self.rows * triton.cdiv(self.dim, 256),
                d_negatives if self.need_negatives else None, of_rows[0], self.negatives, self.d_z, self.row_scale[0],
                self.sim, self.inverse, q.data, q.factor, self.dim, self.width, COSINE=self.cosine, BLOCK_K=8,
                BLOCK_D=256
            )  # fmt: skip
        if self.need_queries:
            self.gradient(d_queries, of_rows[0], self.row_scale[0], p.data, at_positive * p.factor, q)
        if self.need_positives:
            self.gradient(d_positives, of_rows[1], self.row_scale[1], q.data, at_positive * q.factor, p)
        if self.need_documents:
            if not self.own_positives:  # in the units of the columns' sums
                rows, by = self.floats(self.rows, self.width), p.factor / self.unit
                self.gradient(rows, of_rows[1], self.row_scale[1] * by, q.data, at_positive * q.factor * by, None)
                if self.targets is None:
                    d_documents[: self.rows] += rows
                else:  # sorts: no atomics
                    d_documents.index_put_((self.targets,), rows, accumulate=True)
            scale = self.unit / self.columns[0].factor
            self.gradient(d_documents, d_documents, scale, None, None, self.columns[0])
        if of_columns[1] is not None:
            self.gradient(d_columns, d_columns, self.unit / self.columns[1].factor, None, None, self.columns[1])

    def gradient(
        self, out: Tensor, sums: Tensor | None, scale: Tensor, other: Tensor | None, weight: Tensor | None,
        unit: Vectors | None
    ) -> None:  # fmt: skip
        vectors = (None, None) if unit is None or not self.cosine else (unit.data, unit.inverse)
        self.launch(
            kernels.gradient_kernel, triton.cdiv(out.shape[0], 16), out, out.shape[1], sums, scale, other, weight,
            *vectors, out.shape[0], self.dim, self.width, BLOCK_R=16, BLOCK_D=64
        )  # fmt: skip

    def row_metrics(self, out: Tensor, found: Tensor) -> None:
        best, total, count = found[BEST.value], found[NEGATIVES.value], found[NEGATIVES.value + 1]
        if self.negatives is not None:
            u = torch.where(self.seen, self.u, -torch.inf)
            best = torch.maximum(best, u.amax(1))
            total = total + torch.where(self.seen, self.u, 0).sum(1)
            count = count + self.seen.sum(1)
        tie = 2e-6 * (best.abs() + self.u_positive.abs())  # a rounding apart: another product
        out[:, 0] = ~(best - self.u_positive > tie)
        out[:, 1] = self.sim_positive
        out[:, 2] = total * self.tau
        out[:, 3] = count


def _run(*arguments: Any) -> tuple[Tensor, ...]:
    """The operator: see schema."""
    outputs: tuple[Tensor, ...] = schema.OPERATORS["info_nce"][1](*arguments)
    queries, prefixes = arguments[0], arguments[26]
    if outputs[0].numel() == 0:
        return tuple(x.zero_() for x in outputs)
    if prefixes:
        return _run_prefixes(outputs, arguments)
    with torch.no_grad(), torch.autocast(launcher.DEVICE, enabled=False), launcher.on(queries.device):
        Loss(*arguments).run(outputs)
    return outputs


def _run_prefixes(outputs: tuple[Tensor, ...], arguments: tuple[Any, ...]) -> tuple[Tensor, ...]:
    """One after the other."""
    for x in outputs:
        x.zero_()
    queries, documents, *options, prefixes, weights, metrics, d_loss = arguments[:30]
    for size, weight in zip(prefixes, weights, strict=True):
        d_part = None if d_loss is None else d_loss * weight
        part = _run(queries[:, :size], documents[:, :size], *options, [], [], metrics, d_part, *arguments[30:])
        outputs[0].add_(part[0], alpha=weight)
        for to, x in zip(outputs[1:], part[1:], strict=True):
            to[..., : x.shape[-1]] += x
    return outputs


_INFONCE = schema.twin("info_nce", "triton", _run, launcher.DEVICE, schema.OPERATORS["info_nce"][1])


def forward(queries: Tensor, *arguments: Any) -> tuple[Tensor, ...]:
    """Launches at once: an operator implemented in Python costs ~60 µs more. Traced, it is the operator."""
    traced = torch.compiler.is_compiling() or type(queries) is not Tensor
    return _INFONCE(queries, *arguments) if traced else _run(queries, *arguments)
