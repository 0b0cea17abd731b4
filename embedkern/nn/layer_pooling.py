"""Pooling over a model's layers: mixes, joined or chosen layers, and hooks that pool each layer as it is produced."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from functools import wraps
from typing import Any

import torch
from torch import Tensor, nn

from ..ops.pooling import pool


class PoolsLayers(nn.Module):
    """What modules over the layers of one forward pass share: `forward` and `collect`."""

    token_pooling: str
    num_layers: int

    def wanted(self) -> Sequence[int]:
        """The layers that are pooled, of 0 … num_layers − 1."""
        return range(self.num_layers)

    def embed(self, pooled: list[Tensor], empty: Tensor) -> Any:
        """The result, of each wanted layer's (B, C) and which sequences have nothing to pool (B,)."""
        raise NotImplementedError

    def forward(
        self,
        hidden_states: Sequence[Tensor],
        *,
        lengths: Tensor | None = None,
        mask: Tensor | None = None,
        cu_seqlens: Tensor | None = None,
        skip: int | Tensor | None = None,
    ) -> Any:
        layers = drop_embeddings(hidden_states, self.num_layers)
        places = {"lengths": lengths, "mask": mask, "cu_seqlens": cu_seqlens, "skip": skip}
        pooled = [pool(layers[i], self.token_pooling, **places) for i in self.wanted()]  # type: ignore[arg-type]
        return self.embed(pooled, nothing_to_pool(layers[0], places))

    @contextmanager
    def collect(
        self,
        model: nn.Module,
        *,
        lengths: Tensor | None = None,
        mask: Tensor | None = None,
        cu_seqlens: Tensor | None = None,
        skip: int | Tensor | None = None,
    ) -> Iterator[Collected]:
        """While `with pooling.collect(model, mask=mask) as collected:` runs the model, its layers are pooled by hooks.

        Hidden states are neither kept nor stacked. `collected.embedding` is what `forward` gives of the model's
        hidden_states[1:], the last one after its final norm; of several runs, the last one counts.

        Raises:
            ValueError: the model has another number of layers.
            NotImplementedError: no list of layers was found, or several.
        """
        encoder, layers = find_layers(model)
        if len(layers) != self.num_layers:
            raise ValueError(f"model must have num_layers = {self.num_layers} layers, got {len(layers)}")
        collected = Collected(self, {"lengths": lengths, "mask": mask, "cu_seqlens": cu_seqlens, "skip": skip})
        last = self.num_layers - 1
        handles = [layers[i].register_forward_hook(collected.hook(i)) for i in self.wanted() if i != last]
        # The encoder's own result stands for the last layer: it is after the final norm. sentence-transformers calls
        # `forward` itself, past a hook.
        own = vars(encoder).get("forward")
        vars(encoder)["forward"] = collected.around(encoder.forward, last)
        try:
            yield collected
        finally:
            for handle in handles:
                handle.remove()
            if own is None:
                del vars(encoder)["forward"]
            else:
                vars(encoder)["forward"] = own


class Collected:
    """The pooled layers of a model's last forward pass inside `collect`."""

    def __init__(self, module: PoolsLayers, places: dict[str, Any]) -> None:
        self.module, self.places = module, places
        self.pooled: dict[int, Tensor] = {}
        self.empty: Tensor | None = None

    @property
    def embedding(self) -> Any:
        missing = [i for i in self.module.wanted() if i not in self.pooled]
        if missing or self.empty is None:
            raise RuntimeError(f"the model hasn't run inside collect: nothing of layers {missing}")
        return self.module.embed([self.pooled[i] for i in self.module.wanted()], self.empty)

    def hook(self, i: int) -> Callable[..., None]:
        def pool_layer(layer: nn.Module, inputs: Any, output: Any) -> None:
            self.add(i, output if isinstance(output, Tensor) else output[0])

        return pool_layer

    def around(self, forward: Callable[..., Any], last: int) -> Callable[..., Any]:
        @wraps(forward)
        def pool_last(*args: Any, **kwargs: Any) -> Any:
            self.pooled, self.empty = {}, None
            output = forward(*args, **kwargs)
            hidden = getattr(output, "last_hidden_state", None)
            self.add(last, output if isinstance(output, Tensor) else output[0] if hidden is None else hidden)
            return output

        return pool_last

    def add(self, i: int, hidden: Tensor) -> None:
        hidden, places = self.packed(hidden)
        if i in self.module.wanted():
            self.pooled[i] = pool(hidden, self.module.token_pooling, **places)
        if i == self.module.num_layers - 1:
            self.empty = nothing_to_pool(hidden, places)

    def packed(self, hidden: Tensor) -> tuple[Tensor, dict[str, Any]]:
        """Layers of an unpadded model are (1, T, C), whatever the layout of its inputs."""
        lengths, mask, cu_seqlens, skip = self.places.values()
        if mask is not None and mask.shape != hidden.shape[:2]:
            lengths = (mask != 0).sum(1)
        elif lengths is None or lengths.shape[0] == hidden.shape[0]:
            flat = cu_seqlens is not None and hidden.ndim == 3 and hidden.shape[0] == 1
            return (hidden[0] if flat else hidden), self.places
        if hidden.shape[0] != 1:
            return hidden, self.places  # pool's checks say what is wrong
        cu_seqlens = nn.functional.pad(lengths.cumsum(0), (1, 0))
        return hidden[0], {"lengths": None, "mask": None, "cu_seqlens": cu_seqlens, "skip": skip}


def nothing_to_pool(hidden: Tensor, places: dict[str, Any]) -> Tensor:
    """(B,) bool"""
    return pool(hidden.new_ones(*hidden.shape[:-1], 1), "cls", **places)[:, 0] == 0


