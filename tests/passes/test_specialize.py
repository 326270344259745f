"""GEMM tables cover every row count once and are never slower than the vendor library as far as was measured."""

import random

import pytest
from tests.graphs import GraphBuilder

from tilewright.errors import OptionError
from tilewright.ir.facts import find_fact
from tilewright.ir.graph import Level, info
from tilewright.ir.measurements import GemmKey, Measurements
from tilewright.ir.regions import GemmTable, Placement, Region
from tilewright.ir.sizes import BATCH, SEQ, TOKENS, Size
from tilewright.passes.base import run_pass
from tilewright.passes.find_regions import FindRegions
from tilewright.passes.outline_regions import OutlineRegions
from tilewright.passes.place import Place
from tilewright.passes.specialize import Specialize, measured_entries

KEY = GemmKey(24, 8, "float32")


def tables(gemm: str, measurements: Measurements, *rows: Size) -> list[GemmTable | None]:
    """The table of one linear on x [*rows, 8], and of a norm after it, which must have none."""
    g = GraphBuilder()
    gm = g.done(g.norm(g.linear(g.input("x", *rows, 8), "gemm", 24), "norm"))
    for pass_ in (FindRegions(), OutlineRegions(), Specialize(gemm, measurements), Place("cpu")):
        gm, _ = run_pass(pass_, gm)
    calls = [node for node in gm.graph.nodes if find_fact(node, Region)]
    assert info(gm).level is Level.PLACED
    assert all(find_fact(node, Placement) == Placement("cpu", 0, "cpu") for node in calls)
    return [find_fact(node, GemmTable) for node in calls]


@pytest.mark.parametrize(
    ("gemm", "entries"),
    [
        ("auto", ((32, "triton"), (None, "vendor"))),
        ("triton", ((None, "triton"),)),
        ("vendor", ((None, "vendor"),)),
    ],
)
def test_default_rule(gemm: str, entries: tuple[tuple[int | None, str], ...]) -> None:
    assert tables(gemm, Measurements(), TOKENS) == [GemmTable(TOKENS, entries), None]


def test_rows_are_all_leading_axes() -> None:
    assert tables("triton", Measurements(), BATCH, SEQ) == [GemmTable(BATCH * SEQ, ((None, "triton"),)), None]


def test_measurements_decide_and_are_marked() -> None:
    timings = Measurements({KEY: {"triton": ((1, 1.0), (64, 5.0)), "vendor": ((1, 2.0), (64, 4.0))}})
    assert tables("auto", timings, TOKENS)[0] == GemmTable(TOKENS, ((1, "triton"), (None, "vendor")), measured=True)
    other = Measurements({GemmKey(24, 8, "bfloat16"): timings.seconds[KEY]})
    assert tables("auto", other, TOKENS)[0] == GemmTable(TOKENS, ((32, "triton"), (None, "vendor")))


def test_measured_tables_hold_at_every_row_count() -> None:
    draw = random.Random(0)
    for _ in range(200):
        rows = sorted(draw.sample(range(1, 300), draw.randint(1, 8)))
        ours, theirs = ({count: draw.choice([1.0, 2.0, 3.0]) for count in rows} for _ in range(2))
        entries = measured_entries(tuple(ours.items()), tuple(theirs.items()))
        uppers = [upper for upper, _ in entries]
        assert uppers[-1] is None
        assert uppers[:-1] == sorted(set(uppers[:-1]))
        for count in range(1, 301):
            chosen = next(variant for upper, variant in entries if upper is None or count <= upper)
            near = [
                r
                for r in (
                    max((r for r in rows if r <= count), default=None),
                    min((r for r in rows if r >= count), default=None),
                )
                if r is not None
            ]
            assert chosen == ("triton" if all(ours[r] < theirs[r] for r in near) else "vendor")


def test_unknown_choice_is_refused() -> None:
    with pytest.raises(OptionError, match="gemm='cublas'"):
        tables("cublas", Measurements(), TOKENS)
