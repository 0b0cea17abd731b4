"""sentence-transformers packs its text inputs itself, for attention whose name says flash; here for embedkern's too."""

from __future__ import annotations

import sys
from functools import wraps
from importlib.abc import MetaPathFinder
from importlib.machinery import ModuleSpec, PathFinder
from types import ModuleType
from typing import Any

from torch import nn
from transformers import PreTrainedModel

from .families import family_of
from .interface import NAME

MODULE = "sentence_transformers.base.modules.transformer"
PACKED = frozenset({"cu_seq_lens_q", "cu_seq_lens_k", "max_length_q", "max_length_k", "seq_idx"})


def _hands_on(model: nn.Module) -> bool:
    """Whether cu_seq_lens_q is known to arrive at every attention: a model that drops it would mix the texts."""
    families = [family_of(module) for module in model.modules() if isinstance(module, PreTrainedModel)]
    known = [family for family in families if family is not None]
    return bool(known) and all(family.tokens and family.hands_on for family in known)


def hook(module: ModuleType) -> None:
    """Make `Transformer._can_flatten_inputs` say yes for our implementation where it would for flash attention."""
    original = module.Transformer._can_flatten_inputs

    @wraps(original)
    def can_flatten_inputs(self: Any) -> bool:
        if getattr(self.config, "_attn_implementation", None) != NAME:
            return original(self)
        methods = [params["method"] for params in self.modality_config.values()]
        if (
            self.transformer_task not in ("feature-extraction", "fill-mask")
            or "text" not in self.modality_config
            or self.backend != "torch"
            or any(method != "forward" for method in methods)
            or not getattr(self.model, "is_backend_compatible", lambda: False)()
            or not _hands_on(self.model)
        ):
            return False
        from transformers import DataCollatorWithFlattening

        self.data_collator = DataCollatorWithFlattening(
            return_position_ids=True, return_seq_idx=True, return_flash_attn_kwargs=True
        )
        if self.model_forward_params is not None:  # names that forward takes: these travel in its **kwargs
            self.model_forward_params |= PACKED
        self._flatten_position_offset = self._infer_flatten_position_offset()  # RoBERTa's positions begin later
        return True

    module.Transformer._can_flatten_inputs = can_flatten_inputs


class _AfterImport(MetaPathFinder):
    """Hooks the module when it is imported: importing it from here would cost every user seconds."""

    def find_spec(self, name: str, path: Any = None, target: Any = None) -> ModuleSpec | None:
        if name != MODULE:
            return None
        sys.meta_path.remove(self)
        spec = PathFinder.find_spec(name, path, target)
        if spec is not None and spec.loader is not None:
            run = spec.loader.exec_module

            def exec_module(module: ModuleType) -> None:
                run(module)
                hook(module)

            spec.loader.exec_module = exec_module  # type: ignore[method-assign]
        return spec


def install() -> None:
    if MODULE in sys.modules:
        hook(sys.modules[MODULE])
    else:
        sys.meta_path.insert(0, _AfterImport())
