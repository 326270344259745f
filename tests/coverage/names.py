"""Public names of the language that are no row of the table, and what stands for them."""

from types import ModuleType

import triton.language as tl

TYPES = {
    "block_type", "const", "constexpr_type", "dtype", "pointer_type", "str_to_ty", "tensor", "tensor_descriptor",
    "tensor_descriptor_type", "tuple_type", "void", "slice", "bfloat16", "float16", "float32", "float64", "float8e4nv",
    "float8e5", "int1", "int8", "int16", "int32", "int64", "uint8", "uint16", "uint32", "uint64", "pi32_t",
}  # fmt: skip
# Formats of single GPU generations, which the front end takes only from backends that name them.
FOREIGN_TYPES = {"float8e4b15", "float8e4b8", "float8e5b16"}
MODULES = {"core", "extra", "math", "random", "standard"}
# Methods that Triton documents and never defines: calling one gives None.
STUBS = {"sort"}
NUMBERS = {"TRITON_MAX_TENSOR_NUMEL"}
# Names that tl.math imports for its own use.
HELPERS = {"List", "T", "wraps"}
# Attributes of descriptors that are known when a kernel is compiled.
DESCRIPTOR_FACTS = {"block_shape", "block_type", "dtype"}
OPERATORS = {
    f"__{name}__"
    for name in [
        "add",
        "radd",
        "sub",
        "rsub",
        "mul",
        "rmul",
        "truediv",
        "rtruediv",
        "floordiv",
        "rfloordiv",
        "mod",
        "rmod",
        "neg",
        "invert",
        "not",
        "and",
        "rand",
        "or",
        "ror",
        "xor",
        "rxor",
        "lshift",
        "rlshift",
        "rshift",
        "rrshift",
        "lt",
        "le",
        "gt",
        "ge",
        "eq",
        "ne",
        "rlt",
        "rle",
        "rgt",
        "rge",
        "req",
        "rne",
        "getitem",
    ]
}


def _public(owner: object) -> set[str]:
    """Public names of an object; submodules come and go with what was imported."""
    names = {name for name in dir(owner) if not name.startswith("_")}
    return {name for name in names if name == "target_info" or not isinstance(getattr(owner, name), ModuleType)}


def names_without_a_row(rows: set[str]) -> list[str]:
    """Public names that nothing accounts for: a new Triton has them, or a row was lost."""
    known = rows | TYPES | FOREIGN_TYPES | MODULES | NUMBERS
    missing = [f"tl.{name}" for name in _public(tl) - known]
    missing += [f"tl.math.{name}" for name in _public(tl.math) - rows - HELPERS]
    methods = _public(tl.tensor) | {name for name in dir(tl.tensor) if name in OPERATORS}
    missing += [f"tensor.{name}" for name in methods - STUBS if f"tensor.{name}" not in rows]
    described = _public(tl.tensor_descriptor) - DESCRIPTOR_FACTS
    missing += [f"tensor_descriptor.{name}" for name in described if f"tensor_descriptor.{name}" not in rows]
    return sorted(missing)
