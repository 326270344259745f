"""Random Triton kernels with the results they must give; equal seeds give equal kernels.

A kernel is written and evaluated at the same time: every variable of its text comes with the values it has in all
programs of the grid. Integers wrap around at their width. Floats are small integers over a power of two, and an
operation is written only where its exact result fits the type: so every result has to be equal to the last bit,
whatever the order of a sum.
"""

import random
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

SIZES = (1, 2, 4, 8, 16, 32, 64, 128)
LARGEST = 2048
_DTYPES = {
    "int8": torch.int8, "int16": torch.int16, "int32": torch.int32, "int64": torch.int64, "float16": torch.float16,
    "bfloat16": torch.bfloat16, "float32": torch.float32,
}  # fmt: skip
_BITS = {"int8": 8, "int16": 16, "int32": 32, "int64": 64, "int1": 1}
_DIGITS = {"float16": 11, "bfloat16": 8, "float32": 24}
_HELPERS = """import triton
import triton.language as tl


@triton.jit
def larger(a, b):
    return tl.maximum(a, b)


@triton.jit
def both(a, m, b, n):
    return a + b, tl.minimum(m, n)


@triton.jit
def twice_or_same(x, flag):
    if flag:
        return x + x
    return x


"""


@dataclass(frozen=True, eq=False)
class Var:
    """A variable of the kernel.

    Attributes:
        name: in the text.
        kind: name of its element type in triton.language.
        value: [programs, *shape]; int64, bool or float64.
        bound, grain: floats are at most ``bound`` in size and multiples of ``2 ** -grain``.
    """

    name: str
    kind: str
    value: Tensor
    bound: float = 0.0
    grain: int = 0

    @property
    def shape(self) -> tuple[int, ...]:
        return tuple(self.value.shape[1:])

    @property
    def is_float(self) -> bool:
        return self.kind in _DIGITS

    @property
    def is_int(self) -> bool:
        return self.kind in _BITS and self.kind != "int1"


@dataclass(frozen=True)
class RandomKernel:
    """Text of a module with a function ``kernel``, its arguments in order, and what they hold afterwards."""

    text: str
    grid: tuple[int]
    arguments: list[Tensor | int]
    expected: list[Tensor | int]


def wrapped(value: Tensor, kind: str) -> Tensor:
    """Integers modulo the width of a signed type."""
    bits = _BITS[kind]
    if bits == 64:
        return value
    half = 1 << (bits - 1)
    return (value + half) % (2 * half) - half


class Writer:
    """A kernel under construction."""

    def __init__(self, seed: int) -> None:
        self.rng = random.Random(seed)
        self.noise = torch.Generator().manual_seed(seed)
        self.programs = self.rng.choice((1, 2, 3))
        rank = self.rng.choice((1, 1, 2, 2, 2, 3))
        self.base: tuple[int, ...] = (LARGEST,) * 2
        while len(self.base) != rank or torch.Size(self.base).numel() > LARGEST:
            self.base = tuple(self.rng.choice(SIZES) for _ in range(rank))
        self.parameters: list[str] = []
        self.arguments: list[Tensor | int] = []
        self.expected: list[Tensor | int] = []
        self.lines: list[str] = []
        self.indent = "    "
        self.count = 0
        self.used: set[str] = set()
        pid = torch.arange(self.programs)
        self.pid = Var("pid", "int32", pid)
        self.vars: list[Var] = [self.pid]

    def pick(self, test: Callable[[Var], bool]) -> Var | None:
        """A variable that passes, later ones more often."""
        found = [v for v in self.vars if test(v)]
        return found[int(len(found) * self.rng.random() ** 0.5)] if found else None

    def fresh(self, stem: str = "v") -> str:
        self.count += 1
        return f"{stem}{self.count}"

    def write(self, text: str) -> None:
        self.lines.append(self.indent + text)

    def parameter(self, argument: Tensor | int, expected: Tensor | int | None = None) -> str:
        name = f"a{len(self.parameters)}"
        self.parameters.append(name)
        self.arguments.append(argument)
        self.expected.append(argument if expected is None else expected)
        return name

    def define(self, text: str, kind: str, value: Tensor, bound: float = 0.0, grain: int = 0) -> Var | None:
        """Writes an assignment; None, and nothing is written, where a float would have to be rounded."""
        if kind in _DIGITS and bound * 2.0**grain > 2 ** _DIGITS[kind]:
            return None
        value = wrapped(value, kind) if kind in _BITS and kind != "int1" else value
        var = Var(self.fresh(), kind, value, bound, grain)
        self.write(f"{var.name} = {text}")
        self.used |= set(text.replace("(", " ").replace(",", " ").replace(")", " ").split())
        self.vars.append(var)
        return var

    def index(self, shape: Sequence[int], strides: Sequence[int]) -> str:
        """Sum of ranges, one for each axis."""
        if not shape:
            return "0"
        terms = []
        for axis, (size, stride) in enumerate(zip(shape, strides, strict=True)):
            picks = ", ".join(":" if a == axis else "None" for a in range(len(shape)))
            terms.append(f"tl.arange(0, {size})[{picks}] * {stride}")
        return " + ".join(terms)

    def random_values(self, kind: str, count: int) -> tuple[Tensor, float, int]:
        """Values in memory; for floats also their bound and grain."""
        if kind in _BITS:
            high = min(1 << (_BITS[kind] - 1), 1 << 20)
            return torch.randint(-high, high, (count,), generator=self.noise), 0.0, 0
        high, grain = self.rng.choice(((4, 0), (3, 1), (8, 0)))
        return (
            torch.randint(-high, high + 1, (count,), generator=self.noise).double() / 2**grain,
            high / 2**grain,
            grain,
        )

    def store(self, var: Var) -> None:
        """Writes a variable to a new argument, some of them under a mask."""
        count = torch.Size(var.shape).numel()
        dtype = torch.bool if var.kind == "int1" else _DTYPES[var.kind]
        kept = torch.ones(var.value.shape, dtype=torch.bool)
        mask = ""
        if var.shape and self.rng.random() < 0.4:
            axis = self.rng.randrange(len(var.shape))
            bound = self.rng.randint(0, var.shape[axis])
            name = self.parameter(bound)
            ones = [1 if a == axis else 0 for a in range(len(var.shape))]
            mask = f", mask=({self.index(var.shape, ones)}) < {name}"
            steps = torch.arange(var.shape[axis]).reshape([-1 if a == axis else 1 for a in range(len(var.shape))])
            kept &= steps < bound
        before = torch.zeros(self.programs * count, dtype=dtype)
        after = torch.where(kept, var.value, torch.zeros((), dtype=var.value.dtype)).reshape(-1).to(dtype)
        strides = torch.empty(var.shape).stride()
        name = self.parameter(before, after)
        self.write(f"tl.store({name} + pid * {count} + {self.index(var.shape, strides)}, {var.name}{mask})")

    def finish(self) -> RandomKernel:
        """Stores what nothing else uses, and a few others."""
        loose = [v for v in self.vars if v.name not in self.used and v is not self.pid]
        others = [v for v in self.vars if v.name in self.used and v is not self.pid]
        for var in loose[-6:] + self.rng.sample(others, min(2, len(others))):
            self.store(var)
        header = f"@triton.jit\ndef kernel({', '.join(self.parameters)}):\n    pid = tl.program_id(0)\n"
        text = _HELPERS + header + "\n".join(self.lines) + "\n"
        return RandomKernel(text, (self.programs,), self.arguments, self.expected)
