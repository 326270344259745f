"""The operations that random kernels are made of; each writes itself and says what it gives, or does nothing."""

from collections.abc import Callable, Sequence

import torch
from random_flow import atomic, branch, loop, loop_in_loop, moved_in_place
from random_kernels import _BITS, _DTYPES, RandomKernel, Var, Writer, wrapped
from torch import Tensor

_INT_KINDS = ("int32", "int32", "int64", "int8", "int16")
_FLOAT_KINDS = ("float32", "float32", "float16", "bfloat16")


def load(w: Writer) -> None:
    """A tile of any layout: contiguous, transposed, apart, repeated along an axis; perhaps masked."""
    kind = w.rng.choice(_INT_KINDS + _FLOAT_KINDS)
    shape = tuple(size if w.rng.random() < 0.85 else 1 for size in w.base)
    order = w.rng.sample(range(len(shape)), len(shape)) if w.rng.random() < 0.3 else list(range(len(shape)))
    strides, step = [0] * len(shape), w.rng.choice((1, 1, 1, 2, 3))
    for axis in reversed(order):
        if w.rng.random() < 0.1:
            continue
        strides[axis] = step
        step *= shape[axis]
    offset = w.rng.choice((0, 1, 5))
    memory, bound, grain = w.random_values(kind, step * w.programs + offset)
    places = torch.zeros(shape, dtype=torch.int64)
    for axis, size in enumerate(shape):
        places = (
            places + torch.arange(size).reshape([-1 if a == axis else 1 for a in range(len(shape))]) * strides[axis]
        )
    value = torch.stack([memory[places + pid * step + offset] for pid in range(w.programs)])
    pointer = w.parameter(memory.to(_DTYPES[kind]))
    text = f"tl.load({pointer} + {offset} + pid * {step} + {w.index(shape, strides)}"
    if w.rng.random() < 0.4:
        axis = w.rng.randrange(len(shape))
        limit = w.rng.randint(0, shape[axis])
        other = w.rng.choice((0, 1, -3))
        ones = [1 if a == axis else 0 for a in range(len(shape))]
        inside = torch.arange(shape[axis]).reshape([-1 if a == axis else 1 for a in range(len(shape))]) < limit
        value = torch.where(inside, value, torch.tensor(other, dtype=value.dtype))
        text += f", mask=({w.index(shape, ones)}) < {w.parameter(limit)}, other={other}"
    w.define(text + ")", kind, value, max(bound, 3.0), grain)


def gather_load(w: Writer) -> None:
    """Memory read at computed places."""
    index = w.pick(lambda v: v.kind == "int32" and v.shape != ())
    if index is None:
        return
    count = w.rng.choice((3, 8, 50))
    memory, bound, grain = w.random_values("float32", count)
    places = torch.fmod(index.value.abs(), count)
    name = w.parameter(memory.float())
    w.define(f"tl.load({name} + tl.abs({index.name}) % {count})", "float32", memory[places], bound, grain)


def _partner(w: Writer, var: Var) -> Var | None:
    """A variable of the same type whose shape goes with another's."""

    def fits(other: Var) -> bool:
        if other.kind != var.kind or (other.shape != () and len(other.shape) != len(var.shape)):
            return False
        return other.shape == () or all(1 in (a, b) or a == b for a, b in zip(other.shape, var.shape, strict=True))

    return w.pick(fits)


def _paired(a: Var, b: Var) -> tuple[Tensor, Tensor]:
    rank = max(len(a.shape), len(b.shape))
    values = []
    for var in (a, b):
        missing = rank - len(var.shape)
        values.append(var.value.reshape(var.value.shape[0], *[1] * missing, *var.shape))
    return values[0], values[1]


def float_binary(w: Writer) -> None:
    a = w.pick(lambda v: v.is_float)
    b = _partner(w, a) if a is not None else None
    if a is None or b is None:
        return
    x, y = _paired(a, b)
    grain = max(a.grain, b.grain)
    name = w.rng.choice(("+", "-", "*", "max", "min"))
    if name == "*":
        w.define(f"{a.name} * {b.name}", a.kind, x * y, a.bound * b.bound, a.grain + b.grain)
    elif name in ("+", "-"):
        w.define(f"{a.name} {name} {b.name}", a.kind, x + y if name == "+" else x - y, a.bound + b.bound, grain)
    else:
        value = torch.maximum(x, y) if name == "max" else torch.minimum(x, y)
        kind = "float32" if a.kind == "bfloat16" else a.kind  # as Triton's front end computes it
        w.define(f"tl.{name}imum({a.name}, {b.name})", kind, value, max(a.bound, b.bound), grain)


