"""Compiles the transformers inside a ``SentenceTransformer``, a ``CrossEncoder`` or any other pipeline of modules.

The pipeline stays what it is: its own class, tokenizer, prompts, pooling, normalization and sorting by length. Only
each transformers model in it is replaced, in a copy of the pipeline that shares everything else, by
``CompiledBackbone``, in the place where sentence-transformers puts its ONNX and OpenVINO back ends.
"""

import copy
from collections.abc import Callable, Iterator
from functools import partial
from typing import Any

from torch import nn

from tilewright.driver.compiled import CompiledModel
from tilewright.driver.kernels import Progress
from tilewright.driver.options import CompileOptions
from tilewright.errors import CaptureError
from tilewright.models.capture import check_model


class CompiledBackbone(nn.Module):
    """Stands in a pipeline where the transformers model stood, and is called like it.

    Attributes:
        original: the model as it was; it gives parameters, device and ``save_pretrained``, and does not run.
        compiled: what runs.
    """

    def __init__(self, original: nn.Module, compiled: CompiledModel) -> None:
        super().__init__()
        self.original = original
        self.compiled = compiled
        self.eval()

    @property
    def config(self) -> Any:
        """The original's configuration."""
        return self.original.config

    def save_pretrained(self, *args: Any, **kwargs: Any) -> Any:
        """Saves the original."""
        return self.original.save_pretrained(*args, **kwargs)  # type: ignore[operator]

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        """Runs the compiled model; arguments and result are the original's.

        Raises:
            CaptureError: the pipeline is in training mode.
            InputError: as of ``CompiledModel``.
        """
        if self.training:
            raise CaptureError(
                "a compiled model cannot be trained",
                where=type(self.original).__name__,
                why="its weights were laid out for its kernels when it was compiled",
                hint="train the pipeline it was made from, and compile that again",
            )
        if kwargs.get("return_dict") is True and getattr(self.config, "return_dict", False):
            del kwargs["return_dict"]  # the default, spelled out: no reason for another variant
        return self.compiled(*args, **kwargs)


def is_pipeline(model: Any) -> bool:
    """Whether it is a pipeline of sentence-transformers; the package is not imported to find out."""
    return isinstance(model, nn.Sequential) and any(
        base.__module__.partition(".")[0] == "sentence_transformers" for base in type(model).__mro__
    )


def compile_pipeline(pipeline: Any, options: CompileOptions, progress: Progress | None = None) -> Any:
    """A copy of the pipeline in which every transformers model is compiled.

    Args:
        pipeline: a ``SentenceTransformer``, ``CrossEncoder`` or another of their kind. It is not changed.
        options: how to compile each model.
        progress: as of ``tilewright.compile``.

    Returns:
        An object of the same class. It shares tokenizer, further modules and weights with the pipeline.

    Raises:
        CaptureError: a model of the pipeline is in training mode, or no transformers model is in it.
    """
    made = _with_compiled(pipeline, partial(CompiledModel, options=options, progress=progress), {})
    if not list(backbones(made)):
        raise CaptureError(
            "the pipeline holds no transformers model",
            where=type(pipeline).__name__,
            why=f"its modules are {', '.join(type(module).__name__ for module in pipeline)}",
            hint="static embeddings need no compiler; compile other modules by themselves",
        )
    return made


def backbones(pipeline: nn.Module) -> Iterator[CompiledModel]:
    """The compiled models of a pipeline, in order; each has ``stats``, ``reasons`` and ``variants``."""
    for module in pipeline.modules():
        if isinstance(module, CompiledBackbone):
            yield module.compiled


def _with_compiled(
    module: nn.Module, compile_one: Callable[[nn.Module], CompiledModel], made: dict[nn.Module, nn.Module]
) -> nn.Module:
    """The module with compiled models in the place of transformers models; a module used twice stays one."""
    from transformers import PreTrainedModel

    if module in made:
        return made[module]
    if isinstance(module, PreTrainedModel):
        check_model(module)
        made[module] = CompiledBackbone(module, compile_one(module))
        return made[module]
    children = {name: child and _with_compiled(child, compile_one, made) for name, child in module._modules.items()}
    if all(children[name] is child for name, child in module._modules.items()):
        return module
    made[module] = copy.copy(module)
    made[module].__dict__["_modules"] = children
    return made[module]
