"""Element types of the language: random values of each, as torch tensors and as exact numpy arrays."""

from typing import Any

import numpy as np
import torch
from torch import Tensor

Array = np.ndarray[Any, Any]

FLOATS = ("fp16", "bf16", "fp32", "fp64")
SMALL_FLOATS = ("fp8e4nv", "fp8e5")
SIGNED = ("int8", "int16", "int32", "int64")
UNSIGNED = ("uint8", "uint16", "uint32", "uint64")
INTS = SIGNED + UNSIGNED
DTYPES = ("int1", *INTS, *SMALL_FLOATS, *FLOATS)
NOT_BOOL = DTYPES[1:]
NUMBERS = INTS + SMALL_FLOATS + FLOATS
SIZE = 32

_TORCH = {
    "int1": torch.bool,
    **{name: getattr(torch, name) for name in INTS},
    "fp8e4nv": torch.float8_e4m3fn,
    "fp8e5": torch.float8_e5m2,
    "fp16": torch.float16,
    "bf16": torch.bfloat16,
    "fp32": torch.float32,
    "fp64": torch.float64,
}
# Names in triton.language.
TL_NAMES = {"fp8e4nv": "float8e4nv", "fp8e5": "float8e5", "fp16": "float16", "bf16": "bfloat16", "fp32": "float32"}
TL_NAMES["fp64"] = "float64"
# Half a unit in the last place of a number between 1 and 2.
EPSILON = {"fp8e4nv": 2**-4, "fp8e5": 2**-3, "fp16": 2**-11, "bf16": 2**-8, "fp32": 2**-24, "fp64": 2**-53}


def is_float(dtype: str) -> bool:
    return dtype in EPSILON


def tl_name(dtype: str) -> str:
    """Name of a dtype in ``triton.language``."""
    return TL_NAMES.get(dtype, dtype)


def to_torch(values: Array, dtype: str) -> Tensor:
    """A tensor of the dtype; floats are rounded."""
    if is_float(dtype):
        return torch.from_numpy(np.array(values, dtype=np.float64, order="C")).to(_TORCH[dtype])
    if dtype == "int1":
        return torch.from_numpy(np.array(values, dtype=np.bool_, order="C"))
    return torch.from_numpy(np.array(values, dtype=np.dtype(dtype), order="C"))


def exact(tensor: Tensor, dtype: str) -> Array:
    """What a tensor holds: fp64 for floats, else numpy's integer or boolean type."""
    return tensor.double().numpy() if is_float(dtype) else tensor.numpy()


def random_inputs(dtype: str, seed: int) -> tuple[Tensor, Tensor, Tensor]:
    """x of any sign; y not 0; z from 1 to 4. Integers x use their whole range."""
    rng = np.random.default_rng(seed)
    if is_float(dtype):
        x, y = rng.normal(size=SIZE) * 2, rng.uniform(0.5, 2, SIZE) * rng.choice([-1, 1], SIZE)
        return to_torch(x, dtype), to_torch(y, dtype), to_torch(rng.uniform(1, 4, SIZE), dtype)
    if dtype == "int1":
        x, y, z = rng.integers(0, 2, (3, SIZE))
        return to_torch(x, dtype), to_torch(y, dtype), to_torch(z, dtype)
    limits = np.iinfo(dtype)
    x = rng.integers(limits.min, limits.max, SIZE, dtype=np.dtype(dtype), endpoint=True)
    sign = rng.choice([-1, 1], SIZE) if dtype in SIGNED else 1
    return (
        to_torch(x, dtype),
        to_torch(rng.integers(1, 12, SIZE) * sign, dtype),
        to_torch(rng.integers(1, 5, SIZE), dtype),
    )
