"""A transformer nobody wrote a rule for: parallel attention and MLP behind one norm, and an op declared here.

It must pack and fuse like any other: passes and code generation know the new op by its traits alone.
"""

from dataclasses import dataclass
from functools import cache

import pytest
import torch
from references import PATTERNS, SEEDS, ErrorRule, in_double, masks
from torch import Tensor, nn
from torch.fx import GraphModule

import tilewright
from tilewright.driver.kernels import distinct_sources
from tilewright.ir.facts import find_fact
from tilewright.ir.regions import Anchor, Region
from tilewright.ops import Flow, Traits, find, register


@torch.library.custom_op("tilewright_tests::soft_gate", mutates_args=())
def soft_gate(x: Tensor, gate: Tensor) -> Tensor:
    """x * gate / (1 + |gate|)."""
    return x * gate / (1 + gate.abs())


@soft_gate.register_fake
def _soft_gate_fake(x, gate):  # type: ignore[no-untyped-def]
    return torch.empty_like(x)


GATE = torch.ops.tilewright_tests.soft_gate.default
register(GATE, Traits(Flow.POINTWISE, triton="({0} * {1} / (1.0 + tl.abs({1})))", absorbs_zero=True))
SHAPES = ((1, 1), (4, 7), (3, 41))


class Block(nn.Module):
    """x + attention(norm(x)) + mlp(norm(x)), both from one joint projection."""

    def __init__(self, width: int, heads: int, written_out: bool) -> None:
        super().__init__()
        self.heads, self.written_out = heads, written_out
        self.norm = nn.LayerNorm(width)
        self.joint = nn.Linear(width, 3 * width, bias=False)
        self.up, self.gate, self.down = (
            nn.Linear(width, 2 * width),
            nn.Linear(width, 2 * width),
            nn.Linear(2 * width, width),
        )
        self.out = nn.Linear(width, width)

    def forward(self, x: Tensor, valid: Tensor) -> Tensor:
        normed = self.norm(x)
        q, k, v = (part.unflatten(-1, (self.heads, -1)).transpose(1, 2) for part in self.joint(normed).chunk(3, -1))
        if self.written_out:
            scores = (q @ k.transpose(-1, -2)) * q.shape[-1] ** -0.5
            mixed = scores.masked_fill(~valid, float("-inf")).softmax(-1) @ v
        else:
            mixed = nn.functional.scaled_dot_product_attention(q, k, v, attn_mask=valid)
        mlp = self.down(soft_gate(self.up(normed), self.gate(normed)))
        return x + self.out(mixed.transpose(1, 2).flatten(2)) + mlp


class Parallel(nn.Module):
    """Embeds ids and their columns, runs blocks, and gives tokens and the gated mean over real tokens."""

    def __init__(self, written_out: bool, width: int = 48, heads: int = 3, blocks: int = 2) -> None:
        super().__init__()
        self.words, self.places = nn.Embedding(60, width), nn.Embedding(64, width)
        self.blocks = nn.ModuleList([Block(width, heads, written_out) for _ in range(blocks)])
        self.last, self.score = nn.LayerNorm(width), nn.Linear(width, 1)

    def forward(self, input_ids: Tensor, attention_mask: Tensor) -> tuple[Tensor, Tensor]:
        x = self.words(input_ids) + self.places(torch.arange(input_ids.shape[1], device=input_ids.device))
        valid = attention_mask[:, None, None, :].bool()
        for block in self.blocks:
            x = block(x, valid)
        x = self.last(x)
        return x, soft_gate(x, self.score(x).expand(x.shape))


def made(written_out: bool, seed: int) -> Parallel:
    torch.manual_seed(seed)
    return Parallel(written_out).eval()


@dataclass(frozen=True)
class Call:
    """Inputs of one call."""

    ids: Tensor
    mask: Tensor


def calls(seed: int) -> list[Call]:
    generator = torch.Generator().manual_seed(seed)
    found = []
    for (batch, length), pattern in zip(SHAPES * 2, PATTERNS, strict=True):
        ids = torch.randint(0, 60, (batch, length), generator=generator)
        found.append(Call(ids, masks(batch, length, pattern, generator)))
    return found


