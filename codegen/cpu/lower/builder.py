"""LLVM IR text with nested scopes: instructions go to the outermost loop that has their operands.

Each loop body and branch is a scope with a level and a text of its own, put together when it closes. So a pure
instruction whose operands are known outside a loop is written outside it, even while the loop is being written,
and repeated instructions are written once per scope.
"""

import itertools
import re
from collections.abc import Callable, Hashable, Sequence
from dataclasses import dataclass, field
from typing import Any

Typed = tuple[str, str]
_REF = re.compile(r"%[\w.]+")


@dataclass(eq=False)
class Scope:
    """One stretch of code in which everything written before dominates everything written after.

    Attributes:
        assumed: names of conditions that hold wherever this code runs.
    """

    level: int
    label: str
    lines: list[str] = field(default_factory=list)
    known: dict[str, str] = field(default_factory=dict)
    memo: dict[Hashable, Any] = field(default_factory=dict)
    assumed: set[str] = field(default_factory=set)


class Builder:
    """Writes one LLVM function body.

    Attributes:
        scopes: open scopes, from the outside in.
        allocas: scratch memory of the function.
        exits: blocks that leave the function early; each ends by a branch to the block ``exit``.
    """

    def __init__(self) -> None:
        self._counter = itertools.count()
        self._levels: dict[str, int] = {}
        self.scopes = [Scope(0, "entry")]
        self.allocas: list[str] = []
        self.frees: list[str] = []
        self.exits: list[str] = []

    @property
    def scope(self) -> Scope:
        """The innermost open scope."""
        return self.scopes[-1]

    @property
    def depth(self) -> int:
        """Level of the innermost open scope."""
        return len(self.scopes) - 1

    def level_of(self, *refs: str) -> int:
        """Level of the outermost scope in which all of ``refs`` are known; constants are known everywhere."""
        return max((self._levels.get(name, 0) for ref in refs for name in _REF.findall(ref)), default=0)

    def fresh(self, hint: str = "v") -> str:
        return f"%{hint}{next(self._counter)}"

    def define(self, name: str, level: int | None = None) -> str:
        """Registers a name at a level (default: the innermost)."""
        self._levels[name] = self.depth if level is None else level
        return name

    def emit(self, text: str, floor: int = 0) -> str:
        """Writes a pure instruction; returns the name of its value.

        Args:
            text: the instruction without its name; it must be safe to run even where control would not reach it.
            floor: lowest level it may go to.
        """
        level = max(self.level_of(text), floor)
        for scope in self.scopes[: level + 1]:
            if (name := scope.known.get(text)) is not None:
                return name
        name = self.define(self.fresh(), level)
        scope = self.scopes[level]
        scope.lines.append(f"  {name} = {text}")
        scope.known[text] = name
        return name

    def load(self, text: str, floor: int) -> str:
        """Writes a read of memory: as ``emit``, but never merged with another one."""
        level = max(self.level_of(text), floor)
        name = self.define(self.fresh(), level)
        self.scopes[level].lines.append(f"  {name} = {text}")
        return name

    def effect(self, text: str, level: int | None = None) -> None:
        """Writes an instruction with an effect and no value, at a level (default: the innermost)."""
        self.scopes[self.depth if level is None else level].lines.append(f"  {text}")

    def effect_value(self, text: str, level: int | None = None) -> str:
        """Writes an instruction with an effect and a value, at a level (default: the innermost)."""
        name = self.define(self.fresh(), level)
        self.effect(f"{name} = {text}", level)
        return name

    def local(self, ref: str, type_: str = "i32") -> str:
        """An integer under a name of the innermost scope: what is made of it stays in there."""
        return self.effect_value(f"add {type_} {ref}, 0")

    def leave(self, condition: str, level: int, last: Sequence[str] = ()) -> None:
        """Leaves the function, where a condition holds, from the end of what is written at a level so far.

        Args:
            condition: i1, known at the level.
            last: instructions to run before; whatever is known at the level may be used in them.
        """
        scope = self.scopes[level]
        out = "exit"
        stay = self.fresh("stay")[1:]
        if last:
            out = self.fresh("leave")[1:]
            self.exits += [f"{out}:", *(f"  {line}" for line in last), "  br label %exit"]
        scope.lines += [f"  br i1 {condition}, label %{out}, label %{stay}", f"{stay}:"]
        scope.label = stay

    def alloca(self, nbytes: int) -> str:
        """Scratch memory of the whole function, 64-byte aligned."""
        name = self.define(self.fresh("scratch"), 0)
        self.allocas.append(f"  {name} = alloca [{max(nbytes, 1)} x i8], align 64")
        return name

    def allocate(self, nbytes: int) -> str:
        """The same from the heap, taken before the first program and given back behind the last one."""
        name = self.define(self.fresh("heap"), 0)
        size = -(-nbytes // 64) * 64
        self.allocas.append(f"  {name} = call noalias ptr @aligned_alloc(i64 64, i64 {size})")
        self.frees.append(f"  call void @free(ptr {name})")
        return name

    def memoized(self, key: Hashable) -> Any | None:
        """A result stored in this scope or one around it."""
        for scope in self.scopes:
            if (found := scope.memo.get(key)) is not None:
                return found
        return None

    def memoize(self, key: Hashable, result: Any, level: int) -> None:
        self.scopes[level].memo[key] = result

    def assume(self, condition: str) -> None:
        """Records that a condition holds until the innermost scope is closed."""
        self.scope.assumed.add(condition)

    def assumed_at(self, condition: str | None) -> int | None:
        """Level of the outermost scope in which a condition is known to hold; None if it is not."""
        return next((scope.level for scope in self.scopes if condition in scope.assumed), None)

    def open(self, label: str | None = None) -> Scope:
        """Opens a scope inside the innermost one."""
        label = label or self.fresh("b")[1:]
        self.scopes.append(Scope(len(self.scopes), label, [f"{label}:"]))
        return self.scope

    def close(self) -> Scope:
        """Closes the innermost scope; its text still has to be attached to its parent."""
        return self.scopes.pop()

    def label(self, name: str) -> None:
        """Starts a new basic block in the innermost scope."""
        self.scope.lines.append(f"{name}:")
        self.scope.label = name

    def loop(
        self,
        lo: str,
        hi: str,
        step: str,
        init: Sequence[Typed],
        body: Callable[[str, list[str]], Sequence[str]],
        *,
        index_type: str = "i32",
        small: bool = True,
    ) -> list[str]:
        """``for index in range(lo, hi, step)`` with carried values.

        Args:
            small: the index is not negative and far from overflow, as those of a tile are.
            init: (LLVM type, value) of each carried value before the loop.
            body: writes the body, given the index and the carried values; returns their next values.

        Returns:
            The carried values after the loop.
        """
        head, done = self.fresh("head")[1:], self.fresh("done")[1:]
        self.open()
        index = self.define(self.fresh("i"))
        carried = [self.define(self.fresh("c")) for _ in init]
        entry_label = self.scope.label
        following = body(index, carried)
        following_index = self.fresh("i")
        self.effect(f"{following_index} = add {'nuw nsw ' if small else ''}{index_type} {index}, {step}")
        self.effect(f"br label %{head}")
        inner = self.close()
        outer = self.scope
        outer.lines += [f"  br label %{head}", f"{head}:"]
        outer.lines.append(f"  {index} = phi {index_type} [{lo}, %{outer.label}], [{following_index}, %{inner.label}]")
        for name, (type_, first), last in zip(carried, init, following, strict=True):
            outer.lines.append(f"  {name} = phi {type_} [{first}, %{outer.label}], [{last}, %{inner.label}]")
            self.define(name)
        more = self.fresh("more")
        outer.lines.append(f"  {more} = icmp slt {index_type} {index}, {hi}")
        outer.lines.append(f"  br i1 {more}, label %{entry_label}, label %{done}")
        outer.lines += inner.lines
        self.label(done)
        return carried

    def while_loop(
        self,
        init: Sequence[Typed],
        test: Callable[[list[str]], tuple[str, Sequence[Typed]]],
        body: Callable[[list[str]], Sequence[str]],
    ) -> list[str]:
        """A loop with the test at its head.

        Args:
            test: writes the test, given the carried values; returns the condition and the values it passes on.
            body: writes the body, given the values passed on; returns the next carried values.

        Returns:
            The values passed on by the test that ended the loop.
        """
        done = self.fresh("done")[1:]
        head = self.open().label
        carried = [self.define(self.fresh("c")) for _ in init]
        at = len(self.scope.lines)
        condition, passed = test(carried)
        self.open()
        body_label = self.scope.label
        following = body([ref for _, ref in passed])
        self.effect(f"br label %{head}")
        inner = self.close()
        self.effect(f"br i1 {condition}, label %{body_label}, label %{done}")
        scope = self.close()
        outer = self.scope
        phis = [
            f"  {name} = phi {type_} [{first}, %{outer.label}], [{last}, %{inner.label}]"
            for name, (type_, first), last in zip(carried, init, following, strict=True)
        ]
        outer.lines.append(f"  br label %{head}")
        outer.lines += [*scope.lines[:at], *phis, *scope.lines[at:], *inner.lines]
        self.label(done)
        for _, ref in passed:
            self.lower_level(ref)
        return [ref for _, ref in passed]

    def lower_level(self, ref: str) -> None:
        """Makes a value of a closed scope known in the innermost one, which it dominates."""
        if ref.startswith("%"):
            self._levels[ref] = min(self._levels[ref], self.depth)

    def branch(
        self,
        condition: str,
        then: Callable[[], Sequence[str]],
        otherwise: Callable[[], Sequence[str]] | None = None,
        types: Sequence[str] = (),
    ) -> list[str]:
        """``if``: writes both sides and joins their values of the LLVM ``types``."""
        done = self.fresh("done")[1:]
        sides: list[tuple[Scope, str, Sequence[str]]] = []
        for side in (then, otherwise):
            if side is None:
                continue
            entry = self.open().label
            values = side()
            self.effect(f"br label %{done}")
            sides.append((self.close(), entry, values))
        targets = [entry for _, entry, _ in sides] + [done]
        outer = self.scope
        outer.lines.append(f"  br i1 {condition}, label %{targets[0]}, label %{targets[1]}")
        for scope, _, _ in sides:
            outer.lines += scope.lines
        self.label(done)
        joined = []
        for index, type_ in enumerate(types):
            arms = ", ".join(f"[{values[index]}, %{scope.label}]" for scope, _, values in sides)
            joined.append(self.define(self.fresh("c")))
            self.scope.lines.append(f"  {joined[-1]} = phi {type_} {arms}")
        return joined
