"""explain: which backend a call would get, and why not the others."""

from __future__ import annotations

import inspect
from typing import Any

from .. import dispatch
from ..dispatch import Explanation
from . import attention, attention_check, infonce, latent_pooling, pooling

FAMILIES: dict[str, tuple[Any, Any, Any]] = {
    "attention": (attention.attention, attention_check.check, attention.BACKENDS),
    "attention_varlen": (attention.attention_varlen, attention_check.check_varlen, attention.BACKENDS),
    "info_nce": (infonce.info_nce, infonce.check, infonce.BACKENDS),
    "latent_attention": (latent_pooling.latent_attention, latent_pooling.check, latent_pooling.BACKENDS),
    "multi_layer_attention": (
        latent_pooling.multi_layer_attention,
        latent_pooling.check_multi_layer,
        latent_pooling.MULTI_LAYER_BACKENDS,
    ),
    "pool": (pooling.pool, pooling.check, pooling.BACKENDS),
}


def explain(name: str, *args: Any, **kwargs: Any) -> Explanation:
    """Which backend would run `embedkern.<name>(*args, **kwargs)`, and for each other one the reasons why not.

    Returns (choice, refused): a backend's name ("none" if the backend asked for is not able), and a dict from each
    other backend's name to its list of reasons.
    """
    if name not in FAMILIES:
        raise ValueError(f"name must be one of {tuple(FAMILIES)}, got {name!r}")
    function, check, backends = FAMILIES[name]
    bound = inspect.signature(function).bind(*args, **kwargs)
    bound.apply_defaults()
    wanted = bound.arguments.pop("backend")
    return dispatch.explain(backends, wanted, check(**bound.arguments))
