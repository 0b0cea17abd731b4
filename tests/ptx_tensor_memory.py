"""Products of sm_100, which has a memory of its own for their operands and results, for tests/ptx.py."""

from __future__ import annotations

from typing import Any

import numpy as np
from ptx_numbers import LANES, Array, decode, halves

ROWS, COLUMNS = 128, 512  # of 32 bits


def elect(threads: Any, i: Any, where: Array | None) -> None:
    """The first lane of a warp."""
    lane = threads.registers["%tid.x"] % LANES
    threads.write(i.results[0], lane * 0, where)
    threads.write(i.results[1], lane == 0, where)


def mbarrier(threads: Any, i: Any, where: Array | None) -> None:
    """Phases are counted in its own eight bytes."""
    if "inval" in i.name:
        return
    address = i.operands[0]
    memory, at = threads.place(address, "shared", 8, where)
    phases = memory.view(np.uint64)
    if "init" in i.name:
        phases[at // 8] = 0
    else:
        parity = threads.read(i.operands[1], "b32") if where is None else threads.read(i.operands[1], "b32")[where]
        assert (phases[at // 8] % np.uint64(2) != parity).all(), "waits for what never comes"


def tensor_memory(threads: Any, i: Any, where: Array | None) -> None:
    """tcgen05. An address has the row in its upper half, the column in its lower."""
    what = i.name.split(".")[1]
    if what == "alloc":
        memory, at = threads.place(i.operands[0], "shared", 4, where)
        memory.view(np.uint32)[at // 4] = 0
    elif what == "commit":
        memory, at = threads.place(i.operands[0], "shared", 8, where)
        memory.view(np.uint64)[at // 8] += np.uint64(1)
    elif what in ("ld", "st"):
        place = i.operands[0]
        registers = i.results if what == "ld" else i.operands[-1]
        address = threads.read(place[0], "b32").astype(np.int64)
        row, column = address >> 16, (address & 0xFFFF) + place[1]
        lane = threads.registers["%tid.x"].astype(np.int64) % LANES
        if "16x32bx2" in i.name:
            column = column + (lane // 16) * i.operands[1]
            lane = lane % 16
        program = np.arange(threads.count) // threads.block
        some = slice(None) if where is None else where
        for n, register in enumerate(registers):
            at = program[some], (row + lane)[some], (column + n)[some]
            if what == "st":
                threads.tensor[at] = threads.read(register, "b32")[some]
            else:
                bits = np.zeros(threads.count, np.uint32)
                bits[some] = threads.tensor[at]
                threads.write(register, bits, where)
    elif what == "mma":
        multiply(threads, i, where)


def multiply(threads: Any, i: Any, where: Array | None) -> None:
    """D = A·B + D, or A·B; one thread of a block asks for it. A is in tensor memory or, as B, in shared memory. Of 64
    rows 16 are in each 32."""
    assert where is not None
    to, left, right, shape, accumulates = i.operands
    program = np.flatnonzero(where) // threads.block
    (word,) = set(threads.read(shape, "b32")[where].tolist())
    kinds = ["f16", "bf16"]
    m, n, k = (word >> 24 & 31) << 4, (word >> 17 & 63) << 3, 16
    rows = np.arange(m) if m == ROWS else np.arange(m) // 16 * 32 + np.arange(m) % 16
    first = threads.first_shared[where]

    def places(address: list[Any], columns: int) -> tuple[Array, Array, Array]:
        at = threads.read(address[0], "b32")[where].astype(np.int64)[:, None, None]
        return program[:, None, None], (at >> 16) + rows[:, None], (at & 0xFFFF) + address[1] + np.arange(columns)

    if isinstance(left, list):
        pairs = halves(threads.tensor[places(left, k // 2)])
        a = np.stack([decode(half, kinds[word >> 7 & 7]) for half in pairs], -1).reshape(len(program), m, k)
    else:
        a = threads.described(threads.read(left, "b64")[where], first, kinds[word >> 7 & 7], m, k, word >> 15 & 1)
    b = threads.described(threads.read(right, "b64")[where], first, kinds[word >> 10 & 7], n, k, word >> 16 & 1)
    at = places(to, n)
    before = threads.tensor[at].view(np.float32)
    keep = threads.read(accumulates, "pred")[where][:, None, None]
    product = a.astype(np.float32) @ b.transpose(0, 2, 1)
    threads.tensor[at] = np.where(keep, product + before, product).astype(np.float32).view(np.uint32)
