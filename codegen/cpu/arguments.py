"""Argument slots of the kernel ABI: 8 bytes each, in the order of the kernel's runtime parameters.

Pointers are addresses, integers are sign-extended to 64 bits (booleans and unsigned integers zero-extended),
floats are their own bits in the low bytes.
"""

import ctypes
import struct
from collections.abc import Callable, Iterable, Sequence
from typing import Any

from tilewright.errors import InputError

# What precedes the slots of a launch, see ``launch.Step``: function, unused, grid x, y and z, flags, chunk.
HEADER = struct.Struct("=QQiiiiq")
# Code of the struct module for a slot, by Triton type. fp16 and bf16 are converted to their bits before packing.
_SLOTS = {
    "i1": "Q",
    "i8": "q",
    "i16": "q",
    "i32": "q",
    "i64": "q",
    "u1": "Q",
    "u8": "Q",
    "u16": "Q",
    "u32": "Q",
    "u64": "Q",
    "fp16": "Q",
    "bf16": "Q",
    "fp32": "f4x",
    "f32": "f4x",
    "fp64": "d",
}


class ArgumentPacker:
    """Turns the arguments of a launch into slots, by a function written for their types.

    Args:
        types: Triton type of each argument ("*fp32", "i32", "fp32", "tensordesc<fp32[16, 16]>", a tuple of types,
            or "constexpr" for an argument that is compiled in and gets no slot).
        kernel: name of the kernel, for error messages.

    Attributes:
        slots: number of slots.
    """

    def __init__(self, types: Iterable[Any], kernel: str) -> None:
        self._kernel = kernel
        self._types = tuple(types)
        self._nested = any(not isinstance(kind, str) or kind.startswith("tensordesc") for kind in self._types)
        self._flat = tuple(flat_types(self._types))
        taken = [index for index, kind in enumerate(self._flat) if kind != "constexpr"]
        self._pointers = tuple((slot, index) for slot, index in enumerate(taken) if self._flat[index].startswith("*"))
        self.slots = len(taken)
        self._write = _writer(self._flat)

    def pack(self, arguments: Sequence[Any]) -> bytes:
        """Slots of one launch.

        Args:
            arguments: one for each of ``types``.

        Raises:
            InputError: an argument cannot be passed as its type: a tensor elsewhere than on the CPU, an integer
                out of range, an object of another kind.
        """
        return self.record(0, 0, 0, 0, arguments)[HEADER.size :]

    def record(self, function: int, grid_x: int, grid_y: int, grid_z: int, arguments: Sequence[Any]) -> bytes:
        """One launch as ``run_record`` reads it: a ``launch.Step``, whose ``args`` is not used, and the slots.

        Raises:
            InputError: as ``pack`` does.
        """
        flat = tuple(flat_values(self._types, arguments)) if self._nested else arguments
        try:
            try:
                return self._write(function, grid_x, grid_y, grid_z, flat)
            except OverflowError:
                return self._write(function, grid_x, grid_y, grid_z, self._without_overflow(flat))
        except (struct.error, TypeError, ValueError, AttributeError) as error:
            if len(flat) != len(self._flat):
                raise InputError(
                    f"kernel '{self._kernel}' got {len(arguments)} arguments and takes {len(self._types)}",
                    hint="a compiled kernel takes all parameters in order, the constants included",
                ) from None
            raise InputError(
                f"argument of kernel '{self._kernel}' cannot be passed",
                where=self._describe(flat),
                why=str(error),
                hint="pass CPU tensors for pointers and Python numbers that fit the parameter's type",
            ) from error

    def _without_overflow(self, flat: Sequence[Any]) -> list[Any]:
        """Floats beyond the range of fp32 become infinite, as a conversion in C makes them."""
        pairs = zip(self._flat, flat, strict=True)
        return [ctypes.c_float(value).value if kind in ("fp32", "f32") else value for kind, value in pairs]

    def pointers(self, arguments: Sequence[Any]) -> Iterable[tuple[int, int, Any]]:
        """Of each parameter that is a pointer: its slot, its place among ``flat_types``, and the argument."""
        flat = tuple(flat_values(self._types, arguments)) if self._nested else arguments
        return [(slot, index, flat[index]) for slot, index in self._pointers]

    def _describe(self, flat: Sequence[Any]) -> str:
        pairs = zip(self._flat, flat, strict=True)
        return ", ".join(f"{kind} <- {type(value).__name__}" for kind, value in pairs if kind != "constexpr")


def address_of(argument: Any) -> int:
    """Address of a tensor's first element; None is the null pointer, an integer is an address.

    Raises:
        ValueError: the tensor is not on the CPU.
        TypeError: the argument has no address.
    """
    try:
        if argument.is_cpu:
            return argument.data_ptr()
    except AttributeError:
        if argument is None:
            return 0
        if isinstance(argument, int):
            return argument
        # Wrappers such as triton.reinterpret's give the address only.
        if hasattr(argument, "data_ptr"):
            return argument.data_ptr()
        raise TypeError(f"a pointer parameter got a {type(argument).__name__}") from None
    raise ValueError(f"the tensor is on device '{argument.device}', and this kernel runs on the CPU")


