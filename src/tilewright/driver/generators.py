"""A model of transformers compiled so that it generates: a causal one, or an encoder-decoder."""

from collections.abc import Callable
from typing import Any

from tilewright.driver.generation import TextGenerator
from tilewright.driver.generation_sources import SourceTextGenerator
from tilewright.driver.options import CompileOptions
from tilewright.driver.source_steps import compile_source_steps
from tilewright.driver.steps import StepModel, compile_steps
from tilewright.ir.steps import CachedModel


def steps_of(model: Any, options: CompileOptions, **given: Any) -> StepModel:
    """The model compiled into steps; what is ``given`` is as of ``compile_steps``.

    Raises:
        CacheRefused: as of ``compile_steps`` or ``compile_source_steps``.
    """
    compile_ = compile_source_steps if model.config.is_encoder_decoder else compile_steps
    return compile_(model, options, **given)


def generator_of(model: Any, make_steps: Callable[[], CachedModel]) -> TextGenerator:
    """Generates with the steps of a model, which are made when they are first needed."""
    kind = SourceTextGenerator if model.config.is_encoder_decoder else TextGenerator
    return kind(make_steps, model.config, model.generation_config)
