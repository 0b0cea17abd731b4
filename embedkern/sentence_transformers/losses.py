"""sentence-transformers' contrastive losses, their loss stage computed by `info_nce`: no N×M matrix, float32 always.

Arguments, attributes, configs and citations are inherited.
"""

from __future__ import annotations

import random
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import torch
import torch.distributed as dist
from sentence_transformers.base.losses.merged_forward import embed_columns
from sentence_transformers.sentence_transformer import losses as theirs
from sentence_transformers.util import all_gather, all_gather_with_grad, batch_to_device, cos_sim, dot_score, get_rank
from torch import Tensor, nn

from ..ops.infonce import info_nce

Features = dict[str, Any]

__all__ = [
    "CachedGISTEmbedLoss",
    "CachedMultipleNegativesRankingLoss",
    "GISTEmbedLoss",
    "MatryoshkaLoss",
    "MultipleNegativesRankingLoss",
]


class _OnInfoNCE:
    """What the losses here share: `prefixes`, set while a MatryoshkaLoss runs them, and when `info_nce` can't serve."""

    prefixes: tuple[Sequence[int], Sequence[float]] | None = None

    def is_served(self) -> bool:
        raise NotImplementedError

    def _options(self) -> dict[str, Any]:
        if self.prefixes is None:
            return {}
        return dict(zip(("matryoshka_dims", "matryoshka_weights"), self.prefixes, strict=True))


def _similarity(function: Callable[[Tensor, Tensor], Tensor]) -> Any:
    return "cosine" if function is cos_sim else "dot" if function is dot_score else None


def _wide(x: Tensor) -> Tensor:
    return x.float() if x.dtype in (torch.float16, torch.bfloat16) else x


def _computed(columns: Sequence[Tensor]) -> Sequence[Tensor]:
    """float32 under autocast, as theirs, also where the CPU or the GPU would multiply bfloat16."""
    return [_wide(x) for x in columns] if torch.is_autocast_enabled(columns[0].device.type) else columns


def _finish(loss: Tensor, with_backward: bool) -> Tensor:
    if with_backward:
        loss.backward()
        loss = loss.detach()
    return loss


class _Ranking(_OnInfoNCE):
    def is_served(self) -> bool:
        return _similarity(self.similarity_fct) is not None  # type: ignore[attr-defined]

    def _ranking(self: Any, columns: Sequence[Tensor]) -> Tensor:
        group = dist.group.WORLD if self.gather_across_devices and dist.is_initialized() else None
        columns = _computed(columns)
        loss: Any = info_nce(
            columns[0],
            columns[1] if len(columns) == 2 else torch.cat(tuple(columns[1:])),
            temperature=1 / self.scale,
            # Matryoshka's prefixes are normalised, whatever compares them.
            similarity=_similarity(self.similarity_fct) if self.prefixes is None else "cosine",
            directions=tuple(dict.fromkeys(self.directions)),
            partition_mode=self.partition_mode,
            hardness_mode=self.hardness_mode,
            hardness_strength=self.hardness_strength,
            group=group,
            **self._options(),
        )
        if group is None:
            return loss
        # theirs is each rank's mean over its own rows: summed over ranks, world_size times the mean of all
        return loss + (dist.get_world_size(group) - 1) * (loss - loss.detach())


class MultipleNegativesRankingLoss(_Ranking, theirs.MultipleNegativesRankingLoss):
    """sentence-transformers' loss without its score matrices; its documentation holds.

    A `similarity_fct` other than `util.cos_sim` and `util.dot_score` runs their own code, in float32.
    """

    def compute_loss_from_embeddings(self, embeddings: list[Tensor], labels: Tensor) -> Tensor:
        if len(embeddings) >= 2 and self.is_served():
            return self._ranking(embeddings)
        device = embeddings[0].device.type if embeddings else "cpu"
        with torch.autocast(device, enabled=False):
            return super().compute_loss_from_embeddings([_wide(x) for x in embeddings], labels)


class CachedMultipleNegativesRankingLoss(_Ranking, theirs.CachedMultipleNegativesRankingLoss):
    """sentence-transformers' gradient cache with `info_nce` for its loss stage, see MultipleNegativesRankingLoss."""

    def calculate_loss(
        self, reps: list[list[Tensor]], labels: Tensor | None = None, *, with_backward: bool = False
    ) -> Tensor:
        if self.is_served():
            return _finish(self._ranking([torch.cat(parts) for parts in reps]), with_backward)
        with torch.autocast(reps[0][0].device.type, enabled=False):
            wide = [[_wide(x) for x in parts] for parts in reps]
            return super().calculate_loss(wide, labels, with_backward=with_backward)


