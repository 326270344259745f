"""Cases of tensor methods: each gives what the function of its name gives, whose dtypes have rows of their own."""

from tests.coverage.cases import Case
from tests.coverage.values import Array

# Arguments of the method; those of the function are the tensor and the same.
_ARGUMENTS = {
    "abs": "", "argmax": "1", "argmin": "1", "broadcast_to": "4, 8", "cast": "tl.float16", "ceil": "", "cos": "",
    "cumprod": "1", "cumsum": "1", "erf": "", "exp": "", "exp2": "", "expand_dims": "1", "flip": "1", "floor": "",
    "gather": "i2 % 8, 1", "log": "", "log2": "", "max": "1", "min": "0", "permute": "1, 0", "ravel": "",
    "reduce": "1, first_of", "reshape": "8, 4", "rsqrt": "", "sigmoid": "", "sin": "", "softmax": "",
    "split": "", "sqrt": "", "sqrt_rn": "", "sum": "1", "trans": "", "view": "8, 4", "associative_scan": "1, first_of",
}  # fmt: skip
_INT_ARGUMENTS = {"cdiv": "3", "reduce_or": "1", "xor_sum": "1"}
_ATOMICS = ("add", "and", "max", "min", "or", "xchg", "xor")


def _equal(x: Array, y: Array, z: Array) -> Array:
    return (x * 0).sum().astype(bool)


def _methods() -> list[Case]:
    cases = []
    for dtype, table in (("fp32", _ARGUMENTS), ("int32", _INT_ARGUMENTS)):
        for name, arguments in table.items():
            if name == "split":
                code = (
                    "w = tl.reshape(x, 16, 2)\na, b = w.split()\nc, d = tl.split(w)\nout = tl.max((a != c) | (b != d))"
                )
            else:
                function = f"tl.{name}(z2{', ' * bool(arguments)}{arguments})"
                code = f"z2 = tl.abs(x2) + 1\nout = tl.max(z2.{name}({arguments}) != {function})"
            cases.append(Case(f"tensor.{name}", code, _equal, (dtype,), once=True))
    return cases


def _with_memory() -> list[Case]:
    cases = []
    for name in _ATOMICS:
        code = f"out = (mem + 1).atomic_{name}(tl.load(p + 2)) != tl.load(y_ptr + 1)"
        cases.append(Case(f"tensor.atomic_{name}", code, _equal, ("int32",), once=True))
    return [
        *cases,
        Case("tensor.atomic_cas", "out = mem.atomic_cas(3, 4) != tl.load(y_ptr)", _equal, ("int32",), once=True),
        Case(
            "tensor.advance",
            "b = tl.make_block_ptr(p, (4, 8), (8, 1), (0, 0), (2, 8), (1, 0))\nout = tl.load(b.advance((2, 0)))",
            lambda x, y, z: x[16:],
            ("int32",),
            once=True,
        ),
        Case(
            "tensor.histogram",
            "out = z.histogram(8)",
            lambda x, y, z: [(z == k).sum() for k in range(8)],
            ("int32",),
            once=True,
        ),
        Case("tensor.to", "out = x.to(tl.int8)", lambda x, y, z: x.astype("int8"), ("int32",), once=True),
        Case("tensor.T", "out = x2.T", lambda x, y, z: x.reshape(4, 8).T, ("int32",), once=True),
    ]


CASES = [*_methods(), *_with_memory()]
