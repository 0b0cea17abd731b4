"""sentence-transformers modules: its Pooling on `embedkern.pool`, and trainable poolings."""

from __future__ import annotations

from typing import Any

import torch
from sentence_transformers.base.modules.module import Module
from sentence_transformers.sentence_transformer import modules as theirs
from torch import Tensor

from .. import nn
from ..ops.pooling import pool

Features = dict[str, Any]

__all__ = ["LatentAttentionPooling", "MultiLayerPooling", "Pooling"]


def _tokens(hidden: Tensor, features: Features) -> tuple[Tensor, dict[str, Any]]:
    """Hidden states as embedkern takes them, and which of them are real."""
    if "cu_seq_lens_q" in features:
        return hidden.reshape(-1, hidden.shape[-1]), {"cu_seqlens": features["cu_seq_lens_q"]}  # (1, T, C)
    mask = features.get("attention_mask")
    if mask is None or mask.shape[-1] != hidden.shape[1]:
        return hidden, {}
    return hidden, {"mask": mask if not mask.is_floating_point() else mask != 0}


class Pooling(theirs.Pooling):
    """sentence-transformers' Pooling in one pass; padding is never read, and with nothing to pool it gives zeros.

    Saved as theirs: plain sentence-transformers loads it. Their code still runs where other modules give
    `token_weights_sum` or `cls_token_embeddings`, and under tracing (ONNX).
    """

    __module__ = theirs.Pooling.__module__  # what modules.json names

    def __reduce__(self) -> Any:  # pickle would look the class up there, too
        return _new_pooling, (), self.__dict__.copy()

    def __reduce_ex__(self, protocol: Any) -> Any:
        return self.__reduce__()

    def forward(self, features: Features, **kwargs: Any) -> Features:
        weighted = "token_weights_sum" in features or "cls_token_embeddings" in features
        if weighted or torch.jit.is_tracing():
            return super().forward(features, **kwargs)
        skip = None
        if not self.include_prompt and "prompt_length" in features:
            skip = features["prompt_length"]  # one number for all, an int or a tensor of any length
            skip = int(skip[0] if isinstance(skip, Tensor) else skip)
        hidden, real = _tokens(features["token_embeddings"], features)
        features["sentence_embedding"] = pool(hidden, self.pooling_mode, skip=skip, **real)
        return features


def _new_pooling() -> Pooling:
    return Pooling.__new__(Pooling)


class _Trained(Module):
    """A module of embedkern.nn, `pooling`, and the arguments it was made with."""

    def __init__(self, pooling: torch.nn.Module, arguments: dict[str, Any]) -> None:
        super().__init__()
        self.pooling = pooling
        self.arguments = arguments

    def get_config_dict(self) -> dict[str, Any]:
        return dict(self.arguments)

    def get_embedding_dimension(self) -> int:
        return self.arguments["hidden_size"]

    def save(self, output_path: str, *args: Any, safe_serialization: bool = True, **kwargs: Any) -> None:
        self.save_config(output_path)
        self.save_torch_weights(output_path, safe_serialization=safe_serialization)

    @classmethod
    def load(cls, model_name_or_path: str, subfolder: str = "", token: bool | str | None = None,
             cache_folder: str | None = None, revision: str | None = None, local_files_only: bool = False,
             init_defaults: dict[str, Any] | None = None, **kwargs: Any) -> Any:  # fmt: skip
        where: Any = {"subfolder": subfolder, "token": token, "cache_folder": cache_folder, "revision": revision,
                 "local_files_only": local_files_only}  # fmt: skip
        module: Any = cls(**{**(init_defaults or {}), **cls.load_config(model_name_or_path, **where)})
        return cls.load_torch_weights(model_name_or_path, model=module, **where)


class LatentAttentionPooling(_Trained):
    """`embedkern.nn.LatentAttentionPooling` (NV-Embed) of `token_embeddings`; writes `sentence_embedding`."""

    def __init__(
        self,
        hidden_size: int = 4096,
        num_latents: int = 512,
        num_heads: int = 8,
        head_dim: int = 4096,
        ff_mult: int = 4,
        normalize: bool = True,
    ) -> None:
        arguments: Any = {"hidden_size": hidden_size, "num_latents": num_latents, "num_heads": num_heads,
                     "head_dim": head_dim, "ff_mult": ff_mult, "normalize": normalize}  # fmt: skip
        super().__init__(nn.LatentAttentionPooling(**arguments), arguments)

    def forward(self, features: Features, **kwargs: Any) -> Features:
        hidden, real = _tokens(features["token_embeddings"], features)
        features["sentence_embedding"] = self.pooling(hidden, **real)
        return features


class MultiLayerPooling(_Trained):
    """`embedkern.nn.MultiLayerPooling` of the last num_layers of `all_layer_embeddings`; writes `sentence_embedding`.

    The model must give its hidden states: `config_kwargs={"output_hidden_states": True}`.
    """

    def __init__(
        self,
        num_layers: int = 32,
        hidden_size: int = 4096,
        num_latents: int = 768,
        num_heads: int = 32,
        head_dim: int = 2048,
        ff_mult: int = 4,
        token_pooling: str = "mean",
        normalize: bool = True,
    ) -> None:
        arguments: Any = {"num_layers": num_layers, "hidden_size": hidden_size, "num_latents": num_latents,
                     "num_heads": num_heads, "head_dim": head_dim, "ff_mult": ff_mult,
                     "token_pooling": token_pooling, "normalize": normalize}  # fmt: skip
        super().__init__(nn.MultiLayerPooling(**arguments), arguments)

    def forward(self, features: Features, **kwargs: Any) -> Features:
        layers, wanted = features.get("all_layer_embeddings"), self.arguments["num_layers"]
        if layers is None or len(layers) < wanted:
            got = "none" if layers is None else len(layers)
            raise ValueError(
                f"all_layer_embeddings must hold num_layers = {wanted} tensors, got {got}: load the transformer with "
                'config_kwargs={"output_hidden_states": True}'
            )
        tokens = [_tokens(layer, features) for layer in layers[-wanted:]]
        features["sentence_embedding"] = self.pooling([hidden for hidden, _ in tokens], **tokens[0][1])
        return features
