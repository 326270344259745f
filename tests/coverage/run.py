"""Runs the table's cases and prints one line of JSON for each result; a process of its own, so a crash is one too.

Several cases share a kernel, for speed. Where one of them fails to compile, each gets a kernel of its own.
"""

import importlib.util
import json
import sys
import tempfile
import warnings
from collections.abc import Sequence
from pathlib import Path
from types import ModuleType

import numpy as np
import torch
import triton
from tests.coverage import booleans, elementwise, memory, methods, random_numbers, tiles
from tests.coverage.cases import Case
from tests.coverage.kernels import HEADER
from tests.coverage.values import DTYPES, EPSILON, SIZE, Array, exact, random_inputs, tl_name

from tilewright.errors import UnsupportedOp

CASES = [*elementwise.CASES, *booleans.CASES, *tiles.CASES, *memory.CASES, *random_numbers.CASES, *methods.CASES]
GROUP = 32


def kernel_text(cases: Sequence[Case], sizes: Sequence[tuple[int, bool] | None], dtype: str) -> str:
    """One kernel that runs the cases in order; results go to places of 512 elements in two buffers.

    Args:
        sizes: number of elements of each result (0 for a scalar) and whether they are floats; None does not store it.
    """
    lines = [
        HEADER,
        "@triton.jit",
        "def kernel(p, y_ptr, z_ptr, m_ptr, ints, floats):",
        f"    D: tl.constexpr = tl.{tl_name(dtype)}",
        f"    i = tl.arange(0, {SIZE})",
        "    i2 = tl.arange(0, 4)[:, None] * 8 + tl.arange(0, 8)[None, :]",
        "    x, y, z, x2 = tl.load(p + i), tl.load(y_ptr + i), tl.load(z_ptr + i), tl.load(p + i2)",
    ]
    for number, (case, form) in enumerate(zip(cases, sizes, strict=True)):
        lines.append(f"    mem = m_ptr + {number * SIZE}")
        lines += ["    " + line for line in case.code.splitlines()]
        if form is None:
            continue
        size, floating = form
        target, kind = ("floats", "float64") if floating else ("ints", "int64")
        place = f"{target} + {number * 512}"
        if size:
            lines.append(f"    tl.store({place} + tl.arange(0, {size}), tl.reshape(out, {size}).to(tl.{kind}))")
        else:
            lines.append(f"    tl.store({place}, out.to(tl.{kind}))")
    return "\n".join(lines) + "\n"


def load(text: str, folder: Path) -> ModuleType:
    """The text as a module: Triton reads a kernel's source from its file."""
    path = folder / f"kernels_{len(list(folder.iterdir()))}.py"
    path.write_text(text)
    spec = importlib.util.spec_from_file_location(path.stem, path)
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


