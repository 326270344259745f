"""The packed graph as an ONNX file that stock ONNX Runtime runs with any batch and length.

Every op of the graph is replaced by its definition in plain torch while ``torch.onnx`` traces: the row index becomes
NonZero, packing
Gather, the rebuild ScatterND. Attention, which has no ragged form in ONNX, is padded and packed again around its
softmax;
all other work stays on real tokens.
"""

import logging
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from torch.fx import GraphModule, Interpreter, Node

from tilewright.errors import ArtifactError
from tilewright.ir.graph import info
from tilewright.ir.sizes import BATCH, SEQ
from tilewright.ops import find


class _Plain(torch.nn.Module):
    """Runs a graph on the plain-torch definitions of its ops."""

    def __init__(self, gm: GraphModule) -> None:
        super().__init__()
        self.graph_module = gm

    def forward(self, *inputs: torch.Tensor) -> tuple[torch.Tensor, ...]:
        return tuple(_PlainInterpreter(self.graph_module).run(*inputs))


class _PlainInterpreter(Interpreter):
    def run_node(self, n: Node) -> Any:
        if n.op == "call_function" and (spec := find(n.target)) is not None:
            args, kwargs = self.fetch_args_kwargs_from_env(n)
            return spec.reference(*args, **kwargs)
        return super().run_node(n)


def export_onnx(gm: GraphModule, path: Path) -> None:
    """Writes the graph as an ONNX file with dynamic batch and length.

    Args:
        gm: a graph at level normalized or packed.
        path: the file; weights beyond ONNX's 2 GB go beside it.

    Raises:
        ArtifactError: an op has no ONNX form, or the packages of the extra ``onnx`` are missing.
    """
    try:
        import onnx  # noqa: F401
        import onnxscript  # noqa: F401
    except ImportError as error:
        raise ArtifactError(f"cannot export ONNX without {error.name}", hint="pip install 'tilewright[onnx]'") from None
    found = info(gm)
    sizes = {BATCH: 3, SEQ: 11}
    example, dims = [], []
    for spec in found.inputs:
        shape = [int(size.subs(sizes)) if hasattr(size, "subs") else size for size in spec.shape]
        example.append(torch.ones(shape, dtype=spec.dtype))
        named = {BATCH: "batch", SEQ: "length"}
        dims.append({axis: named[size] for axis, size in enumerate(spec.shape) if size in named})
    try:
        with _quiet():
            program = torch.onnx.export(
                _Plain(gm).eval(),
                tuple(example),
                input_names=[spec.name for spec in found.inputs],
                output_names=list(found.output.names),
                dynamic_shapes=(tuple(dims),),
                dynamo=True,
                verbose=False,
            )
    except torch.onnx.errors.OnnxExporterError as error:
        raise ArtifactError(f"cannot export '{found.name}' to ONNX", why=str(error).splitlines()[0]) from error
    assert program is not None
    program.save(str(path), external_data=None)


@contextmanager
def _quiet() -> Iterator[None]:
    """The exporter logs what is no concern of the user: vision packages it misses, its own deprecated calls."""
    before = logging.root.manager.disable
    logging.disable(logging.WARNING)
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            yield
    finally:
        logging.disable(before)
