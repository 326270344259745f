"""``tilewright.compile`` and the way from one captured graph to a program."""

import warnings
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
from torch.fx import GraphModule, Interpreter

from tilewright import settings
from tilewright.codegen.assemble import assemble
from tilewright.codegen.builder import ProgramBuilder
from tilewright.codegen.cpu.launch import num_threads
from tilewright.codegen.emit import emit_region
from tilewright.codegen.region_call import RegionCall
from tilewright.driver.compiled import CompiledModel
from tilewright.driver.kernels import Progress, build_kernels, kernel_steps
from tilewright.driver.options import CompileOptions
from tilewright.driver.sentence_transformers import compile_pipeline, is_pipeline
from tilewright.driver.tune_attention import attention_timings
from tilewright.driver.tuning import measurements_for
from tilewright.errors import CodegenError
from tilewright.ir.graph import Level
from tilewright.ir.kernels import KernelSource
from tilewright.ir.measurements import Measurements
from tilewright.ir.program import KernelStep, ProgramSpec, VendorLinear
from tilewright.ir.stored_weight import StoredParameter
from tilewright.models.capture import check_model
from tilewright.models.gguf_model import load_gguf
from tilewright.passes.add_cache import AddCache
from tilewright.passes.base import Observer, PassRecord
from tilewright.passes.fill_pages import FillPages
from tilewright.passes.observe import ArtifactWriter
from tilewright.passes.pipeline import pipeline, run_pipeline
from tilewright.passes.split_source import SplitSource
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


def compile(
    model: Any,
    *,
    dtype: torch.dtype | str | None = None,
    opt_level: int = 2,
    unpad: str = "auto",
    target: str = "auto",
    gemm: str = "auto",
    cache_dir: str | Path | None = None,
    without: Sequence[str] = (),
    activations: str = "int8",
    kv_dtype: torch.dtype | str | None = None,
    progress: Progress | None = None,
) -> Any:
    """Compiles a model into Triton kernels.

    Args:
        model: a transformers model, any ``torch.nn.Module``, an ``ExportedProgram``, or an ``fx.GraphModule``; in eval
            mode. It is not changed. A model whose inputs cannot be known beforehand is captured at its first call.
            Also a ``SentenceTransformer``, ``CrossEncoder`` or another pipeline of sentence-transformers; or the path
            of a ``.gguf`` file, whose weights are multiplied as they are stored.
        dtype: "fp32", "bf16", "fp16" or "fp64", or torch's own: what the model is converted to, as ``model.to`` does.
            On a processor that does not multiply half types they are computed in fp32, and results rounded to them.
            "int8": products with weights in whole numbers of 8 bits, weights rounded once for each output channel, rows
            when they are computed; all else, and what is returned, in the model's own. "int4": likewise with weights of
            4 bits in groups of 64, each from its least to its largest element, and rows rounded by blocks of 32. None:
            the model as it is.
        opt_level: 0 captures, normalizes and runs reference kernels (the oracle); 1 adds packing; 2 adds fusion and
            measured GEMM tables; 3 tunes longer.
        unpad: "auto" removes padding where it is legal and records why where not; "on" refuses instead of padding;
            "off".
        target: "cpu", or "auto", which is the CPU in this version.
        gemm: "auto" chooses per GEMM and row count; "triton" or "vendor" uses one alone.
        cache_dir: where kernels and tables are kept; default: the user's cache folder.
        without: passes to leave out, to see what they bring: "slice_rows", "merge_linears".
        activations: what the rows are that are multiplied with weights in blocks (of a file, or "int4"): "int8" rounds
            them by blocks of 32, which is faster, "float" does not.
        kv_dtype: type of the keys and values that generation keeps, "fp32", "bf16", "fp16" or "int8": whole numbers of
            8 bits, with a scale for each token and head. None: that of the model.
        progress: called as ``progress(done, total, what)`` before each piece of work, whenever something is compiled.

    Returns:
        A ``CompiledModel``: a callable that takes what the model takes and returns the same output class with the same
        fields. Masked positions of per-token outputs are 0. A causal model, and an encoder-decoder, has ``generate`` as
        transformers has it; what it is used for is compiled when it is first used (``CompiledModel.warmup`` compiles
        all). Of a pipeline, a copy of its own class whose transformers models are compiled.

    Raises:
        OptionError: an option has a value that is not a choice.
        CaptureError: it is no model, or is in training mode.
        GgufError: a file is damaged, or its model is not read.
        PackingRefused: ``unpad="on"`` and packing is not legal, or the model cannot be captured.
    """
    folder = Path(cache_dir) if cache_dir else None
    options = CompileOptions(dtype, opt_level, unpad, target, gemm, folder, tuple(without), activations, kv_dtype)
    if isinstance(model, str | Path) and Path(model).suffix == ".gguf":
        stored = load_gguf(model)
        return CompiledModel(stored.model, options, stored=stored, progress=progress)
    if is_pipeline(model):
        return compile_pipeline(model, options, progress)
    check_model(model)
    return CompiledModel(model, options, progress=progress)


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
