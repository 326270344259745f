"""The compiled model: called like the model it was made from."""

import contextlib
import logging
import threading
import time
import warnings
from collections.abc import Sequence
from dataclasses import dataclass, fields, replace
from typing import Any

import torch
from torch import nn
from torch.export import ExportedProgram
from transformers import GenerationMixin

from tilewright.driver.compile_graph import CompiledGraph, compile_graph
from tilewright.driver.generation import TextGenerator
from tilewright.driver.generators import generator_of, steps_of
from tilewright.driver.kernels import Progress
from tilewright.driver.options import CompileOptions
from tilewright.driver.precision import precision_of, round_results
from tilewright.driver.steps import StepModel
from tilewright.errors import CacheRefused, CaptureError, InputError, PackingRefused
from tilewright.ir.graph import GraphInfo, info
from tilewright.ir.program import EagerStep
from tilewright.ir.steps import CachedModel
from tilewright.models.capture import capture, cast_copy, check_model, default_signature
from tilewright.models.export import model_line
from tilewright.models.gguf.model import GgufModel, dense_model
from tilewright.models.inputs import CallSignature, bind, example_inputs, other_sizes, signature_of
from tilewright.passes.base import Observer
from tilewright.runtime.serving.request import Request
from tilewright.runtime.stats import Stats

_LOG = logging.getLogger("tilewright")


@dataclass
class Variant:
    """The model compiled for one way of calling it (which arguments are given); ``reason`` says why it runs eager."""

    compiled: CompiledGraph | None
    info: GraphInfo | None
    reason: str = ""
    warned: bool = False


