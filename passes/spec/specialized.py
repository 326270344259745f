"""Rules of the level specialized: a variant for every row count of a GEMM and every length of an attention."""

from collections.abc import Iterator

from torch.fx import GraphModule, Node

from tilewright.ir.facts import find_fact
from tilewright.ir.regions import (
    ATTENTION_VARIANTS,
    GEMM_VARIANTS,
    PAGED_VARIANTS,
    Anchor,
    AttentionTable,
    GemmTable,
    Region,
)
from tilewright.ir.sizes import product
from tilewright.ir.views import same_size
from tilewright.ops import Flow, traits_of
from tilewright.passes.regions.specialize import rows_of
from tilewright.passes.spec.rules import Rule, Violation, bodies, regions

_TABLE_OF: dict[Anchor, type[GemmTable] | type[AttentionTable]] = {
    Anchor.GEMM: GemmTable,
    Anchor.ATTENTION: AttentionTable,
}


def _tables(gm: GraphModule) -> Iterator[tuple[Node, GemmTable | AttentionTable]]:
    for call, _ in regions(gm):
        for kind in _TABLE_OF.values():
            if (table := find_fact(call, kind)) is not None:
                yield call, table


def _table_known(gm: GraphModule) -> Iterator[Violation]:
    for call, region in regions(gm):
        kind = _TABLE_OF.get(region.anchor)
        if kind is not None and find_fact(call, kind) is None:
            yield Violation(call, f"it carries no {kind.__name__}")


def _table_on_its_region(gm: GraphModule) -> Iterator[Violation]:
    for node in gm.graph.nodes:
        region = find_fact(node, Region)
        for anchor, kind in _TABLE_OF.items():
            if find_fact(node, kind) is not None and (region is None or region.anchor is not anchor):
                yield Violation(node, f"it carries a {kind.__name__} and is no {anchor.value} region")


def _not_empty(gm: GraphModule) -> Iterator[Violation]:
    for call, table in _tables(gm):
        if not table.entries:
            yield Violation(call, "its table has no entry")


def _last_is_open(gm: GraphModule) -> Iterator[Violation]:
    for call, table in _tables(gm):
        if table.entries[-1][0] is not None:
            yield Violation(call, f"sizes above {table.entries[-1][0]} have no variant")


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
                yield Violation(call, f"variant {variant} is for sizes up to {bound}")


def _variants_known(gm: GraphModule) -> Iterator[Violation]:
    for call, table in _tables(gm):
        known = GEMM_VARIANTS if isinstance(table, GemmTable) else (*ATTENTION_VARIANTS, *PAGED_VARIANTS)
        for _, variant in table.entries:
            if variant not in known:
                yield Violation(call, f"variant {variant!r} is not one of {', '.join(known)}")


def _variants_fit(gm: GraphModule) -> Iterator[Violation]:
    for call, table in _tables(gm):
        if not isinstance(table, AttentionTable):
            continue
        for bound, variant in table.entries:
            most = ATTENTION_VARIANTS.get(variant)
            longest = table.length if bound is None and isinstance(table.length, int) else bound
            if most is not None and (longest is None or longest > most):
                yield Violation(call, f"variant {variant} takes lengths up to {most}, not {longest or 'any'}")


def _rows_of_product(gm: GraphModule) -> Iterator[Violation]:
    inside = dict(bodies(gm))
    for call, table in _tables(gm):
        for node in inside[call].graph.nodes if isinstance(table, GemmTable) else ():
            if traits_of(node.target).flow is Flow.CONTRACT:
                rows = product(rows_of(node))
                if not same_size(rows, table.size):
                    yield Violation(call, f"its table is for {table.size} rows, its product has {rows}")


SPECIALIZED = (
    Rule(
        "table_on_its_region", "only GEMM and attention regions carry tables, each its own kind", _table_on_its_region
    ),
    Rule("table_known", "every GEMM and attention region carries its table", _table_known),
    Rule("table_not_empty", "a table has an entry", _not_empty),
    Rule("last_is_open", "the last entry has no bound, so every size has a variant", _last_is_open),
    Rule("others_are_bounded", "all entries but the last have a bound, so each can be chosen", _others_are_bounded),
    Rule("bounds_positive", "bounds are sizes from 1", _bounds_positive),
    Rule("bounds_rise", "bounds rise, so that one entry covers each size", _bounds_rise),
    Rule("variants_known", "variants are known ones", _variants_known),
    Rule("variants_fit", "a form of attention is chosen only for lengths it takes", _variants_fit),
    Rule("rows_of_product", "a table is indexed by the rows of its product", _rows_of_product),
)
