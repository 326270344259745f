"""Every family with every head: right against eager in fp64, packed where that is legal, and the page says which."""

import warnings
from typing import Any

import pytest
import torch
from tests.families.models import EOS, FAMILIES, HEADS, VOCAB, build
from tests.families.page import PAGE
from tests.references import ErrorRule, in_double, masks
from tests.table_page import Row
from torch import Tensor, nn

import tilewright
from tilewright.driver.compiled import CompiledModel
from tilewright.ir.graph import info

SEED = 0
PATTERNS = ("right", "left", "holes", "empty_row")
BATCH, LENGTH = 5, 18


def batch(pattern: str, pad: int, generator: torch.Generator) -> dict[str, Tensor]:
    """Ids that are padding where the mask is 0 and end in the end token, as tokenizers make them."""
    mask = masks(BATCH, LENGTH, pattern, generator)
    ids = torch.randint(3, VOCAB, (BATCH, LENGTH), generator=generator)
    last = LENGTH - 1 - mask.flip(1).argmax(dim=1)
    ids = torch.where(mask.bool(), ids, pad)
    ids[torch.arange(BATCH), last] = EOS
    return {"input_ids": ids, "attention_mask": mask}


def compare(rules: dict[str, ErrorRule], outputs: tuple[Any, Any, Any], mask: Tensor) -> None:
    """Adds every tensor of the outputs (ours, eager, fp64): real tokens, and sequences that have one."""
    ours, eager, wide = outputs
    assert [name for name in ours if "past" not in name] == [name for name in eager if "past" not in name]
    for name, value in ours.items():
        if not isinstance(value, Tensor):
            continue
        per_token = value.shape[:2] == mask.shape
        real = mask.bool() if per_token else mask.any(dim=1)
        rules.setdefault(name, ErrorRule()).add(value[real], eager[name][real], wide[name][real])
        if per_token:
            assert torch.isfinite(value).all()


def run_all(model: nn.Module, compiled: CompiledModel, rules: dict[str, ErrorRule], seed: int) -> str:
    """Runs all patterns; "packed" if every call computed its real tokens, and at most one more place of a sequence."""
    double, generator = in_double(model), torch.Generator().manual_seed(seed)
    state = "packed"
    for pattern in PATTERNS:
        given = batch(pattern, model.config.pad_token_id, generator)  # type: ignore[union-attr,arg-type]
        mask = given["attention_mask"]
        before = compiled.stats
        ours = compiled(**given)
        with torch.no_grad():
            compare(rules, (ours, model(**given), double(**given)), mask)
        rows = compiled.stats.rows_computed - before.rows_computed
        if not 0 <= rows - int(mask.sum()) <= BATCH:
            state = "padded"
        if compiled.stats.fallbacks > before.fallbacks or compiled.stats.eager_steps > before.eager_steps:
            state = "eager" if compiled.stats.fallbacks > before.fallbacks else f"{state}, part eager"
    return state


def reasons(compiled: CompiledModel, state: str) -> str:
    """Why it is not packed as a whole, in one line."""
    if state == "eager":
        return "; ".join(dict.fromkeys(compiled.reasons.values()))
    found: dict[str, None] = {}
    for variant in compiled.variants.values():
        if variant.compiled is None or variant.compiled.spec is None:
            continue
        if state.startswith("padded"):
            found[info(variant.compiled.graph).reasons.get("packing", "")] = None
        if "eager" in state:
            found |= dict.fromkeys(variant.compiled.spec.notes["eager"].values())
    return "; ".join(found)


def row_of(family: str) -> Row:
    """Compiles and checks all heads of a family."""
    cells: list[str] = []
    whys: dict[str, list[str]] = {}
    for head in HEADS:
        model = build(family, head, SEED)
        if model is None:
            cells.append("")
            continue
        rules: dict[str, ErrorRule] = {}
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            compiled = tilewright.compile(model)
            state = run_all(model, compiled, rules, SEED)
        for name, rule in rules.items():
            rule.check(f"{family}, {head}, {name}")
        cells.append(state)
        if state != "packed":
            whys.setdefault(" ".join(reasons(compiled, state).split()), []).append(head)
    return Row(tuple(cells), tuple((" and ".join(heads), why) for why, heads in whys.items()))


@pytest.mark.usefixtures("one_thread")
@pytest.mark.parametrize("family", FAMILIES)
def test_family(family: str, request: pytest.FixtureRequest) -> None:
    row = row_of(family)
    if request.config.getoption("--accept-golden"):
        PAGE.write({**PAGE.written(), family: row})
    assert row.agrees(PAGE.written().get(family)), (
        "docs/encoders.md is not what the code does: look, then --accept-golden"
    )
