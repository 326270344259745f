"""Checked mode: every access to the caller's memory is tested before it happens.

A pointer made from one parameter may touch the memory of that argument and no other, which takes a subtraction and a
comparison; one made from several, that of any of them. A pointer made from a number, or read from memory, is looked
up among all ranges of the table. A lane that a mask switches off is never tested, and scratch memory is not either.
"""

from collections.abc import Sequence

from tilewright.codegen.cpu.lower.context import Context
from tilewright.codegen.cpu.lower.lanes import Affine, Lane, Mask, Uniform, width_of
from tilewright.codegen.cpu.lower.stop import site_of, stop_if
from tilewright.codegen.cpu.ttir.origin import Origins
from tilewright.codegen.cpu.ttir.records import I32, I64, Op
from tilewright.ir.stops import TABLE_RANGES

_FIRST, _SEARCH = "@tw.first", "@tw.search"
# Address of the first of some accesses at even distances that leaves [low, low + limit).
_FIRST_IR = f"""define internal i64 {_FIRST}(i64 %start, i64 %stride, i64 %low, i64 %limit) cold noinline nounwind {{
entry:
  br label %lane
lane:
  %address = phi i64 [ %start, %entry ], [ %next, %lane ]
  %offset = sub i64 %address, %low
  %inside = icmp ult i64 %offset, %limit
  %next = add i64 %address, %stride
  br i1 %inside, label %lane, label %done
done:
  ret i64 %address
}}
"""
# Number of the first lane, of those whose bit is set, that no range of the table holds, or -1.
_SEARCH_IR = f"""define internal i64 {_SEARCH}(ptr %table, ptr %addresses, i64 %lanes, i64 %bits, i64 %bytes)
    noinline nounwind {{
entry:
  %ranges.at = getelementptr i64, ptr %table, i64 1
  %ranges = load ptr, ptr %ranges.at
  %count.at = getelementptr i64, ptr %table, i64 2
  %count = load i64, ptr %count.at
  br label %lane
lane:
  %i = phi i64 [ 0, %entry ], [ %following, %good ]
  %more = icmp ult i64 %i, %lanes
  br i1 %more, label %test, label %none
test:
  %bit = lshr i64 %bits, %i
  %on = trunc i64 %bit to i1
  br i1 %on, label %read, label %good
read:
  %address.at = getelementptr i64, ptr %addresses, i64 %i
  %address = load i64, ptr %address.at
  %end = add i64 %address, %bytes
  br label %halve
halve:
  %low = phi i64 [ 0, %read ], [ %new.low, %step ]
  %high = phi i64 [ %count, %read ], [ %new.high, %step ]
  %some = icmp ult i64 %low, %high
  br i1 %some, label %step, label %found
step:
  %sum = add i64 %low, %high
  %middle = lshr i64 %sum, 1
  %middle.word = shl i64 %middle, 1
  %start.at = getelementptr i64, ptr %ranges, i64 %middle.word
  %start = load i64, ptr %start.at
  %after = icmp ule i64 %start, %address
  %above = add i64 %middle, 1
  %new.low = select i1 %after, i64 %above, i64 %low
  %new.high = select i1 %after, i64 %high, i64 %middle
  br label %halve
found:
  %any = icmp ne i64 %low, 0
  br i1 %any, label %compare, label %bad
compare:
  %last = sub i64 %low, 1
  %last.word = shl i64 %last, 1
  %end.word = or i64 %last.word, 1
  %range.end.at = getelementptr i64, ptr %ranges, i64 %end.word
  %range.end = load i64, ptr %range.end.at
  %fits = icmp ule i64 %end, %range.end
  br i1 %fits, label %good, label %bad
good:
  %following = add i64 %i, 1
  br label %lane
bad:
  ret i64 %i
none:
  ret i64 -1
}}
"""


