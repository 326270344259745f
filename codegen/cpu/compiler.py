"""The compiler half of the Triton backend "cpu": Triton IR to LLVM IR to native object code.

Triton imports this module inside its own import (entry point ``triton.backends``), so nothing heavy is imported
at the top, and a module that wants this one imports triton first. The object code goes through Triton's own cache,
keyed by ``CpuBackend.hash`` and the options.
"""

import hashlib
from collections.abc import Callable
from dataclasses import dataclass, fields
from types import ModuleType
from typing import Any, TypeVar

from triton._C.libtriton import ir, passes
from triton.backends.compiler import BaseBackend, GPUTarget, Language

from tilewright import settings
from tilewright.codegen.cpu.target import CpuTarget
from tilewright.codegen.cpu.version import toolchain_version
from tilewright.errors import CodegenError, TilewrightError, UnsupportedOp, Where

T = TypeVar("T")


@dataclass(frozen=True)
class CpuOptions:
    """What a launch may ask of the compiler, with the names Triton's front end and autotuner use.

    ``num_warps``, ``num_ctas``, ``num_stages``, ``maxnreg``, the launch flags and what AMD's and Intel's backends add
    (``waves_per_eu`` to ``grf_mode``) choose how a GPU runs a kernel. They do not change CPU code; they are accepted
    so that kernels tuned for a GPU run as they are.

    Attributes:
        arch: ``CpuTarget.key`` of the instruction set.
        check: checked mode: test every access to memory. The setting ``check`` is its default.
        debug: compile ``tl.device_assert`` in.
        sanitize_overflow: with ``debug``, check integer arithmetic for overflow.
        enable_fp_fusion: allow a multiply and an add to become one fused operation.
    """

    num_warps: int = 4
    num_ctas: int = 1
    num_stages: int = 1
    maxnreg: int | None = None
    arch: str = ""
    backend_name: str = "cpu"
    check: bool = False
    debug: bool = False
    sanitize_overflow: bool = True
    enable_fp_fusion: bool = True
    launch_cooperative_grid: bool = False
    launch_pdl: bool = False
    waves_per_eu: int = 0
    matrix_instr_nonkdim: int = 0
    kpack: int = 1
    schedule_hint: str = "none"
    threads_per_warp: int = 1
    grf_mode: str = "default"
    extern_libs: tuple[tuple[str, str], ...] = ()
    ir_override: str | None = None
    instrumentation_mode: str = ""
    supported_fp8_dtypes: tuple[str, ...] = ("fp8e4nv", "fp8e5")
    deprecated_fp8_dot_operand_dtypes: tuple[str, ...] = ()
    # tf32 is asked for by default in tl.dot; a CPU has no such format, every precision is computed as ieee.
    default_dot_input_precision: str = "ieee"
    allowed_dot_input_precisions: tuple[str, ...] = ("ieee", "tf32", "tf32x3", "bf16x3", "bf16x6")
    max_num_imprecise_acc_default: int = 0

    def hash(self) -> str:
        """Digest of all options; part of Triton's cache key."""
        text = "\n".join(f"{field.name}={getattr(self, field.name)!r}" for field in fields(self))
        return hashlib.sha256(text.encode()).hexdigest()


