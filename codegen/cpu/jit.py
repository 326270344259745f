"""LLVM IR text to object code, and object code to machine code that can be called.

One ORC JIT per process holds all loaded code. Each piece is loaded as a library of its own, so kernels may share
symbol names, and is unloaded when its ``Code`` is collected: whoever can call an address holds its ``Code``.
LLVM calls are serialized by llvmlite's own lock and each compilation has its own LLVM context, so every function
here may be called from several threads.
"""

import functools
import itertools
import threading
from typing import Any

from tilewright.codegen.cpu.target import CpuTarget
from tilewright.errors import CodegenError

_library_numbers = itertools.count()
_jit_lock = threading.Lock()


class Code:
    """Loaded machine code; unloaded when this object is collected.

    ``code[symbol]`` is the address of a symbol that ``load`` was asked for.

    Attributes:
        name: first symbol asked for.
        address: its address.
    """

    __slots__ = ("__weakref__", "_jit", "_tracker", "address", "name")

    def __init__(self, name: str, tracker: Any, jit: Any) -> None:
        self.name = name
        self.address: int = tracker[name]
        self._tracker = tracker
        # The tracker unloads through the JIT, which therefore has to live longer.
        self._jit = jit

    def __getitem__(self, symbol: str) -> int:
        return self._tracker[symbol]

    def __repr__(self) -> str:
        return f"Code({self.name!r} at {self.address:#x})"


def compile_ir(llvm_ir: str, target: CpuTarget, *, opt_level: int = 2) -> bytes:
    """Optimizes a module and generates object code.

    Args:
        llvm_ir: text of one LLVM module; its triple and data layout, if any, are replaced by the target's.
        opt_level: 0 to 3, as in ``opt -O``.

    Returns:
        An ELF object file, position independent.

    Raises:
        CodegenError: the text is not a valid module.
    """
    from llvmlite import binding as llvm

    machine = _target_machine(target)
    context = llvm.create_context()
    try:
        module = llvm.parse_assembly(llvm_ir, context=context)
        module.triple = machine.triple
        module.data_layout = str(machine.target_data)
        module.verify()
    except RuntimeError as error:
        raise CodegenError(
            "generated LLVM IR is not valid",
            where=f"target {target.key}",
            why=str(error).strip(),
            hint="this is a bug of the CPU backend; report it with the kernel's source",
        ) from error
    # Kernels arrive vectorized. On softmax, layer norm and matrix product neither vectorizer changed the speed, nor
    # did level 1 or 3; the vectorizers cost up to a third more compile time. Unrolling stays on: it turns short
    # loops over scratch into registers.
    options = llvm.create_pipeline_tuning_options(speed_level=opt_level)
    options.loop_vectorization = False
    options.slp_vectorization = False
    options.loop_unrolling = True
    builder = llvm.create_pass_builder(machine, options)
    builder.getModulePassManager().run(module, builder)
    return machine.emit_object(module)


def load(object_code: bytes, symbol: str, *more: str) -> Code:
    """Loads object code into this process.

    Args:
        object_code: what ``compile_ir`` returned for this machine.
        symbol: name of the function to call. Symbols the object uses but lacks are looked up in the process.
        more: further functions or variables whose addresses are wanted.

    Raises:
        CodegenError: the object cannot be linked, or has no such symbol.
    """
    from llvmlite import binding as llvm

    jit = _jit()
    builder = llvm.JITLibraryBuilder().add_object_img(object_code).add_current_process()
    for name in (symbol, *more):
        builder.export_symbol(name)
    try:
        tracker = builder.link(jit, f"tilewright{next(_library_numbers)}")
    except RuntimeError as error:
        raise CodegenError(
            "object code of a kernel cannot be loaded",
            where=f"symbol '{symbol}'",
            why=str(error).strip(),
            hint="a function that the kernel calls may be missing from libm; report it with the kernel's source",
        ) from error
    return Code(symbol, tracker, jit)


def _jit() -> Any:
    # functools.cache alone could create two JITs from two threads.
    with _jit_lock:
        return _create_jit()


@functools.cache
def _create_jit() -> Any:
    from llvmlite import binding as llvm

    return llvm.create_lljit_compiler(_target_machine(CpuTarget.host()), suppress_errors=True)


def _target_machine(target: CpuTarget) -> Any:
    from llvmlite import binding as llvm

    if target.is_x86 == CpuTarget.host().is_x86:
        llvm.initialize_native_target()
        llvm.initialize_native_asmprinter()
    else:
        llvm.initialize_all_targets()
        llvm.initialize_all_asmprinters()
    return llvm.Target.from_triple(target.triple).create_target_machine(
        cpu=target.cpu, features=target.features, opt=3, reloc="pic", codemodel="default"
    )
