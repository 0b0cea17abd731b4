"""luyug/GradCache's decorators, and the state that a second run of a model needs to equal the first."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator
from contextlib import ExitStack, contextmanager
from functools import wraps
from itertools import chain
from typing import Any

import torch
from torch import Tensor, nn
from torch import distributed as dist

from .gradcache_chunks import tensors

RngState = list[tuple[torch.device, Tensor]]
AutocastState = list[tuple[str, bool, torch.dtype, bool]]


def cached(func: Callable[..., Any]) -> Callable[..., tuple[Any, ...]]:
    """Make a function that embeds a small batch into one whose differentiation is put off.

    ``leaf, replay = cached(embed)(…)``: ``leaf`` (rows, …) is the representation, a leaf that needs a gradient; compute
    the loss on many of them, call its ``backward()``, then ``replay(leaf)`` for each: it runs ``embed`` again with the
    same random numbers and autocast, and accumulates the parameters' gradients. A function that returns several tensors
    gives as many leaves; ``replay`` takes them in one tuple.
    """

    @wraps(func)
    def run(*args: Any, **kwargs: Any) -> tuple[Any, ...]:
        inside = [p for m in chain(args, kwargs.values()) if isinstance(m, nn.Module) for p in m.parameters()]
        devices = accelerators(chain(inside, tensors([args, kwargs])))
        rng, state = get_rng(devices), autocast_state(devices[0].type if devices else "cpu")
        torch.clear_autocast_cache()
        with torch.no_grad():
            out = func(*args, **kwargs)
        torch.clear_autocast_cache()
        leaves = tuple(t.detach().requires_grad_() for t in _tuple(out))

        @wraps(func)
        def replay(leaf: Tensor | tuple[Tensor, ...]) -> None:
            with rng_kept(devices), torch.enable_grad(), autocast(state):
                set_rng(rng)
                reps = _tuple(func(*args, **kwargs))
            both = zip(reps, _tuple(leaf), strict=True)
            pairs = [(rep, v.grad) for rep, v in both if v.grad is not None and rep.requires_grad]
            if pairs:
                torch.autograd.backward([rep for rep, _ in pairs], [grad for _, grad in pairs])

        return *leaves, replay

    return run


def cat_input_tensor(func: Callable[..., Any]) -> Callable[..., Any]:
    """Make a loss take lists of tensors: each list among the arguments is concatenated along dim 0."""

    def cat(x: Any) -> Any:
        return torch.cat(x) if isinstance(x, list) and x and all(isinstance(t, Tensor) for t in x) else x

    @wraps(func)
    def run(*args: Any, **kwargs: Any) -> Any:
        return func(*map(cat, args), **{k: cat(v) for k, v in kwargs.items()})

    return run


def gather_input_tensor(func: Callable[..., Any], axis: int = 0) -> Callable[..., Any]:
    """Make a loss see all ranks: each tensor argument becomes the ranks' tensors concatenated along ``axis``.

    As luyug's: equal shapes on all ranks, and gradients flow to the own rank's part only. With each rank computing the
    loss of the whole batch, the sum over ranks is that of the full loss; DDP averages, so multiply by the world size.
    """

    def gather(x: Any) -> Any:
        if not isinstance(x, Tensor):
            return x
        parts = [torch.empty_like(x) for _ in range(dist.get_world_size())]
        dist.all_gather(parts, x.detach().contiguous())
        parts[dist.get_rank()] = x
        return torch.cat(parts, dim=axis)

    @wraps(func)
    def run(*args: Any, **kwargs: Any) -> Any:
        return func(*map(gather, args), **{k: gather(v) for k, v in kwargs.items()})

    return run


def _tuple(x: Any) -> tuple[Tensor, ...]:
    reps = (x,) if isinstance(x, Tensor) else tuple(x)
    if not all(isinstance(t, Tensor) for t in reps):
        raise TypeError(f"func: wanted it to return tensors, got {[type(t).__name__ for t in reps]}")
    return reps


# ---- state


def accelerators(used: Iterable[Tensor]) -> list[torch.device]:
    return sorted({t.device for t in used if t.device.type not in ("cpu", "meta")}, key=str)


def get_rng(devices: Iterable[torch.device]) -> RngState:
    state = [(torch.device("cpu"), torch.get_rng_state())]
    return state + [(d, torch.get_device_module(d).get_rng_state(*_which(d))) for d in devices]


def set_rng(state: RngState) -> None:
    for device, value in state:
        module = torch if device.type == "cpu" else torch.get_device_module(device)
        module.set_rng_state(value, *_which(device))


def _which(device: torch.device) -> tuple[torch.device, ...]:
    return () if device.type in ("cpu", "mps") else (device,)  # there is one generator: no argument


@contextmanager
def rng_kept(devices: Iterable[torch.device]) -> Iterator[None]:
    state = get_rng(devices)
    try:
        yield
    finally:
        set_rng(state)


def autocast_state(device_type: str) -> AutocastState:
    """(device type, enabled, dtype, weights cached) for the CPU and the device."""
    return [
        (kind, torch.is_autocast_enabled(kind), torch.get_autocast_dtype(kind), torch.is_autocast_cache_enabled())
        for kind in sorted({"cpu", device_type})
        if torch.amp.is_autocast_available(kind)
    ]


@contextmanager
def autocast(state: AutocastState, enabled: bool = True) -> Iterator[None]:
    with ExitStack() as stack:
        for kind, was_enabled, dtype, cache in state:
            stack.enter_context(torch.autocast(kind, dtype, was_enabled and enabled, cache))
        yield
