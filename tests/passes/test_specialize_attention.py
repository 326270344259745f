"""Attention tables cover every length once, and a form is chosen only where it fits and was measured faster."""

import pytest
import torch
from tests.graphs import GraphBuilder

from tilewright.errors import OptionError
from tilewright.ir.facts import find_fact
from tilewright.ir.measurements import AttentionKey, Measurements
from tilewright.ir.regions import AttentionTable
from tilewright.ir.sizes import BATCH, SEQ, Size
from tilewright.passes.base import run_pass
from tilewright.passes.regions.find_regions import FindRegions
from tilewright.passes.regions.outline_regions import OutlineRegions
from tilewright.passes.regions.specialize_attention import SpecializeAttention

KEY = AttentionKey(8, 8, 1, "float32")


def table(attention: str = "auto", measurements: Measurements | None = None, length: Size = SEQ) -> AttentionTable:
    """The table of one attention over heads of 8."""
    g = GraphBuilder()
    q, k, v = (g.input(name, BATCH, 2, length, 8) for name in "qkv")
    options = (None, None, None, 0.3, False, -1, -1, 0.0)
    gm = g.done(g.call(torch.ops.tilewright.attention.default, q, k, v, *options))
    for pass_ in (FindRegions(), OutlineRegions(), SpecializeAttention(attention, measurements or Measurements())):
        gm, _ = run_pass(pass_, gm)
    (found,) = [fact for node in gm.graph.nodes if (fact := find_fact(node, AttentionTable))]
    return found


def test_rule_without_measurements() -> None:
    assert table() == AttentionTable(SEQ, ((None, "online"),))


def test_one_form_wherever_it_fits() -> None:
    assert table("short_512") == AttentionTable(SEQ, ((512, "short_512"), (None, "online")))
    assert table("long", length=40) == AttentionTable(40, ((None, "long"),))
    assert table("online") == AttentionTable(SEQ, ((None, "online"),))


def test_unknown_form() -> None:
    with pytest.raises(OptionError, match="attention='flash' is not a choice"):
        table("flash")


def test_measurements_decide_between_lengths() -> None:
    """At 64 the short form wins, and at 128 loses less than another at 64; the long one wins at 512; then one fits."""
    timings = {
        "online": ((64, 2.0), (128, 2.0), (512, 4.0)),
        "short_128": ((64, 1.0), (128, 3.0)),
        "short_512": ((64, 3.0), (128, 3.0), (512, 5.0)),
        "long": ((64, 9.0), (128, 9.0), (512, 3.0)),
    }
    found = table(measurements=Measurements(attention={KEY: timings}))
    assert found == AttentionTable(SEQ, ((127, "short_128"), (511, "online"), (512, "long"), (None, "online")), True)


def test_other_problems_keep_the_rule() -> None:
    timings = {"online": ((64, 2.0),), "short_128": ((64, 1.0),)}
    other = Measurements(attention={AttentionKey(8, 8, 1, "float32", causal=True): timings})
    assert table(measurements=other) == table()
