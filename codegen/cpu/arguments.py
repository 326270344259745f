"""Argument slots of the kernel ABI: 8 bytes each, in the order of the kernel's runtime parameters.

Pointers are addresses, integers are sign-extended to 64 bits (booleans and unsigned integers zero-extended),
floats are their own bits in the low bytes.
"""

import struct
from collections.abc import Callable, Iterable, Sequence
from typing import Any

from tilewright.errors import InputError

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
    """Turns the arguments of a launch into slots.

    Args:
        types: Triton type of each argument ("*fp32", "i32", "fp32", "tensordesc<fp32[16, 16]>", a tuple of types,
            or "constexpr" for an argument that is compiled in and gets no slot).
        kernel: name of the kernel, for error messages.
    """

    def __init__(self, types: Iterable[Any], kernel: str) -> None:
        self._kernel = kernel
        self._types = tuple(types)
        self._nested = any(not isinstance(kind, str) or kind.startswith("tensordesc") for kind in self._types)
        flat = tuple(_flat_types(self._types))
        self._taken = tuple(index for index, kind in enumerate(flat) if kind != "constexpr")
        runtime = [flat[index] for index in self._taken]
        self._converters = tuple(_converter(kind) for kind in runtime)
        self._struct = struct.Struct("=" + "".join("Q" if kind.startswith("*") else _SLOTS[kind] for kind in runtime))

    def pack(self, arguments: Sequence[Any]) -> bytes:
        """Slots of one launch.

        Args:
            arguments: one for each of ``types``.

        Raises:
            InputError: an argument cannot be passed as its type: a tensor elsewhere than on the CPU, an integer
                out of range, an object of another kind.
        """
        flat = tuple(_flat_values(self._types, arguments)) if self._nested else arguments
        pairs = zip(self._converters, self._taken, strict=True)
        try:
            return self._struct.pack(*[convert(flat[index]) for convert, index in pairs])
        except IndexError:
            raise InputError(
                f"kernel '{self._kernel}' got {len(arguments)} arguments and takes {len(self._types)}",
                hint="a compiled kernel takes all parameters in order, the constants included",
            ) from None
        except (struct.error, TypeError, ValueError, AttributeError) as error:
            raise InputError(
                f"argument of kernel '{self._kernel}' cannot be passed",
                where=self._describe(flat),
                why=str(error),
                hint="pass CPU tensors for pointers and Python numbers that fit the parameter's type",
            ) from error

    def _describe(self, flat: Sequence[Any]) -> str:
        runtime = [kind for kind in _flat_types(self._types) if kind != "constexpr"]
        pairs = zip(runtime, self._taken, strict=True)
        return ", ".join(f"{kind} <- {type(flat[index]).__name__}" for kind, index in pairs)


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


def _converter(kind: str) -> Callable[[Any], Any]:
    if kind.startswith("*"):
        return address_of
    if kind in ("fp32", "f32", "fp64"):
        return float
    if kind == "fp16":
        return _fp16_bits
    if kind == "bf16":
        return _bf16_bits
    if kind not in _SLOTS:
        raise InputError(f"a kernel parameter of type {kind} cannot be passed", hint="pass a tensor or a number")
    if kind in ("i1", "u1"):
        return bool
    bits, signed = int(kind[1:]), kind[0] == "i"
    low, high = (-(2 ** (bits - 1)), 2 ** (bits - 1)) if signed else (0, 2**bits)

    def integer(value: Any) -> int:
        if not low <= value < high:
            raise ValueError(f"{value} does not fit {kind}")
        return value

    return integer


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


def _flat_types(types: Iterable[Any]) -> Iterable[str]:
    for kind in types:
        if isinstance(kind, str):
            yield from _descriptor_types(kind) if kind.startswith("tensordesc") else (kind,)
        else:
            yield from _flat_types(kind)


def _descriptor_types(kind: str) -> list[str]:
    # Triton's rewrite of descriptors to pointers makes these parameters of one: base, shape, strides, padding with
    # NaN, rounding to tf32; then, as the front end passes them, shape and strides once more.
    element, _, rest = kind.removeprefix("tensordesc<").partition("[")
    rank = rest.partition("]")[0].count(",") + 1
    return [f"*{element}", *["i64"] * (2 * rank), "i1", "i1", *["i32"] * rank, *["i64"] * rank]


def _flat_values(types: Sequence[Any], values: Sequence[Any]) -> Iterable[Any]:
    for kind, value in zip(types, values, strict=True):
        if not isinstance(kind, str):
            yield from _flat_values(kind, value)
        elif kind.startswith("tensordesc"):
            extents = (*value.shape, *value.strides)
            yield from (value.base, *extents, value.padding == "nan", value.round_f32_to_tf32, *extents)
        else:
            yield value
