"""Numbers of PTX types as the bits of registers, and what instructions compute with them: for tests/ptx.py."""

from __future__ import annotations

from collections.abc import Callable
from functools import cache, reduce
from typing import Any

import numpy as np
from numpy.typing import NDArray

Array = NDArray[Any]
LANES = 32  # threads of a warp
UNSIGNED = {8: np.uint8, 16: np.uint16, 32: np.uint32, 64: np.uint64}
SIGNED = {8: np.int8, 16: np.int16, 32: np.int32, 64: np.int64}
FLOAT = {16: np.float16, 32: np.float32, 64: np.float64}


@cache
def size_of(kind: str) -> int:
    """Bits of a PTX type: f32, s64, bf16, b32, …"""
    return int("".join(c for c in kind.removeprefix("bf") if c.isdigit()))


def decode(bits: Array, kind: str) -> Array:
    """Bits of a register as numbers, bf16 as float32."""
    if kind == "pred":
        return bits
    size = size_of(kind)
    bits = bits.astype(UNSIGNED[size], copy=False)
    if kind == "bf16":
        return (bits.astype(np.uint32) << 16).view(np.float32)
    return bits.view(FLOAT[size] if kind[0] == "f" else SIGNED[size] if kind[0] == "s" else UNSIGNED[size])


def encode(x: Array, kind: str) -> Array:
    """Numbers as bits, rounded to nearest even."""
    if kind == "pred":
        return x
    if kind == "bf16":
        bits = np.ascontiguousarray(x, np.float32).view(np.uint32)
        rounded = (bits + (0x7FFF + ((bits >> 16) & 1))) >> 16
        return np.where(np.isnan(x), 0x7FFF, rounded).astype(np.uint16)
    size = size_of(kind)
    if kind[0] == "f":
        return x.astype(FLOAT[size], copy=False).view(UNSIGNED[size])
    return x.astype(UNSIGNED[size], copy=False)


def halves(bits: Array) -> tuple[Array, Array]:
    """The lower and the upper 16 bits of 32."""
    return bits & np.uint32(0xFFFF), bits >> np.uint32(16)


def together(low: Array, high: Array) -> Array:
    return low.astype(np.uint32) | high.astype(np.uint32) << np.uint32(16)


def _divide(a: Array, b: Array) -> Array:
    if a.dtype.kind == "f":
        return a / b
    quotient = np.abs(a.astype(np.int64)) // np.abs(b.astype(np.int64))
    return np.where((a < 0) != (b < 0), -quotient, quotient).astype(a.dtype)  # towards zero


def _shift(a: Array, by: Array, left: bool) -> Array:
    """By as many bits as there are or more: all of them."""
    bits = a.dtype.itemsize * 8
    most = np.minimum(by, bits - 1).astype(a.dtype)
    if not left:
        return np.where((by >= bits) & (a.dtype.kind == "u"), 0, a >> most).astype(a.dtype)
    return np.where(by >= bits, 0, a << most).astype(a.dtype)


def _field(a: Array, start: Array, length: Array) -> Array:
    bits = a.dtype.itemsize * 8
    up = (bits - start.astype(np.int64) - length).clip(0).astype(a.dtype)
    return (a << up) >> (bits - length.astype(np.int64)).astype(a.dtype)


def _permute(a: Array, b: Array, selector: Array) -> Array:
    """Each byte is one of a's and b's eight: four bits of the selector say which."""
    both = np.stack([a, b], -1).view(np.uint8)
    which = np.stack([selector >> np.uint32(4 * i) & np.uint32(7) for i in range(4)], -1).astype(np.int64)
    return np.take_along_axis(both, which, -1).view(np.uint32)[..., 0]


def _multiply_add(a: Array, b: Array, c: Array) -> Array:
    if a.dtype == np.float32:  # rounded once: the product is exact in float64
        return (a.astype(np.float64) * b + c).astype(np.float32)
    return a * b + c


_COMPUTE: dict[str, Callable[..., Array]] = {
    "add": np.add, "sub": np.subtract, "mul": np.multiply, "mul.lo": np.multiply, "div": _divide,
    "rem": lambda a, b: a - _divide(a, b) * b, "fma": _multiply_add, "mad.lo": _multiply_add,
    "neg": np.negative, "abs": np.abs, "sqrt": np.sqrt, "ex2": np.exp2, "lg2": np.log2,
    "max": lambda *x: reduce(np.fmax if x[0].dtype.kind == "f" else np.maximum, x), "max.NaN": np.maximum,
    "min": lambda *x: reduce(np.fmin if x[0].dtype.kind == "f" else np.minimum, x), "min.NaN": np.minimum,
    "max.relu": lambda a, b: np.maximum(np.maximum(a, b), 0),
    "and": np.bitwise_and, "or": np.bitwise_or, "xor": np.bitwise_xor, "not": np.invert,
    "shl": lambda a, by: _shift(a, by, True), "shr": lambda a, by: _shift(a, by, False), "bfe": _field,
    "prmt": _permute,
}  # fmt: skip
_COMPARE = {
    "eq": np.equal, "ne": np.not_equal, "lt": np.less, "le": np.less_equal, "gt": np.greater, "ge": np.greater_equal,
}  # fmt: skip
_ROUNDING = {"rn", "ftz", "full", "approx"}  # what is approximate on a GPU is exact here


def compare(how: str, a: Array, b: Array) -> Array:
    """Of floats: false where one is NaN, but true with the ending u."""
    either = (a != a) | (b != b)
    if how == "nan":
        return either
    return (_COMPARE[how.removesuffix("u")](a, b) & ~either) | (either & how.endswith("u"))


def compute(name: str, *values: Array) -> Array:
    """What the instruction `name` (without its type) makes of decoded numbers."""
    base, *how = name.split(".")

    def flushed(x: Array) -> Array:
        return np.where(np.abs(x) < np.float32(2**-126), np.float32(0), x) if "ftz" in how else x

    if "wide" in how:
        wide = np.int64 if values[0].dtype.kind == "i" else np.uint64
        product = values[0].astype(wide) * values[1].astype(wide)
        return product + values[2].astype(wide) if base == "mad" else product
    function = _COMPUTE[".".join([base, *(x for x in how if x not in _ROUNDING)])]
    return flushed(function(*map(flushed, values)))