def _writer(kinds: Sequence[str]) -> Callable[..., bytes]:
    """The function that packs a launch: nothing is decided any more when it is called.

    It takes (function, grid_x, grid_y, grid_z, arguments), and raises what ``address_of`` and ``struct`` raise.
    """
    import torch

    names = [f"a{index}" for index in range(len(kinds))]
    runtime = [(kind, name) for kind, name in zip(kinds, names, strict=True) if kind != "constexpr"]
    slots = "".join("Q" if kind.startswith("*") else _slot(kind) for kind, _ in runtime)
    values = "".join(f", {_expression(kind, name)}" for kind, name in runtime)
    text = f"""def write(function, grid_x, grid_y, grid_z, arguments):
    [{", ".join(names)}] = arguments
    return pack(function, 0, grid_x, grid_y, grid_z, 0, 0{values})
"""
    namespace: dict[str, Any] = {
        "pack": struct.Struct(HEADER.format + slots).pack,
        "Tensor": torch.Tensor,
        "address_of": address_of,
        "refuse": _refuse,
        "fp16_bits": _fp16_bits,
        "bf16_bits": _bf16_bits,
    }
    exec(text, namespace)
    return namespace["write"]


def _slot(kind: str) -> str:
    if kind not in _SLOTS:
        raise InputError(f"a kernel parameter of type {kind} cannot be passed", hint="pass a tensor or a number")
    return _SLOTS[kind]


def _expression(kind: str, name: str) -> str:
    """Python text of a slot's value."""
    if kind.startswith("*"):
        # The common case in two attribute accesses; any other object takes its time.
        return f"{name}.data_ptr() if {name}.__class__ is Tensor and {name}.is_cpu else address_of({name})"
    if kind in ("fp32", "f32", "fp64"):
        return name
    if kind in ("fp16", "bf16"):
        return f"{kind}_bits({name})"
    if kind in ("i1", "u1"):
        return f"1 if {name} else 0"
    bits, signed = int(kind[1:]), kind[0] == "i"
    low, high = (-(2 ** (bits - 1)), 2 ** (bits - 1)) if signed else (0, 2**bits)
    return f"{name} if {low} <= {name} < {high} else refuse({name}, {kind!r})"


def _refuse(value: Any, kind: str) -> int:
    raise ValueError(f"{value} does not fit {kind}")


def _fp16_bits(value: Any) -> int:
    import numpy

    with numpy.errstate(over="ignore"):
        return int(numpy.float16(value).view(numpy.uint16))


def _bf16_bits(value: Any) -> int:
    import numpy

    with numpy.errstate(over="ignore"):
        bits = int(numpy.float32(value).view(numpy.uint32))
    if value != value:
        return 0x7FC0
    # Round to nearest, ties to even.
    return (bits + 0x7FFF + ((bits >> 16) & 1)) >> 16


def flat_types(types: Iterable[Any]) -> Iterable[str]:
    """Types of the runtime parameters behind those of a signature: tuples and descriptors taken apart."""
    for kind in types:
        if isinstance(kind, str):
            yield from _descriptor_types(kind) if kind.startswith("tensordesc") else (kind,)
        else:
            yield from flat_types(kind)


def _descriptor_types(kind: str) -> list[str]:
    # Triton's rewrite of descriptors to pointers makes these parameters of one: base, shape, strides, padding with
    # NaN, rounding to tf32; then, as the front end passes them, shape and strides once more.
    element, _, rest = kind.removeprefix("tensordesc<").partition("[")
    rank = rest.partition("]")[0].count(",") + 1
    return [f"*{element}", *["i64"] * (2 * rank), "i1", "i1", *["i32"] * rank, *["i64"] * rank]


def flat_values(types: Sequence[Any], values: Sequence[Any]) -> Iterable[Any]:
    """Arguments taken apart as ``flat_types`` does it."""
    for kind, value in zip(types, values, strict=True):
        if not isinstance(kind, str):
            yield from flat_values(kind, value)
        elif kind.startswith("tensordesc"):
            extents = (*value.shape, *value.strides)
            yield from (value.base, *extents, value.padding == "nan", value.round_f32_to_tf32, *extents)
        else:
            yield value


def flat_names(names: Iterable[str], types: Iterable[Any]) -> Iterable[str]:
    """Names for errors, taken apart as ``flat_types`` does it: ``x``, ``pair[1]``; all of a descriptor have one."""
    for name, kind in zip(names, types, strict=True):
        if isinstance(kind, str):
            yield from [name] * (len(_descriptor_types(kind)) if kind.startswith("tensordesc") else 1)
        else:
            yield from flat_names([f"{name}[{index}]" for index in range(len(kind))], kind)
