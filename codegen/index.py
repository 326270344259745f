"""Index expressions of kernels: sums of index variables times sizes, with the simplifications that undo reshapes.

A view op is no code: it is a map from the index of its result to the index of its source. A reshape gives
``(linear // stride) % size`` for each axis; the rules here turn ``(64 * h + d) // 64`` back into ``h`` when d is known
to be below 64, and ``S * (r // S) + r % S`` back into ``r``.
"""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from functools import lru_cache

import sympy

from tilewright.ir.sizes import Size, contiguous_strides, product


@dataclass(frozen=True)
class Leaf:
    """A variable of the kernel.

    Attributes:
        name: its name in the kernel's text.
        bound: values are in [0, bound); None when unknown.
        deps: names of the index variables its value varies with.
    """

    name: str
    bound: Size | None
    deps: frozenset[str]


@dataclass(frozen=True)
class Div:
    """``value // divisor`` of a value that is not negative."""

    value: "Index"
    divisor: Size


@dataclass(frozen=True)
class Mod:
    """``value % divisor`` of a value that is not negative."""

    value: "Index"
    divisor: Size


Atom = Leaf | Div | Mod


@dataclass(frozen=True)
class Index:
    """``const`` plus the sum of ``coefficient * atom``; coefficients are sizes. Immutable; atoms are distinct."""

    terms: tuple[tuple[Atom, Size], ...] = ()
    const: Size = 0

    def __add__(self, other: "Index | Size") -> "Index":
        other = other if isinstance(other, Index) else Index((), other)
        sums: dict[Atom, Size] = dict(self.terms)
        for atom, factor in other.terms:
            sums[atom] = _tidy(sums.get(atom, 0) + factor)
        return _merge(sums, _tidy(self.const + other.const))

    def __mul__(self, factor: Size) -> "Index":
        if factor == 0:
            return Index()
        return Index(tuple((atom, _tidy(c * factor)) for atom, c in self.terms), _tidy(self.const * factor))

    def __floordiv__(self, divisor: Size) -> "Index":
        if divisor == 1:
            return self
        whole, rest = self._split(divisor)
        if rest.below(divisor):
            return whole
        if len(rest.terms) == 1 and rest.const == 0 and rest.terms[0][1] == 1 and isinstance(rest.terms[0][0], Div):
            inner = rest.terms[0][0]
            return whole + inner.value // _tidy(inner.divisor * divisor)
        if (shared := rest._shared(divisor)) is not None:
            return whole + shared.quotient // shared.divisor
        return whole + Index(((Div(rest, divisor), 1),))

    def __mod__(self, divisor: Size) -> "Index":
        if divisor == 1:
            return Index()
        _, rest = self._split(divisor)
        if rest.below(divisor):
            return rest
        if (shared := rest._shared(divisor)) is not None:
            return shared.quotient % shared.divisor * shared.factor + shared.rest
        return Index(((Mod(rest, divisor), 1),))

    def _shared(self, divisor: Size) -> "_Shared | None":
        """``self == factor * quotient + rest`` with rest below a factor that the divisor has too, or None."""
        for _, factor in self.terms:
            reduced = None if factor == 1 else _divide(divisor, factor)
            if reduced is not None:
                quotient, rest = self._split(factor)
                if rest.below(factor):
                    return _Shared(factor, reduced, quotient, rest)
        return None

    def _split(self, divisor: Size) -> tuple["Index", "Index"]:
        """``(q, r)`` with ``self == divisor * q + r``, q as large as the coefficients show."""
        whole: list[tuple[Atom, Size]] = []
        rest: list[tuple[Atom, Size]] = []
        for atom, factor in self.terms:
            quotient = _divide(factor, divisor)
            (rest if quotient is None else whole).append((atom, factor if quotient is None else quotient))
        constant = _divide(self.const, divisor)
        if constant is None and isinstance(self.const, int) and isinstance(divisor, int):
            high, low = divmod(self.const, divisor)
            return Index(tuple(whole), high), Index(tuple(rest), low)
        if constant is None:
            return Index(tuple(whole)), Index(tuple(rest), self.const)
        return Index(tuple(whole), constant), Index(tuple(rest))

    def below(self, limit: Size) -> bool:
        """Whether every value is provably in [0, limit)."""
        greatest = self.const
        if _sign(self.const) is False:
            return False
        for atom, factor in self.terms:
            bound = bound_of(atom)
            if bound is None or _sign(factor) is not True:
                return False
            greatest = greatest + factor * (bound - 1)
        return _sign(limit - 1 - greatest) is True

    @property
    def deps(self) -> frozenset[str]:
        """Names of the index variables the value varies with."""
        return frozenset(name for atom, _ in self.terms for name in _atom_deps(atom))

    def leaves(self) -> Iterator[Leaf]:
        """All variables in it."""
        for atom, _ in self.terms:
            if isinstance(atom, Leaf):
                yield atom
            else:
                yield from atom.value.leaves()


