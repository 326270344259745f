"""What cannot be lowered stops at compile time with the operation, the kernel, the Python line and advice."""

from pathlib import Path

import pytest
import torch
import triton
import triton.language as tl

from tilewright.codegen.cpu.lower.kernel import lower_module
from tilewright.codegen.cpu.target import CpuTarget
from tilewright.codegen.cpu.ttir.parser import parse_module, parse_type
from tilewright.codegen.cpu.ttir.records import walk
from tilewright.codegen.cpu.ttir.text import closing, split_top, strip_locations
from tilewright.errors import UnsupportedOp


@triton.jit
def assembly_kernel(x_ptr, BLOCK: tl.constexpr):
    i = tl.arange(0, BLOCK)
    x = tl.load(x_ptr + i)
    y = tl.inline_asm_elementwise("mov.b32 $0, $1;", "=r,r", [x], dtype=tl.int32, is_pure=True, pack=1)
    tl.store(x_ptr + i, y)


@triton.jit
def huge_kernel(x_ptr, BLOCK: tl.constexpr):
    i = tl.arange(0, BLOCK)
    x = tl.load(x_ptr + i)
    for _ in tl.static_range(40):
        x = tl.cumsum(x, 0)
    tl.store(x_ptr + i, x)


def line_of(text: str) -> int:
    return 1 + next(n for n, line in enumerate(Path(__file__).read_text().splitlines()) if text in line)


def test_an_unknown_operation_names_the_python_line() -> None:
    with pytest.raises(UnsupportedOp) as caught:
        assembly_kernel[(1,)](torch.zeros(16, dtype=torch.int32), BLOCK=16)
    message = str(caught.value)
    assert "tt.elementwise_inline_asm" in message
    assert "assembly_kernel" in message
    assert f"{Path(__file__).name}:{line_of('y = tl.inline_asm')}" in message
    assert "do:" in message


def test_too_much_scratch_memory_is_refused() -> None:
    with pytest.raises(UnsupportedOp, match="more than 256 MB"):
        huge_kernel[(1,)](torch.zeros(1, dtype=torch.int64), BLOCK=1 << 20)


RECURSION = """
module {
  tt.func public @k(%arg0: i32) {
    tt.call @f(%arg0) : (i32) -> ()
    tt.return
  }
  tt.func private @f(%arg0: i32) {
    tt.call @f(%arg0) : (i32) -> ()
    tt.return
  }
}
"""


def test_recursion_is_refused() -> None:
    with pytest.raises(UnsupportedOp, match="calls itself"):
        lower_module(RECURSION, CpuTarget.named("avx2"))


def test_a_type_without_meaning_is_refused() -> None:
    text = 'module {\n  tt.func public @k(%a: !tt.tensordesc<tensor<4xf32>> loc("a.py":7:1)) {\n    tt.return\n  }\n}'
    with pytest.raises(UnsupportedOp, match="tensordesc"):
        lower_module(text, CpuTarget.named("avx2"))


@pytest.mark.parametrize("name", ["avx512", "avx2", "neon"])
def test_every_target_gets_valid_code(name: str) -> None:
    from tilewright.codegen.cpu import jit

    text = """
    module {
      tt.func public @k(%p: !tt.ptr<f32>, %n: i32) {
        %r = tt.make_range {end = 64 : i32, start = 0 : i32} : tensor<64xi32>
        %s = tt.splat %n : i32 -> tensor<64xi32>
        %m = arith.cmpi slt, %r, %s : tensor<64xi32>
        %b = tt.splat %p : !tt.ptr<f32> -> tensor<64x!tt.ptr<f32>>
        %q = tt.addptr %b, %r : tensor<64x!tt.ptr<f32>>, tensor<64xi32>
        %x = tt.load %q, %m : tensor<64x!tt.ptr<f32>>
        %y = math.exp %x : tensor<64xf32>
        tt.store %q, %y, %m : tensor<64x!tt.ptr<f32>>
        tt.return
      }
    }
    """
    target = CpuTarget.named(name)
    lowered = lower_module(text, target)
    assert (lowered.name, lowered.params) == ("k", ("!tt.ptr<f32>", "i32"))
    assert jit.compile_ir(lowered.llvm_ir, target)


def test_locations_are_stripped_with_their_brackets() -> None:
    line = '%x: f32 loc(callsite(#loc3 at "a)b"(#loc4))), %y: i32 loc("n") loc(#loc9)'
    assert strip_locations(line) == ("%x: f32, %y: i32", "#loc9")
    assert closing('a("(" -> b)', 1) == 10
    assert split_top('a(b, c), <d, e>, "f,g"', ",") == ["a(b, c)", "<d, e>", '"f,g"']


def test_types() -> None:
    parsed = parse_type("tensor<4x1x!tt.ptr<bf16>>")
    assert parsed.shape == (4, 1)
    assert parsed.elem.pointee is not None
    assert parsed.elem.pointee.name == "bf16"
    with pytest.raises(ValueError, match="tf32"):
        parse_type("tf32")


def test_locations_name_the_callers_line() -> None:
    text = """
#loc1 = loc("lib.py":3:4)
#loc2 = loc("user.py":9:1)
module {
  tt.func public @k(%a: i32) {
    %b = arith.addi %a, %a : i32 loc(#loc5)
    tt.return
  }
}
#loc5 = loc("name"(#loc6))
#loc6 = loc(callsite(#loc1 at #loc2))
"""
    (add, _) = walk(parse_module(text).kernel.blocks)
    assert add.loc == "user.py:9"
