"""Runs compiled Triton kernels without a GPU: the PTX of a launch, interpreted with one array element a thread.

All threads of a launch go in step, those that are behind first, so that what parts in loops and branches meets again. A
register is an array of unsigned integers over the threads; registers and shared memory begin as NaN. An AssertionError
is: a misaligned address, one outside its tensor's memory or the block's shared memory, memory that another program has
written before, threads that wait for others in vain, an instruction not known here. Asynchronous copies and products
are done at once, and no warp is ever ahead: a wait or a barrier that is missing isn't found.

Names and meanings are those of NVIDIA's PTX ISA.
"""

from __future__ import annotations

import re
from collections.abc import Iterator
from dataclasses import dataclass
from functools import cache, cached_property
from typing import Any

import numpy as np
import torch
from ptx_numbers import LANES, UNSIGNED, Array, compare, compute, decode, encode, halves, size_of, together
from ptx_tensor_memory import COLUMNS, ROWS, elect, mbarrier, tensor_memory

GROUP = 4 * LANES  # what wgmma takes together
GUARD = 256  # bytes between tensors, which nobody may touch
LOCAL = 1024  # bytes of local memory a thread
THREADS = 1 << 14  # at once: registers of more don't fit the caches
REGISTERS = {"%p": np.bool_, "%rs": np.uint16, "%r": np.uint32, "%rd": np.uint64, "%SP": np.uint64, "%SPL": np.uint32}


# ---- the program ----


@dataclass(frozen=True)
class Instruction:
    name: str  # without its last type
    kind: str  # its last type
    results: tuple[str, ...]
    operands: tuple[Any, ...]  # registers' names, numbers, tuples of them, addresses as lists [register, offset]
    guard: str
    unless: bool
    together: int  # how many threads do it together, 0: a block

    @property
    def space(self) -> str:
        return next((space for space in ("global", "shared") if space in self.name), "local")


def _operand(text: str) -> Any:
    text = text.strip()
    if text[0] == "{":
        return tuple(_operand(x) for x in text[1:-1].split(","))
    if text[0] == "[":
        base, _, offset = text[1:-1].partition("+")
        return [base.strip(), int(offset or 0)]
    if re.fullmatch(r"0[fF][0-9A-Fa-f]{8}", text):
        return int(text[2:], 16)
    if re.fullmatch(r"-?(0x[0-9A-Fa-f]+|\d+)U?", text):
        return int(text.rstrip("U"), 0)
    return text


UNTYPED = ("bra", "ret", "bar.", "barrier.", "cp.async", "wgmma.", "fence", "mbarrier.", "tcgen05.")
NO_RESULT = (*UNTYPED, "st.", "stmatrix")


def _together(op: str) -> int:
    if op.startswith(("bar.sync", "barrier.sync")):
        return 0
    if op.startswith("wgmma"):
        return GROUP
    return LANES if ".sync" in op else 1


def _instruction(text: str) -> Instruction:
    guard, op, rest = re.fullmatch(r"(?:@(!?%p\d+)\s+)?([\w.:]+)\s*(.*)", text, re.DOTALL).groups("")  # type: ignore[union-attr]
    operands = [_operand(x) for x in re.findall(r"\{[^}]*\}|\[[^]]*\]|[^,\s][^,]*", rest)]
    first = 0 if op.startswith(NO_RESULT) and not op.startswith("tcgen05.ld") else 1
    results: list[str] = []
    for each in operands[:first]:
        results += each if isinstance(each, tuple) else each.split("|")
    name, _, kind = (op, "", "") if op.startswith(UNTYPED) else op.rpartition(".")
    return Instruction(
        name, kind, tuple(results), tuple(operands[first:]), guard.lstrip("!"), guard.startswith("!"), _together(op)
    )