def int_binary(w: Writer) -> None:
    a = w.pick(lambda v: v.kind in ("int32", "int64"))
    b = _partner(w, a) if a is not None else None
    if a is None or b is None:
        return
    x, y = _paired(a, b)
    name = w.rng.choice(("+", "-", "*", "&", "|", "^", "max", "min"))
    if name in ("max", "min"):
        value = torch.maximum(x, y) if name == "max" else torch.minimum(x, y)
        w.define(f"tl.{name}imum({a.name}, {b.name})", a.kind, value)
        return
    table: dict[str, Callable[[Tensor, Tensor], Tensor]] = {
        "+": torch.add, "-": torch.sub, "*": torch.mul, "&": torch.bitwise_and, "|": torch.bitwise_or,
        "^": torch.bitwise_xor,
    }  # fmt: skip
    w.define(f"{a.name} {name} {b.name}", a.kind, table[name](x, y))


def int_by_constant(w: Writer) -> None:
    """Division and remainder round towards zero; shifts to the right keep the sign."""
    a = w.pick(lambda v: v.kind in ("int32", "int64"))
    if a is None:
        return
    number = w.rng.choice((1, 2, 3, 7, 16, 100))
    shift = w.rng.randrange(0, _BITS[a.kind])
    forms: list[tuple[str, Tensor]] = [
        (f"{a.name} // {number}", torch.div(a.value, number, rounding_mode="trunc")),
        (f"{a.name} % {number}", torch.fmod(a.value, number)),
        (f"{a.name} << {shift}", a.value << shift),
        (f"{a.name} >> {shift}", a.value >> shift),
        (f"{a.name} + {number}", a.value + number),
        (f"{number} - {a.name}", number - a.value),
        (f"-{a.name}", -a.value),
        (f"~{a.name}", ~a.value),
    ]
    text, value = w.rng.choice(forms)
    w.define(text, a.kind, value)


def compare(w: Writer) -> None:
    a = w.pick(lambda v: v.kind != "int1")
    b = _partner(w, a) if a is not None else None
    if a is None or b is None:
        return
    x, y = _paired(a, b)
    name, function = w.rng.choice(
        (("<", torch.lt), ("<=", torch.le), (">", torch.gt), (">=", torch.ge), ("==", torch.eq), ("!=", torch.ne))
    )
    w.define(f"{a.name} {name} {b.name}", "int1", function(x, y))


def logic(w: Writer) -> None:
    a = w.pick(lambda v: v.kind == "int1")
    b = _partner(w, a) if a is not None else None
    if a is None or b is None:
        return
    x, y = _paired(a, b)
    name, value = w.rng.choice((("&", x & y), ("|", x | y), ("^", x ^ y)))
    w.define(f"{a.name} {name} {b.name}", "int1", value)


def where(w: Writer) -> None:
    a = w.pick(lambda v: v.kind != "int1" and v.shape != ())
    b = _partner(w, a) if a is not None else None
    if a is None or b is None:
        return
    condition = w.pick(lambda v: v.kind == "int1" and v.shape in (a.shape, ()))
    if condition is None or (b.shape not in (a.shape, ())):
        return
    x, y = _paired(a, b)
    flag, _ = _paired(condition, a)
    text = f"tl.where({condition.name}, {a.name}, {b.name})"
    w.define(text, a.kind, torch.where(flag, x, y), max(a.bound, b.bound), max(a.grain, b.grain))


def cast(w: Writer) -> None:
    """Between integers, between floats, and from small integers to floats."""
    a = w.pick(lambda v: True)
    if a is None:
        return
    if a.is_float:
        kind = w.rng.choice((*_FLOAT_KINDS, "int32"))
        if kind == "int32":
            w.define(f"{a.name}.to(tl.int32)", kind, a.value.trunc().long())
        else:
            w.define(f"{a.name}.to(tl.{kind})", kind, a.value, a.bound, a.grain)
        return
    kind = w.rng.choice(("int32", "int64", "int8", "int16", "float32"))
    if kind == "float32":
        w.define(f"{a.name}.to(tl.float32)", kind, a.value.double(), float(a.value.abs().max()) if a.is_int else 1.0, 0)
    else:
        w.define(f"{a.name}.to(tl.{kind})", kind, a.value.long())


