"""Times the GEMM variants on this machine, once for each problem, and keeps the figures in the cache.

What is timed are the graph's own regions, with their epilogues and weights, one after another as layers have them: a
vendor call then has its switch from native code and its epilogue kernel, and weights come from where they come from in
a model. Figures are filed under everything they depend on; another CPU, thread count or version measures anew.
"""

import operator
from collections.abc import Callable, Sequence
from functools import partial
from typing import Any

import sympy
import torch
from torch.fx import Graph, GraphModule, Node

from tilewright.codegen.cpu.launch import num_threads
from tilewright.driver.kernels import Progress
from tilewright.driver.timing_store import Timings, may_measure, stored_or_measured
from tilewright.ir.facts import TensorType, TupleType, all_facts, fact, find_fact, set_fact
from tilewright.ir.graph import GraphInfo, InputSpec, Level, OutputSpec, get_tensor, info, set_info, update_info
from tilewright.ir.measurements import GemmKey, Measurements
from tilewright.ir.regions import Anchor, GemmTable, Region
from tilewright.ir.sizes import Size, product
from tilewright.passes.regions.specialize import gemm_key, variants_of
from tilewright.runtime.measure import Make, measure_variants

# Row counts and seconds for each problem, by opt_level.
_EFFORT: dict[int, tuple[tuple[int, ...], float]] = {
    2: ((1, 4, 16, 32, 64, 256), 0.15),
    3: ((1, 2, 4, 8, 16, 32, 64, 128, 256, 512, 1024, 2048), 3.0),
}
_MOST_REGIONS = 2
"""Regions of one problem that are timed together, so that each finds the other's weight in the nearer caches."""

Compile = Callable[[GraphModule], Callable[..., Any]]


def measurements_for(gm: GraphModule, opt_level: int, compile_one: Compile, progress: Progress | None) -> Measurements:
    """Timings for all GEMMs of a graph at level fused, from the cache where they are there.

    Args:
        gm: the graph.
        opt_level: how long to measure; below 2, with the setting ``tune`` off, or in checked mode, in which kernels
            take longer, nothing is measured.
        compile_one: compiles a graph at level specialized and returns what runs it.
        progress: called before each problem.
    """
    if opt_level not in _EFFORT or not may_measure():
        return Measurements(units=num_threads())
    problems: dict[GemmKey, list[Node]] = {}
    for node in gm.graph.nodes:
        region = find_fact(node, Region)
        if region is not None and region.anchor is Anchor.GEMM and _runs_alone(node):
            problems.setdefault(gemm_key(_body(gm, node)), []).append(node)
    found = {}
    for done, (key, calls) in enumerate(problems.items()):
        if progress is not None:
            progress(done, len(problems), f"timing GEMM {key.n}x{key.k}")
        measure = partial(_measure, gm, key, calls, opt_level, compile_one)
        found[key] = stored_or_measured("gemm-table", key, opt_level, measure)
    return Measurements(found, units=num_threads())


def _measure(gm: GraphModule, key: GemmKey, calls: list[Node], opt_level: int, compile_one: Compile) -> Timings:
    rows, budget = _EFFORT[opt_level]
    same_rows = [call for call in calls if _rows(call) == _rows(calls[0])]
    alone = regions_alone(gm, same_rows[:_MOST_REGIONS])
    runs = {}
    for variant in variants_of(key, num_threads()):
        specialize_all(alone, variant)
        runs[variant] = _runner(compile_one(alone), info(alone).inputs)
    return measure_variants(runs, rows, budget)


def _runner(run: Callable[..., Any], inputs: tuple[InputSpec, ...]) -> Make:
    def make(rows: int) -> Callable[[], None]:
        given = [_example(spec, rows) for spec in inputs]
        return lambda: run(*given)

    return make


def _example(spec: InputSpec, rows: int) -> torch.Tensor:
    """Contents of an input; of several unknown sizes the last counts the rows."""
    unknown = [axis for axis, size in enumerate(spec.shape) if not isinstance(size, int)]
    shape = [
        rows if axis in unknown[-1:] else size if isinstance(size, int) else 1 for axis, size in enumerate(spec.shape)
    ]
    return torch.randn(shape).to(spec.dtype) if spec.dtype.is_floating_point else torch.zeros(shape, dtype=spec.dtype)


def _body(gm: GraphModule, call: Node) -> GraphModule:
    body = gm.get_submodule(str(call.target))
    assert isinstance(body, GraphModule)
    return body


def _sources(call: Node) -> list[Node]:
    """What a region reads, in the order of its placeholders; sizes included."""
    return [source for source in call.args if isinstance(source, Node)]


def _rows(call: Node) -> tuple[Size, ...]:
    """Leading sizes of a region's first result."""
    return fact(call, TupleType).items[0].shape[:-1]


def _runs_alone(call: Node) -> bool:
    """Whether a program of this region alone can be called with any number of rows."""
    rows = _rows(call)
    symbols = [size for size in rows if not isinstance(size, int)]
    if not symbols or not all(isinstance(size, sympy.Symbol) for size in symbols):
        return False
    kinds = [find_fact(source, TensorType) for source in _sources(call)]
    sizes = [size for kind in kinds if kind is not None for size in kind.shape if not isinstance(size, int)]
    return all(kind is not None for kind in kinds) and set(sizes) == set(symbols)


def regions_alone(gm: GraphModule, calls: Sequence[Node]) -> GraphModule:
    """A graph at level fused that calls some regions of a graph one after the other, on the same rows.

    Weights are the graph's own. Nothing is returned, so results lie in planned memory, as in the middle of a model.
    """
    root, graph, specs = torch.nn.Module(), Graph(), []
    made: dict[Any, Node] = {}
    for number, call in enumerate(calls):
        sources = []
        for place, source in enumerate(_sources(call)):
            kind = fact(source, TensorType)
            key = source.target if source.op == "get_attr" else place
            if key not in made and source.op == "get_attr":
                root.register_buffer(f"weight_{len(made)}", get_tensor(gm, source).detach())
                made[key] = graph.get_attr(f"weight_{len(made)}")
            elif key not in made:
                made[key] = graph.placeholder(f"x_{place}")
                specs.append(InputSpec(f"x_{place}", kind.dtype, kind.shape))
            _copy_facts(source, made[key])
            sources.append(made[key])
        root.add_module(f"region_{number}", _body(gm, call))
        run = graph.call_module(f"region_{number}", tuple(sources))
        _copy_facts(call, run)
        for user in call.users:
            _copy_facts(user, graph.call_function(operator.getitem, (run, user.args[1])))
    graph.output(())
    alone = GraphModule(root, graph)
    set_info(alone, GraphInfo(Level.FUSED, tuple(specs), OutputSpec(tuple, ()), name="gemm"))
    return alone


def specialize_all(gm: GraphModule, variant: str) -> None:
    """Gives each region of a graph the same variant for every row count."""
    for call in gm.graph.find_nodes(op="call_module"):
        set_fact(call, GemmTable(product(_rows(call)), ((None, variant),)))
    update_info(gm, level=Level.SPECIALIZED)


def _copy_facts(source: Node, target: Node) -> None:
    for record in all_facts(source):
        set_fact(target, record)
