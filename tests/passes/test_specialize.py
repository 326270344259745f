"""GEMM tables cover every row count once; measured ones are within the noise of the fastest and change seldom."""

import random
from itertools import pairwise, product
from typing import Any

import pytest
import torch
from tests.graphs import GraphBuilder

from tilewright.errors import OptionError
from tilewright.ir.facts import find_fact
from tilewright.ir.graph import Level, info
from tilewright.ir.measurements import GemmKey, Measurements
from tilewright.ir.regions import GemmTable, Placement, Region
from tilewright.ir.sizes import BATCH, SEQ, TOKENS, Size
from tilewright.passes.base import run_pass
from tilewright.passes.regions.find_regions import FindRegions
from tilewright.passes.regions.outline_regions import OutlineRegions
from tilewright.passes.regions.place import Place
from tilewright.passes.regions.specialize import Specialize, gemm_key, measured_entries, splits_of, variants_of

aten = torch.ops.aten
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
    assert tables("auto", timings, TOKENS)[0] == GemmTable(TOKENS, ((63, "triton"), (None, "vendor")), measured=True)
    other = Measurements({GemmKey(24, 8, "bfloat16"): timings.seconds[KEY]})
    assert tables("auto", other, TOKENS) == tables("auto", Measurements(), TOKENS)


def test_measured_tables_hold_at_every_row_count() -> None:
    draw = random.Random(0)
    names = ("triton", "triton_few", "vendor")
    for _ in range(200):
        rows = sorted(draw.sample(range(1, 300), draw.randint(1, 6)))
        seconds = {name: {count: draw.uniform(1.0, 1.2) for count in rows} for name in names}
        entries = measured_entries({name: tuple(times.items()) for name, times in seconds.items()})
        uppers = [upper for upper, _ in entries]
        assert uppers[-1] is None
        assert uppers[:-1] == sorted(set(uppers[:-1]))
        assert all(one[1] != two[1] for one, two in pairwise(entries))
        chosen = [next(name for upper, name in entries if upper is None or count <= upper) for count in range(1, 301)]
        near = [
            [name for name in names if seconds[name][r] <= 1.05 * min(t[r] for t in seconds.values())] for r in rows
        ]
        assert all(chosen[r - 1] in good for r, good in zip(rows, near, strict=True))
        fewest = min(sum(a != b for a, b in pairwise(path)) for path in product(*near))
        assert len(entries) - 1 == fewest
        for below, above in pairwise(rows):
            assert set(chosen[below - 1 : above]) == {chosen[below - 1], chosen[above - 1]}


def test_noise_makes_no_entries_and_a_real_difference_does() -> None:
    noisy = {"triton": ((1, 1.0), (64, 1.03), (256, 1.0)), "vendor": ((1, 1.5), (64, 1.0), (256, 1.02))}
    assert measured_entries(noisy) == ((None, "triton"),)
    clear = {"triton": ((1, 1.0), (64, 1.5)), "vendor": ((1, 1.2), (64, 1.0))}
    assert measured_entries(clear) == ((1, "triton"), (None, "vendor"))  # 50 % is lost at 64, 20 % at 1
    clear["triton"] = ((1, 1.0), (64, 1.1))
    assert measured_entries(clear) == ((63, "triton"), (None, "vendor"))


def test_regions_share_timings_when_they_differ_in_their_rows_alone() -> None:
    def key(rows: Size, act: Any = aten.gelu.default) -> GemmKey:
        g = GraphBuilder()
        gm = g.done(g.call(act, g.linear(g.input("x", rows, 8), "gemm", 24)))
        for pass_ in (FindRegions(), OutlineRegions()):
            gm, _ = run_pass(pass_, gm)
        return gemm_key(gm.get_submodule("region_0"))  # type: ignore[arg-type]

    assert key(TOKENS) == key(BATCH)
    assert key(TOKENS) != key(TOKENS, aten.relu.default)
    assert key(TOKENS) != KEY


def test_unknown_choice_is_refused() -> None:
    with pytest.raises(OptionError, match="gemm='cublas'"):
        tables("cublas", Measurements(), TOKENS)


def test_k_is_cut_where_tiles_of_columns_are_few() -> None:
    key = GemmKey(64, 4096, "float32")
    assert splits_of(key, 2) == (2, 4, 8)
    assert splits_of(GemmKey(200, 4096, "float32"), 2) == (2,)
    assert splits_of(GemmKey(320, 4096, "float32"), 2) == ()
    assert splits_of(GemmKey(4096, 4096, "bfloat16"), 132) == (2, 4, 8)
    assert splits_of(GemmKey(64, 1536, "float32"), 2) == (2,)
    assert splits_of(GemmKey(64, 500, "float32"), 2) == ()
    assert splits_of(GemmKey(64, 4096, "float32", heads=4), 2) == ()
    split = {variant for variant in variants_of(key, 2) if ":" in variant}
    assert split == {"triton_few:2", "triton_few:4", "triton_few:8"}
    assert "triton_one:8" in variants_of(GemmKey(64, 4096, "Q4_K"), 2)
    assert not any(":" in variant for variant in variants_of(key))


def test_the_rule_gives_each_unit_a_program() -> None:
    def entries(n: int, units: int) -> list[str]:
        found, _ = Specialize("triton", Measurements(units=units))._entries(GemmKey(n, 4096, "float32"))
        return [variant for _, variant in found]

    assert entries(64, 2) == ["triton_few:2", "triton", "triton_many"]
    assert entries(64, 7) == ["triton_few:8", "triton", "triton_many"]
    assert entries(128, 2) == ["triton_few", "triton", "triton_many"]
    assert entries(4096, 132) == ["triton_few:4", "triton", "triton_many"]
