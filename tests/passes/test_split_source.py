"""SplitSource: its halves, one after the other, are the graph they were cut from."""

import copy

import pytest
import torch
from tests.decoders.models import VOCAB, build
from torch.fx import GraphModule, Interpreter

from tilewright.driver.options import CompileOptions
from tilewright.driver.steps import capture_call
from tilewright.ir.graph import info, set_info
from tilewright.passes.normalization.normalize import normalization
from tilewright.passes.pipeline import run_pipeline
from tilewright.passes.steps.split_source import SplitSource

pytestmark = pytest.mark.usefixtures("one_thread")


def half(gm: GraphModule, keep: str) -> GraphModule:
    twin = GraphModule(gm, copy.deepcopy(gm.graph))
    set_info(twin, info(gm))
    return run_pipeline(twin, [SplitSource(keep)])[0]


def test_the_halves_make_the_whole() -> None:
    ids = torch.ones((1, 3), dtype=torch.int64)
    names = ("input_ids", "attention_mask", "decoder_input_ids", "decoder_attention_mask")
    gm = capture_call(build("bart", seed=0), CompileOptions(), dict.fromkeys(names, ids) | {"use_cache": False})
    gm, _ = run_pipeline(gm, normalization())
    source, target = half(gm, "source"), half(gm, "target")
    assert [spec.name for spec in info(source).inputs] == list(names[:2])
    cut = [f"source_{kind}_{layer}" for layer in range(2) for kind in ("keys", "values")]
    assert list(info(source).output.names) == cut
    assert [spec.name for spec in info(target).inputs] == [*cut, *names[1:]]
    assert info(target).output.names == ("logits",)
    texts = torch.randint(3, VOCAB, (2, 3, 7), generator=torch.Generator().manual_seed(0))
    mask = torch.tensor([[1, 1, 1, 1, 0, 0, 0], [1] * 7, [1, 1, 0, 0, 0, 0, 0]])
    with torch.no_grad():
        (want, _) = Interpreter(gm).run(texts[0], mask, texts[1], torch.ones_like(mask))
        read = [each.transpose(1, 2) for each in Interpreter(source).run(texts[0], mask)]
        (found,) = Interpreter(target).run(*read, mask, texts[1], torch.ones_like(mask))
    torch.testing.assert_close(found, want)
    used = {node.target for node in target.graph.nodes if node.op == "get_attr"}
    assert not any("encoder.layers" in name for name in used)
