"""The ONNX file: the packed graph, valid, and the same numbers in stock ONNX Runtime at any batch and length."""

from collections import Counter
from pathlib import Path

import numpy as np
import onnx
import onnxruntime
import pytest
import torch
from references import PATTERNS, build, masks

from tilewright.cli.work import graph_at
from tilewright.driver.onnx_export import export_onnx
from tilewright.ir.graph import Level


@pytest.mark.parametrize("family", ["bert", "distilbert"])
def test_packed_graph_runs_in_onnx_runtime(family: str, tmp_path: Path) -> None:
    model = build(family, 0)
    path = tmp_path / "packed.onnx"
    export_onnx(graph_at(model, Level.PACKED, "on", None), path)
    onnx.checker.check_model(str(path), full_check=True)
    ops = Counter(node.op_type for node in onnx.load(path).graph.node)
    assert ops["NonZero"] == 1
    assert ops["Gather"] + ops["GatherND"] >= 1
    assert ops["ScatterND"] + ops["ScatterElements"] >= 1
    session = onnxruntime.InferenceSession(str(path), providers=["CPUExecutionProvider"])
    names = [each.name for each in session.get_inputs()]
    generator = torch.Generator().manual_seed(0)
    for (batch, length), pattern in zip(((1, 1), (2, 5), (4, 31), (3, 9), (5, 16), (2, 40)), PATTERNS, strict=True):
        mask = masks(batch, length, pattern, generator)
        given = {"input_ids": torch.randint(3, 99, (batch, length)), "attention_mask": mask}
        given["token_type_ids"] = torch.zeros_like(mask)
        outputs = session.run(None, {name: given[name].numpy() for name in names})
        with torch.no_grad():
            expected = model(given["input_ids"], attention_mask=mask).last_hidden_state.numpy()
        real = mask.bool().numpy()
        np.testing.assert_allclose(outputs[0][real], expected[real], atol=2e-3, rtol=1e-3)