def reduce(w: Writer) -> None:
    a = w.pick(lambda v: v.kind in ("int32", "int64", "float32", "float16") and v.shape != ())
    if a is None:
        return
    axis = w.rng.randrange(len(a.shape))
    keep = w.rng.random() < 0.5
    names = ["sum", "max", "min", "argmax", "argmin"] + (["xor_sum"] if a.is_int else [])
    name = w.rng.choice(names)
    text = f"tl.{name}({a.name}, {axis}{', keep_dims=True' if keep else ''})"
    dim = axis + 1
    if name == "sum":
        w.define(text, a.kind, a.value.sum(dim, keepdim=keep), a.bound * a.shape[axis], a.grain)
    elif name in ("max", "min"):
        function = torch.amax if name == "max" else torch.amin
        kind = "float32" if a.kind == "float16" else a.kind  # as Triton's front end computes it
        w.define(text, kind, function(a.value, dim, keepdim=keep), a.bound, a.grain)
    elif name == "xor_sum":
        total = a.value.select(dim, 0)
        for place in range(1, a.shape[axis]):
            total = total ^ a.value.select(dim, place)
        w.define(text, a.kind, total.unsqueeze(dim) if keep else total)
    else:
        w.define(text, "int32", _first(a.value if name == "argmax" else -a.value, dim, keep))


def _first(value: Tensor, dim: int, keep: bool) -> Tensor:
    """Place of the largest element, the first of several."""
    largest = value == value.amax(dim, keepdim=True)
    size = value.shape[dim]
    places = torch.arange(size).reshape([-1 if a == dim else 1 for a in range(value.dim())])
    return torch.where(largest, places, size).amin(dim, keepdim=keep)


def scan(w: Writer) -> None:
    a = w.pick(lambda v: v.kind in ("int32", "int64", "float32") and v.shape != ())
    if a is None:
        return
    axis = w.rng.randrange(len(a.shape))
    reverse = w.rng.random() < 0.3
    value = a.value.flip(axis + 1) if reverse else a.value
    if w.rng.random() < 0.6:
        value, bound = value.cumsum(axis + 1), a.bound * a.shape[axis]
        text = f"tl.cumsum({a.name}, {axis}{', reverse=True' if reverse else ''})"
    else:
        value, bound = value.cummax(axis + 1).values, a.bound
        text = f"tl.associative_scan({a.name}, {axis}, larger{', reverse=True' if reverse else ''})"
    w.define(text, a.kind, value.flip(axis + 1) if reverse else value, bound, a.grain)


def two_scans(w: Writer) -> None:
    """A scan or reduction of two tensors at once with a combine function of their own."""
    a = w.pick(lambda v: v.kind in ("int32", "int64") and v.shape != ())
    if a is None:
        return
    other = w.pick(lambda v: v.kind == "int32" and v.shape == a.shape)
    if other is None:
        return
    axis = w.rng.randrange(len(a.shape))
    first, second = w.fresh(), w.fresh()
    name = w.rng.choice(("associative_scan", "reduce"))
    w.write(f"{first}, {second} = tl.{name}(({a.name}, {other.name}), {axis}, both)")
    w.used |= {a.name, other.name}
    dim = axis + 1
    if name == "reduce":
        values = wrapped(a.value.sum(dim), a.kind), other.value.amin(dim)
    else:
        values = wrapped(a.value.cumsum(dim), a.kind), other.value.cummin(dim).values
    w.vars += [Var(first, a.kind, values[0]), Var(second, "int32", values[1])]


