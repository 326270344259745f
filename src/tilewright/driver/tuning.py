"""Times the GEMM variants on this machine, once for each problem, and keeps the figures in the cache.

What is timed is a whole program of one linear, run as models run it: the vendor library through its step, our kernels
through theirs. Figures are filed under everything they depend on; another CPU, thread count or version measures anew.
"""

import json
from collections.abc import Callable
from typing import Any

import torch
from torch.fx import Graph, GraphModule

from tilewright import settings
from tilewright.codegen.cpu import store
from tilewright.codegen.cpu.launch import num_threads
from tilewright.codegen.cpu.target import CpuTarget
from tilewright.codegen.cpu.version import toolchain_version
from tilewright.ir.facts import Origin, TensorType, find_fact, set_fact
from tilewright.ir.graph import GraphInfo, InputSpec, Level, OutputSpec, set_info
from tilewright.ir.measurements import GemmKey, Measurements
from tilewright.ir.regions import GEMM_VARIANTS, Anchor, Region
from tilewright.ir.sizes import BATCH, Size
from tilewright.passes.specialize import gemm_key, gemm_of
from tilewright.runtime.measure import Make, measure_gemm

# Row counts and seconds for each problem, by opt_level. Between two counts that differ in their winner the table stays
# with the vendor library unless one variant beats it at both, so more counts make a finer table.
_EFFORT: dict[int, tuple[tuple[int, ...], float]] = {
    2: ((1, 8, 32, 128, 512), 0.25),
    3: ((1, 2, 4, 8, 16, 32, 64, 128, 256, 512, 1024, 2048), 3.0),
}

Compile = Callable[[GraphModule, str], Callable[..., Any]]
Progress = Callable[[int, int, str], None]


def measurements_for(gm: GraphModule, opt_level: int, compile_one: Compile, progress: Progress | None) -> Measurements:
    """Timings for all GEMMs of a graph at level fused, from the cache where they are there.

    Args:
        gm: the graph.
        opt_level: how long to measure; below 2, with the setting ``tune`` off, or in checked mode, in which kernels
            take longer, nothing is measured.
        compile_one: compiles a graph with one GEMM variant alone and returns what runs it.
        progress: called before each problem with (number done, number in all, name).
    """
    if opt_level not in _EFFORT or not settings.get("tune") or settings.get_once("check"):
        return Measurements()
    regions = [node for node in gm.graph.nodes if (fact := find_fact(node, Region)) and fact.anchor is Anchor.GEMM]
    bodies = [gm.get_submodule(str(node.target)) for node in regions]
    keys = list(dict.fromkeys(gemm_key(gemm_of(body)) for body in bodies if isinstance(body, GraphModule)))
    found = {}
    for done, key in enumerate(keys):
        if progress is not None:
            progress(done, len(keys), f"timing GEMM {key.n}x{key.k}")
        found[key] = _stored(key, opt_level) or _measure(key, opt_level, compile_one)
    return Measurements(found)


Timings = dict[str, tuple[tuple[int, float], ...]]


def _entry(key: GemmKey, opt_level: int) -> str:
    parts = (key.n, key.k, key.dtype, opt_level, CpuTarget.native().key, num_threads(), torch.__version__)
    return store.key("gemm-table", toolchain_version(), *map(str, parts))


def _stored(key: GemmKey, opt_level: int) -> Timings | None:
    content = store.get(_entry(key, opt_level))
    if content is None:
        return None
    return {name: tuple((rows, seconds) for rows, seconds in times) for name, times in json.loads(content).items()}


def _measure(key: GemmKey, opt_level: int, compile_one: Compile) -> Timings:
    rows, budget = _EFFORT[opt_level]
    dtype = getattr(torch, key.dtype)
    runs = {name: _runner(compile_one(_linear(key, dtype), name), key, dtype) for name in GEMM_VARIANTS}
    timings = measure_gemm(runs, rows, budget)
    store.put(_entry(key, opt_level), json.dumps(timings).encode())
    return timings


def _runner(run: Callable[..., Any], key: GemmKey, dtype: torch.dtype) -> Make:
    def make(rows: int) -> Callable[[], None]:
        x = torch.randn(rows, key.k).to(dtype)
        return lambda: run(x)

    return make


def _linear(key: GemmKey, dtype: torch.dtype) -> GraphModule:
    """A normalized graph of one linear on x [B, K]."""
    root = torch.nn.Module()
    root.register_buffer("weight", torch.randn(key.n, key.k).to(dtype))
    root.register_buffer("bias", torch.randn(key.n).to(dtype))
    graph = Graph()
    x, weight, bias = graph.placeholder("x"), graph.get_attr("weight"), graph.get_attr("bias")
    out = graph.call_function(torch.ops.aten.linear.default, (x, weight, bias))
    graph.output((out,))
    shapes: dict[Any, tuple[Size, ...]] = {x: (BATCH, key.k), weight: (key.n, key.k), bias: (key.n,)}
    shapes[out] = (BATCH, key.n)
    for node, shape in shapes.items():
        set_fact(node, TensorType(shape, dtype))
        set_fact(node, Origin(made_by="tuning"))
    gm = GraphModule(root, graph)
    output = OutputSpec(lambda flat: flat[0], ("out",))
    set_info(gm, GraphInfo(Level.NORMALIZED, (InputSpec("x", dtype, (BATCH, key.k)),), output, name="gemm"))
    return gm
