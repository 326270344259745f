"""Assembly: programs made with a stand-in emitter that runs each region eager give what the graphs give."""

import pytest
import torch
from tests.graphs import GraphBuilder, packed_bert
from torch import Tensor
from torch.fx import Node

from tilewright.codegen.assemble import assemble
from tilewright.codegen.builder import ProgramBuilder
from tilewright.codegen.eager import eager_step
from tilewright.codegen.region_call import RegionCall
from tilewright.errors import CodegenError
from tilewright.ir.program import Choice, EagerStep, ProgramSpec, ReadTokens, Storage
from tilewright.ir.sizes import BATCH, SEQ, TOKENS
from tilewright.passes.base import run_pass
from tilewright.passes.regions.find_regions import FindRegions
from tilewright.passes.regions.outline_regions import OutlineRegions
from tilewright.passes.regions.place import Place
from tilewright.passes.regions.specialize import Specialize
from tilewright.runtime.program import Program
from tilewright.runtime.stats import Stats

aten = torch.ops.aten
SYMBOLS = (BATCH, SEQ, TOKENS)


class NoKernels:
    """A launcher for programs without kernels."""

    def run_steps(self, steps: int, count: int, threads: int, /) -> None:
        """Never called with work to do."""
        assert count == 0


def run_eager(call: RegionCall, builder: ProgramBuilder, variant: str) -> tuple[EagerStep, ...]:
    """Stand-in emitter; in variant "vendor" through a scratch value, as real ones may."""
    if variant != "vendor":
        return (eager_step(call, "test", SYMBOLS),)
    view = call.outputs[0]
    scratch = builder.scratch(f"{call.name}_scratch", builder.dtype(view), view.shape)
    first = eager_step(RegionCall(call.name, call.graph, call.region, call.inputs, (scratch,)), "test", SYMBOLS)
    copy = EagerStep(lambda x, sizes: (x,), (scratch,), (view,), "test", (scratch.value,), (view.value,))
    return (first, copy)


def assembled(g: GraphBuilder, *outputs: Node, fuse: bool = True, gemm: str = "auto") -> ProgramSpec:
    """The program of a graph."""
    gm = g.done(*outputs)
    for pass_ in (FindRegions(fuse), OutlineRegions(), Specialize(gemm), Place()):
        gm, _ = run_pass(pass_, gm)
    return assemble(gm, run_eager)  # type: ignore[arg-type]


def run(spec: ProgramSpec, *inputs: Tensor) -> list[Tensor]:
    """Runs a program without kernels; loading checks that each value is written before it is read."""
    return list(Program(spec, {}, NoKernels(), Stats())(*inputs))


@pytest.mark.parametrize("gemm", ["triton", "vendor", "auto"])
@pytest.mark.parametrize("fuse", [True, False])
def test_packed_encoder(fuse: bool, gemm: str) -> None:
    g = packed_bert(layers=2)
    spec = assembled(g, *g.outputs, fuse=fuse, gemm=gemm)
    assert spec.symbols == (BATCH, SEQ, TOKENS)
    assert spec.bind == ((BATCH, 0, 0), (SEQ, 0, 1))
    assert sum(isinstance(step, ReadTokens) for step in spec.steps) == 1
    assert sum(isinstance(step, Choice) for step in spec.steps) == (0 if gemm == "vendor" else 13)
    assert [spec.values[index].storage for index in spec.outputs] == [Storage.OUTPUT] * 2
    for result, expected in zip(run(spec, *g.example), g.expected, strict=True):
        torch.testing.assert_close(result, expected, rtol=0, atol=0)


def test_row_index_has_room_for_a_full_batch() -> None:
    g = packed_bert(layers=1)
    spec = assembled(g, *g.outputs)
    index = next(step for step in spec.steps if isinstance(step, EagerStep))
    shapes = [spec.values[value].shape for value in index.writes]
    assert shapes == [(BATCH * SEQ,), (BATCH * SEQ,), (BATCH + 1,), (BATCH,), (BATCH,), (1, BATCH)]
    ids, mask = g.example
    full = run(spec, ids, torch.ones_like(mask))
    assert full[0].shape == (7, 13, 32)


def test_tables_keep_scratch_to_themselves() -> None:
    g = GraphBuilder()
    out = g.call(aten.gelu.default, g.linear(g.input("x", BATCH, 8), "gemm", 24))
    spec = assembled(g, out)
    (choice,) = spec.steps
    assert isinstance(choice, Choice)
    names = [spec.values[index].name for index in (*choice.reads, *choice.writes)]
    assert names == ["x", "gemm_weight", "gemm_bias", "gelu_default"]
    assert [(upper, variant, len(steps)) for upper, variant, steps in choice.table] == [
        (8, "triton_few", 1),
        (32, "triton", 1),
        (None, "vendor", 2),
    ]


