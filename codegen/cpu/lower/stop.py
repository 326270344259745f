"""How a kernel stops itself: one program puts on record why, and all programs return.

Kernels that can stop have one more argument slot, the address of a ``tilewright.ir.stops.MemoryTable``. Leaving is a
branch to the end of the function, possible from any loop because nothing is pending in a kernel. Other programs
look at the record when they start and in each iteration of the kernel's own loops, so that one that waits for a
stopped program ends as well.
"""

import json

from tilewright.codegen.cpu.lower.context import Context
from tilewright.codegen.cpu.ttir.records import Op

_STOP = "@tw.stop"
# Only the first program to stop writes; the state says 2 when all words are there.
_STOP_IR = f"""define internal void {_STOP}(ptr %table, ptr %site, i64 %address, i32 %x, i32 %y, i32 %z)
    cold noinline nounwind {{
  %record = load ptr, ptr %table
  %pair = cmpxchg ptr %record, i64 0, i64 1 acq_rel monotonic
  %first = extractvalue {{ i64, i1 }} %pair, 1
  br i1 %first, label %write, label %done
write:
  %site.at = getelementptr i64, ptr %record, i64 1
  store ptr %site, ptr %site.at
  %address.at = getelementptr i64, ptr %record, i64 2
  store i64 %address, ptr %address.at
  %x64 = zext i32 %x to i64
  %x.at = getelementptr i64, ptr %record, i64 3
  store i64 %x64, ptr %x.at
  %y64 = zext i32 %y to i64
  %y.at = getelementptr i64, ptr %record, i64 4
  store i64 %y64, ptr %y.at
  %z64 = zext i32 %z to i64
  %z.at = getelementptr i64, ptr %record, i64 5
  store i64 %z64, ptr %z.at
  %table.at = getelementptr i64, ptr %record, i64 6
  store ptr %table, ptr %table.at
  store atomic i64 2, ptr %record release, align 8
  br label %done
done:
  ret void
}}
"""


def bind_table(ctx: Context, slot: int) -> None:
    """Reads the address of the table, once, from its slot; programs do not start when one has stopped."""
    lines = ctx.b.scopes[0].lines
    lines.append(f"  %table.slot = getelementptr i8, ptr %args, i64 {8 * slot}")
    lines.append("  %table = load ptr, ptr %table.slot, align 8")
    lines.append("  %record = load ptr, ptr %table, align 8")
    ctx.table = ctx.b.define("%table", 0)
    ctx.b.define("%record", 0)
    leave_if_stopped(ctx)


def leave_if_stopped(ctx: Context) -> None:
    """Returns when some program has stopped the kernel; nothing in a kernel that never stops."""
    if ctx.table is None:
        return
    state = ctx.b.effect_value("load atomic i64, ptr %record monotonic, align 8")
    ctx.b.leave(ctx.b.emit(f"icmp ne i64 {state}, 0"), ctx.b.depth)


def stop_if(
    ctx: Context,
    condition: str,
    level: int,
    site: dict[str, object],
    address: str = "0",
    before: list[str] | None = None,
) -> None:
    """Stops the kernel where a condition holds.

    Args:
        condition: i1, known at the level.
        level: scope level at whose end the test is written.
        site: what and where it is, for the error.
        address: i64 to put on record.
        before: instructions that compute it.
    """
    assert ctx.table is not None
    ctx.functions[_STOP] = _STOP_IR
    ids = ", ".join(f"i32 {ctx.program_ids[axis]}" for axis in "xyz")
    call = f"call void {_STOP}(ptr {ctx.table}, ptr {_text(ctx, site)}, i64 {address}, {ids})"
    ctx.b.leave(condition, level, [*(before or []), call])


def site_of(ctx: Context, op: Op, kind: str, **more: object) -> dict[str, object]:
    """Record of a place in a kernel: kind (load, store, atomic or assert), kernel and Python line."""
    return {"kind": kind, "kernel": ctx.kernel, "line": op.loc, **more}


def _text(ctx: Context, site: dict[str, object]) -> str:
    """A constant with the site as JSON."""
    data = json.dumps(site).encode() + b"\0"
    escaped = "".join(f"\\{byte:02X}" for byte in data)
    for name, text in ctx.functions.items():
        if name.startswith("@tw.site") and text.endswith(f'c"{escaped}"'):
            return name
    name = f"@tw.site{len(ctx.functions)}"
    ctx.functions[name] = f'{name} = internal constant [{len(data)} x i8] c"{escaped}"'
    return name
