"""Who else runs encoders on this CPU: one function a peer, each returning what runs a batch, or raising why it cannot.

A peer is set up in its best documented form for a model of transformers: dynamic shapes, all threads, its own fusions.
A batch is right-padded ids and mask; a peer that takes sequences of true length is given these. What is called returns
the last hidden state. Each function imports its library itself: a process holds one contender and nothing of the rest.
"""

import json
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy
import torch
from torch import nn
from transformers import AutoTokenizer, BertConfig, BertModel

Batch = dict[str, torch.Tensor]
Run = Callable[[Batch], Any]
THREADS = torch.get_num_threads()


def eager(model: nn.Module, folder: Path) -> Run:
    """The model as it is."""
    return lambda batch: model(**batch).last_hidden_state


def eager_bf16(model: nn.Module, folder: Path) -> Run:
    """The model converted."""
    half = model.bfloat16()
    return lambda batch: half(**batch).last_hidden_state


def inductor(model: nn.Module, folder: Path) -> Run:
    """torch.compile with dynamic shapes."""
    compiled = torch.compile(model, dynamic=True)
    return lambda batch: compiled(**batch).last_hidden_state


def zentorch(model: nn.Module, folder: Path) -> Run:
    """AMD's plug-in as a backend of torch.compile."""
    import zentorch as _  # noqa: F401  registers the backend

    compiled = torch.compile(model, backend="zentorch", dynamic=True)
    return lambda batch: compiled(**batch).last_hidden_state


def _onnx(model: nn.Module, folder: Path) -> Path:
    """The model as ONNX with dynamic batch and length."""
    path = folder / "model.onnx"
    if not path.exists():
        ids = torch.ones((2, 9), dtype=torch.long)
        names = ["input_ids", "attention_mask", "token_type_ids"]
        axes = {name: {0: "batch", 1: "length"} for name in names}
        torch.onnx.export(
            _Tuple(model).eval(), (ids, ids, ids * 0), str(path), input_names=names, output_names=["last_hidden_state"],
            dynamic_axes=axes, opset_version=17, dynamo=False,
        )  # fmt: skip
    return path


class _Tuple(nn.Module):
    def __init__(self, model: nn.Module) -> None:
        super().__init__()
        self.model = model

    def forward(self, ids: torch.Tensor, mask: torch.Tensor, types: torch.Tensor) -> torch.Tensor:
        return self.model(input_ids=ids, attention_mask=mask, token_type_ids=types).last_hidden_state  # type: ignore[no-any-return]


def _session(path: Path) -> Run:
    import onnxruntime

    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads = THREADS
    session = onnxruntime.InferenceSession(str(path), options, providers=["CPUExecutionProvider"])
    return lambda batch: session.run(None, {name: value.numpy() for name, value in batch.items()})[0]


def onnxruntime_fp32(model: nn.Module, folder: Path) -> Run:
    """ONNX Runtime with its transformer fusions."""
    from onnxruntime.transformers import optimizer

    fused = folder / "fused.onnx"
    config = model.config
    made = optimizer.optimize_model(
        str(_onnx(model, folder)), "bert", config.num_attention_heads, config.hidden_size, opt_level=1
    )
    made.save_model_to_file(str(fused))
    return _session(fused)


def onnxruntime_int8(model: nn.Module, folder: Path) -> Run:
    """Dynamic quantization of its products; ONNX Runtime fuses the rest when the file is opened."""
    from onnxruntime.quantization import QuantType, quantize_dynamic

    path = folder / "int8.onnx"
    quantize_dynamic(str(_onnx(model, folder)), str(path), weight_type=QuantType.QInt8, per_channel=True)
    return _session(path)