def drop_embeddings(hidden_states: Sequence[Tensor], num_layers: int) -> Sequence[Tensor]:
    """The layers' outputs, of as many tensors or one more: the first, the embeddings, is dropped."""
    if len(hidden_states) not in (num_layers, num_layers + 1):
        raise ValueError(f"hidden_states must be {num_layers} tensors, or one more, got {len(hidden_states)}")
    return hidden_states[len(hidden_states) - num_layers :]


def find_layers(model: nn.Module) -> tuple[nn.Module, nn.ModuleList]:
    """The list of a model's layers, and the module whose result follows the last one's (and the final norm)."""
    found: list[tuple[nn.Module, nn.ModuleList]] = []

    def visit(module: nn.Module, encoder: nn.Module | None, wanted: int | None) -> None:
        if hasattr(module, "base_model_prefix"):  # a transformers model: its result is known, its parts' are not
            encoder = module
            wanted = getattr(module.config, "num_hidden_layers", None)
        for child in module.children():
            if not isinstance(child, nn.ModuleList):
                visit(child, encoder, wanted)
            elif len(child) and wanted in (None, len(child)):
                found.append((module if encoder is None else encoder, child))

    visit(model, None, None)
    if len(found) != 1:
        name = type(model).__name__
        raise NotImplementedError(f"{name}: found {len(found)} lists of layers, and collect can serve only one")
    return found[0]


class LayerPooling(PoolsLayers):
    """Embeddings of chosen layers from one forward pass: joined, averaged, or each with several prefixes.

    Args:
        num_layers: of the model.
        layers: how many of the last layers, or which ones (0 is the first layer's output, −1 the last).
        combine: "concat" or "mean" of the layers' pooled tokens (Distilled Sentence Embedding, Barkan et al. 2020), or
            None: a dict from (layer, dim) to (B, dim) (2-D Matryoshka, Li et al. 2024).
        token_pooling: a mode of `embedkern.pool`.
        dims: the prefixes; without `combine`, by default the whole width; with it at most one.
        normalize: divide by max(‖x‖₂, eps), each prefix by its own norm.

    forward(hidden_states, *, lengths | mask | cu_seqlens, skip) takes num_layers tensors, or one more.
    """

    def __init__(
        self,
        num_layers: int,
        layers: int | Sequence[int] = 4,
        *,
        combine: str | None = "concat",
        token_pooling: str = "mean",
        dims: Sequence[int] | None = None,
        normalize: bool = False,
        eps: float = 1e-12,
    ) -> None:
        super().__init__()
        chosen = range(-layers, 0) if isinstance(layers, int) else layers
        self.layers = [i + num_layers if i < 0 else i for i in chosen]
        if not self.layers or not all(0 <= i < num_layers for i in self.layers):
            raise ValueError(f"layers must be in a model's {num_layers}, got {layers!r}")
        if combine not in ("concat", "mean", None):
            raise ValueError(f"combine must be 'concat', 'mean' or None, got {combine!r}")
        if dims is not None and (not len(dims) or min(dims) < 1 or (combine is not None and len(dims) > 1)):
            raise ValueError(f"dims must be numbers ≥ 1, one of them if layers are combined, got {dims!r}")
        self.num_layers, self.combine, self.token_pooling = num_layers, combine, token_pooling
        self.dims, self.normalize, self.eps = dims, normalize, eps
        pool(torch.zeros(1, 1, 1), token_pooling, eps=eps)  # bad options

    def wanted(self) -> Sequence[int]:
        return self.layers

    def embed(self, pooled: list[Tensor], empty: Tensor) -> Tensor | dict[tuple[int, int], Tensor]:
        if self.combine is not None:
            whole = torch.cat(pooled, 1) if self.combine == "concat" else torch.stack(pooled).mean(0)
            return self._prefix(whole, self.dims[0] if self.dims else whole.shape[1])
        return {
            (layer, dim): self._prefix(x, dim)
            for layer, x in zip(self.layers, pooled, strict=True)
            for dim in self.dims or (x.shape[1],)
        }

    def _prefix(self, x: Tensor, dim: int) -> Tensor:
        return pool(x[:, None], "sum", truncate_dim=dim, normalize=self.normalize, eps=self.eps)

    def extra_repr(self) -> str:
        return (
            f"num_layers={self.num_layers}, layers={self.layers}, combine={self.combine!r}, "
            f"token_pooling={self.token_pooling!r}, dims={self.dims}, normalize={self.normalize}, eps={self.eps}"
        )


class ScalarMix(nn.Module):
    """γ · Σ softmax(weights)ᵢ · layerᵢ (ELMo, Peters et al. 2018), token by token: (…, C) of num_layers (…, C).

    forward(hidden_states) takes num_layers tensors, or one more: the first, the embeddings, is dropped.
    """

    def __init__(self, num_layers: int) -> None:
        super().__init__()
        if num_layers < 1:
            raise ValueError(f"num_layers must be ≥ 1, got {num_layers}")
        self.num_layers = num_layers
        self.weights = nn.Parameter(torch.zeros(num_layers))
        self.gamma = nn.Parameter(torch.ones(1))

    def forward(self, hidden_states: Sequence[Tensor]) -> Tensor:
        layers = drop_embeddings(hidden_states, self.num_layers)
        factors = (self.gamma * self.weights.softmax(0)).unbind()
        mix = factors[0] * layers[0]
        for factor, layer in zip(factors[1:], layers[1:], strict=True):  # no stack of all layers
            mix = mix + factor * layer
        return mix.to(layers[0].dtype)

    def extra_repr(self) -> str:
        return f"num_layers={self.num_layers}"
