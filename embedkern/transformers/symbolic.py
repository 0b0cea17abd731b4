"""A mask function read by calling it with symbols, as Dynamo can't show a closure to the code that it traces.

transformers' functions compare the indices of a query and a key, and combine what comes of it. Anything else that a
symbol is asked for gives `Unknown`, which stays unknown.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any


def read(function: Callable[..., Any]) -> tuple[float, float] | None:
    """How far a query sees to its left and to its right, inf without bound; None if the function isn't such a band."""
    seen = function(0, 0, Index(query=True), Index(query=False))
    if not isinstance(seen, Band):
        return None
    return math.inf if seen.left is None else seen.left, math.inf if seen.right is None else seen.right


class Unknown:
    """What has no form here, whatever is done with it."""

    device = None

    def _unknown(self, *args: Any, **kwargs: Any) -> Unknown:
        return Unknown()

    __add__ = __radd__ = __sub__ = __rsub__ = __mul__ = __rmul__ = __floordiv__ = __mod__ = __abs__ = __neg__ = _unknown
    __and__ = __rand__ = __or__ = __ror__ = __xor__ = __invert__ = to = new_ones = new_zeros = _unknown
    __lt__ = __le__ = __gt__ = __ge__ = __eq__ = __ne__ = _unknown  # type: ignore[assignment]
    __hash__ = None  # type: ignore[assignment]

    def __bool__(self) -> bool:
        raise TypeError("a mask function's result has no truth value before there are indices")


class Band(Unknown):
    """True where query - left ≤ key ≤ query + right."""

    def __init__(self, left: Any = None, right: Any = None) -> None:
        self.left, self.right = left, right

    def to(self, *args: Any, **kwargs: Any) -> Band:
        return self

    def __and__(self, other: Any) -> Unknown:
        if not isinstance(other, Band):
            return Unknown()
        return Band(_nearer(self.left, other.left), _nearer(self.right, other.right))


class Index(Unknown):
    """The index of the query or of the key, less a number."""

    def __init__(self, query: bool, less: Any = 0) -> None:
        self.query, self.less = query, less

    def new_ones(self, *args: Any, **kwargs: Any) -> Band:
        return Band()

    def __sub__(self, other: Any) -> Unknown:
        if isinstance(other, int) and self.query:
            return Index(True, self.less + other)
        if isinstance(other, Index) and self.query and not other.query and self.less == 0:
            return Distance()
        return Unknown()

    def __gt__(self, other: Any) -> Unknown:
        if isinstance(other, Index) and other.query and not self.query and other.less >= 1:
            return Band(left=other.less - 1)  # key > query - less
        return Unknown()

    def __le__(self, other: Any) -> Unknown:
        if isinstance(other, Index) and other.query and not self.query and other.less == 0:
            return Band(right=0)
        return Unknown()

    def __ge__(self, other: Any) -> Unknown:
        return Band() if isinstance(other, int) and other == 0 and self.less == 0 else Unknown()


class Distance(Unknown):
    """query - key, or its size."""

    def __init__(self, size: bool = False) -> None:
        self.size = size

    def __abs__(self) -> Distance:
        return Distance(size=True)

    def __le__(self, other: Any) -> Unknown:
        return Band(other, other) if self.size and isinstance(other, int) and other >= 0 else Unknown()


def _nearer(one: Any, other: Any) -> Any:
    if one is None or other is None:
        return other if one is None else one
    return min(one, other)
