"""Runs one of Triton's own tutorials on the CPU: ``python run_tutorial.py FILE``; the exit code tells.

The files are written for GPUs. Here tensors asked for on "cuda" are made on the CPU, nothing is timed or plotted, and
autotuning tries two configurations. What a file computes when it is imported is run; where the work is in functions, a
few small sizes are called. Results that a file only prints are compared here.
"""

import contextlib
import importlib.util
import io
import runpy
import sys
import types
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
import triton
from torch.overrides import TorchFunctionMode

CONFIGURATIONS = 2
Names = dict[str, Any]


def _is_cuda(argument: Any) -> bool:
    return isinstance(argument, str) and argument == "cuda"


class OnTheCpu(TorchFunctionMode):
    """Calls that name the device "cuda" get the CPU."""

    def __torch_function__(
        self, func: Callable[..., Any], types: Sequence[type], args: Sequence[Any] = (),
        kwargs: Mapping[str, Any] | None = None,
    ) -> Any:  # fmt: skip
        if func is torch.Tensor.is_cuda.__get__:  # type: ignore[attr-defined]
            return True
        named = {key: "cpu" if _is_cuda(value) else value for key, value in (kwargs or {}).items()}
        return func(*("cpu" if _is_cuda(arg) else arg for arg in args), **named)


def once(function: Callable[[], Any], *args: Any, quantiles: Sequence[float] | None = None, **kwargs: Any) -> Any:
    """Stands for ``triton.testing.do_bench``: calls the function and reports some time."""
    function()
    return [1.0] * len(quantiles) if quantiles else 1.0


def prepare() -> None:
    """Takes timing, plotting and GPU queries out of the libraries."""
    triton.testing.do_bench = once
    triton.testing.do_bench_cudagraph = once
    triton.testing.Mark.run = lambda *args, **kwargs: None
    tuner = triton.runtime.Autotuner
    start = tuner.__init__

    def short(self: Any, fn: Any, arg_names: Any, configs: Any, *args: Any, **kwargs: Any) -> None:
        start(self, fn, arg_names, configs[:CONFIGURATIONS], *args, **kwargs)

    tuner.__init__ = short
    _describe_libdevice()
    if importlib.util.find_spec("tabulate") is None:
        sys.modules["tabulate"] = types.SimpleNamespace(tabulate=str)  # type: ignore[assignment]
    properties = types.SimpleNamespace(multi_processor_count=2, name="CPU", total_memory=1 << 33)
    torch.cuda.get_device_properties = lambda *args: properties
    torch.cuda.get_device_capability = lambda *args: (0, 0)
    torch.cuda.synchronize = lambda *args: None


def _describe_libdevice() -> None:
    """The one tutorial that knows no backend but CUDA and ROCm asks which library of functions to name."""
    driver = triton.runtime.driver.active
    target = driver.get_current_target

    def answer() -> Any:
        asks = sys._getframe(1).f_globals
        if asks["__name__"] == "tutorial" and "libdevice" in asks:
            return types.SimpleNamespace(backend="cuda")
        return target()

    driver.get_current_target = answer


def close(names: Names, ours: str, reference: str, tolerance: float = 1e-6) -> None:
    torch.testing.assert_close(names[ours], names[reference], rtol=tolerance, atol=tolerance)


def attention(names: Names) -> None:
    for causal in (False, True):
        names["test_op"](1, 2, 128, 64, causal, False, "bwd", "triton-fp16")  # compares the forward pass too


def dropout(names: Names) -> None:
    x = names["x"]
    for out in (names["output"], names["output2"], names["output3"]):
        kept = out != 0
        torch.testing.assert_close(out[kept], x[kept] / 0.5)
    assert torch.equal(names["output"], names["output2"])


def persistent(names: Names) -> None:
    for size in (32, 512):
        names["validate"](size, size, size, torch.float16)


def block_scaled(names: Names) -> None:
    for form in ("mxfp4", "nvfp4", "mxfp8", "mixed"):
        names["validate_block_scaled"](256, 256, 256, block_scale_type=form)


CHECKS: dict[str, Callable[[Names], None]] = {
    "01-vector-add.py": lambda names: close(names, "output_triton", "output_torch"),
    "03-matrix-multiplication.py": lambda names: close(names, "triton_output", "torch_output", 1e-2),
    "04-low-memory-dropout.py": dropout,
    "06-fused-attention.py": attention,
    "07-extern-functions.py": lambda names: close(names, "output_triton", "output_torch"),
    "09-persistent-matmul.py": persistent,
    "10-block-scaled-matmul.py": block_scaled,
}


def main(path: Path) -> None:
    """Raises what the tutorial, or the comparison of its results, raises."""
    prepare()
    printed = io.StringIO()
    with OnTheCpu(), contextlib.redirect_stdout(printed):
        names = runpy.run_path(str(path), run_name="tutorial")
        CHECKS.get(path.name, lambda names: None)(names)
    assert "❌" not in printed.getvalue(), printed.getvalue()


if __name__ == "__main__":
    main(Path(sys.argv[1]))
