"""Random kernels: loops, branches, and memory that is written and read in one kernel; see ``random_operations``."""

import torch
from random_kernels import _DIGITS, _DTYPES, Var, Writer, wrapped


def loop(w: Writer) -> None:
    """A sum over a moving pointer, some steps left out."""
    shape = tuple(w.base)
    count = torch.Size(shape).numel()
    steps = w.rng.randint(0, 5)
    memory, _, _ = w.random_values("int32", count * max(steps, 1) + w.programs)
    pointer, trips = w.parameter(memory.int()), w.parameter(steps)
    acc, place = w.fresh("acc"), w.fresh("p")
    skip = w.rng.random() < 0.4
    w.write(f"{acc} = tl.zeros({shape}, tl.int32)")
    w.write(f"{place} = {pointer} + pid + {w.index(shape, torch.empty(shape).stride())}")
    if w.rng.random() < 0.3:
        w.write("i = 0")
        w.write(f"while i < {trips}:")
        tail = "i += 1"
    else:
        w.write(f"for i in range({w.rng.choice(('0, ', ''))}{trips}):")
        tail = ""
    inner = w.indent + "    "
    update = f"{acc} += tl.load({place}) * (i + 1)"
    body = [f"if i % 2 == {w.programs % 2}:", f"    {update}"] if skip else [update]
    w.lines += [inner + line for line in (*body, f"{place} += {count}", *([tail] if tail else []))]
    total = torch.zeros(w.programs, *shape, dtype=torch.int64)
    for step in range(steps):
        if not skip or step % 2 == w.programs % 2:
            for pid in range(w.programs):
                start = step * count + pid
                total[pid] += memory[start : start + count].reshape(shape) * (step + 1)
    w.vars.append(Var(acc, "int32", wrapped(total, "int32")))


def loop_in_loop(w: Writer) -> None:
    """A tile to which an inner loop adds numbers, while the outer one goes on to change it."""
    a = w.pick(lambda v: v.kind == "int32" and v.shape != ())
    if a is None:
        return
    w.used.add(a.name)
    outer, inner = w.rng.randint(0, 3), w.rng.randint(0, 3)
    trips, more = w.parameter(outer), w.parameter(inner)
    x, y, acc = w.fresh("x"), w.fresh("y"), w.fresh("acc")
    change, function = w.rng.choice((
        (f"{x} * 2 + i", lambda v, i: v * 2 + i), (f"twice_or_same({x}, i % 2 == 0)", lambda v, i: v * (2 - i % 2)),
        (f"{x} // 3", lambda v, i: torch.div(v, 3, rounding_mode="trunc")), (f"{y} - {x} - {x}", None),
    ))  # fmt: skip
    w.lines += [
        w.indent + line
        for line in (
            f"{x} = {a.name}", f"{acc} = {a.name} * 0", f"for i in range({trips}):", f"    {y} = {x}",
            f"    for j in range({more}):", f"        {y} += j + 1", f"    {x} = {change}", f"    {acc} += {y}",
        )
    ]  # fmt: skip
    value, total = a.value, torch.zeros_like(a.value)
    for i in range(outer):
        added = value + inner * (inner + 1) // 2
        value = wrapped(added - value - value if function is None else function(value, i), "int32")
        total = total + added
    w.vars += [Var(x, "int32", value), Var(acc, "int32", wrapped(total, "int32"))]


def branch(w: Writer) -> None:
    """A variable changed in some programs only."""
    a = w.pick(lambda v: v.kind == "int32" and v is not w.pid)
    if a is None:
        return
    w.used.add(a.name)
    flag = (w.pid.value > 0).reshape(-1, *[1] * len(a.shape))
    name = w.fresh()
    if w.rng.random() < 0.5:
        w.write(f"{name} = twice_or_same({a.name}, pid > 0)")
        value = torch.where(flag, a.value * 2, a.value)
    else:
        w.write(f"{name} = {a.name}")
        w.write("if pid > 0:")
        w.write(f"    {name} = {a.name} * 3 - pid")
        pid = w.pid.value.reshape(-1, *[1] * len(a.shape))
        value = torch.where(flag, a.value * 3 - pid, a.value)
    w.vars.append(Var(name, "int32", wrapped(value, "int32")))


def atomic(w: Writer) -> None:
    """All programs add to the same memory."""
    a = w.pick(lambda v: v.kind in ("int32", "float32") and v.shape != ())
    if a is None or (a.is_float and a.bound * w.programs * 2.0**a.grain > 2 ** _DIGITS["float32"]):
        return
    w.used.add(a.name)
    total = a.value.sum(0).reshape(-1)
    total = wrapped(total, a.kind) if a.is_int else total
    name = w.parameter(torch.zeros(total.shape, dtype=_DTYPES[a.kind]), total.to(_DTYPES[a.kind]))
    w.write(f"tl.atomic_add({name} + {w.index(a.shape, torch.empty(a.shape).stride())}, {a.name})")


def moved_in_place(w: Writer) -> None:
    """A tile stored where it, or a part of it, was loaded: shifted, reversed, transposed; and then loaded again."""
    shape = tuple(w.base)
    count = torch.Size(shape).numel()
    room = 2 * count + 8
    memory, _, _ = w.random_values("int32", room * w.programs)
    before = memory.reshape(w.programs, room)
    order = w.rng.sample(range(len(shape)), len(shape))
    strides, step = [0] * len(shape), 1
    for axis in order:
        strides[axis] = step
        step *= shape[axis]
    signs = [w.rng.choice((1, 1, -1)) for _ in shape]
    start = sum((size - 1) * stride for size, stride, sign in zip(shape, strides, signs, strict=True) if sign < 0)
    start += w.rng.choice((0, 1, 7))
    steps = [sign * stride for sign, stride in zip(signs, strides, strict=True)]
    rows = torch.empty(shape).stride()
    source, target = (torch.zeros(shape, dtype=torch.int64) for _ in range(2))
    for axis, size in enumerate(shape):
        index = torch.arange(size).reshape([-1 if a == axis else 1 for a in range(len(shape))])
        source, target = source + index * rows[axis], target + index * steps[axis]
    loaded = before[:, source]
    after = before.clone()
    after[:, target + start] = wrapped(loaded + 1, "int32")
    name = w.parameter(memory.int(), after.reshape(-1).int())
    x = w.fresh()
    w.write(f"{x} = tl.load({name} + pid * {room} + {w.index(shape, rows)})")
    w.write(f"tl.store({name} + pid * {room} + {start} + {w.index(shape, steps)}, {x} + 1)")
    w.vars.append(Var(x, "int32", loaded))
    w.define(f"tl.load({name} + pid * {room} + {w.index(shape, rows)})", "int32", after[:, source])