def parse(ptx: str) -> tuple[list[Instruction], dict[str, int]]:
    """The instructions of the only kernel, and where labels are."""
    # A loop around try_wait, or one that is skipped: what it waits for is done already.
    wait = (
        r"\{\s*(?:@!(%p\d+) bra\.uni skipWait;\s*)?\.reg \.pred complete;[^}]*?(mbarrier\S+) complete,([^;]*;)[^}]*\}"
    )
    ptx = re.sub(wait, lambda x: f"@{x[1]} {x[2]}{x[3]}" if x[1] else f"{x[2]}{x[3]}", ptx)
    entry = ptx[ptx.index(".entry") :]
    body = entry[entry.index("\n{") + 2 : entry.index("\n}")]
    body = re.sub(r"//[^\n]*|^\s*\.(loc|local|pragma|reg)\b[^\n]*", "", body, flags=re.MULTILINE)
    program: list[Instruction] = []
    labels: dict[str, int] = {}
    for statement in re.sub(r"^(\$\w+):", r"\1;", body, flags=re.MULTILINE).split(";")[:-1]:
        text = statement.strip()
        if text.startswith("$"):
            labels[text] = len(program)
        else:
            program.append(_instruction(text))
    return program, labels


# ---- fragments of matrices: which lane of a warp holds what ----

LANE = np.arange(LANES)
FOUR, OF_FOUR = LANE // 4, LANE % 4


