"""Kernels are named and keyed by structure; their text compiles for a GPU; helpers are included as far as used."""

import importlib.util
import sys
from pathlib import Path
from types import ModuleType

import pytest
import torch
from tests.codegen.bodies import Body, emit
from tests.golden.kernels import FAMILIES
from tests.graphs import packed_bert

from tilewright.codegen.assemble import assemble
from tilewright.driver.kernels import distinct_sources
from tilewright.ir.facts import Origin, set_fact
from tilewright.ir.kernels import KernelSource
from tilewright.ir.program import KernelStep
from tilewright.ir.sizes import TOKENS
from tilewright.passes.base import run_pass
from tilewright.passes.regions.find_regions import FindRegions
from tilewright.passes.regions.outline_regions import OutlineRegions
from tilewright.passes.regions.place import Place
from tilewright.passes.regions.specialize import Specialize

aten = torch.ops.aten


def residual(layer: int, width: int = 64, op: object = aten.add.Tensor) -> KernelStep:
    """The same computation at another place of a model: other node names, modules and source lines."""
    body = Body()
    for _ in range(layer):
        body.graph._graph_namespace.create_name("add_tensor", None)
    x, y = body.input((TOKENS, width)), body.input((TOKENS, width))
    out = body.call(op, x, y)
    set_fact(out, Origin(f"model.py:{100 + layer} x + y", f"encoder.layer.{layer}"))
    norm = body.call(aten.layer_norm.default, out, [width], None, None, 1e-5)
    (step,) = emit(body.module(norm))[0]
    assert isinstance(step, KernelStep)
    return step


def test_equal_structure_has_one_kernel() -> None:
    first, second = residual(0), residual(7)
    assert first.kernel == second.kernel
    assert hash(first.kernel) == hash(second.kernel)
    assert first.origin != second.origin
    assert "encoder.layer.7" in second.kernel.readable
    assert "encoder.layer" not in second.kernel.text


@pytest.mark.parametrize("other", [{"width": 96}, {"op": aten.mul.Tensor}], ids=str)
def test_other_structure_has_another_name(other: dict[str, object]) -> None:
    assert residual(0).kernel.name != residual(0, **other).kernel.name  # type: ignore[arg-type]


def kernels_of(layers: int, gemm: str) -> list[KernelSource]:
    """Distinct kernels of a packed encoder."""
    g = packed_bert(layers)
    gm = g.done(*g.outputs)
    for pass_ in (FindRegions(), OutlineRegions(), Specialize(gemm), Place()):
        gm, _ = run_pass(pass_, gm)
    return distinct_sources(assemble(gm))


@pytest.mark.parametrize("gemm", ["auto", "triton", "vendor"])
def test_more_layers_bring_no_new_kernels(gemm: str) -> None:
    assert kernels_of(2, gemm) == kernels_of(6, gemm)


def test_helpers_are_included_as_far_as_used() -> None:
    plain, scattered = residual(0).kernel.text, FAMILIES["scatter"]()[0].kernel.text
    assert plain.count("@triton.jit") == 1
    assert scattered.count("@triton.jit") == 3
    assert "def gelu(" in scattered
    assert "def tanh(" in scattered


def load(source: KernelSource, folder: Path) -> ModuleType:
    path = folder / f"{source.name}.py"
    path.write_text(source.readable)
    spec = importlib.util.spec_from_file_location(source.name, path)
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    sys.modules[source.name] = module
    spec.loader.exec_module(module)
    return module


@pytest.mark.parametrize("family", FAMILIES)
def test_kernels_compile_for_a_gpu(family: str, tmp_path: Path) -> None:
    """Block sizes are compile-time parameters: a GPU takes smaller steps along K with the same text."""
    import triton
    from triton.backends.compiler import GPUTarget
    from triton.compiler import ASTSource

    for step in FAMILIES[family](torch.float16):
        source = step.kernel
        constants = {name: 32 if name == "BLOCK_KS" else value for name, value in source.constexprs}
        signature = {name: kind.partition(":")[0] for name, kind in source.signature}
        signature.update(dict.fromkeys(constants, "constexpr"))
        function = getattr(load(source, tmp_path), source.function)
        places = {(function.arg_names.index(name),): value for name, value in constants.items()}
        options = {"num_warps": source.num_warps, "num_stages": source.num_stages}
        compiled = triton.compile(
            ASTSource(function, signature, places), target=GPUTarget("cuda", 90, 32), options=options
        )
        assert compiled.asm["cubin"]
        if family in ("gemm", "attention_packed", "attention_padded"):
            assert "mma" in compiled.asm["ptx"]
