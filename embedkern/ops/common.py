"""What the families share: checks of single arguments, and the end of double differentiation."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from typing import Any

import torch
from torch import Tensor

INTEGERS = (torch.int32, torch.int64)


def check_tensor(name: str, x: object, rank: int | tuple[int, ...], what: str) -> None:
    """`what` names the wanted shape, as in "(B, L, C)"."""
    if not isinstance(x, Tensor):
        raise TypeError(f"{name} must be a tensor {what}, got {type(x).__name__}")
    ranks = rank if isinstance(rank, tuple) else (rank,)
    if x.ndim not in ranks:
        raise ValueError(f"{name} must have shape {what}, got {tuple(x.shape)}")


def check_float(name: str, x: Tensor) -> None:
    if not x.dtype.is_floating_point:
        raise TypeError(f"{name} must be floating point, got {x.dtype}")


def check_shape(name: str, x: Tensor, shape: Sequence[int]) -> None:
    if x.ndim != len(shape) or any(a != b for a, b in zip(x.shape, shape, strict=True)):
        raise ValueError(f"{name} must have shape {tuple(shape)}, got {tuple(x.shape)}")


def check_device(name: str, x: Tensor, like: Tensor, like_name: str) -> None:
    if x.device != like.device:
        raise ValueError(f"{name} must be on {like_name}'s device {like.device}, got {x.device}")


def check_integers(name: str, x: object, shape: Sequence[int], like: Tensor, like_name: str) -> None:
    """Lengths, offsets and ids: int32 or int64 of this shape, on the inputs' device."""
    if not isinstance(x, Tensor):
        raise TypeError(f"{name} must be an int32 or int64 tensor, got {type(x).__name__}")
    if x.dtype not in INTEGERS:
        raise TypeError(f"{name} must be int32 or int64, got {x.dtype}")
    check_shape(name, x, shape)
    check_device(name, x, like, like_name)


def check_cu_seqlens(name: str, x: object, like: Tensor, like_name: str) -> None:
    if not isinstance(x, Tensor):
        raise TypeError(f"{name} must be an int32 or int64 tensor, got {type(x).__name__}")
    if x.ndim != 1 or x.shape[0] < 1:
        raise ValueError(f"{name} must have shape (B + 1,), got {tuple(x.shape)}")
    check_integers(name, x, x.shape, like, like_name)


def check_choice(name: str, value: object, choices: Sequence[str]) -> None:
    if value not in choices:
        raise ValueError(f"{name} must be one of {tuple(choices)}, got {value!r}")


def applied(function: type[torch.autograd.Function], arguments: Sequence[Any]) -> Any:
    """function.apply(*arguments), without autograd's 16 µs where nothing needs a gradient."""
    if torch.is_grad_enabled() and any(isinstance(x, Tensor) and x.requires_grad for x in arguments):
        return function.apply(*distinct(arguments))
    return function.forward(None, *arguments)


def check_number(name: str, x: object, what: str = "a number") -> None:
    """bool is none, torch.compile's symbolic numbers are."""
    if isinstance(x, bool) or not isinstance(x, (int, float, torch.SymInt, torch.SymFloat)):
        raise TypeError(f"{name} must be {what}, got {type(x).__name__}")


def check_integer(name: str, x: object, what: str = "an integer") -> None:
    if isinstance(x, bool) or not isinstance(x, (int, torch.SymInt)):
        raise TypeError(f"{name} must be {what}, got {type(x).__name__}")


def check_flag(name: str, x: object) -> None:
    if x is not True and x is not False:
        raise TypeError(f"{name} must be True or False, got {x!r}")


def distinct(arguments: Iterable[Any]) -> list[Any]:
    """The arguments, a tensor that comes again as a view: torch.compile can't trace a Function that gets one twice."""
    if not torch.compiler.is_compiling():
        return list(arguments)
    given: list[Any] = []
    for x in arguments:
        again = isinstance(x, Tensor) and any(x is other for other in given)
        given.append(x.view_as(x) if again else x)
    return given


class NoSecondDerivative(torch.autograd.Function):
    """The identity on a gradient, made a function of `anything` so that differentiating it raises.

    once_differentiable doesn't serve: where the loss is linear in out, it drops second derivatives silently.
    """

    @staticmethod
    def forward(ctx: Any, gradient: Tensor, family: str, anything: Tensor) -> Tensor:
        ctx.family = family
        return gradient.clone()

    @staticmethod
    def backward(ctx: Any, *_: Any) -> Any:
        raise NotImplementedError(f"{ctx.family}: second derivatives only with backend='reference'")


def last_backward() -> bool:
    """Inside a Function's backward: does its graph go now, so that what it saved may be overwritten?"""
    keeps = torch._C._autograd._get_current_graph_task_keep_graph  # what torch's own donated buffers ask
    return not torch.compiler.is_compiling() and not keeps()


def first_derivatives(family: str, *gradients: Tensor | None) -> tuple[Tensor | None, ...]:
    """The gradients a backward returns; under create_graph they raise if they are differentiated again."""
    if not torch.is_grad_enabled():
        return gradients
    anything = torch.empty(0, requires_grad=True)
    return tuple(g if g is None else NoSecondDerivative.apply(g, family, anything) for g in gradients)


def reference_gradients(
    function: Callable[..., Any], inputs: Sequence[Any], needed: Sequence[bool], d_outputs: Sequence[Tensor | None]
) -> tuple[Tensor | None, ...]:
    """Gradients of a reference by running it again: for a Function used alone where only the reference serves.

    `inputs` are the function's arguments; those `needed` get a gradient, the others None.
    """
    create_graph = torch.is_grad_enabled()
    with torch.enable_grad():
        tracked = (
            list(inputs)
            if create_graph
            else [
                x.detach().requires_grad_(need) if isinstance(x, Tensor) and need else x
                for x, need in zip(inputs, needed, strict=True)
            ]
        )
        outputs = function(*tracked)
        outputs = outputs if isinstance(outputs, tuple) else (outputs,)
        pairs = [(o, d) for o, d in zip(outputs, d_outputs, strict=True) if d is not None and o.requires_grad]
        wanted = [x for x, need in zip(tracked, needed, strict=True) if need]
        found = iter(
            torch.autograd.grad(
                [o for o, _ in pairs], wanted, [d for _, d in pairs], create_graph=create_graph, allow_unused=True
            )
        )
    return tuple(next(found) if need else None for need in needed)
