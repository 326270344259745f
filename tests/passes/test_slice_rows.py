"""SliceRows against the graph it was given: same results from fewer rows, and all rows where they are needed."""

import copy

import pytest
import torch
from graphs import GraphBuilder, packed_bert
from references import ErrorRule, in_double, masks
from torch import Tensor
from torch.fx import GraphModule, Interpreter, Node

import tilewright
from tilewright.ir.facts import TensorType, find_fact
from tilewright.ir.sizes import BATCH, SEQ, TOKENS
from tilewright.passes.base import PassRecord, run_pass
from tilewright.passes.packing.slice_rows import SliceRows

aten = torch.ops.aten
tw = torch.ops.tilewright
pytestmark = pytest.mark.usefixtures("one_thread")


def sliced(g: GraphBuilder, *outputs: Node) -> tuple[GraphModule, PassRecord]:
    """The graph after the pass, once its results were seen to be those from before, on several masks."""
    gm = g.done(*outputs)
    after, record = run_pass(SliceRows(), copy.deepcopy(gm))
    generator = torch.Generator().manual_seed(7)
    for pattern in ("as_built", "left", "holes", "empty_row", "one_token", "full"):
        given = list(g.example)
        place = next(
            i for i, node in enumerate(n for n in gm.graph.nodes if n.op == "placeholder") if node.name == "mask"
        )
        if pattern != "as_built":
            batch, length = given[place].shape
            given[place] = masks(batch, length, pattern, generator)
        for want, got in zip(Interpreter(gm).run(*given), Interpreter(after).run(*given), strict=True):
            torch.testing.assert_close(got, want, rtol=1e-5, atol=1e-5)
    return after, record


def rows(gm: GraphModule, target: object) -> list[object]:
    """First axis of each result of the op, in order."""
    nodes = [node for node in gm.graph.nodes if node.target is target]
    return [kind.shape[0] for node in nodes if (kind := find_fact(node, TensorType))]


def test_last_layer_computes_one_row_of_each_sequence() -> None:
    g = packed_bert(layers=3)
    gm, record = sliced(g, g.outputs[1])
    assert rows(gm, tw.attention_packed.default) == [TOKENS, TOKENS, BATCH]
    # Of the last layer's six linears, those of keys and values see all tokens; the pooler never did.
    linears = rows(gm, aten.linear.default)
    assert (linears.count(TOKENS), linears.count(BATCH)) == (14, 5)
    assert record.counts["attention"] == 1
    assert any("one query of each sequence" in why for why in record.reasons.values())


def test_what_is_the_same_in_every_row_is_made_for_the_selected_ones() -> None:
    g = packed_bert(layers=1)
    first = next(node for node in g.graph.nodes if node.name == "first")
    x, chosen = first.args
    assert isinstance(x, Node)
    same = g.call(aten.expand.default, g.weight("shift", 32), [g.size(x, 0), 32])
    moved = g.call(tw.select_rows.default, g.call(aten.add.Tensor, x, same), chosen)
    gm, _ = sliced(g, g.outputs[1], moved)
    assert rows(gm, aten.expand.default)[-1] == BATCH


def test_all_rows_where_an_output_shows_them() -> None:
    g = packed_bert(layers=2)
    gm, record = sliced(g, *g.outputs)
    assert rows(gm, tw.attention_packed.default) == [TOKENS, TOKENS]
    assert record.counts == {}
    assert record.reasons == {"first": "all rows of 'l1_norm2' are read by 'scatter'"}


def test_a_value_that_keys_read_stays_whole() -> None:
    """Column 0 is read behind the last layer and behind the one before, whose rows are keys of the last."""
    g = packed_bert(layers=2)
    named = {node.name: node for node in g.graph.nodes}
    early = g.call(tw.select_rows.default, named["l0_norm2"], named["rows"], name="early")
    gm, record = sliced(g, g.call(aten.add.Tensor, early, g.outputs[1], name="both"))
    assert rows(gm, tw.attention_packed.default) == [TOKENS, BATCH]
    assert list(record.reasons) == ["l1_attention_rows"]