@cache
def _fragment(rows: int, columns: int, packed: int) -> tuple[Array, Array]:
    """Row and column of each element: of (registers · packed, lanes), which are tiles of 8 × 4·packed, down first."""
    row, column = [], []
    for right in range(columns // (4 * packed)):
        for down in range(rows // 8):
            for part in range(packed):
                row.append(FOUR + 8 * down)
                column.append(OF_FOUR * packed + part + 4 * packed * right)
    return np.array(row), np.array(column)


def _matrices(registers: list[Array], rows: int, columns: int, kind: str) -> Array:
    """(warps, rows, columns) in float32, from registers of pairs of 16 bits or of one tf32, which has 10 bits."""
    if kind == "tf32":
        parts = [(r & np.uint32(0xFFFFE000)).view(np.float32) for r in registers]
    else:
        parts = [decode(half, kind).astype(np.float32) for r in registers for half in halves(r)]
    row, column = _fragment(rows, columns, 1 if kind == "tf32" else 2)
    full = np.empty((parts[0].size // LANES, rows, columns), np.float32)
    full[:, row, column] = np.stack([x.reshape(-1, LANES) for x in parts], 1)
    return full


def _sizes(name: str) -> tuple[int, int, int]:
    m, n, k = re.search(r"\.m(\d+)n(\d+)k(\d+)", name).groups()  # type: ignore[union-attr]
    return int(m), int(n), int(k)


# ---- running it ----


class Memory:
    """Tensors' memory, one behind the other with guards between: addresses are places in it."""

    def __init__(self, tensors: list[torch.Tensor]) -> None:
        self.storages = {x.untyped_storage().data_ptr(): x.untyped_storage() for x in tensors}
        self.starts: dict[int, int] = {}
        size = GUARD
        for pointer, storage in self.storages.items():
            self.starts[pointer] = size
            size += -(-storage.nbytes() // GUARD) * GUARD + GUARD
        self.bytes = np.zeros(size, np.uint8)
        self.valid = np.zeros(size, np.bool_)
        self.writer = np.full(size // 2, -1)  # the program that wrote these two bytes
        for storage, at in self._places():
            self.bytes[at], self.valid[at] = storage, True

    def _places(self) -> Iterator[tuple[Array, slice]]:
        for pointer, storage in self.storages.items():
            start = self.starts[pointer]
            yield torch.empty(0, dtype=torch.uint8).set_(storage).numpy(), slice(start, start + storage.nbytes())

    def address(self, x: torch.Tensor) -> int:
        return self.starts[x.untyped_storage().data_ptr()] + x.storage_offset() * x.element_size()

    def write_back(self) -> None:
        for storage, at in self._places():
            storage[:] = self.bytes[at]


class Threads:
    """Some programs of a launch, `block` threads each. where: the threads an instruction is for, None if all."""

    def __init__(self, programs: Array, block: int, shared: int, memory: Memory, parameters: list[Any]) -> None:
        self.count, self.block, self.memory, self.parameters = len(programs) * block, block, memory, parameters
        self.shared_size = -(-max(shared, 16) // 16) * 16
        self.shared = np.full(len(programs) * self.shared_size, 0xFF, np.uint8)
        self.local = np.full(self.count * LOCAL, 0xFF, np.uint8)
        self.first_shared = np.repeat(np.arange(len(programs)) * self.shared_size, block)
        self.first_local = np.arange(self.count) * LOCAL
        self.registers: dict[str, Array] = {
            "%tid.x": np.tile(np.arange(block, dtype=np.uint32), len(programs)),
            "%ctaid.x": np.repeat(programs.astype(np.uint32), block),
        }

    @cached_property
    def tensor(self) -> Array:
        """sm_100's tensor memory, of each block."""
        return np.full((self.count // self.block, ROWS, COLUMNS), 0xFFFFFFFF, np.uint32)

    def _register(self, name: str) -> Array:
        if name not in self.registers:
            dtype = REGISTERS[re.match(r"%[a-zA-Z]+", name)[0]]  # type: ignore[index]
            self.registers[name] = np.full(self.count, True if dtype is np.bool_ else np.iinfo(dtype).max, dtype)
        return self.registers[name]

    def read(self, operand: Any, kind: str) -> Array:
        """Numbers, one a thread."""
        if isinstance(operand, str):  # memory that isn't a tensor's begins at 0
            return decode(self._register(operand) if operand[0] == "%" else np.zeros(self.count, np.uint32), kind)
        if kind == "pred":
            return np.full(self.count, operand != 0)
        size = size_of(kind)
        return decode(np.full(self.count, operand & (2**size - 1), UNSIGNED[size]), kind)

    def words(self, registers: tuple[str, ...]) -> list[Array]:
        return [self.read(r, "b32") for r in registers]

    def write(self, name: str, bits: Array, where: Array | None) -> None:
        if name != "_":
            old = self._register(name)
            bits = bits.astype(old.dtype, copy=False)
            self.registers[name] = bits if where is None else np.where(where, bits, old)

    # -- memory --

    def place(
        self, address: list[Any], space: str, size: int, where: Array | None, writes: bool = False
    ) -> tuple[Array, Array]:
        """The memory, and where in it `size` bytes of each thread of `where` begin."""
        base, offset = address
        at = self.read(base, "s32" if space == "shared" else "s64").astype(np.int64) + offset
        at = at if where is None else at[where]
        assert not (at % size).any(), "misaligned"
        if space == "global":
            assert ((at >= 0) & (at + size <= len(self.memory.bytes))).all(), "outside memory"
            assert (self.memory.valid[at] & self.memory.valid[at + size - 1]).all(), "outside its tensor"
            program = self.registers["%ctaid.x"] if where is None else self.registers["%ctaid.x"][where]
            for byte in range(0, size, 2):
                writer = self.memory.writer[(at + byte) // 2]
                assert ((writer < 0) | (writer == program)).all(), "another program wrote this"
                if writes:
                    self.memory.writer[(at + byte) // 2] = program
            return self.memory.bytes, at
        memory, first = (self.shared, self.first_shared) if space == "shared" else (self.local, self.first_local)
        assert ((at >= 0) & (at + size <= (self.shared_size if space == "shared" else LOCAL))).all(), f"outside {space}"
        return memory, at + (first if where is None else first[where])

    def load(self, i: Instruction, where: Array | None) -> None:
        size = size_of(i.kind) // 8
        memory, at = self.place(i.operands[0], i.space, size * len(i.results), where)
        for n, result in enumerate(i.results):
            loaded = memory.view(UNSIGNED[size * 8])[at // size + n]
            if where is not None:
                loaded, some = np.zeros(self.count, loaded.dtype), loaded
                loaded[where] = some
            self.write(result, loaded, where)

    def store(self, i: Instruction, where: Array | None) -> None:
        size = size_of(i.kind) // 8
        values = i.operands[1] if isinstance(i.operands[1], tuple) else (i.operands[1],)
        memory, at = self.place(i.operands[0], i.space, size * len(values), where, writes=True)
        for n, value in enumerate(values):
            bits = self.read(value, i.kind)
            memory.view(UNSIGNED[size * 8])[at // size + n] = bits if where is None else bits[where]

    def copy(self, i: Instruction, where: Array | None) -> None:
        """cp.async: the first bytes from global to shared memory, zeros behind them."""
        to, source, size = i.operands[:3]
        wanted = self.read(i.operands[-1], "b32")
        for step in range(0, size, 4):
            some = wanted > step if where is None else (wanted > step) & where
            data = np.zeros(self.count, np.uint32)
            memory, at = self.place([source[0], source[1] + step], "global", 4, some)
            data[some] = memory.view(np.uint32)[at // 4]
            shared, at = self.place([to[0], to[1] + step], "shared", 4, where)
            shared.view(np.uint32)[at // 4] = data if where is None else data[where]

    def move_matrices(self, i: Instruction, where: Array | None) -> None:
        """ldmatrix, stmatrix: of 8 × 8 numbers of 16 bits; 8 lanes have their rows' addresses."""
        registers = i.results if i.name.startswith("ld") else i.operands[1]
        warps = np.ones((self.count // LANES, LANES), np.bool_) if where is None else where.reshape(-1, LANES)
        live, addressed = warps[:, 0], warps & (8 * len(registers) > LANE)
        memory, rows = self.place(i.operands[0], "shared", 16, addressed.reshape(-1))
        rows, memory = rows.reshape(-1, len(registers), 8) // 2, memory.view(np.uint16)
        row, column = _fragment(8, 8, 2)
        if ".trans" in i.name:
            row, column = column, row
        for n, register in enumerate(registers):
            places = [rows[:, n, row[half]] + column[half] for half in (0, 1)]
            bits = self.read(register, "b32").reshape(-1, LANES).copy()
            if i.name.startswith("ld"):
                bits[live] = together(*(memory[place] for place in places))
                self.write(register, bits.reshape(-1), where)
            else:
                for place, half in zip(places, halves(bits[live]), strict=True):
                    memory[place] = half.astype(np.uint16)

    # -- warps --

    def shuffle(self, i: Instruction, where: Array | None) -> None:
        by = self.read(i.operands[1], "b32").reshape(-1, LANES).astype(np.int64)
        assert i.operands[2] == LANES - 1
        source = {"bfly": LANE ^ by, "idx": by % LANES}[i.name.split(".")[2]]
        value = self.read(i.operands[0], "b32").reshape(-1, LANES)
        self.write(i.results[0], np.take_along_axis(value, source, 1).reshape(-1), where)

    def reduce(self, i: Instruction, where: Array | None) -> None:
        combine = {"max": np.fmax, "min": np.fmin, "add": np.add}[i.name.split(".")[-1]]
        of_warp = combine.reduce(self.read(i.operands[0], i.kind).reshape(-1, LANES), 1)
        self.write(i.results[0], encode(np.repeat(of_warp, LANES), i.kind), where)

    def multiply(self, i: Instruction, where: Array | None) -> None:
        """mma: D = A·B + C of each warp; B's fragments are those of its transposed."""
        (m, n, k), kind = _sizes(i.name), i.name.split(".")[-2]
        a, b = _matrices(self.words(i.operands[0]), m, k, kind), _matrices(self.words(i.operands[1]), n, k, kind)
        self._accumulate(a @ b.transpose(0, 2, 1), i.results, i.operands[2], where)

    def _accumulate(self, product: Array, results: Any, added: Any, where: Array | None) -> None:
        """Products (warps, 16, n) + registers."""
        row, column = _fragment(16, product.shape[2], 2)
        for n, (result, register) in enumerate(zip(results, added, strict=True)):
            value = product[:, row[n], column[n]].reshape(-1)
            self.write(result, encode(value + self.read(register, "f32"), "f32"), where)

    def multiply_group(self, i: Instruction, where: Array | None) -> None:
        """wgmma: D = A·B + D, or A·B, of four warps, 16 rows each; A is in registers or, as B, in shared memory."""
        (m, n, k), kind = _sizes(i.name), i.name.split(".")[-1]
        results, left, right, scale_d, scale_a, scale_b, *outer = i.operands
        assert (scale_a, scale_b) == (1, 1)
        live = slice(None) if where is None else where[::GROUP]
        a, b = (np.zeros((self.count // GROUP, rows, k), np.float32) for rows in (m, n))
        if isinstance(left, tuple):
            a = _matrices(self.words(left), 16, k, kind).reshape(a.shape)
        else:
            a[live] = self._described(left, kind, m, k, outer[0], live)
        b[live] = self._described(right, kind, n, k, outer[-1], live)
        keep = self.read(scale_d, "pred")
        for r in results:
            self.write(r, np.where(keep, self.read(r, "b32"), np.uint32(0)), where)
        self._accumulate((a @ b.transpose(0, 2, 1)).reshape(-1, 16, n), results, results, where)

    def _described(self, descriptor: str, kind: str, rows: int, k: int, k_is_outer: int, live: Any) -> Array:
        """(live groups, rows, k) of 16-bit numbers, where a matrix descriptor says."""
        words = self.read(descriptor, "b64").reshape(-1, GROUP)[live]
        assert (words == words[:, :1]).all(), "not one descriptor"
        return self.described(words[:, 0], self.first_shared[::GROUP][live], kind, rows, k, k_is_outer)

    def described(self, words: Array, first: Array, kind: str, rows: int, k: int, k_is_outer: int) -> Array:
        """(words, rows, k) of 16-bit numbers, where each matrix descriptor says, in shared memory from `first` on."""
        word = words[:, None, None]
        start, leading, stride = (
            (word >> np.uint64(shift) & np.uint64(0x3FFF)).astype(np.int64) << 4 for shift in (0, 16, 32)
        )
        (mode,) = set((word >> np.uint64(62)).reshape(-1).tolist())
        width = (16, 128, 64, 32)[mode]  # bytes of a row; 8 rows are an atom
        r, c = np.indices((rows, k))
        if k_is_outer:
            r, c = c, r
        inner, along, across = c * 2 % width + r % 8 * width, c * 2 // width, r // 8
        if k_is_outer and mode == 0:
            along, across = across, along
        at = start + inner + along * leading + across * stride
        at ^= (at >> 7 & (width // 16 - 1)) << 4
        assert ((at >= 0) & (at + 2 <= self.shared_size)).all(), "outside shared"
        at += first[:, None, None]
        return decode(self.shared.view(np.uint16)[at // 2], kind).astype(np.float32)

    # -- numbers --

    def move(self, i: Instruction, where: Array | None) -> None:
        source = i.operands[0]
        if isinstance(source, tuple):  # parts to a whole
            wide = UNSIGNED[size_of(i.kind)]
            size = size_of(i.kind) // len(source)
            parts = [self.read(x, f"b{size}").astype(wide) << (size * n) for n, x in enumerate(source)]
            self.write(i.results[0], np.bitwise_or.reduce(parts), where)
        else:  # a whole, or its parts
            whole = self.read(source, i.kind)
            for n, result in enumerate(i.results):
                self.write(result, whole if n == 0 else whole >> (size_of(i.kind) // len(i.results) * n), where)

    def convert(self, i: Instruction, where: Array | None) -> None:
        to = i.name.split(".")[-1]
        if to.endswith("x2"):
            high, low = (encode(self.read(x, i.kind), to[:-2]) for x in i.operands)
            self.write(i.results[0], together(low, high), where)
            return
        x = self.read(i.operands[0], i.kind)
        if to[0] in "fb" and x.dtype.kind != "f":
            x = x.astype(np.float64)
        assert to[0] in "fb" or x.dtype.kind != "f", "float to integer"
        self.write(i.results[0], encode(x, to), where)

    def calculate(self, i: Instruction, where: Array | None) -> None:
        base, *how = i.name.split(".")
        kinds = [i.kind, "b32", "b32"] if base in ("shl", "shr", "bfe") else [i.kind] * 3
        if base == "mad" and "wide" in how:
            kinds[2] = i.kind[0] + "64"
        if base == "selp":
            kinds[2] = "pred"
        values = [self.read(x, kind) for x, kind in zip(i.operands, kinds, strict=False)]
        if "f32" in how:  # of sm_100: 16-bit numbers and, last, a float32
            values = [*(x.astype(np.float32) for x in values[:-1]), self.read(i.operands[-1], "f32")]
            self.write(i.results[0], encode(compute(base, *values), "f32"), where)
        elif base == "setp":
            self.write(i.results[0], compare(how[0], *values), where)
        elif base == "selp":
            self.write(i.results[0], encode(np.where(values[2], *values[:2]), i.kind), where)
        else:
            result = compute(i.name, *values)
            self.write(i.results[0], result.view(np.uint64) if "wide" in how else encode(result, i.kind), where)

    def calculate_halves(self, i: Instruction, where: Array | None) -> None:
        """….bf16x2, ….f16x2, ….f32x2: each half on its own."""
        kind, base = i.kind[:-2], i.name.split(".")
        size = size_of(kind)
        wholes = [self.read(x, f"b{2 * size}") for x in i.operands]
        sides = [[decode(x >> (size * n), kind) for x in wholes] for n in (0, 1)]
        if base[0] == "setp":
            for result, values in zip(i.results, sides, strict=True):
                self.write(result, compare(base[1], *values), where)
        else:
            low, high = (encode(compute(i.name, *values), kind).astype(UNSIGNED[2 * size]) for values in sides)
            self.write(i.results[0], low | high << size, where)

    def step(self, i: Instruction, where: Array | None) -> None:
        base = i.name.split(".")[0]
        if i.name == "ld.param":
            number = int(i.operands[0][0].rpartition("_")[2])
            self.write(i.results[0], np.full(self.count, self.parameters[number]), where)
        elif base in ("cp", "wgmma", "bar", "barrier", "fence"):
            if i.name.endswith("shared.global"):
                self.copy(i, where)
            elif "mma_async" in i.name:
                self.multiply_group(i, where)
        elif base in METHODS:
            METHODS[base](self, i, where)
        elif i.kind.endswith("x2"):
            self.calculate_halves(i, where)
        else:
            self.calculate(i, where)

    def run(self, program: list[Instruction], labels: dict[str, int]) -> None:
        """Those that are furthest behind go first, up to where others are. What a warp or a block does together waits
        until all of it is there."""
        over = len(program)
        at = np.zeros(self.count, np.int64)
        waiting = np.zeros(self.count, np.bool_)
        while (at < over).any():
            assert not waiting.all(where=at < over), "threads wait for others that never come"
            now = int(at.min(where=~waiting, initial=over))
            here = at == now
            waiting &= ~here
            others = int(at.min(where=at > now, initial=over))
            while now < others:
                i = program[now]
                size = i.together or self.block
                if size > 1 and not here.all():
                    complete = here & (here | (at == over)).reshape(-1, size).all(1).repeat(size)
                    waiting |= here & ~complete
                    at[here] = now
                    here = complete
                    if not here.any():
                        break
                now += 1
                where: Array | None = here & (self._register(i.guard) ^ i.unless) if i.guard else here
                if where.all():
                    where = None
                if i.name in ("bra", "bra.uni", "ret"):
                    at[here] = now
                    at[slice(None) if where is None else where] = over if i.name == "ret" else labels[i.operands[0]]
                    break
                if where is None or where.any():
                    try:
                        self.step(i, where)
                    except Exception as error:
                        raise AssertionError(f"{i}: {error!r}") from error
            else:
                at[here] = now


METHODS = {
    "ld": Threads.load, "st": Threads.store, "ldmatrix": Threads.move_matrices, "stmatrix": Threads.move_matrices,
    "shfl": Threads.shuffle, "redux": Threads.reduce, "mma": Threads.multiply, "mov": Threads.move,
    "cvta": Threads.move, "cvt": Threads.convert, "tcgen05": tensor_memory, "mbarrier": mbarrier, "elect": elect,
}  # fmt: skip


def _flat(values: Any, signature: Any) -> Iterator[tuple[Any, str]]:
    for value, kind in zip(values, signature, strict=False):
        if isinstance(kind, tuple):
            yield from _flat(value, kind)
        elif kind != "constexpr":
            yield value, kind


def execute(compiled: Any, programs: int, arguments: tuple[Any, ...]) -> None:
    """Runs a compiled kernel's `programs` programs on tensors of the CPU."""
    given = list(_flat(arguments, compiled.src.signature.values()))
    memory = Memory([x for x, _ in given if isinstance(x, torch.Tensor)])
    parameters: list[Any] = []
    for value, kind in given:
        if isinstance(value, torch.Tensor):
            parameters.append(np.uint64(memory.address(value)))
        elif kind == "fp32":
            parameters.append(np.float32(value).view(np.uint32))
        else:
            size = int(kind[1:])
            parameters.append(UNSIGNED[max(size, 32)](int(value) & (2**size - 1)))
    program, labels = parse(compiled.asm["ptx"])
    block = compiled.metadata.num_warps * LANES
    with np.errstate(all="ignore"):
        for some in np.array_split(np.arange(programs), -(-programs * block // THREADS)):
            Threads(some, block, compiled.metadata.shared, memory, parameters).run(program, labels)
    memory.write_back()
