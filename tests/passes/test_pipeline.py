"""The pass list, the runner, and the observers."""

import json
from dataclasses import dataclass
from pathlib import Path
from typing import ClassVar

import pytest
import torch
from numerics.random_graphs import Padded, assert_same_at_real_tokens, copy_of, random_graph, run
from torch.fx import GraphModule

from tilewright.errors import OptionError, VerifierError
from tilewright.ir.facts import TensorType, drop_fact
from tilewright.ir.graph import Level, info
from tilewright.passes.base import Pass, PassRecord, PassResult
from tilewright.passes.observe import ArtifactWriter, GraphDiffs, graph_diff, graph_text, summary_line
from tilewright.passes.pipeline import OPTIONAL, pipeline, run_pipeline

aten = torch.ops.aten
pytestmark = pytest.mark.usefixtures("one_thread")


def small() -> GraphModule:
    """One encoder layer with a pooler."""
    g = Padded()
    x = g.encoder_layer(g.embed(g.ids, 23, 24))
    return g.done(x, g.call(aten.tanh.default, g.first(x)))


def after_normalization(opt_level: int) -> list[Pass]:
    """The passes that a normalized graph has yet to see."""
    return [each for each in pipeline(opt_level, "on") if each.ensures > Level.NORMALIZED]


@pytest.mark.parametrize("opt_level", [0, 1, 2, 3])
def test_each_pass_gets_the_level_it_requires(opt_level: int) -> None:
    level = Level.EXPORTED
    for each in pipeline(opt_level):
        assert level >= each.requires, each
        level = max(level, each.ensures)
    assert level is (Level.NORMALIZED if opt_level == 0 else Level.PLACED)


def test_options_reach_their_pass() -> None:
    by_name = {each.name: each for each in pipeline(1, "off", "vendor")}
    assert "unpad='off'" in str(by_name["remove_padding"])
    assert "fuse=False" in str(by_name["find_regions"])
    assert "gemm='vendor'" in str(by_name["specialize"])
    assert "fuse=True" in str({each.name: each for each in pipeline(2)}["find_regions"])
    with pytest.raises(OptionError, match="opt_level=4"):
        pipeline(4)


@pytest.mark.parametrize("opt_level", [1, 2])
@pytest.mark.parametrize("seed", [1, 8, 30])
def test_every_level_computes_the_same(seed: int, opt_level: int) -> None:
    made = random_graph(seed)
    expected = run(made.graph, made.inputs)
    gm = copy_of(made.graph)
    for each in after_normalization(opt_level):
        gm, (record,) = run_pipeline(gm, [each], verify=True)
        assert record.name == each.name
        assert_same_at_real_tokens(made.graph, expected, run(gm, made.inputs), made.inputs[1], 1e-10)
    assert info(gm).level is Level.PLACED


@dataclass(frozen=True)
class ForgetsTypes(Pass):
    """A pass with a bug."""

    name: ClassVar[str] = "forgets_types"
    requires: ClassVar[Level] = Level.NORMALIZED
    ensures: ClassVar[Level] = Level.NORMALIZED

    def run(self, gm: GraphModule) -> PassResult:
        """Drops the type of the first linear."""
        drop_fact(next(node for node in gm.graph.nodes if node.target is aten.linear.default), TensorType)
        return PassResult(gm, changed=True)


def test_the_verifier_names_the_pass_that_broke_the_graph() -> None:
    with pytest.raises(VerifierError, match=r"\[typed\]") as error:
        run_pipeline(small(), [ForgetsTypes()], verify=True)
    assert "forgets_types" in error.value.hint
    run_pipeline(small(), [ForgetsTypes()], verify=False)


def test_verification_follows_the_setting(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("TILEWRIGHT_VERIFY", "0")
    run_pipeline(small(), [ForgetsTypes()])
    monkeypatch.setenv("TILEWRIGHT_VERIFY", "1")
    with pytest.raises(VerifierError):
        run_pipeline(small(), [ForgetsTypes()])


def test_files_of_each_pass(tmp_path: Path) -> None:
    _, records = run_pipeline(small(), after_normalization(2), [ArtifactWriter(tmp_path / "dump")])
    names = [f"{step:02d}_{record.name}" for step, record in enumerate(records, start=1)]
    expected = {"00_captured.txt", "passes.txt", *(f"{n}.txt" for n in names), *(f"{n}.json" for n in names)}
    assert {path.name for path in (tmp_path / "dump").iterdir()} == expected
    lines = (tmp_path / "dump" / "passes.txt").read_text().splitlines()
    assert [line.split(":")[0] for line in lines] == [name.replace("_", " ", 1) for name in names]
    facts = json.loads((tmp_path / "dump" / f"{names[-1]}.json").read_text())
    assert facts["level"] == "placed"
    assert facts["record"]["name"] == "place"
    gemms = [row for row in facts["nodes"] if row["facts"].get("Region", {}).get("anchor") == "gemm"]
    assert gemms
    assert all(row["facts"]["GemmTable"]["rows"] in ("T", "B") for row in gemms)
    assert any(row["target"] == "aten.linear.default" for row in gemms[0]["body"])


def test_text_shows_type_layout_and_line() -> None:
    gm, _ = run_pipeline(small(), after_normalization(2)[:1])
    line = next(line for line in graph_text(gm).splitlines() if line.startswith("%q_2:"))
    call = "aten.linear.default(%embedding_default, %q_2_weight, %q_2_bias)"
    assert line == f"%q_2: f64[T, 24] packed = {call}  # test.py:1 q_2"
    assert graph_text(gm) == graph_text(gm)


def test_text_shows_region_bodies() -> None:
    gm, _ = run_pipeline(small(), after_normalization(2))
    text = graph_text(gm)
    assert "\n    %" in text
    assert "call_module region_0" not in text
    assert "= region_0(" in text


def test_diffs_between_successive_graphs() -> None:
    diffs = GraphDiffs()
    _, records = run_pipeline(small(), after_normalization(2), [diffs])
    assert len(diffs.texts) == len(records)
    packing = diffs.texts[0].splitlines()
    assert packing[:2] == ["--- before remove_padding", "+++ after remove_padding"]
    assert any(line.startswith("+%pack_index:") for line in packing)
    assert any(line.startswith("-%") and "tilewright.attention.default" in line for line in packing)
    assert graph_diff("a\n", "a\n", "x") == ""


def test_summary_line() -> None:
    record = PassRecord("remove_padding", 0.0123, 50, 41, {"aten.add.Tensor": -9}, {"gather": 3}, {})
    assert summary_line(4, record) == "04 remove_padding: 12.3 ms, 50 -> 41 nodes; -9 aten.add.Tensor; gather=3"


def test_records_count_work_in_regions() -> None:
    _, records = run_pipeline(small(), after_normalization(2))
    outlined = next(record for record in records if record.name == "outline_regions")
    assert outlined.nodes_before == outlined.nodes_after
    assert outlined.op_diff == {}


def test_a_copied_graph_has_its_own_facts() -> None:
    one = small()
    two = copy_of(one)
    drop_fact(next(node for node in two.graph.nodes if node.target is aten.linear.default), TensorType)
    assert "?" not in graph_text(one)
    assert "?" in graph_text(two)


def test_optional_passes_can_be_left_out() -> None:
    names = [[each.name for each in pipeline(2, without=without)] for without in ((), OPTIONAL)]
    assert [name for name in names[0] if name not in OPTIONAL] == names[1]
    assert set(OPTIONAL) < set(names[0])
    with pytest.raises(OptionError, match="no pass 'find_regions' can be left out"):
        pipeline(2, without=("find_regions",))