def test_masked_first_columns_are_queries_of_their_own() -> None:
    """Left padding: column 0 is no key; as a query it sees the keys of its sequence."""
    g = packed_bert(layers=1)
    gm, _ = sliced(g, g.outputs[1])
    assert rows(gm, tw.attention_packed.default) == [BATCH]


@pytest.mark.parametrize("seed", range(3))
def test_compiled_classifier_obeys_the_error_rule(seed: int) -> None:
    import transformers as hf

    small = {"hidden_size": 48, "num_hidden_layers": 2, "num_attention_heads": 4, "intermediate_size": 112}
    torch.manual_seed(seed)
    model = hf.RobertaForSequenceClassification(hf.RobertaConfig(vocab_size=99, num_labels=5, **small)).eval()
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.mul_(4.0 if parameter.dim() > 1 else 1.0)
    double, compiled = in_double(model), tilewright.compile(model, unpad="on")
    rule, generator = ErrorRule(), torch.Generator().manual_seed(seed)
    for pattern in ("full", "right", "left", "holes", "one_token"):
        ids = torch.randint(3, 99, (5, 17), generator=generator)
        mask: Tensor = masks(5, 17, pattern, generator)
        with torch.no_grad():
            eager, wide = model(ids, attention_mask=mask).logits, double(ids, attention_mask=mask).logits
        rule.add(compiled(ids, attention_mask=mask).logits, eager, wide)
    rule.check()
    (variant,) = compiled.variants.values()
    (record,) = (record for record in variant.compiled.records if record.name == "slice_rows")
    assert record.counts["attention"] == 1


def test_compiled_classifier_reads_the_last_token() -> None:
    """The last id that is no padding: behind right and left padding a key, in other masks a row kept for it."""
    import transformers as hf

    small = {"hidden_size": 48, "num_hidden_layers": 3, "num_attention_heads": 4, "intermediate_size": 112}
    torch.manual_seed(0)
    config = hf.Qwen3Config(vocab_size=99, num_labels=5, num_key_value_heads=2, head_dim=12, pad_token_id=0, **small)
    model = hf.Qwen3ForSequenceClassification(config).eval()
    double, compiled = in_double(model), tilewright.compile(model, unpad="on")
    rule, generator = ErrorRule(), torch.Generator().manual_seed(1)
    for pattern in ("full", "right", "left", "holes", "empty_row", "one_token"):
        mask: Tensor = masks(5, 37, pattern, generator)
        ids = torch.randint(1, 99, (5, 37), generator=generator)
        if pattern != "holes":  # where ids stand at masked places too, the last of them may be masked
            ids = ids * mask
        with torch.no_grad():
            eager, wide = model(ids, attention_mask=mask).logits, double(ids, attention_mask=mask).logits
        kept = mask.any(dim=1)  # a query without a key: torch gives the mean of all values, the op zeros
        rule.add(compiled(ids, attention_mask=mask).logits[kept], eager[kept], wide[kept])
    rule.check()
    assert compiled.stats.eager_steps == 0
    (variant,) = compiled.variants.values()
    graph = variant.compiled.graph
    (record,) = (record for record in variant.compiled.records if record.name == "slice_rows")
    assert record.counts["attention"] == 1
    bodies = [module for module in graph.modules() if isinstance(module, GraphModule)]
    # Of the last layer, keys and values alone see all tokens; queries, output, gate, up, down and the head do not.
    assert sum(rows(body, aten.linear.default).count(BATCH) for body in bodies) == 6


def test_nothing_to_do_without_packing() -> None:
    g = GraphBuilder()
    x = g.input("x", BATCH, SEQ, 8)
    gm = g.done(g.call(aten.select.int, x, 1, 0))
    after, record = run_pass(SliceRows(), gm)
    assert after is gm
    assert record.counts == {}
