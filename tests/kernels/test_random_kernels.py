"""Random kernels give the values they were written to give; Triton's interpreter agrees with those values too."""

import importlib.util
import os
import subprocess
import sys
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import pytest
import torch
from random_kernels import RandomKernel
from random_operations import random_kernel

pytestmark = pytest.mark.usefixtures("one_thread")
KERNELS, CHUNK = 320, 16
INTERPRETED = 40


def load_kernel(made: RandomKernel, path: Path) -> Any:
    """The kernel's function, from a file with its text."""
    path.write_text(made.text)
    spec = importlib.util.spec_from_file_location(path.stem, path)
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module.kernel


def copies(made: RandomKernel) -> list[torch.Tensor | int]:
    return [a.clone() if isinstance(a, torch.Tensor) else a for a in made.arguments]


def check(made: RandomKernel, arguments: list[torch.Tensor | int], where: object) -> None:
    for number, (argument, expected) in enumerate(zip(arguments, made.expected, strict=True)):
        if isinstance(argument, torch.Tensor):
            assert torch.equal(argument, expected), f"argument a{number} of {where}\n{made.text}"


def run_and_check(seeds: Iterable[int], folder: Path) -> None:
    """Runs the kernels of some seeds from files in a folder."""
    for seed in seeds:
        made = random_kernel(seed)
        path = folder / f"random_{seed}.py"
        arguments = copies(made)
        load_kernel(made, path)[made.grid](*arguments)
        check(made, arguments, path)


def uses_bf16(made: RandomKernel) -> bool:
    tensors = [a for a in made.arguments if isinstance(a, torch.Tensor)]
    return "bfloat16" in made.text or any(tensor.dtype == torch.bfloat16 for tensor in tensors)


@pytest.mark.parametrize("start", range(0, KERNELS, CHUNK))
def test_random_kernels(start: int, tmp_path: Path) -> None:
    run_and_check(range(start, start + CHUNK), tmp_path)


def test_the_interpreter_agrees(tmp_path: Path) -> None:
    """A second opinion about the values themselves; it gets bf16 wrong."""
    seeds = [seed for seed in range(INTERPRETED * 4) if not uses_bf16(random_kernel(seed))][:INTERPRETED]
    code = f"""
import sys
from pathlib import Path
sys.path.insert(0, {str(Path(__file__).parent)!r})
from test_random_kernels import run_and_check
run_and_check({seeds}, Path({str(tmp_path)!r}))
"""
    environment = {**os.environ, "TRITON_INTERPRET": "1"}
    result = subprocess.run(
        [sys.executable, "-c", code], capture_output=True, text=True, timeout=300, check=False, env=environment
    )
    assert result.returncode == 0, result.stderr[-3000:]


def test_equal_seeds_give_equal_kernels() -> None:
    assert random_kernel(5).text == random_kernel(5).text
