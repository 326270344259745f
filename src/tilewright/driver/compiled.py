"""The compiled model: called like the model it was made from."""

import threading
import warnings
from collections.abc import Sequence
from dataclasses import dataclass, fields, replace
from typing import TYPE_CHECKING, Any

import torch
from torch import nn
from torch.export import ExportedProgram

from tilewright.driver.generation import TextGenerator
from tilewright.driver.generators import generator_of, steps_of
from tilewright.driver.options import CompileOptions
from tilewright.driver.precision import precision_of, round_results
from tilewright.driver.steps import StepModel
from tilewright.errors import CacheRefused, CaptureError, InputError, PackingRefused
from tilewright.ir.graph import GraphInfo, info
from tilewright.ir.program import EagerStep
from tilewright.ir.steps import CachedModel
from tilewright.models.capture import capture, cast_copy, check_model, default_signature
from tilewright.models.export import model_line
from tilewright.models.gguf_model import GgufModel, dense_model
from tilewright.models.inputs import CallSignature, bind, example_inputs, other_sizes, signature_of
from tilewright.runtime.request import Request
from tilewright.runtime.stats import Stats

if TYPE_CHECKING:
    from tilewright.driver.compile import CompiledGraph
    from tilewright.driver.kernels import Progress
    from tilewright.passes.base import Observer


@dataclass
class Variant:
    """The model compiled for one way of calling it (which arguments are given); ``reason`` says why it runs eager."""

    compiled: "CompiledGraph | None"
    info: GraphInfo | None
    reason: str = ""
    warned: bool = False


class CompiledModel:
    """A model compiled by ``tilewright.compile``.

    Which tensor arguments a call gives, and the values of its other arguments, select a variant. The usual one is
    compiled at
    once; another is compiled at its first call. Batch size and length never are a reason to compile.

    Attributes:
        model: the model it was made from.
        options: the options it was compiled with.
        stored: the file that holds the weights; ``model`` then has none of its own, and calls are compiled when they
            are met.
    """

    def __init__(
        self,
        model: Any,
        options: CompileOptions,
        *,
        observers: "Sequence[Observer]" = (),
        progress: "Progress | None" = None,
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
        self._generator: TextGenerator | None = None
        self._lock = threading.RLock()
        self._precision = precision_of(model, options)
        if self._precision.reason and options.model_dtype is not None:
            warnings.warn(f"tilewright: {self._precision.reason}", RuntimeWarning, stacklevel=3)
        usual = default_signature(model)
        if usual is not None and stored is None:
            self._variant(usual, None)

    @property
    def config(self) -> Any:
        """The model's configuration, where it has one."""
        return getattr(self.model, "config", None)

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
            CacheRefused: it cannot go on from tokens it has seen; says at which node.
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
        return self.generator.cached_model

    @property
    def generator(self) -> TextGenerator:
        """Generates text; the first use compiles the model into steps.

        Raises:
            CacheRefused: it cannot go on from tokens it has seen; says at which node.
        """
        with self._lock:
            if self._generator is None:
                self._generator = generator_of(self.model, self.steps())
            return self._generator

    def steps(self) -> StepModel:
        """The model compiled into steps of generation, anew: what an engine drives.

        Raises:
            CacheRefused: it cannot go on from tokens it has seen; says at which node.
        """
        if not getattr(self.model, "can_generate", bool)():
            kind = type(self.model).__name__
            raise CacheRefused(
                f"{kind} cannot generate", why="it is no language model", hint="compile one, such as a ...ForCausalLM"
            )
        stored = self.stored.stored if self.stored is not None else None
        return steps_of(self.model, self.options, stored=stored, observers=self._observers, progress=self._progress)

    def warmup(self) -> None:
        """Runs once on a tiny input, so that memory is touched and lazily loaded code is in place."""
        for variant in self.variants.values():
            if variant.compiled is not None and variant.info is not None:
                variant.compiled(*example_inputs(variant.info))

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
        from tilewright.driver.compile import compile_graph

        check_model(self.model)
        try:
            gm = capture(self.model, signature, example, dtype=self._precision.capture)
            round_results(gm, self._precision)
        except CaptureError as error:
            if self.options.unpad == "on":
                raise PackingRefused(
                    "padding cannot be removed: the model cannot be captured", why=str(error)
                ) from error
            return Variant(None, None, str(error))
        stored = self.stored.stored if self.stored is not None else None
        compiled = compile_graph(gm, self.options, observers=self._observers, progress=self._progress, stored=stored)
        return Variant(compiled, info(compiled.graph))

    def __repr__(self) -> str:
        return f"CompiledModel({type(self.model).__name__}, {self.options})"