class _Guided(_OnInfoNCE):
    def is_served(self: Any) -> bool:
        # Theirs compares each text with itself as well. A margin < 0 lets that pair stay; info_nce never has it.
        return isinstance(self.similarity_fct, nn.CosineSimilarity) and self.margin >= 0

    def _guided(self: Any, columns: Sequence[Tensor], guides: Sequence[Tensor]) -> Tensor:
        """Only documents are gathered, as theirs: a rank's anchors meet no other rank's."""
        anchors, *documents = _computed(columns)
        guide_anchors, *guide_documents = guides
        targets = None
        if self.gather_across_devices:
            documents = [all_gather_with_grad(x) for x in documents]
            guide_documents = [all_gather(x) for x in guide_documents]
            targets = torch.arange(len(anchors), device=anchors.device) + get_rank() * len(anchors)

        def rows(count: int, directions: Sequence[str], **options: Any) -> Any:
            """Of the first `count` columns of documents."""
            return info_nce(
                anchors, torch.cat(documents[:count]), targets=targets, temperature=self.temperature,
                directions=("query_to_doc", *directions), guide_queries=guide_anchors,
                guide_documents=torch.cat(guide_documents[:count]), margin=self.margin,
                margin_strategy=self.margin_strategy, **options,
            )  # fmt: skip

        between_anchors = ["query_to_query"] if self.contrast_anchors else []
        between_positives = ["doc_to_doc"] if self.contrast_positives else []
        if len(documents) == 1 or not between_positives:
            return rows(len(documents), between_anchors + between_positives, **self._options())
        # The positives meet positives alone, but doc_to_doc is against all documents. It joins the softmax of the rest
        # by the denominators, each over its positive's exponential: rest + (one column + doc_to_doc) - one column.
        loss = torch.zeros((), device=anchors.device)
        for dim, factor in zip(*(self.prefixes or ([anchors.shape[1]], [1.0])), strict=True):
            options = {"matryoshka_dims": [dim], "reduction": "none"}
            rest = rows(len(documents), between_anchors, **options)
            both, one = rows(1, between_positives, **options), rows(1, (), **options)
            top = torch.maximum(rest, both).detach()
            of_rows = top + ((rest - top).exp() + (both - top).exp() - (one - top).exp()).log()
            loss = loss + factor * of_rows.mean()
        return loss


class GISTEmbedLoss(_Guided, theirs.GISTEmbedLoss):
    """sentence-transformers' loss without its score matrices; its documentation holds.

    A text is never compared with itself: theirs does where the guide finds the pair no more similar than the positive.
    """

    def forward(self, sentence_features: Iterable[Features], labels: Tensor) -> Tensor:
        features = list(sentence_features)
        if not self.is_served():
            return super().forward(features, labels)
        if len(features) not in (2, 3):
            raise ValueError(f"Expected 2 or 3 embeddings, got {len(features)}")
        for_guide = [dict(each) for each in features]  # models write their outputs into what they are given
        embeddings = embed_columns(self.model, features)
        with torch.no_grad():
            if self.must_retokenize:
                for_guide = [self._retokenized(each) for each in features]
            guides = embed_columns(self.guide, for_guide)
        return self._guided(embeddings, guides)

    def _retokenized(self, features: Features) -> Features:
        ids = features["input_ids"]
        if "cu_seq_lens_q" in features:
            ids = ids[0].tensor_split(features["cu_seq_lens_q"][1:-1].cpu().long())
        texts = self.tokenizer.batch_decode(ids, skip_special_tokens=True)
        return batch_to_device(self.guide.preprocess(texts), self.guide.device)


class CachedGISTEmbedLoss(_Guided, theirs.CachedGISTEmbedLoss):
    """sentence-transformers' gradient cache with `info_nce` for its loss stage, see GISTEmbedLoss."""

    def calculate_loss(
        self, reps: list[list[Tensor]], reps_guided: list[list[Tensor]], *, with_backward: bool = False
    ) -> Tensor:
        if not self.is_served():
            return super().calculate_loss(reps, reps_guided, with_backward=with_backward)
        if len(reps) != len(reps_guided):
            raise ValueError(f"reps and reps_guided must be as many, got {len(reps)} and {len(reps_guided)}")
        columns, guides = ([torch.cat(parts) for parts in each] for each in (reps, reps_guided))
        return _finish(self._guided(columns, guides), with_backward)


class MatryoshkaLoss(theirs.MatryoshkaLoss):
    """sentence-transformers' wrapper for any loss; this module's run all prefixes in one call of `info_nce`."""

    def forward(self, sentence_features: Iterable[Features], labels: Tensor) -> Tensor:
        if not (isinstance(self.loss, _OnInfoNCE) and self.loss.is_served()):
            return super().forward(sentence_features, labels)
        chosen: Sequence[int] = range(len(self.matryoshka_dims))
        if 0 < self.n_dims_per_step < len(chosen):
            chosen = random.sample(chosen, self.n_dims_per_step)
        dims, weights = [self.matryoshka_dims[i] for i in chosen], [self.matryoshka_weights[i] for i in chosen]
        with _prefixes(self.loss, dims, weights):
            return self.loss(sentence_features, labels)


@contextmanager
def _prefixes(loss: Any, dims: Sequence[int], weights: Sequence[float]) -> Iterator[None]:
    decorated = vars(loss).pop("calculate_loss", None)  # theirs, one call for each prefix
    loss.prefixes = dims, weights
    try:
        yield
    finally:
        loss.prefixes = None
        if decorated is not None:
            loss.calculate_loss = decorated