def test_returned_inputs_weights_and_views() -> None:
    g = GraphBuilder()
    x, w = g.input("x", BATCH, 24), g.weight("w", 3, 4)
    y = g.call(aten.relu.default, x)
    outputs = (
        x,
        w,
        g.call(aten.permute.default, x, [1, 0]),
        g.call(aten.reshape.default, y, [7, 4, 6]),
        g.call(aten.select.int, w, 0, 1),
        y,
        y,
    )
    spec = assembled(g, *outputs)
    results = run(spec, *g.example)
    for result, expected in zip(results, g.expected, strict=True):
        torch.testing.assert_close(result, expected, rtol=0, atol=0)
        assert result.shape == expected.shape
    stored = [spec.values[index].storage for index in spec.outputs]
    assert stored == [Storage.INPUT, Storage.WEIGHT, *[Storage.OUTPUT] * 5]


def test_a_weight_used_twice_is_one_value() -> None:
    g = GraphBuilder()
    x, w = g.input("x", BATCH, 24), g.weight("w", 24)
    again = g.graph.get_attr("w")
    again.meta = dict(w.meta)
    g.values[again] = g.values[w]
    spec = assembled(g, g.call(aten.mul.Tensor, g.call(aten.add.Tensor, x, w), again))
    assert [value.name for value in spec.values if value.storage is Storage.WEIGHT] == ["w"]


def test_other_sizes_need_no_new_program() -> None:
    g = GraphBuilder()
    x = g.input("x", BATCH, SEQ, 24)
    places = g.call(aten.arange.start_step, 0, g.size(x, 1), 1, dtype=torch.float32)
    out = g.call(aten.add.Tensor, x, g.call(aten.unsqueeze.default, places, 1))
    spec = assembled(g, out)
    for batch, length in [(1, 1), (3, 17), (20, 2)]:
        x_value = torch.randn(batch, length, 24)
        expected = x_value + torch.arange(length).float()[:, None]
        torch.testing.assert_close(run(spec, x_value)[0], expected, rtol=0, atol=0)


def test_a_region_without_a_kernel_runs_eager_and_leaves_nothing_behind() -> None:
    def fails(call: RegionCall, builder: ProgramBuilder, variant: str) -> tuple[EagerStep, ...]:
        builder.scratch("left", torch.float32, (1,))
        builder.weight_layout(call.inputs[1].value, "kn")
        raise CodegenError("no kernel for this", why="a test says so")

    g = GraphBuilder()
    gm = g.done(g.linear(g.input("x", BATCH, 8), "gemm", 24))
    for pass_ in (FindRegions(), OutlineRegions(), Specialize(), Place()):
        gm, _ = run_pass(pass_, gm)
    spec = assemble(gm, fails)  # type: ignore[arg-type]
    assert spec.notes["eager"] == {"region_0": "no kernel for this (a test says so)"}
    assert [value.name for value in spec.values] == ["x", "gemm_weight", "gemm_bias", "gemm"]
    assert set(spec.weights) == {"gemm_weight", "gemm_bias"}
    torch.testing.assert_close(run(spec, *g.example)[0], g.expected[0])


def test_work_outside_regions_is_refused() -> None:
    g = GraphBuilder()
    gm = g.done(g.call(aten.relu.default, g.input("x", BATCH, 24), name="stray"))
    with pytest.raises(CodegenError, match="outside of all regions") as error:
        assemble(gm, run_eager)  # type: ignore[arg-type]
    assert "stray" in str(error.value)


def test_weight_layouts_are_shared_and_named() -> None:
    builder = ProgramBuilder()
    index = builder.new_weight("w", torch.zeros(70, 8))
    panels = builder.weight_layout(index, "panels:64")
    assert builder.weight_layout(index, "panels:64") == builder.weight_layout(panels, "panels:64") == panels
    assert builder.values[panels].shape == (2, 8, 64)
    assert builder.values[builder.weight_layout(index, "kn")].shape == (8, 70)
    assert builder.weights["w:panels:64"].layout == "panels:64"
    for layout in ("panels:0", "nk", "kn:2"):
        with pytest.raises(CodegenError, match="no layout"):
            builder.weight_layout(index, layout)
    with pytest.raises(CodegenError, match="only a weight"):
        builder.weight_layout(builder.scratch("s", torch.float32, (1,)).value, "kn")
