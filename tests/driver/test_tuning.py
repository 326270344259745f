"""Tables by measurement: taken once, kept, visible in the graph; off, a rule decides."""

from typing import TypeVar

import pytest
import torch
from references import build

import tilewright
from tilewright import settings
from tilewright.driver import tune_attention, tuning
from tilewright.ir.facts import find_fact
from tilewright.ir.regions import GEMM_VARIANTS, AttentionTable, GemmTable


def tables(compiled: tilewright.CompiledModel) -> list[GemmTable]:
    return facts(compiled, GemmTable)


T = TypeVar("T")


def facts(compiled: tilewright.CompiledModel, kind: type[T]) -> list[T]:
    (variant,) = compiled.variants.values()
    found = [find_fact(node, kind) for node in variant.compiled.graph.graph.nodes]
    return [table for table in found if table is not None]


def test_measured_once_and_kept(monkeypatch: pytest.MonkeyPatch) -> None:
    model = build("distilbert", 0)
    with settings.scope(tune=True, check=False):  # in checked mode nothing is measured
        first = tables(tilewright.compile(model))
        assert first
        assert all(table.measured for table in first)
        assert {variant for table in first for _, variant in table.entries} <= set(GEMM_VARIANTS)

        def fail(*args: object) -> None:
            raise AssertionError("measured again")

        monkeypatch.setattr(tuning, "measure_variants", fail)
        monkeypatch.setattr(tune_attention, "measure_variants", fail)
        again = tilewright.compile(model)
        assert tables(again) == first
        assert all(table.measured for table in facts(again, AttentionTable))
    ids = torch.randint(3, 99, (2, 7))
    with torch.no_grad():
        expected = model(ids).last_hidden_state
    torch.testing.assert_close(again(ids).last_hidden_state, expected, atol=1e-4, rtol=1e-4)


@pytest.mark.parametrize("options", [{"gemm": "vendor"}, {"gemm": "triton"}, {"opt_level": 1}])
def test_nothing_is_measured_without_a_choice(monkeypatch: pytest.MonkeyPatch, options: dict[str, object]) -> None:
    monkeypatch.setattr(tuning, "measure_variants", lambda *args: pytest.fail("measured"))
    with settings.scope(tune=True, check=False):  # in checked mode nothing is measured
        assert not any(table.measured for table in tables(tilewright.compile(build("distilbert", 0), **options)))
