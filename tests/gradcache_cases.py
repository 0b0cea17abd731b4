"""Towers, batches and the comparison of gradients, for the tests of gradient caching."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint


class Encoder(nn.Module):
    """A transformer layer and a masked mean, in a nested output."""

    def __init__(self, positions: bool = False, dropout: float = 0.2, dtype: torch.dtype = torch.float64) -> None:
        super().__init__()
        self.embed = nn.Embedding(50, 8, dtype=dtype)
        if positions:
            self.position_embeddings = nn.Embedding(32, 8, dtype=dtype)
        self.layer = nn.TransformerEncoderLayer(8, 2, 16, dropout=dropout, batch_first=True, dtype=dtype)
        self.positions, self.checkpointed = positions, ""
        self.runs: list[tuple[int, ...]] = []

    def forward(self, input_ids: Tensor, attention_mask: Tensor, position_ids: Tensor | None = None) -> Any:
        self.runs.append(tuple(input_ids.shape))
        x = self.embed(input_ids)
        if self.positions:
            columns = torch.arange(input_ids.shape[1]).expand_as(input_ids)
            x = x + self.position_embeddings(columns if position_ids is None else position_ids)
        hide = attention_mask == 0
        if self.checkpointed:
            x = checkpoint(self.layer, x, None, hide, use_reentrant=self.checkpointed == "reentrant")
        else:
            x = self.layer(x, src_key_padding_mask=hide)
        mask = attention_mask.unsqueeze(-1).to(x.dtype)
        return {"tokens": x, "pooled": ((x * mask).sum(1) / mask.sum(1).clamp(min=1),)}


class Mlp(nn.Module):
    def __init__(self, dtype: torch.dtype = torch.float64, dropout: float = 0.3, width: int = 16) -> None:
        super().__init__()
        self.layers = nn.Sequential(
            nn.Linear(6, width), nn.GELU(), nn.Dropout(dropout), nn.Linear(width, 16), nn.Tanh(), nn.Linear(16, 5)
        ).to(dtype)
        self.runs = 0

    def forward(self, x: Tensor, scale: Tensor | float = 1.0) -> Tensor:
        self.runs += 1
        return self.layers(x) * scale


def pooled(out: Any) -> Tensor:
    return out["pooled"][0]


def contrastive(queries: Tensor, documents: Tensor, scale: float = 2.0) -> Tensor:
    scores = scale * queries @ documents.T
    return nn.functional.cross_entropy(scores, torch.arange(len(queries)))


def texts(lengths: list[int], side: str = "right", seed: int = 0) -> dict[str, Tensor]:
    generator = torch.Generator().manual_seed(seed)
    width = max(lengths) + 1  # one column that nobody needs
    ids = torch.randint(1, 50, (len(lengths), width), generator=generator)
    column = torch.arange(width)
    real = torch.tensor(lengths).unsqueeze(1)
    mask = column < real if side == "right" else column >= width - real
    return {"input_ids": ids * mask, "attention_mask": mask.long()}


def rows(n: int, seed: int = 0, dtype: torch.dtype = torch.float64) -> Tensor:
    return torch.randn(n, 6, generator=torch.Generator().manual_seed(seed), dtype=torch.float64).to(dtype)


def gradients(*modules: nn.Module) -> list[Tensor]:
    grads = [p.grad.clone() for m in modules for p in m.parameters() if p.grad is not None]
    for module in modules:
        module.zero_grad()
    return grads


def assert_same(got: list[Tensor], want: list[Tensor], tol: float = 1e-10) -> None:
    assert len(got) == len(want)
    assert want
    for g, w in zip(got, want, strict=True):
        torch.testing.assert_close(g, w, atol=tol, rtol=tol)


def one_graph(model: nn.Module, batch: Any, size: int | None, tokens: int | None = None, sort: bool = True) -> Tensor:
    """The representations of the same chunks in one graph: a second, naive way of cutting them."""
    n = len(batch) if isinstance(batch, Tensor) else len(batch["input_ids"])
    mask = None if isinstance(batch, Tensor) else batch["attention_mask"]
    lengths = [batch.shape[1]] * n if mask is None else mask.sum(1).tolist()
    order = sorted(range(n), key=lambda row: (-lengths[row], row)) if sort else list(range(n))
    chunks: list[list[int]] = [[]]
    for row in order:
        too_long = tokens is not None and sum(lengths[r] for r in [*chunks[-1], row]) > tokens
        if chunks[-1] and (len(chunks[-1]) == size or too_long):
            chunks.append([])
        chunks[-1].append(row)
    reps: list[Any] = [None] * n
    for chunk in chunks:
        if mask is None:
            out = model(batch[chunk])
        else:
            used = mask[chunk].any(0).nonzero().flatten().tolist() or [0]
            out = pooled(model(**{k: v[chunk][:, used[0] : used[-1] + 1] for k, v in batch.items()}))
        for row, rep in zip(chunk, out, strict=True):
            reps[row] = rep
    return torch.stack(reps)