class Runner:
    """Runs groups of cases on inputs of one dtype."""

    def __init__(self, dtype: str, folder: Path) -> None:
        self.dtype, self.folder = dtype, folder
        self.inputs = random_inputs(dtype, seed=len(dtype) + ord(dtype[-1]))
        self.arrays = [exact(tensor, dtype) for tensor in self.inputs]

    def references(self, case: Case) -> tuple[Array | None, Array | None]:
        with np.errstate(all="ignore"):
            found = case.reference(*self.arrays)
        out, mem = found if isinstance(found, tuple) else (found, None)
        return None if out is None else np.asarray(out), mem

    def run(self, cases: Sequence[Case]) -> list[dict[str, str]]:
        """Results of the cases; raises what compiling their common kernel raises."""
        expected = [self.references(case) for case in cases]
        sizes = [((e[0].size if e[0].ndim else 0), e[0].dtype.kind == "f") for e in expected]
        module = load(kernel_text(cases, sizes, self.dtype), self.folder)
        ints = torch.zeros(512 * len(cases), dtype=torch.int64)
        floats = torch.zeros(512 * len(cases), dtype=torch.float64)
        memory_ = self.inputs[1].repeat(len(cases))
        module.kernel[(1,)](*self.inputs, memory_, ints, floats)
        results = []
        for number, (case, (out, mem)) in enumerate(zip(cases, expected, strict=True)):
            size, floating = sizes[number]
            buffer = (floats if floating else ints)[number * 512 :][: max(size, 1)].numpy()
            detail = self.difference(case, buffer, out.reshape(-1))
            if mem is not None:
                after = exact(memory_[number * SIZE :][:SIZE], self.dtype)
                detail = detail or self.difference(case, after, mem.reshape(-1), "memory: ")
            results.append(self.record(case, "wrong" if detail else "yes", detail))
        return results

    def record(self, case: Case, state: str, detail: str = "") -> dict[str, str]:
        return {"name": case.name, "dtype": self.dtype, "state": state, "detail": detail, "code": case.code}

    def difference(self, case: Case, got: Array, expected: Array, where: str = "") -> str:
        with np.errstate(all="ignore"):
            if expected.dtype.kind != "f":
                expected = expected.view(np.int64) if expected.dtype == np.uint64 else expected.astype(np.int64)
                got = got.view(np.int64) if got.dtype == np.uint64 else got.astype(np.int64)
                wrong = got != expected
            elif case.exact:
                wrong = ~(
                    (got == expected) & (np.signbit(got) == np.signbit(expected)) | (np.isnan(got) & np.isnan(expected))
                )
            else:
                scale = np.nanmax(np.abs(expected), initial=1e-30)
                bound = case.ulps * EPSILON.get(self.dtype, 2**-24) * scale
                wrong = ~((np.abs(got - expected) <= bound) | (got == expected) | (np.isnan(got) & np.isnan(expected)))
        if not wrong.any():
            return ""
        at = int(np.argmax(wrong))
        return f"{where}element {at} is {got[at]}, expected {expected[at]}"

    def alone(self, case: Case) -> dict[str, str]:
        """One case in a kernel of its own."""
        try:
            return self.run([case])[0]
        except UnsupportedOp as error:
            return self.record(case, "no", str(error))
        except Exception as error:
            return self.record(case, "error", f"{type(error).__name__}: {error}")

    def refused(self, case: Case) -> dict[str, str]:
        """A case for a dtype that it is not declared for: the front end has to refuse it."""
        module = load(kernel_text([case], [None], self.dtype), self.folder)
        try:
            module.kernel.warmup(*self.inputs, self.inputs[1], *NO_RESULTS, grid=(1,))
        except triton.CompilationError:
            return self.record(case, "refused")
        except RuntimeError as error:
            # Errors of the verifier that the front end runs at its end.
            if "error encountered during parsing" in str(error):
                return self.record(case, "refused")
            return self.record(case, "error", f"{type(error).__name__}: {error}")
        except Exception as error:
            return self.record(case, "error", f"not refused by the front end, but here: {error}")
        return self.record(case, "undeclared", "the front end takes this dtype: declare it")


NO_RESULTS = (torch.zeros(1, dtype=torch.int64), torch.zeros(1, dtype=torch.float64))


def report(record: dict[str, str]) -> None:
    """One line for the test to read, apart from what kernels and Triton print."""
    print("\n" + json.dumps({"tilewright": 1, **record}), flush=True)


def run_group(runner: Runner, group: Sequence[Case]) -> None:
    """Reports the results of some cases; a half at a time where their common kernel fails."""
    report({"running": ", ".join(case.name for case in group), "dtype": runner.dtype})
    if len(group) == 1:
        report(runner.alone(group[0]))
        return
    try:
        results = runner.run(group)
    except Exception:
        middle = len(group) // 2
        run_group(runner, group[:middle])
        run_group(runner, group[middle:])
        return
    for result in results:
        report(result)


def run_dtype(dtype: str, folder: Path) -> None:
    """Reports the results of all cases for one dtype."""
    runner = Runner(dtype, folder)
    taken = [case for case in CASES if dtype in case.dtypes and not (case.once and dtype != case.dtypes[0])]
    for start in range(0, len(taken), GROUP):
        group = taken[start : start + GROUP]
        run_group(runner, group)
    once = {case.name for case in CASES if case.once}
    named = {case.name for case in taken} | once
    for case in {case.name: case for case in CASES if case.name not in named}.values():
        report({"running": case.name, "dtype": dtype})
        report(runner.refused(case))


def main(dtypes: Sequence[str]) -> None:
    """Reports the results of all cases."""
    # Deprecations, and the modules that Triton prints when it refuses one.
    warnings.simplefilter("ignore")
    with tempfile.TemporaryDirectory() as name:
        for dtype in dtypes:
            run_dtype(dtype, Path(name))


if __name__ == "__main__":
    main(sys.argv[1:] or DTYPES)