class Checks:
    """Writes the tests of one kernel.

    Attributes:
        searches: whether some pointer comes from a number or from memory.
    """

    def __init__(self, ctx: Context, origins: Origins) -> None:
        self._ctx, self._origins = ctx, origins
        self._ranges: dict[int, tuple[str, str]] = {}
        self.searches = False

    def access(self, op: Op, pointer: Lane, mask: Mask | None, floor: int, kind: str) -> None:
        """Tests one access.

        Args:
            op: its first operand holds the pointers.
            pointer: addresses.
            mask: lanes that are accessed, all when None.
            floor: outermost scope level the access may move to.
            kind: load, store or atomic.
        """
        mask = None if mask is None or mask.all_true else mask
        if mask is not None and mask.uniform == "false":
            return
        site, origin, size = self._site(op, kind)
        if origin is None:
            self._search(site, pointer, mask, floor, size)
        elif len(origin) == 1 and not isinstance(pointer, Uniform) and _is_run(pointer, mask):
            assert isinstance(pointer, Affine)
            self._run(site, pointer, mask, floor, size, next(iter(origin)))
        else:
            self._lanes(site, pointer, mask, floor, size, sorted(origin))

    def can_test_tile(self, op: Op) -> bool:
        """Whether ``tile`` can test a load: it belongs to one parameter. If not it has to go lane by lane."""
        origin = self._origins.of(op.operands[0])
        return origin is not None and len(origin) == 1

    def tile(self, op: Op, base: str, strides: Sequence[str]) -> None:
        """Tests, where the code stands, a tile that is read in place: if its corners are inside, all of it is.

        Args:
            op: the load that it stands for.
            base: address of the first element.
            strides: i64 distances of neighbours along each axis, in elements.
        """
        site, origin, size = self._site(op, "load")
        assert origin is not None
        b = self._ctx.b
        corners = [b.emit(f"ptrtoint ptr {base} to i64")]
        for stride, count in zip(strides, op.result.shape, strict=True):
            if count > 1:
                reach = b.emit(f"mul i64 {stride}, {(count - 1) * size}")
                corners += [b.emit(f"add i64 {corner}, {reach}") for corner in corners]
        bad, address = "false", corners[0]
        for corner in corners:
            outside = self._outside(corner, size, next(iter(origin)))
            address = b.emit(f"select i1 {bad}, i64 {address}, i64 {corner}")
            bad = b.emit(f"or i1 {bad}, {outside}")
        stop_if(self._ctx, bad, b.depth, site, address)

    def _site(self, op: Op, kind: str) -> tuple[dict[str, object], frozenset[int] | None, int]:
        pointer = op.operands[0]
        origin = self._origins.of(pointer)
        pointee = pointer.elem.pointee
        assert pointee is not None
        known = sorted(origin) if origin is not None else None
        return site_of(self._ctx, op, kind, bytes=pointee.size, parameters=known), origin, pointee.size

    def _range(self, parameter: int) -> tuple[str, str]:
        """First address and bytes of an argument's memory, read where the kernel starts."""
        if parameter not in self._ranges:
            b = self._ctx.b
            refs = []
            for word in (0, 1):
                at = b.emit(f"getelementptr i64, ptr {self._ctx.table}, i64 {TABLE_RANGES + 2 * parameter + word}")
                refs.append(b.load(f"load i64, ptr {at}, align 8", 0))
            self._ranges[parameter] = (refs[0], refs[1])
        return self._ranges[parameter]

    def _limit(self, parameter: int, size: int) -> str:
        """Offsets below it are those at which an access of ``size`` bytes fits."""
        nbytes = self._range(parameter)[1]
        return self._ctx.b.emit(f"call i64 @llvm.usub.sat.i64(i64 {nbytes}, i64 {size - 1})")

    def _outside(self, address: str, size: int, parameter: int, width: int = 0) -> str:
        """i1, or a vector of them: whether an access leaves an argument's memory."""
        b = self._ctx.b
        low, limit = self._range(parameter)[0], self._limit(parameter, size)
        type_ = "i64"
        if width:
            type_ = f"<{width} x i64>"
            low, limit = (b.vector_of_scalar(ref, "i64", width) for ref in (low, limit))
        return b.emit(f"icmp uge {type_} {b.emit(f'sub {type_} {address}, {low}')}, {limit}")

    def _run(
        self, site: dict[str, object], pointer: Affine, mask: Mask | None, floor: int, size: int, parameter: int
    ) -> None:
        """Lanes at even distances, the first ones of a vector: the first and the last decide."""
        b = self._ctx.b
        base = b.emit(f"ptrtoint ptr {pointer.base} to i64")
        stride = b.int_op("mul", str(pointer.stride), str(size), I64)
        last, flags = str(pointer.width - 1), []
        if mask is not None and mask.bound is not None:
            number = b.int_max(b.int_min(mask.bound, str(pointer.width)), "1")
            last = b.int_op("sub", b.widen_index(number, I32), "1", I64)
            flags.append(b.emit(f"icmp sgt i32 {mask.bound}, 0"))
        if mask is not None and mask.uniform is not None:
            flags.append(mask.uniform)
        end = b.int_op("add", base, b.int_op("mul", stride, last, I64), I64)
        bad = b.emit(f"or i1 {self._outside(base, size, parameter)}, {self._outside(end, size, parameter)}")
        for flag in flags:
            bad = b.emit(f"and i1 {bad}, {flag}")
        self._ctx.functions[_FIRST] = _FIRST_IR
        low, limit = self._range(parameter)[0], self._limit(parameter, size)
        address = b.fresh("address")
        find = f"{address} = call i64 {_FIRST}(i64 {base}, i64 {stride}, i64 {low}, i64 {limit})"
        stop_if(self._ctx, bad, max(b.level_of(bad), floor), site, address, [find])

    def _lanes(
        self,
        site: dict[str, object],
        pointer: Lane,
        mask: Mask | None,
        floor: int,
        size: int,
        parameters: Sequence[int],
    ) -> None:
        """Any addresses, each lane for itself."""
        b = self._ctx.b
        width = width_of(pointer) if mask is None else max(width_of(pointer), _needed(mask))
        pointers = b.vector(pointer, width) if width else _ref(pointer)
        kind = f"<{width} x {{}}>" if width else "{}"
        addresses = b.emit(f"ptrtoint {kind.format('ptr')} {pointers} to {kind.format('i64')}")
        flag = kind.format("i1")
        outside = [self._outside(addresses, size, parameter, width) for parameter in parameters]
        if mask is not None:
            outside.append(b.vector(mask, width) if width else mask.uniform or "true")
        bad = outside[0]
        for part in outside[1:]:
            bad = b.emit(f"and {flag} {bad}, {part}")
        if not width:
            stop_if(self._ctx, bad, max(b.level_of(bad), floor), site, addresses)
            return
        any_bad = b.emit(f"call i1 @llvm.vector.reduce.or.v{width}i1(<{width} x i1> {bad})")
        bits, lane, address = (b.fresh(hint) for hint in ("bits", "lane", "address"))
        find = [
            f"{bits} = bitcast <{width} x i1> {bad} to i{width}",
            f"{lane} = call i{width} @llvm.cttz.i{width}(i{width} {bits}, i1 true)",
            f"{address} = extractelement <{width} x i64> {addresses}, i{width} {lane}",
        ]
        stop_if(self._ctx, any_bad, max(b.level_of(any_bad), floor), site, address, find)

    def _search(self, site: dict[str, object], pointer: Lane, mask: Mask | None, floor: int, size: int) -> None:
        """Pointers of unknown origin, looked up among all memory that may be touched."""
        self.searches = True
        ctx, b = self._ctx, self._ctx.b
        ctx.functions[_SEARCH] = _SEARCH_IR
        width = width_of(pointer) if mask is None else max(width_of(pointer), _needed(mask))
        lanes = max(width, 1)
        pointers = b.vector(pointer, width) if width else _ref(pointer)
        bits = "-1"
        if mask is not None:
            flags = b.vector(mask, width) if width else mask.uniform or "true"
            packed = b.emit(f"bitcast <{width} x i1> {flags} to i{width}") if width else flags
            bits = b.emit(f"zext i{lanes} {packed} to i64") if lanes < 64 else packed
        level = max(b.level_of(pointers, bits), floor)
        place = b.alloca(8 * lanes)
        b.effect(f"store {f'<{width} x ptr>' if width else 'ptr'} {pointers}, ptr {place}, align 8", level)
        call = f"call i64 {_SEARCH}(ptr {ctx.table}, ptr {place}, i64 {lanes}, i64 {bits}, i64 {size})"
        found = b.effect_value(call, level)
        at, address = b.fresh("at"), b.fresh("address")
        find = [f"{at} = getelementptr i64, ptr {place}, i64 {found}", f"{address} = load i64, ptr {at}, align 8"]
        stop_if(ctx, b.emit(f"icmp sge i64 {found}, 0"), level, site, address, find)


def _is_run(pointer: Lane, mask: Mask | None) -> bool:
    return isinstance(pointer, Affine) and (mask is None or mask.vector is None)


def _needed(mask: Mask) -> int:
    """Lanes of a mask that does not hold for all of them alike."""
    return mask.width if mask.bound is not None or mask.vector is not None else 0


def _ref(lane: Lane) -> str:
    assert isinstance(lane, Uniform)
    return lane.ref
