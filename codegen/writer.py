"""Writes the text of one kernel: parameters, index variables, and statements in the outermost scope they fit in.

A tile has at most two axes. In a kernel of rank 1 a row is a scalar and columns are a vector; in one of rank 2 rows are
a [BLOCK_M, 1] and columns a [1, BLOCK_N] tensor, so that any two values broadcast. Each value knows the index variables
it varies with; a statement goes to the outermost scope (program, loop over columns, ...) in which all of them exist, so
what does not vary in a loop is never computed in it.
"""

import keyword
import re
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any

import sympy
import torch

from tilewright.codegen.index import Atom, Div, Index, Leaf, variable
from tilewright.errors import CodegenError
from tilewright.ir.program import Pointer, Scalar, View
from tilewright.ir.sizes import SYMBOLS, Size, size_text

TRITON_TYPES = {
    torch.float64: "fp64",
    torch.float32: "fp32",
    torch.float16: "fp16",
    torch.bfloat16: "bf16",
    torch.int64: "i64",
    torch.int32: "i32",
    torch.int16: "i16",
    torch.int8: "i8",
    torch.uint8: "u8",
    torch.bool: "i1",
}
TL_TYPES = {
    torch.float64: "tl.float64",
    torch.float32: "tl.float32",
    torch.float16: "tl.float16",
    torch.bfloat16: "tl.bfloat16",
    torch.int64: "tl.int64",
    torch.int32: "tl.int32",
    torch.int16: "tl.int16",
    torch.int8: "tl.int8",
    torch.uint8: "tl.uint8",
    torch.bool: "tl.int1",
}

# What any kernel's text may refer to: modules, loop variables, helper functions, sizes, and Python's own words.
_RESERVED = (
    "tl",
    "triton",
    "start",
    "tanh",
    "gelu",
    "pow_scalar",
    "sign",
    "clamp",
    "expm1",
    "log1p",
    "softplus",
    *map(str, SYMBOLS),
    "float",
    "range",
    *keyword.kwlist,
)


@dataclass(frozen=True)
class Var:
    """An index variable.

    Attributes:
        name: name in the kernel.
        bound: values that count are in [0, bound).
        axis: axis of the tile it runs along; None for a scalar.
        block: number of values in a tile, as text; "1" for a scalar.
        mask: name of the tensor that is true where the value counts; None when all count.
    """

    name: str
    bound: Size | None
    axis: int | None = None
    block: str = "1"
    mask: str | None = None


@dataclass(frozen=True)
class Register:
    """A value in the kernel: a name or literal, its element type, and the index variables it varies with."""

    text: str
    dtype: torch.dtype
    deps: frozenset[str] = frozenset()


@dataclass
class Scope:
    """Statements of the program or of one loop; ``head`` is the loop's own line, ``before`` what it starts from."""

    head: str | None
    variables: set[str]
    before: list[str] = field(default_factory=list)
    lines: list["str | Scope"] = field(default_factory=list)
    cache: dict[Any, Any] = field(default_factory=dict)

    def render(self, indent: int) -> Iterator[str]:
        """Lines with their indentation."""
        yield from ("    " * indent + line for line in self.before)
        if self.head is not None:
            yield "    " * indent + self.head
            indent += 1
        for line in self.lines:
            if isinstance(line, Scope):
                yield from line.render(indent)
            else:
                yield "    " * indent + line