def reshape(w: Writer) -> None:
    """Transposes, flattens, splits an axis, adds one."""
    a = w.pick(lambda v: v.shape != ())
    if a is None:
        return
    facts = (a.bound, a.grain)
    count = torch.Size(a.shape).numel()
    options: list[Callable[[], object]] = []
    if len(a.shape) == 2:
        options.append(lambda: w.define(f"tl.trans({a.name})", a.kind, a.value.transpose(1, 2), *facts))
    if len(a.shape) == 3:
        order = w.rng.sample(range(3), 3)
        moved = a.value.permute(0, *(axis + 1 for axis in order))
        options.append(lambda: w.define(f"tl.permute({a.name}, {tuple(order)})", a.kind, moved, *facts))
    if len(a.shape) < 3:
        axis = w.rng.randrange(len(a.shape) + 1)
        added = a.value.unsqueeze(axis + 1)
        options.append(lambda: w.define(f"tl.expand_dims({a.name}, {axis})", a.kind, added, *facts))
    left = 1 << w.rng.randrange(count.bit_length())
    split = (left, count // left)
    text = f"tl.reshape({a.name}, {split})"
    options.append(lambda: w.define(text, a.kind, a.value.reshape(-1, *split), *facts))
    w.rng.choice(options)()


def join(w: Writer) -> None:
    a = w.pick(lambda v: v.shape != () and len(v.shape) < 3)
    if a is None:
        return
    b = w.pick(lambda v: v.kind == a.kind and v.shape == a.shape)
    assert b is not None
    bound, grain = max(a.bound, b.bound), max(a.grain, b.grain)
    value = torch.stack([a.value, b.value], -1)
    if w.rng.random() < 0.5:
        value = value.reshape(*a.value.shape[:-1], -1)
        w.define(f"tl.interleave({a.name}, {b.name})", a.kind, value, bound, grain)
        return
    joined = w.define(f"tl.join({a.name}, {b.name})", a.kind, value, bound, grain)
    if joined is not None and w.rng.random() < 0.5:
        first, second = w.fresh(), w.fresh()
        w.write(f"{first}, {second} = tl.split({joined.name})")
        w.used.add(joined.name)
        w.vars += [Var(second, a.kind, b.value, bound, grain), Var(first, a.kind, a.value, bound, grain)]


def broadcast(w: Writer) -> None:
    a = w.pick(lambda v: v.shape != () and 1 in v.shape)
    if a is None:
        return
    shape = tuple(size if size > 1 else w.rng.choice((1, 4, 8)) for size in a.shape)
    value = a.value.expand(-1, *shape)
    w.define(f"tl.broadcast_to({a.name}, {shape})", a.kind, value, a.bound, a.grain)


def sort(w: Writer) -> None:
    a = w.pick(lambda v: v.kind in ("int32", "float32") and v.shape != () and v.shape[-1] <= 16)
    if a is not None:
        down = w.rng.random() < 0.5
        text = f"tl.sort({a.name}{', descending=True' if down else ''})"
        w.define(text, a.kind, a.value.sort(-1, descending=down).values, a.bound, a.grain)


def gather(w: Writer) -> None:
    a = w.pick(lambda v: v.kind != "int1" and v.shape != ())
    if a is None:
        return
    axis = w.rng.randrange(len(a.shape))
    index = w.pick(lambda v: v.kind == "int32" and v.shape == a.shape)
    if index is None:
        return
    size = a.shape[axis]
    places = index.value & (size - 1)
    text = f"tl.gather({a.name}, {index.name} & {size - 1}, {axis})"
    w.define(text, a.kind, a.value.gather(axis + 1, places), a.bound, a.grain)


def histogram(w: Writer) -> None:
    a = w.pick(lambda v: v.kind == "int32" and len(v.shape) == 1)
    if a is None:
        return
    bins = w.rng.choice((4, 16))
    places = a.value & (bins - 1)
    counts = (places.unsqueeze(-1) == torch.arange(bins)).sum(1)
    w.define(f"tl.histogram({a.name} & {bins - 1}, {bins})", "int32", counts)


def dot(w: Writer) -> None:
    """A product of two fresh tiles, added to an accumulator or not."""
    m, n, k = (w.rng.choice((16, 32)) for _ in range(3))
    kind = w.rng.choice(("float32", "float16", "bfloat16", "int8"))
    tiles = []
    for rows, columns in ((m, k), (k, n)):
        strides = w.rng.choice(((columns, 1), (1, rows)))
        memory, bound, grain = w.random_values(kind, rows * columns)
        if kind == "int8":
            memory = wrapped(memory, "int8")
        name = w.parameter(memory.to(_DTYPES[kind]))
        value = memory.as_strided((rows, columns), strides).expand(w.programs, -1, -1)
        tile = w.define(f"tl.load({name} + {w.index((rows, columns), strides)})", kind, value, bound, grain)
        assert tile is not None
        tiles.append(tile)
    a, b = tiles
    out = "int32" if kind == "int8" else "float32"
    text = f"tl.dot({a.name}, {b.name}, out_dtype=tl.{out}, input_precision='ieee')"
    w.define(text, out, a.value @ b.value, a.bound * b.bound * k, a.grain + b.grain)


OPERATIONS: Sequence[tuple[Callable[[Writer], None], int]] = (
    (load, 4), (gather_load, 1), (float_binary, 5), (int_binary, 4), (int_by_constant, 3), (compare, 2), (logic, 1),
    (where, 2), (cast, 3), (reduce, 3), (scan, 1), (two_scans, 1), (reshape, 2), (join, 1), (broadcast, 1), (sort, 1),
    (gather, 1), (histogram, 1), (dot, 1), (loop, 2), (branch, 1), (atomic, 1),
    (moved_in_place, 1), (loop_in_loop, 1),
)  # fmt: skip


def random_kernel(seed: int) -> RandomKernel:
    """The kernel of a seed."""
    w = Writer(seed)
    load(w)
    load(w)
    operations, weights = zip(*OPERATIONS, strict=True)
    for operation in w.rng.choices(operations, weights, k=w.rng.randint(4, 16)):
        operation(w)
    return w.finish()
