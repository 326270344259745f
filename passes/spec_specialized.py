"""Rules of the level specialized: a kernel variant for every row count of every GEMM."""

from collections.abc import Iterator

from torch.fx import GraphModule, Node

from tilewright.ir.facts import TensorType, fact, find_fact
from tilewright.ir.regions import GEMM_VARIANTS, Anchor, GemmTable, Region
from tilewright.ir.sizes import product
from tilewright.ir.views import same_size
from tilewright.ops import Flow, traits_of
from tilewright.passes.rules import Rule, Violation, bodies, regions


def _tables(gm: GraphModule) -> Iterator[tuple[Node, GemmTable]]:
    for call, _ in regions(gm):
        table = find_fact(call, GemmTable)
        if table is not None:
            yield call, table


def _table_known(gm: GraphModule) -> Iterator[Violation]:
    for call, region in regions(gm):
        if region.anchor is Anchor.GEMM and find_fact(call, GemmTable) is None:
            yield Violation(call, "it carries no GemmTable")


def _table_on_gemm(gm: GraphModule) -> Iterator[Violation]:
    for node in gm.graph.nodes:
        region = find_fact(node, Region)
        if find_fact(node, GemmTable) is not None and (region is None or region.anchor is not Anchor.GEMM):
            yield Violation(node, "it carries a GemmTable and is no GEMM region")


def _not_empty(gm: GraphModule) -> Iterator[Violation]:
    for call, table in _tables(gm):
        if not table.entries:
            yield Violation(call, "its table has no entry")


def _last_is_open(gm: GraphModule) -> Iterator[Violation]:
    for call, table in _tables(gm):
        if table.entries[-1][0] is not None:
            yield Violation(call, f"row counts above {table.entries[-1][0]} have no variant")


def _others_are_bounded(gm: GraphModule) -> Iterator[Violation]:
    for call, table in _tables(gm):
        if any(bound is None for bound, _ in table.entries[:-1]):
            yield Violation(call, "an entry after an open one can never be chosen")


def _bounds_rise(gm: GraphModule) -> Iterator[Violation]:
    for call, table in _tables(gm):
        bounds = [bound for bound, _ in table.entries if bound is not None]
        if bounds != sorted(set(bounds)):
            yield Violation(call, f"its bounds {bounds} do not rise")


def _bounds_positive(gm: GraphModule) -> Iterator[Violation]:
    for call, table in _tables(gm):
        for bound, variant in table.entries:
            if bound is not None and bound < 1:
                yield Violation(call, f"variant {variant} is for at most {bound} rows")


def _variants_known(gm: GraphModule) -> Iterator[Violation]:
    for call, table in _tables(gm):
        for _, variant in table.entries:
            if variant not in GEMM_VARIANTS:
                yield Violation(call, f"variant {variant!r} is not one of {', '.join(GEMM_VARIANTS)}")


def _rows_of_product(gm: GraphModule) -> Iterator[Violation]:
    inside = dict(bodies(gm))
    for call, table in _tables(gm):
        for node in inside[call].graph.nodes:
            if traits_of(node.target).flow is Flow.CONTRACT:
                rows = product(fact(node, TensorType).shape[:-1])
                if not same_size(rows, table.rows):
                    yield Violation(call, f"its table is for {table.rows} rows, its product has {rows}")


SPECIALIZED = (
    Rule("table_on_gemm", "only GEMM regions carry a table", _table_on_gemm),
    Rule("table_known", "every GEMM region carries its table", _table_known),
    Rule("table_not_empty", "a table has an entry", _not_empty),
    Rule("last_is_open", "the last entry has no bound, so every row count has a variant", _last_is_open),
    Rule("others_are_bounded", "all entries but the last have a bound, so each can be chosen", _others_are_bounded),
    Rule("bounds_positive", "bounds are row counts from 1", _bounds_positive),
    Rule("bounds_rise", "bounds rise, so that one entry covers each row count", _bounds_rise),
    Rule("variants_known", "variants are known ones", _variants_known),
    Rule("rows_of_product", "a table is indexed by the rows of its product", _rows_of_product),
)
