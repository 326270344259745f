"""Types of new nodes: an op is run on fake tensors whose sizes are the graph's own symbols.

torch keeps sizes as sympy expressions over symbols of its own; ``size_of`` turns them into ours. Fake tensors hold no
data, so the hints behind the symbols can be large primes: an accidental equality with a real size of the model, which
would make torch take a symbol for a constant, is then practically excluded.
"""

from collections.abc import Mapping, Sequence
from typing import Any

import sympy
import torch
from torch._dynamo.source import ConstantSource
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.fx import Node
from torch.fx.experimental.symbolic_shapes import DimDynamic, ShapeEnv
from torch.utils._sympy.functions import FloorDiv, Max, Min, Mod, PythonMod

from tilewright.errors import TilewrightError
from tilewright.ir.facts import SizeValue, TensorType, TupleType, fact, find_fact
from tilewright.ir.sizes import BATCH, PAGES, SEQ, SOURCE_TABLE, TABLE, TOKENS, WANTED, Size, compile_sizes

_HINTS = {BATCH: 8191, SEQ: 32749, TOKENS: 1299709, WANTED: 104729, TABLE: 15485863, SOURCE_TABLE: 27644437}
_HINTS[PAGES] = 179424673
Bounds = Mapping[sympy.Symbol, tuple[int, int | None, str]]


def size_of(value: Any, names: Mapping[sympy.Symbol, Size]) -> Size:
    """A torch size (int or SymInt) in our symbols.

    Args:
        value: ``int`` or ``torch.SymInt``.
        names: our size for each symbol of torch's shape environment.

    Raises:
        TilewrightError: a symbol of torch has no name, e.g. a size that depends on data.
    """
    if not isinstance(value, torch.SymInt):
        return int(value)
    expr = sympy.sympify(value.node.expr)
    unknown = expr.free_symbols - names.keys()
    if unknown:
        raise TilewrightError(
            f"size {expr} is not a function of the batch and the sequence length",
            why=f"it depends on {', '.join(sorted(map(str, unknown)))}",
        )
    expr = expr.xreplace(dict(names))
    expr = expr.replace(FloorDiv, lambda a, b: sympy.floor(a / b))
    expr = expr.replace(PythonMod, sympy.Mod).replace(Mod, sympy.Mod)
    expr = expr.replace(Max, sympy.Max).replace(Min, sympy.Min)
    return int(expr) if expr.is_Integer else expr


def is_prime(number: int) -> bool:
    """Trial division; the hints are small."""
    return number > 1 and all(number % k for k in range(2, int(number**0.5) + 1))


class TypeInference:
    """Types of op results over symbolic sizes; one object serves a whole graph.

    Args:
        bounds: inclusive (low, high, reason) of size symbols, as in ``GraphInfo.bounds``.
        device: where the fake tensors claim to be.
    """

    def __init__(self, bounds: Bounds | None = None, device: str | torch.device = "cpu") -> None:
        self.device = torch.device(device)
        self.bounds = dict(bounds or {})
        self._env = ShapeEnv()
        self._mode = FakeTensorMode(shape_env=self._env)
        self._symints: dict[sympy.Symbol, torch.SymInt] = {}
        self._names: dict[sympy.Symbol, Size] = {}
        self._sizes: dict[Size, int | torch.SymInt] = {}

    def _symint(self, symbol: sympy.Symbol) -> torch.SymInt:
        if symbol not in self._symints:
            high = self.bounds[symbol][1] if symbol in self.bounds else None
            hint = _HINTS.get(symbol, 65521) + len(self._symints) * 2
            if high is not None and hint > high:
                hint = next((n for n in range(high, 1, -1) if is_prime(n)), high)
            source = ConstantSource(f"size_{symbol.name}")
            inner = self._env.create_symbol(hint, source=source, dynamic_dim=DimDynamic.DYNAMIC, constraint_dim=None)
            if high is not None and high > 2:
                self._env.constrain_symbol_range(inner, compiler_min=2, compiler_max=high)
            made = self._env.create_symintnode(inner, hint=hint, source=source)
            assert isinstance(made, torch.SymInt)
            self._symints[symbol] = made
            self._names[inner] = symbol
        return self._symints[symbol]

    def symint(self, size: Size) -> int | torch.SymInt:
        """``size`` as torch sees it inside fake tensors."""
        if isinstance(size, int):
            return size
        if size not in self._sizes:
            symbols = sorted(size.free_symbols, key=str)
            self._sizes[size] = compile_sizes(symbols, (size,))(*map(self._symint, symbols))[0]
        return self._sizes[size]

    def fake(self, type_: TensorType) -> torch.Tensor:
        """A contiguous fake tensor of that type."""
        with self._mode:
            return torch.empty([self.symint(s) for s in type_.shape], dtype=type_.dtype, device=self.device)

    def size(self, value: Any) -> Size:
        """A size that came out of a fake tensor, in our symbols."""
        return size_of(value, self._names)

    def record(self, value: Any) -> TensorType | TupleType | SizeValue:
        """The fact that describes a result of an op run on fake tensors.

        Raises:
            TilewrightError: the result is neither a tensor, an integer nor a sequence of tensors.
        """
        if isinstance(value, torch.Tensor):
            return TensorType(tuple(self.size(s) for s in value.shape), value.dtype)
        if isinstance(value, int | torch.SymInt) and not isinstance(value, bool):
            return SizeValue(self.size(value))
        if isinstance(value, Sequence) and all(isinstance(item, torch.Tensor) for item in value):
            return TupleType(tuple(TensorType(tuple(map(self.size, t.shape)), t.dtype) for t in value))
        raise TilewrightError(f"a result of type {type(value).__name__} has no place in the graph")

    def value(self, node: Node) -> Any:
        """What the node yields, as fake tensor, tuple of fake tensors or symbolic integer, from its facts."""
        size = find_fact(node, SizeValue)
        if size is not None:
            return self.symint(size.value)
        items = find_fact(node, TupleType)
        if items is not None:
            return tuple(self.fake(item) for item in items.items)
        return self.fake(fact(node, TensorType))

    def result_type(self, target: Any, args: Any, kwargs: Any) -> TensorType | TupleType | SizeValue:
        """Type of ``target(*args, **kwargs)``; nodes among the arguments stand for their values."""
        args = torch.fx.node.map_arg(args, self.value)
        kwargs = torch.fx.node.map_arg(kwargs, self.value)
        with self._mode, torch.no_grad():
            return self.record(target(*args, **kwargs))
