"""From kernel sources to built kernels: each distinct source once."""

from collections.abc import Callable, Iterable, Iterator

from tilewright.errors import CodegenError, UnsupportedOp
from tilewright.ir.kernels import BuiltKernel, KernelSource
from tilewright.ir.program import Choice, KernelStep, ProgramSpec, Step

Progress = Callable[[int, int, str], None]
"""Told before each piece of work: how many are done, how many there are of this kind, and what it is."""


def kernel_steps(steps: Iterable[Step]) -> Iterator[KernelStep]:
    """All kernel launches of a program, those inside tables included."""
    for step in steps:
        if isinstance(step, KernelStep):
            yield step
        elif isinstance(step, Choice):
            for _, _, inner in step.table:
                yield from kernel_steps(inner)


def distinct_sources(spec: ProgramSpec) -> list[KernelSource]:
    """The kernels of a program in order of first use, each once."""
    return list(dict.fromkeys(step.kernel for step in kernel_steps(spec.steps)))


def build_kernels(
    spec: ProgramSpec, progress: Progress | None = None
) -> tuple[dict[KernelSource, BuiltKernel], dict[KernelSource, str]]:
    """Builds every distinct kernel of the program, from the cache where it is there.

    Args:
        progress: called before each kernel.

    Returns:
        The built kernels; and those that cannot be built, with the reason.
    """
    from tilewright.codegen.cpu.build import build

    sources = distinct_sources(spec)
    built: dict[KernelSource, BuiltKernel] = {}
    failed: dict[KernelSource, str] = {}
    for done, source in enumerate(sources):
        if progress is not None:
            progress(done, len(sources), f"building {source.name}")
        try:
            built[source] = build(source)
        except (CodegenError, UnsupportedOp) as error:
            failed[source] = str(error)
    if progress is not None:
        progress(len(sources), len(sources), "")
    return built, failed