@dataclass(frozen=True)
class _Shared:
    """A common factor of an index and a divisor; ``divisor`` is what is left of that."""

    factor: Size
    divisor: Size
    quotient: Index
    rest: Index


def constant(value: Size) -> Index:
    """An index that does not vary."""
    return Index((), value)


def variable(name: str, bound: Size | None, deps: frozenset[str] | None = None) -> Index:
    """An index that is one variable of the kernel; it varies with itself unless ``deps`` says otherwise."""
    return Index(((Leaf(name, bound, frozenset((name,)) if deps is None else deps), 1),))


def linear(index: Sequence[Index], strides: Sequence[Size]) -> Index:
    """``sum(index * stride)``."""
    total = Index()
    for part, stride in zip(index, strides, strict=True):
        total = total + part * stride
    return total


def unravel(position: Index, shape: Sequence[Size]) -> tuple[Index, ...]:
    """Index into ``shape`` of a row-major position."""
    parts = []
    strides = contiguous_strides(shape)
    for axis, (size, stride) in enumerate(zip(shape, strides, strict=True)):
        part = position // stride
        # The position lies inside the shape, so the first axis needs no remainder.
        parts.append(constant(0) if size == 1 else part if not any(s != 1 for s in shape[:axis]) else part % size)
    return tuple(parts)


def reshape(index: Sequence[Index], old: Sequence[Size], new: Sequence[Size]) -> tuple[Index, ...]:
    """Index into a tensor of shape ``old`` of the element at ``index`` of its reshape to ``new``."""
    if tuple(old) == tuple(new):
        return tuple(index)
    return unravel(linear(index, contiguous_strides(new)), old)


def without_ones(index: Sequence[Index], shape: Sequence[Size]) -> tuple[Index, ...]:
    """The same place with 0 along axes of size 1, whatever variable runs along them."""
    return tuple(constant(0) if size == 1 else at for at, size in zip(index, shape, strict=True))


def same_size(left: Size, right: Size) -> bool:
    """Whether two sizes are equal for all values of their symbols."""
    return left == right or sympy.expand(sympy.sympify(left) - right) == 0


def same_count(left: Sequence[Size], right: Sequence[Size]) -> bool:
    """Whether two shapes have the same number of elements."""
    return same_size(product(left), product(right))


def bound_of(atom: Atom) -> Size | None:
    """Exclusive upper bound of an atom's values, if known."""
    if isinstance(atom, Leaf):
        return atom.bound
    if isinstance(atom, Mod):
        return atom.divisor
    inner = _bound(atom.value)
    if inner is None:
        return None
    if isinstance(inner, int) and isinstance(atom.divisor, int):
        return -(-inner // atom.divisor)
    return _divide(inner, atom.divisor)


def _bound(index: Index) -> Size | None:
    greatest: Size = index.const
    for atom, factor in index.terms:
        bound = bound_of(atom)
        if bound is None or _sign(factor) is not True:
            return None
        greatest = greatest + factor * (bound - 1)
    return _tidy(greatest + 1)


def _atom_deps(atom: Atom) -> frozenset[str]:
    return atom.deps if isinstance(atom, Leaf) else atom.value.deps


def _merge(sums: dict[Atom, Size], const: Size) -> Index:
    """Turns ``c * n * (e // n) + c * (e % n)`` into ``c * e`` wherever it stands."""
    for atom, factor in list(sums.items()):
        if not isinstance(atom, Mod) or atom not in sums or factor == 0:
            continue
        partner = atom.value // atom.divisor
        if partner.const != 0 or len(partner.terms) != 1 or partner.terms[0][1] != 1:
            continue
        quotient = partner.terms[0][0]
        if quotient in sums and same_size(sums[quotient], factor * atom.divisor):
            del sums[quotient], sums[atom]
            rest = Index(tuple((a, f) for a, f in sums.items() if f != 0), const)
            return rest + atom.value * factor
    return Index(tuple(sorted(((a, f) for a, f in sums.items() if f != 0), key=repr)), const)


def _tidy(size: Size) -> Size:
    if isinstance(size, int):
        return size
    size = sympy.expand(size)
    return int(size) if size.is_Integer else size


def _divide(size: Size, divisor: Size) -> Size | None:
    if isinstance(size, int) and isinstance(divisor, int):
        return size // divisor if size % divisor == 0 else None
    return _divide_symbolic(sympy.sympify(size), sympy.sympify(divisor))


@lru_cache(maxsize=4096)
def _divide_symbolic(size: sympy.Expr, divisor: sympy.Expr) -> Size | None:
    """The quotient when it is a polynomial with integer coefficients, else None."""
    quotient = sympy.cancel(size / divisor)
    if sympy.fraction(quotient)[1] != 1 or any(not c.is_Integer for c in quotient.as_coefficients_dict().values()):
        return None
    return _tidy(quotient)


def _sign(size: Size) -> bool | None:
    """True when never negative, False when it may be known negative, None when unknown."""
    if isinstance(size, int):
        return size >= 0
    nonnegative: bool | None = sympy.expand(size).is_nonnegative
    return nonnegative