class CompiledModel:
    """A model compiled by ``tilewright.compile``.

    Which tensor arguments a call gives, and the values of its other arguments, select a variant. The usual one is
    compiled at once, another at its first call. Batch size and length never are a reason to compile.

    A model that can generate has two uses, calls and generation, and many callers want one of them: here the usual
    variant too is compiled at the first call, unless ``unpad="on"`` asks for a refusal at once; and the steps of
    generation when they are first needed. ``warmup`` does all that is left. The logger ``tilewright`` says, at level
    INFO, what is compiled and how long it took.

    Attributes:
        model: the model it was made from.
        options: the options it was compiled with.
        stored: the file that holds the weights; ``model`` then has none of its own.
    """

    def __init__(
        self,
        model: Any,
        options: CompileOptions,
        *,
        observers: Sequence[Observer] = (),
        progress: Progress | None = None,
        stored: GgufModel | None = None,
    ) -> None:
        self.model = model
        self.stored = stored
        self.options = options
        self._observers = tuple(observers)
        self._progress = progress
        self._variants: dict[CallSignature, Variant] = {}
        self._fallbacks = Stats()
        self._eager: Any = None
        self._steps: StepModel | CacheRefused | None = None
        self._generator: TextGenerator | None = None
        self._lock = threading.RLock()
        self._precision = precision_of(model, options)
        if self._precision.reason and options.model_dtype is not None:
            warnings.warn(f"tilewright: {self._precision.reason}", RuntimeWarning, stacklevel=3)
        if options.unpad == "on" or not self.can_generate:
            self.compile_usual()

    @property
    def config(self) -> Any:
        """The model's configuration, where it has one."""
        return getattr(self.model, "config", None)

    @property
    def can_generate(self) -> bool:
        """Whether it is a language model, as transformers sees it; ``steps`` may refuse it all the same."""
        return isinstance(self.model, GenerationMixin)

    @property
    def variants(self) -> dict[CallSignature, Variant]:
        """What has been compiled so far, by call signature."""
        return dict(self._variants)

    @property
    def reasons(self) -> dict[str, str]:
        """What was not done, and why, by topic; topics of other calls than the first compiled name the call."""
        found: dict[str, str] = {}
        for number, (signature, variant) in enumerate(self.variants.items()):
            of_call = f" [{signature}]" if number else ""
            if variant.compiled is not None:
                found |= {f"{topic}{of_call}": why for topic, why in info(variant.compiled.graph).reasons.items()}
                steps = variant.compiled.spec.steps if variant.compiled.spec is not None else ()
                eager = [step for step in steps if isinstance(step, EagerStep)]
                found |= {f"eager part '{', '.join(step.origin)}'{of_call}": step.reason for step in eager}
            if variant.reason:
                found[f"eager: {signature}"] = variant.reason
        if isinstance(self._steps, CacheRefused):
            found["generate"] = str(self._steps)
        return found

    @property
    def stats(self) -> Stats:
        """Counters over all calls so far: a snapshot."""
        total = Stats()
        compiled = [v.compiled.stats for v in self._variants.values() if v.compiled is not None]
        for part in (self._fallbacks, *compiled):
            for field in fields(Stats):
                setattr(total, field.name, getattr(total, field.name) + getattr(part, field.name))
        return total

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        """Runs the model.

        Args and kwargs are the model's own. Inputs may be non-contiguous.

        Returns:
            The model's output class with the same fields; masked positions of per-token outputs are 0.

        Raises:
            InputError: an argument does not fit: rank, shape of the mask, ids out of the vocabulary, too long; or the
                call runs eager and the model itself fails on it.
            PackingRefused: ``unpad="on"``, and this call cannot be compiled or its padding not removed.
        """
        signature = self._signature(args, kwargs)
        variant = self._variants.get(signature) or self._variant(signature, (args, kwargs))
        if variant.compiled is None or variant.info is None:
            return self._run_eager(signature, variant, args, kwargs)
        misfit = other_sizes(signature, variant.info, args, kwargs)
        if misfit and self.model is not None:
            return self._run_eager(signature, replace(variant, reason=misfit), args, kwargs)
        tensors = bind(signature, variant.info, args, kwargs)
        return variant.info.output.build(variant.compiled(*tensors))

    forward = __call__

    def generate(self, *args: Any, **kwargs: Any) -> Any:
        """Hugging Face's ``generate``, its arguments and results: ``TextGenerator.generate``.

        The first call compiles the model into steps.

        Raises:
            CacheRefused: as of ``steps``.
            OptionError, InputError, ValueError: as of ``TextGenerator.generate``.
        """
        return self.generator.generate(*args, **kwargs)

    def submit(self, *args: Any, **kwargs: Any) -> Request:
        """Queues one prompt for continuous batching: ``TextGenerator.submit``.

        Raises:
            As of ``generate``.
        """
        return self.generator.submit(*args, **kwargs)

    @property
    def cached_model(self) -> CachedModel:
        """What computes when text is generated; so a compiled model serves as ``assistant_model`` of another."""
        return self.steps

    @property
    def generator(self) -> TextGenerator:
        """Generates text; its first call checks options, then compiles the model into steps.

        Raises:
            CacheRefused: it is no language model.
        """
        with self._lock:
            if self._generator is None:
                if not self.can_generate:
                    raise self._no_language_model()
                self._generator = generator_of(self.model, lambda: self.steps)
            return self._generator

    @property
    def steps(self) -> StepModel:
        """The model compiled into steps of generation, at the first use: what an engine drives.

        Raises:
            CacheRefused: it cannot go on from tokens it has seen; says at which node.
        """
        with self._lock:
            if self._steps is None:
                self._steps = self._compile_steps()
            if isinstance(self._steps, CacheRefused):
                raise self._steps.with_traceback(None)
            return self._steps

    def compile_usual(self) -> Variant | None:
        """Compiles the usual call, with ids and a mask, unless it is done; None where no such call is known.

        Raises:
            PackingRefused: ``unpad="on"``, and its padding cannot be removed.
        """
        usual = default_signature(self.model)
        return self._variant(usual, None) if usual is not None else None

    def warmup(self) -> None:
        """Compiles what is not compiled yet, and runs it once, so that memory is touched and code is in place.

        Of a model that can generate that is the usual call and the steps. Refused steps are no error here: ``reasons``
        has them under "generate", and ``generate`` raises them.
        """
        self.compile_usual()
        for variant in self.variants.values():
            if variant.compiled is not None and variant.info is not None:
                variant.compiled(*example_inputs(variant.info))
        if self.can_generate:
            with contextlib.suppress(CacheRefused):
                one = torch.zeros(1, dtype=torch.int64)
                self.submit(one, max_new_tokens=1, do_sample=False, num_beams=1, num_return_sequences=1).result()

    def _signature(self, args: tuple[Any, ...], kwargs: dict[str, Any]) -> CallSignature:
        return signature_of(self.model, args, kwargs)

    def _run_eager(
        self, signature: CallSignature, variant: Variant, args: tuple[Any, ...], kwargs: dict[str, Any]
    ) -> Any:
        if self.options.unpad == "on":
            raise PackingRefused(
                "this call would run eager, with its padding", why=variant.reason, hint="unpad='auto' allows it"
            )
        try:
            with torch.no_grad():
                result = self._eager_model()(*args, **kwargs)
        except Exception as error:
            if variant.compiled is None:
                # It may have been captured in vain because of these very arguments: a correct call tries again.
                with self._lock:
                    self._variants.pop(signature, None)
            raise InputError(
                "the model itself fails on this call",
                where=model_line(error),
                why=f"{type(error).__name__}: {error}",
                hint=signature.obstacle or "call it as the model's documentation says",
            ) from error
        self._fallbacks.calls += 1
        self._fallbacks.fallbacks += 1
        if not variant.warned:
            variant.warned = True
            warnings.warn(f"tilewright runs a call as it was: {variant.reason}", RuntimeWarning, stacklevel=3)
        return result

    def _eager_model(self) -> Any:
        """What runs calls that are not compiled: the model, in the dtype asked for."""
        with self._lock:
            if self._eager is None:
                self._eager = self.model.module() if isinstance(self.model, ExportedProgram) else self.model
                if self.stored is not None:
                    self._eager = dense_model(self.stored)
                dtype = self.options.model_dtype
                if dtype is not None and isinstance(self._eager, nn.Module):
                    self._eager = cast_copy(self._eager, dtype)
            return self._eager

    def _variant(self, signature: CallSignature, example: tuple[tuple[Any, ...], dict[str, Any]] | None) -> Variant:
        with self._lock:
            if signature not in self._variants:
                self._variants[signature] = self._compile(signature, example)
            return self._variants[signature]

    def _compile(self, signature: CallSignature, example: tuple[tuple[Any, ...], dict[str, Any]] | None) -> Variant:
        check_model(self.model)
        start = self._begin(f"for calls with {signature}")
        try:
            gm = capture(self.model, signature, example, dtype=self._precision.capture)
            round_results(gm, self._precision)
        except CaptureError as error:
            if self.options.unpad == "on":
                raise PackingRefused(
                    "padding cannot be removed: the model cannot be captured", why=str(error)
                ) from error
            return Variant(None, None, str(error))
        compiled = compile_graph(gm, self.options, **self._context())
        _LOG.info("compiled in %.1f s", time.perf_counter() - start)
        return Variant(compiled, info(compiled.graph))

    def _compile_steps(self) -> "StepModel | CacheRefused":
        if not self.can_generate:
            return self._no_language_model()
        start = self._begin("into steps of generation")
        try:
            steps = steps_of(self.model, self.options, **self._context())
        except CacheRefused as error:
            return error
        _LOG.info("compiled in %.1f s", time.perf_counter() - start)
        return steps

    def _no_language_model(self) -> CacheRefused:
        what = f"{type(self.model).__name__} cannot generate"
        return CacheRefused(what, why="it is no language model", hint="compile one, such as a ...ForCausalLM")

    def _begin(self, what: str) -> float:
        """Says what is compiled; returns when that began."""
        _LOG.info("compiling %s %s", type(self.model).__name__, what)
        if self._progress is not None:
            self._progress(0, 1, "capturing")
        return time.perf_counter()

    def _context(self) -> dict[str, Any]:
        """What every compilation of this model is given besides the options."""
        stored = self.stored.stored if self.stored is not None else None
        return {"stored": stored, "observers": self._observers, "progress": self._progress}

    def __repr__(self) -> str:
        return f"CompiledModel({type(self.model).__name__}, {self.options})"
