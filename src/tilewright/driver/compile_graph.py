"""The way from one captured graph to a program: passes, measurements, kernels."""

import warnings
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch.fx import GraphModule, Interpreter

from tilewright import settings
from tilewright.codegen.assemble import assemble
from tilewright.codegen.builder import ProgramBuilder
from tilewright.codegen.cpu.launch import num_threads
from tilewright.codegen.emit import emit_region
from tilewright.codegen.region_call import RegionCall
from tilewright.driver.kernels import Progress, build_kernels, kernel_steps
from tilewright.driver.options import CompileOptions
from tilewright.driver.tune_attention import attention_timings
from tilewright.driver.tuning import measurements_for
from tilewright.errors import CodegenError
from tilewright.ir.graph import Level
from tilewright.ir.kernels import KernelSource
from tilewright.ir.measurements import Measurements
from tilewright.ir.program import KernelStep, ProgramSpec, VendorLinear
from tilewright.ir.stored_weight import StoredParameter
from tilewright.passes.base import Observer, PassRecord
from tilewright.passes.observe import ArtifactWriter
from tilewright.passes.pipeline import pipeline, run_pipeline
from tilewright.passes.steps.add_cache import AddCache
from tilewright.passes.steps.fill_pages import FillPages
from tilewright.passes.steps.split_source import SplitSource
from tilewright.runtime.program import Program
from tilewright.runtime.stats import Stats


@dataclass(eq=False)
class CompiledGraph:
    """One graph, compiled.

    Attributes:
        graph: the graph at the last level reached.
        records: what each pass did.
        spec: the program as data; None at opt_level 0, where the graph itself is run on the reference kernels.
        program: the loaded program; None at opt_level 0.
        stats: counters of its runs.
    """

    graph: GraphModule
    records: tuple[PassRecord, ...]
    spec: ProgramSpec | None
    program: Program | None
    stats: Stats

    def __call__(self, *inputs: torch.Tensor) -> list[torch.Tensor]:
        """Runs on the flat inputs, in placeholder order; returns the flat outputs."""
        if self.program is not None:
            return self.program(*inputs)
        with torch.no_grad():
            outputs: Sequence[torch.Tensor] = Interpreter(self.graph).run(*inputs)
        self.stats.calls += 1
        return list(outputs)


def compile_graph(
    gm: GraphModule,
    options: CompileOptions,
    *,
    observers: Sequence[Observer] = (),
    progress: Progress | None = None,
    cache: AddCache | FillPages | None = None,
    split: SplitSource | None = None,
    stored: Mapping[str, StoredParameter] | None = None,
) -> CompiledGraph:
    """Compiles a graph at level exported.

    Args:
        gm: the captured graph; it is rewritten in place.
        options: as of ``compile``.
        observers: see the graph around every pass.
        progress: called before each kernel build.
        cache: makes the graph one step of generation, or what fills the pages of a source.
        split: takes one half of an encoder-decoder first.
        stored: weights that a file stores, by the names that the graph has for them.
    """
    overrides = {"cache_dir": options.cache_dir} if options.cache_dir else {}
    with settings.scope(**overrides):
        dump_dir = settings.get("dump_dir")
        watching = [*observers, *([ArtifactWriter(dump_dir)] if dump_dir else [])]
        gm, records = _run_passes(gm, options, watching, progress, cache, split, stored)
        stats = Stats(compilations=1)
        if options.opt_level == 0:
            return CompiledGraph(gm, records, None, None, stats)
        program = load(gm, stats, progress)
        return CompiledGraph(gm, records, program.spec, program, stats)


def _run_passes(
    gm: GraphModule,
    options: CompileOptions,
    observers: Sequence[Observer],
    progress: Progress | None,
    cache: AddCache | FillPages | None,
    split: SplitSource | None,
    stored: Mapping[str, StoredParameter] | None,
) -> tuple[GraphModule, tuple[PassRecord, ...]]:
    """The pipeline; its last passes choose by measurements, and what to measure is known once regions are."""
    chosen: dict[str, Any] = {
        "quantize": options.quantized,
        "without": options.without,
        "cache": cache,
        "split": split,
        "stored": stored,
        "activations": options.activations,
    }
    passes = pipeline(options.opt_level, options.unpad, options.gemm, **chosen)
    front = [each for each in passes if each.requires < Level.FUSED]
    gm, records = run_pipeline(gm, front, observers)
    if options.opt_level == 0:
        return gm, records
    found = Measurements(units=num_threads())
    if options.gemm == "auto":
        found = measurements_for(gm, options.opt_level, _compile_specialized, progress)
    found = replace(found, attention=attention_timings(gm, options.opt_level, compile_attention, progress))
    passes = pipeline(options.opt_level, options.unpad, options.gemm, found, **chosen)
    gm, more = run_pipeline(gm, passes[len(front) :], observers, first=len(front) + 1)
    return gm, records + more


def _compile_specialized(gm: GraphModule) -> Program:
    """A specialized graph as a program. It may return nothing, which no level's spec allows, so it is not verified."""
    passes = [each for each in pipeline(2) if each.requires >= Level.SPECIALIZED]
    gm, _ = run_pipeline(gm, passes, verify=False)
    return load(gm, Stats())


def compile_attention(gm: GraphModule, variant: str) -> Program:
    """A normalized graph as a program on packed tokens with one form of attention."""
    passes = [each for each in pipeline(2, "on", attention=variant) if each.ensures > Level.NORMALIZED]
    gm, _ = run_pipeline(gm, passes)
    return load(gm, Stats())


def load(gm: GraphModule, stats: Stats, progress: Progress | None = None) -> Program:
    """Builds the kernels of a placed graph and makes its program ready to run.

    A region whose kernel cannot be built runs eager, with the reason in the spec's ``notes`` and a warning.
    """
    from tilewright.codegen.cpu.launch import launcher
    from tilewright.codegen.cpu.microkernel import interleaved_group
    from tilewright.codegen.cpu.target import CpuTarget

    failed: dict[KernelSource, str] = {}
    target = CpuTarget.native()
    names = {torch.bfloat16: "bf16", torch.int8: "i8"}
    interleaved = {dtype: interleaved_group(name, target) for dtype, name in names.items()}

    def emit(call: RegionCall, builder: ProgramBuilder, variant: str | None) -> tuple[KernelStep | VendorLinear, ...]:
        steps = emit_region(call, builder, variant)
        for step in kernel_steps(steps):
            if step.kernel in failed:
                raise CodegenError("its kernel cannot be built", where=call.name, why=failed[step.kernel])
        return steps

    while True:
        spec = assemble(gm, emit, interleaved)
        built, broken = build_kernels(spec, progress)
        if not broken:
            return Program(spec, built, launcher(), stats)
        for reason in broken.values():
            warnings.warn(f"a kernel cannot be built, its part of the model runs eager: {reason}", stacklevel=2)
        failed |= broken