class CpuBackend(BaseBackend):
    """Triton's compiler interface for the target ``GPUTarget("cpu", CpuTarget.key, 1)``."""

    binary_ext = "obj"

    @staticmethod
    def supports_target(target: GPUTarget) -> bool:
        """True for targets made by ``CpuDriver``."""
        return target.backend == "cpu"

    def hash(self) -> str:
        """Names LLVM, the sources of this backend and the instruction set."""
        return f"{toolchain_version()}-{self._cpu_target().key}"

    def parse_options(self, options: dict[str, Any]) -> CpuOptions:
        """Picks the known options; an unknown one is reported by Triton against the kernel's parameters."""
        known = {field.name for field in fields(CpuOptions)} - {"arch", "backend_name"}
        values = {name: value for name, value in options.items() if name in known and value is not None}
        values = {name: _frozen(value) for name, value in values.items()}
        values.setdefault("check", settings.get_once("check"))
        return CpuOptions(**values, arch=self._cpu_target().key)

    def add_stages(
        self, stages: dict[str, Callable[[Any, dict[str, Any]], Any]], options: CpuOptions, language: Language
    ) -> None:
        """Registers the stages ttir (text with locations), llir (LLVM IR text) and obj (object code).

        Raises:
            UnsupportedOp: the kernel is written in Gluon, which describes GPU register layouts.
        """
        if language != Language.TRITON:
            raise UnsupportedOp(
                "a Gluon kernel cannot run on the CPU",
                why="Gluon programs name GPU register and shared-memory layouts",
                hint="write the kernel in triton.language",
            )
        stages["ttir"] = lambda module, metadata: optimize_ttir(module)
        stages["llir"] = lambda module, metadata: self._lower(module, metadata, options)
        stages["obj"] = lambda text, metadata: self._assemble(text, metadata["name"])

    def pack_metadata(self, metadata: Any) -> tuple[int, int, int]:
        """What a launcher gets on every call: num_warps, num_ctas, shared."""
        return metadata.num_warps, metadata.num_ctas, metadata.shared

    def get_codegen_implementation(self, options: CpuOptions) -> dict[str, Callable[..., Any]]:
        """Front-end hooks: ``tl.dot`` takes tiles of any size."""
        return {"min_dot_size": lambda lhs_type, rhs_type: (1, 1, 1)}

    def get_module_map(self) -> dict[str, ModuleType]:
        """``libdevice`` calls become ``tt.extern_elementwise`` with CUDA's symbol names, which lowering knows."""
        from triton.language.extra.cuda import libdevice

        return {"triton.language.extra.libdevice": libdevice}

    def load_dialects(self, context: Any) -> None:
        """Nothing beyond Triton's own dialects is used."""

    def _cpu_target(self) -> CpuTarget:
        return CpuTarget.from_key(str(self.target.arch))

    def _lower(self, module: Any, metadata: dict[str, Any], options: CpuOptions) -> str:
        from tilewright.codegen.cpu.lower.kernel import lower_module

        name = module.get_entry_func_name()
        lowered = _or_codegen_error(
            name, "lowering", lambda: lower_module(str(module), self._cpu_target(), options.check)
        )
        metadata["name"] = lowered.name
        metadata["params"] = list(lowered.params)
        metadata["shared"] = 1  # bytes: none is used, but tuning code divides by it
        metadata["stops"], metadata["searches"] = lowered.stops, lowered.searches
        return lowered.llvm_ir

    def _assemble(self, llvm_ir: str, name: str) -> bytes:
        from tilewright.codegen.cpu import jit, store

        return store.seal(_or_codegen_error(name, "LLVM", lambda: jit.compile_ir(llvm_ir, self._cpu_target())))


def _or_codegen_error(kernel: str, step: str, run: Callable[[], T]) -> T:
    """Runs a step of compilation; what goes wrong unforeseen is an error of ours that names the kernel."""
    try:
        return run()
    except TilewrightError:
        raise
    except Exception as error:
        raise CodegenError(
            f"{step} failed on this kernel",
            where=Where(node=kernel),
            why=f"{type(error).__name__}: {error}"[:2000],
            hint="a report with this kernel helps us mend it; meanwhile simplify it, or run it on a GPU",
        ) from error


def _frozen(value: Any) -> Any:
    """An option as it is kept: Triton hands options back after a round trip through JSON, which has no tuples."""
    if isinstance(value, dict):
        return tuple(value.items())
    return tuple(_frozen(item) for item in value) if isinstance(value, list) else value


def optimize_ttir(module: Any) -> Any:
    """Runs Triton's target-independent passes; block pointers and descriptors become pointer arithmetic.

    Args:
        module: the front end's module, changed in place.

    Raises:
        UnsupportedOp: a pass failed.
    """
    manager = ir.pass_manager(module.context)
    manager.enable_debug()
    passes.common.add_inliner(manager)
    passes.ttir.add_rewrite_tensor_pointer(manager)
    passes.ttir.add_rewrite_tensor_descriptor_to_pointer(manager)
    passes.common.add_canonicalizer(manager)
    passes.ttir.add_combine(manager)
    passes.ttir.add_reorder_broadcast(manager)
    passes.common.add_cse(manager)
    passes.ttir.add_triton_licm(manager)
    passes.common.add_symbol_dce(manager)
    passes.ttir.add_loop_unroll(manager)
    try:
        manager.run(module, "make_ttir")
    except RuntimeError as error:
        raise UnsupportedOp(
            "Triton's own passes failed on this kernel",
            where=Where(node=module.get_entry_func_name()),
            why=str(error),
            hint="set MLIR_ENABLE_DUMP=1 to see the pass that failed",
        ) from error
    return module
