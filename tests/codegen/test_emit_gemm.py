"""GEMM regions, both variants, against the region body in fp64: tails, prologues, epilogues, dtypes, row counts."""

import pytest
import torch
from tests.codegen.bodies import Body, assert_matches, emit, run

from tilewright import settings
from tilewright.errors import CodegenError, MemoryViolation
from tilewright.ir.program import KernelStep, VendorLinear
from tilewright.ir.regions import Anchor
from tilewright.ir.sizes import TOKENS

aten = torch.ops.aten
FLOATS = {torch.float32: 2e-6, torch.float64: 1e-14, torch.float16: 2e-3, torch.bfloat16: 1e-2}


def linear_body(n: int, k: int, dtype: torch.dtype, epilogue: str = "", norm: bool = False) -> Body:
    body = Body()
    x, weight, bias = body.input((TOKENS, k), dtype), body.input((n, k), dtype), body.input((n,), dtype)
    source = body.call(aten.layer_norm.default, x, [k], None, None, 1e-5) if norm else x
    out = body.call(aten.linear.default, source, weight, bias)
    if epilogue == "gelu":
        out = body.call(aten.gelu.default, out)
    elif epilogue == "residual":
        out = body.call(aten.add.Tensor, out, body.input((TOKENS, n), dtype))
    elif epilogue == "heads":
        split = body.call(aten.reshape.default, out, [TOKENS, 2, n // 2])
        out = body.call(aten.mul.Tensor, split, body.input((2, 1), dtype))
    body.last = out  # type: ignore[attr-defined]
    return body


def operands(body: Body, rows: int) -> list[torch.Tensor]:
    from tests.codegen.bodies import concrete

    from tilewright.ir.facts import TensorType, fact

    kinds = [fact(node, TensorType) for node in body.inputs]
    tensors = [torch.randn([concrete(s, {TOKENS: rows}) for s in kind.shape]).to(kind.dtype) for kind in kinds]
    tensors[1] = (tensors[1].float() * tensors[1].shape[1] ** -0.5).to(tensors[1].dtype)
    return tensors


def check(body: Body, rows: int, variant: str, tolerance: float, stored: bool = True) -> None:
    gm, tensors = body.module(body.last), operands(body, rows)  # type: ignore[attr-defined]
    weights = {1: tensors[1], 2: tensors[2]} if stored else None
    assert_matches(gm, tensors, {TOKENS: rows}, tolerance, anchor=Anchor.GEMM, variant=variant, weights=weights)


@pytest.mark.parametrize("variant", ["triton", "triton_few", "triton_many", "vendor"])
@pytest.mark.parametrize("epilogue", ["", "gelu", "residual", "heads"])
@pytest.mark.parametrize(("rows", "n", "k"), [(70, 128, 128), (5, 100, 70), (1, 2, 3)])
def test_epilogues_and_tails(rows: int, n: int, k: int, epilogue: str, variant: str) -> None:
    check(linear_body(n, k, torch.float32, epilogue), rows, variant, 2e-6)


@pytest.mark.parametrize("variant", ["triton", "triton_few", "vendor"])
@pytest.mark.parametrize("epilogue", ["", "gelu", "residual"])
def test_one_column(epilogue: str, variant: str) -> None:
    check(linear_body(1, 70, torch.float32, epilogue), 37, variant, 2e-6)


@pytest.mark.parametrize("dtype", FLOATS, ids=str)
def test_dtypes(dtype: torch.dtype) -> None:
    check(linear_body(130, 96, dtype, "residual"), 65, "triton", FLOATS[dtype])


def test_no_rows() -> None:
    check(linear_body(64, 64, torch.float32), 0, "triton", 0)


@pytest.mark.parametrize("variant", ["triton", "vendor"])
@pytest.mark.parametrize("k", [96, 150])
def test_norm_in_front(k: int, variant: str) -> None:
    check(linear_body(80, k, torch.float32, "residual", norm=True), 9, variant, 3e-6)


@pytest.mark.parametrize("variant", ["triton", "triton_few", "triton_many"])
@pytest.mark.parametrize(("rows", "groups", "n", "k"), [(70, 3, 128, 32), (5, 2, 20, 70), (0, 4, 64, 64), (1, 1, 1, 3)])
def test_heads(rows: int, groups: int, n: int, k: int, variant: str) -> None:
    """Each head reads its own columns of x, a slice of a wider product, and its own rows of the weight."""
    body = Body()
    x, weight = body.input((TOKENS, 2 * groups * k)), body.input((groups * n, k))
    part = body.call(aten.slice.Tensor, x, 1, groups * k, 2 * groups * k)
    split = body.call(aten.reshape.default, part, [TOKENS, groups, k])
    out = body.call(aten.mul.Tensor, body.call(torch.ops.tilewright.head_linear.default, split, weight), 0.5)
    gm, tensors = body.module(out), [torch.randn(rows, 2 * groups * k), torch.randn(groups * n, k) * k**-0.5]
    kind = {"anchor": Anchor.GEMM, "variant": variant, "weights": {1: tensors[1]}}
    assert_matches(gm, tensors, {TOKENS: rows}, 2e-6, **kind)  # type: ignore[arg-type]


def test_heads_are_none_of_the_vendor() -> None:
    body = Body()
    out = body.call(torch.ops.tilewright.head_linear.default, body.input((TOKENS, 2, 8)), body.input((6, 8)))
    with pytest.raises(CodegenError, match="no product of heads"):
        emit(body.module(out), anchor=Anchor.GEMM, variant="vendor")


def test_weight_that_is_computed_is_read_as_it_is() -> None:
    check(linear_body(100, 70, torch.float32, "gelu"), 33, "triton", 2e-6, stored=False)


def test_vendor_without_epilogue_is_one_step() -> None:
    body = linear_body(64, 32, torch.float32)
    tensors = operands(body, 4)
    steps, builder, _ = emit(body.module(body.last), Anchor.GEMM, "vendor", weights={1: tensors[1], 2: tensors[2]})  # type: ignore[attr-defined]
    assert [type(step) for step in steps] == [VendorLinear]
    assert builder.weights["w1:vendor"].layout == "vendor"


def test_vendor_with_epilogue_is_two_steps() -> None:
    body = linear_body(64, 32, torch.float32, "gelu")
    tensors = operands(body, 4)
    steps, _, _ = emit(body.module(body.last), Anchor.GEMM, "vendor", weights={1: tensors[1], 2: tensors[2]})  # type: ignore[attr-defined]
    assert [type(step) for step in steps] == [VendorLinear, KernelStep]


def test_results_beside_the_product() -> None:
    """What goes into the product may be a result too; it gets a kernel of its own."""
    body = Body()
    x, y, weight = body.input((TOKENS, 48)), body.input((TOKENS, 48)), body.input((32, 48))
    total = body.call(aten.add.Tensor, x, y)
    gm = body.module(total, body.call(aten.linear.default, total, weight))
    tensors = [torch.randn(7, 48), torch.randn(7, 48), torch.randn(32, 48) / 7]
    for variant in ("triton", "vendor"):
        weights = {2: tensors[2]}
        assert_matches(gm, tensors, {TOKENS: 7}, 2e-6, anchor=Anchor.GEMM, variant=variant, weights=weights)


def test_all_variants_read_one_layout_of_a_weight() -> None:
    tensors = operands(linear_body(100, 96, torch.float32), 4)
    layouts = set()
    for variant in ("triton", "triton_few", "triton_many"):
        body = linear_body(100, 96, torch.float32)
        _, builder, _ = emit(body.module(body.last), Anchor.GEMM, variant, weights={1: tensors[1], 2: tensors[2]})  # type: ignore[attr-defined]
        layouts |= {weight.layout for weight in builder.weights.values()}
    assert layouts == {"as_is", "panels:64"}


@pytest.mark.parametrize("variant", ["triton", "triton_few", "triton_many"])
@pytest.mark.parametrize(("n", "k"), [(64, 256), (100, 96), (70, 40)])
@pytest.mark.parametrize("group", [1, 2, 4])
def test_whole_numbers(n: int, k: int, group: int, variant: str) -> None:
    """int8 by int8, with scales behind; weights with neighbours along K together, where they fill whole steps."""
    body = Body()
    x, weight, scale = body.input((TOKENS, k), torch.int8), body.input((n, k), torch.int8), body.input((TOKENS, 1))
    product = body.call(torch.ops.tilewright.int8_linear.default, x, weight)
    wide = body.call(torch.ops.prims.convert_element_type.default, product, torch.float32)
    gm = body.module(body.call(aten.mul.Tensor, wide, scale))
    whole = [torch.randint(-127, 128, (rows, k), dtype=torch.int8) for rows in (37, n)]
    tensors = [*whole, torch.rand(37, 1)]
    options = {"anchor": Anchor.GEMM, "variant": variant, "weights": {1: whole[1]}, "interleaved": {torch.int8: group}}
    assert_matches(gm, tensors, {TOKENS: 37}, 1e-6, **options)


def test_an_unknown_variant_is_refused() -> None:
    body = linear_body(100, 96, torch.float32)
    with pytest.raises(CodegenError, match="no GEMM variant 'fast'"):
        emit(body.module(body.last), Anchor.GEMM, "fast")  # type: ignore[attr-defined]


def test_an_epilogue_that_needs_other_tiles_is_refused() -> None:
    body = Body()
    x, weight = body.input((TOKENS, 48)), body.input((32, 48))
    out = body.call(aten.linear.default, x, weight)
    turned = body.call(aten.slice.Tensor, body.call(aten.cat.default, [out, out], 1), 1, 8, 40)
    with pytest.raises(CodegenError, match="other tiles"):
        emit(body.module(turned), Anchor.GEMM)


@pytest.mark.parametrize("variant", ["triton", "stored", "vendor"])
@pytest.mark.parametrize(
    ("lead", "n", "k"), [((), 9, 8), ((1,), 9, 8), ((TOKENS,), 1, 8), ((TOKENS,), 9, 1), ((1, 1), 1, 1)]
)
def test_axes_of_one_place(lead: tuple[object, ...], n: int, k: int, variant: str) -> None:
    body = Body()
    x, weight, bias = body.input((*lead, k)), body.input((n, k)), body.input((n,))
    body.last = body.call(aten.gelu.default, body.call(aten.linear.default, x, weight, bias))  # type: ignore[attr-defined]
    check(body, 21, "vendor" if variant == "vendor" else "triton", 2e-6, variant != "triton")


def test_an_access_out_of_bounds_is_seen() -> None:
    body = linear_body(12, 16, torch.float32)
    gm, tensors = body.module(body.last), operands(body, 5)  # type: ignore[attr-defined]
    tensors[0] = tensors[0][:4].clone()
    with settings.scope(check=True), pytest.raises(MemoryViolation, match="reads"):
        run(gm, tensors, {TOKENS: 5}, Anchor.GEMM)