def _openvino(model: nn.Module, folder: Path, precision: str) -> Run:
    import openvino

    core = openvino.Core()
    hints = {"INFERENCE_NUM_THREADS": THREADS, "INFERENCE_PRECISION_HINT": precision, "PERFORMANCE_HINT": "LATENCY"}
    supported = core.get_property("CPU", "OPTIMIZATION_CAPABILITIES")
    if precision == "bf16" and "BF16" not in supported:
        raise RuntimeError(f"it has no bf16 on this processor: {', '.join(supported)}")
    request = core.compile_model(str(_onnx(model, folder)), "CPU", hints).create_infer_request()
    return lambda batch: request.infer({name: value.numpy() for name, value in batch.items()})[0]


def openvino_fp32(model: nn.Module, folder: Path) -> Run:
    """OpenVINO from the ONNX file."""
    return _openvino(model, folder, "f32")


def openvino_bf16(model: nn.Module, folder: Path) -> Run:
    """OpenVINO computing in bf16."""
    return _openvino(model, folder, "bf16")


def _ctranslate2(model: nn.Module, folder: Path, kind: str) -> Run:
    import ctranslate2

    from tilewright.cli.demo import minilm_folder

    made, source = folder / f"ctranslate2_{kind}", folder / "model"
    model.save_pretrained(source)  # type: ignore[operator]
    # Its converter asks for a field that configurations no longer have, and for a tokenizer.
    config = json.loads((source / "config.json").read_text())
    (source / "config.json").write_text(json.dumps(config | {"position_embedding_type": "absolute"}))
    AutoTokenizer.from_pretrained(minilm_folder()).save_pretrained(source)
    quantization = "int8" if kind == "int8" else None
    ctranslate2.converters.TransformersConverter(str(source)).convert(str(made), quantization=quantization)
    encoder = ctranslate2.Encoder(str(made), device="cpu", compute_type=kind, inter_threads=1, intra_threads=THREADS)

    def run(batch: Batch) -> Any:
        lengths = batch["attention_mask"].sum(1).tolist()
        ids = [row[:length] for row, length in zip(batch["input_ids"].tolist(), lengths, strict=True)]
        return numpy.array(encoder.forward_batch(ids).last_hidden_state)

    return run


def ctranslate2_fp32(model: nn.Module, folder: Path) -> Run:
    """CTranslate2, which removes padding itself."""
    return _ctranslate2(model, folder, "float32")


def ctranslate2_int8(model: nn.Module, folder: Path) -> Run:
    """CTranslate2 with int8 weights and rows."""
    return _ctranslate2(model, folder, "int8")


def _ours(**options: Any) -> Callable[[nn.Module, Path], Run]:
    def make(model: nn.Module, folder: Path) -> Run:
        import tilewright

        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            compiled = tilewright.compile(model, **options)
        return lambda batch: compiled(**batch).last_hidden_state

    return make


# By name: (precision it competes in, what sets it up).
CONTENDERS: dict[str, tuple[str, Callable[[nn.Module, Path], Run]]] = {
    "tilewright fp32": ("fp32", _ours()),
    "tilewright bf16": ("bf16", _ours(dtype="bf16")),
    "tilewright int8": ("int8", _ours(dtype="int8")),
    "eager fp32": ("fp32", eager),
    "eager bf16": ("bf16", eager_bf16),
    "inductor": ("fp32", inductor),
    "zentorch": ("fp32", zentorch),
    "onnxruntime fp32": ("fp32", onnxruntime_fp32),
    "onnxruntime int8": ("int8", onnxruntime_int8),
    "openvino fp32": ("fp32", openvino_fp32),
    "openvino bf16": ("bf16", openvino_bf16),
    "ctranslate2 fp32": ("fp32", ctranslate2_fp32),
    "ctranslate2 int8": ("int8", ctranslate2_int8),
}


def contender(name: str, folder: Path) -> Run:
    """What runs batches through the named contender; files that it needs go into the folder, for others as well."""
    return CONTENDERS[name][1](bert_base(), folder)


def compiled(options: dict[str, Any]) -> Run:
    """What runs batches through our program, compiled with these options."""
    return _ours(**options)(bert_base(), Path())


def bert_base() -> BertModel:
    """BERT-base with random weights, the same in each process."""
    torch.manual_seed(0)
    return BertModel(BertConfig()).eval()