@pytest.mark.usefixtures("two_threads")
@pytest.mark.parametrize(("written_out", "gemm"), [(False, "triton"), (True, "vendor")])
def test_error_rule_and_rows(written_out: bool, gemm: str) -> None:
    rules = [ErrorRule(), ErrorRule()]
    for seed in SEEDS:
        model = made(written_out, seed)
        double = in_double(model)
        compiled = tilewright.compile(model, gemm=gemm, unpad="on")
        for call in calls(seed):
            before = compiled.stats
            ours = compiled(call.ids, call.mask)
            after = compiled.stats
            assert after.rows_computed - before.rows_computed == int(call.mask.sum())
            assert (after.eager_steps, after.fallbacks) == (0, 0)
            assert (after.vendor_calls > 0) == (gemm == "vendor")
            with torch.no_grad():
                eager, exact = model(call.ids, call.mask), double(call.ids, call.mask)
            real = call.mask.bool()
            for rule, mine, theirs, truth in zip(rules, ours, eager, exact, strict=True):
                rule.add(mine, theirs, truth, real)
                assert (mine[~real] == 0).all()
    for rule in rules:
        rule.check()


@cache
def placed(opt_level: int) -> tuple[GraphModule, tuple[str, ...]]:
    """The placed graph of the model, and the text of its kernels."""
    compiled = tilewright.compile(made(False, 0), gemm="triton", opt_level=opt_level)
    call = calls(0)[1]
    compiled(call.ids, call.mask)
    (variant,) = compiled.variants.values()
    assert variant.compiled is not None
    assert variant.compiled.spec is not None
    return variant.compiled.graph, tuple(source.text for source in distinct_sources(variant.compiled.spec))


def homes(graph: GraphModule) -> list[tuple[Anchor, list[str]]]:
    """For each region that holds the new op: its anchor, and the ops inside."""
    found = []
    for node in graph.graph.nodes:
        region = find_fact(node, Region)
        if region is None:
            continue
        inside = [n.target for n in graph.get_submodule(str(node.target)).graph.nodes if n.op == "call_function"]
        if GATE in inside:
            found.append((region.anchor, list(map(str, inside))))
    return found


def test_the_new_op_sits_in_an_epilogue_and_in_a_row_region() -> None:
    graph, texts = placed(2)
    in_blocks, at_end = homes(graph)[:2], homes(graph)[2:]
    assert [anchor for anchor, _ in in_blocks] == [Anchor.GEMM, Anchor.GEMM]
    assert all("aten.linear.default" in ops for _, ops in in_blocks)
    assert len(at_end) == 1
    assert any("tl.abs" in text and "tl.dot" in text for text in texts)


def test_without_fusion_the_new_op_has_a_kernel_of_its_own() -> None:
    graph, _ = placed(1)
    assert homes(graph) == [(Anchor.ROW, [str(GATE)])] * 3


def test_fewer_kernels_run_when_fused() -> None:
    regions = [sum(find_fact(n, Region) is not None for n in placed(level)[0].graph.nodes) for level in (1, 2)]
    assert regions[1] <= regions[0] - 2 * 3


def test_an_op_without_traits_runs_eager_beside_the_rest() -> None:
    assert find(torch.ops.aten.erfinv.default) is None

    class Undeclared(Parallel):
        def forward(self, input_ids: Tensor, attention_mask: Tensor) -> tuple[Tensor, Tensor]:
            x, gated = super().forward(input_ids, attention_mask)
            return x.clamp(-0.9, 0.9).erfinv(), gated

    torch.manual_seed(0)
    model = Undeclared(False).eval()
    compiled = tilewright.compile(model)
    call = calls(1)[1]
    ours = compiled(call.ids, call.mask)
    assert compiled.stats.eager_steps > 0
    with torch.no_grad():
        eager = model(call.ids, call.mask)
    real = call.mask.bool()
    for mine, theirs in zip(ours, eager, strict=True):
        assert torch.allclose(mine[real], theirs[real], atol=1e-4)
