"""``tilewright.compile``."""

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch

from tilewright.driver.compiled import CompiledModel
from tilewright.driver.kernels import Progress
from tilewright.driver.options import CompileOptions
from tilewright.driver.sentence_transformers import compile_pipeline, is_pipeline
from tilewright.models.capture import check_model
from tilewright.models.gguf.model import load_gguf


def compile(
    model: Any,
    *,
    dtype: torch.dtype | str | None = None,
    opt_level: int = 2,
    unpad: str = "auto",
    target: str = "auto",
    gemm: str = "auto",
    cache_dir: str | Path | None = None,
    without: Sequence[str] = (),
    activations: str = "int8",
    kv_dtype: torch.dtype | str | None = None,
    progress: Progress | None = None,
) -> Any:
    """Compiles a model into Triton kernels.

    Args:
        model: a transformers model, any ``torch.nn.Module``, an ``ExportedProgram``, or an ``fx.GraphModule``; in eval
            mode. It is not changed. A model whose inputs cannot be known beforehand is captured at its first call.
            Also a ``SentenceTransformer``, ``CrossEncoder`` or another pipeline of sentence-transformers; or the path
            of a ``.gguf`` file, whose weights are multiplied as they are stored.
        dtype: "fp32", "bf16", "fp16" or "fp64", or torch's own: what the model is converted to, as ``model.to`` does.
            On a processor that does not multiply half types they are computed in fp32, and results rounded to them.
            "int8": products with weights in whole numbers of 8 bits, weights rounded once for each output channel, rows
            when they are computed; all else, and what is returned, in the model's own. "int4": likewise with weights of
            4 bits in groups of 64, each from its least to its largest element, and rows rounded by blocks of 32. None:
            the model as it is.
        opt_level: 0 captures, normalizes and runs reference kernels (the oracle); 1 adds packing; 2 adds fusion and
            measured GEMM tables; 3 tunes longer.
        unpad: "auto" removes padding where it is legal and records why where not; "on" refuses instead of padding;
            "off".
        target: "cpu", or "auto", which is the CPU in this version.
        gemm: "auto" chooses per GEMM and row count; "triton" or "vendor" uses one alone.
        cache_dir: where kernels and tables are kept; default: the user's cache folder.
        without: passes to leave out, to see what they bring: "slice_rows", "merge_linears".
        activations: what the rows are that are multiplied with weights in blocks (of a file, or "int4"): "int8" rounds
            them by blocks of 32, which is faster, "float" does not.
        kv_dtype: type of the keys and values that generation keeps, "fp32", "bf16", "fp16" or "int8": whole numbers of
            8 bits, with a scale for each token and head. None: that of the model.
        progress: called as ``progress(done, total, what)`` before each piece of work, whenever something is compiled.

    Returns:
        A ``CompiledModel``: a callable that takes what the model takes and returns the same output class with the same
        fields. Masked positions of per-token outputs are 0. A causal model, and an encoder-decoder, has ``generate`` as
        transformers has it; what it is used for is compiled when it is first used (``CompiledModel.warmup`` compiles
        all). Of a pipeline, a copy of its own class whose transformers models are compiled.

    Raises:
        OptionError: an option has a value that is not a choice.
        CaptureError: it is no model, or is in training mode.
        GgufError: a file is damaged, or its model is not read.
        PackingRefused: ``unpad="on"`` and packing is not legal, or the model cannot be captured.
    """
    folder = Path(cache_dir) if cache_dir else None
    options = CompileOptions(dtype, opt_level, unpad, target, gemm, folder, tuple(without), activations, kv_dtype)
    if isinstance(model, str | Path) and Path(model).suffix == ".gguf":
        stored = load_gguf(model)
        return CompiledModel(stored.model, options, stored=stored, progress=progress)
    if is_pipeline(model):
        return compile_pipeline(model, options, progress)
    check_model(model)
    return CompiledModel(model, options, progress=progress)