class KernelWriter:
    """The kernel under construction.

    Attributes:
        rank: 1 or 2, see above.
        params: (name, Triton type, argument) of runtime parameters, pointers first.
        constants: compile-time parameters.
        divides: whether an index that varies along columns is divided, which breaks up vectors.
        register_columns: longest axis that is held in registers as a whole; longer ones are looped over.
        loop_columns: columns of a tile in such a loop.
        loop_places: whether a reduction may loop over single places where no vector can run along its axis.
        column_names: name of the column variable of each axis size.
        row_deps: variables that stand for the row; columns are defined where these are.
        asserts: whether the text asserts something.
    """

    def __init__(self, rank: int, register_columns: int = 4096, loop_columns: int = 1024) -> None:
        self.rank = rank
        self.register_columns = register_columns
        self.loop_columns = loop_columns
        self.loop_places = False
        self.column_names: dict[Size, str] = {}
        self.row_deps: frozenset[str] = frozenset()
        self.asserts = False
        self.params: list[tuple[str, str, Pointer | Scalar]] = []
        self.constants: dict[str, int] = {}
        self.variables: dict[str, Var] = {}
        self.scopes: list[Scope] = [Scope(None, set())]
        self.divides = False
        self._symbols: set[sympy.Symbol] = set()
        self._names: set[str] = set(_RESERVED)
        self._pointers: dict[View, str] = {}

    # Names and parameters

    def unique(self, hint: str) -> str:
        """``hint``, or ``hint_1`` and so on where it is taken."""
        hint = re.sub(r"\W+", "_", hint).strip("_") or "value"
        name, count = hint, 0
        while name in self._names:
            count += 1
            name = f"{hint}_{count}"
        self._names.add(name)
        return name

    def reserve(self, *names: str) -> None:
        """Keeps names that a template uses in its own statements from being given to values."""
        self._names.update(names)

    def pointer(self, view: View, dtype: torch.dtype, hint: str) -> str:
        """Parameter that points to the first element of a view."""
        if view not in self._pointers:
            if dtype not in TRITON_TYPES:
                raise CodegenError(f"no kernel reads or writes elements of type {dtype}")
            name = self.unique(f"{hint}_ptr")
            self._pointers[view] = name
            self.params.append((name, f"*{TRITON_TYPES[dtype]}", Pointer(view)))
        return self._pointers[view]

    def size(self, size: Size) -> str:
        """A size as text; the symbols in it become i32 parameters."""
        if isinstance(size, int):
            return str(size)
        self._symbols |= size.free_symbols
        text = size_text(size)
        return text if text.isalnum() or text.startswith("(") else f"({text})"

    def wide_size(self, size: Size) -> str:
        """A size that may pass 2^31, as text computed in 64 bits."""
        if isinstance(size, int):
            return str(size)
        self._symbols |= size.free_symbols
        wide = {symbol: sympy.Symbol(f"tl.cast({symbol}, tl.int64)") for symbol in size.free_symbols}
        return size_text(size.subs(wide))

    def all_params(self) -> list[tuple[str, str, Pointer | Scalar]]:
        """Runtime parameters in order: pointers, then sizes by name."""
        sizes = sorted(self._symbols, key=str)
        return self.params + [(str(symbol), "i32", Scalar(symbol)) for symbol in sizes]

    # Index variables

    def define(self, var: Var) -> Index:
        """Registers an index variable; the innermost open scope defines it."""
        self.variables[var.name] = var
        self._names.add(var.name)
        self.scopes[-1].variables.add(var.name)
        return variable(var.name, var.bound)

    def mask(self, deps: frozenset[str]) -> str | None:
        """Conjunction of the masks of index variables, or None."""
        chosen = sorted((self.variables[name] for name in deps), key=lambda v: (v.axis or 0, v.name))
        masks = list(dict.fromkeys(var.mask for var in chosen if var.mask))
        return " & ".join(masks) if masks else None

    def axes(self, deps: frozenset[str]) -> set[int]:
        """Axes of the tile along which a value varies."""
        return {axis for name in deps if (axis := self.variables[name].axis) is not None}

    def shape(self, deps: frozenset[str]) -> list[str]:
        """Shape of the tile of a value; empty for a scalar."""
        blocks = {var.axis: var.block for name in deps if (var := self.variables[name]).axis is not None}
        if not blocks:
            return []
        return [blocks.get(axis, "1") for axis in range(self.rank)]

    def index_text(self, index: Index) -> str:
        """An index as text, scalars first; divisions are statements of their own."""

        def order(term: tuple[Atom, Size]) -> tuple[int, str]:
            deps = Index((term,)).deps
            return max(self.axes(deps), default=-1), repr(term[0])

        parts = []
        for atom, factor in sorted(index.terms, key=order):
            text = self._atom_text(atom)
            parts.append(text if factor == 1 else f"{text} * {self.size(factor)}")
        if index.const != 0 or not parts:
            parts.append(self.size(index.const))
        return " + ".join(parts)

    def _atom_text(self, atom: Atom) -> str:
        if isinstance(atom, Leaf):
            return atom.name
        deps = atom.value.deps
        if self.rank - 1 in self.axes(deps):
            self.divides = True
        inner = self.index_text(atom.value)
        inner = inner if inner.isidentifier() else f"({inner})"
        operator, word = ("//", "div") if isinstance(atom, Div) else ("%", "mod")
        divisor = self.size(atom.divisor)
        hint = f"{inner}_{word}_{divisor}" if inner.isidentifier() and divisor.isalnum() else word
        return self.emit(hint, f"{inner} {operator} {divisor}", deps, key=atom)

    # Statements

    def emit(self, hint: str, expression: str, deps: frozenset[str], key: Any = None) -> str:
        """Adds ``name = expression`` to the scope its dependencies ask for, once per key, and returns the name."""
        scope = self.scope_of(deps)
        key = ("text", expression) if key is None else key
        if key not in scope.cache:
            scope.cache[key] = self.unique(hint)
            scope.lines.append(f"{scope.cache[key]} = {expression}")
        name: str = scope.cache[key]
        return name

    def statement(self, text: str) -> None:
        """Adds a statement to the innermost scope."""
        self.scopes[-1].lines.append(text)

    def scope_of(self, deps: frozenset[str]) -> Scope:
        """Outermost open scope in which all of ``deps`` exist."""
        missing = set(deps)
        for scope in self.scopes:
            missing -= scope.variables
            if not missing:
                return scope
        raise CodegenError(f"index variables {sorted(missing)} are used outside the loop that defines them")

    def require(self, condition: str, message: str, deps: frozenset[str]) -> None:
        """Stops the kernel with ``message`` where the condition does not hold, of the values that count."""
        self.asserts = True
        mask = self.mask(deps)
        scope = self.scope_of(deps)
        text = f'tl.device_assert({condition}, "{message}"{f", mask={mask}" if mask else ""})'
        if text not in scope.lines:
            scope.lines.append(text)

    @contextmanager
    def block(self, head: str) -> Iterator[Scope]:
        """A loop or condition; it is placed when it is complete, after all that its body needed outside."""
        scope = Scope(head, set())
        self.scopes.append(scope)
        parent = self.scopes[-2]
        outside = dict(self.variables)
        yield scope
        self.scopes.pop()
        # A loop may define a variable of the same name with another mask.
        self.variables.update(outside)
        parent.lines.append(scope)

    @contextmanager
    def detached(self, deps: frozenset[str]) -> Iterator[None]:
        """Statements go as far out as ``deps`` allow: inner scopes are set aside for the duration."""
        keep = self.scopes.index(self.scope_of(deps)) + 1
        aside = self.scopes[keep:]
        del self.scopes[keep:]
        yield
        self.scopes.extend(aside)

    def body(self) -> list[str]:
        """All statements, indented as the body of a function."""
        return list(self.scopes[0].render(1))
