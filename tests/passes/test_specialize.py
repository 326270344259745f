"""GEMM tables cover every row count once and are never slower than the vendor library as far as was measured."""

import random
from itertools import pairwise

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
        ("auto", ((8, "triton_few"), (32, "triton"), (None, "vendor"))),
        ("triton", ((8, "triton_few"), (128, "triton"), (None, "triton_many"))),
        ("vendor", ((None, "vendor"),)),
        ("triton_many", ((None, "triton_many"),)),
    ],
)
def test_default_rule(gemm: str, entries: tuple[tuple[int | None, str], ...]) -> None:
    assert tables(gemm, Measurements(), TOKENS) == [GemmTable(TOKENS, entries), None]


def test_rows_are_all_leading_axes() -> None:
    assert tables("vendor", Measurements(), BATCH, SEQ) == [GemmTable(BATCH * SEQ, ((None, "vendor"),)), None]


def test_measurements_decide_and_are_marked() -> None:
    timings = Measurements({KEY: {"triton": ((1, 1.0), (64, 5.0)), "vendor": ((1, 2.0), (64, 4.0))}})
    assert tables("auto", timings, TOKENS)[0] == GemmTable(TOKENS, ((1, "triton"), (None, "vendor")), measured=True)
    other = Measurements({GemmKey(24, 8, "bfloat16"): timings.seconds[KEY]})
    assert tables("auto", other, TOKENS) == tables("auto", Measurements(), TOKENS)


def test_measured_tables_hold_at_every_row_count() -> None:
    draw = random.Random(0)
    for _ in range(200):
        rows = sorted(draw.sample(range(1, 300), draw.randint(1, 8)))
        names = ("triton", "triton_few", "vendor")
        seconds = {name: {count: draw.uniform(1.0, 3.0) for count in rows} for name in names}
        entries = measured_entries({name: tuple(times.items()) for name, times in seconds.items()})
        uppers = [upper for upper, _ in entries]
        assert uppers[-1] is None
        assert uppers[:-1] == sorted(set(uppers[:-1]))
        assert all(one[1] != two[1] for one, two in pairwise(entries))
        for count in range(1, 301):
            chosen = next(variant for upper, variant in entries if upper is None or count <= upper)
            below = max((r for r in rows if r <= count), default=rows[0])
            above = min((r for r in rows if r >= count), default=rows[-1])
            if count in rows:
                assert seconds[chosen][count] == min(times[count] for times in seconds.values())
            elif chosen == "vendor":
                for times in seconds.values():
                    assert any(times[r] >= seconds["vendor"][r] for r in (below, above))
            else:
                assert all(seconds[chosen][r] < seconds["vendor"][r] for r in (below, above))


def test_unknown_choice_is_refused() -> None:
    with pytest.raises(OptionError, match="gemm='cublas'"):
        tables("cublas", Measurements(), TOKENS)
